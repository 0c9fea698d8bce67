"""What a step makes of its gradients before it uses them: unscaled, clipped by their global norm, checked."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lucid import engine

from .values import as_float, number_in, shown

NonFinite = Literal["propagate", "skip", "error"]
NON_FINITE: tuple[NonFinite, ...] = ("propagate", "skip", "error")

# |g| from which on g² overflows, in the two types that steps compute in.
LIMITS = {torch.float32: 2.0**64, torch.float64: 2.0**512}


class Judged(NamedTuple):
    """What becomes of a step: ``norm`` of the gradients if it was measured, unscaled and unclipped."""

    norm: float | None
    factor: float
    skip: bool


def checked_max_norm(value: Any) -> float | None:
    """Return `value` as a number or None; raise where it is no bound of a norm."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"max_grad_norm: expected None or a number, got {shown(value)}")
    bound = as_float(value)
    if not bound > 0:
        raise ValueError(
            f"max_grad_norm: expected None, a number above 0, or infinity to measure the norm only, got {shown(value)}"
        )
    return bound


def scale_of(value: Any) -> float:
    """Return the scale that the gradients carry: `grad_scale` as GradScaler sets it, 1 for None."""
    scale = 1.0 if value is None else _single("grad_scale", value)
    if not 0 < scale < math.inf:
        raise ValueError(f"grad_scale: expected a finite number above 0, got {shown(value)}")
    return scale


def found_inf_in(value: Any) -> bool:
    """Whether GradScaler's check, `found_inf` as it sets it, says that this step must not be taken."""
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        value = value.int()
    return value is not None and _single("found_inf", value) != 0


def _single(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and (number := number_in(value)) is not None:
        return number
    if isinstance(value, numbers.Real):
        return as_float(value)
    raise TypeError(f"{name}: expected None or one number, as torch.amp.GradScaler sets it, got {shown(value)}")


def clip_factor(norm: float, max_norm: float | None) -> float:
    """Return what gradients of this norm are multiplied with, as in ``torch.nn.utils.clip_grad_norm_``.

    Never above 1; NaN where the norm is.
    """
    if max_norm is None or max_norm == math.inf or norm + 1e-6 <= max_norm:
        return 1.0
    return max_norm / (norm + 1e-6)


def fault(gradient: Tensor, square: float, factor: float, dtype: torch.dtype) -> str | None:
    """Return what is wrong with a gradient that no step can use.

    ``square``: the sum of its squares, by which most are known to be right. ``dtype``: its parameter's.
    """
    compute = engine.COMPUTE[dtype].to_real()
    limit = LIMITS[compute]
    if square * factor * factor < limit * limit / 2:
        return None
    reals = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    nan = infinite = large = 0
    for part in torch.split(reals.reshape(-1), 2**20):
        entries = part.to(compute)
        nan += int(entries.isnan().sum())
        infinite += int(entries.isinf().sum())
        large += int(((entries * factor).abs() >= limit).logical_and(entries.isfinite()).sum())
    found = {"NaN": nan, "infinite": infinite, "too large to be squared": large}
    which = ", ".join(f"{count} {what}" for what, count in found.items() if count)
    return f"{which} of {reals.numel()} entries" if which else None
