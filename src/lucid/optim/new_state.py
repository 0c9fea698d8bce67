"""The new state of a step, which users see only after all checks have passed."""

from __future__ import annotations

from collections.abc import Iterable
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
    """The new state of a step, which is adopted after all checks have passed."""

    def __init__(self, boxes: list[StateBox]) -> None:
        self.entries: list[NewEntry] = []
        self._boxes = boxes
        self._before: list[tuple[bool, dict[str, Any]]] = []
        self._memory: list[Any] = []  # of norms, if a spike is looked for
        self._memories: list[list[Any]] = []  # before and after this step

    def remember(self, memory: list[Any], after: Iterable[Any]) -> None:
        """Make a memory of norms another one when the state is adopted."""
        self._memory, self._memories = memory, [memory.copy(), list(after)]

    def adopt(self) -> None:
        """Add it to the optimizer's state, where users see it."""
        if self._memories:
            self._memory[:] = self._memories[1]
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
        if self._memories:
            self._memory[:] = self._memories[0]
        states = [box.open() for box in self._boxes[1:]] + [self._boxes[0].peek()]
        for item, (known, before) in zip(self.entries, self._before, strict=bool(self._before)):
            item.entry.clear()
            item.entry.update(before)
            if not known:
                for state in states:
                    state.pop(item.param, None)
