"""Checkpoints that were written once and must load for ever; ``make.py`` says how."""
