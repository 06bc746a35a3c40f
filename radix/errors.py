"""What can go wrong in the index. Whatever raises one of these has changed nothing."""


class RadixError(Exception):
    """Any refusal of the index that depends on what it holds."""


class IndexFull(RadixError):  # noqa: N818 - named for the state, like queue.Full
    """Fewer rows are free than the pages that are new."""


class IllegalTransition(RadixError):  # noqa: N818 - named for the event
    """A page was not in a state that this transition starts from."""


class NotLeased(RadixError):  # noqa: N818
    """A lease was released more often than it was taken."""


class StillHeld(RadixError):  # noqa: N818
    """Leases or incoming pages forbid to drop everything."""
