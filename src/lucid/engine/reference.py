"""The reference engine: the numerics contract in plain torch operations, on any device.

It defines what every other engine computes. `adamw` reads line by line as ``csrc/adamw.h`` does; each operation
rounds once. Not every operation of torch may be used: its CPU square root is not correctly rounded, and
``addcmul``, ``lerp`` and ``alpha=`` may fuse two roundings into one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .row import Row
from .scalars import Scalars

Update = tuple[Tensor, Tensor]


def adamw(
    h: Scalars, theta: Tensor, g: Tensor, m: Tensor, v: Tensor, w: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the next θ, m, v and w of real tensors of one shape, all in the compute type of `theta`.

    w, the maximum of past v, is None without amsgrad.
    """
    g = -g if h.maximize else g
    m = _mean(m, g, h.beta1, h.one_minus_beta1)
    v = _mean(v, g * g, h.beta2, h.one_minus_beta2)
    if w is not None:
        w = torch.where((v > w) | v.isnan(), v, w)
    root = _square_root(v if w is None else w)
    theta = theta - (h.d * theta + (h.k * m) / (root * h.s + h.e))
    return theta, m, v, w


def _mean(a: Tensor, x: Tensor, beta: float, one_minus_beta: float) -> Tensor:
    return a + one_minus_beta * (x - a) if beta >= 0.5 else x + beta * (a - x)


def _square_root(x: Tensor) -> Tensor:
    """The correctly rounded square root."""
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    if x.device.type == "cpu":
        with np.errstate(invalid="ignore"):
            return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))
    return x.sqrt()


@torch.no_grad()
def compute(rows: Sequence[Row], scalars: Sequence[Scalars]) -> list[Update]:
    """Return what to copy where. Nothing is written yet: to allocate may fail."""
    updates: list[Update] = []
    latest: dict[
        tuple[object, ...], Tensor
    ] = {}  # of parameters on the same memory: the second moves on from the first
    for row, h in zip(rows, scalars, strict=True):
        param = row.param.detach()
        theta, g, m, v, *w = (
            torch.view_as_real(x) if x.is_complex() else x
            for x in (param, row.gradient.to(param.dtype), *row.slots.values())
        )
        place = (param.device, param.data_ptr(), param.shape, param.stride())
        new = adamw(h, latest.get(place, theta), g, m, v, w[0] if w else None)
        latest[place] = new[0]
        targets = (theta, m, v, *w)
        updates += [(old, value) for old, value in zip(targets, new, strict=False) if value is not None]
        updates.append((row.step, row.step + 1))
    return updates


@torch.no_grad()
def commit(updates: Sequence[Update]) -> None:
    """Copy; doing it again changes nothing."""
    for target, value in updates:
        target.copy_(value)
