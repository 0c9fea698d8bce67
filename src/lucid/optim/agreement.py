"""What processes that each hold a part of the model decide together: the gradient norm, and whether to step."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lucid import engine

from .formats import STEP
from .values import shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Finding(IntEnum):
    """What a process reports to the others, the worst last."""

    NOTHING = 0
    BAD = 1  # a non-finite gradient
    FAILED = 2  # an exception before anything was written


class _Kind(NamedTuple):
    """How a parameter is sharded: on which mesh, and along which mesh dimensions."""

    mesh: DeviceMesh | None = None
    spread: tuple[bool, ...] = ()

    @classmethod
    def of(cls, param: Tensor) -> _Kind:
        if not engine.shards.is_sharded(param):
            return cls()
        return cls(param.device_mesh, tuple(hasattr(placement, "dim") for placement in param.placements))


class Whole(NamedTuple):
    """What the step of a parameter was like that is spread over processes: an `engine.Observed` of all its parts.

    ``elements``: how many of its elements were updated; those of a process that has no gradient are not.
    ``skipped_more``: how many more steps another process has left out than this one.
    """

    gradient: float
    update: float
    param: float
    elements: float
    ratio: float
    step: float
    skipped_more: float


class Agreement:
    """Agreement between the processes of the parameters' meshes, and those of `shard_group`.

    Every process has to call the same methods in the same order. All get the same results, because each adds the
    numbers of all processes in the order of their ranks.
    """

    def __init__(self, params: Sequence[Tensor], group: ProcessGroup | None) -> None:
        self._group = group
        self._meshes: list[DeviceMesh] = []
        self._kinds: list[_Kind] = []
        self._kind_of: list[int] = []
        self._spread: list[int] = []  # rows
        known: list[tuple[tuple[int, ...], int]] = []
        for row, param in enumerate(params):
            kind = _Kind.of(param)
            if kind.mesh is not None and kind.mesh not in self._meshes:
                self._meshes.append(kind.mesh)
            if kind not in self._kinds:
                self._kinds.append(kind)
            self._kind_of.append(self._kinds.index(kind))
            if kind.mesh is not None:
                self._spread.append(row)
                known.append((tuple(param.shape), self._meshes.index(kind.mesh)))
        # A number that is the same on processes that have the same parameters spread over the same meshes.
        self._fingerprint = zlib.crc32(repr(known).encode())
        if group is not None:
            _check_apart(self._meshes, group)

    def knows(self, row: int, param: Tensor) -> bool:
        """Whether a parameter is still sharded as before."""
        return self._kinds[self._kind_of[row]] == _Kind.of(param)

    def __bool__(self) -> bool:
        return bool(self._meshes) or self._group is not None

    def square_sum(self, plan: engine.Plan, finding: Finding) -> tuple[float, Finding]:
        """Return the sum of squares of all gradients, of which `plan` measured this process's part, and the worst."""
        if len(self._kinds) == 1:
            return self._together([plan.square_sum()], finding)
        sums: list[list[float]] = [[] for _ in self._kinds]
        for row, square in plan.squares():
            sums[self._kind_of[row]].append(square)
        return self._together([engine.ordered_sum(each) for each in sums], finding)

    def worst(self, finding: Finding) -> Finding:
        """Return the worst finding of any process."""
        return self._together([0.0] * len(self._kinds), finding)[1]

    def observed(
        self,
        rows: Iterable[tuple[int, engine.Seen]],
        params: Sequence[Tensor],
        state: Mapping[Any, Mapping[str, Any]],
        skipped: int,
    ) -> list[tuple[int, engine.Seen]]:
        """Return what the updates of whole parameters were like, from what those of the parts here were, by row number.

        A row that any process has updated comes back on all of them. ``params``: of all rows. ``skipped``: how many
        steps this process has left out. Parameters that are not spread are told of as they are here.
        """
        if not self._meshes:
            return list(rows)
        here: list[tuple[int, engine.Seen]] = []
        table = [[0.0] * len(_COLUMNS) for _ in params]
        for row, seen in rows:
            if row not in self._spread:
                here.append((row, seen))
                continue
            gradient, update, param, ratio = seen
            elements, step = engine.shards.local(params[row]).numel(), float(state[params[row]][STEP])
            table[row] = [gradient, update, param, elements, ratio, step, 1.0]
        merged, most = self._merged(torch.tensor(table, dtype=torch.float64, device="cpu"), skipped)
        more = most - skipped
        return here + [
            (row, Whole._make([*merged[row, :-1].tolist(), more])) for row in self._spread if merged[row, -1]
        ]

    def _merged(self, table: Tensor, skipped: float) -> tuple[Tensor, float]:
        """Return the table of `_COLUMNS`, a row for each parameter, of all processes, and the most steps skipped."""
        levels = list(self._levels())
        alike = [True] * len(levels)
        for spread in (False, True):  # first what replicas of a part know, so that each part is counted once
            for level, (group, kinds) in enumerate(levels):
                own = [row for row in self._spread if kinds.get(self._kind_of[row]) is spread]
                if own:
                    table[own], most, same = _exchanged_rows(table[own], (skipped, self._fingerprint), group, spread)
                    skipped, alike[level] = float(most.amax()), bool((same == self._fingerprint).all())
        # What one mesh knows the others do not: its processes ask each other where all have the same parameters.
        for level, (group, _) in enumerate(levels) if len(self._meshes) > 1 else ():
            if alike[level]:
                rows = table[self._spread]
                table[self._spread], most, _ = _exchanged_rows(rows, (skipped, self._fingerprint), group, False)
                skipped = float(most.amax())
        return table, skipped

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


_COLUMNS = (*Whole._fields[:-1], "took part")
_ADDED = _COLUMNS.index("ratio")  # those before it are sums over elements


def _exchanged_rows(
    table: Tensor, numbers: tuple[float, float], group: ProcessGroup, added: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of `_COLUMNS` of what all processes have in theirs, of parts or of replicas, and their numbers."""
    *columns, first, second = _exchanged([*table.flatten().tolist(), *numbers], group)
    every = torch.stack(columns).view(*table.shape, -1)
    merged = every.amax(-1)
    if added:
        merged[:, :_ADDED] = every[:, :_ADDED].sum(-1)
    return merged, first, second


def _check_apart(meshes: Sequence[DeviceMesh], group: ProcessGroup) -> None:
    """Raise if processes would count their shards of a DTensor twice."""
    from torch import distributed

    named = set(distributed.get_process_group_ranks(group))
    for mesh in meshes:
        if mesh.get_coordinate() is not None and len(named & set(mesh.mesh.flatten().tolist())) > 1:
            raise ValueError(
                "shard_group: expected processes that share no DTensor parameter, got a group that shares several with "
                f"{mesh}; remove shard_group, DTensors do not need it"
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
    """Return, for each value, the values of all processes in the order of their ranks, as float64 on the CPU."""
    from torch import distributed

    kinds = [each.split(":")[0] for each in distributed.get_backend_config(group).split(",")]
    own = torch.tensor(values, dtype=torch.float64, device="cpu" if "cpu" in kinds else kinds[0])
    every = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(every, own, group=group)
    return list(torch.stack(every, dim=1).cpu())
