"""What steps in backward under FSDP2 leave to `step`, because processes must not wait for each other in backward."""

from __future__ import annotations

from torch import Tensor

from lucid import engine

from .agreement import Agreement, Finding


class LeftToStep:
    """What steps in backward leave to the step of all parameters, in which the processes wait for each other.

    ``error``: the first that one of them has raised. ``seen``: the observations of this process's shards.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.error: Exception | None = None
        self.seen: dict[Tensor, engine.Seen] = {}

    def keep(self, error: Exception) -> None:
        """Keep an error, unless there was one before."""
        if self.error is None:
            self.error = error

    def check(self, agreement: Agreement) -> None:
        """Raise if a step in backward failed on any process. All processes call this together."""
        finding = agreement.worst(Finding.FAILED if self.error else Finding.NOTHING)
        if self.error is not None:
            raise self.error
        if finding is Finding.FAILED:
            raise RuntimeError(
                "another process could not update a parameter; its own error says why. Parameters that backward has "
                "updated stay so: load a checkpoint before you continue"
            )
