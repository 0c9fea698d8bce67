"""Averages of the weights: in the parameters for a while, by name, or in another model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lucid.engine import codecs, shards
from lucid.engine.formats import EMA, StateFormat
from lucid.engine.row import COMPUTE
from lucid.engine.values import shown

from .exchange import Exchange, Piece, pieces
from .fsdp import Gathered
from .hyperparameters import checked_groups
from .members import Member, members, params_of
from .stateful import StatefulOptimizer


class _Average(NamedTuple):
    """The average of a parameter's weights, in its state or, if that has none yet, the weights themselves."""

    member: Member
    kept: StateFormat
    entry: dict[str, Any]

    @property
    def key(self) -> str | int:
        """The parameter's name, or its number if it has none."""
        return self.member.number if self.member.given_name is None else self.member.given_name

    def pieces(self) -> Iterator[Piece]:
        """Yield what `averaged` exchanges."""
        if EMA not in self.entry:
            return
        param, slots = self.member.param, (self.entry.get(key) for key in (EMA, "master"))
        average, master = (None if slot is None else shards.local(slot).detach() for slot in slots)
        assert average is not None
        yield from pieces(shards.local(param).detach(), average, master if "master" in self.kept.slots else None)

    def value(self) -> Tensor:
        """Return a copy of the average, sharded as the parameter is."""
        param = self.member.param
        part = (
            shards.local(self.entry[EMA])
            if EMA in self.entry
            else self.kept.master_of(param, self.entry, self.member.name)
        )
        part = part.detach().to(COMPUTE[param.dtype], copy=True)
        return shards.spread_like(param, part, param.shape)


class AveragingOptimizer(StatefulOptimizer):
    """An optimizer that gives the averages that steps keep of the weights."""

    @contextmanager
    def averaged(self, model: nn.Module | None = None) -> Iterator[None]:
        """Return a context manager in which the parameters hold the averages of their weights.

        Parameters of groups without ``ema_decay`` keep their weights. On leaving, whatever is raised inside, all
        parameters hold their training weights again, bit for bit and at the same addresses.

        Parameters
        ----------
        model : torch.nn.Module, optional
            The model with the parameters. Give it if parameters are sharded (DTensors): what FSDP2 has gathered of them
            is freed on entering and on leaving, so the next forward gathers the right values.

        Raises
        ------
        RuntimeError
            On entering within another `averaged`. Inside, a step, saving, loading, a new group, and reading state or
            averages raise it too. Nothing is changed.
        ValueError
            If no group has ``ema_decay``; if parameters are sharded and ``model`` is missing or has not all of them; if
            FSDP1 shards them.

        Notes
        -----
        No second copy of the model is made, except for float16 parameters without master weights: their weights are
        kept in 2 bytes per parameter. In bfloat16 and float16 parameters the average is rounded to nearest.
        ``docs/averages.md`` has the details.

        Examples
        --------
        >>> import torch
        >>> import lucid.optim as optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = optim.AdamW(model.parameters(), ema_decay=0.999)
        >>> with optimizer.averaged(), torch.no_grad():
        ...     loss = model(torch.ones(3, 2)).square().mean()
        """
        found = self._averages()
        flattened = [each.member.name for each in found if getattr(each.member.param, "_fsdp_flattened", False)]
        if flattened:
            raise ValueError(
                f"averaged: FSDP1 shards {flattened[0]}, and copies that it has gathered would keep their values; use "
                "fully_shard (FSDP2)"
            )
        gathered = Gathered(model)
        gathered.free()
        sharded = [each.member for each in found if shards.is_sharded(each.member.param)]
        if sharded and model is None:
            raise ValueError(
                f"model: expected the model, because {sharded[0].name} is sharded and copies that FSDP2 has gathered "
                "would keep their values; use averaged(model)"
            )
        own = set() if model is None else set(model.parameters())
        foreign = [member for member in sharded if member.param not in own]
        if foreign:
            raise ValueError(
                f"model: expected the one with all parameters of the optimizer, it lacks {foreign[0].name}"
            )
        params = params_of(self.param_groups)
        exchange = Exchange(params, (piece for each in found for piece in each.pieces()), gathered)
        with self._stepper.exchanged(exchange):
            yield

    def averages(self) -> dict[str | int, Tensor]:
        """Return a copy of the average of each parameter's weights.

        Returns
        -------
        dict
            By name, or by number if the parameter has no name: float32 tensors, float64 or complex ones for such
            parameters, sharded as the parameters are. Groups without ``ema_decay`` are left out. The average of a
            parameter that has no state yet is its weight.

        Raises
        ------
        ValueError
            If no group has ``ema_decay``, or if two parameters have the same name.
        """
        found: dict[str | int, Tensor] = {}
        for each in self._averages():
            if each.key in found:
                raise ValueError(f"averages: two parameters are named {each.key!r}; give them different names")
            found[each.key] = each.value()
        return found

    @torch.no_grad()
    def copy_averages_to(self, model: nn.Module) -> None:
        """Write the averages of the weights into another model, in its own dtype and on its own device.

        Parameters are matched by name. The model's other parameters and its buffers stay as they are.

        Parameters
        ----------
        model : torch.nn.Module
            A model with the same names and shapes, sharded or not. If its parameters and the optimizer's are sharded
            differently, all processes have to call this.

        Raises
        ------
        TypeError, ValueError
            If no group has ``ema_decay``, if a parameter of the optimizer has no name, or if the model has no parameter
            of that name and shape. Nothing is changed.
        """
        found = self._averages()
        Gathered(model).free()
        params = dict(model.named_parameters(remove_duplicate=False))
        pairs = [(each, _target(each, params)) for each in found]
        for each, target in pairs:
            value = each.value()
            if shards.is_sharded(target):
                value = shards.part_of(value, target, f"the average of {each.member.name}")
            else:
                value = shards.whole(value)
            part = shards.local(target).detach()
            part.copy_(codecs.split(value)[0] if part.dtype == torch.bfloat16 else value)

    def _averages(self) -> list[_Average]:
        """Return the averages that are kept, one for each parameter; raise if there are none or one is invalid."""
        self._stepper.check_trains()
        self._stepper.settle()
        groups = checked_groups(self.param_groups, self._hyperparameters)
        hyperparameters = [self._hyperparameters(group) for group in groups]
        if all(hyper.ema_decay is None for hyper in hyperparameters):
            raise ValueError(
                "averages: no parameter group keeps any; set ema_decay, for example "
                "AdamW(model.parameters(), ema_decay=0.999)"
            )
        found: dict[Tensor, _Average] = {}
        for member in members(groups):
            hyper, param, name = hyperparameters[member.group], member.param, member.name
            if hyper.ema_decay is None or param in found:
                continue
            kept = hyper.format_of(param, name, self._settings.state_device)
            entry = self._box.entry(param, name)
            if EMA in entry:
                kept.complete(param, entry, hyper.amsgrad, name, member.rounding_key(hyper.seed))
            found[param] = _Average(member, kept, entry)
        return list(found.values())


def _target(average: _Average, params: dict[str, nn.Parameter]) -> Tensor:
    """Return the parameter of another model into which an average is written; raise if there is none that fits."""
    member = average.member
    if member.given_name is None:
        raise ValueError(
            f"copy_averages_to: expected names for all parameters, {member.name} has none; create the optimizer with "
            "model.named_parameters()"
        )
    target = params.get(member.given_name)
    if target is None:
        raise ValueError(
            f"model: expected a parameter {member.given_name!r} in it, got {shown(sorted(params))}; give a model with "
            "the names of the one that is trained"
        )
    same_kind = target.is_complex() if member.param.is_complex() else target.is_floating_point()
    if target.shape != member.param.shape or not same_kind:
        raise ValueError(
            f"model: expected {member.name} of shape {tuple(member.param.shape)} and of the same kind of numbers, got "
            f"{target.dtype} of shape {tuple(target.shape)}"
        )
    if target.device.type == "meta":
        raise ValueError(
            f"model: expected memory for {member.name}, got a parameter on the meta device; materialise the model "
            "(to_empty) first"
        )
    return target
