"""What stops a server at its start. Nothing here is raised once it serves."""

from __future__ import annotations


class StartError(ValueError):
    """The server cannot start with what it was given. The message is one sentence for the person who started it."""


class RefusedError(StartError):
    """The combination is known and not supported; the message names the reason and what to change."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"sgl_lmcache does not run here: {reason}.")
