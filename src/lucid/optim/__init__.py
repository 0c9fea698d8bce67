"""Optimizers for PyTorch models: ``torch.optim``'s interface on an engine of our own."""

from .adamw import AdamW
from .decay import DecayGroups, decay_groups
from .optimizer import Optimizer

__all__ = ["AdamW", "DecayGroups", "Optimizer", "decay_groups"]
