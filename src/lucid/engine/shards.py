"""Tensors that are spread over processes (DTensor): what this process holds of one, and where it lies in the whole.

torch's package for them is large, and is looked for only where it has been imported: nobody has such a tensor without.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from . import codecs, cpu

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Numbering(NamedTuple):
    """Which numbers the elements of a part have in the whole, both in row-major order.

    They come in runs of `run` consecutive numbers: the first begins at `first`, each next one `stride` further.
    """

    first: int
    run: int
    stride: int

    def numbers(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return the number of each element of a part of `shape`, int64."""
        index = torch.arange(shape.numel(), dtype=torch.int64, device=device)
        return (self.first + index // self.run * self.stride + index % self.run).view(shape)


WHOLE = Numbering(0, 2**62, 0)


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether `tensor` is spread over processes; it may be the same on all of them."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    if kind is None or type(tensor) is not kind:
        return False
    cpu.connect_sharded(kind)
    return True


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, which may be all of it."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor._local_tensor
    return part.wait() if hasattr(part, "wait") else part  # for a collective that is still under way


def spread_like(param: Tensor, part: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the tensor of `shape` that is spread as `param` is, of which this process holds `part`."""
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    whole = torch.empty(tuple(shape), device="meta")
    stride = whole.stride() if part.is_contiguous() else param.stride()
    meta = TensorMeta(whole.shape, stride, part.dtype)
    # Not from_local(), which moves what lies on the CPU to the mesh's device.
    spec = DTensorSpec(param.device_mesh, param.placements, tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def alike(tensor: Tensor, param: Tensor) -> bool:
    """Whether two tensors are spread in the same way, or both are not."""
    if not is_sharded(tensor) or not is_sharded(param):
        return is_sharded(tensor) == is_sharded(param)
    return tensor.device_mesh == param.device_mesh and tensor.placements == param.placements


def part_of(value: Tensor, param: Tensor, what: str) -> Tensor:
    """Return the part of `value` that this process holds, or would hold if it were spread as `param` is.

    All of a plain tensor is here to choose from; what is spread otherwise is exchanged between the processes, each of
    which has to ask for it.
    """
    if alike(value, param):
        return local(value)
    if not is_sharded(param):
        raise ValueError(f"{what} is spread over processes, but the parameter is not; give its full_tensor()")
    if not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        parts = distribute_tensor(value.detach(), param.device_mesh, param.placements, src_data_rank=None)
        return local(parts).to(local(param).device)
    if value.device_mesh != param.device_mesh:
        raise ValueError(
            f"{what} is spread over {value.device_mesh}, expected {param.device_mesh} like the parameter; "
            "load it with torch.distributed.checkpoint, which reshards"
        )
    return local(value.redistribute(placements=param.placements))


def check_placements(param: Tensor, name: str) -> None:
    """Raise where the parts of `param` are to be added up before they are its values."""
    if is_sharded(param) and any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"{name} is a partial sum on each process (placements {param.placements}), which no step can update; "
            "redistribute() it to Replicate() or Shard()"
        )


def check_blocks(param: Tensor, name: str) -> None:
    """Raise where processes share a block of `param`, or keep its scales on another process than its codes."""
    inner = _sharded_dims(param) - {0}
    if not is_sharded(param) or not inner:
        return
    over = [i for i, placement in enumerate(param.placements) if getattr(placement, "dim", None) == 1]
    if inner == {1} and len(over) == 1:
        processes = param.device_mesh.size(over[0])
        own = math.ceil(param.shape[1] / processes) * math.prod(param.shape[2:])
        if own == math.ceil(codecs.blocks(param.shape) / processes) * codecs.BLOCK:
            return
    raise ValueError(
        f'{name} is spread with {param.placements}, which cuts the blocks of {codecs.BLOCK} elements that "8bit" gives '
        'one scale; shard it by dim 0, or by dim 1 in multiples of a block, or set state_format="bf16" for its group'
    )


def numbering(param: Tensor, name: str) -> Numbering:
    """Return which numbers in `param` the elements have that this process holds; raise where they follow no rule."""
    if not is_sharded(param) or not local(param).numel():
        return WHOLE
    inner = sorted(_sharded_dims(param) - {0})
    ranges = {dim: _range(param, dim) for dim in _sharded_dims(param)}
    if len(inner) > 1 or any(found is None for found in ranges.values()):
        raise ValueError(
            f"{name} is spread with {param.placements}, for which formats that round at random have no numbering; "
            'set state_format="fp32" for its group, or shard it by at most one dimension besides the first'
        )
    first = (ranges.get(0) or (0, 0))[0] * math.prod(param.shape[1:])
    if not inner:
        return WHOLE._replace(first=first)
    begin, size = ranges[inner[0]] or (0, 0)
    rest = math.prod(param.shape[inner[0] + 1 :])
    return Numbering(first + begin * rest, size * rest, param.shape[inner[0]] * rest)


def _sharded_dims(param: Tensor) -> set[int]:
    if not is_sharded(param):
        return set()
    return {placement.dim for placement in param.placements if hasattr(placement, "dim")}


def _range(param: DTensor, dim: int) -> tuple[int, int] | None:
    """The first index of a dimension that this process holds, and how many; None where they are not consecutive."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    def of_dim(placement: Any) -> Any:
        if getattr(placement, "dim", None) != dim:
            return Replicate()
        return _StridedShard(0, split_factor=placement.split_factor) if hasattr(placement, "split_factor") else Shard(0)

    index = torch.arange(param.shape[dim], device=param.device_mesh.device_type)
    placements = [of_dim(placement) for placement in param.placements]
    held = local(distribute_tensor(index, param.device_mesh, placements, src_data_rank=None))
    first, count = int(held[0]), len(held)
    return (first, count) if int(held[-1]) - first == count - 1 and bool((held.diff() == 1).all()) else None
