"""What processes that each hold a part of the model find out together: the norm of all gradients, whether to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lucid import engine

from .values import shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Finding(IntEnum):
    """What a process has to tell the others, the worst last."""

    NOTHING = 0
    BAD = 1  # a gradient that is not finite
    FAILED = 2  # an exception before anything was written


class Agreement:
    """The processes over which parameters are spread: those of their meshes, and of a group that has been named.

    Every process has to ask the same questions in the same order. Each gets the same answers: it adds up what the
    others have sent in the order of their ranks.
    """

    def __init__(self, params: Sequence[Tensor], group: ProcessGroup | None) -> None:
        self._group = group
        self._meshes: list[DeviceMesh] = []
        self._kinds: list[tuple[DeviceMesh | None, tuple[bool, ...]]] = []  # how a parameter may be spread
        self._kind_of: list[int] = []
        for param in params:
            kind: tuple[DeviceMesh | None, tuple[bool, ...]] = (None, ())
            if engine.shards.is_sharded(param):
                kind = (param.device_mesh, tuple(hasattr(placement, "dim") for placement in param.placements))
                if param.device_mesh not in self._meshes:
                    self._meshes.append(param.device_mesh)
            if kind not in self._kinds:
                self._kinds.append(kind)
            self._kind_of.append(self._kinds.index(kind))

    def __bool__(self) -> bool:
        return bool(self._meshes) or self._group is not None

    def square_sum(self, plan: engine.Plan, finding: Finding) -> tuple[float, Finding]:
        """Return the sum of the squares of all gradients, of which `plan` has measured its own; the worst finding."""
        if len(self._kinds) == 1:
            return self._together([plan.square_sum()], finding)
        sums: list[list[float]] = [[] for _ in self._kinds]
        for row, square in plan.squares():
            sums[self._kind_of[row]].append(square)
        return self._together([engine.ordered_sum(each) for each in sums], finding)

    def worst(self, finding: Finding, *, of_parts: bool = False) -> Finding:
        """Return the worst finding of any process, or of those that hold parts of the same parameters."""
        return self._together([0.0] * len(self._kinds), finding, of_parts=of_parts)[1]

    def observed(self, rows: Sequence[tuple[int, engine.Observed]]) -> list[tuple[int, engine.Observed]]:
        """Return what the updates of parameters were like, of each by its row number, from what those of parts were."""
        if not self._meshes or not rows:
            return list(rows)
        table = torch.tensor([seen for _, seen in rows], dtype=torch.float64)
        for group, spread in self._levels():
            parts = torch.stack(_exchanged(table.flatten().tolist(), group)).view(*table.shape, -1)
            whole = torch.cat([parts[:, :-1].sum(-1), parts[:, -1:].amax(-1)], dim=1)
            table = torch.where(torch.tensor([[spread[self._kind_of[row]]] for row, _ in rows]), whole, table)
        return [(row, engine.Observed(*seen)) for (row, _), seen in zip(rows, table.tolist(), strict=True)]

    def _levels(self) -> Iterator[tuple[ProcessGroup, list[bool]]]:
        """The groups of processes along each dimension of each mesh, and whether each kind is spread over it."""
        for mesh in self._meshes:
            for dim in range(mesh.ndim) if mesh.get_coordinate() is not None else ():
                yield mesh.get_group(dim), [own == mesh and spread[dim] for own, spread in self._kinds]

    def _together(self, sums: list[float], finding: Finding, *, of_parts: bool = False) -> tuple[float, Finding]:
        for group, spread in self._levels():
            *columns, findings = _exchanged([*sums, finding], group)
            finding = Finding(int(findings.max()))
            for kind, column in enumerate(columns):
                if spread[kind]:
                    sums[kind] = engine.ordered_sum(column)
        total = engine.ordered_sum(sums)
        if self._group is not None and not of_parts:
            totals, findings = _exchanged([total, finding], self._group)
            total, finding = engine.ordered_sum(totals), Finding(int(findings.max()))
        return total, finding


def checked_group(value: Any) -> ProcessGroup | None:
    """Return `value`; raise unless it is None or a process group."""
    if value is None:
        return None
    from torch import distributed

    if not distributed.is_available() or not isinstance(value, distributed.ProcessGroup):
        raise TypeError(
            "shard_group: expected None or a torch.distributed.ProcessGroup that this process is in, "
            f"got {shown(value)}"
        )
    return value


def _exchanged(values: Sequence[float], group: ProcessGroup) -> list[Tensor]:
    """Return for each of the values what every process gave, float64 on the CPU, in the order of their ranks."""
    from torch import distributed

    kinds = [each.split(":")[0] for each in distributed.get_backend_config(group).split(",")]
    own = torch.tensor(values, dtype=torch.float64, device="cpu" if "cpu" in kinds else kinds[0])
    every = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(every, own, group=group)
    return list(torch.stack(every, dim=1).cpu())
