"""What `Optimizer.observe` measures for one parameter in one step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Observed(NamedTuple):
    """Sums of squares over the elements of the gradient (before unscaling and clipping), the update, the new parameter.

    All values are in the compute type, before they are rounded for storage. ``ratio`` is the largest |m|/√v of an
    element, with amsgrad |m|/√w. These numbers are for monitoring: engines agree to about 1e-6, not to the bit, and
    only if no square underflows or overflows.
    """

    gradient: float
    update: float
    param: float
    ratio: float


# The four numbers of an `Observed`. They may still be on a device; iterating over them waits for it.
Seen = Iterable[float]
