"""The verdict on a step: the host's decision, or what the device needs to decide itself."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .spikes import Judged


class HostVerdict(NamedTuple):
    """The decision of the host.

    ``factor``: the factor for the gradients, which clips and unscales them. ``norm``: the gradient norm, unscaled and
    before clipping, or None if it was not measured. ``scale``: GradScaler's scale of the gradients, 1 without it.
    ``skip``: whether the step is skipped. ``spike``: the verdict on the norm if there is a threshold for spikes.
    """

    factor: float
    norm: float | None
    scale: float
    skip: bool
    spike: Judged | None = None


UNJUDGED = HostVerdict(1.0, None, 1.0, False)  # nothing is measured, clipped, unscaled or skipped


class DeviceVerdict(NamedTuple):
    """What the device needs to decide by the same rule, so that the host does not wait for it.

    ``scale``: GradScaler's scale of the gradients, a number or a one-element tensor on the device. ``found_inf``: a
    one-element tensor on the device, not 0 if the step must be skipped, or None. ``max_norm``: the bound of the
    gradient norm, or None. ``skips``: whether a non-finite gradient skips the step. ``captured``: whether the step is
    captured in a CUDA graph; each replay then counts as a step. ``exchange``: adds up the words of
    `lucid.engine.exact_sum` of all processes, or None if this process decides alone. ``kinds``: of each row, in how
    many ways rows are sharded over processes, or None if there is only one way; each kind has words of its own.
    ``spike_threshold``: for the gradient norm, or None. ``memory``: the host's memory of norms (`lucid.engine.spikes`).
    """

    scale: Tensor | float
    found_inf: Tensor | None
    max_norm: float | None
    skips: bool
    captured: bool
    exchange: Callable[[Tensor], Tensor] | None
    kinds: array[int] | None
    spike_threshold: float | None = None
    memory: list[Any] | None = None

    @property
    def measures(self) -> bool:
        """Whether the decision depends on the gradients."""
        return self.max_norm is not None or self.skips or self.spike_threshold is not None

    @property
    def settles(self) -> bool:
        """Whether it depends on the words of `lucid.engine.exact_sum`: on the gradients, or on other processes."""
        return self.measures or self.exchange is not None


Verdict = HostVerdict | DeviceVerdict
