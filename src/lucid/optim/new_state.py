"""The new state of a step, which users see only after all checks have passed."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .state_box import StateBox


class NewEntry(NamedTuple):
    """New state of one parameter that users do not see yet."""

    param: Tensor
    gradient: Tensor
    entry: dict[str, Any]
    missing: dict[str, Tensor]


class NewState:
    """The new state of a step, which is adopted after all checks have passed.

    ``memory``: the memory of norms and what it becomes, if a spike is looked for.
    """

    def __init__(self, boxes: list[StateBox]) -> None:
        self.entries: list[NewEntry] = []
        self._boxes = boxes
        self._before: list[tuple[bool, dict[str, Any]]] = []
        self.memory: tuple[list[Any], list[Any]] | None = None

    def adopt(self) -> None:
        """Add it to the optimizer's state, where users see it."""
        if self.memory is not None:
            self.exchange_memory()
        if not self.entries:
            return
        self._before = [(item.param in self._boxes[0].peek(), dict(item.entry)) for item in self.entries]
        states = [box.open() for box in self._boxes[1:]] + [self._boxes[0].peek()]
        for item in self.entries:
            item.entry.update(item.missing)
            for state in states:
                state[item.param] = item.entry

    def abandon(self) -> None:
        """Remove it from the optimizer's state again."""
        self.exchange_memory()
        states = [box.open() for box in self._boxes[1:]] + [self._boxes[0].peek()]
        for item, (known, before) in zip(self.entries, self._before, strict=bool(self._before)):
            item.entry.clear()
            item.entry.update(before)
            if not known:
                for state in states:
                    state.pop(item.param, None)

    def exchange_memory(self) -> None:
        """Make the memory of norms what it becomes, or what it was."""
        if self.memory is not None:
            memory, other = self.memory
            memory[:], other[:] = other, memory.copy()
