"""How a step runs: a plan of rows, and the engines that update them.

``cpu`` is C++ (``csrc/``), ``cuda`` is Triton, and ``reference`` is plain torch operations on any device. The reference
engine defines the bits: every other engine gives the same. The device of a row's parameter decides its engine.
"""

from . import cpu, cuda, pinned, shards
from .choice import in_place, name_for, only
from .cpu import hold
from .observed import Observed, Seen
from .plan import Plan
from .protocol import StepOrder
from .row import COMPUTE, Row, RowFormat, check_memory, check_param, checked_gradient, has_memory, is_plain
from .scalars import Recipe, Scalars, table
from .step_counts import OtherFailedError, StepCounts
from .verdict import UNJUDGED, DeviceVerdict, HostVerdict, Verdict

__all__ = [
    "COMPUTE",
    "UNJUDGED",
    "DeviceVerdict",
    "HostVerdict",
    "Observed",
    "OtherFailedError",
    "Plan",
    "Recipe",
    "Row",
    "RowFormat",
    "Scalars",
    "Seen",
    "StepCounts",
    "StepOrder",
    "Verdict",
    "check_memory",
    "check_param",
    "checked_gradient",
    "cpu",
    "cuda",
    "has_memory",
    "hold",
    "in_place",
    "is_plain",
    "name_for",
    "only",
    "pinned",
    "shards",
    "table",
]
