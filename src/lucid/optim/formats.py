"""State formats: what the optimizer keeps for a parameter, under which keys and in which dtypes."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STEP = "step"
MAX_STEP = 2**24  # where float32 stops counting; every count of ours is below it


@dataclass(frozen=True, slots=True)
class StateFormat:
    """One way to keep the moments.

    ``slots`` names the tensors of the parameter's shape, in the order in which the engines take them; ``dtypes``
    gives, for each dtype of parameter that the format knows, the dtype of its slots.
    """

    name: str
    slots: tuple[str, ...]
    amsgrad_slot: str
    dtypes: Mapping[torch.dtype, torch.dtype]

    def keys(self, amsgrad: bool) -> tuple[str, ...]:
        """Return the names of the slots of a parameter."""
        return (*self.slots, self.amsgrad_slot) if amsgrad else self.slots

    def check_param(self, param: Tensor, name: str) -> None:
        """Raise unless the format knows parameters of this dtype."""
        if param.dtype not in self.dtypes:
            known = ", ".join(str(dtype) for dtype in self.dtypes)
            raise TypeError(
                f"{name} has dtype {param.dtype}, expected one of {known}; this version keeps no master weights, "
                "without which 16-bit parameters stop learning: train in float32, under torch.autocast for speed"
            )

    def new_slot(self, param: Tensor) -> Tensor:
        """Return zeros of the parameter's shape, order of dimensions in memory, and device."""
        with torch.inference_mode(False):  # tensors made in that mode could not be updated outside of it
            slot = torch.empty_like(param, dtype=self.dtypes[param.dtype], requires_grad=False)
        if (
            type(slot) is Tensor and slot.device.type == "cpu"
        ):  # torch's own zeroing is parallel, which hangs a forked child
            ctypes.memset(slot.data_ptr(), 0, slot.nbytes)
            return slot
        return slot.zero_()

    def complete(self, param: Tensor, entry: Mapping[str, Any], amsgrad: bool, name: str) -> dict[str, Tensor]:
        """Return what `entry`, a parameter's state so far, lacks; raise where what it has does not fit.

        A parameter without state gets all of it. The maximum of amsgrad may come later: it starts from zero.
        """
        if not entry:
            return {STEP: new_step()} | {key: self.new_slot(param) for key in self.keys(amsgrad)}
        missing: dict[str, Tensor] = {}
        step = checked_step(entry.get(STEP), name)
        if step is not entry.get(STEP):
            missing[STEP] = step
        for key in self.keys(amsgrad):
            value = entry.get(key)
            if value is None and key == self.amsgrad_slot:
                missing[key] = self.new_slot(param)
            else:
                tensor = checked_slot(value, param, key, name)
                if tensor.dtype != self.dtypes[param.dtype] or tensor.device != param.device:
                    raise ValueError(
                        f"state {key!r} of {name} is {tensor.dtype} on {tensor.device}, expected "
                        f"{self.dtypes[param.dtype]} on {param.device}; load it with load_state_dict, which converts"
                    )
        return missing

    def converted(self, param: Tensor, entry: Mapping[str, Any], name: str) -> dict[str, Tensor]:
        """Return a copy of the slots of a saved `entry` in this format, sharing no memory with it."""
        own = {STEP: checked_step(entry.get(STEP), name).clone()}
        for key in self.keys(self.amsgrad_slot in entry):
            own[key] = self.new_slot(param).copy_(checked_slot(entry.get(key), param, key, name).detach())
        return own


def new_step() -> Tensor:
    """Return the step count of a parameter that has taken no step."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=torch.float32, device="cpu")


def checked_step(value: Any, name: str) -> Tensor:
    """Return a step count as 0-dim float32 on the CPU, `value` itself where it is so already."""
    if not isinstance(value, Tensor | int | float) or (
        isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex())
    ):
        raise ValueError(f"state 'step' of {name}: expected one number, got {value!r}")
    try:
        count = float(value.detach() if isinstance(value, Tensor) else value)
    except OverflowError:
        count = math.inf
    if not (0 <= count < MAX_STEP and count.is_integer()):
        raise ValueError(
            f"state 'step' of {name}: expected a whole number from 0 to {MAX_STEP - 1} (float32 counts no "
            f"further), got {count}"
        )
    if (
        isinstance(value, Tensor)
        and type(value) is Tensor
        and value.dtype == torch.float32
        and value.dim() == 0
        and value.device.type == "cpu"
        and not value.requires_grad
    ):
        return value
    return new_step().fill_(count)


def checked_slot(value: Any, param: Tensor, key: str, name: str) -> Tensor:
    """Return `value`, or raise unless it is a dense tensor of numbers of the parameter's shape and kind."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"state {key!r} of {name}: expected a tensor of shape {tuple(param.shape)}, got "
            f"{'nothing' if value is None else repr(value)}"
        )
    if value.shape != param.shape:
        raise ValueError(
            f"state {key!r} of {name} has shape {tuple(value.shape)}, expected {tuple(param.shape)} like the parameter"
        )
    if value.device.type == "meta":
        raise ValueError(f"state {key!r} of {name} is on the meta device and has no values; load the checkpoint anew")
    if value.layout is not torch.strided or not (
        value.is_complex() if param.is_complex() else value.is_floating_point()
    ):
        raise ValueError(
            f"state {key!r} of {name} is {value.dtype} with layout {value.layout}, expected dense "
            f"{'complex' if param.is_complex() else 'floating-point'} numbers"
        )
    return value


FP32 = StateFormat(
    name="fp32",
    slots=("exp_avg", "exp_avg_sq"),
    amsgrad_slot="max_exp_avg_sq",
    dtypes={
        torch.float32: torch.float32,
        torch.float64: torch.float64,
        torch.complex64: torch.complex64,
        torch.complex128: torch.complex128,
    },
)
