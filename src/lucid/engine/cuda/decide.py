"""The kernel that decides a step on the device: the rule of ``lucid/optim/gradients.py``, and a step's scalars."""

from __future__ import annotations

import triton
import triton.language as tl

from lucid.engine.numbers import Kept, Told, ToldOfSet

from .kernels import CAUTIOUS, COUNT, SET, D, E, F, K, S, number_at
from .squares import BAD, FAILED, FOUND_INF_AT, INFINITE, LARGE, NAN, SETS, root_of, scale_of

MAX_NORM = tl.constexpr(int(Told.MAX_NORM))
SKIPS = tl.constexpr(int(Told.SKIPS))
CAPTURED = tl.constexpr(int(Told.CAPTURED))
ALARM_AT = tl.constexpr(int(Told.ALARM_AT))
LR = tl.constexpr(int(ToldOfSet.LR))
WEIGHT_DECAY = tl.constexpr(int(ToldOfSet.WEIGHT_DECAY))
SIGN = tl.constexpr(int(ToldOfSet.SIGN))
LR_AT = tl.constexpr(int(ToldOfSet.LR_AT))
LR_DOUBLE = tl.constexpr(int(ToldOfSet.LR_DOUBLE))
POWERS1 = tl.constexpr(int(ToldOfSet.POWERS1))
LENGTH1 = tl.constexpr(int(ToldOfSet.LENGTH1))
POWERS2 = tl.constexpr(int(ToldOfSet.POWERS2))
LENGTH2 = tl.constexpr(int(ToldOfSet.LENGTH2))
EPS = tl.constexpr(int(ToldOfSet.EPS))
REFERENCE_LR = tl.constexpr(int(ToldOfSet.REFERENCE_LR))
CORRECTION = tl.constexpr(int(Kept.CORRECTION))
SKIPPED = tl.constexpr(int(Kept.SKIPPED))
REFUSED = tl.constexpr(int(Kept.REFUSED))
NORM = tl.constexpr(int(Kept.NORM))
SCALE_WAS = tl.constexpr(int(Kept.SCALE))


@triton.jit
def make_set(told, scalars, factor, correction):
    """Make a set of scalars, float64[SET], from the words of `ToldOfSet`; return whether its learning rate is valid."""
    at = told.to(tl.pointer_type(tl.float64))
    lr = tl.load(at + LR)
    lr_at = tl.load(told + LR_AT)
    if lr_at != 0:
        lr = number_at(lr_at, tl.load(told + LR_DOUBLE))
    count = tl.load(at + COUNT).to(tl.int64) + correction
    powers1 = tl.load(told + POWERS1).to(tl.pointer_type(tl.float64))
    powers2 = tl.load(told + POWERS2).to(tl.pointer_type(tl.float64))
    power1 = tl.load(powers1 + tl.minimum(count, tl.load(told + LENGTH1) - 1))
    power2 = tl.load(powers2 + tl.minimum(count, tl.load(told + LENGTH2) - 1))
    for word in tl.static_range(D):
        tl.store(scalars + word, tl.load(at + word))
    for word in tl.static_range(CAUTIOUS, COUNT):
        tl.store(scalars + word, tl.load(at + word))
    decay = tl.load(at + WEIGHT_DECAY)
    reference_lr = tl.load(at + REFERENCE_LR)
    if reference_lr != 0.0:
        decay = decay * (lr / reference_lr)
    else:
        decay = lr * decay
    tl.store(scalars + D, decay)
    tl.store(scalars + K, lr / power1)
    tl.store(scalars + S, 1.0 / tl.sqrt(power2))
    tl.store(scalars + E, tl.load(at + EPS))
    tl.store(scalars + F, factor * tl.load(at + SIGN))
    tl.store(scalars + COUNT, count.to(tl.float64))
    return (lr >= 0.0) & (lr < float("inf"))


@triton.jit
def decide(config, kept, words, scalars, settled: tl.constexpr, measured: tl.constexpr):
    """Decide whether this step is taken and with which factor, and make its scalars.

    ``config``: int64[1 + sets, SET], the input: first the words of `Told`, then those of `ToldOfSet` for each set.
    ``kept``: int64[KEPT], the words of `Kept`, read and updated. ``words``: int64[TOTAL_WORDS], the sum of the squares
    (if `measured`) and the counts of `lucid.engine.exact_sum`, read if `settled`. ``scalars``: float64[1 + sets, SET],
    the table of scalars, written.
    """
    floats = config.to(tl.pointer_type(tl.float64))
    kept_floats = kept.to(tl.pointer_type(tl.float64))
    scale = scale_of(config)
    failed = tl.load(config + SETS) < 0
    if settled:
        failed = tl.load(words + FAILED) > 0
        skip = tl.load(words + BAD) > 0
    else:
        skip = failed
        found_at = tl.load(config + FOUND_INF_AT)
        if found_at != 0:
            skip = number_at(found_at, 0) != 0.0
    skip = skip | (scale <= 0.0) | (scale == float("inf")) | (scale != scale)
    factor = 1.0 / scale
    if measured:
        infinite = tl.load(words + INFINITE) > 0
        nan = tl.load(words + NAN) > 0
        root = tl.where(infinite, float("inf"), root_of(words))
        norm = tl.where(nan, float("nan"), root / scale)
        bound = tl.load(floats + MAX_NORM)
        clips = (bound != float("inf")) & ((norm + 1e-6 <= bound) == 0)
        clip = tl.where(clips, bound / (norm + 1e-6), 1.0)
        factor = clip / scale
        large = (tl.load(words + LARGE) > 0) & (clip == 1.0)
        fine = (norm < float("inf")) & (large == 0)
        skip = skip | ((tl.load(config + SKIPS) != 0) & (fine == 0))
        tl.store(kept_floats + NORM, tl.where(failed, tl.load(kept_floats + NORM), norm))

    correction = tl.load(kept + CORRECTION)
    for number in range(1, 1 + tl.load(config + SETS)):
        valid = make_set(config + number * SET, scalars + number * SET, factor, correction)
        skip = skip | (valid == 0)

    takes = (skip | failed) == 0
    tl.store(scalars, 1.0 - takes.to(tl.float64))
    tl.store(kept_floats + SCALE_WAS, tl.where(takes, scale, tl.load(kept_floats + SCALE_WAS)))
    if failed:
        tl.store(kept + REFUSED, tl.load(kept + REFUSED) + 1)
        tl.store(tl.load(config + ALARM_AT).to(tl.pointer_type(tl.int64)), 1)
    elif skip:
        tl.store(kept + SKIPPED, tl.load(kept + SKIPPED) + 1)
    if tl.load(config + CAPTURED) != 0:
        correction += takes.to(tl.int64)
    else:
        correction += takes.to(tl.int64) - 1
    tl.store(kept + CORRECTION, correction)
