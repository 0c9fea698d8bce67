"""Parameter groups: dicts that store ``beta1`` and ``beta2``, accept the key ``betas``, and tell of unknown keys."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, KeysView, Mapping, Sequence
from collections.abc import Set as AbstractSet
from difflib import get_close_matches
from itertools import islice
from typing import Any, Self

import numpy as np
from torch import Tensor

from lucid.engine.told import warn
from lucid.engine.values import readable, shown

_MISSING = object()

_read: set[str] = set()  # the names of hyperparameters, from `add_read`
# The options of the optimizer, which no group has. ZeroRedundancyOptimizer copies them into the groups.
OF_OPTIMIZER = ("max_grad_norm", "nonfinite", "spike_threshold", "shard_group", "state_device")
# Keys that are read or written elsewhere: by this package, torch's optimizers and schedulers, Lightning, Transformers.
_KNOWN = {
    *("params", "param_names", "state_version", "spike_memory", "name"),
    *("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"),
    *OF_OPTIMIZER,
    *("initial_lr", "base_lr", "min_lr", "max_lr", "swa_lr", "momentum", "base_momentum", "max_momentum"),
}
_told: set[str] = set()  # keys of which a warning has told


def add_read(keys: Iterable[str]) -> None:
    """Add keys that an optimizer reads in its groups."""
    _read.update(keys)


def _tell(key: object) -> None:
    """Warn, once for each key, that nothing reads it."""
    if not isinstance(key, str) or key in _KNOWN or key in _told:
        return
    _told.add(key)
    nearest = get_close_matches(key, {*_read, "betas"}, 1, cutoff=0.75)
    warn(
        f"param_groups: the optimizer keeps the key {key!r} but does not read it; expected a hyperparameter, "
        + (f"perhaps {nearest[0]!r}" if nearest else "or a key that another tool reads; then ignore this warning"),
        UserWarning,
    )


def tell_misplaced(key: str) -> None:
    """Warn, once for each key, that it is an option of the optimizer and changes nothing in a group."""
    if key not in _told:
        _told.add(key)
        warn(
            f"param_groups: {key!r} is an option of the whole optimizer and changes nothing in a group; give it as an "
            "argument of the optimizer",
            UserWarning,
        )


class ParamGroup(dict[str, Any]):
    """A parameter group, or the defaults of one.

    ``betas`` is a virtual key: torch's schedulers read and write ``beta1`` and ``beta2`` through it. It is not in
    ``keys()``, so nothing is stored twice.

    Examples
    --------
    >>> group = ParamGroup({"beta1": 0.9, "beta2": 0.999})
    >>> group["betas"] = (0.8, 0.99)
    >>> group["beta1"], "betas" in group, sorted(group)
    (0.8, True, ['beta1', 'beta2'])
    """

    def __init__(self, items: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /) -> None:
        super().__init__()
        self.update(items)

    @classmethod
    def saved(cls, items: Mapping[str, Any]) -> Self:
        """Return a group that was saved. No warning tells of its keys: who loads it has not set them."""
        group = cls()
        dict.update(group, {key: value for key, value in items.items() if key != "betas"})
        if "betas" in items:
            group["betas"] = items["betas"]
        return group

    def __contains__(self, key: object) -> bool:
        if key == "betas":
            return super().__contains__("beta1") and super().__contains__("beta2")
        return super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key == "betas" and key in self:
            return (self["beta1"], self["beta2"])
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "betas":
            beta1, beta2 = pair(value)
            super().__setitem__("beta1", beta1)
            super().__setitem__("beta2", beta2)
        else:
            if key not in _read:
                _tell(key)
            super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        if key == "betas" and key in self:
            super().__delitem__("beta1")
            super().__delitem__("beta2")
        else:
            super().__delitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - this is `get`

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, default: Any = _MISSING, /) -> Any:
        if key not in self:
            if default is _MISSING:
                raise KeyError(key)
            return default
        value = self[key]
        del self[key]
        return value

    def update(self, items: Any = (), /, **more: Any) -> None:
        """Set all items; ``betas`` overrides ``beta1`` and ``beta2`` in the same call."""
        new = {**dict(items), **more}
        betas = new.pop("betas", _MISSING)
        for key, value in new.items():
            self[key] = value
        if betas is not _MISSING:
            self["betas"] = betas

    def __ior__(self, items: Any) -> Self:  # type: ignore[override]
        self.update(items)
        return self

    def __or__(self, items: Any) -> ParamGroup:  # type: ignore[override]
        if not isinstance(items, Mapping):
            return NotImplemented
        return ParamGroup({**self, **items})

    def __ror__(self, items: Any) -> ParamGroup:  # type: ignore[override]
        if not isinstance(items, Mapping):
            return NotImplemented
        merged = ParamGroup(items)
        merged.update(self)
        return merged

    def copy(self) -> ParamGroup:
        return ParamGroup(self)

    def name_of(self, place: int) -> str | None:
        """Return the name of the parameter at `place`, or None if it has no name."""
        names = self.get("param_names")
        return names[place] if isinstance(names, list | tuple) and place < len(names) else None


def checked_params(params: Any) -> tuple[list[Tensor], list[str] | None]:
    """Return the tensors of a group's ``"params"`` and their names, or None if they have none; raise if invalid."""
    if isinstance(params, Tensor):
        params = [params]
    check_ordered(params)
    tensors: list[Tensor] = []
    names: list[str] = []
    for index, item in enumerate(params):
        named = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        tensor = item[1] if named else item
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"params: expected Tensors or (name, Tensor) pairs, got {type(tensor).__name__} at position {index}"
            )
        if not (tensor.is_leaf or tensor.retains_grad):
            raise ValueError(
                f"params: the Tensor at position {index} was computed from others (no leaf), so it is no parameter; "
                "give the Parameters that it was computed from"
            )
        tensors.append(tensor)
        if named:
            names.append(item[0])
    if names and len(names) != len(tensors):
        raise ValueError(
            f"params: expected names for all Tensors or for none, got {len(names)} names for {len(tensors)} Tensors"
        )
    check_distinct(tensors)
    return tensors, names or None


def check_ordered(params: Any) -> None:
    """Raise unless `params` can be iterated over, in the same order each time."""
    if isinstance(params, Tensor | str | bytes) or not isinstance(params, Iterable):
        raise TypeError(
            "params: expected an iterable of Parameters, of (name, Parameter) pairs or of group dicts, "
            f"got {type(params).__name__}"
        )
    if isinstance(params, AbstractSet) and not isinstance(params, KeysView | ItemsView):
        raise TypeError(f"params: expected an ordered iterable such as a list, got {type(params).__name__}")


def check_distinct(tensors: Sequence[Tensor]) -> None:
    """Raise if a tensor comes twice: a step would update it twice."""
    if len({id(tensor) for tensor in tensors}) != len(tensors):
        raise ValueError(
            "params: a parameter comes more than once, expected each once; model.parameters() lists shared "
            "parameters once"
        )


def pair(betas: Any) -> tuple[Any, Any]:
    """Return the two betas of any two numbers in order, or raise naming what came."""
    two = _in_order(betas)
    if len(two) != 2:
        raise TypeError(
            f"betas: expected a pair of numbers in order, such as (0.9, 0.999), got {shown(betas)}"
            f"{', which cannot be read' * (isinstance(betas, Tensor) and not readable(betas))}"
        )
    return two[0], two[1]


def _in_order(values: Any) -> Sequence[Any]:
    """The items of anything that has them in order, at most 3; none of all else."""
    if isinstance(values, str | bytes | bytearray | memoryview | Mapping | AbstractSet):
        return ()
    try:
        if isinstance(values, Tensor):
            return values.tolist() if readable(values) and values.dim() == 1 else ()
        return list(islice(values.tolist() if isinstance(values, np.ndarray) else values, 3))
    except Exception:  # of what cannot be iterated over
        return ()
