"""lucid: optimizers for PyTorch that run on an engine of their own."""

__version__ = "0.1.0"
