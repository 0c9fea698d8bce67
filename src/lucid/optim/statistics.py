"""What a step was like, as numbers by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from lucid import engine

if TYPE_CHECKING:
    from .optimizer import Optimizer


class _Sums(NamedTuple):
    """Of one parameter or several."""

    elements: int
    gradient: float  # sums of squares; the gradient's before clipping
    update: float
    param: float
    ratio: float
    step: float
    skipped: int

    def named(self, name: str) -> dict[str, float]:
        update, param = (
            math.sqrt(square / self.elements) if self.elements else 0.0 for square in (self.update, self.param)
        )
        values = {
            "grad_norm": math.sqrt(self.gradient),
            "update_rms": update,
            "param_rms": param,
            "update_ratio": update / param if param else math.inf if update else 0.0,
            "max_m_over_sqrt_v": self.ratio,
            "step": self.step,
            "skipped_steps": self.skipped,
        }
        return {f"{name}/{measure}": value for measure, value in values.items()}


def _together(each: Iterable[_Sums]) -> _Sums:
    columns = list(zip(*each, strict=True))
    elements, gradient, update, param, ratio, step, skipped = columns
    return _Sums(
        sum(elements),
        math.fsum(gradient),
        math.fsum(update),
        math.fsum(param),
        max(ratio, key=lambda value: (math.isnan(value), value)),
        max(step),
        max(skipped),
    )


def summed_up(optimizer: Optimizer, seen: Mapping[tuple[int, int], tuple[engine.Observed, float]]) -> dict[str, float]:
    """Return the statistics of what was `seen` of parameters, by (group, index), with the factor that clipped them."""
    state = optimizer._state_box[0]
    numbers: dict[str, float] = {}
    groups: list[_Sums] = []
    for position, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or ()
        own: list[_Sums] = []
        for index, param in enumerate(group["params"]):
            if (position, index) not in seen:
                continue
            observed, clip = seen[position, index]
            own.append(
                _Sums(
                    param.numel(),
                    observed.gradient / clip**2 if clip else math.nan,
                    observed.update,
                    observed.param,
                    observed.ratio,
                    float(state[param]["step"]) if param in state else 0.0,
                    optimizer._skipped_steps + optimizer._skipped_alone.get(param, 0),
                )
            )
            if index < len(names):
                numbers |= own[-1].named(names[index])
        if own:
            groups.append(_together(own))
            numbers |= groups[-1].named(f"group{position}")
    whole = {
        "grad_norm": math.sqrt(math.fsum(each.gradient for each in groups)),
        "skipped_steps": optimizer.skipped_steps,
    }
    return whole | numbers
