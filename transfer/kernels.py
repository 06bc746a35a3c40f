"""A compiled batched memcpy, for scattered chunks of some KiB.

libc's memcpy of a 16 KiB chunk reads every destination line into the cache before it overwrites it: half as many
bytes again through a memory bus that is the only limit. It switches to non-temporal stores, which skip that read, only
for copies of many MiB. Pages of KV are scattered, so no single call gets so large, and neither side fits the cache. So
the kernel stores non-temporally itself, 256 bytes a step, and prefetches the next chunk while it writes this one,
because the hardware's prefetcher stops at each chunk's end. Figures: docs/adr/0004-page-layout-and-slab.md.

Numba has no such stores; `_stream_block` and `_prefetch_block` emit the LLVM instructions. Both are plain LLVM, so
other processors get their own form, or an ordinary store. Non-temporal stores are weakly ordered: the closing fence
makes all bytes visible before the call returns, thus before any flag that says so.

Addresses are trusted: the callers check bounds first.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

Int64Array = npt.NDArray[np.int64]
CopyKernel = Callable[[Int64Array, Int64Array, Int64Array, Int64Array, Int64Array, Int64Array, Int64Array], None]

LINE_NBYTES = 64
BLOCK_NBYTES = 4 * LINE_NBYTES
"""Copied a step: four lines in registers."""

_memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.uintp))
_LINE = ir.VectorType(ir.IntType(64), LINE_NBYTES // 8)


def _line_pointers(builder: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
    offsets = (ir.Constant(ir.IntType(64), offset) for offset in range(0, BLOCK_NBYTES, LINE_NBYTES))
    return [builder.inttoptr(builder.add(address, offset), _LINE.as_pointer()) for offset in offsets]


def _stream_block_impl(_typing: Any, _dst: Any, _src: Any) -> Any:
    """Copies `BLOCK_NBYTES` past the cache. `dst` is a multiple of `LINE_NBYTES`, `src` any address."""

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> Any:
        non_temporal = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        dst, src = args
        lines = [builder.load(pointer, align=1) for pointer in _line_pointers(builder, src)]
        for line, pointer in zip(lines, _line_pointers(builder, dst), strict=True):
            builder.store(line, pointer, align=LINE_NBYTES).set_metadata("nontemporal", non_temporal)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _prefetch_block_impl(_typing: Any, _address: Any) -> Any:
    """Asks for `BLOCK_NBYTES` to be read. Never faults, whatever the address."""

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> Any:
        i32, i8_pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [i8_pointer, i32, i32, i32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [i8_pointer], function_type)
        read, locality, data = i32(0), i32(2), i32(1)
        for pointer in _line_pointers(builder, args[0]):
            builder.call(prefetch, [builder.bitcast(pointer, i8_pointer), read, locality, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _fence_impl(_typing: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


_stream_block = intrinsic(_stream_block_impl)
_prefetch_block = intrinsic(_prefetch_block_impl)
_fence = intrinsic(_fence_impl)


def _copy_rows(
    dst_bases: Int64Array,
    dst_strides: Int64Array,
    dst_rows: Int64Array,
    src_bases: Int64Array,
    src_strides: Int64Array,
    src_rows: Int64Array,
    nbytes: Int64Array,
) -> None:
    """For each row j and plane p, copies `nbytes[p]` from `src_rows[j]` to `dst_rows[j]` of that plane.

    Row r of plane p lies at `bases[p] + r * strides[p]`. Source and destination do not overlap.
    """
    n_planes = nbytes.size
    n_chunks = dst_rows.size * n_planes
    for chunk in range(n_chunks):
        row, plane = divmod(chunk, n_planes)
        dst = dst_bases[plane] + dst_rows[row] * dst_strides[plane]
        src = src_bases[plane] + src_rows[row] * src_strides[plane]
        next_row, next_plane = divmod(min(chunk + 1, n_chunks - 1), n_planes)
        ahead = src_bases[next_plane] + src_rows[next_row] * src_strides[next_plane]
        streamed = nbytes[plane] - nbytes[plane] % BLOCK_NBYTES if dst % LINE_NBYTES == 0 else 0
        for offset in range(0, streamed, BLOCK_NBYTES):
            _prefetch_block(ahead + offset)
            _stream_block(dst + offset, src + offset)
        if streamed < nbytes[plane]:
            _memcpy(dst + streamed, src + streamed, nbytes[plane] - streamed)
    _fence()


_vector = types.Array(types.int64, 1, "C")
copy_rows: CopyKernel = njit(types.void(*[_vector] * 7), nogil=True, cache=True)(_copy_rows)
"""`_copy_rows`, compiled for contiguous int64 arrays (others are a TypeError) with the GIL released."""
