"""Processes that want one directory at the same moment: `<path> <server> <server> ...`, a process for each.

Each says `<pid> <server> taken` or `<pid> <server> refused`, and keeps what it has until the standard input ends.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hicache.ssd import StoreError
from hicache.ssd.locks import lock_directory


def main(path: str, *servers: str) -> None:
    start, go = os.pipe()
    for server in servers:
        if not os.fork():
            os.close(go)
            os.read(start, 1)
            contend(Path(path), server)
            os._exit(0)
    os.close(go)
    sys.stdin.read()


def contend(path: Path, server: str) -> None:
    try:
        lock_directory(path, server)
        outcome = "taken"
    except StoreError:
        outcome = "refused"
    os.write(1, f"{os.getpid()} {server} {outcome}\n".encode())
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
