"""What a step reads from its optimizer, and what comes of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lucid import engine
from lucid.engine.spikes import Judged

from .gradients import Amp
from .groups import ParamGroup
from .hyperparameters import Reading
from .left_to_step import LeftToStep
from .settings import Settings
from .state_box import StateBox


class Inputs(NamedTuple):
    """What a step reads from its optimizer, each time.

    ``groups``: ``param_groups``; plain dicts in it are wrapped again. ``read``: the function that reads a group.
    ``state``: the box for new state. ``amp``: the values that GradScaler has set. ``skipped``: the number of steps
    skipped so far. ``left``: what steps in backward have left to the step of all parameters, None if FSDP2 calls none.
    """

    groups: list[ParamGroup]
    read: Reading
    settings: Settings
    state: StateBox
    amp: Amp
    skipped: int
    left: LeftToStep | None = None


class Outcome(NamedTuple):
    """The result of an update: whether it was skipped, the gradient norm if it was measured, GradScaler's scale of the
    gradients, the observations, and the verdict on the norm if the host has looked for a spike.

    If the device decided, norm and scale are tensors on the device, and ``skipped`` is False: the host learns of a
    skipped step when the step counts are confirmed.
    """

    skipped: bool
    norm: float | Tensor | None
    scale: float | Tensor
    observed: dict[Tensor, engine.Seen]
    spike: Judged | None = None


UPDATED = Outcome(False, None, 1.0, {})  # of an update whose gradients nobody has judged or observed
