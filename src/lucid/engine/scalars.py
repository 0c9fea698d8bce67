"""The scalars of one step, made by one function for every engine."""

from __future__ import annotations

import math
from typing import NamedTuple


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
            k=lr / _one_minus_power(beta1, step),
            s=1.0 / math.sqrt(_one_minus_power(beta2, step)),
            e=eps,
            f=-factor if maximize else factor,
        )


def _one_minus_power(beta: float, step: float) -> float:
    """1 − β^t without the cancellation that the difference itself has for β near 1."""
    return 1.0 if beta == 0.0 else -math.expm1(step * math.log(beta))
