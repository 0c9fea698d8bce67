"""The parameter shapes to time: those of three models, written from their architecture, plain ones, and a file's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Shape = tuple[int, ...]


def elements(shapes: Iterable[Shape]) -> int:
    """Return the number of elements of tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


@dataclass(frozen=True, slots=True)
class Case:
    """A set of parameters to step."""

    name: str
    shapes: Sequence[Shape]
    amsgrad: bool = False

    @property
    def elements(self) -> int:
        return elements(self.shapes)

    @property
    def bytes(self) -> int:
        """Bytes of float32 parameters, gradients and moments of one optimizer."""
        return self.elements * (20 if self.amsgrad else 16)


def gpt2_small() -> list[Shape]:
    """148 tensors, 124.4 M parameters: 12 blocks of width 768, the output tied to the embedding."""
    width, vocabulary, context = 768, 50257, 1024

    def linear(inputs: int, outputs: int) -> list[Shape]:
        return [(inputs, outputs), (outputs,)]  # as OpenAI's Conv1D stores it

    norm: list[Shape] = [(width,), (width,)]
    attention = linear(width, 3 * width) + linear(width, width)
    mlp = linear(width, 4 * width) + linear(4 * width, width)
    block = norm + attention + norm + mlp
    return [(vocabulary, width), (context, width)] + 12 * block + norm


def resnet50() -> list[Shape]:
    """161 tensors, 25.6 M parameters: stages of 3, 4, 6 and 3 bottlenecks; norms are affine."""

    def convolution(inputs: int, outputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes = convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3)
            shapes += convolution(width, outputs, 1)
            if block == 0:
                shapes += convolution(inputs, outputs, 1)  # the shortcut
            inputs = outputs
    return [*shapes, (1000, 2048), (1000,)]


def llama_1b() -> list[Shape]:
    """146 tensors, 1.24 G parameters: Llama 3.2 1B, the output tied to the embedding."""
    width, layers, heads, kv_heads, hidden, vocabulary = 2048, 16, 32, 8, 8192, 128256
    kv_width = width // heads * kv_heads
    norm = (width,)
    attention: list[Shape] = [(width, width), (kv_width, width), (kv_width, width), (width, width)]
    mlp: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
    block = [norm, *attention, norm, *mlp]
    return [(vocabulary, width), *(layers * block), norm]


MODELS = {"gpt2-small": gpt2_small, "resnet50": resnet50, "llama-1b": llama_1b}

CASES = {
    case.name: case
    for case in (
        Case("64M", [(64 * 2**20,)]),
        Case("gpt2-small", gpt2_small()),
        Case("resnet50", resnet50()),
        Case("1x64", [(64,)]),
        Case("1000x1000", 1000 * [(1000,)]),
        Case("1000x64", 1000 * [(64,)]),
        Case("10000x64", 10_000 * [(64,)]),
        Case("64M-amsgrad", [(64 * 2**20,)], amsgrad=True),
        Case("1000x1000-amsgrad", 1000 * [(1000,)], amsgrad=True),
    )
}


def parameters(
    shapes: Sequence[Shape], dtype: torch.dtype = torch.float32, *, gradient_rms: float = 1e-3
) -> list[Tensor]:
    """Return parameters of these shapes, with gradients."""
    params = []
    for shape in shapes:
        param = torch.empty(shape, dtype=dtype).normal_(std=0.02).requires_grad_()
        param.grad = torch.empty(shape, dtype=dtype).normal_(std=gradient_rms)
        params.append(param)
    return params


MOST_TENSORS = 1_000_000  # in a file or a count: each is an element of a list

_LINE = re.compile(r"(?:(\d+)\s*\*\s*)?(\d+(?:\s*[x,×]\s*\d+)*)")


def read_shapes(path: Path) -> list[Shape]:
    """Return the shapes that a file lists.

    The file is JSON, a list of shapes or a dict of shapes by name, or it has one shape per line: ``768x3072``, or
    ``12 * 768x768`` for twelve tensors. ``#`` begins a comment.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it does not list shapes. The message gives the line.
    """
    text = path.read_text()
    if text.lstrip()[:1] in ("[", "{"):
        return _shapes_in_json(text, path)
    shapes: list[Shape] = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        found = _LINE.fullmatch(content)
        if found is None:
            raise ValueError(f"{path}, line {number}: expected a shape like 768x3072 or 12 * 768x768, got {content!r}")
        count = int(found[1] or 1)
        if len(shapes) + count > MOST_TENSORS:
            raise ValueError(f"{path}, line {number}: expected at most {MOST_TENSORS:,} tensors, got more")
        shapes += count * [tuple(int(size) for size in re.findall(r"\d+", found[2]))]
    if not shapes:
        raise ValueError(f"{path}: expected one shape per line, like 768x3072, got none")
    return shapes


def _shapes_in_json(text: str, path: Path) -> list[Shape]:
    try:
        listed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    listed = list(listed.values()) if isinstance(listed, dict) else listed
    for shape in listed:
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{path}: expected a list of shapes like [[768, 3072], [768]], got {shape!r} as a shape")
    if not listed:
        raise ValueError(f"{path}: expected a list of shapes like [[768, 3072], [768]], got none")
    return [tuple(shape) for shape in listed]
