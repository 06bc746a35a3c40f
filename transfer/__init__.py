"""Moves bytes: page layout, the host slab, copies between the device's KV pool and the slab. Knows no tokens.

Read in the order that data flows:

    layout    the bytes of one page, and its views as FlashInfer paged KV
    slab      the host memory that holds pages; slots: which of it is free
    copies    the contract: `DevicePool`, `Copies` and the handles of a batch under way
    cpu       copies between host-memory pools and the slab: threads around `kernels`, a compiled memcpy
    cuda      copies between a GPU and the slab: streams and events around a device's copy functions
    files     slots in preallocated files, and direct I/O between them and the slab
    errors    what this room raises

Imports none of the project's other packages, nor sglang. Nothing is re-exported here, so that a user of the layout
does not load the compiled kernels.
"""
