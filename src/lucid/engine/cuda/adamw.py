"""The AdamW rule in Triton: section 3 of the numerics contract, line by line as in ``csrc/adamw.h``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quotient(x, y):
    """Return the correctly rounded x / y."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def square_root(x):
    """Return the correctly rounded square root."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def mean(a, x, weight, from_average):
    """Return a + (1 - beta) (x - a), or x + beta (a - x) if beta < 1/2; `weight` is 1 - beta, or beta."""
    base = tl.where(from_average, a, x)
    other = tl.where(from_average, x, a)
    return base + weight * (other - base)


@triton.jit
def average(a, theta, weight, from_average, dither):
    """Return the next average of float32 weights: `mean`, with its change from `a` stochastically rounded."""
    base = tl.where(from_average, a, theta)
    other = tl.where(from_average, theta, a)
    change = weight * (other - base)
    return base + tl.where(from_average, change + dither, change)


@triton.jit
def maximum(a, b):
    """Return the larger of a and b, or NaN if one is NaN."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def adamw(
    weight1, from_average1, weight2, from_average2, d, k, s, e, f, cautious, theta, gradient, m, v, w,
    amsgrad: tl.constexpr, some_cautious: tl.constexpr,
):  # fmt: skip
    """One step of some elements: return the new theta, m, v and w, and the root and the update for observing.

    ``cautious``: whether the decay applies only where it agrees with the update, int1, read if `some_cautious`.
    """
    g = f * gradient
    m = mean(m, g, weight1, from_average1)
    v = mean(v, g * g, weight2, from_average2)
    if amsgrad:
        w = maximum(w, v)
    else:
        w = v
    root = square_root(w)
    decay = d * theta
    update = quotient(k * m, root * s + e)
    if some_cautious:
        same_sign = ((update > 0) & (theta > 0)) | ((update < 0) & (theta < 0))
        decay = tl.where(same_sign | (cautious == 0), decay, 0.0)
    update = decay + update
    return theta - update, m, v, w, root, update
