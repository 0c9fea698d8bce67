"""Which parameters get weight decay: parameter groups made from a model, and a table that explains them."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lucid.engine.values import checked_flag, checked_number

_BIAS = re.compile(r"(^|_)bias(es)?\d*(_|$)")  # in a parameter's own name: in_proj_bias, bias_hh_l0, bias_k
_NORM = re.compile(r"norm(ali[sz]ation)?(\d+d)?$", re.IGNORECASE)  # in a class's name, as in all of torch's
_EMBEDDING = re.compile(r"embedding(s|bag)?$", re.IGNORECASE)
_WEIGHTED = (nn.Linear, _ConvNd)  # whatever a subclass is called: a PatchEmbedding may be a convolution

Goes = Literal["decay", "no decay", "frozen"]
_HEADINGS: dict[Goes, str] = {"decay": "Weight decay", "no decay": "No weight decay", "frozen": "Frozen, left out"}


@dataclass(frozen=True, slots=True)
class Placed:
    """Which group one parameter is in, and why; `also` are its other names."""

    name: str
    shape: tuple[int, ...]
    goes: Goes
    why: str
    also: tuple[str, ...] = ()


class DecayGroups(list[dict[str, Any]]):
    """The list of group dicts that `decay_groups` returns. If you print it, it shows which parameters decay, and why.

    Attributes
    ----------
    placed : tuple
        One entry for each parameter, in the model's order: its ``name``; its ``shape``; ``goes``, which is ``"decay"``,
        ``"no decay"`` or ``"frozen"``; ``why``, the reason as printed; ``also``, its other names.
    """

    def __init__(self, groups: Iterable[dict[str, Any]] = (), placed: Iterable[Placed] = ()) -> None:
        super().__init__(groups)
        self.placed = tuple(placed)

    def __repr__(self) -> str:
        sections = {goes: [item for item in self.placed if item.goes == goes] for goes in _HEADINGS}
        tables = {goes: _table(items) for goes, items in sections.items() if items}
        widths = [max(map(len, column)) for column in zip(*chain.from_iterable(tables.values()), strict=True)]
        lines = []
        for goes, table in tables.items():
            tensors, numbers = len(sections[goes]), sum(math.prod(item.shape) for item in sections[goes])
            lines.append(
                f"{_HEADINGS[goes]}: {tensors:,} tensor{'s' * (tensors != 1)}, "
                f"{numbers:,} parameter{'s' * (numbers != 1)}"
            )
            lines += ["    " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join(lines)


def decay_groups(
    model: nn.Module,
    weight_decay: float | None = None,
    *,
    decay_embeddings: bool = True,
    decay: str | Iterable[str] = (),
    no_decay: str | Iterable[str] = (),
) -> DecayGroups:
    """Make two parameter groups: weights decay; biases, norms and all parameters of fewer than 2 dimensions do not.

    Print the result to see which parameters decay, and why. Frozen parameters are in no group, and a shared parameter
    is in one group only.

    Parameters
    ----------
    model : torch.nn.Module
        The model whose parameters to group. Freeze, tie and cast its parameters first, and make the optimizer after.
    weight_decay : float, optional
        λ of the group that decays, finite and ≥ 0. By default that group does not set it and uses the optimizer's
        ``weight_decay``. The other group has 0.
    decay_embeddings : bool, default True
        Whether embeddings decay. They do in nanoGPT, in timm and with transformers' Trainer, hence the default; they do
        not in minGPT and OLMo 2. A row that a batch does not use decays as well.
    decay, no_decay : str or iterable of str, default ()
        Patterns of parameter names, with ``*`` (which matches dots too), ``?`` and ``[a-z]``. A pattern overrides every
        other rule except freezing. Each pattern must match the whole name of at least one parameter, as in
        ``model.named_parameters()``, case included; for a shared parameter, any of its names. A parameter must not
        match both `decay` and `no_decay`.

    Returns
    -------
    DecayGroups
        A list of group dicts: one for the parameters that decay and one for the others. A group without parameters is
        omitted. ``"params"`` are (name, Parameter) pairs, so that the optimizer keeps the names.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, a pattern matches nothing, or the model has no parameter to train. Also if
        the model has a lazy parameter that no forward pass has initialised, or contains ``FullyShardedDataParallel``,
        which flattens parameters (``fully_shard`` keeps their shapes).

    Notes
    -----
    A parameter that no pattern matches is, in this order,

    - a bias, if its own name has that word, at any shape: ``bias_hh_l0``, ``in_proj_bias``, ``experts_bias``;
    - a norm's, if its module's class or a base class is named …Norm, …Norm2d or …Normalization, at any shape;
    - a scalar or 1-dimensional;
    - an embedding, if its module's class or a base class is named …Embedding, …Embeddings or …EmbeddingBag;
    - a weight.

    Subclasses of ``nn.Linear`` and of torch's convolutions count as neither norm nor embedding, whatever their name.
    A shared parameter does not decay if one of its uses does not decay: an embedding tied to the output layer decays
    unless `decay_embeddings` is False. The tensors that a parametrization stores instead of a weight decay as that
    weight would, so both tensors of ``weight_norm`` decay. For parameters of the model itself, such as a position
    table, the shape decides. For timm's exceptions use
    ``no_decay=model.no_weight_decay() & dict(model.named_parameters()).keys()``.

    Examples
    --------
    >>> import torch
    >>> import lucid.optim as optim
    >>> def block():
    ...     return torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(8), "mlp": torch.nn.Linear(8, 8)})
    >>> model = torch.nn.ModuleDict({
    ...     "tokens": torch.nn.Embedding(100, 8),
    ...     "blocks": torch.nn.ModuleList([block(), block(), block()]),
    ...     "head": torch.nn.Linear(8, 100, bias=False),
    ... })
    >>> model["head"].weight = model["tokens"].weight
    >>> groups = optim.decay_groups(model, weight_decay=0.1)
    >>> print(groups)
    Weight decay: 4 tensors, 992 parameters
        tokens.weight             (100, 8)  embedding, also head.weight
        blocks.*.mlp.weight × 3   (8, 8)    weight
    No weight decay: 9 tensors, 72 parameters
        blocks.*.norm.weight × 3  (8,)      norm
        blocks.*.norm.bias × 3    (8,)      bias
        blocks.*.mlp.bias × 3     (8,)      bias
    >>> optimizer = optim.AdamW(groups, lr=3e-4)
    >>> [group["weight_decay"] for group in optimizer.param_groups]
    [0.1, 0.0]

    Here embeddings do not decay, and the first norm does:

    >>> groups = optim.decay_groups(model, 0.1, decay_embeddings=False, decay="blocks.0.norm.weight")
    >>> print(groups)
    Weight decay: 4 tensors, 200 parameters
        blocks.0.norm.weight      (8,)      pattern 'blocks.0.norm.weight'
        blocks.*.mlp.weight × 3   (8, 8)    weight
    No weight decay: 9 tensors, 864 parameters
        tokens.weight             (100, 8)  embedding, also head.weight
        blocks.*.norm.bias × 3    (8,)      bias
        blocks.*.mlp.bias × 3     (8,)      bias
        blocks.*.norm.weight × 2  (8,)      norm
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; give the model itself: its modules decide "
            "which parameters decay"
        )
    own: dict[str, Any] = {} if weight_decay is None else {"weight_decay": checked_number("weight_decay", weight_decay)}
    undecayed = {"bias", "norm", "scalar", "1-dimensional"}
    if not checked_flag("decay_embeddings", decay_embeddings):
        undecayed.add("embedding")
    uses = _uses(model)
    names = [name for _, roles in uses for name in roles]
    by_decay, by_no_decay = _matched("decay", decay, names), _matched("no_decay", no_decay, names)
    placed: list[Placed] = []
    params: dict[Goes, list[tuple[str, Parameter]]] = {"decay": [], "no decay": []}
    for param, roles in uses:
        goes, why = _decided(roles, by_decay, by_no_decay, undecayed)
        name, *also = roles
        if not param.requires_grad:
            goes, why = "frozen", ""
        else:
            params[goes].append((name, param))
        placed.append(Placed(name, tuple(param.shape), goes, why, tuple(also)))
    if not any(params.values()):
        raise ValueError(
            f"model: expected a parameter to train, got {len(uses)} parameters, all frozen; unfreeze some with "
            "requires_grad_(True)"
            if uses
            else f"model: expected a parameter to train, got a {type(model).__name__} without any"
        )
    groups = [{"params": params["decay"], **own}, {"params": params["no decay"], "weight_decay": 0.0}]
    return DecayGroups([group for group in groups if group["params"]], placed)


def _uses(model: nn.Module) -> list[tuple[Parameter, dict[str, str]]]:
    """Return each parameter once, with all its names and what it is under each."""
    uses: dict[int, tuple[Parameter, dict[str, str]]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise ValueError(
                "model: expected parameters of their own shapes, got FullyShardedDataParallel, which flattens them; "
                "shard with torch.distributed.fsdp.fully_shard instead"
            )
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for key, param in own.items():
            name = f"{path}.{key}" if path else key
            if is_lazy(param):
                raise ValueError(
                    f"model: expected initialised parameters, got the lazy {name!r}; run the model once on an input "
                    "before decay_groups()"
                )
            owner, dims = module, param.dim()
            if isinstance(module, ParametrizationList):  # its tensors stand for one of the module above
                above, _, key = f".{path}".rpartition(".parametrizations.")
                owner, dims = modules[above[1:]], max(tensor.dim() for tensor in own.values())
            uses.setdefault(id(param), (param, {}))[1][name] = _role(owner, key, dims)
    return list(uses.values())


def _role(module: nn.Module, key: str, dims: int) -> str:
    """What the parameter `key` of `module` is, in the word that is printed."""
    classes = [] if isinstance(module, _WEIGHTED) else [cls.__name__ for cls in type(module).__mro__]
    if _BIAS.search(key):
        return "bias"
    if any(map(_NORM.search, classes)):
        return "norm"
    if dims < 2:
        return "1-dimensional" if dims else "scalar"
    return "embedding" if any(map(_EMBEDDING.search, classes)) else "weight"


def _matched(argument: str, patterns: str | Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """Return the names that are matched, each with the first pattern that does; raise if a pattern matches none."""
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{argument}: expected patterns of names such as '*.scale', got {type(patterns).__name__}")
    matched: dict[str, str] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: expected patterns of names such as '*.scale', got {type(pattern).__name__}")
        hits = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not hits:
            raise ValueError(
                f"{argument}: expected patterns that match whole names of parameters such as "
                f"{next(iter(names), '')!r}, got {pattern!r}, which matches none; correct it or leave it out"
            )
        for name in hits:
            matched.setdefault(name, pattern)
    return matched


def _decided(
    roles: dict[str, str], by_decay: dict[str, str], by_no_decay: dict[str, str], undecayed: set[str]
) -> tuple[Goes, str]:
    """Return where a parameter with these names and roles goes, were it not frozen, and why."""
    here = next((name for name in roles if name in by_decay), None)
    there = next((name for name in roles if name in by_no_decay), None)
    if here is not None and there is not None:
        shared = "" if here == there else f", which is also {there!r},"
        raise ValueError(
            f"decay, no_decay: expected each parameter in one of them at most, got {here!r}{shared} in both, by "
            f"{by_decay[here]!r} and {by_no_decay[there]!r}; narrow one of the patterns"
        )
    if here is not None:
        return "decay", f"pattern {by_decay[here]!r}"
    if there is not None:
        return "no decay", f"pattern {by_no_decay[there]!r}"
    why = next((role for role in roles.values() if role in undecayed), None)
    return ("decay", next(iter(roles.values()))) if why is None else ("no decay", why)


def _table(items: Sequence[Placed]) -> list[tuple[str, str, str]]:
    """Rows of name, shape and why; parameters that differ only in numbers within their names share one."""
    alike: dict[tuple[Any, ...], list[Placed]] = defaultdict(list)
    for item in items:
        alike[_template(item.name), item.shape, item.why, tuple(map(_template, item.also))].append(item)
    rows = []
    for same in alike.values():
        others: dict[str, list[str]] = defaultdict(list)
        for name in chain.from_iterable(item.also for item in same):
            others[_template(name)].append(name)
        name = _folded([item.name for item in same]) + (f" × {len(same)}" if len(same) > 1 else "")
        also = [f"also {_folded(names)}" for names in others.values()]
        rows.append((name, str(same[0].shape), ", ".join(filter(None, [same[0].why, *also]))))
    return rows


def _template(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _folded(names: Sequence[str]) -> str:
    """One name for all, with * where they differ: a pattern that matches them."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)
