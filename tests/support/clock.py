"""A clock for what takes one: it stands still until a test moves it."""

from __future__ import annotations


class Clock:
    """Monotonic seconds that move when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s
