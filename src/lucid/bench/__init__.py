"""Timing optimizer steps: what the command ``lucid bench`` and this project's own benchmarks share.

Needs what the extra ``cli`` brings.
"""
