"""The compiled passes over latents on a CPU. Import this module only when they are needed: it loads numba.

Arrays are C-contiguous; bfloat16 comes as uint16. Every pass takes a range of rows, latents or columns, so that threads
share the work; what one range writes no other does, and sums run in one order, so results do not depend on threads.
Widths: `pre` [batch, latents] lacks its bias; a sparse code is `ptr` [batch + 1], `cols` and `values` (pre-activations,
bias included, of the entries that are active or near their threshold).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

_FAST = {"reassoc", "contract", "nsz"}
_BLOCK = 16


def _jit(function: Any) -> Any:
    """Compile lazily, kept on disk where some cache directory is writable and in memory only where none is."""
    try:
        return njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")(function)
    except RuntimeError:  # numba found no place for its cache
        return njit(nogil=True, fastmath=_FAST, error_model="numpy")(function)


def _wide(value: Any) -> Any:
    """A stored element as a number that can be computed with."""
    raise NotImplementedError


@overload(_wide, strict=False)
def _wide_of(value: Any) -> Any:
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def _put(out: Any, index: Any, value: Any) -> None:
    """Store a number, rounded to nearest even where the array holds bfloat16."""
    raise NotImplementedError


@overload(_put, strict=False)
def _put_of(out: Any, index: Any, value: Any) -> Any:
    if out.dtype == types.uint16:

        def narrow(out: Any, index: Any, value: Any) -> None:
            bits = np.float32(value).view(np.uint32)
            carried = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            out[index] = np.uint16(carried >> np.uint32(16))

        return narrow

    def plain(out: Any, index: Any, value: Any) -> None:
        out[index] = value

    return plain


@_jit
def count_above(pre: Any, bias: Any, floor: Any, counts: Any, start: Any, stop: Any) -> None:
    """Count the entries of each row above `floor` [latents]."""
    for b in range(start, stop):
        row = pre[b]
        found = np.int32(0)
        for i in range(row.size):
            found += np.int32(_wide(row[i]) + bias[i] > floor[i])
        counts[b] = found


@_jit
def take_above(pre: Any, bias: Any, floor: Any, ptr: Any, cols: Any, values: Any, start: Any, stop: Any) -> None:
    """Write the entries of each row above `floor` into their places."""
    for b in range(start, stop):
        row = pre[b]
        n = ptr[b]
        for first in range(0, row.size, _BLOCK):
            last = min(first + _BLOCK, row.size)
            found = np.int32(0)
            for i in range(first, last):
                found += np.int32(_wide(row[i]) + bias[i] > floor[i])
            if found:
                for i in range(first, last):
                    value = _wide(row[i]) + bias[i]
                    if value > floor[i]:
                        cols[n] = i
                        values[n] = value
                        n += 1


@_jit
def _above(row: Any, bias: Any, floor: Any) -> Any:
    found = np.int32(0)
    for i in range(row.size):
        found += np.int32(_wide(row[i]) + bias[i] > floor)
    return found


@_jit
def _bracket(row: Any, bias: Any, k: Any, guess: Any, zero: Any) -> Any:
    """Return a floor that more than k entries pass, as few more as bisection finds, and how many do."""
    low, high = zero, zero
    found = _above(row, bias, low)
    if found <= k:
        return low, found
    floor, bounded = guess, False
    for _ in range(48):
        if not floor > low or (bounded and not floor < high):
            break
        now = _above(row, bias, floor)
        if now >= k:
            low, found = floor, now
            if now <= k + k // 2 + 8:
                break
        else:
            high, bounded = floor, True
        floor = (low + high) / 2 if bounded else low * 2
    return low, found


@_jit
def top_of_rows(
    pre: Any, bias: Any, allowed: Any, k: Any, cols: Any, values: Any, counts: Any, start: Any, stop: Any
) -> None:
    """Write the k largest positive entries of each row, of `allowed` latents, in order of their latents.

    `cols` and `values` [batch, k], `counts` [batch] how many there are. Of equal ones the first are taken.
    """
    width = pre.shape[1]
    found = np.empty(width, values.dtype)
    where = np.empty(width, np.int32)
    row = np.empty(width, values.dtype)
    nothing = np.zeros(width, values.dtype)
    zero = values[0, 0] * 0
    guess = zero + 1
    for b in range(start, stop):
        source = pre[b]
        for i in range(width):
            value = _wide(source[i]) + bias[i]
            row[i] = value if allowed[i] else zero
        floor, number = _bracket(row, nothing, k, guess, zero)
        n = 0
        for first in range(0, width, _BLOCK):
            last = min(first + _BLOCK, width)
            any_here = np.int32(0)
            for i in range(first, last):
                any_here += np.int32(row[i] > floor)
            if any_here:
                for i in range(first, last):
                    if row[i] > floor:
                        found[n] = row[i]
                        where[n] = i
                        n += 1
        take = min(k, n)
        cut = zero
        spare = n
        if n > k:
            cut = np.partition(found[:n], n - k)[n - k]
            over = 0
            for q in range(n):
                over += np.int32(found[q] > cut)
            spare = k - over
            guess = cut
        m = 0
        for q in range(n):
            if found[q] > cut:
                cols[b, m] = where[q]
                values[b, m] = found[q]
                m += 1
            elif found[q] == cut and n > k and spare > 0:
                cols[b, m] = where[q]
                values[b, m] = found[q]
                m += 1
                spare -= 1
        counts[b] = take


@_jit
def count_over(pre: Any, bias: Any, floor: Any, counts: Any, start: Any, stop: Any) -> None:
    """Count the entries of each row over one number."""
    for b in range(start, stop):
        counts[b] = _above(pre[b], bias, floor)


@_jit
def order_by_latent(cols: Any, ptr: Any, starts: Any, order: Any, rows: Any) -> None:
    """Sort entries by latent, then row: `starts` [latents + 1] comes as zeros; `order` and `rows` [entries]."""
    for n in range(cols.size):
        starts[cols[n] + 1] += 1
    for i in range(starts.size - 1):
        starts[i + 1] += starts[i]
    at = starts[:-1].copy()
    for b in range(ptr.size - 1):
        for n in range(ptr[b], ptr[b + 1]):
            i = cols[n]
            order[at[i]] = n
            rows[at[i]] = b
            at[i] += 1


@_jit
def sparse_rows(
    ptr: Any,
    cols: Any,
    values: Any,
    threshold: Any,
    c: Any,
    weight: Any,
    offset: Any,
    target: Any,
    error: Any,
    by_latent: Any,
    squares: Any,
    start: Any,
    stop: Any,
) -> None:
    """Decode each row and hold its error against the decoder's rows, while these are in the cache.

    `error` [batch, d_out] = y - target, `by_latent` [entries] = c <error, decoder row>, `squares` [batch] = |error|^2.
    """
    width = weight.shape[1]
    acc = np.empty(width, target.dtype)
    for b in range(start, stop):
        goal = target[b]
        for j in range(width):
            acc[j] = offset[j] - goal[j]
        for n in range(ptr[b], ptr[b + 1]):
            value = values[n]
            if value > threshold[cols[n]]:
                z = c * value
                row = weight[cols[n]]
                for j in range(width):
                    acc[j] += z * _wide(row[j])
        total = 0.0
        out = error[b]
        for j in range(width):
            total += np.float64(acc[j]) * np.float64(acc[j])
            out[j] = acc[j]
        squares[b] = total
        for n in range(ptr[b], ptr[b + 1]):
            row = weight[cols[n]]
            dot = acc[0] * 0
            for j in range(width):
                dot += acc[j] * _wide(row[j])
            by_latent[n] = c * dot


@_jit
def sparse_latents(
    starts: Any,
    order: Any,
    rows: Any,
    values: Any,
    by_latent: Any,
    threshold: Any,
    bandwidth: Any,
    to_input: Any,
    c: Any,
    factor: Any,
    counted: Any,
    x: Any,
    error: Any,
    encoder: Any,
    decoder: Any,
    bias: Any,
    steps: Any,
    fired: Any,
    start: Any,
    stop: Any,
) -> None:
    """Add the gradients of each latent's weights, bias and threshold.

    The gradient of y is `factor * error`, that of the number of active latents `counted`. `encoder` [latents, d_in],
    `decoder` [latents, d_out], `bias`, `steps` (of thresholds) and `fired` [latents] are added to.
    """
    half = bandwidth / 2
    for i in range(start, stop):
        level = threshold[i]
        of_encoder, of_decoder = encoder[i], decoder[i]
        of_bias = of_step = 0.0
        for q in range(starts[i], starts[i + 1]):
            n, b = order[q], rows[q]
            value, gradient = values[n], factor * by_latent[n]
            of_pre = gradient if value > level else gradient * 0
            if abs(value - level) < half:
                jump = (level * gradient + counted) / bandwidth
                of_step -= jump
                if to_input:
                    of_pre += jump
            if value > level:
                fired[i] += 1
                z = c * factor * value
                row = error[b]
                for j in range(row.size):
                    of_decoder[j] += z * row[j]
            if of_pre != 0:
                of_bias += of_pre
                source = x[b]
                for j in range(source.size):
                    of_encoder[j] += of_pre * _wide(source[j])
        bias[i] += of_bias
        steps[i] += of_step


@_jit
def dense_forward(pre: Any, bias: Any, threshold: Any, c: Any, z: Any, fired: Any, start: Any, stop: Any) -> None:
    """Write the latents times c [batch, latents] and count who fired, for a range of latents."""
    for b in range(pre.shape[0]):
        row, out = pre[b], z[b]
        for i in range(start, stop):
            value = _wide(row[i]) + bias[i]
            on = value > threshold[i]
            fired[i] += np.int64(on)
            _put(out, i, c * value if on else value * 0)


@_jit
def dense_backward(
    pre: Any,
    bias: Any,
    threshold: Any,
    bandwidth: Any,
    to_input: Any,
    c: Any,
    counted: Any,
    gradient: Any,
    of_bias: Any,
    of_step: Any,
    start: Any,
    stop: Any,
) -> None:
    """Turn the gradient of c z into that of the pre-activations, in place, for a range of latents, and sum it."""
    half = bandwidth / 2
    for b in range(pre.shape[0]):
        row, out = pre[b], gradient[b]
        for i in range(start, stop):
            value, level = _wide(row[i]) + bias[i], threshold[i]
            given = c * _wide(out[i])
            jump = (level * given + counted) / bandwidth if abs(value - level) < half else value * 0
            passed = given if value > level else value * 0
            passed = passed + jump if to_input else passed
            of_step[i] -= jump
            of_bias[i] += passed
            _put(out, i, passed)


@_jit
def squares_of(values: Any, sums: Any, part: Any, start: Any, stop: Any) -> None:
    """Write the sums of squares of parts of so many elements."""
    for n in range(start, stop):
        total = 0.0
        for i in range(n * part, min((n + 1) * part, values.size)):
            value = np.float64(_wide(values[i]))
            total += value * value
        sums[n] = total


@_jit
def adam_rows(
    parameter: Any,
    gradient: Any,
    first: Any,
    second: Any,
    low: Any,
    clipped: Any,
    beta1: Any,
    beta2: Any,
    rate: Any,
    root: Any,
    eps: Any,
    length: Any,
    start: Any,
    stop: Any,
) -> None:
    """Move rows of a parameter: p -= rate m / (sqrt(v) root + eps), the copy for products beside it.

    `first` and `low` may have no elements. With `length` > 0 the gradient loses its part along the row, which is then
    brought to that length. Scalars have the parameter's dtype.
    """
    width = parameter.shape[1]
    moving, copying = first.size > 0, low.size > 0
    for i in range(start, stop):
        p, given, v = parameter[i], gradient[i], second[i]
        along = clipped * 0
        if length > 0:
            dot = square = clipped * 0
            for j in range(width):
                dot += p[j] * (clipped * _wide(given[j]))
                square += p[j] * p[j]
            along = dot / square
        square = clipped * 0
        if moving:
            m = first[i]
            for j in range(width):
                g = clipped * _wide(given[j]) - along * p[j]
                m[j] = beta1 * m[j] + (1 - beta1) * g
                v[j] = beta2 * v[j] + (1 - beta2) * g * g
                p[j] -= rate * m[j] / (np.sqrt(v[j]) * root + eps)
                square += p[j] * p[j]
        else:
            for j in range(width):
                g = clipped * _wide(given[j]) - along * p[j]
                v[j] = beta2 * v[j] + (1 - beta2) * g * g
                p[j] -= rate * g / (np.sqrt(v[j]) * root + eps)
                square += p[j] * p[j]
        scale = length / np.sqrt(square) if length > 0 else clipped * 0 + 1
        if length > 0:
            for j in range(width):
                p[j] *= scale
        if copying:
            out = low[i]
            for j in range(width):
                _put(out, j, p[j])
