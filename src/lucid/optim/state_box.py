"""Holds an optimizer's state, and knows whether somebody may have changed it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

State = defaultdict[Any, Any]


class StateBox:
    """The state of an optimizer, or of one of its parameters.

    If nobody has read the state since the last step, and nobody else holds a reference to a part of it, it is
    unchanged, and the next step need not read it. ``cells`` is [state, whether somebody has read it since the last
    step]. It must hold the only reference to the state, because the engine counts references.
    `replace` makes new cells, so a running step ends on the state that it began with (`now`).
    """

    __slots__ = ("cells",)

    def __init__(self, state: dict[Any, Any] | None = None) -> None:
        self.cells: list[Any] = [defaultdict(dict) if state is None else state, True]

    @classmethod
    def of_one(cls, param: Tensor, entry: dict[str, Any] | None) -> StateBox:
        """Return a box with the state of one parameter; ``entry`` is its entry in the optimizer's state."""
        return cls({} if entry is None else {param: entry})

    def peek(self) -> State:
        """Return the state to a caller that neither changes nor keeps it."""
        state: State = self.cells[0]
        return state

    def open(self) -> State:
        """Return the state to a caller that may change it; the next step reads all of it."""
        self.cells[1] = True
        return self.peek()

    def replace(self, state: State) -> None:
        """Replace the state."""
        self.cells = [state, True]

    def now(self) -> StateBox:
        """Return a box with the same cells, which keeps them if this box gets another state."""
        found = StateBox.__new__(StateBox)
        found.cells = self.cells
        return found

    def entry(self, param: Tensor, name: str) -> dict[str, Any]:
        """Return the parameter's state, or a new dict if it has none; raise if its state is not a dict."""
        entry = self.peek().get(param, {})
        if not isinstance(entry, dict):
            raise TypeError(f"state of {name}: expected a dict, got {type(entry).__name__}")
        return entry
