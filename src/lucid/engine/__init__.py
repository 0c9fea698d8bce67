"""How a step runs: a plan of rows, and the engines that update them.

``cpu`` is C++ (``csrc/``), ``cuda`` Triton, ``reference`` plain torch operations on any device: the definition that
every other engine equals bit for bit. A row's engine is chosen by its parameter's device.
"""

from . import cpu, cuda, shards
from .observed import Observed, Seen
from .plan import Plan, name_for, only
from .reference import ordered_sum
from .row import COMPUTE, Row, check_memory, check_param, checked_gradient, has_memory, is_plain
from .scalars import Decision, Recipe, Scalars

__all__ = [
    "COMPUTE",
    "Decision",
    "Observed",
    "Plan",
    "Recipe",
    "Row",
    "Scalars",
    "Seen",
    "check_memory",
    "check_param",
    "checked_gradient",
    "cpu",
    "cuda",
    "has_memory",
    "is_plain",
    "name_for",
    "only",
    "ordered_sum",
    "shards",
]
