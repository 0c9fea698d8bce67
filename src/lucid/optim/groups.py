"""Parameter groups: dicts that store ``beta1`` and ``beta2`` and answer to ``betas`` as well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

_MISSING = object()


class ParamGroup(dict[str, Any]):
    """A parameter group, or the defaults of one.

    ``betas`` is a live virtual key: what torch's schedulers read and write under it is ``beta1`` and ``beta2``.
    It is not among ``keys()``, so nothing is stored twice.

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

    def __contains__(self, key: object) -> bool:
        if key == "betas":
            return super().__contains__("beta1") and super().__contains__("beta2")
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        if key == "betas" and key in self:
            return (super().__getitem__("beta1"), super().__getitem__("beta2"))
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "betas":
            beta1, beta2 = pair(value)
            super().__setitem__("beta1", beta1)
            super().__setitem__("beta2", beta2)
        else:
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
        """Take over all items; ``betas`` wins over ``beta1`` and ``beta2`` given with it."""
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


def pair(betas: Any) -> tuple[Any, Any]:
    """Return the two betas, or raise naming what came."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas: expected a pair of numbers (beta1, beta2), got {betas!r}")
    return betas[0], betas[1]
