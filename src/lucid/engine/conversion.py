"""Converts saved state from one format to another. Values are rounded to nearest; the result shares no memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import codecs, shards
from .formats import (
    AMSGRAD,
    CODES,
    EMA,
    KEYS,
    STEP,
    STREAM,
    RoundingKey,
    Slot,
    StateFormat,
    checked_step,
    moments,
    plain_format,
)
from .row import COMPUTE
from .values import plain


def converted_entry(
    kept: StateFormat, param: Tensor, entry: Mapping[str, Any], name: str, rounding_key: RoundingKey
) -> dict[str, Tensor]:
    """Return a copy of a saved `entry` in format `kept`, rounded to nearest; it shares no memory with `entry`."""
    own = {STEP: checked_step(entry.get(STEP), name).clone()}
    saved = dict(entry)
    for key, slot in kept.slots_with(AMSGRAD in entry).items():
        if key == EMA and EMA not in entry:  # the next step starts it from the weights as they are then
            continue
        own[key] = kept.new_slot(key, slot, param, rounding_key)
    parts = {key: shards.local(tensor) for key, tensor in own.items()}
    if kept.moments == "8bit" and "exp_avg_code" in saved:
        for key, slot in CODES.items():
            parts[key].copy_(slot.local_part(saved.get(key), param, key, name))
    else:
        m, v = _decoded(param, saved, name)
        if kept.moments == "8bit":
            m, v = m.to(param.device).float(), v.to(param.device).float() + 0.0  # turns -0 into 0
            for key, value in zip(CODES, (*codecs.encode_signed(m), *codecs.encode_unsigned(v)), strict=True):
                parts[key].copy_(value)
        elif kept.moments == "bf16":
            parts["exp_avg"].copy_(codecs.rounded_to_bfloat16(m.to(param.device).float()))
            parts["exp_avg_sq"].copy_(codecs.rounded_to_bfloat16(v.to(param.device).float(), positive=True))
        else:
            parts["exp_avg"].copy_(m)
            parts["exp_avg_sq"].copy_(v)
    if AMSGRAD in saved:
        parts[AMSGRAD].copy_(kept.amsgrad_slot.local_part(saved[AMSGRAD], param, AMSGRAD, name))
    if EMA in own:
        parts[EMA].copy_(kept.slots[EMA].local_part(saved[EMA], param, EMA, name))
    if STREAM in own and STREAM in saved:
        own[STREAM].copy_(kept.slots[STREAM].check(saved[STREAM], param, STREAM, name))
    _convert_master(parts, saved, param, name)
    others: dict[str, Any] = plain({key: copied(value) for key, value in saved.items() if key not in KEYS})
    return own | others


def _convert_master(parts: dict[str, Tensor], saved: Mapping[str, Any], param: Tensor, name: str) -> None:
    """Fill the residual or master from the saved one. Without a saved one, the master weight is the parameter's value.

    ``parts``: the new local shards by key, changed in place.
    """
    residual, master = saved.get("residual"), saved.get("master")
    if "residual" in parts and residual is not None:
        value = Slot(torch.bfloat16).local_part(residual, param, "residual", name)
        if value.dtype != torch.bfloat16:
            raise ValueError(
                f"state 'residual' of {name} is {value.dtype}, expected torch.bfloat16, because it stores raw bits"
            )
        parts["residual"].view(torch.int16).copy_(value.view(torch.int16))
    elif "residual" in parts and master is not None:
        values = Slot(torch.float32).local_part(master, param, "master", name).to(param.device).float()
        upper, lower = codecs.split(values)
        same = upper.view(torch.int16) == shards.local(param).detach().contiguous().view(torch.int16)
        parts["residual"].view(torch.int16).copy_(torch.where(same, lower.view(torch.int16), 0))
    elif "master" in parts and master is not None:
        parts["master"].copy_(Slot(torch.float32).local_part(master, param, "master", name))


def _decoded(param: Tensor, entry: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
    """Return both moments of a saved entry as numbers: this process's shards of them."""
    if "exp_avg_code" in entry and not param.is_complex() and param.dim() > 0:
        cut = shards.cuts_blocks(param)  # if so, each process needs all codes and scales to decode
        values = {
            key: shards.whole(slot.check(entry.get(key), param, key, name).detach())
            if cut
            else slot.local_part(entry.get(key), param, key, name)
            for key, slot in CODES.items()
        }
        m = codecs.decode_signed(values["exp_avg_code"], values["exp_avg_scale"].float())
        v = codecs.decode_unsigned(values["exp_avg_sq_code"], values["exp_avg_sq_scale"].float())
        return (shards.part_of(m, param, name), shards.part_of(v, param, name)) if cut else (m, v)
    m, v = (slot.local_part(entry.get(key), param, key, name) for key, slot in moments(COMPUTE[param.dtype]).items())
    return m, v


def decoded(param: Tensor, entry: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return a copy of a parameter's state as ``torch.optim.AdamW`` stores it: float32 moments, no master weights.

    It is on the host if the moments are there: the parameter's device may not have the memory.
    """
    kept = plain_format(param.dtype)
    saved = (entry.get(key) for key in (*CODES, *kept.slots))
    if any(isinstance(value, Tensor) and shards.local(value).device.type == "cpu" for value in saved):
        kept = replace(kept, on_host=frozenset(kept.slots_with(True)))
    return converted_entry(kept, param, entry, name, (0, 0))


def copied(value: Any) -> Any:
    """Return a copy of a saved tensor or other value."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
