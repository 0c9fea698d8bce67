"""What an installed package has to do where nothing but torch, numpy and it is: `python tests/smoke.py`.

tests/test_package.py and cibuildwheel run it. The bits after a few steps are the same on every platform: what goes in
is exact everywhere, and the scalars, whose last bit of float64 is the C library's, are rounded to float32.
"""

import hashlib
import importlib.metadata
import io
import math
import pathlib
import sys

import torch

import lucid
import lucid.optim as optim
from lucid.engine import cpu

STEPS = 5
# By state format and the parameters' dtype: the first digits of a hash over parameters and state.
BITS: dict[tuple[str, torch.dtype], str] = {
    ("fp32", torch.float32): "c1080eb7ae7f409a",
    ("fp32", torch.bfloat16): "e091694f3605ee05",
    ("fp32", torch.float16): "6a28b3acb6824d0c",
    ("bf16", torch.float32): "ad51a5519b2c3dc4",
    ("bf16", torch.bfloat16): "67084cf30b3784ee",
    ("bf16", torch.float16): "697312592d82674d",
    ("8bit", torch.float32): "f8f89820c740f8d5",
    ("8bit", torch.bfloat16): "7f1b116d084a2fa7",
    ("8bit", torch.float16): "e9df62339e26bc5a",
}


def numbers(n: int, factor: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Return `n` different looking numbers of both signs, the same everywhere."""
    return ((torch.arange(n) * factor % 1021 - 510).double() * scale).to(dtype)


def stepped(state_format: str, dtype: torch.dtype, resumed: bool) -> str:
    """Return the hash of parameters and state after `STEPS` steps, with a checkpoint on the way where `resumed`."""

    def optimizer() -> optim.AdamW:
        return optim.AdamW(params, lr=1e-2, weight_decay=1e-2, state_format=state_format, amsgrad=True)

    # One element, less than a block, rows that are no multiple of one, more than a batch: 8-bit state is of matrices.
    shapes = ((1,), (127,), (37, 200), (65, 1024))
    params = [torch.nn.Parameter(numbers(math.prod(s), 641, 2.0**-9, dtype).view(s)) for s in shapes]
    adamw = optimizer()
    assert adamw.engine_for(params[0]) == "cpu", f"the engine is {adamw.engine_for(params[0])!r}, expected 'cpu'"
    for step in range(STEPS):
        for param in params:
            param.grad = numbers(param.numel(), 769 + step, 2.0 ** (-12 - step), dtype).view_as(param)
        adamw.step()
        if resumed and step == 1:
            file = io.BytesIO()
            torch.save({"params": params, "adamw": adamw.state_dict()}, file)
            file.seek(0)
            checkpoint = torch.load(file, weights_only=True)
            params = checkpoint["params"]
            adamw = optimizer()
            adamw.load_state_dict(checkpoint["adamw"])
    found = hashlib.sha256()
    for param in params:
        for _, tensor in sorted({"": param.detach(), **adamw.state[param]}.items()):
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> int:
    """Run all of it; say what was run."""
    version = importlib.metadata.version("lucid-optim")
    assert lucid.__version__ == version, f"lucid.__version__ is {lucid.__version__}, the package's {version}"
    for (state_format, dtype), expected in BITS.items():
        for level in cpu.simd_levels():
            with cpu.forced_simd_level(level):
                for resumed in (False, True):
                    found = stepped(state_format, dtype, resumed)
                    what = f"{state_format} state of {dtype} parameters, {level}, resumed: {resumed}"
                    assert found == expected, f"{what}: the bits are {found}, expected {expected}"
    print(f"lucid-optim {version} of {pathlib.Path(lucid.__file__).parent}: {', '.join(cpu.simd_levels())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
