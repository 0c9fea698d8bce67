"""A row (a parameter with its gradient and state), and its checks before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .numbers import STEP_ROLE, STREAM_ROLE, MomentFormat, Operand, ParamFormat
from .shards import Numbering, alike, check_placements, is_sharded, local

# The dtype in which a parameter's update is computed. Plain moments are stored in it too.
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


# The role of each key of a parameter's state, for the engines.
ROLES: dict[str, int] = {
    "step": STEP_ROLE,
    "stream": STREAM_ROLE,
    "exp_avg": Operand.EXP_AVG,
    "exp_avg_sq": Operand.EXP_AVG_SQ,
    "exp_avg_code": Operand.EXP_AVG,
    "exp_avg_sq_code": Operand.EXP_AVG_SQ,
    "exp_avg_scale": Operand.EXP_AVG_SCALE,
    "exp_avg_sq_scale": Operand.EXP_AVG_SQ_SCALE,
    "max_exp_avg_sq": Operand.MAX_EXP_AVG_SQ,
    "residual": Operand.LOW_BITS,
    "master": Operand.LOW_BITS,
    "ema": Operand.EMA,
}


class RowFormat(NamedTuple):
    """How a row's parameter and moments are stored, and whether an average of the weights is."""

    param: ParamFormat
    moments: MomentFormat
    ema: bool = False

    @property
    def draws(self) -> bool:
        """Whether something is stochastically rounded, for which elements are numbered in row-major order."""
        return self.moments is not MomentFormat.PLAIN or self.param is ParamFormat.BFLOAT16_DRAWN or self.ema


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter with its gradient and state.

    ``index``: the number of the row in the plan. ``group``: the group's index in the plan. ``step``: the step count,
    0-dim float32 on the CPU. ``slots``: the other tensors of the state by key, stored as ``format`` says. ``entry``:
    the dict in the optimizer's state that holds step and slots. Parameter and slots may be sharded; ``gradient`` is the
    local shard. ``numbering``: the numbers of the local elements in the whole parameter.
    """

    index: int
    group: int
    name: str
    param: Tensor
    gradient: Tensor
    entry: dict[str, Any]
    step: Tensor
    slots: dict[str, Tensor]
    format: RowFormat
    numbering: Numbering

    @property
    def roles(self) -> list[tuple[int, Tensor]]:
        """The (role, tensor) pairs of its state, the step count first."""
        return [(STEP_ROLE, self.step), *((ROLES[key], slot) for key, slot in self.slots.items())]


def is_plain(tensor: Tensor) -> bool:
    """Whether plain torch operations read its values: false for subclasses with their own dispatch (FakeTensor)."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def span(tensor: Tensor) -> int:
    """Return the number of bytes from the first element of a strided tensor to the end of its last."""
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
    """Raise if a tensor is of a subclass with its own dispatch, or belongs to a torch.func transform."""
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
    """Raise unless `param`, or this process's shard of it, can be updated in place."""
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
            f"{name} has several elements at the same address (shape {tuple(param.shape)}, "
            f"strides {param.stride()}), so no step can update it; make it contiguous() first"
        )


def checked_gradient(param: Tensor, name: str) -> Tensor:
    """Return the gradient of `param` (the local shard, if it is sharded) as a plain tensor; raise if it is invalid.

    If the gradient is sharded differently from its parameter, the processes redistribute it.
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
    """Raise unless every tensor of the row has memory, and no two of them overlap."""
    tensors = {"the parameter": local(row.param), "its gradient": row.gradient, "its state 'step'": row.step}
    tensors |= {f"its state {key!r}": local(slot) for key, slot in row.slots.items()}
    spans: list[tuple[int, int, str]] = []
    for what, tensor in tensors.items():
        check_plain(tensor, f"{row.name}: {what}")
        if tensor.is_conj() or tensor.is_neg():
            raise ValueError(f"{row.name}: {what} is a lazily conjugated or negated view; resolve_conj() it")
        if tensor.is_inference() and what.startswith("its state") and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{row.name}: {what} was created under torch.inference_mode(), so it cannot be updated outside of it; "
                "clone() it, or load the checkpoint again"
            )
        if tensor.numel() == 0:
            continue
        if what != "its gradient" and overlaps_itself(tensor):
            raise ValueError(f"{row.name}: {what} has several elements at the same address; clone() it")
        if not has_memory(tensor):
            raise ValueError(f"{row.name}: {what} has no memory, or less than its shape needs; was its storage freed?")
        spans.append((tensor.data_ptr(), tensor.data_ptr() + span(tensor), what))
    spans.sort()
    for (_, end, one), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise ValueError(f"{row.name}: {one} and {other} share memory; clone() one of them")


def check_apart(rows: Sequence[Row]) -> None:
    """Raise if the state of one row shares memory with another row: one update would undo the other."""
    spans: list[tuple[torch.device, int, int, bool]] = []
    for row in rows:
        for tensor in (row.param, row.step, *(slot for key, slot in row.slots.items() if key != "stream")):
            part = local(tensor)
            if part.numel():
                spans.append((part.device, part.data_ptr(), part.data_ptr() + span(part), tensor is not row.param))
    spans.sort(key=lambda each: (str(each[0]), each[1]))
    on, until, until_state = None, 0, False  # the span before that reaches furthest
    for device, begin, end, of_state in spans:
        if device == on and begin < until and (of_state or until_state):
            raise ValueError(
                "the state of two parameters, or of one and another parameter, lies in the same memory, so that one "
                "update would undo the other; clone() one of the state's tensors"
            )
        if device != on or end > until:
            on, until, until_state = device, end, of_state


def _described(tensor: Tensor) -> str:
    over = f" sharded over {tensor.device_mesh}" if is_sharded(tensor) else ""
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
    """Whether all elements have different offsets, by trying them: strides may interleave without a collision."""
    if any(stride == 0 for stride, _ in dims):
        return False
    seen = torch.zeros(reach + 1, dtype=torch.bool, device="cpu")
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in dims:
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * stride
    seen[offsets.reshape(-1)] = True
    return int(seen.sum()) == offsets.numel()
