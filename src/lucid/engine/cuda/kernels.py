"""The kernels: an update of all rows of one kind, the squares of their gradients, and what is decided by these.

Addresses come from tables, so that one launch is for any number of rows (``table.py`` makes them). Everything that is
counted in elements is int64: a parameter may have more than 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .adamw import adamw, quotient
from .formats import (
    BFLOAT16,
    BFLOAT16_ALONE,
    BFLOAT16_MOMENTS,
    BFLOAT16_RESIDUAL,
    BLOCK,
    EIGHT_BIT,
    FLOAT16,
    FLOAT16_MASTER,
    FLOAT32,
    FLOAT64,
    PLAIN,
    PLAIN_MOMENTS,
    decoded_signed,
    decoded_unsigned,
    drawn_bfloat16,
    draws,
    encoded_signed,
    encoded_unsigned,
    float_of,
    load,
    load_param,
    load_upper,
    mixed,
    store,
    store_param,
)

# The columns of the table of rows, as in csrc/plan.h.
PARAM, GRAD, LOWER, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE = (
    tl.constexpr(number) for number in range(8)
)
ELEMENTS, ROW, FIRST, RUN, STRIDE, LAYOUT = (tl.constexpr(number) for number in range(8, 14))
COLUMNS = tl.constexpr(16)

# What a step's table of scalars holds: whether the step is left out, then a set for each group and step count, in the
# order of lucid.engine.scalars.Scalars, and the step count.
BETA1, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, D, K, S, E, F, COUNT = (tl.constexpr(number) for number in range(10))
SET = tl.constexpr(16)  # float64 of each

# What sets are made of where that is left to the device: as above but for these, and where the numbers 1 - beta^t are.
LR, WEIGHT_DECAY, SIGN, LR_AT, LR_DOUBLE, POWERS1, LENGTH1, POWERS2, LENGTH2, EPS = (
    tl.constexpr(number) for number in (4, 5, 6, 7, 8, 10, 11, 12, 13, 14)
)

# A sum of squares is made of chunks, and a chunk's of lanes: element i of it is added to lane i % LANES.
CHUNK = tl.constexpr(4096)
LANES = tl.constexpr(32)


@triton.jit
def scalar(at, compute: tl.constexpr):
    """A number of the host's, rounded once to the compute type."""
    if compute == FLOAT64:
        return tl.load(at)
    else:
        return tl.load(at).to(tl.float32)


@triton.jit
def weight(at, beta: tl.constexpr, compute: tl.constexpr):
    """What a mean is weighted with, and whether it starts from the average."""
    from_average = tl.load(at + beta) >= 0.5
    return scalar(at + beta + from_average.to(tl.int32), compute), from_average


@triton.jit
def place(
    address, kind: tl.constexpr, start, lane, layout, operand: tl.constexpr, dims: tl.constexpr, wide: tl.constexpr
):
    """Where elements `start` + `lane` of an operand are; `dims` 0: one after the other."""
    at = address.to(tl.pointer_type(kind))
    if dims == 0:
        if wide:
            at = tl.multiple_of(at, 16)
        return at + start + lane
    else:
        rest = start + lane
        offset = tl.zeros(lane.shape, tl.int64)
        for dim in tl.static_range(dims - 1, -1, -1):
            size = tl.load(layout + dim)
            offset += rest % size * tl.load(layout + (operand + 1) * dims + dim)
            rest = rest // size
        return at + offset


@triton.jit
def load_gradient(
    address, start, lane, layout, mask,
    gradient: tl.constexpr, compute: tl.constexpr, dims: tl.constexpr, wide: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """In the compute type, each rounded at most once."""
    if gradient == FLOAT32:
        given: tl.constexpr = tl.float32
    elif gradient == FLOAT64:
        given: tl.constexpr = tl.float64
    elif gradient == FLOAT16:
        given: tl.constexpr = tl.float16
    else:
        given: tl.constexpr = tl.uint16
    at = place(address, given, start, lane, layout, GRAD, dims, wide)
    if gradient == BFLOAT16:
        x = float_of(load_upper(at, mask, masked))
    else:
        x = load(at, mask, masked)
    if compute == FLOAT64:
        return x.to(tl.float64)
    else:
        return x.to(tl.float32)


@triton.jit
def numbers(row, start, lane, numbered: tl.constexpr):
    """The numbers by which elements draw."""
    first = tl.load(row + FIRST)
    if numbered:
        run = tl.load(row + RUN)
        index = start + lane
        return first + index // run * tl.load(row + STRIDE) + index % run
    else:
        return (first + start).to(tl.uint32) + lane.to(tl.uint32)


@triton.jit
def largest(x, mask):
    """The largest of values that are not below zero; a NaN wins."""
    x = tl.where(mask, x, 0.0)
    if x.dtype == tl.float64:
        return tl.max(tl.ravel(x.to(tl.uint64, bitcast=True)), axis=0).to(tl.float64, bitcast=True)
    else:
        return tl.max(tl.ravel(x.to(tl.uint32, bitcast=True)), axis=0).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def sum_of_squares(x, mask):
    return tl.sum(tl.ravel(tl.where(mask, x * x, 0.0)), axis=0).to(tl.float64)


@triton.jit
def update_tile(
    param_at, gradient_at, lower_at, m_at, v_at, w_at, m_scale_at, v_scale_at, layout, row, key, observed,
    weight1, from_average1, weight2, from_average2, d, k, s, e, f, start, lane, mask, block, block_mask,
    gradient: tl.constexpr, compute: tl.constexpr, form: tl.constexpr, moments: tl.constexpr, amsgrad: tl.constexpr,
    dims: tl.constexpr, numbered: tl.constexpr, wide: tl.constexpr, observe: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Update elements `start` + `lane` of a row; with eight bits, each row of the tile is a block."""
    real: tl.constexpr = tl.float64 if compute == FLOAT64 else tl.float32
    if form == PLAIN:
        stored: tl.constexpr = real
    elif form == BFLOAT16_ALONE or form == BFLOAT16_RESIDUAL:
        stored: tl.constexpr = tl.uint16
    else:
        stored: tl.constexpr = tl.float16
    kept: tl.constexpr = real if moments == PLAIN_MOMENTS else (tl.uint16 if moments == BFLOAT16_MOMENTS else tl.uint8)
    flat: tl.constexpr = 0 if moments == EIGHT_BIT else dims  # codes are one after the other

    at_param = place(param_at, stored, start, lane, layout, PARAM, dims, wide)
    at_m = place(m_at, kept, start, lane, layout, EXP_AVG, flat, wide)
    at_v = place(v_at, kept, start, lane, layout, EXP_AVG_SQ, flat, wide)
    at_lower = at_param
    if form == BFLOAT16_RESIDUAL:
        at_lower = place(lower_at, tl.int16, start, lane, layout, LOWER, dims, wide)
    elif form == FLOAT16_MASTER:
        at_lower = place(lower_at, tl.float32, start, lane, layout, LOWER, dims, wide)

    theta = load_param(at_param, at_lower, mask, masked, form)
    g = load_gradient(gradient_at, start, lane, layout, mask, gradient, compute, dims, wide, masked)
    if moments == PLAIN_MOMENTS:
        m = load(at_m, mask, masked)
        v = load(at_v, mask, masked)
    elif moments == BFLOAT16_MOMENTS:
        m = float_of(load_upper(at_m, mask, masked))
        v = float_of(load_upper(at_v, mask, masked))
    else:
        at_m_scale = m_scale_at.to(tl.pointer_type(tl.float32)) + block
        at_v_scale = v_scale_at.to(tl.pointer_type(tl.float32)) + block
        m = decoded_signed(load(at_m, mask, masked), load(at_m_scale, block_mask, masked))
        v = decoded_unsigned(load(at_v, mask, masked), load(at_v_scale, block_mask, masked))
    w = v
    if amsgrad:
        at_w = place(w_at, real, start, lane, layout, MAX_EXP_AVG_SQ, dims, wide)
        w = load(at_w, mask, masked)

    theta, m, v, w, root, update = adamw(
        weight1, from_average1, weight2, from_average2, d, k, s, e, f, theta, g, m, v, w, amsgrad
    )
    if observe:
        ratio = tl.where(m == 0, 0.0, quotient(tl.abs(m), root))
        tl.store(observed + 0, sum_of_squares(g, mask))
        tl.store(observed + 1, sum_of_squares(update, mask))
        tl.store(observed + 2, sum_of_squares(theta, mask))
        tl.store(observed + 3, largest(ratio, mask))

    store_param(at_param, at_lower, theta, mask, masked, form)
    if amsgrad:
        store(at_w, w, mask, masked)
    if moments == PLAIN_MOMENTS:
        store(at_m, m, mask, masked)
        store(at_v, v, mask, masked)
    else:
        drawn = draws(key, numbers(row, start, lane, numbered))
        if moments == BFLOAT16_MOMENTS:
            store(at_m, drawn_bfloat16(m, drawn, False), mask, masked)
            store(at_v, drawn_bfloat16(v, drawn, True), mask, masked)
        else:
            if masked:
                m = tl.where(mask, m, 0.0)
                v = tl.where(mask, v, 0.0)
            m_code, m_scale = encoded_signed(m, drawn)
            v_code, v_scale = encoded_unsigned(v, drawn)
            store(at_m, m_code, mask, masked)
            store(at_v, v_code, mask, masked)
            store(at_m_scale, m_scale, block_mask, masked)
            store(at_v_scale, v_scale, block_mask, masked)


@triton.jit(do_not_specialize=["row_count"])
def update(
    rows, step, scalars, programs, layouts, observed, row_count,
    gradient: tl.constexpr, compute: tl.constexpr, form: tl.constexpr, moments: tl.constexpr, amsgrad: tl.constexpr,
    dims: tl.constexpr, numbered: tl.constexpr, whole_rows: tl.constexpr, wide: tl.constexpr, observe: tl.constexpr,
    tile: tl.constexpr, tiles: tl.constexpr,
):  # fmt: skip
    """Update all rows of one kind, `tiles` tiles of one of them in each program.

    ``rows``: int64[rows, COLUMNS]. ``step``: int64[3, rows], gradients' addresses, sets of scalars, hashes of streams.
    ``scalars``: float64. ``programs``: int64, the row in the lower half and which of its parts in the upper.
    ``layouts``: int64. ``observed``: float64[programs, tiles, 4]. ``gradient`` ... ``wide``: the kind.
    """
    program = tl.load(programs + tl.program_id(0))
    number = program & 0xFFFFFFFF
    gradient_at = tl.load(step + number)
    if (gradient_at == 0) | (tl.load(scalars) != 0.0):
        return
    which = tl.load(step + row_count + number)
    stream = tl.load(step + 2 * row_count + number)
    row = rows + number * COLUMNS
    elements = tl.load(row + ELEMENTS)
    param_at = tl.load(row + PARAM)
    lower_at = tl.load(row + LOWER)
    m_at = tl.load(row + EXP_AVG)
    v_at = tl.load(row + EXP_AVG_SQ)
    w_at = tl.load(row + MAX_EXP_AVG_SQ)
    m_scale_at = tl.load(row + EXP_AVG_SCALE)
    v_scale_at = tl.load(row + EXP_AVG_SQ_SCALE)
    layout = layouts + tl.load(row + LAYOUT)

    scalars += (which + 1) * SET
    weight1, from_average1 = weight(scalars, BETA1, compute)
    weight2, from_average2 = weight(scalars, BETA2, compute)
    d = scalar(scalars + D, compute)
    k = scalar(scalars + K, compute)
    s = scalar(scalars + S, compute)
    e = scalar(scalars + E, compute)
    f = scalar(scalars + F, compute)
    key = mixed(stream.to(tl.uint64, bitcast=True) + tl.load(scalars + COUNT).to(tl.uint64))

    first_tile = (program >> 32) * tiles
    observed += tl.program_id(0).to(tl.int64) * (tiles * 4)
    if moments != EIGHT_BIT:
        lane = tl.arange(0, tile)
        last_tile = tl.cdiv(elements, tile)
    else:
        in_tile = tl.arange(0, tile // BLOCK)[:, None]
        in_block = tl.arange(0, BLOCK)[None, :]
        lane = in_tile * BLOCK + in_block
        length = tl.load(row + ROW)
        in_row = tl.cdiv(length, BLOCK)
        last_tile = tl.cdiv(elements // length * in_row, tile // BLOCK)
    if ((first_tile + tiles) * tile <= elements) & (whole_rows or moments != EIGHT_BIT):
        for turn in range(0, tiles):
            start = (first_tile + turn) * tile
            block = 0
            if moments == EIGHT_BIT:
                block = (first_tile + turn) * (tile // BLOCK) + in_tile
            update_tile(
                param_at, gradient_at, lower_at, m_at, v_at, w_at, m_scale_at, v_scale_at, layout, row, key,
                observed + turn * 4, weight1, from_average1, weight2, from_average2, d, k, s, e, f,
                start, lane, lane >= 0, block, block,
                gradient, compute, form, moments, amsgrad, dims, numbered, wide, observe, False,
            )  # fmt: skip
    else:
        for turn in range(0, tl.minimum(last_tile - first_tile, tiles).to(tl.int32)):
            start = (first_tile + turn) * tile
            if moments != EIGHT_BIT:
                block = 0
                mask = start + lane < elements
                block_mask = mask
                update_tile(
                    param_at, gradient_at, lower_at, m_at, v_at, w_at, m_scale_at, v_scale_at, layout, row, key,
                    observed + turn * 4, weight1, from_average1, weight2, from_average2, d, k, s, e, f,
                    start, lane, mask, block, block_mask,
                    gradient, compute, form, moments, amsgrad, dims, numbered, wide, observe, True,
                )  # fmt: skip
            else:
                block = (first_tile + turn) * (tile // BLOCK) + in_tile
                inner = block % in_row * BLOCK + in_block
                index = block // in_row * length + inner
                block_mask = block // in_row * length < elements
                update_tile(
                    param_at, gradient_at, lower_at, m_at, v_at, w_at, m_scale_at, v_scale_at, layout, row, key,
                    observed + turn * 4, weight1, from_average1, weight2, from_average2, d, k, s, e, f,
                    start * 0, index, (inner < length) & block_mask, block, block_mask,
                    gradient, compute, form, moments, amsgrad, dims, numbered, wide, observe, True,
                )  # fmt: skip


@triton.jit
def folded(lanes, count: tl.constexpr):
    """The lanes of `count` chunks by halves: 0 and 16, 1 and 17, ... then 0 and 8, ..."""
    half = tl.sum(tl.reshape(lanes, [count, 2, 16]), axis=1)
    half = tl.sum(tl.reshape(half, [count, 2, 8]), axis=1)
    half = tl.sum(tl.reshape(half, [count, 2, 4]), axis=1)
    half = tl.sum(tl.reshape(half, [count, 2, 2]), axis=1)
    return tl.sum(half, axis=1)


@triton.jit(do_not_specialize=["row_count", "sum_count"])
def squares(
    rows, step, programs, layouts, sums, row_count, sum_count,
    gradient: tl.constexpr, compute: tl.constexpr, dims: tl.constexpr, wide: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    """Sum up the squares of rows' gradients, `together` chunks of one in each program, and find the largest entries.

    ``programs``: int64[2, programs], as above, and where the first chunk's sum belongs. ``sums``:
    float64[3, sum_count], sums of chunks, the largest |g| of those computed in float32, and of those in float64;
    infinity where one is no number.
    """
    program = tl.load(programs + tl.program_id(0))
    to = tl.load(programs + tl.num_programs(0) + tl.program_id(0))
    number = program & 0xFFFFFFFF
    row = rows + number * COLUMNS
    elements = tl.load(row + ELEMENTS)
    gradient_at = tl.load(step + number)
    if gradient_at == 0:
        return
    real: tl.constexpr = tl.float64 if compute == FLOAT64 else tl.float32
    layout = layouts + tl.load(row + LAYOUT)
    start = (program >> 32) * (together * CHUNK)
    lane = tl.arange(0, together)[:, None] * CHUNK + tl.arange(0, LANES)[None, :]
    lanes = tl.zeros([together, LANES], tl.float64)
    most = tl.zeros([together, LANES], real)
    for _ in range(0, tl.minimum(tl.cdiv(elements - start, LANES), CHUNK // LANES).to(tl.int32)):
        x = load_gradient(
            gradient_at, start, lane, layout, start + lane < elements, gradient, compute, dims, wide, True
        )
        wide_x = x.to(tl.float64)
        lanes += wide_x * wide_x
        size = tl.abs(x)
        most = tl.maximum(most, tl.where(size == size, size, float("inf")))
        lane += LANES
    part = tl.arange(0, together)
    own = start + part * CHUNK < elements
    tl.store(sums + to + part, folded(lanes, together), mask=own)
    if compute == FLOAT64:
        tl.store(sums + 2 * sum_count + to + part, tl.max(most, axis=1), mask=own)
    else:
        tl.store(sums + sum_count + to + part, tl.max(most, axis=1).to(tl.float64), mask=own)


@triton.jit
def sum_chunk(values, value_count, order, begin, count, ordered: tl.constexpr):
    """Sum up a chunk of up to 4,096 sums in the order of their lanes; find the largest of each of the two others."""
    lanes = tl.zeros([1, LANES], tl.float64)
    most32 = tl.zeros([1, LANES], tl.float64)
    most64 = tl.zeros([1, LANES], tl.float64)
    lane = tl.arange(0, LANES)[None, :]
    for first in range(0, count, LANES):
        own = first + lane < count
        if ordered:
            which = tl.load(order + begin + first + lane, mask=own, other=0)
        else:
            which = begin + first + lane
        lanes += tl.load(values + which, mask=own, other=0)
        most32 = tl.maximum(most32, tl.load(values + value_count + which, mask=own, other=0))
        most64 = tl.maximum(most64, tl.load(values + 2 * value_count + which, mask=own, other=0))
    return tl.sum(folded(lanes, 1), axis=0), tl.max(tl.ravel(most32), axis=0), tl.max(tl.ravel(most64), axis=0)


@triton.jit(do_not_specialize=["value_count", "sum_count"])
def sum_up(values, sums, segments, order, value_count, sum_count, ordered: tl.constexpr):
    """Sum up segments of up to 4,096 sums; ``segments``: int64[3, programs], where each begins, its count, where to."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    begin = tl.load(segments + program)
    count = tl.load(segments + programs + program)
    to = tl.load(segments + 2 * programs + program)
    total, most32, most64 = sum_chunk(values, value_count, order, begin, count, ordered)
    tl.store(sums + to, total)
    tl.store(sums + sum_count + to, most32)
    tl.store(sums + 2 * sum_count + to, most64)


# The words of what decides, and of what is kept on the device from step to step.
SETS, SUMS, MAX_NORM, SKIPS, SCALE, SCALE_AT, SCALE_DOUBLE, FOUND_INF_AT, COUNTS = (
    tl.constexpr(number) for number in range(9)
)
DRIFT, SKIPPED, NORM, SCALE_WAS = (tl.constexpr(number) for number in range(4))


@triton.jit
def number_at(address, double):
    """A float32 of the device, or a float64 where it is `double`, as float64."""
    if double != 0:
        return tl.load(address.to(tl.pointer_type(tl.float64)))
    else:
        return tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)


@triton.jit(do_not_specialize=["sum_count"])
def decide(config, kept, sums, scalars, sum_count, measured: tl.constexpr):
    """Decide what becomes of this step, and make its scalars.

    ``config``: int64, words of which some are float64s: SETS, how many sets of scalars follow from word SET on; SUMS,
    of how many sums (up to 4,096) the sum of squares is made; MAX_NORM; SKIPS, whether gradients that are not finite
    leave the step out; the scale of gradients, or its address and whether that is of a float64; the address of a
    float32 found_inf, or 0; COUNTS, whether the host's step counts stand still while this is run again and again.
    ``kept``: int64, how far the host's step counts are behind and how many steps were left out, and of the last step,
    as float64, the norm of the gradients and their scale.
    """
    floats = config.to(tl.pointer_type(tl.float64))
    kept_floats = kept.to(tl.pointer_type(tl.float64))
    scale = tl.load(floats + SCALE)
    scale_at = tl.load(config + SCALE_AT)
    if scale_at != 0:
        scale = number_at(scale_at, tl.load(config + SCALE_DOUBLE))
    found_at = tl.load(config + FOUND_INF_AT)
    skip = tl.load(config + SETS) < 0
    if found_at != 0:
        skip = number_at(found_at, 0) != 0.0
    skip = skip | (scale <= 0.0) | (scale == float("inf")) | (scale != scale)
    factor = 1.0 / scale
    if measured:
        square, most32, most64 = sum_chunk(sums, sum_count, config, 0, tl.load(config + SUMS), False)
        norm = tl.sqrt(square) / scale
        bound = tl.load(floats + MAX_NORM)
        clip = tl.where((bound == float("inf")) | (norm + 1e-6 <= bound), 1.0, bound / (norm + 1e-6))
        factor = clip / scale
        large = most32.to(tl.float32) * factor.to(tl.float32) >= 18446744073709551616.0  # 2^64
        large = large | (most64 * factor >= 1.3407807929942597e154)  # 2^512
        finite = (most32 < float("inf")) & (most64 < float("inf")) & (norm < float("inf")) & (factor == factor)
        fine = (square * factor * factor < 1.7014118346046923e38) | (finite & (large == 0))  # 2^127
        skip = skip | ((tl.load(config + SKIPS) != 0) & (fine == 0))
        tl.store(kept_floats + NORM, norm)

    drift = tl.load(kept + DRIFT)
    sets = tl.load(config + SETS)
    for number in range(0, sets):
        at = floats + (number + 1) * SET
        words = config + (number + 1) * SET
        to = scalars + (number + 1) * SET
        lr = tl.load(at + LR)
        lr_at = tl.load(words + LR_AT)
        if lr_at != 0:
            lr = number_at(lr_at, tl.load(words + LR_DOUBLE))
            skip = skip | (lr < 0.0) | (lr == float("inf")) | (lr != lr)
        count = tl.load(at + COUNT).to(tl.int64) + drift
        powers1 = tl.load(words + POWERS1).to(tl.pointer_type(tl.float64))
        powers2 = tl.load(words + POWERS2).to(tl.pointer_type(tl.float64))
        power1 = tl.load(powers1 + tl.minimum(count, tl.load(words + LENGTH1) - 1))
        power2 = tl.load(powers2 + tl.minimum(count, tl.load(words + LENGTH2) - 1))
        for word in tl.static_range(4):
            tl.store(to + word, tl.load(at + word))
        tl.store(to + D, lr * tl.load(at + WEIGHT_DECAY))
        tl.store(to + K, lr / power1)
        tl.store(to + S, 1.0 / tl.sqrt(power2))
        tl.store(to + E, tl.load(at + EPS))
        tl.store(to + F, factor * tl.load(at + SIGN))
        tl.store(to + COUNT, count.to(tl.float64))

    tl.store(scalars, skip.to(tl.float64))
    tl.store(kept_floats + SCALE_WAS, tl.where(skip, tl.load(kept_floats + SCALE_WAS), scale))
    tl.store(kept + SKIPPED, tl.load(kept + SKIPPED) + skip.to(tl.int64))
    if tl.load(config + COUNTS) != 0:
        drift += (skip == 0).to(tl.int64)
    else:
        drift -= skip.to(tl.int64)
    tl.store(kept + DRIFT, drift)
