"""The compiled passes. Import this module only through `_layout.kernels()`: it loads numba.

Every kernel takes raw addresses and a storage code, decodes a block of elements into float64 scratch
that stays in the L1 cache, and reduces the scratch. So one compiled specialisation serves every pair of dtypes, no
widened copy of a tensor ever exists, and calling costs about two microseconds. All kernels release the GIL; threads
are the caller's (numba's own threading layer forbids concurrent calls or forks, depending on the layer).

Only reassociation and contraction are allowed to the optimiser, never "no NaN" assumptions: maxima are taken over bit
patterns, where for magnitudes the integer order is the order of the values and NaN and Inf lie above all others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 1024
"""Elements that `moments` reduces at once."""
PAIR_BLOCK = 256
"""Elements of a row that `pair` reduces at once; small, so that arithmetic overlaps with loads from memory."""
_AHEAD = 4 * PAIR_BLOCK
_SEGMENT = 8192
_LINE = 64
INF_BITS = 0x7FF0000000000000
F64, F32, BF16, F16, TABLE, I8, U8, I16, U16, I32, U32, I64, U64, C64, C128 = range(15)
FAST = {"reassoc", "contract", "nsz"}


def _jit(function: Any) -> Any:
    """Compile lazily, kept on disk where some cache directory is writable and in memory only where none is."""
    try:
        return njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")(function)
    except RuntimeError:  # numba found no place for its cache
        return njit(nogil=True, fastmath=FAST, error_model="numpy")(function)


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _at(typingctx: Any, address: Any) -> Any:
    """Integer address -> untyped pointer, for `carray`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _float_of(typingctx: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _bits_of(typingctx: Any, value: Any) -> Any:
    """The bits of a float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(types.float64), codegen


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _double_of(typingctx: Any, bits: Any) -> Any:
    """The float64 with these bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address; one beyond the end of a tensor is ignored by the processor."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
        integer = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, integer, integer, integer])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [pointer, integer(0), integer(3), integer(1)])  # read, keep in all levels, data
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _widest_vectors(typingctx: Any) -> Any:
    """Let the calling function use vectors of 512 bits where there are any; the compiler's own choice is 256.

    The pass is bound by arithmetic: bfloat16 pairs take a sixth less time.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own method knows few names
        return context.get_dummy_value()

    return types.void(), codegen


@_jit
def _half(bits: Any) -> Any:
    """Decode one binary16 without float16 arithmetic and without subnormal float32 inputs (flush-to-zero safe)."""
    wide = np.uint32(bits)
    magnitude = wide & np.uint32(0x7FFF)
    exponent = magnitude >> np.uint32(10)
    shifted = magnitude << np.uint32(13)
    special = np.uint32(0x70000000) if exponent == np.uint32(31) else np.uint32(0x38000000)
    normal = _float_of(shifted + special)
    small = np.float32(np.int32(magnitude)) * np.float32(5.9604644775390625e-08)
    value = small if exponent == np.uint32(0) else normal
    return -value if wide & np.uint32(0x8000) else value


@_jit
def _decode_float(address: Any, code: Any, n: Any, out: Any, table: Any) -> None:
    """Decode `n` floating elements at `address` into float64 `out`."""
    if code == F32:
        f32 = carray(_at(address), (n,), np.float32)
        for i in range(n):
            out[i] = f32[i]
    elif code == BF16:
        b16 = carray(_at(address), (n,), np.uint16)
        for i in range(n):
            out[i] = _float_of(np.uint32(b16[i]) << np.uint32(16))
    elif code == F16:
        h16 = carray(_at(address), (n,), np.uint16)
        for i in range(n):
            out[i] = _half(h16[i])
    elif code == F64:
        f64 = carray(_at(address), (n,), np.float64)
        for i in range(n):
            out[i] = f64[i]
    elif code == TABLE:  # 8-bit floats
        values = carray(_at(table), (256,), np.float64)
        t8 = carray(_at(address), (n,), np.uint8)
        for i in range(n):
            out[i] = values[t8[i]]
    elif code == C64:
        c64 = carray(_at(address), (2 * n,), np.float32)
        for i in range(n):
            out[i] = np.hypot(np.float64(c64[2 * i]), np.float64(c64[2 * i + 1]))
    else:  # C128
        c128 = carray(_at(address), (2 * n,), np.float64)
        for i in range(n):
            out[i] = np.hypot(c128[2 * i], c128[2 * i + 1])


@_jit
def _decode_integer(address: Any, code: Any, n: Any, out: Any) -> None:
    """Decode `n` integers at `address` into float64 `out` (64-bit ones are rounded)."""
    if code == U8:
        u8 = carray(_at(address), (n,), np.uint8)
        for i in range(n):
            out[i] = u8[i]
    elif code == I8:
        i8 = carray(_at(address), (n,), np.int8)
        for i in range(n):
            out[i] = i8[i]
    elif code == I16:
        i16 = carray(_at(address), (n,), np.int16)
        for i in range(n):
            out[i] = i16[i]
    elif code == U16:
        u16 = carray(_at(address), (n,), np.uint16)
        for i in range(n):
            out[i] = u16[i]
    elif code == I32:
        i32 = carray(_at(address), (n,), np.int32)
        for i in range(n):
            out[i] = i32[i]
    elif code == U32:
        u32 = carray(_at(address), (n,), np.uint32)
        for i in range(n):
            out[i] = u32[i]
    elif code == I64:
        i64 = carray(_at(address), (n,), np.int64)
        for i in range(n):
            out[i] = i64[i]
    else:  # U64
        u64 = carray(_at(address), (n,), np.uint64)
        for i in range(n):
            out[i] = u64[i]


@_jit
def _decode(address: Any, code: Any, n: Any, out: Any, table: Any) -> None:
    """Decode `n` elements of any storage code."""
    if code >= I8 and code <= U64:
        _decode_integer(address, code, n, out)
    else:
        _decode_float(address, code, n, out, table)


@_jit
def _keep_finite(values: Any, n: Any) -> Any:
    """Move the finite values to the front; return how many they are, and the counts of NaN and Inf."""
    kept = nans = infs = 0
    for i in range(n):
        bits = _bits_of(values[i]) & np.int64(0x7FFFFFFFFFFFFFFF)
        if bits > INF_BITS:
            nans += 1
        elif bits == INF_BITS:
            infs += 1
        else:
            values[kept] = values[i]
            kept += 1
    return kept, nans, infs


@_jit
def _total(values: Any, n: Any) -> Any:
    """Return the sum and the bits of the largest magnitude."""
    total = 0.0
    top = np.int64(0)
    for i in range(n):
        total += values[i]
        top = max(top, _bits_of(values[i]) & np.int64(0x7FFFFFFFFFFFFFFF))
    return total, top


@_jit
def moments(address: Any, code: Any, itemsize: Any, numel: Any, table: Any) -> Any:
    """Return (count, mean, m2, absmax, nans, infs) of the finite values, blocks merged by Chan's update."""
    values = np.empty(BLOCK, np.float64)
    count = nans = infs = 0
    mean = m2 = 0.0
    absmax = np.int64(0)
    for start in range(0, numel, BLOCK):
        n = min(BLOCK, numel - start)
        _decode(address + start * itemsize, code, n, values, table)
        total, top = _total(values, n)
        if top >= INF_BITS:
            n, block_nans, block_infs = _keep_finite(values, n)
            nans += block_nans
            infs += block_infs
            total, top = _total(values, n)
        if n == 0:
            continue
        absmax = max(absmax, top)
        block_mean = total / n
        block_m2 = 0.0
        for i in range(n):
            delta = values[i] - block_mean
            block_m2 += delta * delta
        merged = count + n
        shift = block_mean - mean
        mean += shift * (n / merged)
        m2 += block_m2 + shift * shift * (count * (n / merged))
        count = merged
    return count, mean, m2, _double_of(absmax), nans, infs


@_jit
def _load(address: Any, code: Any, n: Any, out: Any, table: Any, scale: Any) -> None:
    """Decode, and multiply by a power of two."""
    _decode(address, code, n, out, table)
    if scale != 1.0:
        for i in range(n):
            out[i] *= scale


@_jit
def _masked(r: Any, c: Any, n: Any, counts: Any) -> None:
    """Zero the pairs that are not finite on both sides, after counting them.

    `counts` = reference NaN, reference Inf, candidate NaN, candidate Inf, kinds that differ, pairs zeroed.
    """
    for i in range(n):
        x, y = r[i], c[i]
        bits_x = _bits_of(x) & np.int64(0x7FFFFFFFFFFFFFFF)
        bits_y = _bits_of(y) & np.int64(0x7FFFFFFFFFFFFFFF)
        if bits_x < INF_BITS and bits_y < INF_BITS:
            continue
        counts[0] += bits_x > INF_BITS
        counts[1] += bits_x == INF_BITS
        counts[2] += bits_y > INF_BITS
        counts[3] += bits_y == INF_BITS
        both_nan = bits_x > INF_BITS and bits_y > INF_BITS
        same_inf = bits_x == INF_BITS and bits_y == INF_BITS and (x > 0) == (y > 0)
        counts[4] += not (both_nan or same_inf)
        counts[5] += 1
        r[i] = 0.0
        c[i] = 0.0


@_jit
def _sums(r: Any, c: Any, n: Any) -> Any:
    """Reduce one decoded block: dd, rr, cc, rc, |d|, r, d, bits of max |d|, unequal; leave d^2 in `r`."""
    dd = rr = cc = rc = absolute = total = error = 0.0
    top = np.int64(0)
    unequal = np.int64(0)
    for i in range(n):
        x = r[i]
        y = c[i]
        d = y - x
        a = abs(d)
        square = d * d
        dd += square
        rr += x * x
        cc += y * y
        rc += x * y
        absolute += a
        total += x
        error += d
        unequal += np.int64(d != 0.0)
        top = max(top, _bits_of(a))
        r[i] = square
    return dd, rr, cc, rc, absolute, total, error, top, unequal


@_jit
def _direct_sums(left: Any, right: Any, code: Any, n: Any, squares: Any) -> Any:
    """`_sums` of two blocks of one dtype, F32 or BF16, read where they lie; leave d^2 in `squares`."""
    _widest_vectors()
    dd = rr = cc = rc = absolute = total = error = 0.0
    top = np.int64(0)
    unequal = np.int64(0)
    if code == F32:
        r32 = carray(_at(left), (n,), np.float32)
        c32 = carray(_at(right), (n,), np.float32)
        for i in range(n):
            x = np.float64(r32[i])
            y = np.float64(c32[i])
            d = y - x
            a = abs(d)
            square = d * d
            dd += square
            rr += x * x
            cc += y * y
            rc += x * y
            absolute += a
            total += x
            error += d
            unequal += np.int64(d != 0.0)
            top = max(top, _bits_of(a))
            squares[i] = square
    else:
        r16 = carray(_at(left), (n,), np.uint16)
        c16 = carray(_at(right), (n,), np.uint16)
        for i in range(n):
            x = np.float64(_float_of(np.uint32(r16[i]) << np.uint32(16)))
            y = np.float64(_float_of(np.uint32(c16[i]) << np.uint32(16)))
            d = y - x
            a = abs(d)
            square = d * d
            dd += square
            rr += x * x
            cc += y * y
            rc += x * y
            absolute += a
            total += x
            error += d
            unequal += np.int64(d != 0.0)
            top = max(top, _bits_of(a))
            squares[i] = square
    return dd, rr, cc, rc, absolute, total, error, top, unequal


@_jit
def pair(
    reference: Any,
    reference_code: Any,
    reference_item: Any,
    reference_stride: Any,
    reference_table: Any,
    candidate: Any,
    candidate_code: Any,
    candidate_item: Any,
    candidate_stride: Any,
    candidate_table: Any,
    num_rows: Any,
    num_columns: Any,
    scale: Any,
    rows: Any,
    channels: Any,
    sums: Any,
    counts: Any,
    where: Any,
) -> None:
    """Reduce a rectangle of two tensors in one pass.

    Addresses and row strides are in bytes; elements of a row are adjacent. Outputs are added to: `rows` [num_rows, 4]
    (dd, rr, cc, rc), `channels` [num_columns] (sum of d^2; empty when not wanted), `sums` [3] (|d|, r, d), `counts`
    [7] (six of `_masked`, then unequal), `where` [3] = bits of the largest |d| (-1: none yet), its row, and the first
    column of its block.
    """
    r = np.empty(PAIR_BLOCK, np.float64)
    c = np.empty(PAIR_BLOCK, np.float64)
    _widest_vectors()
    direct = scale == 1.0 and reference_code == candidate_code and reference_code in (F32, BF16)
    keep_channels = channels.size == num_columns
    channels_at = channels.ctypes.data
    for segment in range(0, num_columns, _SEGMENT):  # its channels stay in the L2 cache
        for row in range(num_rows):
            row_dd = row_rr = row_cc = row_rc = row_absolute = row_total = row_error = 0.0
            for start in range(segment, min(segment + _SEGMENT, num_columns), PAIR_BLOCK):
                n = min(PAIR_BLOCK, num_columns - start)
                left = reference + row * reference_stride + start * reference_item
                right = candidate + row * candidate_stride + start * candidate_item
                for line in range(0, n * reference_item, _LINE):
                    _prefetch(left + _AHEAD * reference_item + line)
                for line in range(0, n * candidate_item, _LINE):
                    _prefetch(right + _AHEAD * candidate_item + line)
                if direct:
                    dd, rr, cc, rc, absolute, total, error, top, unequal = _direct_sums(
                        left, right, reference_code, n, r
                    )
                else:
                    _load(left, reference_code, n, r, reference_table, scale)
                    _load(right, candidate_code, n, c, candidate_table, scale)
                    dd, rr, cc, rc, absolute, total, error, top, unequal = _sums(r, c, n)
                if top >= INF_BITS:  # NaN or Inf on either side, or (float64 only) a difference that overflowed
                    _load(left, reference_code, n, r, reference_table, scale)
                    _load(right, candidate_code, n, c, candidate_table, scale)
                    _masked(r, c, n, counts)
                    dd, rr, cc, rc, absolute, total, error, top, unequal = _sums(r, c, n)
                if keep_channels:
                    channel = carray(_at(channels_at + 8 * start), (n,), np.float64)
                    for i in range(n):
                        channel[i] += r[i]
                row_dd += dd
                row_rr += rr
                row_cc += cc
                row_rc += rc
                row_absolute += absolute
                row_total += total
                row_error += error
                counts[6] += unequal
                if top > where[0] or (top == where[0] and row < where[1]):
                    where[0], where[1], where[2] = top, row, start
            rows[row, 0] += row_dd
            rows[row, 1] += row_rr
            rows[row, 2] += row_cc
            rows[row, 3] += row_rc
            sums[0] += row_absolute
            sums[1] += row_total
            sums[2] += row_error


@_jit
def _locate(
    left: Any, left_code: Any, left_table: Any, right: Any, right_code: Any, right_table: Any, n: Any, top: Any
) -> Any:
    """Return the first of `n` columns whose |d| has these bits."""
    r = np.empty(PAIR_BLOCK, np.float64)
    c = np.empty(PAIR_BLOCK, np.float64)
    _decode(left, left_code, n, r, left_table)
    _decode(right, right_code, n, c, right_table)
    for i in range(n):
        if _bits_of(abs(c[i] - r[i])) == top:
            return i
    return 0


@_jit
def whole_pair(
    reference: Any,
    reference_code: Any,
    reference_item: Any,
    reference_stride: Any,
    reference_table: Any,
    candidate: Any,
    candidate_code: Any,
    candidate_item: Any,
    candidate_stride: Any,
    candidate_table: Any,
    num_rows: Any,
    num_columns: Any,
    rows: Any,
    figures: Any,
    channels: Any,
    sums: Any,
    counts: Any,
    where: Any,
) -> None:
    """Reduce two small tensors at once: `pair`, then the figures of rows and the place of the largest difference.

    `figures` [4, num_rows] are error, norm, rel_l2 and cosine as in `row_figures`; `sums` [9] gains dd, rr, cc, rc of
    the whole, the sum of cosines and the smallest; `where` [4] the column of the largest difference; `channels` becomes
    their rms error.
    """
    pair(
        reference, reference_code, reference_item, reference_stride, reference_table,
        candidate, candidate_code, candidate_item, candidate_stride, candidate_table,
        num_rows, num_columns, 1.0, rows, channels, sums, counts, where,
    )  # fmt: skip
    sums[8] = 1.0
    for row in range(num_rows):
        error, norm, other = np.sqrt(rows[row, 0]), np.sqrt(rows[row, 1]), np.sqrt(rows[row, 2])
        if norm > 0 and other > 0:
            cosine = min(max(rows[row, 3] / norm / other, -1.0), 1.0)
        else:
            cosine = 1.0 if norm == other else 0.0
        figures[0, row] = error
        figures[1, row] = norm
        figures[2, row] = error / norm if norm > 0 else (np.inf if error > 0 else 0.0)
        figures[3, row] = cosine
        for i in range(4):
            sums[3 + i] += rows[row, i]
        sums[7] += cosine
        sums[8] = min(sums[8], cosine)
    for i in range(channels.size):
        channels[i] = np.sqrt(channels[i] / num_rows)
    if where[0] > 0:
        row, start = where[1], where[2]
        left = reference + row * reference_stride + start * reference_item
        right = candidate + row * candidate_stride + start * candidate_item
        n = min(PAIR_BLOCK, num_columns - start)
        where[3] = start + _locate(
            left, reference_code, reference_table, right, candidate_code, candidate_table, n, where[0]
        )
    else:
        where[0] = where[1] = where[3] = 0


@_jit
def channel_squares(
    address: Any, code: Any, itemsize: Any, stride: Any, num_rows: Any, num_columns: Any, table: Any, out: Any
) -> None:
    """Add the squares of the finite elements of every column to `out` [num_columns]."""
    values = np.empty(PAIR_BLOCK, np.float64)
    for start in range(0, num_columns, PAIR_BLOCK):
        n = min(PAIR_BLOCK, num_columns - start)
        for row in range(num_rows):
            _decode(address + row * stride + start * itemsize, code, n, values, table)
            for i in range(n):
                finite = (_bits_of(values[i]) & np.int64(0x7FFFFFFFFFFFFFFF)) < INF_BITS
                out[start + i] += values[i] * values[i] if finite else 0.0


@_jit
def farthest(left: Any, right: Any, code: Any, numel: Any) -> Any:
    """Return the largest distance in steps of F32, BF16 or F16 between adjacent elements, and the largest magnitude.

    Both are of bits: the distance is that of the ordered integers `magnitude` or `-magnitude`, which fits the unsigned
    integer of the dtype's width while no side is NaN (a magnitude above infinity's).
    """
    distance = top = np.int64(0)
    for start in range(0, numel, BLOCK):
        n = min(BLOCK, numel - start)
        if code == F32:
            r32 = carray(_at(left + 4 * start), (n,), np.int32)
            c32 = carray(_at(right + 4 * start), (n,), np.int32)
            far32 = top32 = np.uint32(0)
            for i in range(n):
                x, y = r32[i], c32[i]
                a, b = np.int32(x & np.int32(0x7FFFFFFF)), np.int32(y & np.int32(0x7FFFFFFF))
                p, q = (np.int32(-a) if x < 0 else a), (np.int32(-b) if y < 0 else b)
                far32 = max(far32, np.uint32(np.uint32(max(p, q)) - np.uint32(min(p, q))))
                top32 = max(top32, np.uint32(max(a, b)))
            distance, top = max(distance, np.int64(far32)), max(top, np.int64(top32))
        else:
            r16 = carray(_at(left + 2 * start), (n,), np.int16)
            c16 = carray(_at(right + 2 * start), (n,), np.int16)
            far16 = top16 = np.uint16(0)
            for i in range(n):
                u, v = r16[i], c16[i]
                e, f = np.int16(u & np.int16(0x7FFF)), np.int16(v & np.int16(0x7FFF))
                g, h = (np.int16(-e) if u < 0 else e), (np.int16(-f) if v < 0 else f)
                far16 = max(far16, np.uint16(np.uint16(max(g, h)) - np.uint16(min(g, h))))
                top16 = max(top16, np.uint16(max(e, f)))
            distance, top = max(distance, np.int64(far16)), max(top, np.int64(top16))
    return distance, top
