"""The SSD tier: a bounded store of pages in files, that is there after a restart.

Read in this order:

    tier        what the engine calls
    pages       the books in memory: every slot is free, incoming, resident or dying
    loads, stores, workers      bytes on their way, and the threads that move them
    owners, room    which tenant's pages they are; what leaves so that others can come, by quotas
    map, keeper, fill           which page is in which slot, in SQLite; the thread that writes it; reading it at a start
    directory, locks, sizes, opening    names, who may use what, the cap
    volume, breaker             an open store, and what to do when its disk fails
    checksum    pages are bound to their names
    counters    what is counted
    check       an offline scan of stores that are not open
"""

from hicache.ssd.check import Damage, Report, check_path, check_store
from hicache.ssd.counters import Counters
from hicache.ssd.directory import check_directory, check_limit
from hicache.ssd.locks import StoreError
from hicache.ssd.sizes import limit_for
from hicache.ssd.tier import SsdTier

__all__ = [
    "Counters",
    "Damage",
    "Report",
    "SsdTier",
    "StoreError",
    "check_directory",
    "check_limit",
    "check_path",
    "check_store",
    "limit_for",
]
