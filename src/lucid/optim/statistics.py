"""The statistics of a step: numbers by name, from what its engines have observed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lucid import engine

from .agreement import Whole
from .groups import ParamGroup
from .members import members


class _Sums(NamedTuple):
    """The sums of one parameter, or of several together."""

    elements: int
    gradient: float  # this and the next two: sums of squares
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


class Observations:
    """The last observation of each parameter, and the scale that the gradients had then (GradScaler's)."""

    def __init__(self) -> None:
        self.seen: dict[Tensor, engine.Seen] = {}
        self._scale = 1.0
        self._scale_there: Tensor | None = None  # if a device decided the last step; 0 before it took its first

    def add(self, seen: dict[Tensor, engine.Seen], scale: float | Tensor | None) -> None:
        """Add the observations of a step. They replace the earlier ones; if `scale` is None (in backward), only those
        of the same parameters.
        """
        if scale is None:
            self.seen |= seen
        elif seen:
            self.seen = seen
            if isinstance(scale, Tensor):
                self._scale_there = scale
            else:
                self._scale, self._scale_there = scale, None

    def clear(self) -> None:
        """Drop all observations."""
        self.seen, self._scale, self._scale_there = {}, 1.0, None

    @property
    def scale(self) -> float:
        """GradScaler's scale of the gradients in the last step; if it is on a device, waits for that."""
        there = 0.0 if self._scale_there is None else float(self._scale_there)
        return there or self._scale


def summed_up(
    groups: Sequence[ParamGroup],
    state: Mapping[Any, Any],
    observations: Observations,
    skipped_total: int,
    skipped_spikes: int,
    skipped_of: Callable[[Tensor], int],
) -> dict[str, float]:
    """Return the statistics of the observed parameters in `groups`.

    ``skipped_total``: the skipped steps of this process; ``skipped_spikes``: those with a spike; ``skipped_of``: those
    of one parameter.
    """
    numbers: dict[str, float] = {}
    sums_of: dict[int, list[_Sums]] = {}
    skipped_more = 0
    scale = observations.scale
    for member in members(groups):
        observed = observations.seen.get(member.param)
        if observed is None:
            continue
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
            skipped_of(member.param) + int(observed.skipped_more),
        )
        sums_of.setdefault(member.group, []).append(sums)
        if member.given_name is not None:
            numbers |= sums.named(member.given_name, scale)
    together = {number: _together(each) for number, each in sums_of.items()}
    for number, sums in together.items():
        numbers |= sums.named(f"group{number}", scale)
    whole = {
        "grad_norm": math.sqrt(sum(sums.gradient for sums in together.values())) / scale,
        "skipped_steps": skipped_total + skipped_more,
        "skipped_spikes": skipped_spikes,
    }
    return whole | numbers
