"""The kernel that updates all rows of one kind.

Addresses come from tables (``row_table.py`` makes them), so one launch works for any number of rows. All counts of
elements are int64, because a parameter may have more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lucid.engine import numbers
from lucid.engine.numbers import Column, Operand, Scalar

from .adamw import adamw, average, mean, quotient
from .formats import (
    BFLOAT16,
    BFLOAT16_DRAWN,
    BFLOAT16_MOMENTS,
    BFLOAT16_RESIDUAL,
    BLOCK,
    EIGHT_BIT,
    FLOAT16,
    FLOAT16_ALONE,
    FLOAT16_MASTER,
    FLOAT32,
    FLOAT64,
    PLAIN,
    PLAIN_MOMENTS,
    USE_EMA,
    USE_PARAM,
    decoded_signed,
    decoded_unsigned,
    dither,
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
    store_upper,
)

# A kernel can read only constants, under a name of its own module. lucid.engine.numbers describes each of these.

# The columns of the table of rows.
PARAM = tl.constexpr(int(Operand.PARAM))
GRAD = tl.constexpr(int(Operand.GRAD))
LOW_BITS = tl.constexpr(int(Operand.LOW_BITS))
EXP_AVG = tl.constexpr(int(Operand.EXP_AVG))
EXP_AVG_SQ = tl.constexpr(int(Operand.EXP_AVG_SQ))
MAX_EXP_AVG_SQ = tl.constexpr(int(Operand.MAX_EXP_AVG_SQ))
EMA = tl.constexpr(int(Operand.EMA))
EXP_AVG_SCALE = tl.constexpr(int(Operand.EXP_AVG_SCALE))
EXP_AVG_SQ_SCALE = tl.constexpr(int(Operand.EXP_AVG_SQ_SCALE))
ELEMENTS = tl.constexpr(int(Column.ELEMENTS))
ROW = tl.constexpr(int(Column.ROW))
FIRST = tl.constexpr(int(Column.FIRST))
RUN = tl.constexpr(int(Column.RUN))
STRIDE = tl.constexpr(int(Column.STRIDE))
LAYOUT = tl.constexpr(int(Column.LAYOUT))
COLUMNS = tl.constexpr(numbers.COLUMNS)

# A table of scalars.
BETA1 = tl.constexpr(int(Scalar.BETA1))
BETA2 = tl.constexpr(int(Scalar.BETA2))
D = tl.constexpr(int(Scalar.D))
K = tl.constexpr(int(Scalar.K))
S = tl.constexpr(int(Scalar.S))
E = tl.constexpr(int(Scalar.E))
F = tl.constexpr(int(Scalar.F))
CAUTIOUS = tl.constexpr(int(Scalar.CAUTIOUS))
EMA_DECAY = tl.constexpr(int(Scalar.EMA_DECAY))
COUNT = tl.constexpr(int(Scalar.COUNT))
SET = tl.constexpr(numbers.SET)


@triton.jit
def scalar(at, compute: tl.constexpr):
    """Load a float64 scalar, rounded once to the compute type."""
    if compute == FLOAT64:
        return tl.load(at)
    else:
        return tl.load(at).to(tl.float32)


@triton.jit
def number_at(address, double):
    """Load a float32 at an address, or a float64 if `double` is not 0, as float64."""
    if double != 0:
        return tl.load(address.to(tl.pointer_type(tl.float64)))
    else:
        return tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)


@triton.jit
def weight(at, beta: tl.constexpr, compute: tl.constexpr):
    """Return the weight of a running average (1 - beta, or beta if beta < 1/2), and whether beta >= 1/2."""
    from_average = tl.load(at + beta) >= 0.5
    return scalar(at + beta + from_average.to(tl.int32), compute), from_average


@triton.jit
def place(
    address, kind: tl.constexpr, start, lane, layout, operand: tl.constexpr, dims: tl.constexpr, wide: tl.constexpr
):
    """Return the addresses of elements `start` + `lane` of an operand, which is contiguous if `dims` is 0."""
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
    """Load elements of a gradient in the compute type, each rounded at most once."""
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
def element_numbers(row, start, lane, numbered: tl.constexpr):
    """Return the numbers of elements in the whole parameter, on which their random bits depend."""
    first = tl.load(row + FIRST)
    if numbered:
        run = tl.load(row + RUN)
        index = start + lane
        return first + index // run * tl.load(row + STRIDE) + index % run
    else:
        return (first + start).to(tl.uint32) + lane.to(tl.uint32)


@triton.jit
def largest(x, mask):
    """Return the largest of values >= 0, or NaN if one is NaN."""
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
    param_at, gradient_at, low_bits_at, m_at, v_at, w_at, a_at, m_scale_at, v_scale_at, layout, row, key, observed,
    weight1, from_average1, weight2, from_average2, weight3, from_average3, d, k, s, e, f, cautious,
    start, lane, mask, block, block_mask,
    gradient: tl.constexpr, compute: tl.constexpr, form: tl.constexpr, moments: tl.constexpr, amsgrad: tl.constexpr,
    ema: tl.constexpr, dims: tl.constexpr, numbered: tl.constexpr, wide: tl.constexpr, some_cautious: tl.constexpr,
    observe: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Update elements `start` + `lane` of a row. With 8-bit moments, each row of the tile is a block.

    Addresses of the row's operands, int64 scalars, 0 if the row has no such operand: ``param_at``, ``gradient_at``,
    ``low_bits_at`` (residual or float32 master), ``m_at``, ``v_at``, ``w_at`` (amsgrad's maximum), ``a_at`` (average of
    the weights), ``m_scale_at``, ``v_scale_at`` (scales of blocks). ``layout``: pointer to the row's layout, int64[1 +
    SHAPED_OPERANDS, dims], read if `dims` is not 0. ``row``: pointer to the row's columns in the table of rows.
    ``key``: uint64 scalar, the key of this step's random bits. ``observed``: pointer to float64[4], written if
    `observe`.

    Scalars in the compute type: ``weight1``, ``weight2``, ``weight3``, the weights of the running averages m, v and a,
    with ``from_average1``, ``from_average2``, ``from_average3``, int1, whether beta >= 1/2 (the last two are read if
    `ema`); ``d``, ``k``, ``s``, ``e``, ``f`` and ``cautious`` of the rule (the last is read if `some_cautious`).

    Elements: ``start``, int64 scalar; ``lane``, integers [tile], or [tile / BLOCK, BLOCK] with 8-bit moments; ``mask``,
    int1 of that shape, which of them exist, read if `masked`. For 8-bit moments only: ``block``, int64[tile / BLOCK,
    1], the numbers of the tile's blocks, and ``block_mask``, int1 of that shape, which of these exist.

    The kind, as in `lucid.engine.cuda.row_table.Kind`: ``gradient``, ``compute`` (`Dtype`), ``form`` (`ParamFormat`),
    ``moments`` (`MomentFormat`), ``amsgrad``, ``ema``, ``dims`` of the layout, ``numbered``, ``wide``. Then
    ``some_cautious``: whether a set of scalars may be cautious; ``observe``; and ``masked``: whether some elements of
    the tile may not exist.
    """
    real: tl.constexpr = tl.float64 if compute == FLOAT64 else tl.float32
    if form == PLAIN:
        stored: tl.constexpr = real
    elif form == FLOAT16_ALONE or form == FLOAT16_MASTER:
        stored: tl.constexpr = tl.float16
    else:
        stored: tl.constexpr = tl.uint16
    kept: tl.constexpr = real if moments == PLAIN_MOMENTS else (tl.uint16 if moments == BFLOAT16_MOMENTS else tl.uint8)
    flat: tl.constexpr = 0 if moments == EIGHT_BIT else dims  # codes are always contiguous

    at_param = place(param_at, stored, start, lane, layout, PARAM, dims, wide)
    at_m = place(m_at, kept, start, lane, layout, EXP_AVG, flat, wide)
    at_v = place(v_at, kept, start, lane, layout, EXP_AVG_SQ, flat, wide)
    at_low_bits = at_param
    if form == BFLOAT16_RESIDUAL:
        at_low_bits = place(low_bits_at, tl.int16, start, lane, layout, LOW_BITS, dims, wide)
    elif form == FLOAT16_MASTER:
        at_low_bits = place(low_bits_at, tl.float32, start, lane, layout, LOW_BITS, dims, wide)

    theta = load_param(at_param, at_low_bits, mask, masked, form)
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
    if ema:
        at_a = place(a_at, real, start, lane, layout, EMA, dims, wide)
        a = load(at_a, mask, masked)

    theta, m, v, w, root, update = adamw(
        weight1, from_average1, weight2, from_average2, d, k, s, e, f, cautious, theta, g, m, v, w,
        amsgrad, some_cautious,
    )  # fmt: skip
    if observe:
        ratio = tl.where(m == 0, 0.0, quotient(tl.abs(m), root))
        tl.store(observed + 0, sum_of_squares(g, mask))
        tl.store(observed + 1, sum_of_squares(update, mask))
        tl.store(observed + 2, sum_of_squares(theta, mask))
        tl.store(observed + 3, largest(ratio, mask))

    if form != BFLOAT16_DRAWN:
        theta = store_param(at_param, at_low_bits, theta, mask, masked, form)
    if amsgrad:
        store(at_w, w, mask, masked)
    if moments != PLAIN_MOMENTS or form == BFLOAT16_DRAWN or (ema and compute != FLOAT64):
        number = element_numbers(row, start, lane, numbered)
    if form == BFLOAT16_DRAWN:
        drawn = draws(key ^ USE_PARAM, number)
        theta = store_upper(at_param, drawn_bfloat16(theta, drawn, False), mask, masked)
    if ema:
        if compute == FLOAT64:
            a = mean(a, theta, weight3, from_average3)
        else:
            a = average(a, theta, weight3, from_average3, dither(a, draws(key ^ USE_EMA, number)))
        store(at_a, a, mask, masked)
    if moments == PLAIN_MOMENTS:
        store(at_m, m, mask, masked)
        store(at_v, v, mask, masked)
    else:
        drawn = draws(key, number)
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
    ema: tl.constexpr, dims: tl.constexpr, numbered: tl.constexpr, whole_rows: tl.constexpr, wide: tl.constexpr,
    some_cautious: tl.constexpr, observe: tl.constexpr, tile: tl.constexpr, tiles: tl.constexpr,
):  # fmt: skip
    """Update all rows of one kind. Each program updates `tiles` tiles of one row.

    ``rows``: int64[rows, COLUMNS]. ``step``: int64[3, rows]: gradients' addresses, sets of scalars, hashes of streams.
    ``scalars``: float64, a table of scalars. ``programs``: int64[programs], the row in the lower half and the part of
    it in the upper. ``layouts``: int64. ``observed``: float64[programs, tiles, 4]. ``gradient`` ... ``wide``: the kind.
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
    low_bits_at = tl.load(row + LOW_BITS)
    m_at = tl.load(row + EXP_AVG)
    v_at = tl.load(row + EXP_AVG_SQ)
    w_at = tl.load(row + MAX_EXP_AVG_SQ)
    a_at = tl.load(row + EMA)
    m_scale_at = tl.load(row + EXP_AVG_SCALE)
    v_scale_at = tl.load(row + EXP_AVG_SQ_SCALE)
    layout = layouts + tl.load(row + LAYOUT)

    scalars += (which + 1) * SET
    weight1, from_average1 = weight(scalars, BETA1, compute)
    weight2, from_average2 = weight(scalars, BETA2, compute)
    weight3, from_average3 = weight(scalars, EMA_DECAY, compute)
    d = scalar(scalars + D, compute)
    k = scalar(scalars + K, compute)
    s = scalar(scalars + S, compute)
    e = scalar(scalars + E, compute)
    f = scalar(scalars + F, compute)
    cautious = tl.load(scalars + CAUTIOUS) != 0.0
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
                param_at, gradient_at, low_bits_at, m_at, v_at, w_at, a_at, m_scale_at, v_scale_at, layout, row,
                key, observed + turn * 4, weight1, from_average1, weight2, from_average2, weight3, from_average3,
                d, k, s, e, f, cautious,
                start, lane, lane >= 0, block, block,
                gradient, compute, form, moments, amsgrad, ema, dims, numbered, wide, some_cautious, observe, False,
            )  # fmt: skip
    else:
        for turn in range(0, tl.minimum(last_tile - first_tile, tiles).to(tl.int32)):
            start = (first_tile + turn) * tile
            if moments != EIGHT_BIT:
                block = 0
                mask = start + lane < elements
                block_mask = mask
                update_tile(
                    param_at, gradient_at, low_bits_at, m_at, v_at, w_at, a_at, m_scale_at, v_scale_at, layout, row,
                    key, observed + turn * 4, weight1, from_average1, weight2, from_average2, weight3, from_average3,
                    d, k, s, e, f, cautious,
                    start, lane, mask, block, block_mask,
                    gradient, compute, form, moments, amsgrad, ema, dims, numbered, wide, some_cautious, observe, True,
                )  # fmt: skip
            else:
                block = (first_tile + turn) * (tile // BLOCK) + in_tile
                inner = block % in_row * BLOCK + in_block
                index = block // in_row * length + inner
                block_mask = block // in_row * length < elements
                update_tile(
                    param_at, gradient_at, low_bits_at, m_at, v_at, w_at, a_at, m_scale_at, v_scale_at, layout, row,
                    key, observed + turn * 4, weight1, from_average1, weight2, from_average2, weight3, from_average3,
                    d, k, s, e, f, cautious,
                    start * 0, index, (inner < length) & block_mask, block, block_mask,
                    gradient, compute, form, moments, amsgrad, ema, dims, numbered, wide, some_cautious, observe, True,
                )  # fmt: skip
