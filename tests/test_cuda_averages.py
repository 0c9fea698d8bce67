"""Guards averages of the weights, stochastic bfloat16 weights, independent and cautious decay on the CUDA engine.

Its interpreted kernels have the bits of the reference engine, which defines these options: for every format, layout and
shard, with graphs, and where devices decide. What all engines have in common is tested with the fixture `engine_name`.
"""

import gc
import itertools
import math
import random
import weakref

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, draw, on, results
from deciding import KINDS as DECIDED
from deciding import SHAPES as DECIDED_SHAPES
from deciding import Pair, decisions
from guarded import Forbidden, Guarded
from launchers import device_plan, settled
from layouts import CUTS, DENSE, check, gradients_like
from lucid.engine import shards
from lucid.engine.cuda import launch, row_table
from patterns import patterns
from sharded import assert_whole, give_gradients, spread_over
from test_cuda_graphs import Trainer, load_own_state
from test_cuda_large import NUMBERINGS
from test_device_ranks import device as device_of
from test_device_ranks import guarded, move_state, moved

# Parameter, format, master weights.
KINDS = [
    *((torch.float32, state_format, True) for state_format in ("fp32", "bf16", "8bit")),
    (torch.float64, "fp32", True),
    (torch.complex64, "fp32", True),
    *itertools.product([torch.bfloat16], ["fp32", "bf16", "8bit"], [True, False, "stochastic"]),
    *itertools.product([torch.float16], ["fp32", "8bit"], [True, False]),
]
INDEPENDENT = {"weight_decay_schedule": "independent", "reference_lr": 0.3, "weight_decay": 0.1}
EVERYTHING = {"ema_decay": 0.99, "cautious_decay": True, **INDEPENDENT}


@pytest.fixture
def small_tiles(monkeypatch):
    """Programs of a few tiles each, as on a GPU, not of one that holds all of a small tensor."""
    monkeypatch.setattr(launch.Interpreter, "geometry", lambda self, kind: row_table.Geometry(512, 2, 1))


def drawn_as(seed, shape, dtype):
    return draw(seed, shape, dtype if dtype.is_complex else torch.float32).to(dtype)


def assert_equal_runs(run):
    """`run` on the CUDA engine gives what it gives on the reference."""
    with on("reference"):
        wanted = run()
    with on("cuda"):
        assert_same(run(), wanted)


# Formats and numbers


def spoil(optimizer, params):
    """Give some weights and averages any bits at all."""
    generator = torch.Generator().manual_seed(1)
    for param in params:
        for tensor in (param.detach(), optimizer.state[param]["ema"]):
            numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            values = patterns(generator, numbers.numel(), numbers.dtype).view(numbers.shape)
            numbers.copy_(torch.where(draw(2, numbers.shape) > 0, values, numbers))


@pytest.mark.parametrize(("dtype", "state_format", "master_weights"), KINDS, ids=str)
def test_every_format(dtype, state_format, master_weights, small_tiles):
    """Two groups with other options and numbers, whole tiles and cut ones, contiguous or not."""
    finite = []

    def run():
        shapes = [(7, 640), (33, 131), (1027,), (64, 9, 8), (), (0, 70)]
        params = [Parameter(drawn_as(k, shape, dtype)) for k, shape in enumerate(shapes)]
        params += [Parameter(drawn_as(20, (70, 64), dtype).t()), Parameter(drawn_as(21, (6, 1540), dtype)[:, ::2])]
        groups = [
            {"params": params[::2], "ema_decay": 0.999, "cautious_decay": True},
            {"params": params[1::2], "ema_decay": 0.3, "amsgrad": True, "betas": (0.3, 0.4), **INDEPENDENT},
        ]
        own = {"state_format": state_format, "master_weights": master_weights}
        optimizer = optim.AdamW(groups, lr=0.1, weight_decay=0.5, **own)
        optimizer.init_state()
        spoil(optimizer, params[1:4])
        for step in range(2):
            for number, param in enumerate(params):
                param.grad = drawn_as(100 * step + number, param.shape, dtype)
            optimizer.step()
        averages = torch.cat([entry["ema"].flatten() for entry in optimizer.state.values()])
        finite.append(averages.isfinite().float().mean())
        return results(optimizer)

    assert_equal_runs(run)
    assert 0.5 < finite[0] < 1


def test_weights_below_the_least_bfloat16_number_are_drawn_too():
    """To 0 or to the least number, unlike second moments, which stay above 0."""
    found = []

    def run():
        param = Parameter(torch.zeros(2000, dtype=torch.bfloat16))
        optimizer = optim.AdamW([param], lr=2e-41, master_weights="stochastic")
        param.grad = -torch.ones_like(param)
        optimizer.step()
        found.append(param.detach().count_nonzero().item())
        return results(optimizer)

    assert_equal_runs(run)
    assert 100 < found[0] < 1000


@pytest.mark.parametrize("ema_decay", [0.0, 1e-46, 0.5 - 6e-17, 0.5, 1 - 1e-9, 1 - 1e-16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_grad_norm", [None, math.inf], ids=["host", "device"])
def test_decays_that_a_float32_cannot_hold(ema_decay, dtype, max_grad_norm):
    """Whether the host makes the scalars or the device."""
    options = {"ema_decay": ema_decay, "max_grad_norm": max_grad_norm, "weight_decay": 0.1}
    assert_equal_runs(lambda: results(World(dtype, **options).run(3).optimizer))


def test_groups_that_are_cautious_now_and_then():
    """A kernel that may be cautious serves both kinds of groups; without a cautious group none is launched."""
    kinds = []

    def run():
        world = World(weight_decay=0.5)
        for step in range(5):
            world.optimizer.param_groups[0]["cautious_decay"] = step in (1, 2)
            world.optimizer.param_groups[1]["cautious_decay"] = step == 2
            world.step()
            if device_plan(world.optimizer) is not None:
                [tables] = device_plan(world.optimizer)._tables.values()
                kinds.append(set(tables._update_launches))
        return results(world.optimizer)

    assert_equal_runs(run)
    assert kinds == [{(False, False)}, *[{(False, False), (True, False)}] * 4]


def test_statistics_are_of_the_cautious_update(device):
    pair = Averaged(cautious_decay=True, weight_decay=5.0, ema_decay=0.9)
    pair.each(lambda world: world.optimizer.observe())
    for _ in range(3):
        pair.each(lambda world: world.set_gradients())
        pair.step()
        pair.compare_statistics()


# Layouts, addresses, numbers of elements


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE.keys())
def test_dense_layouts(make):
    with on("cuda"):
        check(make(), gradients_like(make()), **EVERYTHING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_strided_views_and_nothing_between(cut, dtype):
    base = draw(0, (41, 300), dtype)
    with on("cuda"):
        check(cut(base), gradients_like(cut(base)), base, **EVERYTHING)


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
def test_an_average_in_another_layout(state_format):
    def run(lies):
        param = Parameter(draw(0, (64, 80)).bfloat16())
        optimizer = optim.AdamW([param], state_format=state_format, master_weights="stochastic", **EVERYTHING)
        optimizer.init_state()
        if lies is not None:
            optimizer.state[param]["ema"] = lies(optimizer.state[param]["ema"])
        for step in range(2):
            param.grad = draw(1 + step, param.shape).bfloat16()
            optimizer.step()
        return results(optimizer)

    with on("reference"):
        wanted = run(None)
    with on("cuda"):
        for lies in (lambda x: x.t().contiguous().t(), lambda x: draw(9, (130, 100))[3:131:2, 5:85].copy_(x)):
            assert_same(run(lies), wanted)


@pytest.mark.parametrize("offset", [1, 4])
def test_an_average_where_no_wide_load_may_be_taken(offset):
    wide = []

    def run():
        param = Parameter(draw(0, (33, 131)))
        optimizer = optim.AdamW([param], **EVERYTHING)
        optimizer.init_state()
        own = optimizer.state[param]["ema"]
        optimizer.state[param]["ema"] = torch.empty(own.numel() + 16)[offset:][: own.numel()].view(own.shape).copy_(own)
        param.grad = draw(1, param.shape)
        optimizer.step()
        if device_plan(optimizer) is not None:
            [tables] = device_plan(optimizer)._tables.values()
            wide.append(tables._updates[0].kind.wide)
        return results(optimizer)

    assert_equal_runs(run)
    assert wide == [offset % 4 == 0]


NUMBERED = [(torch.bfloat16, "fp32", None), (torch.float32, "fp32", 0.999), (torch.bfloat16, "8bit", 0.999)]


def numbered_alike():
    """Spread over the one process that there is: only then are numbers not those of the place."""
    mesh = init_device_mesh("cpu", (1,))

    def spread(values):
        return DTensor.from_local(values, mesh, [Shard(0)], run_check=False)

    def run(dtype, state_format, ema_decay):
        param = Parameter(spread(draw(0, (33, 131)).to(dtype)))
        options = {"state_format": state_format, "master_weights": "stochastic"}
        optimizer = optim.AdamW([param], lr=0.01, ema_decay=ema_decay, **options)
        param.grad = spread(draw(1, (33, 131)).to(dtype))
        optimizer.step()
        row = {"param": param.detach()} | optimizer.state[param]
        return [{key: shards.local(value) for key, value in row.items()}]

    drawn = []
    for name, numbering in NUMBERINGS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "numbering", lambda param, name, numbering=numbering: numbering)
            for case in NUMBERED:
                with on("reference"):
                    [wanted] = run(*case)
                with on("cuda"):
                    assert_same(run(*case), [wanted], f"{name}, {case}")
            drawn += [tuple(wanted[key].flatten().tolist()) for key in ("param", "ema")]
    assert len(set(drawn)) == 2 * len(NUMBERINGS)  # each has draws of its own


def test_numbers_of_elements_beyond_32_bits_and_in_runs(ranks):
    ranks.run(1, numbered_alike)


# Where the device decides


class Averaged(Pair):
    """The same steps on the CUDA engine, whose device decides, and on the reference engine, whose host does."""

    names = ("cuda", "reference")


DECIDED_KINDS = {name: DECIDED[name] for name in ("float32", "float32, 8bit", "float64", "complex64")}
DECIDED_KINDS |= {
    f"bfloat16, {name}": (torch.bfloat16, {"state_format": name, "master_weights": "stochastic"})
    for name in ("fp32", "bf16", "8bit")
}


@pytest.mark.parametrize(("dtype", "options"), DECIDED_KINDS.values(), ids=DECIDED_KINDS.keys())
def test_random_sequences(dtype, options, device):
    """What the device leaves out moves no average; it makes the decay from a learning rate that only it knows."""
    chance = random.Random(str((dtype, options)))
    pair = Averaged(dtype, DECIDED_SHAPES, nonfinite="skip", **options, **EVERYTHING)
    rates = [[torch.tensor(0.01 * (1 + k), dtype=kind) for k in range(2)] for kind in (torch.float32, torch.float64)]
    for step in range(6):
        pair.each(lambda world: world.set_gradients())
        bound, rate = chance.choice([None, 0.5, math.inf]), chance.choice([0.02, *rates])
        cautious, found_inf = chance.random() < 0.5, chance.choice([None, 0.0, 1.0]) if step else None
        for world in pair.worlds:
            world.optimizer.max_grad_norm = bound
            world.optimizer.found_inf = None if found_inf is None else torch.tensor(found_inf)
            for number, group in enumerate(world.optimizer.param_groups):
                group["lr"] = rate[number] if isinstance(rate, list) else rate
            world.optimizer.param_groups[1]["cautious_decay"] = cautious
            if step % 4 == 2:
                world.params[1].grad.view(-1)[3] = math.nan
        pair.step()
        if step % 3 == 2:
            pair.compare(f"step {step}")
    assert decisions(device) == 5
    assert 1 <= pair.ours.optimizer.skipped_steps <= 4


RATES = [0.0, 1e-320, 1e-45, 3e-4, 0.1, 0.3, 1 / 3, 1.0, 7e5]


@pytest.mark.parametrize("reference_lr", [5e-324, 3e-4, 0.3, 7e5], ids=str)
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_independent_decay_made_on_the_device(reference_lr, tensors, device):
    """Bit for bit in float64, for rates of any size, as in a warm-up from 0."""
    options = {"weight_decay_schedule": "independent", "reference_lr": reference_lr, "weight_decay": 0.1}
    pair = Averaged(torch.float64, max_grad_norm=1.0, **options)
    for rate in RATES:
        pair.each(lambda world: world.set_gradients())
        for world in pair.worlds:
            for group in world.optimizer.param_groups:
                group["lr"] = torch.tensor(rate, dtype=torch.float64) if tensors else rate
        pair.step()
    pair.compare()
    assert decisions(device) == len(RATES) - 1 or tensors


def test_steps_in_backward(device):
    pair = Averaged(torch.bfloat16, nonfinite="skip", master_weights="stochastic", **EVERYTHING)
    for world in pair.worlds:
        world.optimizer.step_in_backward()
    for step in range(6):
        for name, world in zip(pair.names, pair.worlds, strict=True):
            with on(name):
                factors = [math.nan if (step, k) == (3, 1) else 1.0 for k in range(len(world.params))]
                losses = [
                    (param * draw(100 * step + k, param.shape).bfloat16() * factor).sum()
                    for k, (param, factor) in enumerate(zip(world.params, factors, strict=True))
                ]
                sum(losses).backward()
                world.optimizer.step()
    pair.compare()
    assert pair.ours.optimizer.skipped_steps == 1


# Graphs


GRAPHS = {
    "average": (torch.float32, {"ema_decay": 0.99}),
    "independent": (torch.float64, INDEPENDENT),
    "everything": (torch.bfloat16, {"state_format": "8bit", "master_weights": "stochastic", **EVERYTHING}),
    "complex": (torch.complex64, EVERYTHING),
}


@pytest.mark.parametrize("script", ["aasea", "abnaloabnekaflas"], ids=["short", "long"])
@pytest.mark.parametrize(("dtype", "options"), GRAPHS.values(), ids=GRAPHS.keys())
def test_replays_are_steps(dtype, options, script, capturing):
    """Between steps at once, with skipped ones and other learning rates, which lie on the device."""
    options = {"dtype": dtype, "shapes": ((64, 64), (7,), (3, 5)), "max_grad_norm": 1.0, **options}
    with on("reference"):
        wanted = Trainer(None, **options).run(script)
    with on("cuda"):
        found = Trainer(capturing, **options).run(script)
    assert_same(settled(found.optimizer), results(wanted.optimizer), script)
    assert found.optimizer.skipped_steps == wanted.optimizer.skipped_steps


def test_a_first_average_is_not_captured(capturing):
    """It would begin anew at each replay."""
    with on("cuda"):
        trainer = Trainer(capturing).run("e")
        trainer.optimizer.param_groups[0]["ema_decay"] = 0.9
        with pytest.raises(RuntimeError, match=r"captured in a CUDA graph.*before"):
            trainer.step("a")
        assert not any("ema" in entry for entry in trainer.optimizer.state.values())
        trainer.run("eaa")
        assert [("ema" in entry) for entry in trainer.optimizer.state.values()] == [True, True, False, False]


def test_the_average_that_replays_write_to_stays_alive(capturing):
    with on("cuda"):
        trainer = Trainer(capturing, ema_decay=0.9).run("aa")
        average = weakref.ref(trainer.optimizer.state[trainer.params[0]]["ema"])
        load_own_state(trainer.optimizer)
        gc.collect()
        assert average() is not None
        trainer.graphs.clear()
        trainer.optimizer.release_captured()
        gc.collect()
        assert average() is None


# Several processes


def spread_averages(dim, dtype, options):
    """Devices decide together, and no host reads them; the shards are those of parameters on one process."""
    options = {"max_grad_norm": 0.5, "nonfinite": "skip", **EVERYTHING, **options}
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    spread, plain = spread_over(mesh, [Shard(dim)], [(33, 256), (2, 3)], dtype)
    memory, hosts = Forbidden(), set()
    ours = [Parameter(moved(param, memory)) for param in spread]
    optimizer, alone = (optim.AdamW(params, lr=1e-2, **options) for params in (ours, plain))
    with device_of(Guarded(memory)):
        for step in range(6):
            give_gradients(spread, plain, step)
            if step == 4:
                plain[0].grad[0] = math.nan  # on one process
                spread[0].grad = distribute_tensor(plain[0].grad, mesh, [Shard(dim)])
            for mine, its in zip(ours, spread, strict=True):
                mine.grad = moved(its.grad, memory)
            for each, place in ((optimizer, memory.tensor), (alone, torch.clone)):
                each.param_groups[0]["lr"] = place(torch.tensor(0.01 * step, dtype=torch.float64))
            with on("reference"):
                alone.step()
            with on("cuda"):
                if step < 2:  # the second binds the state that was moved, for which indices are read
                    optimizer.step()
                    hosts = move_state(optimizer, memory) if step == 0 else hosts
                else:
                    with guarded(memory, hosts) as exchanges:
                        optimizer.step()
                    assert len(exchanges) == 1
        with on("cuda"):
            assert optimizer.skipped_steps == alone.skipped_steps == 1
            assert_whole(optimizer, alone)


SPREAD = {
    "float32": (torch.float32, {}),
    "bfloat16, 8bit": (torch.bfloat16, {"state_format": "8bit", "master_weights": "stochastic"}),
    "complex64": (torch.complex64, {}),
}


@pytest.mark.parametrize(("dtype", "options"), SPREAD.values(), ids=SPREAD.keys())
@pytest.mark.parametrize(("world", "dim"), [(2, 0), (2, 1), (3, 0)])
def test_shards(ranks, world, dim, dtype, options):
    ranks.run(world, spread_averages, dim, dtype, options)
