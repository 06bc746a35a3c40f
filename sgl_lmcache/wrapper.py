"""Our side of SGLang's linker wrapper: the tree tells it what it matched and inserted, it asks the engine.

Three things differ from the original, each for a reason met in practice:

- `match` drops the request's old hit marker first. The original keeps it when nothing is found; a stale marker is
  preferred by the next load and lives for ever if the request is then served from HBM.
- `match` keeps the tail's keys per waiting request. SGLang matches every waiting request in every scheduler
  iteration, and the hashes change only when the HBM hit or the prompt does.
- a write-back is given its parent, and where host memory does not hold that parent, the whole path instead. SGLang
  offers a node once in its life in HBM, so pages that host memory has evicted meanwhile would otherwise be lost for
  good, and with them everything below. So is a path that a request hits in HBM. (A path longer than all of host memory
  is not offered again.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.base_prefix_cache import MatchResult
from sglang.srt.mem_cache.hicache_storage import PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    ExternalCacheHitMarker,
    UnifiedCacheLinkerWrapper,
    _PendingOffload,
)

from radix import KEY_NBYTES
from sgl_lmcache.keys import to_blob, to_hashes
from sgl_lmcache.linker import Linker

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import NodeId

    from sgl_lmcache.cache import TieredRadixCache


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """What a request lacks in HBM: whole pages after its device hit, below the page `anchor` (None: the root)."""

    req: Req
    n_pages: int
    device_hit_len: int
    anchor: bytes | None
    keys: bytes


class TieredLinkerWrapper(UnifiedCacheLinkerWrapper):
    """See the module's text. One per cache; scheduler thread only."""

    cache: TieredRadixCache
    cache_linker: Linker

    def __init__(self, cache: TieredRadixCache, linker: Linker) -> None:
        super().__init__(cache, linker)
        self._engine = linker.engine
        self.tails: dict[str, Tail] = {}

    # ---- match ----

    def match(self, key: RadixKey, req: Req, result: MatchResult) -> MatchResult:
        """Add to SGLang's HBM match what host memory can restore behind it, and leave a marker for `load_back`."""
        self.hit_markers.pop(req.rid, None)
        key, _ = key.maybe_to_bigram_view(self.cache.tree_core.is_eagle)
        tail = self._tail(key, req, result)
        if tail is None:
            return result
        if tail.anchor is not None:
            self._engine.hbm_used(tail.anchor)
        if not tail.keys:
            return result
        n_pages = self._engine.lookup(tail.keys)
        if n_pages == 0:
            return result
        self.hit_markers[req.rid] = ExternalCacheHitMarker(to_hashes(tail.keys, n_pages), tail.device_hit_len)
        return result._replace(last_host_node=result.best_match_node, host_hit_length=n_pages * self.cache.page_size)

    def _tail(self, key: RadixKey, req: Req, result: MatchResult) -> Tail | None:
        """The request's tail, from the last match if it still holds. None: SGLang has no hash to chain it to."""
        device_hit_len = result.device_prefix_len
        n_pages = len(key) // self.cache.page_size
        known = self.tails.get(req.rid)
        if (
            known is not None
            and known.req is req
            and known.n_pages == n_pages
            and known.device_hit_len == device_hit_len
        ):
            return known
        anchor = None
        if device_hit_len > 0:
            anchor_hash = self.cache.get_last_hash_value(result.last_device_node)
            if anchor_hash is None:
                return None
            anchor = bytes.fromhex(anchor_hash)
        keys = to_blob(self._tail_hashes(key, result, device_hit_len))
        tail = Tail(req, n_pages, device_hit_len, anchor, keys)
        self.tails[req.rid] = tail
        return tail

    # ---- write-back ----

    def _offload_node(self, node_id: NodeId, transfers: list[PoolTransfer]) -> None:
        """A node has been inserted: hand its pages, or its whole path, to the linker; lock it while they are copied."""
        core = self.cache.tree_core
        (kv,) = transfers
        path = core.collect_path_info([node_id])[0]
        parent_hash = core.get_last_hash_value(path[-1].parent_id)
        parent = bytes.fromhex(parent_hash) if parent_hash else None
        if not self._engine.holds(parent) and self._fits(path):
            copying = self._write_back_path(node_id, path)
        else:
            copying = self._write_back(to_blob(kv.keys), parent, kv.device_indices)
        core.mark_external_linker_offload_pending(node_id)
        if not copying:
            core.finish_external_linker_offload([node_id], node_id, True)
            return
        self._lock(node_id, [node_id])

    def offer_again(self, node_id: NodeId, last_key: bytes) -> None:
        """A request hits HBM down to this page, and host memory has lost it or a page above: keep its path again.

        SGLang would not: it offers a node once. When HBM evicts these pages, which are in use, they would be gone.
        """
        core = self.cache.tree_core
        if self._engine.holds(last_key) or core.get_last_hash_value(node_id) != last_key.hex():
            return
        path = core.collect_path_info([node_id])[0]
        if self._fits(path) and self._write_back_path(node_id, path):
            self._lock(node_id, [])

    def _fits(self, path: Sequence[Any]) -> bool:
        return bool(path[-1].path_end <= self._engine.host.n_slots * self.cache.page_size)

    def _write_back_path(self, node_id: NodeId, path: Sequence[Any]) -> bool:
        """The node, and all that is above it."""
        core = self.cache.tree_core
        keys = to_blob([*core.get_prefix_hash_values(node_id), *core.get_hash_values(node_id)])
        return self._write_back(keys, None, core.collect_full_device_indices(node_id, path[0].parent_id))

    def _write_back(self, keys: bytes, parent: bytes | None, device_indices: torch.Tensor) -> bool:
        assert len(keys) // KEY_NBYTES * self.cache.page_size == len(device_indices)
        return self.cache_linker.write_back(keys, parent, device_indices)

    def _lock(self, node_id: NodeId, publish: list[NodeId]) -> None:
        """Until the copy just begun has been acknowledged. publish: nodes that SGLang then knows to be stored."""
        lock_params = self.cache.inc_lock_ref(node_id).to_dec_params()
        self.pending_offloads.append(_PendingOffload(node_id, lock_params, publish))

    def acknowledge(self, *, n_landed: int, n_failed: int) -> None:
        """The first write-backs have ended on every rank, n_landed well and then n_failed badly: unlock their nodes."""
        n_ended = n_landed + n_failed
        for number in range(n_ended):
            self.cache_linker.pop_write_back(landed=number < n_landed)
        self.commit_completed_offloads([True] * n_ended)

    # ---- life ----

    def forget(self, rid: str) -> None:
        """The request has ended or its tokens are about to change."""
        self.tails.pop(rid, None)
        self.hit_markers.pop(rid, None)

    def reset(self) -> None:
        super().reset()
        self.tails.clear()
