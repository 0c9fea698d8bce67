"""State formats: what the optimizer keeps for a parameter, under which keys, in which dtypes and shapes."""

from __future__ import annotations

import copy
import ctypes
import functools
import hashlib
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lucid import engine
from lucid.engine import codecs, shards
from lucid.engine.scalars import MAX_STEP

from .values import as_float, number_in, plain, shown

STEP = "step"
STREAM = "stream"

StateFormatName = Literal["fp32", "bf16", "8bit"]
NAMES: tuple[StateFormatName, ...] = ("fp32", "bf16", "8bit")

# What tells a parameter's draws from another's: the seed, and its name, or its number over all groups.
KnownAs = tuple[int, str | int]

# What 8-bit moments are for: weights large enough to gain from them, rows long enough to share a scale. By the
# parameter's whole shape, never a shard's.
_LEAST_ELEMENTS = 4096
_LEAST_ROW = 64

_MASTER = {torch.bfloat16: ("residual", torch.bfloat16), torch.float16: ("master", torch.float32)}
_AMSGRAD = "max_exp_avg_sq"


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a parameter's state: its dtype, and whether it has the parameter's shape, one number for each
    block of 128 elements of a row, or is one number.
    """

    dtype: torch.dtype
    shape: Literal["param", "blocks", "one"] = "param"

    def shape_for(self, param: Tensor) -> tuple[int, ...]:
        """Return the shape of this slot of `param`."""
        if self.shape == "one":
            return ()
        return tuple(param.shape) if self.shape == "param" else (param.shape[0], codecs.blocks(param.shape))

    def new(self, param: Tensor, device: torch.device, *, contiguous: bool) -> Tensor:
        """Return zeros on `device`, in the parameter's order of dimensions in memory unless `contiguous`."""
        part = shards.local(param)
        with torch.inference_mode(False), torch.no_grad():  # what is made in that mode could not be updated outside
            if self.shape == "param" and not contiguous:
                slot = torch.empty_like(part, dtype=self.dtype, device=device, requires_grad=False)
            else:
                slot = torch.empty(self.shape_for(part), dtype=self.dtype, device=device)
            if slot.device.type == "cpu":  # torch's own zeroing is parallel, which hangs a forked child
                ctypes.memset(slot.data_ptr(), 0, slot.nbytes)
            else:
                slot.zero_()
            return shards.spread_like(param, slot, self.shape_for(param))

    def check(self, value: Any, param: Tensor, key: str, name: str) -> Tensor:
        """Return `value`, or raise unless it is a dense tensor of this slot's shape and kind of number."""
        expected = self.shape_for(param)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state {key!r} of {name}: expected a tensor of shape {expected}, got "
                f"{'nothing' if value is None else repr(value)}"
            )
        if tuple(value.shape) != expected:
            like = " like the parameter" if self.shape == "param" else ""
            raise ValueError(f"state {key!r} of {name} has shape {tuple(value.shape)}, expected {expected}{like}")
        if value.device.type == "meta":
            raise ValueError(
                f"state {key!r} of {name} is on the meta device and has no values; load the checkpoint anew"
            )
        if value.layout is not torch.strided or not self._is_alike(value):
            kind = "complex" if self.dtype.is_complex else "floating-point"
            wanted = f"{kind} numbers" if self.dtype.is_floating_point or self.dtype.is_complex else f"{self.dtype}"
            raise ValueError(
                f"state {key!r} of {name} is {value.dtype} with layout {value.layout}, expected dense {wanted}"
            )
        return value

    def part_of(self, value: Any, param: Tensor, key: str, name: str) -> Tensor:
        """Return what this process is to hold of a checked `value`."""
        return shards.part_of(self.check(value, param, key, name).detach(), param, f"state {key!r} of {name}")

    def _is_alike(self, value: Tensor) -> bool:
        if self.dtype.is_complex:
            return value.is_complex()
        return value.is_floating_point() if self.dtype.is_floating_point else value.dtype == self.dtype


_CODES = {
    "exp_avg_code": Slot(torch.uint8),
    "exp_avg_scale": Slot(torch.float32, "blocks"),
    "exp_avg_sq_code": Slot(torch.uint8),
    "exp_avg_sq_scale": Slot(torch.float32, "blocks"),
}
_STREAM = {STREAM: Slot(torch.int64, "one")}


def _moments(dtype: torch.dtype) -> dict[str, Slot]:
    return {"exp_avg": Slot(dtype), "exp_avg_sq": Slot(dtype)}


_LATER = {_AMSGRAD, *(key for key, _ in _MASTER.values())}  # may be missing at first
_MOST_CERTAIN = 256  # step count in 16 bits
# Every key that some format knows: what a conversion replaces.
_KEYS = {STEP, STREAM, *_CODES, *_moments(torch.float32), *_LATER}


@dataclass(frozen=True, slots=True)
class StateFormat:
    """What is kept for one kind of parameter.

    ``moments``: how the two moments are stored. ``slots``: every tensor but the step count and amsgrad's maximum.
    ``device``: where they lie if that is not where the parameter does.
    """

    moments: StateFormatName
    slots: Mapping[str, Slot]
    amsgrad_slot: Slot
    device: torch.device | None = None

    def device_for(self, param: Tensor) -> torch.device:
        """Return where the state of `param` lies."""
        return shards.local(param).device if self.device is None else self.device

    def slots_with(self, amsgrad: bool) -> dict[str, Slot]:
        """Return the slots of a parameter, in the order in which they are made."""
        return {**self.slots, _AMSGRAD: self.amsgrad_slot} if amsgrad else dict(self.slots)

    def complete(
        self, param: Tensor, entry: Mapping[str, Any], amsgrad: bool, name: str, known_as: KnownAs
    ) -> dict[str, Tensor]:
        """Return what `entry`, a parameter's state so far, lacks; raise where what it has does not fit.

        A parameter without state gets all of it. The maximum of amsgrad may come later: it starts from zero; so may
        what a parameter lacks of its master value, when a model becomes a 16-bit one: then the parameter counts alone.
        """
        slots = self.slots_with(amsgrad)
        if not entry:
            return {STEP: new_step()} | {key: self._new(key, slot, param, known_as) for key, slot in slots.items()}
        missing: dict[str, Tensor] = {}
        step = checked_step(entry.get(STEP), name)
        if step is not entry.get(STEP):
            missing[STEP] = step
        for key, slot in slots.items():
            value = entry.get(key)
            if value is None and key in _LATER:
                missing[key] = self._new(key, slot, param, known_as)
                continue
            if value is None and (others := sorted(_KEYS & entry.keys() - slots.keys() - _LATER - {STEP})):
                raise ValueError(
                    f"state of {name} is in another format: it has {', '.join(others)} and lacks {key}; set "
                    "state_format and master_weights before the first step, or load_state_dict, which converts"
                )
            tensor = slot.check(value, param, key, name)
            device = param.device if self.device is None else self.device
            if tensor.dtype != slot.dtype or (tensor.device != device and key != STREAM):
                raise ValueError(
                    f"state {key!r} of {name} is {tensor.dtype} on {tensor.device}, expected "
                    f"{slot.dtype} on {device}; load it with load_state_dict, which converts"
                )
            if key != STREAM and not shards.alike(tensor, param):
                raise ValueError(
                    f"state {key!r} of {name} is not spread over processes as the parameter is; load it with "
                    "load_state_dict, or anew after the model was wrapped"
                )
            if key in _CODES and not shards.local(tensor).is_contiguous():
                raise ValueError(
                    f"state {key!r} of {name} has strides {tensor.stride()}, expected contiguous codes and scales; "
                    "load it with load_state_dict, which puts them in order"
                )
        return missing

    def converted(self, param: Tensor, entry: Mapping[str, Any], name: str, known_as: KnownAs) -> dict[str, Tensor]:
        """Return a copy of a saved `entry` in this format, rounded to the nearest, sharing no memory with it."""
        own = {STEP: checked_step(entry.get(STEP), name).clone()}
        saved = dict(entry)
        for key, slot in self.slots_with(_AMSGRAD in entry).items():
            own[key] = self._new(key, slot, param, known_as)
        parts = {key: shards.local(tensor) for key, tensor in own.items()}
        if self.moments == "8bit" and "exp_avg_code" in saved:
            for key, slot in _CODES.items():
                parts[key].copy_(slot.part_of(saved.get(key), param, key, name))
        else:
            m, v = _decoded(param, saved, name)
            if self.moments == "8bit":
                m, v = m.to(param.device).float(), v.to(param.device).float() + 0.0  # so that -0 is none
                for key, value in zip(_CODES, (*codecs.encode_signed(m), *codecs.encode_unsigned(v)), strict=True):
                    parts[key].copy_(value)
            elif self.moments == "bf16":
                parts["exp_avg"].copy_(codecs.rounded_to_bfloat16(m.to(param.device).float()))
                parts["exp_avg_sq"].copy_(codecs.rounded_to_bfloat16(v.to(param.device).float(), positive=True))
            else:
                parts["exp_avg"].copy_(m)
                parts["exp_avg_sq"].copy_(v)
        if _AMSGRAD in saved:
            parts[_AMSGRAD].copy_(self.amsgrad_slot.part_of(saved[_AMSGRAD], param, _AMSGRAD, name))
        if STREAM in own and STREAM in saved:
            own[STREAM].copy_(self.slots[STREAM].check(saved[STREAM], param, STREAM, name))
        self._convert_master(parts, saved, param, name)
        return own | {key: copied(value) for key, value in saved.items() if key not in _KEYS}

    def _convert_master(self, parts: dict[str, Tensor], saved: Mapping[str, Any], param: Tensor, name: str) -> None:
        """What the parameter's own bits lack of its master value; without a source the parameter counts alone."""
        residual, master = saved.get("residual"), saved.get("master")
        if "residual" in parts and residual is not None:
            value = Slot(torch.bfloat16).part_of(residual, param, "residual", name)
            if value.dtype != torch.bfloat16:
                raise ValueError(f"state 'residual' of {name} is {value.dtype}, expected torch.bfloat16: it holds bits")
            parts["residual"].view(torch.int16).copy_(value.view(torch.int16))
        elif "residual" in parts and master is not None:
            values = Slot(torch.float32).part_of(master, param, "master", name).to(param.device).float()
            upper, lower = codecs.split(values)
            same = upper.view(torch.int16) == shards.local(param).detach().contiguous().view(torch.int16)
            parts["residual"].view(torch.int16).copy_(torch.where(same, lower.view(torch.int16), 0))
        elif "master" in parts and master is not None:
            parts["master"].copy_(Slot(torch.float32).part_of(master, param, "master", name))

    def _new(self, key: str, slot: Slot, param: Tensor, known_as: KnownAs) -> Tensor:
        if key == STREAM:
            with torch.inference_mode(False):
                return torch.tensor(_stream_of(*known_as), dtype=torch.int64, device="cpu")
        return slot.new(param, self.device_for(param), contiguous=key in _CODES)


def _decoded(param: Tensor, entry: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
    """Both moments of a saved entry as numbers."""
    if "exp_avg_code" in entry and not param.is_complex() and param.dim() > 0:
        cut = shards.cuts_blocks(param)  # then codes and scales are put together first
        values = {
            key: shards.whole(slot.check(entry.get(key), param, key, name).detach())
            if cut
            else slot.part_of(entry.get(key), param, key, name)
            for key, slot in _CODES.items()
        }
        m = codecs.decode_signed(values["exp_avg_code"], values["exp_avg_scale"].float())
        v = codecs.decode_unsigned(values["exp_avg_sq_code"], values["exp_avg_sq_scale"].float())
        return (shards.part_of(m, param, name), shards.part_of(v, param, name)) if cut else (m, v)
    m, v = (
        slot.part_of(entry.get(key), param, key, name) for key, slot in _moments(engine.COMPUTE[param.dtype]).items()
    )
    return m, v


def decoded(param: Tensor, entry: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return a copy of a parameter's state as ``torch.optim.AdamW`` keeps it: float32 moments, no master weights."""
    return _format(param.dtype, "fp32", False).converted(param, entry, name, (0, 0))


def copied(value: Any) -> Any:
    """Return a copy of a tensor or of anything else that was saved."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _stream_of(seed: int, called: str | int) -> int:
    """Return what the draws of a parameter are keyed with: 64 bits of its `KnownAs`."""
    digest = hashlib.blake2b(repr((seed, plain(called))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def format_for(
    param: Tensor,
    state_format: StateFormatName,
    master_weights: bool,
    name: str,
    device: torch.device | None = None,
) -> StateFormat:
    """Return what is kept for `param`, on `device` or with it; raise where its dtype is none that is known."""
    if param.dtype not in engine.COMPUTE:
        known = ", ".join(str(dtype) for dtype in engine.COMPUTE)
        raise TypeError(f"{name} has dtype {param.dtype}, expected one of {known}")
    if state_format == "8bit" and not _is_quantized(param.shape):
        state_format = "fp32"
    kept = _format(param.dtype, state_format, master_weights)
    if device is not None:
        if shards.is_sharded(param):
            raise ValueError(
                f'{name} is spread over processes, for which state_device="cpu" does not work; let FSDP2 keep '
                "parameters and state on the host (CPUOffloadPolicy), or leave state_device away"
            )
        kept = replace(kept, device=device)
    if kept.moments == "8bit":
        shards.check_blocks(param, name)
    if STREAM in kept.slots:
        shards.numbering(param, name)
    return kept


def state_bytes(
    shape: Sequence[int],
    dtype: torch.dtype,
    state_format: StateFormatName,
    *,
    master_weights: bool = True,
    amsgrad: bool = False,
    ranks: int = 1,
) -> int:
    """Return the bytes of a parameter's state; sharded by rows over `ranks` processes, on the one that holds most."""
    whole = torch.empty(tuple(shape), dtype=dtype, device="meta")
    kept = format_for(whole, state_format, master_weights, "a parameter")
    part = whole[: math.ceil(whole.shape[0] / ranks)] if whole.dim() else whole
    slots = kept.slots_with(amsgrad).values()
    return new_step().nbytes + sum(slot.dtype.itemsize * math.prod(slot.shape_for(part)) for slot in slots)


def _is_quantized(shape: torch.Size) -> bool:
    return len(shape) >= 2 and shape.numel() >= _LEAST_ELEMENTS and math.prod(shape[1:]) >= _LEAST_ROW


@functools.cache
def _format(dtype: torch.dtype, state_format: StateFormatName, master_weights: bool) -> StateFormat:
    compute = engine.COMPUTE[dtype]
    if compute is not torch.float32:
        state_format = "fp32"  # who trains in float64 or complex numbers wants them
    slots = {"fp32": _moments(compute), "bf16": _moments(torch.bfloat16) | _STREAM, "8bit": _CODES | _STREAM}[
        state_format
    ]
    if dtype in _MASTER and master_weights:
        key, master_dtype = _MASTER[dtype]
        slots = slots | {key: Slot(master_dtype)}
    return StateFormat(state_format, slots, Slot(compute))


def new_step() -> Tensor:
    """Return the step count of a parameter that has taken no step."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=torch.float32, device="cpu")


def checked_step(value: Any, name: str) -> Tensor:
    """Return a step count as 0-dim float32 on the CPU, `value` itself where it is so already."""
    number = number_in(value) if isinstance(value, Tensor) else value
    if not isinstance(number, numbers.Real):
        raise ValueError(f"state 'step' of {name}: expected one number, got {shown(value)}")
    count = as_float(number)
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


def step_is_uncertain(value: Any) -> bool:
    """Whether a step count is a small float's and above 256, up to which bfloat16 has every whole number."""
    if isinstance(value, np.float16):
        return float(value) > _MOST_CERTAIN
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype.itemsize > 2:
        return False
    number = number_in(value)
    return number is not None and number > min(_MOST_CERTAIN, 2 / torch.finfo(value.dtype).eps)


def is_entry(value: Any) -> bool:
    """Whether a value of a state dict is the state of some parameter."""
    return isinstance(value, Mapping) and not value.keys().isdisjoint(_KEYS - {STEP, STREAM})
