"""Parameters that are spread over processes beside the same ones whole, and what compares the two, state included."""

import torch
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from bits import canonical, draw, peek, same

FORMATS = ["fp32", "bf16", "8bit"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {  # of training: the dtype of the parameters, and options
    "fp32": (torch.float32, {"amsgrad": True}),
    "bf16": (torch.float32, {"state_format": "bf16"}),
    "8bit": (torch.float32, {"state_format": "8bit"}),
    "8bit of bfloat16": (torch.bfloat16, {"state_format": "8bit"}),
    "fp32 of float16": (torch.float16, {}),
}
# Rows that no number of ranks divides, fewer rows than ranks, rows that end within a block, more dimensions, vectors.
SHAPES = [(33, 200), (3, 2000), (1, 5000), (6, 8, 100), (5, 4, 3, 300), (130, 7), (11,), (2,)]


def whole(tensor):
    """All of a tensor that is spread, or of one that is not; a residual's bits as numbers."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def bits_of(key, tensor):
    return tensor.view(torch.int16) if key == "residual" else canonical(tensor)


def assert_whole(spread, plain, what=""):
    """Compare an optimizer of spread parameters with one of whole ones, state included."""
    params = [[p for group in o.param_groups for p in group["params"]] for o in (spread, plain)]
    for number, (ours, theirs) in enumerate(zip(*params, strict=True)):
        where = f"{what}: parameter {number} {tuple(theirs.shape)}"
        assert same(whole(ours), theirs.detach()), where
        left, right = peek(spread).get(ours, {}), peek(plain).get(theirs, {})
        assert left.keys() == right.keys(), where
        for key, value in left.items():
            assert isinstance(value, DTensor) == (key not in ("step", "stream")), (where, key)
            if isinstance(value, DTensor):
                assert value.placements == ours.placements, (where, key)
            assert torch.equal(bits_of(key, whole(value)), bits_of(key, right[key])), (where, key)


def spread_over(mesh, placements, shapes, dtype=torch.float32):
    """Parameters spread in that way, and the same ones whole."""
    plain = [torch.nn.Parameter(draw(i, shape).to(dtype)) for i, shape in enumerate(shapes)]
    spread = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements)) for p in plain]
    return spread, plain


def give_gradients(spread, plain, step, dtype=None):
    for number, (ours, theirs) in enumerate(zip(spread, plain, strict=True)):
        gradient = draw(1000 * step + number, theirs.shape).to(dtype or theirs.dtype)
        theirs.grad = gradient
        ours.grad = distribute_tensor(gradient, ours.device_mesh, ours.placements)


def everyone_has(value):
    """Whether all ranks hold the same value, to the bit."""
    every = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, value)
    return all(each == every[0] for each in every)
