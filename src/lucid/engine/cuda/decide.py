"""The kernel that decides a step on the device: the rule of ``lucid/optim/gradients.py``, and a step's scalars."""

from __future__ import annotations

import triton
import triton.language as tl

from lucid.engine import spikes
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

SPIKE_THRESHOLD = tl.constexpr(int(Told.SPIKE_THRESHOLD))
SPIKES = tl.constexpr(int(Told.SPIKES))
MEAN = tl.constexpr(int(Told.MEAN))
SQUARE = tl.constexpr(int(Told.SQUARE))
SEEN = tl.constexpr(int(Told.SEEN))
IN_A_ROW = tl.constexpr(int(Told.IN_A_ROW))
SPIKED = tl.constexpr(int(Kept.SPIKED))
ANEW = tl.constexpr(int(Kept.ANEW))
SPIKES_WAS = tl.constexpr(int(Kept.SPIKES))
MEAN_WAS = tl.constexpr(int(Kept.MEAN))
SQUARE_WAS = tl.constexpr(int(Kept.SQUARE))
SEEN_WAS = tl.constexpr(int(Kept.SEEN))
IN_A_ROW_WAS = tl.constexpr(int(Kept.IN_A_ROW))
WARM_UP = tl.constexpr(spikes.WARM_UP)
SPAN = tl.constexpr(spikes.SPAN)
MOST_IN_A_ROW = tl.constexpr(spikes.MOST_IN_A_ROW)
TOO_LARGE = tl.constexpr(spikes.TOO_LARGE)


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
def is_spike(config, kept, norm, takes):
    """Return whether the norm of this step is a spike, by the rule of `lucid.engine.spikes`; keep the memory after it.

    ``takes``: whether nothing else leaves the step out.
    """
    floats = config.to(tl.pointer_type(tl.float64))
    kept_floats = kept.to(tl.pointer_type(tl.float64))
    version = tl.load(config + SPIKES)
    told = version != tl.load(kept + SPIKES_WAS)
    mean = tl.where(told, tl.load(floats + MEAN), tl.load(kept_floats + MEAN_WAS))
    square = tl.where(told, tl.load(floats + SQUARE), tl.load(kept_floats + SQUARE_WAS))
    seen = tl.where(told, tl.load(config + SEEN), tl.load(kept + SEEN_WAS))
    in_a_row = tl.where(told, tl.load(config + IN_A_ROW), tl.load(kept + IN_A_ROW_WAS))

    counts = takes & (norm > 0.0) & (norm < float("inf"))
    limit = mean + tl.load(floats + SPIKE_THRESHOLD) * (tl.sqrt(square) + 0.5 * mean)
    spike = counts & (seen >= WARM_UP) & (norm > limit)
    feeds = counts & (spike == 0) & (norm < TOO_LARGE)
    more = tl.minimum(seen + 1, SPAN)
    weight = 1.0 / more.to(tl.float64)
    distance = norm - mean
    new_square = tl.where(seen > 0, square + weight * (distance * distance - square), 0.0)
    in_a_row = tl.where(spike, in_a_row + 1, tl.where(counts, 0, in_a_row))
    anew = in_a_row == MOST_IN_A_ROW

    tl.store(kept + SPIKED, tl.load(kept + SPIKED) + spike.to(tl.int64))
    tl.store(kept + ANEW, tl.load(kept + ANEW) + anew.to(tl.int64))
    tl.store(kept + SPIKES_WAS, version)
    tl.store(kept_floats + MEAN_WAS, tl.where(anew, 0.0, tl.where(feeds, mean + weight * distance, mean)))
    tl.store(kept_floats + SQUARE_WAS, tl.where(anew, 0.0, tl.where(feeds, new_square, square)))
    tl.store(kept + SEEN_WAS, tl.where(anew, 0, tl.where(feeds, more, seen)))
    tl.store(kept + IN_A_ROW_WAS, tl.where(anew, 0, in_a_row))
    return spike


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
    if measured:
        if tl.load(config + SPIKES) != 0:
            spike = is_spike(config, kept, norm, takes)
            takes = takes & (spike == 0)
            skip = skip | spike
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
