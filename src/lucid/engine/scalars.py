"""The scalars of one step. One function makes them for every engine."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .numbers import SET, Scalar

MAX_STEP = 2**24  # float32 cannot count beyond this; every step count is below it


class Scalars(NamedTuple):
    """The numbers that the AdamW rule needs, in float64; an engine rounds each once to its compute type.

    ``d`` = αλ, ``k`` = α / (1 − β1^t), ``s`` = 1 / √(1 − β2^t), ``e`` = ε, ``f`` = the factor for the gradients
    (clipping, unscaling, direction). ``cautious``: not 0 if the decay applies only where it agrees with the update.
    ``ema``, ``one_minus_ema`` = γ, 1 − γ of the average of the weights.
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
    cautious: float
    ema: float
    one_minus_ema: float

    @classmethod
    def of(
        cls,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool,
        step: float,
        reference_lr: float = 0.0,
        cautious_decay: bool = False,
        ema_decay: float = 0.0,
        factor: float = 1.0,
    ) -> Scalars:
        """Return the scalars of step `step`, counted from 1; `factor` clips and unscales the gradients.

        `reference_lr`: if it is not 0, the decay is λ·(α / `reference_lr`) and not αλ.
        """
        d = weight_decay * (lr / reference_lr) if reference_lr else lr * weight_decay
        k = lr / one_minus_power(beta1, step)
        s = 1.0 / math.sqrt(one_minus_power(beta2, step))
        f = -factor if maximize else factor
        return cls(
            beta1, 1.0 - beta1, beta2, 1.0 - beta2, d, k, s, eps, f, float(cautious_decay), ema_decay, 1.0 - ema_decay
        )


class Recipe(NamedTuple):
    """What one set of scalars is computed from: the hyperparameters of ``group``, and the step count after this step.

    All but the group are the arguments of `Scalars.of`.

    ``lr`` may be a one-element tensor on the device if the device makes the scalars.
    """

    group: int
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    step: float
    reference_lr: float = 0.0
    cautious_decay: bool = False
    ema_decay: float = 0.0


ScalarTable = array  # float64[1 + recipes, SET]: the first row belongs to the device, then one set for each recipe

_BYTES = 8 * SET
_USED = struct.Struct(f"{len(Scalar)}d")  # the words of a set that are used: the scalars and the step count


def table(recipes: Sequence[Recipe], factor: float) -> ScalarTable[float]:
    """Return the scalars of all recipes in the form that every engine reads; `factor` clips and unscales gradients."""
    words = array("d", bytes(_BYTES * (1 + len(recipes))))
    for number, recipe in enumerate(recipes, 1):
        scalars = Scalars.of(*recipe[1:], factor)  # type: ignore[arg-type]  # lr is a number, as the host makes them
        _USED.pack_into(words, _BYTES * number, *scalars, recipe.step)
    return words


def table_of(scalars: Scalars) -> ScalarTable[float]:
    """Return a table with one set, whose step count is 0, for an engine that does not read it."""
    words = array("d", bytes(2 * _BYTES))
    _USED.pack_into(words, _BYTES, *scalars, 0.0)
    return words


def scalars_in(scalars: ScalarTable[float], number: int) -> Scalars:
    """Return set `number` of a table."""
    begin = (1 + number) * SET
    return Scalars(*scalars[begin : begin + Scalar.COUNT])


def powers(beta: float, steps: int) -> list[float]:
    """Return 1 − β^t for t = 0, 1, … up to the first value that is 1, but at most for `steps` values of t."""
    found = [0.0]
    while found[-1] != 1.0 and len(found) < steps:
        found.append(one_minus_power(beta, len(found)))
    return found


def one_minus_power(beta: float, step: float) -> float:
    """Return 1 − β^t, without the cancellation that the plain difference has for β near 1."""
    return 1.0 if beta == 0.0 else -math.expm1(step * math.log(beta))
