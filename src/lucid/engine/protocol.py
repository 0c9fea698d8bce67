"""What an engine is: five methods, which `lucid.engine.plan.Plan` calls on each engine of a step in turn."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from .observed import Seen
from .row import Row
from .scalars import Recipe, ScalarTable
from .verdict import Verdict


class StepOrder(NamedTuple):
    """What the engines need to know about one step.

    ``recipes``: one for each set of scalars. ``table``: the scalars made from the recipes, or None if the device makes
    them. ``verdict``: the factor for the gradients, or what the device needs to decide. ``state_box``: as in
    `Plan.gather`. ``threads``: the most CPU threads to use. ``observe``: whether to return an `Observed` for each row.
    ``counts``: whether the host counts the step; it does not count a captured step, which runs at each replay.
    """

    recipes: Sequence[Recipe]
    table: ScalarTable[float] | None
    verdict: Verdict
    state_box: list[Any]
    threads: int
    observe: bool
    counts: bool


class Engine(Protocol):
    """Updates the rows that are bound to it.

    A step calls ``bind`` for each row, ``measure`` if the host needs the gradient norm, then ``prepare``, ``write`` and
    ``release``.
    """

    def bind(self, row: Row) -> None:
        """Add a checked row to this step; raise ValueError if the engine cannot use its memory."""

    def measure(self, scale: float, kinds: array[int] | None) -> list[int]:
        """Return the words of the exact sum of the squares of this step's gradients, with carries moved up.

        These are the `exact_sum.TOTAL_WORDS` words of the rows of kind 0, then those of kind 1, and so on. ``scale``:
        GradScaler's scale of the gradients. ``kinds``: the kind of each row of the plan, None if all are of kind 0.
        """

    def prepare(self, order: StepOrder) -> None:
        """Do everything that can fail (compute, allocate, compile); write nothing that the user sees."""

    def write(self) -> list[tuple[int, Seen]]:
        """Update every row; return (row number, observation) of each row if the step is observed.

        Nothing fails after the first write. If an interrupt has stopped it, a second call does the rest.
        """

    def release(self) -> None:
        """End the step, written or not; drop the references to its gradients."""
