"""`sgl-lmcache status`: what a running server's cache holds, finds and suffers from, read from its `/metrics`.

Everything shown is in docs/metrics.md, summed over the server's ranks. Nothing is asked of the server but that page, so
looking costs it what a scrape costs. Rates are counts divided by counts: since the server's start, and, where somebody
watches, since the oldest look that is not older than `WINDOW_S`.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from sgl_lmcache.errors import StartError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

TIMEOUT_S: Final = 10.0
MAX_NBYTES: Final = 64 << 20
"""Of a metrics page; SGLang's has some hundred kilobytes."""

WINDOW_S: Final = 300.0
"""How far back the rates of `--watch` go."""

UPPER: Final = ("hbm", "host")
"""The tiers that every server has; those below come in the order of the page, which is that of their first use."""


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier, all ranks together. None: nobody counts that for this tier. Counts are since the server's start."""

    tier: str
    available: bool | None
    n_pages: int | None
    used_nbytes: int
    limit_nbytes: int
    hit_tokens: int
    evicted_pages: int
    skipped_pages: int
    corrupt_pages: int
    errors: int
    pending_pages: int
    """On their way to it from the tier above."""

    @property
    def health(self) -> str:
        if self.available is False:
            return "given up"
        return "damaged pages" if self.corrupt_pages else "ok"


@dataclass(frozen=True, slots=True)
class Status:
    """One look at a server. Counts are since its start."""

    tiers: tuple[TierStatus, ...]
    requests: int
    miss_tokens: int
    saved_s: float
    """Estimated seconds of prefill that hits below HBM have saved."""
    waiting_requests: int
    fetch_pages: int
    expired_waits: int
    recomputed_fetches: int
    """Times that what a lower tier had was computed nevertheless, all or some, because that was faster."""
    slow_calls: int
    call_s: float

    @property
    def hit_tokens(self) -> int:
        return sum(tier.hit_tokens for tier in self.tiers)

    @property
    def prompt_tokens(self) -> int:
        return self.hit_tokens + self.miss_tokens

    def hits(self, tier: str) -> int:
        return sum(one.hit_tokens for one in self.tiers if one.tier == tier)


class _Page:
    """A metrics page. Raises ValueError for text that is none."""

    def __init__(self, text: str) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        self.is_of_sglang = any(sample.name.startswith("sglang:") for sample in samples)
        self._samples = [sample for sample in samples if sample.name.startswith("sgl_lmcache_")]

    @property
    def is_ours(self) -> bool:
        return bool(self._samples)

    def values(self, name: str, **labels: str) -> Iterator[float]:
        for sample in self._samples:
            if sample.name == f"sgl_lmcache_{name}" and labels.items() <= sample.labels.items():
                yield sample.value

    def total(self, name: str, **labels: str) -> int:
        return int(sum(self.values(name, **labels)))

    def tiers(self) -> list[str]:
        named = (sample.labels["tier"] for sample in self._samples if "tier" in sample.labels)
        return list(dict.fromkeys((*UPPER, *named)))


def parse(text: str, url: str) -> Status:
    """What a metrics page says. url: where it is from. Raises `StartError`."""
    try:
        page = _Page(text)
    except ValueError as error:
        raise StartError(
            f"{url}/metrics is not a page of metrics ({error}); name an SGLang server's address."
        ) from error
    if not page.is_ours:
        if page.is_of_sglang:
            raise StartError(
                f"{url} is an SGLang server without this cache; start it with --radix-cache-backend sgl_lmcache."
            )
        raise StartError(f"{url} is not an SGLang server, by its metrics; name one's address with --url.")
    return Status(
        tiers=tuple(_tier(page, tier) for tier in page.tiers()),
        requests=page.total("requests_total"),
        miss_tokens=page.total("miss_tokens_total"),
        saved_s=sum(page.values("saved_seconds_total")) - sum(page.values("saved_seconds_total", tier="hbm")),
        waiting_requests=page.total("waiting_requests"),
        fetch_pages=page.total("fetch_pages"),
        expired_waits=page.total("expired_waits_total"),
        recomputed_fetches=sum(
            page.total("fetch_decisions_total", decision=decision) for decision in ("recompute", "load_part")
        ),
        slow_calls=page.total("slow_calls_total"),
        call_s=sum(page.values("call_seconds_total")),
    )


def _tier(page: _Page, tier: str) -> TierStatus:
    available, n_pages = list(page.values("tier_available", tier=tier)), list(page.values("tier_pages", tier=tier))
    return TierStatus(
        tier=tier,
        available=all(available) if available else None,
        n_pages=int(sum(n_pages)) if n_pages else None,
        used_nbytes=page.total("tier_used_bytes", tier=tier),
        limit_nbytes=page.total("tier_limit_bytes", tier=tier),
        hit_tokens=page.total("hit_tokens_total", tier=tier),
        evicted_pages=page.total("evicted_pages_total", tier=tier),
        skipped_pages=page.total("skipped_pages_total", tier=tier),
        corrupt_pages=page.total("corrupt_pages_total", tier=tier),
        errors=page.total("tier_errors_total", tier=tier),
        pending_pages=page.total("write_back_pages") if tier == "host" else page.total("spill_pages", tier=tier),
    )


def read(url: str) -> Status:
    """Ask a server. url: such as http://127.0.0.1:30000. Blocks for `TIMEOUT_S` at most; raises `StartError`."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/metrics", timeout=TIMEOUT_S) as answer:
            text = answer.read(MAX_NBYTES).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            raise StartError(f"{url} publishes no metrics; start the server with --enable-metrics.") from error
        raise StartError(f"{url}/metrics is answered with {error.code} {error.reason}, not with metrics.") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise StartError(
            f"{url} cannot be reached ({getattr(reason, 'strerror', None) or reason}); start the server, or name its "
            "address with --url."
        ) from error
    return parse(text, url)


# ---- what is shown ----


@dataclass(frozen=True, slots=True)
class Look:
    """A status, and when it was taken, in monotonic seconds."""

    at_s: float
    status: Status


class Looks:
    """The looks of the last `WINDOW_S`, as far as they are of one server's life."""

    def __init__(self) -> None:
        self._looks: deque[Look] = deque()

    def add(self, look: Look) -> Look | None:
        """Returns the oldest look that the new one may be compared with; None: it is the first."""
        if self._looks and look.status.requests < self._looks[-1].status.requests:
            self._looks.clear()  # the server has been started again
        self._looks.append(look)
        while look.at_s - self._looks[0].at_s > WINDOW_S:
            self._looks.popleft()
        return self._looks[0] if len(self._looks) > 1 else None


def render(now: Look, before: Look | None = None) -> RenderableType:
    """Two tables that fit into 80 columns, and a few lines. before: an earlier look, for the rates since then."""
    from rich.console import Group

    since = "" if before is None else f"last {now.at_s - before.at_s:.0f} s"
    holds = _table(["tier", "health", "used", "of", "pages", "damaged", "errors"], map(_held, now.status.tiers))
    finds = _table(
        ["tier", "hit tokens", "of prompts", since, "evicted", "skipped", "under way"],
        (_found(tier, now.status, None if before is None else before.status) for tier in now.status.tiers),
    )
    return Group(holds, finds, *_lines(now.status))


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for row in rows:
        table.add_row(*row)
    return table


def _held(tier: TierStatus) -> Sequence[str]:
    from sgl_lmcache.memory import format_nbytes

    return (
        tier.tier,
        tier.health,
        format_nbytes(tier.used_nbytes) if tier.limit_nbytes else "shared",
        format_nbytes(tier.limit_nbytes) if tier.limit_nbytes else "",
        "" if tier.n_pages is None else f"{tier.n_pages:,}",
        f"{tier.corrupt_pages:,}",
        f"{tier.errors:,}",
    )


def _found(tier: TierStatus, now: Status, before: Status | None) -> Sequence[str]:
    recently = ""
    if before is not None:
        recently = _share(tier.hit_tokens - before.hits(tier.tier), now.prompt_tokens - before.prompt_tokens)
    return (
        tier.tier,
        f"{tier.hit_tokens:,}",
        _share(tier.hit_tokens, now.prompt_tokens),
        recently,
        f"{tier.evicted_pages:,}",
        f"{tier.skipped_pages:,}",
        f"{tier.pending_pages:,}",
    )


def _lines(status: Status) -> Iterator[str]:
    yield (
        f"{status.requests:,} requests, {status.prompt_tokens:,} prompt tokens, "
        f"{_share(status.hit_tokens, status.prompt_tokens) or '0%'} found; hits below HBM have saved about "
        f"{status.saved_s:,.1f} s of prefill"
    )
    yield (
        f"{status.waiting_requests:,} requests wait; {status.fetch_pages:,} pages on their way up; "
        f"{status.expired_waits:,} waits in vain; {status.recomputed_fetches:,} times computed because that was faster"
    )
    yield f"{status.slow_calls:,} slow calls (over 5 ms); all calls have kept the scheduler for {status.call_s:,.1f} s"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else ""


def watch(
    read_status: Callable[[], Status],
    console: Console,
    *,
    period_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    """Show a look every period_s until somebody interrupts it. A server that does not answer is shown as that.

    clock: monotonic seconds. Returns at a KeyboardInterrupt.
    """
    from rich.live import Live

    looks = Looks()
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                look = Look(clock(), read_status())
                live.update(render(look, looks.add(look)), refresh=True)
            except StartError as error:
                live.update(str(error), refresh=True)
            sleep(period_s)


def command(url: str, *, watch_s: float | None, as_json: bool) -> int:
    """`sgl-lmcache status`. watch_s: seconds from look to look; None: only one. Returns 1 if a tier is given up."""
    from rich.console import Console

    url, console = url.rstrip("/"), Console()
    if watch_s is not None:
        watch(lambda: read(url), console, period_s=watch_s, clock=time.monotonic, sleep=time.sleep)
        return 0
    status = read(url)
    if as_json:
        print(json.dumps(asdict(status), indent=2))
    else:
        console.print(render(Look(time.monotonic(), status)))
    return int(any(tier.available is False for tier in status.tiers))
