"""The reference engine: the numerics contract in plain torch operations, on any device.

It defines what every other engine computes. `adamw` is the same as ``csrc/adamw.h``, line by line; each operation
rounds once. Some operations of torch are not allowed here: its CPU square root is not correctly rounded, and
``addcmul``, ``lerp`` and ``alpha=`` may fuse two roundings into one.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import codecs, exact_sum
from .native import missing as cpu_missing
from .numbers import MomentFormat, ParamFormat, Use
from .observed import Observed, Seen
from .protocol import StepOrder
from .row import COMPUTE, Row, RowFormat
from .scalars import Scalars, scalars_in
from .shards import local, place

Update = tuple[Tensor, Tensor]


def adamw(
    h: Scalars, theta: Tensor, g: Tensor, m: Tensor, v: Tensor, w: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the next θ, m, v and w of real tensors of one shape, all in the compute type of `theta`.

    w, the maximum of all v so far, is None without amsgrad.
    """
    g = h.f * g
    m = _mean(m, g, h.beta1, h.one_minus_beta1)
    v = _mean(v, g * g, h.beta2, h.one_minus_beta2)
    if w is not None:
        w = torch.where((v > w) | v.isnan(), v, w)
    theta = theta - _update(h, theta, m, v if w is None else w)
    return theta, m, v, w


def _update(h: Scalars, theta: Tensor, m: Tensor, w: Tensor) -> Tensor:
    update = (h.k * m) / (_square_root(w) * h.s + h.e)
    decay = h.d * theta
    if h.cautious:
        decay = torch.where(((update > 0) & (theta > 0)) | ((update < 0) & (theta < 0)), decay, 0.0)
    return decay + update


def average(h: Scalars, a: Tensor, theta: Tensor, drawn: Tensor) -> Tensor:
    """Return the next average of the weights: a running mean of θ, stochastically rounded in float32.

    Rounded to nearest, the average would stop moving when θ − a is small: its change is then below half a unit of the
    last place of a.
    """
    if h.ema < 0.5:
        return theta + h.ema * (a - theta)
    change = h.one_minus_ema * (theta - a)
    return a + (change + codecs.dither(a, drawn) if a.dtype == torch.float32 else change)


def _mean(a: Tensor, x: Tensor, beta: float, one_minus_beta: float) -> Tensor:
    return a + one_minus_beta * (x - a) if beta >= 0.5 else x + beta * (a - x)


def _square_root(x: Tensor) -> Tensor:
    """Return the correctly rounded square root."""
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    if x.device.type == "cpu":
        with np.errstate(invalid="ignore"):
            return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))
    return x.sqrt()


@torch.no_grad()
def compute(
    rows: Sequence[Row], scalars: Sequence[Scalars], *, observe: bool
) -> tuple[list[Update], list[tuple[int, Observed]]]:
    """Return (target, new value) pairs to copy, and (row number, observation) pairs. It writes nothing: it may fail."""
    updates: list[Update] = []
    observed: list[tuple[int, Observed]] = []
    latest: dict[
        tuple[object, ...], Tensor
    ] = {}  # if two parameters share memory, the second starts from the new value of the first
    for row, h in zip(rows, scalars, strict=True):
        param = local(row.param).detach()
        slots = {key: local(slot) for key, slot in row.slots.items()}
        where = place(param)
        theta, m, v, w = _loaded(row.format, latest.get(where, param), slots)
        g = _gradient(row)
        new = adamw(h, theta, g, m, v, w)
        if observe:
            observed.append((row.index, _observed(h, theta, g, *new)))
        drawn = functools.partial(_drawn, row, slots)
        values = _stored(row.format, param.dtype, *new, drawn)
        latest[where] = values["param"]
        if row.format.ema:
            stored = _loaded(row.format, values["param"], slots | values)[0]
            new_average = average(h, _real(slots["ema"]), stored, drawn(Use.EMA))
            values["ema"] = torch.view_as_complex(new_average) if param.is_complex() else new_average
        updates.append((param, values.pop("param")))
        updates += [(_raw(slots[key]), _raw(value)) for key, value in values.items()]
        updates.append((row.step, row.step + 1))
    return updates, observed


def _drawn(row: Row, slots: dict[str, Tensor], use: Use) -> Tensor:
    """Return 16 random bits for each number of this step: two numbers for a complex element."""
    param = local(row.param)
    shape = _real(param.detach()).shape
    numbers = row.numbering.numbers(shape, param.device)
    return codecs.draws(int(slots["stream"]), int(row.step) + 1, numbers, use)


def _gradient(row: Row) -> Tensor:
    """Return the gradient in the compute type."""
    return _real(row.gradient.to(COMPUTE[row.param.dtype]))


def _observed(h: Scalars, before: Tensor, g: Tensor, theta: Tensor, m: Tensor, v: Tensor, w: Tensor | None) -> Observed:
    w = v if w is None else w
    ratio = torch.where(m == 0, 0.0, m.abs() / _square_root(w))
    measured = (g, _update(h, before, m, w), theta)
    gradient, update, param = (float(x.double().square().sum()) for x in measured)
    return Observed(gradient, update, param, float(ratio.max()) if ratio.numel() else 0.0)


@torch.no_grad()
def measure(rows: Sequence[Row], scale: float, kinds: array[int] | None) -> list[int]:
    """Return the words of the sum of the squares of the rows' gradients, as `Engine.measure` does."""
    words = exact_sum.blank(kinds)
    for row in rows:
        exact_sum.add(words, _gradient(row), scale, 0 if kinds is None else kinds[row.index])
    return words


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _raw(slot: Tensor) -> Tensor:
    """Return a bfloat16 tensor as int16, because a residual is bits, and a copy as bfloat16 may change them."""
    return slot.view(torch.int16) if slot.dtype == torch.bfloat16 else slot


def _loaded(form: RowFormat, param: Tensor, slots: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return θ, m, v and w in the compute type."""
    if form.param is ParamFormat.BFLOAT16_RESIDUAL:
        theta = codecs.joined(param, slots["residual"])
    elif form.param is ParamFormat.FLOAT16_MASTER:
        theta = codecs.master_of_float16(param, slots["master"])
    else:
        theta = param.float() if param.dtype in (torch.bfloat16, torch.float16) else _real(param)
    if form.moments is MomentFormat.EIGHT_BIT:
        m = codecs.decode_signed(slots["exp_avg_code"], slots["exp_avg_scale"])
        v = codecs.decode_unsigned(slots["exp_avg_sq_code"], slots["exp_avg_sq_scale"])
    else:
        m, v = (_real(slots[key]).to(theta.dtype) for key in ("exp_avg", "exp_avg_sq"))
    w = slots.get("max_exp_avg_sq")
    return theta, m, v, None if w is None else _real(w)


def _stored(
    form: RowFormat,
    dtype: torch.dtype,
    theta: Tensor,
    m: Tensor,
    v: Tensor,
    w: Tensor | None,
    drawn: Callable[[Use], Tensor],
) -> dict[str, Tensor]:
    """Return the values to store, by slot, with the parameter under "param": the inverse of `_loaded`."""
    values: dict[str, Tensor] = {}
    if form.param is ParamFormat.BFLOAT16_RESIDUAL:
        values["param"], values["residual"] = codecs.split(theta)
    elif form.param is ParamFormat.BFLOAT16_DRAWN:
        values["param"] = codecs.rounded_to_bfloat16(theta, drawn(Use.PARAM))
    else:
        values["param"] = torch.view_as_complex(theta) if dtype.is_complex else theta.to(dtype)
        if form.param is ParamFormat.FLOAT16_MASTER:
            values["master"] = theta
    if form.moments is MomentFormat.EIGHT_BIT:
        bits = drawn(Use.MOMENTS)
        values["exp_avg_code"], values["exp_avg_scale"] = codecs.encode_signed(m, bits)
        values["exp_avg_sq_code"], values["exp_avg_sq_scale"] = codecs.encode_unsigned(v, bits)
    elif form.moments is MomentFormat.BFLOAT16:
        bits = drawn(Use.MOMENTS)
        values["exp_avg"] = codecs.rounded_to_bfloat16(m, bits)
        values["exp_avg_sq"] = codecs.rounded_to_bfloat16(v, bits, positive=True)
    else:
        values["exp_avg"], values["exp_avg_sq"] = (torch.view_as_complex(x) if dtype.is_complex else x for x in (m, v))
    if w is not None:
        values["max_exp_avg_sq"] = torch.view_as_complex(w) if dtype.is_complex else w
    return values


@torch.no_grad()
def commit(updates: Sequence[Update]) -> None:
    """Copy the new values to their targets. A second call changes nothing."""
    for target, value in updates:
        target.copy_(value)


class Reference:
    """The reference engine, a `lucid.engine.protocol.Engine`: it computes everything before it writes anything."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.first_set = 0  # of this engine's rows in the table of scalars; each row has its own set
        self._updates: list[Update] = []
        self._observed: list[tuple[int, Seen]] = []

    def bind(self, row: Row) -> None:
        self.rows.append(row)

    def measure(self, scale: float, kinds: array[int] | None) -> list[int]:
        return measure(self.rows, scale, kinds)

    def prepare(self, order: StepOrder) -> None:
        if not self.rows:  # then a device may decide, without a table
            return
        assert order.table is not None
        scalars = [scalars_in(order.table, self.first_set + number) for number in range(len(self.rows))]
        self._updates, observed = compute(self.rows, scalars, observe=order.observe)
        self._observed = list(observed)

    def write(self) -> list[tuple[int, Seen]]:
        commit(self._updates)
        return self._observed

    def release(self) -> None:
        self.rows, self._updates, self._observed = [], [], []


class Rows:
    """Replaces the rows of the CPU engine if that is missing or not wanted. All its rows count as changed."""

    sealed = False

    def __init__(self, groups: list[list[Tensor]]) -> None:
        self._ids = [id(param) for group in groups for param in group]
        self.written = False

    def gather(self, groups: list[list[Tensor]], state_box: list[Any]) -> list[int] | None:
        self.release()
        params = [param for group in groups for param in group]
        if [id(param) for param in params] != self._ids:
            return None
        return [index for index, param in enumerate(params) if param.grad is not None]

    def bind(self, *row: Any) -> str | None:
        return cpu_missing

    def compare(self) -> None:
        pass

    def steps(self) -> list[tuple[int, float]]:
        return []

    def measure(self, threads: int, scale: float, kinds: array[int] | None) -> list[int]:
        return exact_sum.blank(kinds)

    def before_writing(self, state: dict[Any, Any]) -> list[Tensor]:
        return []

    def update(self, table: Any, threads: int, observe: bool, count: bool, state_box: list[Any]) -> None:
        self.written = True

    def observed(self) -> list[tuple[int, Seen]]:
        return []

    def step_counts(self) -> list[tuple[int, Tensor]]:
        return []

    def release(self) -> None:
        self.written = False
