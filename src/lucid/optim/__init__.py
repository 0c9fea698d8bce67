"""Optimizers for PyTorch models: ``torch.optim``'s interface on an engine of our own."""

from .adamw import AdamW
from .optimizer import Optimizer

__all__ = ["AdamW", "Optimizer"]
