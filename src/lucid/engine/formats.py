"""State formats: which tensors the optimizer stores for a parameter, with their keys, dtypes and shapes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import codecs, pinned, shards
from .choice import in_place
from .numbers import MomentFormat, ParamFormat
from .row import COMPUTE, RowFormat, check_param, check_plain, has_memory
from .scalars import MAX_STEP
from .values import as_float, number_in, plain, shown

STEP = "step"
STREAM = "stream"

StateFormatName = Literal["fp32", "bf16", "8bit"]
MasterWeights = bool | Literal["stochastic"]
NAMES: tuple[StateFormatName, ...] = ("fp32", "bf16", "8bit")
StateDevice = Literal["cpu", "cpu:moments"]
STATE_DEVICES: tuple[StateDevice, ...] = ("cpu", "cpu:moments")

# Identifies the random bits of a parameter: the seed, and the parameter's name, or its number over all groups.
RoundingKey = tuple[int, str | int]

# 8-bit moments are for weights that are large enough to save memory, with rows that are long enough to share a scale.
# The shape of the whole parameter decides, never the shape of a shard.
_LEAST_ELEMENTS = 4096
_LEAST_ROW = 64

_MASTER = {
    torch.bfloat16: ("residual", torch.bfloat16, ParamFormat.BFLOAT16_RESIDUAL),
    torch.float16: ("master", torch.float32, ParamFormat.FLOAT16_MASTER),
}
_ALONE = {torch.bfloat16: ParamFormat.BFLOAT16, torch.float16: ParamFormat.FLOAT16}
_MOMENTS: dict[StateFormatName, MomentFormat] = {
    "fp32": MomentFormat.PLAIN,
    "bf16": MomentFormat.BFLOAT16,
    "8bit": MomentFormat.EIGHT_BIT,
}
AMSGRAD = "max_exp_avg_sq"
EMA = "ema"


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a parameter's state: its dtype, and whether it has the parameter's shape, one number per block
    of 128 elements of a row, or is a single number.
    """

    dtype: torch.dtype
    shape: Literal["param", "blocks", "one"] = "param"

    def shape_for(self, param: Tensor) -> tuple[int, ...]:
        """Return the shape of this slot of `param`."""
        if self.shape == "one":
            return ()
        return tuple(param.shape) if self.shape == "param" else (param.shape[0], codecs.blocks(param.shape))

    def new(self, param: Tensor, device: torch.device, *, contiguous: bool, in_pinned: bool = False) -> Tensor:
        """Return zeros on `device`, in the parameter's memory order unless `contiguous`; sharded as `param` is."""
        part = shards.local(param)
        if in_pinned:
            device = torch.device("meta")
        with torch.inference_mode(False), torch.no_grad():  # a tensor made in that mode cannot be updated outside of it
            if self.shape == "param" and not contiguous:
                slot = torch.empty_like(part, dtype=self.dtype, device=device, requires_grad=False)
            else:
                slot = torch.empty(self.shape_for(part), dtype=self.dtype, device=device)
            if in_pinned:
                slot = pinned.empty_like(slot)
            if slot.device.type == "cpu":  # torch zeroes in parallel, which hangs in a forked child
                ctypes.memset(slot.data_ptr(), 0, slot.nbytes)
            else:
                slot.zero_()
            return shards.spread_like(param, slot, self.shape_for(param))

    def check(self, value: Any, param: Tensor, key: str, name: str) -> Tensor:
        """Return `value`; raise if it is not a dense tensor of this slot's shape and kind of number."""
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
                f"state {key!r} of {name} is on the meta device and has no values; load the checkpoint again"
            )
        if value.layout is not torch.strided or not self._is_alike(value):
            kind = "complex" if self.dtype.is_complex else "floating-point"
            wanted = f"{kind} numbers" if self.dtype.is_floating_point or self.dtype.is_complex else f"{self.dtype}"
            raise ValueError(
                f"state {key!r} of {name} is {value.dtype} with layout {value.layout}, expected dense {wanted}"
            )
        _check_memory(value, f"state {key!r} of {name}")
        return value

    def local_part(self, value: Any, param: Tensor, key: str, name: str) -> Tensor:
        """Return this process's shard of a checked `value`."""
        return shards.part_of(self.check(value, param, key, name).detach(), param, f"state {key!r} of {name}")

    def _is_alike(self, value: Tensor) -> bool:
        if self.dtype.is_complex:
            return value.is_complex()
        return value.is_floating_point() if self.dtype.is_floating_point else value.dtype == self.dtype


def _check_memory(tensor: Tensor, what: str) -> None:
    """Raise if a tensor's storage is too small for it: to read it would end the process."""
    part = shards.local(tensor)
    if not part._is_zerotensor() and not has_memory(part):
        raise ValueError(f"{what} has no memory, or less than its shape needs; was its storage freed?")


CODES = {
    "exp_avg_code": Slot(torch.uint8),
    "exp_avg_scale": Slot(torch.float32, "blocks"),
    "exp_avg_sq_code": Slot(torch.uint8),
    "exp_avg_sq_scale": Slot(torch.float32, "blocks"),
}
_STREAM = {STREAM: Slot(torch.int64, "one")}


def moments(dtype: torch.dtype) -> dict[str, Slot]:
    return {"exp_avg": Slot(dtype), "exp_avg_sq": Slot(dtype)}


_LATER = {AMSGRAD, EMA, STREAM, *(key for key, *_ in _MASTER.values())}  # these may be added to existing state
_MOST_CERTAIN = 256  # bfloat16 represents every whole number up to this
# The keys of all formats, which a conversion replaces.
KEYS = {STEP, STREAM, *CODES, *moments(torch.float32), *_LATER}
OF_MOMENTS = {*CODES, *moments(torch.float32), AMSGRAD}  # which "cpu:moments" puts on the host


@dataclass(frozen=True, slots=True)
class StateFormat:
    """The state of one kind of parameter.

    ``moments``: the name of the format of the moments. ``row_format``: how engines store moments and parameter.
    ``slots``: all tensors except the step count and amsgrad's maximum. ``amsgrad_slot``: that maximum. ``on_host``: the
    keys of the tensors that are on the host; the others are on the parameter's device. ``in_pinned``: whether those on
    the host are in pinned memory, which the parameter's device reads and writes.
    """

    moments: StateFormatName
    row_format: RowFormat
    slots: Mapping[str, Slot]
    amsgrad_slot: Slot
    on_host: frozenset[str] = frozenset()
    in_pinned: bool = False

    def device_for(self, param: Tensor, key: str) -> torch.device:
        """Return the device of a tensor of the state of `param`."""
        return torch.device("cpu") if key in self.on_host else shards.local(param).device

    def _is_pinned(self, key: str) -> bool:
        return self.in_pinned and key in self.on_host

    def slots_with(self, amsgrad: bool) -> dict[str, Slot]:
        """Return the slots of a parameter, in the order in which they are created."""
        return {**self.slots, AMSGRAD: self.amsgrad_slot} if amsgrad else dict(self.slots)

    def complete(
        self, param: Tensor, entry: Mapping[str, Any], amsgrad: bool, name: str, rounding_key: RoundingKey
    ) -> dict[str, Tensor]:
        """Return new tensors for the keys that `entry`, a parameter's state, lacks; raise if a value in it is invalid.

        A parameter without state gets all tensors. amsgrad's maximum may be added later; it starts from zero. The
        residual or master may also be added later, if a model is converted to 16 bits; the master weight then starts
        from the parameter's value. So may the average of the weights, which starts from the master weight, and with it
        the stream. State that should be in pinned memory and is not is copied there.
        """
        slots = self.slots_with(amsgrad)
        if not entry:
            new = {key: self.new_slot(key, slot, param, rounding_key) for key, slot in slots.items()}
            self._begin_average(param, {}, new, name)
            return {STEP: new_step()} | new
        missing: dict[str, Tensor] = {}
        step = checked_step(entry.get(STEP), name)
        if step is not entry.get(STEP):
            missing[STEP] = step
        for key, slot in slots.items():
            value = entry.get(key)
            if value is None and key in _LATER and (key != STREAM or self.moments == "fp32"):
                missing[key] = self.new_slot(key, slot, param, rounding_key)
                continue
            if value is None and (others := sorted(KEYS & entry.keys() - slots.keys() - _LATER - {STEP})):
                raise ValueError(
                    f"state of {name} is in another format: it has {', '.join(others)} and lacks {key}; set "
                    "state_format and master_weights before the first step, or use load_state_dict, which converts"
                )
            tensor = slot.check(value, param, key, name)
            device = self.device_for(param, key)
            if tensor.dtype != slot.dtype or (tensor.device != device and key != STREAM):
                raise ValueError(
                    f"state {key!r} of {name} is {tensor.dtype} on {tensor.device}, expected "
                    f"{slot.dtype} on {device}; load it with load_state_dict, which converts"
                )
            if key != STREAM and not shards.alike(tensor, param):
                raise ValueError(
                    f"state {key!r} of {name} is not sharded like the parameter; load it with "
                    "load_state_dict, or load the checkpoint again after the model is wrapped"
                )
            if key in CODES and not shards.local(tensor).is_contiguous():
                raise ValueError(
                    f"state {key!r} of {name} has strides {tensor.stride()}, expected contiguous codes and scales; "
                    "load it with load_state_dict, which makes them contiguous"
                )
            if self._is_pinned(key):
                check_plain(shards.local(tensor), f"state {key!r} of {name}")
                if not pinned.arena.holds(shards.local(tensor)):
                    missing[key] = self.new_slot(key, slot, param, rounding_key)
                    shards.local(missing[key]).copy_(shards.local(tensor).detach())
        self._begin_average(param, entry, missing, name)
        return missing

    def _begin_average(self, param: Tensor, entry: Mapping[str, Any], new: Mapping[str, Tensor], name: str) -> None:
        """If the average of the weights is new, set it to the master weight of `param`; `entry` is its other state."""
        if EMA not in new:
            return
        with torch.inference_mode(False), torch.no_grad():
            shards.local(new[EMA]).copy_(self.master_of(param, entry, name))

    def master_of(self, param: Tensor, entry: Mapping[str, Any], name: str) -> Tensor:
        """Return this process's shard of the master weight of `param`, whose state is `entry`, maybe `param` itself."""
        _check_memory(param, name)
        part = shards.local(param).detach()
        key = _MASTER.get(param.dtype, (None,))[0]
        kept = None if key is None or key not in self.slots else entry.get(key)
        if key is None or kept is None:
            return part
        low = shards.local(self.slots[key].check(kept, param, key, name)).to(part.device)
        return codecs.joined(part, low) if key == "residual" else codecs.master_of_float16(part, low)

    def new_slot(self, key: str, slot: Slot, param: Tensor, rounding_key: RoundingKey) -> Tensor:
        if key == STREAM:
            with torch.inference_mode(False):
                return torch.tensor(_stream_of(*rounding_key), dtype=torch.int64, device="cpu")
        device, in_pinned = self.device_for(param, key), self._is_pinned(key)
        return slot.new(param, device, contiguous=key in CODES, in_pinned=in_pinned)


def _stream_of(seed: int, called: str | int) -> int:
    """Return the 64-bit key of a parameter's random bits, a hash of its `RoundingKey`."""
    digest = hashlib.blake2b(repr((seed, plain(called))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def format_for(
    param: Tensor,
    state_format: StateFormatName,
    master_weights: MasterWeights,
    name: str,
    state_device: StateDevice | None = None,
    *,
    ema: bool = False,
) -> StateFormat:
    """Return the state format of `param`; raise if its dtype is not supported.

    ``ema``: whether an average of the weights is kept.
    """
    if param.dtype not in COMPUTE:
        known = ", ".join(str(dtype) for dtype in COMPUTE)
        raise TypeError(f"{name} has dtype {param.dtype}, expected one of {known}")
    if state_format == "8bit" and not _is_quantized(param.shape):
        state_format = "fp32"
    if master_weights == "stochastic" and param.dtype == torch.float16:
        raise ValueError(
            f'{name} is torch.float16, and master_weights="stochastic" is for torch.bfloat16 parameters; set '
            "master_weights to True or False for its group, or convert it"
        )
    kept = _format(param.dtype, state_format, master_weights, ema)
    if state_device is not None:
        in_pinned = in_place(shards.local(param).device)
        every = frozenset(kept.slots_with(True)) - {STREAM}
        on_host = every & OF_MOMENTS if state_device == "cpu:moments" and in_pinned else every
        kept = replace(kept, on_host=on_host, in_pinned=in_pinned)
    if kept.moments == "8bit":
        shards.check_blocks(param, name)
    if STREAM in kept.slots:
        shards.numbering(param, name)
    return kept


def checked_format(
    param: Tensor,
    state_format: StateFormatName,
    master_weights: MasterWeights,
    name: str,
    state_device: StateDevice | None,
    *,
    ema: bool = False,
) -> StateFormat:
    """Return the state format of `param`, as `format_for` does; also raise if no step can update `param`."""
    kept = format_for(param, state_format, master_weights, name, state_device, ema=ema)
    check_param(param, name)
    return kept


def _is_quantized(shape: torch.Size) -> bool:
    return len(shape) >= 2 and shape.numel() >= _LEAST_ELEMENTS and math.prod(shape[1:]) >= _LEAST_ROW


def plain_format(dtype: torch.dtype) -> StateFormat:
    """Return the state format that ``torch.optim.AdamW`` uses for a parameter of this dtype."""
    return _format(dtype, "fp32", False, False)


@functools.cache
def _format(dtype: torch.dtype, state_format: StateFormatName, master_weights: MasterWeights, ema: bool) -> StateFormat:
    compute = COMPUTE[dtype]
    if compute is not torch.float32:
        state_format = "fp32"  # float64 and complex parameters keep moments in their own precision
    slots = {"fp32": moments(compute), "bf16": moments(torch.bfloat16) | _STREAM, "8bit": CODES | _STREAM}[state_format]
    stored = _ALONE.get(dtype, ParamFormat.PLAIN)
    if dtype in _MASTER and master_weights == "stochastic":
        stored, slots = ParamFormat.BFLOAT16_DRAWN, slots | _STREAM
    elif dtype in _MASTER and master_weights:
        key, master_dtype, stored = _MASTER[dtype]
        slots = slots | {key: Slot(master_dtype)}
    if ema:
        slots = slots | _STREAM | {EMA: Slot(compute)}
    return StateFormat(state_format, RowFormat(stored, _MOMENTS[state_format], ema), slots, Slot(compute))


def new_step() -> Tensor:
    """Return a step count of 0."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=torch.float32, device="cpu")


def checked_step(value: Any, name: str) -> Tensor:
    """Return a step count as a 0-dim float32 tensor on the CPU, `value` itself if it already is one."""
    number = number_in(value) if isinstance(value, Tensor) else value
    if not isinstance(number, numbers.Real):
        raise ValueError(f"state 'step' of {name}: expected one number, got {shown(value)}")
    count = as_float(number)
    if not (0 <= count < MAX_STEP and count.is_integer()):
        raise ValueError(
            f"state 'step' of {name}: expected a whole number from 0 to {MAX_STEP - 1} (float32 cannot count "
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
    """Whether a step count may have been rounded: it is in a float of 16 bits or fewer, and too large for that type."""
    if isinstance(value, np.float16):
        return float(value) > _MOST_CERTAIN
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype.itemsize > 2:
        return False
    number = number_in(value)
    return number is not None and number > min(_MOST_CERTAIN, 2 / torch.finfo(value.dtype).eps)


def is_entry(value: Any) -> bool:
    """Whether a value of a state dict is the state of a parameter."""
    return isinstance(value, Mapping) and not value.keys().isdisjoint(KEYS - {STEP, STREAM})
