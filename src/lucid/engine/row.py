"""A row: what is updated together, checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .shards import Numbering, alike, check_placements, is_sharded, local

# The dtype that a parameter is computed in, and in which its state is kept where it is not encoded.
COMPUTE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.complex64,
    torch.complex128: torch.complex128,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

REAL_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX_GRADIENTS = (torch.complex64, torch.complex128)


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter with its gradient and state.

    ``step``: its step count, 0-dim float32 on the CPU. ``slots``: the rest of its state by key, which tells the
    engines the format. ``entry``: the dict of the optimizer's state that holds them all. Parameter and slots may be
    spread over processes, ``gradient`` is what this one holds; ``numbering`` tells where that lies in the whole.
    """

    index: int
    group: int
    name: str
    param: Tensor
    gradient: Tensor
    entry: dict[str, Any]
    step: Tensor
    slots: dict[str, Tensor]
    numbering: Numbering


def is_plain(tensor: Tensor) -> bool:
    """Whether more than operations of its own class reach its values (unlike FakeTensor, quantized tensors)."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def span(tensor: Tensor) -> int:
    """Return how many bytes a strided tensor takes from its first element to behind its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage of a strided tensor is as large as its elements need."""
    if tensor._is_zerotensor():
        return False
    begin = tensor.storage_offset() * tensor.element_size()
    return not tensor.numel() or tensor.untyped_storage().nbytes() >= begin + span(tensor)


def check_plain(tensor: Tensor, what: str) -> None:
    """Raise where a tensor is none of torch's own class."""
    if not is_plain(tensor):
        raise TypeError(
            f"{what} is a {type(tensor).__name__}, expected a plain tensor with memory of its own, or a DTensor; "
            "lucid.optim does not update fake or otherwise wrapped tensors"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            f"{what} belongs to a torch.func transform (grad, vmap) that is still running; "
            "let the transform return the gradients, and call step() after it"
        )


def check_param(param: Tensor, name: str) -> None:
    """Raise unless `param`, or what this process holds of it, is one that can be updated in place."""
    check_placements(param, name)
    param = local(param)
    check_plain(param, name)
    if param.layout is not torch.strided:
        raise TypeError(
            f"{name}: expected a dense (strided) parameter, got layout {param.layout}; "
            "lucid.optim updates dense parameters only"
        )
    if param.device.type == "meta":
        raise ValueError(
            f"{name} is on the meta device and has no values to update; "
            "materialise the model (to_empty, load_state_dict) before the first step"
        )
    if param.is_conj() or param.is_neg():
        raise ValueError(
            f"{name} is a lazily conjugated or negated view and cannot be updated in place; "
            "make it a leaf of its own with resolve_conj() or resolve_neg()"
        )
    if overlaps_itself(param):
        raise ValueError(
            f"{name} has several elements at one place in memory (shape {tuple(param.shape)}, "
            f"strides {param.stride()}), which no step can update; make it contiguous() first"
        )


def checked_gradient(param: Tensor, name: str) -> Tensor:
    """Return the gradient of `param`, or what this process holds of it, as a plain tensor, or raise.

    One that is spread in another way than its parameter is exchanged between the processes.
    """
    gradient = param.grad
    assert gradient is not None
    if is_sharded(param):
        if not is_sharded(gradient) or gradient.device_mesh != param.device_mesh or gradient.shape != param.shape:
            raise ValueError(
                f"the gradient of {name} is {_described(gradient)}, expected {_described(param)} like the parameter; "
                "was the model wrapped between backward and step? zero_grad() first"
            )
        gradient = local(gradient if alike(gradient, param) else gradient.redistribute(placements=param.placements))
        param = local(param)
    check_plain(gradient, f"the gradient of {name}")
    if gradient.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {name} is sparse ({gradient.layout}); AdamW moves every element at every step, so "
            "use dense gradients (nn.Embedding(sparse=False)) or torch.optim.SparseAdam for that parameter"
        )
    if gradient.shape != param.shape:
        raise ValueError(
            f"the gradient of {name} has shape {tuple(gradient.shape)}, expected {tuple(param.shape)} like the "
            "parameter; was the parameter replaced between backward and step? zero_grad() first"
        )
    if gradient.device != param.device:
        raise ValueError(
            f"the gradient of {name} is on {gradient.device}, expected {param.device} like the parameter; "
            "was the model moved between backward and step? zero_grad() first"
        )
    allowed = COMPLEX_GRADIENTS if param.is_complex() else REAL_GRADIENTS
    if gradient.dtype not in allowed:
        raise TypeError(
            f"the gradient of {name} has dtype {gradient.dtype}, expected one of "
            f"{', '.join(str(dtype) for dtype in allowed)} for a parameter of {param.dtype}"
        )
    if gradient._is_zerotensor():
        return torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    return gradient.detach().resolve_conj().resolve_neg()


def check_memory(row: Row) -> None:
    """Raise unless every tensor of the row has memory, and memory that no other of them writes."""
    tensors = {"the parameter": local(row.param), "its gradient": row.gradient, "its state 'step'": row.step}
    tensors |= {f"its state {key!r}": local(slot) for key, slot in row.slots.items()}
    spans: list[tuple[int, int, str]] = []
    for what, tensor in tensors.items():
        check_plain(tensor, f"{row.name}: {what}")
        if tensor.is_conj() or tensor.is_neg():
            raise ValueError(f"{row.name}: {what} is a lazily conjugated or negated view; resolve_conj() it")
        if tensor.is_inference() and what.startswith("its state") and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{row.name}: {what} was made under torch.inference_mode(), which forbids to update it outside; "
                "clone() it, or load the checkpoint anew"
            )
        if tensor.numel() == 0:
            continue
        if what != "its gradient" and overlaps_itself(tensor):
            raise ValueError(f"{row.name}: {what} has several elements at one place in memory; clone() it")
        if not has_memory(tensor):
            raise ValueError(f"{row.name}: {what} has no memory, or less than its shape needs; was its storage freed?")
        spans.append((tensor.data_ptr(), tensor.data_ptr() + span(tensor), what))
    spans.sort()
    for (_, end, one), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise ValueError(f"{row.name}: {one} and {other} lie in the same memory; clone() one of them")


def _described(tensor: Tensor) -> str:
    over = f" spread over {tensor.device_mesh}" if is_sharded(tensor) else ""
    return f"a {type(tensor).__name__} of shape {tuple(tensor.shape)}{over}"


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of `tensor` share memory."""
    if tensor.numel() <= 1:
        return False
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    reach = 0
    nested = True
    for stride, size in dims:
        nested = nested and stride > reach
        reach += stride * (size - 1)
    return not nested and not _offsets_differ(dims, reach)


def _offsets_differ(dims: Sequence[tuple[int, int]], reach: int) -> bool:
    """By trying: strides may interleave without two elements meeting."""
    if any(stride == 0 for stride, _ in dims):
        return False
    seen = torch.zeros(reach + 1, dtype=torch.bool, device="cpu")
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in dims:
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * stride
    seen[offsets.reshape(-1)] = True
    return int(seen.sum()) == offsets.numel()
