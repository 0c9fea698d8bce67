"""Puts averages of weights into parameters and back, in place, and without a copy of the model where that is possible.

The training weights must be kept meanwhile. A float32, float64 or complex parameter and its average change places. A
bfloat16 parameter takes the upper half of its float32 average, rounded to nearest; the average's slot takes the
parameter's bits and, beside them, the lower half. A float16 parameter has no such room: its training weights are
computed again from the master weights and, where these do not give them, are copied, 2 bytes per parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from lucid.engine import codecs, shards
from lucid.engine.interrupts import uninterrupted

from .fsdp import Gathered

_ELEMENTS = 1 << 18  # that are exchanged at once, or one row of dimension 0 if it is longer
_RESERVED = 1 << 24  # bytes, enough for the intermediate values of so many elements


class Piece(Protocol):
    """Some elements of a parameter, and their averages. Each method writes only after it has computed everything."""

    def enter(self) -> None:
        """Put the averages into the parameter."""

    def leave(self) -> None:
        """Put the training weights and the averages back."""


class _Swapped:
    """Parameter and average have the same dtype."""

    def __init__(self, param: Tensor, average: Tensor) -> None:
        self._param, self._average = param, average

    def enter(self) -> None:
        held = self._param.clone()
        self._param.copy_(self._average)
        self._average.copy_(held)

    leave = enter


class _Packed:
    """A bfloat16 parameter: the upper and the lower half of the average change places with its bits."""

    def __init__(self, param: Tensor, average: Tensor) -> None:
        self._param, self._bits = param, average.view(torch.int32)

    def enter(self) -> None:
        upper, lower = codecs.split(self._bits.view(torch.float32))
        weight = self._param.view(torch.int16).to(self._bits)
        bits = (weight << 16) | (lower.view(torch.int16).int() & 0xFFFF)
        self._param.copy_(upper)
        self._bits.copy_(bits)

    def leave(self) -> None:
        weight = (self._bits >> 16).to(torch.int16).view(torch.bfloat16)
        lower = self._bits.to(torch.int16).view(torch.bfloat16)
        average = codecs.joined(self._param.to(self._bits.device), lower)
        self._param.copy_(weight)
        self._bits.view(torch.float32).copy_(average)


class _Kept:
    """A float16 parameter. ``master``: its master weights, if it has them."""

    def __init__(self, param: Tensor, average: Tensor, master: Tensor | None) -> None:
        self._param, self._average, self._master = param, average, master
        self._weight: Tensor | None = None

    def enter(self) -> None:
        rounded = None if self._master is None else self._master.to(self._param)
        if rounded is None or not torch.equal(rounded.view(torch.int16), self._param.view(torch.int16)):
            self._weight = self._param.clone()
        self._param.copy_(self._average)

    def leave(self) -> None:
        weight = self._master if self._weight is None else self._weight
        assert weight is not None
        self._param.copy_(weight)
        self._weight = None


def pieces(param: Tensor, average: Tensor, master: Tensor | None) -> Iterator[Piece]:
    """Yield the pieces of a parameter, all of them shards of this process. ``master``: a float16 parameter's."""
    tensors = [param, average] if master is None else [param, average, master]
    if all(tensor.is_contiguous() for tensor in tensors) or not param.dim():
        tensors, length = [tensor.reshape(-1) for tensor in tensors], _ELEMENTS
    else:
        length = max(1, _ELEMENTS // max(1, math.prod(param.shape[1:])))
    for own, averaged, *more in zip(*(torch.split(tensor, length) for tensor in tensors), strict=True):
        if own.dtype == torch.bfloat16:
            yield _Packed(own, averaged)
        elif own.dtype == torch.float16:
            yield _Kept(own, averaged, *(more or [None]))
        else:
            yield _Swapped(own, averaged)


class Exchange:
    """The exchange of an optimizer's parameters, which happens whole or not at all.

    ``params``: the parameters. ``pieces``: their pieces, in order. ``gathered``: what FSDP2 has gathered of shards.
    """

    def __init__(self, params: Iterable[Tensor], pieces: Iterable[Piece], gathered: Gathered) -> None:
        with torch.inference_mode(False):  # a view made in that mode cannot be updated outside of it
            self._data = [(param, param.data) for param in params]
            self._pieces = list(pieces)
        self._gathered = gathered
        self._entered: list[Piece] = []
        self._reserve: list[Tensor] = []  # memory of GPUs to leave with, if what happens meanwhile takes all memory

    @torch.no_grad()
    def enter(self) -> None:
        """Put the averages into the parameters. If it raises, `leave` undoes what has happened."""
        devices = {shards.local(param).device for param, _ in self._data} - {torch.device("cpu")}
        with uninterrupted(), torch.inference_mode(False):
            self._reserve = [torch.empty(_RESERVED, dtype=torch.uint8, device=device) for device in devices]
            for piece in self._pieces:
                piece.enter()
                self._entered.append(piece)
            self._renew()

    @torch.no_grad()
    def leave(self) -> None:
        """Put the training weights back, in reverse order: parameters may share memory."""
        with uninterrupted(), torch.inference_mode(False):
            self._reserve.clear()
            while self._entered:
                self._entered[-1].leave()
                self._entered.pop()
            for param, data in self._data:
                if shards.place(param) != shards.place(data):  # somebody has moved or converted the parameter meanwhile
                    param.data = data
            self._renew()

    def _renew(self) -> None:
        """Free copies of parameters that others have made."""
        self._gathered.free()
        torch.clear_autocast_cache()
