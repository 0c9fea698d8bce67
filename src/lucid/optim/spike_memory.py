"""The memory of `spike_threshold` in the groups: one list, in each group, so that every checkpoint tool carries it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lucid.engine.spikes import MOST_IN_A_ROW, SPAN, TOO_LARGE, Memory
from lucid.engine.values import shown

from .groups import ParamGroup
from .matching import SPIKES


def shared_memory(groups: Sequence[ParamGroup]) -> list[Any]:
    """Return the memory, which all groups share from now on: that of the first that has one, or a blank one.

    Raises ValueError, and changes nothing, if it is not one.
    """
    found = next((group[SPIKES] for group in groups if SPIKES in group), None)
    memory = list(Memory()) if found is None else checked(found)
    for group in groups:
        if dict.get(group, SPIKES) is not memory:
            dict.__setitem__(group, SPIKES, memory)
    return memory


def checked(value: Any) -> list[Any]:
    """Return a memory as a list, the same object if it is a list; raise if it is none."""
    if isinstance(value, list | tuple) and len(value) == 4:
        mean, square, seen, in_a_row = value
        if (
            all(type(each) is float and 0 <= each < math.inf for each in (mean, square))
            and all(type(each) is int for each in (seen, in_a_row))
            and mean < TOO_LARGE
            and 0 <= seen <= SPAN
            and 0 <= in_a_row < MOST_IN_A_ROW
        ):
            return value if type(value) is list else list(value)
    raise ValueError(
        f"{SPIKES}: expected [mean norm, mean squared distance, norms seen, spikes in a row], got {shown(value)}; "
        f"remove the key {SPIKES!r} from all groups to begin anew"
    )
