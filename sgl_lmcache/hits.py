"""How much of each prompt was found where, as SGLang tells it with the answer, and the time that this has saved.

SGLang splits what a request hits into `device`, `host` and `storage` when its first batch is made
(`cached_tokens_details`). These are the same numbers, taken when that batch has been launched, with `storage` split
further: its fetch knows which tier has brought which pages. A request that SGLang retracts and starts again is counted
once, as SGLang does.

The time saved is what a prefill of the pages that were found would have taken, by the prefills that this server has
measured. It is an estimate, what loading took is not deducted, and the part of HBM would be saved without us, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hicache import PrefillSpeed, Ticket

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Hits:
    """See the module's text. Scheduler thread only. page_size: tokens a page."""

    def __init__(self, speed: PrefillSpeed, page_size: int) -> None:
        self._speed = speed
        self._page_size = page_size
        self.n_requests = 0
        self.miss_tokens = 0
        self.hit_tokens = {"hbm": 0, "host": 0}
        """By tier, those below host memory from their first hit on."""
        self.saved_s = {"hbm": 0.0, "host": 0.0}
        """Seconds, likewise."""

    def launched(self, req: Req, ticket: Ticket) -> None:
        """The first batch of a request has been launched."""
        if req.retracted_stain:
            return
        self.n_requests += 1
        start = 0
        for tier, n_tokens in found(req, ticket, self._page_size):
            end = start + n_tokens
            saved_s = self._speed.predict(start // self._page_size, end // self._page_size)
            self.hit_tokens[tier] = self.hit_tokens.get(tier, 0) + n_tokens
            self.saved_s[tier] = self.saved_s.get(tier, 0.0) + (saved_s or 0.0)
            start = end
        self.miss_tokens += len(req.origin_input_ids) - start


def found(req: Req, ticket: Ticket, page_size: int) -> Iterator[tuple[str, int]]:
    """Where the prompt of a request that has just been launched was found: (tier, tokens), which add up to what SGLang
    says. A tier below host memory may come several times."""
    yield "hbm", req.cached_tokens_device
    yield "host", req.cached_tokens_host
    n_left = req.cached_tokens_storage
    if ticket.fetch is None:
        return
    for tier, n_pages in ticket.fetch.origins(*ticket.fetched):
        n_tokens = min(n_pages * page_size, n_left)  # more may have landed since SGLang was told
        n_left -= n_tokens
        yield tier, n_tokens
