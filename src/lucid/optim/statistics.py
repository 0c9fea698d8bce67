"""What a step was like, as numbers by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from lucid import engine

from .agreement import Whole
from .part import members_of

if TYPE_CHECKING:
    from .optimizer import Optimizer


class _Sums(NamedTuple):
    """Of one parameter or several."""

    elements: int
    gradient: float  # sums of squares
    update: float
    param: float
    ratio: float
    step: float
    skipped: int

    def named(self, name: str, scale: float) -> dict[str, float]:
        update, param = (
            math.sqrt(square / self.elements) if self.elements else 0.0 for square in (self.update, self.param)
        )
        values = {
            "grad_norm": math.sqrt(self.gradient) / scale,
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
        sum(gradient),
        sum(update),
        sum(param),
        max(ratio, key=lambda value: (math.isnan(value), value)),
        max(step),
        max(skipped),
    )


def summed_up(optimizer: Optimizer, seen: Mapping[Tensor, engine.Seen], scale: float) -> dict[str, float]:
    """Return the statistics of what was `seen` of parameters, whose gradients came `scale` times too large."""
    state = optimizer._state_box[0]
    numbers: dict[str, float] = {}
    groups: dict[int, list[_Sums]] = {}
    skipped_more = 0
    for member in members_of(optimizer.param_groups):
        if member.param not in seen:
            continue
        observed = seen[member.param]
        if not isinstance(observed, Whole):
            gradient, update, param, ratio = observed
            step = float(state.get(member.param, {}).get("step", 0.0))
            observed = Whole(gradient, update, param, member.param.numel(), ratio, step, 0)
        skipped_more = max(skipped_more, int(observed.skipped_more))
        sums = _Sums(
            int(observed.elements),
            observed.gradient,
            observed.update,
            observed.param,
            observed.ratio,
            observed.step,
            optimizer._skipped_steps + optimizer._skipped_alone.get(member.param, 0) + int(observed.skipped_more),
        )
        groups.setdefault(member.group, []).append(sums)
        if (name := optimizer.param_groups[member.group].name_of(member.place)) is not None:
            numbers |= sums.named(name, scale)
    together = {number: _together(each) for number, each in groups.items()}
    for number, sums in together.items():
        numbers |= sums.named(f"group{number}", scale)
    whole = {
        "grad_norm": math.sqrt(sum(sums.gradient for sums in together.values())) / scale,
        "skipped_steps": optimizer.skipped_steps + skipped_more,
    }
    return whole | numbers
