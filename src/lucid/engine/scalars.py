"""The scalars of one step, made by one function for every engine."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

MAX_STEP = 2**24  # where float32 stops counting; every count of ours is below it


class Scalars(NamedTuple):
    """What the AdamW rule needs beside its tensors, in float64; an engine rounds each once to its compute type.

    ``d`` = αλ, ``k`` = α / (1 − β1^t), ``s`` = 1 / √(1 − β2^t), ``e`` = ε, ``f`` what gradients are multiplied with.
    """

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    d: float
    k: float
    s: float
    e: float
    f: float

    @classmethod
    def of(
        cls,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool,
        step: float,
        factor: float = 1.0,
    ) -> Scalars:
        """Return the scalars of step number `step`, counted from 1; `factor` clips and unscales the gradients."""
        return cls(
            beta1=beta1,
            one_minus_beta1=1.0 - beta1,
            beta2=beta2,
            one_minus_beta2=1.0 - beta2,
            d=lr * weight_decay,
            k=lr / one_minus_power(beta1, step),
            s=1.0 / math.sqrt(one_minus_power(beta2, step)),
            e=eps,
            f=-factor if maximize else factor,
        )


class Recipe(NamedTuple):
    """What one set of scalars is made of. ``lr`` may be a number on the device, ``group`` says whose set it is."""

    group: int
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    step: float

    def scalars(self, factor: float) -> Scalars:
        """Return the scalars; `factor` clips and unscales the gradients."""
        assert not isinstance(self.lr, Tensor)
        return Scalars.of(
            lr=self.lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            maximize=self.maximize,
            step=self.step,
            factor=factor,
        )


class Decision(NamedTuple):
    """What a step leaves to the device that updates all of its rows, so that nothing waits for it.

    ``scale``: what gradients were multiplied with, a number or 0-dim there; ``found_inf``: 0-dim there, not 0 to leave
    the step out; ``max_norm``: the bound of their norm; ``skips``: whether a step is left out whose gradients are not
    finite; ``captured``: whether this step is to be run again and again, and counted then.
    """

    scale: Tensor | float
    found_inf: Tensor | None
    max_norm: float | None
    skips: bool
    captured: bool

    @property
    def measures(self) -> bool:
        """Whether it depends on the gradients."""
        return self.max_norm is not None or self.skips


def powers(beta: float, steps: int) -> list[float]:
    """Return 1 − β^t for t = 0, 1, … up to the first that is 1, or to one step less than `steps`."""
    found = [0.0]
    while found[-1] != 1.0 and len(found) < steps:
        found.append(one_minus_power(beta, len(found)))
    return found


def one_minus_power(beta: float, step: float) -> float:
    """Return 1 − β^t without the cancellation that the difference itself has for β near 1."""
    return 1.0 if beta == 0.0 else -math.expm1(step * math.log(beta))
