"""What one parameter's step was like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Observed(NamedTuple):
    """Sums of squares over the elements of a gradient as it came, the update and the parameter after it.

    All of values in the compute type, before they are rounded to what is stored. ``ratio`` is the largest |m|/√v of an
    element, with amsgrad |m|/√w. For looking at: engines agree to about 1e-6, where no square under- or overflows.
    """

    gradient: float
    update: float
    param: float
    ratio: float


# The numbers of an `Observed`, which may still be on a device: to iterate over them waits for it.
Seen = Iterable[float]
