"""The compiled passes over latents on a CPU. Import this module only when they are needed: it loads numba.

Arrays are C-contiguous; bfloat16 comes as uint16. Every pass takes a range of rows, latents or columns, so that threads
share the work; what one range writes no other does, and sums run in one order, so results do not depend on threads.
Widths: `pre` [batch, latents] lacks its bias; a sparse code is `ptr` [batch + 1], `cols` and `values` (pre-activations,
bias included, of the entries that are active or near their threshold).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trimtab.sae._stored import jit, put, wide


@jit
def count_above(pre: Any, bias: Any, floor: Any, counts: Any, start: Any, stop: Any) -> None:
    """Count the entries of each row above `floor` [latents]."""
    for b in range(start, stop):
        row = pre[b]
        found = np.int32(0)
        for i in range(row.size):
            found += np.int32(wide(row[i]) + bias[i] > floor[i])
        counts[b] = found


@jit
def take_above(pre: Any, bias: Any, floor: Any, ptr: Any, cols: Any, values: Any, start: Any, stop: Any) -> None:
    """Write the entries of each row above `floor` into their places."""
    width = pre.shape[1]
    found = np.empty(width + 1, np.int32)
    for b in range(start, stop):
        row = pre[b]
        number = np.int64(0)
        for i in range(width):  # without a branch: what passes stays, anything else is written over
            found[number] = i
            number += np.int64(wide(row[i]) + bias[i] > floor[i])
        n = ptr[b]
        for q in range(number):
            i = found[q]
            cols[n + q] = i
            values[n + q] = wide(row[i]) + bias[i]


@jit
def _above(row: Any, bias: Any, floor: Any) -> Any:
    found = np.int32(0)
    for i in range(row.size):
        found += np.int32(wide(row[i]) + bias[i] > floor)
    return found


@jit
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


@jit
def top_of_rows(
    pre: Any, bias: Any, allowed: Any, k: Any, cols: Any, values: Any, counts: Any, start: Any, stop: Any
) -> None:
    """Write the k largest positive entries of each row, of `allowed` latents, in order of their latents.

    `cols` and `values` [batch, k], `counts` [batch] how many there are. Of equal ones the first are taken.
    """
    width = pre.shape[1]
    found = np.empty(width + 1, values.dtype)
    where = np.empty(width + 1, np.int32)
    row = np.empty(width, values.dtype)
    nothing = np.zeros(width, values.dtype)
    zero = nothing[0]
    guess = zero + 1
    for b in range(start, stop):
        source = pre[b]
        for i in range(width):
            value = wide(source[i]) + bias[i]
            row[i] = value if allowed[i] else zero
        floor, _ = _bracket(row, nothing, k, guess, zero)
        n = np.int64(0)
        for i in range(width):  # without a branch: what passes stays, anything else is written over
            found[n] = row[i]
            where[n] = i
            n += np.int64(row[i] > floor)
        take = min(k, n)
        cut = zero
        spare = n
        if n > k:
            cut = np.partition(found[:n], n - k)[n - k]
            over = np.int64(0)
            for q in range(n):
                over += np.int64(found[q] > cut)
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


@jit
def count_over(pre: Any, bias: Any, floor: Any, counts: Any, start: Any, stop: Any) -> None:
    """Count the entries of each row over one number."""
    for b in range(start, stop):
        counts[b] = _above(pre[b], bias, floor)


@jit
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


@jit
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
                    acc[j] += z * wide(row[j])
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
                dot += acc[j] * wide(row[j])
            by_latent[n] = c * dot


@jit
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
                    of_encoder[j] += of_pre * wide(source[j])
        bias[i] += of_bias
        steps[i] += of_step


@jit
def dense_forward(pre: Any, bias: Any, threshold: Any, c: Any, z: Any, fired: Any, start: Any, stop: Any) -> None:
    """Write the latents times c [batch, latents] and count who fired, for a range of latents."""
    for b in range(pre.shape[0]):
        row, out = pre[b], z[b]
        for i in range(start, stop):
            value = wide(row[i]) + bias[i]
            on = value > threshold[i]
            fired[i] += np.int64(on)
            put(out, i, c * value if on else value * 0)


@jit
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
            value, level = wide(row[i]) + bias[i], threshold[i]
            given = c * wide(out[i])
            jump = (level * given + counted) / bandwidth if abs(value - level) < half else value * 0
            passed = given if value > level else value * 0
            passed = passed + jump if to_input else passed
            of_step[i] -= jump
            of_bias[i] += passed
            put(out, i, passed)
