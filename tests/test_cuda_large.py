"""Guards elements beyond 2³¹ and numbers of elements beyond 2³² on the CUDA engine's interpreted kernels.

Where memory does not suffice for so many, their numbers say that they are so many.
"""

import math

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, on, results
from formats import HALVES
from launchers import device_plan
from lucid.engine import exact_sum, shards
from lucid.engine.cuda import launch, row_table
from lucid.engine.exact_sum import TOTAL_WORDS, WORDS
from lucid.engine.shards import Numbering

NUMBERINGS = {
    "up to 2^32": Numbering(2**32 - 33 * 131, 2**62, 0),
    "one beyond 2^32": Numbering(2**32 - 33 * 131 + 1, 2**62, 0),
    "across 2^32": Numbering(2**32 - 2000, 2**62, 0),
    "from 2^32 on": Numbering(2**32, 2**62, 0),
    "across 5·2^32": Numbering(5 * 2**32 - 777, 2**62, 0),
    "runs": Numbering(1000, 131, 1310),
    "runs across 2^32": Numbering(2**32 - 10_000, 393, 3930),
    "runs far apart": Numbering(7, 655, 2**33 + 655),
    "one run that is as long as all": Numbering(2**32 - 5, 33 * 131, 1),
}


def numbered_alike():
    """Spread over the one process that there is: only then are numbers not those of the place."""
    from torch.distributed.tensor import DTensor, Shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    flags, drawn = {}, {}

    def spread(values):
        return DTensor.from_local(values, mesh, [Shard(0)], run_check=False)

    def run(state_format):
        starts = draw(0, (33, 131)).bfloat16(), draw(1, (131, 33)).bfloat16().t()
        params = [Parameter(spread(values)) for values in starts]
        optimizer = optim.AdamW(params, lr=0.01, state_format=state_format)
        for number, param in enumerate(params):
            param.grad = spread(draw(number + 2, (33, 131)).bfloat16())
        optimizer.step()
        if device_plan(optimizer) is not None:
            flags[name] = device_plan(optimizer)._row_table.rows[0].numbered
        rows = ({"param": param.detach()} | optimizer.state[param] for param in params)
        found = [{key: shards.local(value) for key, value in row.items()} for row in rows]
        return [{key: x.view(torch.int16) if x.dtype in HALVES else x for key, x in row.items()} for row in found]

    for name, numbering in NUMBERINGS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "numbering", lambda param, name, numbering=numbering: numbering)
            for state_format, key in (("bf16", "exp_avg_sq"), ("8bit", "exp_avg_sq_code")):
                with on("reference"):
                    wanted = run(state_format)
                with on("cuda"):
                    assert_same(run(state_format), wanted, f"{name}, {state_format}")
                drawn.setdefault(key, set()).add(tuple(wanted[0][key].flatten().tolist()))
    assert [len(each) for each in drawn.values()] == [len(NUMBERINGS)] * 2  # each has draws of its own
    return flags


def test_numbers_of_elements_beyond_32_bits_and_in_runs(ranks):
    [flags] = ranks.run(1, numbered_alike)
    assert [name for name, numbered in flags.items() if not numbered] == ["up to 2^32"]


def large(shape, state_format, transposed, expanded):
    """A bfloat16 parameter, its gradient and its state, in memory that is not there until it is touched."""

    def untouched(dtype=torch.bfloat16):
        return torch.empty(shape[::-1], dtype=dtype).t() if transposed else torch.empty(shape, dtype=dtype)

    param = Parameter(untouched())
    param.grad = torch.full((1,) * len(shape), 0.3, dtype=param.dtype).expand(shape) if expanded else untouched()
    entry = {"step": torch.tensor(3.0)}
    if state_format == "bf16":
        entry |= {"exp_avg": untouched(), "exp_avg_sq": untouched()}
    else:
        for key in ("exp_avg", "exp_avg_sq"):
            entry[f"{key}_code"] = untouched(torch.uint8)
            entry[f"{key}_scale"] = torch.empty(shape[0], -(-shape[1] // 128))
    entry["stream"] = torch.tensor(12345)
    optimizer = optim.AdamW([param], state_format=state_format, master_weights=False)
    optimizer.state[param] = entry
    return optimizer, {"param": param.detach(), "grad": param.grad} | entry


def end_of(tensor, count):
    """The last elements in row-major order: whole rows, or of the last row."""
    if tensor.dim() == 1:
        return tensor[-count:]
    return tensor[-1][-count:] if count % tensor.shape[1] else tensor[-(count // tensor.shape[1]) :]


@pytest.mark.parametrize(
    ("shape", "state_format", "transposed", "expanded", "tail"),
    [
        ((2**31 + 5000,), "bf16", False, False, 5000),
        ((2**16, 2**15 + 1), "bf16", True, False, 8192),
        ((2**24 + 40, 128), "8bit", False, False, 5120),
        ((2**22 + 8, 513), "8bit", False, True, 8 * 513),  # rows of five blocks, the last of one element
    ],
    ids=["dense", "transposed", "whole blocks", "cut blocks"],
)
def test_more_than_2_to_the_31_elements(shape, state_format, transposed, expanded, tail, monkeypatch):
    """Only the last two programs are launched, and only what they update is touched; nothing else may be."""
    whole = row_table.RowTable.updates

    def last(self, device, geometry_of):
        [only] = whole(self, device, geometry_of)
        return [only._replace(programs=row_table.Programs(*(x[-2:] for x in only.programs)))]

    monkeypatch.setattr(row_table.RowTable, "updates", last)
    monkeypatch.setattr(launch.Interpreter, "geometry", lambda self, kind: row_table.Geometry(2048, 2, 1))
    optimizer, tensors = large(shape, state_format, transposed, expanded)
    generator = torch.Generator().manual_seed(7)
    ends = {}
    for key, tensor in tensors.items():
        if tensor.dim() == 0:
            continue
        ends[key] = end = end_of(tensor, tail // shape[1] * tensor.shape[1] if key.endswith("scale") else tail)
        if end.dtype == torch.uint8:
            end.random_(0, 256, generator=generator)
        elif key != "grad" or not expanded:
            values = torch.randn(end.shape, generator=generator)
            end.copy_(values.abs() if "_sq" in key or "scale" in key else values)
    others = [slice(9000), slice(-tail - 9000, -tail)]  # where counts of 32 bits would lead, and just before the end
    if tensors["grad"].is_contiguous():
        for other in others:
            tensors["grad"].view(-1)[other] = 1.0  # which would move a parameter

    twin = Parameter(ends["param"].clone())
    twin.grad = ends["grad"].clone()
    wanted = optim.AdamW([twin], state_format=state_format, master_weights=False)
    kept = tensors.keys() - {"param", "grad"}
    wanted.state[twin] = {key: ends.get(key, tensors[key]).clone() for key in kept}
    numbering = Numbering(math.prod(shape) - tail, 2**62, 0)
    with monkeypatch.context() as patch, on("reference"):
        patch.setattr(shards, "numbering", lambda param, name: numbering)
        wanted.step()
    with on("cuda"):
        optimizer.step()
    [wanted] = results(wanted)
    assert_same(
        [{key: end for key, end in ends.items() if key != "grad"}], [{k: wanted[k] for k in ends if k != "grad"}]
    )
    if tensors["param"].is_contiguous():
        assert not any(tensors["param"].view(-1)[other].any() for other in others)


def test_squares_of_more_than_2_to_the_31_elements(monkeypatch):
    """The last part begins at element 2^31."""
    optimizer, tensors = large((2**31 + 5000,), "bf16", False, False)
    tensors["grad"][-9000:] = draw(0, (9000,))
    whole = row_table.RowTable.squares
    monkeypatch.setattr(row_table.RowTable, "updates", lambda *_: [])

    def last(self, *told):
        [(kind, of_rows, geometry, programs)] = whole(self, *told)
        assert (programs.parts[-1] + 1) * geometry.tile * geometry.tiles >= 2**31 + 5000
        return [row_table.KindSquares(kind, of_rows, geometry, row_table.Programs(*(x[-1:] for x in programs)))]

    monkeypatch.setattr(row_table.RowTable, "squares", last)
    with on("cuda"):
        optimizer.step()
        [resident] = device_plan(optimizer)._tables.values()
        for each in resident.measure(1.0, None):
            resident.launcher.launch(each.prepared, each.programs, each.args, each.kind)
    words = resident.words.tolist()
    wanted = [0] * TOTAL_WORDS
    exact_sum.add(wanted, tensors["grad"][2**31 :].float(), 1.0)
    assert words[:WORDS] == wanted[:WORDS]
