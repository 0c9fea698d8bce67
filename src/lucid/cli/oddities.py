"""What is odd about a parameter's state in a checkpoint, a sentence for each thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lucid.engine import codecs

CODES = ("exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale")
MAXIMUM = "max_exp_avg_sq"
_SQUARE_IS_NONE = 2.0**-63  # squares of such gradients, times 1 - beta2, are below float32: v is 0 then


def of_keys(entry: Mapping[str, Any]) -> Iterator[str]:
    wanted = CODES if any(key in entry for key in CODES) else ("exp_avg", "exp_avg_sq")
    missing = [key for key in wanted if not isinstance(entry.get(key), Tensor)]
    if missing:
        yield f"{', '.join(missing)} missing"
    if wanted is CODES and ("exp_avg" in entry or "exp_avg_sq" in entry):
        yield "moments twice: as codes and as numbers"
    if not missing:
        shape = entry[wanted[0]].shape
        for key in ("exp_avg_sq", "exp_avg_sq_code", MAXIMUM, "residual", "master", "ema"):
            value = entry.get(key)
            if isinstance(value, Tensor) and value.shape != shape:
                yield f"{key} has shape {_shape(value)}, {wanted[0]} {_shape(entry[wanted[0]])}"
        if wanted is CODES:
            yield from _of_codes(entry, shape)
    residual = entry.get("residual")
    if isinstance(residual, Tensor) and residual.dtype != torch.bfloat16:
        yield f"residual is {residual.dtype}, which has lost the bits that it holds as torch.bfloat16"


def _of_codes(entry: Mapping[str, Any], shape: torch.Size) -> Iterator[str]:
    for key in ("exp_avg_code", "exp_avg_sq_code"):
        if entry[key].dtype != torch.uint8:
            yield f"{key} is {entry[key].dtype}, expected torch.uint8"
    for key in ("exp_avg_scale", "exp_avg_sq_scale"):
        if not shape or entry[key].shape != (shape[0], codecs.blocks(shape)):
            yield f"{key} has shape {_shape(entry[key])}, expected one scale for each block of 128 of a row"


def not_finite(key: str, value: Tensor) -> Iterator[str]:
    known = value.float() if value.is_floating_point() and value.itemsize < 2 else value  # torch asks no float8
    count = int(value.numel() - known.isfinite().sum())
    if count:
        yield f"{key} is NaN or infinite in {count:,} of {value.numel():,}"


def of_values(m: Tensor, v: Tensor, step: float) -> Iterator[str]:
    negative = int((v < 0).sum())
    if negative:
        yield f"exp_avg_sq is negative in {negative:,}"
    alone = int(((v == 0) & (m.abs() > _SQUARE_IS_NONE)).sum())
    if alone:
        yield f"exp_avg_sq is 0 where exp_avg is not, in {alone:,}: the update there is exp_avg / eps"
    if step == 0 and bool((m != 0).any()):
        yield "step is 0, yet there are moments"


def of_weight(weight: Tensor, tensors: Mapping[str, Tensor], moment: Tensor) -> Iterator[str]:
    if weight.shape != moment.shape:
        yield f"the weight has shape {_shape(weight)}, its state {_shape(moment)}"
        return
    if weight.is_floating_point() or weight.is_complex():
        yield from not_finite("the weight", weight)
    residual, master = tensors.get("residual"), tensors.get("master")
    if residual is not None and weight.dtype != torch.bfloat16:
        yield f"there is a residual, of a bfloat16 parameter, and the weight is {weight.dtype}"
    elif residual is not None and residual.dtype == torch.bfloat16 and residual.shape == weight.shape:
        stale = _stale(weight, residual)
        if stale:
            yield f"stale residual in {stale:,}: no step has left it beside this weight, someone overwrote the weight"
    if master is not None and master.shape == weight.shape and weight.dtype == torch.float16:
        values = codecs.master_of_float16(weight, master.float())
        other = int(((values != master.float()) & ~(values.isnan() & master.isnan())).sum())
        if other:
            yield f"stale master in {other:,}: it does not round to the weight, someone overwrote the weight"


def _stale(weight: Tensor, residual: Tensor) -> int:
    """Return how many elements have a weight and a residual that no master weight splits into."""
    upper, lower = codecs.split(codecs.joined(weight, residual))
    bits = [tensor.contiguous().view(torch.int16) for tensor in (weight, residual, upper, lower)]
    return int(((bits[0] != bits[2]) | (bits[1] != bits[3])).sum())


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "()"
