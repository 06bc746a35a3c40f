"""What a Mooncake tier counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Since the tier was opened; pages, unless they say otherwise. Changed under the tier's lock only."""

    loaded: int = 0
    """Received into the slab, verified and served."""
    missed: int = 0
    """Loads that ended at a page which was not there: evicted since it was looked up, or on a node that is out (not
    pages)."""
    stored: int = 0
    """Put into the pool."""
    deduplicated: int = 0
    """Asked to be stored that were there already."""
    deleted: int = 0
    """Left because the engine said so."""
    corrupt: int = 0
    """Received and found damaged, cut or foreign: a miss, and the object is removed."""
    other_version: int = 0
    """Received and found to be of another version of the format: a miss, and left to those who read it."""
    unread: int = 0
    """Asked of a node that did not answer."""
    skipped_pressure: int = 0
    """Not stored because more bytes waited to be sent than the queue takes."""
    skipped_full: int = 0
    """Not stored because no segment of the pool had room."""
    read_errors: int = 0
    """Calls to look up or load that failed, or some of whose pages did not come (not pages)."""
    write_errors: int = 0
    """Calls to store or delete that failed, or some of whose pages were not taken (not pages)."""
    restarts: int = 0
    """Client processes started after the first (not pages)."""
    read_nbytes: int = 0
    """Bytes of payloads received."""
    written_nbytes: int = 0
    """Bytes of payloads put."""
