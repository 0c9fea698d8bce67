"""The options that belong to the optimizer and not to a group, in one object.

A wrapper that copies an optimizer's attributes, as Lightning's does, shares this object. So an option that is set on
one of the two holds for both.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from lucid.engine.formats import STATE_DEVICES, StateDevice
from lucid.engine.values import as_float, one_of, shown

from .agreement import checked_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NonFinite = Literal["propagate", "skip", "error"]
NON_FINITE: tuple[NonFinite, ...] = ("propagate", "skip", "error")


class Settings:
    """The settings of an optimizer; `AdamW` describes them.

    ``observing``: whether steps measure what `Optimizer.statistics` returns. ``amp_scaling``: whether the step unscales
    the gradients instead of GradScaler, None for the default. ``state_device``: where the state is, None for the
    parameter's device.
    """

    def __init__(
        self,
        max_grad_norm: float | None = None,
        nonfinite: NonFinite = "propagate",
        shard_group: ProcessGroup | None = None,
        state_device: StateDevice | None = None,
        spike_threshold: float | None = None,
    ) -> None:
        self.state_device = None if state_device is None else one_of("state_device", state_device, STATE_DEVICES)
        self.shard_group = checked_group(shard_group)
        self.max_grad_norm = checked_max_norm(max_grad_norm)
        self.nonfinite: NonFinite = one_of("nonfinite", nonfinite, NON_FINITE)
        self.spike_threshold = checked_threshold(spike_threshold)
        self.observing = False
        self.amp_scaling: bool | None = None

    @property
    def judges(self) -> bool:
        """Whether the gradients decide if a step is taken or clipped."""
        return self.max_grad_norm is not None or self.nonfinite != "propagate" or self.spike_threshold is not None

    def saved(self) -> dict[str, Any]:
        """Return the settings that a copy or a pickle of the optimizer contains."""
        return {f"_{name}": getattr(self, name) for name in _SAVED}

    @staticmethod
    def has_saved(key: str) -> bool:
        """Whether `saved` returns this key."""
        return key[:1] == "_" and key[1:] in _SAVED

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Set what `saved` returned; settings that it lacks keep their values."""
        for name in _SAVED:
            setattr(self, name, saved.get(f"_{name}", getattr(self, name)))


_SAVED = ("max_grad_norm", "nonfinite", "spike_threshold", "observing", "amp_scaling", "state_device")


def checked_max_norm(value: Any) -> float | None:
    """Return `value` as a float or None; raise unless it is None or a number above 0."""
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


def checked_threshold(value: Any) -> float | None:
    """Return `value` as a float or None; raise unless it is None or a finite number above 0."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"spike_threshold: expected None or a number, got {shown(value)}")
    threshold = as_float(value)
    if not 0 < threshold < math.inf:
        raise ValueError(f"spike_threshold: expected None or a finite number above 0, got {shown(value)}")
    return threshold
