"""The parameters of an optimizer in order: the only enumeration of groups × parameters, made on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from lucid.engine.formats import RoundingKey

from .groups import ParamGroup


class Member(NamedTuple):
    """A parameter: its number over all groups, its group and its place in it, and the name that the user gave it."""

    number: int
    group: int
    place: int
    param: Tensor
    given_name: str | None

    @property
    def name(self) -> str:
        """The name of the parameter in messages."""
        if self.given_name is None:
            return f"parameter {self.place} of group {self.group}"
        return f"parameter {self.given_name!r}"

    def rounding_key(self, seed: int) -> RoundingKey:
        """Return the key of its random bits: the seed, and its name or, without a name, its number."""
        return seed, (self.number if self.given_name is None else self.given_name)


def members(groups: Sequence[ParamGroup]) -> Iterator[Member]:
    """Yield the parameters of all groups in order."""
    number = 0
    for group, items in enumerate(groups):
        for place, param in enumerate(items["params"]):
            yield Member(number, group, place, param, items.name_of(place))
            number += 1


def member_at(groups: Sequence[ParamGroup], group: int, place: int) -> Member:
    """Return the parameter at a place in a group."""
    number = sum(len(before["params"]) for before in groups[:group]) + place
    return Member(number, group, place, groups[group]["params"][place], groups[group].name_of(place))


def params_of(groups: Sequence[ParamGroup]) -> list[Tensor]:
    """Return the parameters of all groups in order."""
    return [param for group in groups for param in group["params"]]


def flat(params: Sequence[list[Tensor]]) -> list[Tensor]:
    """Return the parameters of several lists, one for each group, in order."""
    return [param for group in params for param in group]
