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
            error.add_note(
                "This happened in backward. Other parameters, and this one on other processes, may have been updated: "
                "load a checkpoint before you continue."
            )
            self.error = error

    def check(self) -> None:
        """Raise the error of this process, if there was one."""
        if self.error is not None:
            raise self.error

    @staticmethod
    def check_uncaptured() -> None:
        """Raise if a step is being captured in a CUDA graph: in its replays nothing could be left to `step`."""
        if engine.cuda.is_capturing():
            raise RuntimeError(
                "a step in backward under FSDP2 is being captured in a CUDA graph, which does not work; call "
                "step_in_backward(False), or step without a graph"
            )

    @staticmethod
    def check_others(agreement: Agreement) -> None:
        """Raise if an update in backward failed on another process, or if one cannot step now."""
        if agreement.worst(Finding.NOTHING) is Finding.FAILED:
            raise RuntimeError(
                "another process could not update a parameter; its own error says why. What backward has updated stays "
                "so: load a checkpoint before you continue"
            )
