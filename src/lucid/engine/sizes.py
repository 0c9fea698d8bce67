"""How many bytes a parameter's state takes, from its shape alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .formats import MasterWeights, StateFormatName, format_for, new_step


def state_bytes(
    shape: Sequence[int],
    dtype: torch.dtype,
    state_format: StateFormatName,
    *,
    master_weights: MasterWeights = True,
    amsgrad: bool = False,
    ema: bool = False,
    ranks: int = 1,
) -> int:
    """Return the bytes of a parameter's state; if sharded by rows over `ranks` processes, of the largest shard."""
    slots = slot_bytes(shape, dtype, state_format, master_weights=master_weights, amsgrad=amsgrad, ema=ema, ranks=ranks)
    return new_step().nbytes + sum(slots.values())


def slot_bytes(
    shape: Sequence[int],
    dtype: torch.dtype,
    state_format: StateFormatName,
    *,
    master_weights: MasterWeights = True,
    amsgrad: bool = False,
    ema: bool = False,
    ranks: int = 1,
) -> dict[str, int]:
    """Return the bytes of each tensor of that state but the step count, by key, in the order in which it is made."""
    whole = torch.empty(tuple(shape), dtype=dtype, device="meta")
    kept = format_for(whole, state_format, master_weights, "a parameter", ema=ema)
    part = whole[: math.ceil(whole.shape[0] / ranks)] if whole.dim() else whole
    slots = kept.slots_with(amsgrad)
    return {key: slot.dtype.itemsize * math.prod(slot.shape_for(part)) for key, slot in slots.items()}
