"""What this room raises. A full or absent resource is an error here; a miss is not known here."""


class TransferError(Exception):
    """Base of the errors of `transfer`."""


class LayoutError(TransferError, ValueError):
    """Sizes that describe no page, or tensors that do not match the page's layout."""


class SlabError(TransferError):
    """The slab's memory could not be had or pinned, or the slab was used after its end."""


class CopyError(TransferError):
    """A copy between the device pool and the slab did not complete, or was asked of closed copies."""
