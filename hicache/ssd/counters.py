"""What an SSD tier counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Since the tier was opened; pages, unless they say otherwise. Changed under the volume's lock only."""

    loaded: int = 0
    """Read into the slab, verified and served."""
    stored: int = 0
    """Written and named in memory; a commit of the map follows."""
    deduplicated: int = 0
    """Asked to be stored that were there already, or being written."""
    evicted: int = 0
    """Left to make room."""
    evicted_quota: int = 0
    """Left because a quota was theirs, or took its own back."""
    deleted: int = 0
    """Left because the engine said so."""
    corrupt: int = 0
    """Read and found damaged, or another page's: a miss, and the copy is dropped. Each once."""
    skipped_pressure: int = 0
    """Not stored because more bytes waited to be written than the queue takes."""
    skipped_full: int = 0
    """Not stored because nothing could leave to make room."""
    skipped_quota: int = 0
    """Not stored because the quota of their tenant is full of pages that may not leave, or too small."""
    skipped_endurance: int = 0
    """Not stored because the endurance budget did not allow it."""
    orphans: int = 0
    """Not stored because the page above them was not there."""
    read_errors: int = 0
    """Reads that the disk refused: calls that failed together, or the single slots if only some did."""
    write_errors: int = 0
    """Writes, and makings of room, that the disk refused; counted likewise."""
    map_errors: int = 0
    """Accesses to the map that failed."""
    filled: int = 0
    """Read from the map after the start."""
    map_rejected: int = 0
    """Rows of the map that made no sense, and were deleted."""
    map_salvaged: int = 0
    """Times that a damaged map was made anew from what could be read of it (not pages)."""
    crashes: int = 0
    """Bugs met by the threads of the tier, each with a traceback in the log (not pages)."""
    read_nbytes: int = 0
    """Bytes read from data files."""
    written_nbytes: int = 0
    """Bytes written to data files."""
