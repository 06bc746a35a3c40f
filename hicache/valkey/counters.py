"""What a Valkey tier counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Since the tier was opened; pages, unless they say otherwise. Changed under the tier's lock only."""

    loaded: int = 0
    """Received into the slab, verified and served."""
    missed: int = 0
    """Loads that ended at a page which was not there: evicted or expired since it was looked up (not pages)."""
    stored: int = 0
    """Sent and accepted."""
    deduplicated: int = 0
    """Asked to be stored that were there already; they live on for another `ttl`."""
    deleted: int = 0
    """Left because the engine said so."""
    corrupt: int = 0
    """Received and found damaged, cut, foreign or of the wrong type: a miss, and the key is deleted."""
    other_version: int = 0
    """Received and found to be of another version of the format: a miss, and left to those who read it."""
    skipped_pressure: int = 0
    """Not stored because more bytes waited to be sent than the queue takes."""
    skipped_full: int = 0
    """Not stored because the server is at its `maxmemory`, and evicts nothing."""
    read_errors: int = 0
    """Calls to look up or load that failed (not pages)."""
    write_errors: int = 0
    """Calls to store or delete that failed (not pages)."""
    redirections: int = 0
    """Keys for which a node of the cluster sent us to another."""
    read_nbytes: int = 0
    """Bytes of payloads received."""
    written_nbytes: int = 0
    """Bytes of payloads sent."""
