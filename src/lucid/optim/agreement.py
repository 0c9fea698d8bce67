"""What processes that each hold a part of the model find out together: the norm of all gradients, whether to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

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


class _Kind(NamedTuple):
    """How a parameter is spread: over which mesh, and over which of its dimensions in parts."""

    mesh: DeviceMesh | None = None
    spread: tuple[bool, ...] = ()

    @classmethod
    def of(cls, param: Tensor) -> _Kind:
        if not engine.shards.is_sharded(param):
            return cls()
        return cls(param.device_mesh, tuple(hasattr(placement, "dim") for placement in param.placements))


class Agreement:
    """The processes over which parameters are spread: those of their meshes, and of a group that has been named.

    Every process has to ask the same questions in the same order. Each gets the same answers: it adds up what all have
    sent in the order of their ranks.
    """

    def __init__(self, params: Sequence[Tensor], group: ProcessGroup | None) -> None:
        self._group = group
        self._meshes: list[DeviceMesh] = []
        self._kinds: list[_Kind] = []
        self._kind_of: list[int] = []
        for param in params:
            kind = _Kind.of(param)
            if kind.mesh is not None and kind.mesh not in self._meshes:
                self._meshes.append(kind.mesh)
            if kind not in self._kinds:
                self._kinds.append(kind)
            self._kind_of.append(self._kinds.index(kind))
        if group is not None:
            _check_apart(self._meshes, group)

    def knows(self, row: int, param: Tensor) -> bool:
        """Whether a parameter is still spread as it was."""
        return self._kinds[self._kind_of[row]] == _Kind.of(param)

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

    def worst(self, finding: Finding) -> Finding:
        """Return the worst finding of any process."""
        return self._together([0.0] * len(self._kinds), finding)[1]

    def observed(self, rows: Sequence[tuple[int, engine.Seen]]) -> list[tuple[int, engine.Seen]]:
        """Return what the updates of parameters were like, of each by its row number, from what those of parts were."""
        if not self._meshes:
            return list(rows)
        table = torch.zeros(len(self._kind_of), 4, dtype=torch.float64, device="cpu")
        for row, seen in rows:
            table[row] = torch.tensor(list(seen), dtype=torch.float64, device="cpu")
        for group, kinds in self._levels():
            own = [row for row, kind in enumerate(self._kind_of) if kind in kinds]
            parts = torch.stack(_exchanged(table[own].flatten().tolist(), group)).view(len(own), 4, -1)
            whole = torch.cat([parts[:, :-1].sum(-1), parts[:, -1:].amax(-1)], dim=1)
            spread = torch.tensor([[kinds[self._kind_of[row]]] for row in own], device="cpu")
            table[own] = torch.where(spread, whole, parts.amax(-1))
        return [(row, engine.Observed(*table[row].tolist())) for row, _ in rows]

    def _levels(self) -> Iterator[tuple[ProcessGroup, dict[int, bool]]]:
        """The processes along each dimension of each mesh; the kinds of that, and whether each is spread over it."""
        for mesh in self._meshes:
            for dim in range(mesh.ndim) if mesh.get_coordinate() is not None else ():
                own = {number: kind for number, kind in enumerate(self._kinds) if kind.mesh == mesh}
                yield mesh.get_group(dim), {number: kind.spread[dim] for number, kind in own.items()}

    def _together(self, sums: list[float], finding: Finding) -> tuple[float, Finding]:
        for group, kinds in self._levels():
            *columns, findings = _exchanged([*(sums[kind] for kind in kinds), finding], group)
            finding = Finding(int(findings.max()))
            for (kind, spread), column in zip(kinds.items(), columns, strict=True):
                # Replicas have the same; where they have not, all take the same one.
                sums[kind] = engine.ordered_sum(column) if spread else float(column.amax())
        total = sums[0] if len(sums) == 1 else engine.ordered_sum(sums)
        for group, _ in self._levels() if len(self._meshes) > 1 else ():  # what one mesh knows the others do not
            totals, findings = _exchanged([total, finding], group)
            total, finding = float(totals.amax()), Finding(int(findings.max()))
        if self._group is not None:
            totals, findings = _exchanged([total, finding], self._group)
            total, finding = engine.ordered_sum(totals), Finding(int(findings.max()))
        return total, finding


def _check_apart(meshes: Sequence[DeviceMesh], group: ProcessGroup) -> None:
    """Raise where processes would count what they hold of a DTensor twice."""
    from torch import distributed

    named = set(distributed.get_process_group_ranks(group))
    for mesh in meshes:
        if mesh.get_coordinate() is not None and len(named & set(mesh.mesh.flatten().tolist())) > 1:
            raise ValueError(
                "shard_group: expected no processes over which DTensor parameters are spread already, got a group that "
                f"shares some with {mesh}; leave shard_group away, DTensors need none"
            )


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
