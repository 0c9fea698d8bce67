"""What processes that each hold a part of the model decide together: the gradient norm, and whether to skip a step."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lucid import engine
from lucid.engine.exact_sum import TOTAL_WORDS, WORDS, Count
from lucid.engine.formats import STEP
from lucid.engine.values import shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, ReduceOp
    from torch.distributed.device_mesh import DeviceMesh


class Finding(IntEnum):
    """What a process reports to the others, the worst last."""

    NOTHING = 0
    BAD = 1  # a non-finite gradient, or one that overflows
    FAILED = 2  # an exception before anything was written


class _Kind(NamedTuple):
    """How a parameter is sharded: over which mesh, and for each mesh dimension whether it is sharded along it."""

    mesh: DeviceMesh | None = None
    spread: tuple[bool, ...] = ()

    @classmethod
    def of(cls, param: Tensor) -> _Kind:
        if not engine.shards.is_sharded(param):
            return cls()
        return cls(param.device_mesh, tuple(hasattr(placement, "dim") for placement in param.placements))

    @property
    def is_first_replica(self) -> bool:
        """Whether this process holds the first of several equal replicas, which alone is counted."""
        coordinate = None if self.mesh is None else self.mesh.get_coordinate()
        return coordinate is None or all(
            spread or own == 0 for spread, own in zip(self.spread, coordinate, strict=True)
        )


class Whole(NamedTuple):
    """The observation of a sharded parameter: the `engine.Observed` of all its shards together.

    ``elements``: the number of its elements that were updated; a process without a gradient updates none.
    ``step``: the step count. ``skipped_more``: how many more steps another process has skipped than this one.
    """

    gradient: float
    update: float
    param: float
    elements: float
    ratio: float
    step: float
    skipped_more: float


class Agreement:
    """Agreement between the processes of the parameters' meshes, and those of ``group`` (`shard_group`).

    Every process must call the same methods in the same order. All processes get the same results: sums of squares are
    exact, and other numbers are added in the order of the ranks.
    """

    def __init__(self, params: Sequence[Tensor], group: ProcessGroup | None) -> None:
        self._group = group
        # Where the host exchanges words: on a device if there is one, as other processes do, whose device may decide.
        devices = (param.device for param in params if param.device.type not in ("cpu", "meta"))
        self._device = next(devices, torch.device("cpu"))
        self._reached: dict[str, bool] = {}
        self._meshes: list[DeviceMesh] = []
        self._kinds: list[_Kind] = [] if params else [_Kind()]
        self._kind_of: list[int] = []
        self._spread: list[int] = []  # the rows with sharded parameters
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
        # The kind of each row, or None if all rows are of one kind.
        self.kinds = array("i", self._kind_of) if len(self._kinds) > 1 else None
        # Equal on processes that have the same parameters, sharded over the same meshes.
        self._fingerprint = zlib.crc32(repr(known).encode())
        if group is not None:
            _check_apart(self._meshes, group)

    def knows(self, row: int, param: Tensor) -> bool:
        """Whether a parameter is still sharded as before."""
        return self._kinds[self._kind_of[row]] == _Kind.of(param)

    def __bool__(self) -> bool:
        return bool(self._meshes) or self._group is not None

    @property
    def sharded(self) -> bool:
        """Whether any parameter is sharded, so that observations are exchanged."""
        return bool(self._meshes)

    def reaches(self, device: torch.device) -> bool:
        """Whether the backends of all groups can exchange words on a device."""
        if device.type not in self._reached:
            groups = [group for mesh in self._meshes for group in _groups(mesh)]
            groups += [] if self._group is None else [self._group]
            self._reached[device.type] = all(device.type in _devices(group) for group in groups)
        return self._reached[device.type]

    def total(self, words: list[int]) -> list[int]:
        """Return the words of all processes together. ``words``: those of this process, of each kind of row."""
        if not self:
            return words
        return self.exchange(torch.tensor(words, dtype=torch.int64, device=self._device)).tolist()

    def worst(self, finding: Finding) -> Finding:
        """Return the worst finding of any process, by the same exchange."""
        words = engine.exact_sum.blank(self.kinds)
        if finding is not Finding.NOTHING:
            words[Count.FAILED if finding is Finding.FAILED else Count.BAD] = 1
        return worst_in(self.total(words))

    def exchange(self, words: Tensor) -> Tensor:
        """Add up the words of all processes: one all-reduce for each dimension of each mesh, and one for the group.

        Returns the `TOTAL_WORDS` words of all rows, whose carries need not have been moved up; of the counts, only
        whether they are above 0 means something. ``words``: int64, `TOTAL_WORDS` for each kind of row (`kinds`), each
        word below 2⁴⁰; they are overwritten. It never waits for a device on which ``words`` are, if the backends of all
        groups can reduce there.

        Replicas are counted once: if they differ, the sum is that of the first, and the counts are those of all.
        """
        from torch.distributed import ReduceOp

        of_kind = list(words.view(-1, TOTAL_WORDS).unbind())
        for kind, own in zip(self._kinds, of_kind, strict=True):
            if not kind.is_first_replica:
                own[:WORDS].zero_()
        several = len(of_kind) > 1
        counts = torch.stack([own[WORDS:] for own in of_kind]).sum(0) if several else of_kind[0][WORDS:]
        sums = []
        for mesh in dict.fromkeys(kind.mesh for kind in self._kinds):
            first, *others = (own for kind, own in zip(self._kinds, of_kind, strict=True) if kind.mesh == mesh)
            for own in others:
                first += own
            if several:  # each exchange also tells what has been found in other kinds of rows
                first[WORDS:] = counts
            for group in _groups(mesh):
                _reduce(first, ReduceOp.SUM, group)
            counts = first[WORDS:].clamp(max=1) if several else first[WORDS:]
            sums.append(first)
        total = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
        total[WORDS:] = counts
        if len(self._meshes) > 1:
            # Others may know other meshes. A process that knows more of them has at least as much in each word.
            for mesh in self._meshes:
                for group in _groups(mesh):
                    _reduce(total, ReduceOp.MAX, group)
        if self._group is not None:
            _reduce(total, ReduceOp.SUM, self._group)
        return total

    def observed(
        self,
        rows: Iterable[tuple[int, engine.Seen]],
        params: Sequence[Tensor],
        state: Mapping[Any, Mapping[str, Any]],
        skipped: int,
    ) -> list[tuple[int, engine.Seen]]:
        """Return (row number, observation of the whole parameter), from the observations of this process's shards.

        If any process has updated a sharded row, all processes get its observation. Observations of plain parameters
        are returned unchanged. ``params``: the parameters of all rows. ``skipped``: the number of steps that this
        process has skipped.
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
        """Merge the tables of all processes; return the merged table and the largest number of skipped steps.

        ``table``: float64[parameters, `_COLUMNS`].
        """
        levels = list(self._levels())
        alike = [True] * len(levels)
        for spread in (False, True):  # replicas first, so that each shard is counted once
            for level, (group, kinds) in enumerate(levels):
                own = [row for row in self._spread if kinds.get(self._kind_of[row]) is spread]
                if own:
                    table[own], most, same = _exchanged_rows(table[own], (skipped, self._fingerprint), group, spread)
                    skipped, alike[level] = float(most.amax()), bool((same == self._fingerprint).all())
        # Each mesh has merged only its own parameters. Processes with the same parameters exchange the merged rows.
        for level, (group, _) in enumerate(levels) if len(self._meshes) > 1 else ():
            if alike[level]:
                rows = table[self._spread]
                table[self._spread], most, _ = _exchanged_rows(rows, (skipped, self._fingerprint), group, False)
                skipped = float(most.amax())
        return table, skipped

    def _levels(self) -> Iterator[tuple[ProcessGroup, dict[int, bool]]]:
        """Yield, for each dimension of each mesh, its process group, and {kind: whether it is sharded along it}."""
        for mesh in self._meshes:
            own = {number: kind for number, kind in enumerate(self._kinds) if kind.mesh == mesh}
            for dim, group in enumerate(_groups(mesh)):
                yield group, {number: kind.spread[dim] for number, kind in own.items()}


def worst_in(total: Sequence[int]) -> Finding:
    """Return the worst finding of any process, from the words of all."""
    return Finding.FAILED if total[Count.FAILED] else Finding.BAD if total[Count.BAD] else Finding.NOTHING


_COLUMNS = (*Whole._fields[:-1], "took part")
_ADDED = _COLUMNS.index("ratio")  # the columns before it are sums over elements


def _exchanged_rows(
    table: Tensor, numbers: tuple[float, float], group: ProcessGroup, added: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge rows of `_COLUMNS` over a group; return them and, for each of two `numbers`, those of all processes.

    ``added``: whether the processes hold different shards, whose sums are added; replicas take the largest.
    """
    *columns, first, second = _exchanged([*table.flatten().tolist(), *numbers], group)
    every = torch.stack(columns).view(*table.shape, -1)
    merged = every.amax(-1)
    if added:
        merged[:, :_ADDED] = every[:, :_ADDED].sum(-1)
    return merged, first, second


def _check_apart(meshes: Sequence[DeviceMesh], group: ProcessGroup) -> None:
    """Raise if `group` would count the shards of a DTensor twice."""
    from torch import distributed

    named = set(distributed.get_process_group_ranks(group))
    for mesh in meshes:
        if mesh.get_coordinate() is not None and len(named & set(mesh.mesh.flatten().tolist())) > 1:
            raise ValueError(
                "shard_group: expected processes that share no DTensor parameter, got a group with several processes "
                f"of {mesh}; remove shard_group, because DTensors do not need it"
            )


def checked_group(value: Any) -> ProcessGroup | None:
    """Return `value`; raise unless it is None or a process group."""
    if value is None:
        return None
    from torch import distributed

    if not distributed.is_available() or not isinstance(value, distributed.ProcessGroup):
        raise TypeError(
            "shard_group: expected None or a torch.distributed.ProcessGroup that contains this process, "
            f"got {shown(value)}"
        )
    return value


def _groups(mesh: DeviceMesh | None) -> list[ProcessGroup]:
    """Return the process groups of a mesh's dimensions, if this process is in the mesh."""
    return [] if mesh is None or mesh.get_coordinate() is None else mesh.get_all_groups()


def _devices(group: ProcessGroup) -> list[str]:
    """Return the types of devices that a group's backends can use."""
    from torch import distributed

    return [each.split(":")[0] for each in distributed.get_backend_config(group).split(",")]


def _reduce(words: Tensor, operation: ReduceOp.RedOpType, group: ProcessGroup) -> None:
    """Reduce words over a group, in place; on another device only if the group has no backend for theirs."""
    from torch import distributed

    devices = _devices(group)
    sent = words if words.device.type in devices else words.to(devices[0])
    distributed.all_reduce(sent, operation, group=group)
    if sent is not words:
        words.copy_(sent)


def _exchanged(values: Sequence[float], group: ProcessGroup) -> list[Tensor]:
    """Return, for each value, the values of all processes in the order of their ranks, as float64 on the CPU."""
    from torch import distributed

    devices = _devices(group)
    own = torch.tensor(values, dtype=torch.float64, device="cpu" if "cpu" in devices else devices[0])
    every = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(every, own, group=group)
    return list(torch.stack(every, dim=1).cpu())
