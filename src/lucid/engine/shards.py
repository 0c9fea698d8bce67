"""Sharded tensors (DTensor): the shard of this process, and its place in the whole tensor.

torch's package for them is large, so this module never imports it to test a tensor: before somebody has imported the
package, there are no DTensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from . import codecs, native
from .numbers import BLOCK

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Numbering(NamedTuple):
    """The numbers of a shard's elements in the whole tensor, both in row-major order.

    They form runs of `run` consecutive numbers. The first run begins at `first`, each next one `stride` further.
    """

    first: int
    run: int
    stride: int

    def numbers(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return the number of each element of a shard of `shape`, int64."""
        index = torch.arange(shape.numel(), dtype=torch.int64, device=device)
        return (self.first + index // self.run * self.stride + index % self.run).view(shape)


WHOLE = Numbering(0, 2**62, 0)


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor: sharded, or replicated on all processes."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    if kind is None or type(tensor) is not kind:
        return False
    native.connect_sharded(kind)
    return True


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor; a plain tensor is its own shard."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor._local_tensor
    return part.wait() if hasattr(part, "wait") else part  # a collective may still be running


def place(tensor: Tensor) -> tuple[object, ...]:
    """Return where this process's part of a tensor lies, and how it lies there."""
    part = local(tensor)
    return part.device, part.data_ptr(), part.dtype, part.shape, part.stride()


def spread_like(param: Tensor, part: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the tensor of `shape` that is sharded like `param`, with `part` as this process's shard."""
    if not is_sharded(param):
        return part
    whole = torch.empty(tuple(shape), device="meta")
    same = whole.shape == param.shape and part.stride() == local(param).stride()
    return _spread(part, param.device_mesh, param.placements, whole.shape, param.stride() if same else whole.stride())


def empty(param: DTensor, shape: Sequence[int], dtype: torch.dtype, placements: Sequence[Any], on: Any) -> Tensor:
    """Return an uninitialized tensor of `shape` that is sharded over the mesh of `param`, in memory of device `on`."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    whole = torch.empty(tuple(shape), device="meta")
    own, _ = compute_local_shape_and_global_offset(whole.shape, param.device_mesh, placements)
    part = torch.empty(own, dtype=dtype, device=on)
    return _spread(part, param.device_mesh, placements, whole.shape, whole.stride())


def _spread(part: Tensor, mesh: Any, placements: Sequence[Any], shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # from_local() would move a CPU tensor to the mesh's device.
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(shape, stride, part.dtype))
    return DTensor(part, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def alike(tensor: Tensor, param: Tensor) -> bool:
    """Whether two tensors are sharded in the same way, or both are plain."""
    if not is_sharded(tensor) or not is_sharded(param):
        return is_sharded(tensor) == is_sharded(param)
    return tensor.device_mesh == param.device_mesh and tensor.placements == param.placements


def part_of(value: Tensor, param: Tensor, what: str) -> Tensor:
    """Return this process's shard of `value`, sharded like `param`.

    A plain `value` is cut locally. If `value` is sharded differently, the processes redistribute it, so all of them
    must call this.
    """
    if alike(value, param):
        return local(value)
    if not is_sharded(param):
        raise ValueError(f"{what} is sharded, but the parameter is not; give its full_tensor()")
    if not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        parts = distribute_tensor(value.detach(), param.device_mesh, param.placements, src_data_rank=None)
        return local(parts).to(local(param).device)
    if value.device_mesh != param.device_mesh:
        raise ValueError(
            f"{what} is sharded over {value.device_mesh}, expected {param.device_mesh} like the parameter; "
            "load it with torch.distributed.checkpoint, which reshards"
        )
    return local(_on_mesh(value).redistribute(placements=param.placements))


def whole(value: Tensor) -> Tensor:
    """Return the whole of a tensor. If it is sharded, every process of its mesh must call this."""
    return _on_mesh(value).full_tensor() if is_sharded(value) else value


def _on_mesh(value: DTensor) -> DTensor:
    """Return a sharded tensor on the device on which its processes exchange tensors: state on the host is not there."""
    kind = value.device_mesh.device_type
    return value if local(value).device.type == kind else value.to(kind)  # type: ignore[return-value]


def check_placements(param: Tensor, name: str) -> None:
    """Raise if `param` has a partial placement: then its local tensors are summands, not values."""
    if is_sharded(param) and any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"{name} is a partial sum on each process (placements {param.placements}), so no step can update it; "
            "redistribute() it to Replicate() or Shard()"
        )


def cuts_blocks(param: Tensor) -> bool:
    """Whether two processes share a block of `param`, or the scale of a block is on another process than its codes."""
    if not is_sharded(param):
        return False
    inner = _sharded_dims(param) - {0}
    if not inner:
        return False
    over = _levels(param, 1)
    if inner != {1} or len(over) != 1:
        return True
    processes = param.device_mesh.size(over[0])
    own = math.ceil(param.shape[1] / processes) * math.prod(param.shape[2:])
    return own != math.ceil(codecs.blocks(param.shape) / processes) * BLOCK


def check_blocks(param: Tensor, name: str) -> None:
    """Raise if the codes and scales of `param` cannot be sharded like it."""
    if is_sharded(param) and cuts_blocks(param):
        raise ValueError(
            f"{name} is sharded with {param.placements}, which cuts the blocks of {BLOCK} elements that share a scale "
            'under "8bit"; shard it along dim 0, or along dim 1 in multiples of a block, or set '
            'state_format="bf16" for its group'
        )


def numbering(param: Tensor, name: str) -> Numbering:
    """Return the numbers of this process's elements in `param`; raise if a `Numbering` cannot describe them.

    A complex element has two numbers, one for each part.
    This depends on the placements alone, so all processes raise or none does.
    """
    if not is_sharded(param):
        return WHOLE
    inner = sorted(_sharded_dims(param) - {0})
    pieces = {dim: _pieces(param, dim) for dim in _sharded_dims(param)}
    if len(inner) > 1 or not all(_consecutive(piece) for found in pieces.values() for piece in found):
        raise ValueError(
            f"{name} is sharded with {param.placements}, which stochastic rounding does not support; "
            'set state_format="fp32", master_weights=True and ema_decay=None for its group, or shard it along at '
            "most one dimension besides the first"
        )
    if not local(param).numel():
        return WHOLE
    parts = 2 if param.is_complex() else 1
    held = {dim: found[_own(param, dim)] for dim, found in pieces.items()}
    first = parts * int(held[0][0]) * math.prod(param.shape[1:]) if 0 in held else 0
    if not inner:
        return WHOLE._replace(first=first)
    index, rest = held[inner[0]], parts * math.prod(param.shape[inner[0] + 1 :])
    return Numbering(first + int(index[0]) * rest, len(index) * rest, param.shape[inner[0]] * rest)


def _sharded_dims(param: Tensor) -> set[int]:
    if not is_sharded(param):
        return set()
    return {placement.dim for placement in param.placements if hasattr(placement, "dim")}


def _levels(param: DTensor, dim: int) -> list[int]:
    """Return the dimensions of the mesh over which dimension `dim` of `param` is sharded."""
    return [i for i, placement in enumerate(param.placements) if getattr(placement, "dim", None) == dim]


def _pieces(param: DTensor, dim: int) -> list[Tensor]:
    """Return the indices of dimension `dim` that each process holds, in the order of the mesh coordinates."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    pieces = [torch.arange(param.shape[dim], device="cpu")]
    for level in _levels(param, dim):
        factor = getattr(param.placements[level], "split_factor", None)
        placement = Shard(0) if factor is None else _StridedShard(0, split_factor=factor)
        chunks = param.device_mesh.size(level)
        pieces = [
            part
            for piece in pieces
            for part in placement._split_tensor(piece, chunks, with_padding=False, contiguous=True)[0]
        ]
    return pieces


def _own(param: DTensor, dim: int) -> int:
    """Return which of `_pieces` belongs to this process."""
    place = 0
    for level in _levels(param, dim):
        place = place * param.device_mesh.size(level) + param.device_mesh.get_local_rank(level)
    return place


def _consecutive(index: Tensor) -> bool:
    return len(index) < 2 or bool((index.diff() == 1).all())
