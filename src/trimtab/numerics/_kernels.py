"""The compiled passes. Import this module only through `_layout.kernels()`: it loads numba.

Every kernel takes raw addresses and a storage code, decodes a block of elements into float64 scratch
that stays in the L1 cache, and reduces the scratch. So one compiled specialisation serves every pair of dtypes, no
widened copy of a tensor ever exists, and calling costs about two microseconds. Pairs of float32 and of bfloat16 have
loops of their own, which read four rows where they lie. All kernels release the GIL; threads are the caller's (numba's
own threading layer forbids concurrent calls or forks, depending on the layer).

They share one file because numba's cache of a kernel looks at the file of that kernel alone: with the decoding in
another, a change of it would leave old kernels in use.

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
_DECODED = 256
"""Elements of a row that are decoded and reduced at once."""
_SEGMENT = 8192
"""Columns that are reduced at once: their channels stay in the L2 cache."""
_STRIP = 256
"""Rows that are reduced before their channels join the others."""
_UNBALANCED = 256.0
"""Ratio of two sums of squares from which their product is summed, not derived."""
_LINE = 64
INF_BITS = 0x7FF0000000000000
F64, F32, BF16, F16, TABLE, I8, U8, I16, U16, I32, U32, I64, U64, C64, C128 = range(15)
FAST = {"reassoc", "contract", "nsz"}


def _jit(function: Any, **options: Any) -> Any:
    """Compile lazily, kept on disk where some cache directory is writable and in memory only where none is."""
    try:
        return njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy", **options)(function)
    except RuntimeError:  # numba found no place for its cache
        return njit(nogil=True, fastmath=FAST, error_model="numpy", **options)(function)


def _inlined(function: Any) -> Any:
    """Compile into every caller, once for each set of constant arguments."""
    return _jit(function, inline="always")


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
def _fused(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """`a b + c`, in one operation where there is one; the compiler's own choice may be to share `a b` and add twice.

    Half of a processor's arithmetic units may be unable to add alone.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        double = ir.DoubleType()
        kind = ir.FunctionType(double, [double] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.f64")
        return builder.call(function, args, fastmath=tuple(FAST))

    return types.float64(types.float64, types.float64, types.float64), codegen


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
def _element(word: Any, half: Any) -> Any:
    """The F32 that a word is (half 0), or the BF16 in its low (1) or high (2) 16 bits, as float64."""
    if half == 0:
        return np.float64(_float_of(word))
    if half == 1:
        return np.float64(_float_of(word << np.uint32(16)))
    return np.float64(_float_of(word & np.uint32(0xFFFF0000)))


@_jit
def _raise(out: Any, tops: Any, row: Any, dd: Any, rr: Any, cc: Any, top: Any) -> None:
    """Add the squares of one row."""
    out[0] += dd
    out[1] += rr
    out[2] += cc
    tops[row] = max(tops[row], top)


@_inlined
def _one_row(left: Any, right: Any, half: Any, n: Any, channels: Any, out: Any, tops: Any) -> None:
    """Reduce `n` words of one row where they lie, as `_sums` but for rc and what is unequal; add d^2 to `channels`.

    Adds dd, rr, cc, |d|, r, d to `out` [1, 6] and raises `tops` [1], the bits of max |d|.
    """
    _widest_vectors()
    r = carray(_at(left), (n,), np.uint32)
    c = carray(_at(right), (n,), np.uint32)
    dd = rr = cc = absolute = total = error = 0.0
    top = np.int64(0)
    for i in range(n):
        x, y = _element(r[i], half), _element(c[i], half)
        d = y - x
        a = abs(d)
        dd += d * d
        rr += x * x
        cc += y * y
        top = max(top, _bits_of(a))
        absolute += a
        total += x
        error += d
        channels[i] += d * d
    _raise(out[0], tops, 0, dd, rr, cc, top)
    out[0, 3] += absolute
    out[0, 4] += total
    out[0, 5] += error


@_inlined
def _four_rows(
    left: Any, left_stride: Any, right: Any, right_stride: Any, half: Any, n: Any, channels: Any, out: Any, tops: Any
) -> None:
    """`_one_row` for four rows side by side, so that the channels are read and written once for all of them.

    Adds dd, rr, cc, |d|, r, d to `out` [4, 6] (the last three, of all rows, to the first) and raises `tops` [4].
    """
    _widest_vectors()
    r0 = carray(_at(left), (n,), np.uint32)
    c0 = carray(_at(right), (n,), np.uint32)
    r1 = carray(_at(left + left_stride), (n,), np.uint32)
    c1 = carray(_at(right + right_stride), (n,), np.uint32)
    r2 = carray(_at(left + 2 * left_stride), (n,), np.uint32)
    c2 = carray(_at(right + 2 * right_stride), (n,), np.uint32)
    r3 = carray(_at(left + 3 * left_stride), (n,), np.uint32)
    c3 = carray(_at(right + 3 * right_stride), (n,), np.uint32)
    dd0 = rr0 = cc0 = 0.0
    dd1 = rr1 = cc1 = 0.0
    dd2 = rr2 = cc2 = 0.0
    dd3 = rr3 = cc3 = 0.0
    absolute = total = error = 0.0
    top0 = top1 = top2 = top3 = np.int64(0)
    for i in range(n):
        x0, y0 = _element(r0[i], half), _element(c0[i], half)
        x1, y1 = _element(r1[i], half), _element(c1[i], half)
        x2, y2 = _element(r2[i], half), _element(c2[i], half)
        x3, y3 = _element(r3[i], half), _element(c3[i], half)
        d0, d1, d2, d3 = y0 - x0, y1 - x1, y2 - x2, y3 - x3
        a0, a1, a2, a3 = abs(d0), abs(d1), abs(d2), abs(d3)
        dd0 = _fused(d0, d0, dd0)
        rr0 = _fused(x0, x0, rr0)
        cc0 = _fused(y0, y0, cc0)
        top0 = max(top0, _bits_of(a0))
        dd1 = _fused(d1, d1, dd1)
        rr1 = _fused(x1, x1, rr1)
        cc1 = _fused(y1, y1, cc1)
        top1 = max(top1, _bits_of(a1))
        dd2 = _fused(d2, d2, dd2)
        rr2 = _fused(x2, x2, rr2)
        cc2 = _fused(y2, y2, cc2)
        top2 = max(top2, _bits_of(a2))
        dd3 = _fused(d3, d3, dd3)
        rr3 = _fused(x3, x3, rr3)
        cc3 = _fused(y3, y3, cc3)
        top3 = max(top3, _bits_of(a3))
        absolute += a0 + a1 + a2 + a3
        total += x0 + x1 + x2 + x3
        error += d0 + d1 + d2 + d3
        channels[i] = _fused(d3, d3, _fused(d2, d2, _fused(d1, d1, _fused(d0, d0, channels[i]))))
    _raise(out[0], tops, 0, dd0, rr0, cc0, top0)
    _raise(out[1], tops, 1, dd1, rr1, cc1, top1)
    _raise(out[2], tops, 2, dd2, rr2, cc2, top2)
    _raise(out[3], tops, 3, dd3, rr3, cc3, top3)
    out[0, 3] += absolute
    out[0, 4] += total
    out[0, 5] += error


@_jit
def _direct_block(
    left: Any, left_stride: Any, right: Any, right_stride: Any, code: Any, count: Any, n: Any,
    even: Any, odd: Any, out: Any, tops: Any,
) -> None:  # fmt: skip
    """Reduce a block of one row or of four, F32 or BF16. The constants make a loop of its own of every case."""
    for row in range(count):
        tops[row] = 0
        for i in range(6):
            out[row, i] = 0.0
    if code == F32 and count == 1:
        _one_row(left, right, 0, n, even, out, tops)
    elif code == F32:
        _four_rows(left, left_stride, right, right_stride, 0, n, even, out, tops)
    elif count == 1:
        _one_row(left, right, 1, n // 2, even, out, tops)
        _one_row(left, right, 2, n // 2, odd, out, tops)
    else:
        _four_rows(left, left_stride, right, right_stride, 1, n // 2, even, out, tops)
        _four_rows(left, left_stride, right, right_stride, 2, n // 2, odd, out, tops)


@_jit
def _unequal(left: Any, right: Any, code: Any, n: Any) -> Any:
    """Count the pairs of finite F32 or BF16 that differ in value, by their bits; the two zeros are equal."""
    if code == F32:
        r32 = carray(_at(left), (n,), np.uint32)
        c32 = carray(_at(right), (n,), np.uint32)
        count32 = np.uint32(0)
        for i in range(n):
            x, y = r32[i], c32[i]
            zeros = np.uint32((x | y) & np.uint32(0x7FFFFFFF)) == np.uint32(0)
            count32 = np.uint32(count32 + np.uint32((x != y) & ~zeros))
        return np.int64(count32)
    r16 = carray(_at(left), (n,), np.uint16)
    c16 = carray(_at(right), (n,), np.uint16)
    count16 = np.uint16(0)  # a block is shorter than it can count
    for i in range(n):
        u, v = r16[i], c16[i]
        neither = np.uint16((u | v) & np.uint16(0x7FFF)) == np.uint16(0)
        count16 = np.uint16(count16 + np.uint16((u != v) & ~neither))
    return np.int64(count16)


@_jit
def _direct_strip(
    left: Any, left_stride: Any, right: Any, right_stride: Any, code: Any, n: Any, wanted: Any,
    even: Any, odd: Any, rows: Any, sums: Any, counts: Any, where: Any,
) -> Any:  # fmt: skip
    """Reduce some rows of one dtype, F32 or BF16; False, with outputs of no use, when a row needs more care.

    That is one with NaN or Inf, or with one side far larger than the other, whose product must be summed. Outputs as
    those of `pair`, but for the channels: those of BF16 are `even` and `odd` [n / 2], of F32 `even` [n].
    """
    out, tops = np.empty((4, 6), np.float64), np.empty(4, np.int64)
    row = 0
    while row < len(rows):
        count = 4 if row + 4 <= len(rows) else 1
        r, c = left + row * left_stride, right + row * right_stride
        _direct_block(r, left_stride, c, right_stride, code, count, n, even, odd, out[:count], tops[:count])
        for k in range(count):
            dd, rr, cc, absolute, total, error = out[k]
            if tops[k] >= INF_BITS or rr > _UNBALANCED * cc or cc > _UNBALANCED * rr:
                return False
            rc = (rr + cc - dd) / 2  # what the subtraction loses is at most 8 times what summing rounds
            unequal = _unequal(r + k * left_stride, c + k * right_stride, code, n) if wanted else 0
            found = (dd, rr, cc, rc, absolute, total, error, tops[k], unequal)
            _note(found, row + k, 0, rows, sums, counts, where)
        row += count
    return True


@_jit
def _decoded_strip(
    left: Any, left_code: Any, left_item: Any, left_stride: Any, left_table: Any,
    right: Any, right_code: Any, right_item: Any, right_stride: Any, right_table: Any,
    n: Any, scale: Any, channels: Any, rows: Any, sums: Any, counts: Any, where: Any,
) -> None:  # fmt: skip
    """Reduce some rows of any dtypes, with NaN and Inf. Outputs as those of `pair`."""
    r = np.empty(_DECODED, np.float64)
    c = np.empty(_DECODED, np.float64)
    for row in range(len(rows)):
        for start in range(0, n, _DECODED):
            size = min(_DECODED, n - start)
            left_at = left + row * left_stride + start * left_item
            right_at = right + row * right_stride + start * right_item
            _load(left_at, left_code, size, r, left_table, scale)
            _load(right_at, right_code, size, c, right_table, scale)
            found = _sums(r, c, size)
            if found[7] >= INF_BITS:  # NaN or Inf on either side, or (float64 only) a difference that overflowed
                _load(left_at, left_code, size, r, left_table, scale)
                _load(right_at, right_code, size, c, right_table, scale)
                _masked(r, c, size, counts)
                found = _sums(r, c, size)
            for i in range(size):
                channels[start + i] += r[i]
            _note(found, row, start, rows, sums, counts, where)


@_jit
def _note(found: Any, row: Any, start: Any, rows: Any, sums: Any, counts: Any, where: Any) -> None:
    """Add what was found in one block."""
    dd, rr, cc, rc, absolute, total, error, top, unequal = found
    rows[row, 0] += dd
    rows[row, 1] += rr
    rows[row, 2] += cc
    rows[row, 3] += rc
    sums[0] += absolute
    sums[1] += total
    sums[2] += error
    counts[6] += unequal
    if top > where[0]:
        where[0], where[1], where[2] = top, row, start


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
    wanted: Any,
    rows: Any,
    channels: Any,
    sums: Any,
    counts: Any,
    where: Any,
) -> None:
    """Reduce a rectangle of two tensors in one pass.

    Addresses and row strides are in bytes; elements of a row are adjacent. Outputs are added to: `rows` [num_rows, 4]
    (dd, rr, cc, rc), `channels` [num_columns] (sum of d^2; empty when not wanted), `sums` [3] (|d|, r, d), `counts`
    [7] (six of `_masked`, then unequal, which may be left at 0 when not wanted), `where` [3] = bits of the largest |d|
    (-1: none yet), its row and column.
    """
    direct = scale == 1.0 and reference_code == candidate_code and reference_code in (F32, BF16)
    halves = direct and reference_code == BF16
    direct = direct and not (halves and num_columns % 2)  # two BF16 are read as one word
    room = min(_SEGMENT, num_columns)
    scratch = np.empty(2 * room + 3 * _LINE, np.float64)  # aligned: a vector across two cache lines takes twice as long
    begin = (-scratch.ctypes.data % _LINE) // 8
    even = scratch[begin : begin + room]
    begin += (room // 8 + 9) * 8  # and apart by no multiple of a page
    odd = scratch[begin : begin + room]
    strip_rows = np.empty((min(_STRIP, num_rows), 4), np.float64)
    strip_sums, strip_counts, strip_where = np.empty(3, np.float64), np.empty(7, np.int64), np.empty(3, np.int64)
    for segment in range(0, num_columns, _SEGMENT):
        n = min(_SEGMENT, num_columns - segment)
        for first in range(0, num_rows, _STRIP):
            found = strip_rows[: min(_STRIP, num_rows - first)]
            left = reference + first * reference_stride + segment * reference_item
            right = candidate + first * candidate_stride + segment * candidate_item
            done = False
            if direct:
                _clear(n, even, odd, found, strip_sums, strip_counts, strip_where)
                done = _direct_strip(
                    left, reference_stride, right, candidate_stride, reference_code, n, wanted,
                    even, odd, found, strip_sums, strip_counts, strip_where,
                )  # fmt: skip
            if not done:
                _clear(n, even, odd, found, strip_sums, strip_counts, strip_where)
                _decoded_strip(
                    left, reference_code, reference_item, reference_stride, reference_table,
                    right, candidate_code, candidate_item, candidate_stride, candidate_table,
                    n, scale, even, found, strip_sums, strip_counts, strip_where,
                )  # fmt: skip
            if channels.size:
                _add_channels(channels[segment:], n, even, odd, halves and done)
            for row in range(len(found)):
                for i in range(4):
                    rows[first + row, i] += found[row, i]
            for i in range(3):
                sums[i] += strip_sums[i]
            for i in range(7):
                counts[i] += strip_counts[i]
            top, row = strip_where[0], first + strip_where[1]
            if top > where[0] or (top == where[0] and row < where[1]):
                where[0], where[1], where[2] = top, row, segment + strip_where[2]
    if where[0] > 0:
        row, start = where[1], where[2]
        where[2] = start + _locate(
            reference + row * reference_stride + start * reference_item, reference_code, reference_item,
            reference_table, candidate + row * candidate_stride + start * candidate_item, candidate_code,
            candidate_item, candidate_table, num_columns - start, scale, where[0],
        )  # fmt: skip
    elif where[0] == 0:
        where[1] = where[2] = 0


@_jit
def _clear(n: Any, even: Any, odd: Any, rows: Any, sums: Any, counts: Any, where: Any) -> None:
    """Begin a strip."""
    for i in range(n):
        even[i] = 0.0
    for i in range(n // 2):
        odd[i] = 0.0
    for row in range(len(rows)):
        for i in range(4):
            rows[row, i] = 0.0
    for i in range(3):
        sums[i] = 0.0
        where[i] = 0 if i else -1
    for i in range(7):
        counts[i] = 0


@_jit
def _add_channels(channels: Any, n: Any, even: Any, odd: Any, halves: Any) -> None:
    """Add the channels of a strip, from two halves or as they are."""
    if halves:
        for i in range(n // 2):
            channels[2 * i] += even[i]
            channels[2 * i + 1] += odd[i]
    else:
        for i in range(n):
            channels[i] += even[i]


@_jit
def _locate(
    left: Any, left_code: Any, left_item: Any, left_table: Any,
    right: Any, right_code: Any, right_item: Any, right_table: Any,
    n: Any, scale: Any, top: Any,
) -> Any:  # fmt: skip
    """Return the first of `n` columns whose |d| has these bits."""
    r = np.empty(_DECODED, np.float64)
    c = np.empty(_DECODED, np.float64)
    for start in range(0, n, _DECODED):
        size = min(_DECODED, n - start)
        _load(left + start * left_item, left_code, size, r, left_table, scale)
        _load(right + start * right_item, right_code, size, c, right_table, scale)
        for i in range(size):
            if _bits_of(abs(c[i] - r[i])) == top:
                return start + i
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
    wanted: Any,
    rows: Any,
    figures: Any,
    channels: Any,
    sums: Any,
    counts: Any,
    where: Any,
) -> None:
    """Reduce two small tensors at once: `pair`, then the figures of rows and the place of the largest difference.

    `figures` [4, num_rows] are error, norm, rel_l2 and cosine as in `row_figures`; `sums` [9] gains dd, rr, cc, rc of
    the whole, the sum of cosines and the smallest; `channels` becomes their rms error.
    """
    pair(
        reference, reference_code, reference_item, reference_stride, reference_table,
        candidate, candidate_code, candidate_item, candidate_stride, candidate_table,
        num_rows, num_columns, 1.0, wanted, rows, channels, sums, counts, where,
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


@_jit
def channel_squares(
    address: Any, code: Any, itemsize: Any, stride: Any, num_rows: Any, num_columns: Any, table: Any, out: Any
) -> None:
    """Add the squares of the finite elements of every column to `out` [num_columns]."""
    values = np.empty(_DECODED, np.float64)
    for segment in range(0, num_columns, _SEGMENT):
        end = min(segment + _SEGMENT, num_columns)
        for row in range(num_rows):
            for start in range(segment, end, _DECODED):
                n = min(_DECODED, end - start)
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
