"""Timing optimizer steps: the code that ``lucid bench`` and this project's own benchmarks share.

It needs the packages of the extra ``cli``.
"""
