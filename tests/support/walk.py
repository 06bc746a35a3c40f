"""A random walk through everything that can happen to a scheduler and its cache, from a seed.

Hypothesis draws every rule about equally often; what matters here lies behind long runs of the common ones (hundreds of
requests through a small cache), with the rare ones strewn in. So steps are drawn by weight. Steps are plain values that
any number of ranks can be made to take, and the last of them are what a failure prints.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.support.scheduler import Prompt, Scheduler

N_PAGES = 9
"""The longest prompt, in whole pages."""
TENANTS = [(None, None)] * 8 + [("key", None), (None, "salt"), (None, "key")]


@dataclass(frozen=True)
class Step:
    """A call of one of `Scheduler`'s methods."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def take(self, scheduler: Scheduler) -> None:
        getattr(scheduler, self.name)(*self.args, **dict(self.kwargs))

    def __str__(self) -> str:
        named = (f"{name}={value!r}" for name, value in self.kwargs)
        return f"{self.name}({', '.join([*map(repr, self.args), *named])})"


def step(name: str, *args: Any, **kwargs: Any) -> Step:
    return Step(name, args, tuple(kwargs.items()))


class Walk:
    """Draws steps that `scheduler`, one rank's, can take. Copies are left to `copy_step`: each rank has its own."""

    def __init__(self, rng: Random, scheduler: Scheduler) -> None:
        self._rng = rng
        self._s = scheduler
        self._n_requests = 0
        self._n_quiet = 0
        self._in_session = False
        self.taken: deque[str] = deque(maxlen=40)
        self._weighted: list[tuple[int, Callable[[], Step | None]]] = [
            (30, self._arrive),
            (26, self._prefill),
            (14, self._decode),
            (3, self._abort),
            (2, self._retract),
            (2, self._evict),
            (5, self._flush),
            (2, self._weights),
        ]

    def next(self) -> Step:
        """One step that is possible now."""
        self._n_quiet -= 1
        if self._s.real.engine.tainted and self._rng.random() < 0.1:
            self._n_quiet = 20
        while True:
            (draw,) = self._rng.choices([d for _, d in self._weighted], [weight for weight, _ in self._weighted])
            drawn = draw()
            if drawn is not None:
                return drawn

    # ---- clients ----

    def _arrive(self) -> Step | None:
        rng = self._rng
        if rng.random() < 0.005:
            self._n_quiet = 40  # so that there are idle moments: SGLang flushes only then
        if self._n_quiet > 0 or len(self._s.waiting) >= 6:
            return None
        self._n_requests += rng.random() < 0.97  # or the client uses its request's name again
        return step("arrive", f"r{self._n_requests}", self._prompt())

    def _prompt(self) -> Prompt:
        """Pages of few texts, so that prompts share and branch all the time. Some end inside a page."""
        rng, page_size = self._rng, self._s.real.page_size
        pages = [rng.choice((0, 0, 0, 1, 2)) for _ in range(rng.randint(1, N_PAGES))]
        tokens = [10 * page + i for page in pages for i in range(page_size)] + list(range(rng.randint(0, page_size)))
        extra_key, cache_salt = rng.choice(TENANTS)
        return Prompt(tuple(tokens), rng.choice((1, 1, 2, 7)), extra_key, cache_salt, is_kept=rng.random() > 0.03)

    def _abort(self) -> Step | None:
        kind = self._rng.choice(("waiting", "waiting", "running", "chunked"))
        if kind == "chunked":
            return step("abort_chunked") if self._s.chunked is not None else None
        requests = self._s.waiting if kind == "waiting" else self._s.running
        return step(f"abort_{kind}", self._rng.randrange(len(requests))) if requests else None

    # ---- the scheduler ----

    def _prefill(self) -> Step:
        n_pages, n_requests = self._rng.choice((1, 2, 4, 16, 32)), self._rng.randint(1, 6)
        return step("prefill", n_pages, n_requests, abort_loading=self._rng.random() < 0.1)

    def _decode(self) -> Step | None:
        return step("decode") if self._s.running else None

    def _retract(self) -> Step | None:
        return step("retract", self._rng.randrange(len(self._s.running))) if self._s.running else None

    def _evict(self) -> Step:
        return step("evict", self._rng.randint(1, 8))

    def _flush(self) -> Step | None:
        if self._s.real.engine.tainted:
            return step("flush", paused=True)
        often = 0.5 if self._s.tiers else 0.1  # what is dropped above comes back from below
        return step("flush", paused=self._rng.random() < 0.5) if self._rng.random() < often else None

    # ---- weights ----

    def _weights(self) -> Step | None:
        if self._rng.random() < 0.8 and not self._s.in_weight_session:
            return None
        flush = self._rng.random() < 0.5
        if self._rng.random() < 0.1:  # whatever the state: SGLang refuses what is out of turn
            return step(self._rng.choice(("begin_weights", "load_weights", "end_weights")))
        if self._s.in_weight_session:
            return step("load_weights", flush=flush) if self._rng.random() < 0.5 else step("end_weights")
        return step("begin_weights") if self._rng.random() < 0.3 else step("update_weights", flush=flush)


def copy_step(rng: Random, scheduler: Scheduler) -> Step | None:
    """Something of this rank's copies ends, or a tier below answers. None: nothing runs."""
    copies, tiers = scheduler.copies, scheduler.tiers
    if tiers and rng.random() < 0.004:
        return step("tier_forgets", rng.randrange(len(tiers)), rng.randrange(10))
    asked = [position for position, tier in enumerate(tiers) if tier.n_held]
    if asked and rng.random() < 0.8:
        return step(
            "tier_answers",
            rng.choice(asked),
            rng.choice((1, 2, 4, 100)),
            n_failing=int(rng.random() < 0.02),
            n_missing=int(rng.random() < 0.02),
        )
    if rng.random() < 0.03:
        return step("fail_restores", rng.random() < 0.3)
    if copies.restores and rng.random() < 0.4:
        return step("end_restore", rng.randrange(len(copies.restores)))
    if copies.offloads:
        i = rng.randrange(len(copies.offloads)) if rng.random() < 0.3 else 0
        return step("end_offload", i, landed=rng.random() > 0.05)
    return None
