"""Guards that `master_weights="stochastic"` trains: small updates count on average, on shards and after a resume too.

The bits of a step are in test_stochastic_weights.py. Here updates are far below half a unit of the weights' last place,
where rounding to nearest stands still.
"""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

import lucid.optim as optim
from bits import assert_same, draw, on, peek, results, same, snapshot, through_a_file
from sharded import SHAPES, assert_whole, everyone_has, give_gradients, spread_over, whole

BF16 = torch.bfloat16
STOCHASTIC = {"master_weights": "stochastic"}
LR = 1e-5  # far below 2^-9, half a unit of a weight of 1


def weights_of(n=4096, dtype=BF16):
    return Parameter(torch.ones(n, dtype=dtype))


# It learns


def pulled_to(weight, target, steps, **options):
    """Train all elements of `weight` towards `target`; every update is LR in size."""
    optimizer = optim.AdamW([weight], lr=LR, weight_decay=0.0, **options)
    for _ in range(steps):
        weight.grad = (weight.detach().float() - target).sign().to(weight.dtype)
        optimizer.step()
    return weight.detach().double()


@pytest.mark.parametrize("engine_name", ["cpu", "reference"])
def test_updates_far_below_a_unit_count(engine_name):
    """200 updates of 1e-5 downwards from 1, where bfloat16 numbers are 2^-8 apart: the mean falls by their sum."""
    steps = 200
    with on(engine_name):
        drawn = pulled_to(weights_of(), 0.0, steps, **STOCHASTIC)
        nearest = pulled_to(weights_of(), 0.0, steps, master_weights=False)
        exact = pulled_to(weights_of(), 0.0, steps, master_weights=True)
    assert (nearest == 1).all()
    # Of the 2^-8 below 1, an element loses 0.51 on average, with σ = √0.51; the mean of 4,096 is right within 4 σ.
    assert drawn.mean().item() == pytest.approx(1 - steps * LR, abs=4 * 0.51**0.5 * 2**-8 / 64)
    assert exact.mean().item() == pytest.approx(1 - steps * LR, abs=2**-9)


def test_a_decay_far_below_a_unit_counts():
    """1,000 decays of a weight by 1e-6 of itself."""
    means = {}
    for kind in ("stochastic", False):
        weight = weights_of(16384)
        optimizer = optim.AdamW([weight], lr=1e-3, weight_decay=1e-3, master_weights=kind)
        weight.grad = torch.zeros_like(weight)
        for _ in range(1000):
            optimizer.step()
        means[kind] = weight.detach().double().mean().item()
    assert means[False] == 1
    assert means["stochastic"] == pytest.approx(0.999, abs=4 * 2**-9 / 128)


def test_a_small_network_learns_where_rounding_to_nearest_stands_still():
    torch.manual_seed(0)
    inputs, truth = torch.randn(256, 32), torch.randn(32, 1)

    def loss_of(weight):
        return (inputs @ weight.float() - inputs @ truth).square().mean()

    ends = {}
    for kind in ("stochastic", False, True):
        weight = Parameter((truth + 0.05 * draw(1, truth.shape)).to(BF16))
        start = loss_of(weight).item()
        optimizer = optim.AdamW([weight], lr=3e-5, weight_decay=0.0, master_weights=kind)
        for _ in range(1500):
            optimizer.zero_grad()
            loss_of(weight).backward()
            optimizer.step()
        ends[kind] = loss_of(weight).item()
    assert ends["stochastic"] < 0.3 * start
    assert ends[False] > 0.6 * start
    assert ends[True] < 0.3 * start


# It is the same everywhere


def shards_alike(state_format):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for placement in (Shard(0), Shard(1)) if state_format == "fp32" else (Shard(0),):
        shapes = [shape for shape in SHAPES if len(shape) > 1 or placement == Shard(0)]
        spread, plain = spread_over(mesh, [placement], shapes, BF16)
        options = {"lr": 1e-3, "weight_decay": 0.1, "state_format": state_format, "seed": 3} | STOCHASTIC
        ours, theirs = optim.AdamW(spread, **options), optim.AdamW(plain, **options)
        for step in range(5):
            give_gradients(spread, plain, step)
            ours.step()
            theirs.step()
        assert_whole(ours, theirs, f"{placement} {state_format}")
        assert all("residual" not in entry for entry in peek(ours).values())


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
@pytest.mark.parametrize("world", [2, 3])
def test_shards_get_the_bits_of_the_whole(ranks, world, state_format):
    ranks.run(world, shards_alike, state_format)


def net_of():
    torch.manual_seed(torch.distributed.get_rank())  # DDP and FSDP2 are given the weights of rank 0
    net = torch.nn.Sequential(torch.nn.Linear(70, 96), torch.nn.Tanh(), torch.nn.Linear(96, 5)).to(BF16)
    for param in net.parameters():
        torch.distributed.broadcast(param.data, src=0)
    return net


def trains_alike():
    """DDP, FSDP2 and one process with the gathered gradients."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    replica, sharded, plain = net_of(), net_of(), net_of()
    copies = DistributedDataParallel(replica)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    optimizers = [optim.AdamW(net.parameters(), lr=1e-4, **STOCHASTIC) for net in (replica, sharded, plain)]
    for step in range(6):
        x = draw(10 * step + rank, (4, 70)).to(BF16)
        copies(x).float().square().mean().backward()
        sharded(x).float().square().mean().backward()
        for left, middle, right in zip(*(net.parameters() for net in (replica, sharded, plain)), strict=True):
            right.grad = whole(middle.grad)
            left.grad = right.grad.clone()  # DDP's own mean may round in another order
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for left, middle, right in zip(*(net.parameters() for net in (replica, sharded, plain)), strict=True):
            assert same(left.detach(), right.detach())
            assert same(whole(middle), right.detach())
    assert everyone_has([param.detach().view(torch.int16).numpy().tobytes() for param in replica.parameters()])


def test_replicas_and_fsdp2_train_alike(ranks):
    ranks.run(2, trains_alike)


# Saved, resumed, switched


class Training:
    """A bfloat16 matrix and vector, beside a float32 one; gradients depend on the step only."""

    def __init__(self, kind, state_format="fp32", named=True, **options):
        self.params = [Parameter(draw(n, shape).to(BF16)) for n, shape in enumerate(((70, 64), (33,)))]
        self.params.append(Parameter(draw(9, (7,))))
        params = [(str(number), param) for number, param in enumerate(self.params)] if named else self.params
        self.optimizer = optim.AdamW(params, lr=1e-4, state_format=state_format, master_weights=kind, **options)
        self.done = 0

    def run(self, steps):
        for _ in range(steps):
            for number, param in enumerate(self.params):
                param.grad = draw(1000 + 10 * self.done + number, param.shape).to(param.dtype)
            self.optimizer.step()
            self.done += 1
        return self

    def resumed_by(self, other):
        """Let `other` go on from here, through a file."""
        saved = through_a_file({"weights": [p.detach() for p in self.params], "optimizer": self.optimizer.state_dict()})
        for param, value in zip(other.params, saved["weights"], strict=True):
            param.data.copy_(value)
        other.optimizer.load_state_dict(saved["optimizer"])
        other.done = self.done
        return other


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "8bit"])
def test_a_resumed_training_has_the_same_bits(state_format):
    whole_run = Training("stochastic", state_format, seed=5).run(6)
    first = Training("stochastic", state_format, seed=5).run(3)
    resumed = first.resumed_by(Training("stochastic", state_format, named=False, seed=99))  # its stream is saved
    assert_same(results(resumed.run(3).optimizer), results(whole_run.optimizer))
    other = Training("stochastic", state_format, seed=6).run(6)
    assert not torch.equal(other.params[0], whole_run.params[0])


KINDS = [True, False, "stochastic"]
SLOTS = {True: {"residual"}, False: set(), "stochastic": {"stream"}}


@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_switched_by_a_load(before, after):
    """The residual is created from 0 and dropped; the parameter itself stays as it is, and so do the moments."""
    source = Training(before).run(3)
    target = source.resumed_by(Training(after))
    for ours, theirs in zip(target.params, source.params, strict=True):
        assert torch.equal(ours, theirs)
        entry, was = target.optimizer.state[ours], source.optimizer.state[theirs]
        extra = SLOTS[after] if ours.dtype == BF16 else set()
        assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"} | extra
        assert torch.equal(entry["exp_avg"], was["exp_avg"])
        if "residual" in extra and before is not True:
            assert not entry["residual"].view(torch.int16).any()
    assert target.optimizer.param_groups[0]["master_weights"] == after
    target.run(2)
    # The same as changing the group's option and loading one's own state.
    switched = Training(before).run(3)
    switched.optimizer.param_groups[0]["master_weights"] = after
    switched.optimizer.load_state_dict(switched.optimizer.state_dict())
    assert_same(results(switched.run(2).optimizer), results(target.optimizer))


def test_float32_parameters_are_not_affected():
    for dtype in (torch.float32, torch.float64, torch.complex64):
        twins = [Parameter(draw(0, (70, 64), dtype)) for _ in range(2)]
        optimizers = [
            optim.AdamW([p], master_weights=kind) for p, kind in zip(twins, ("stochastic", True), strict=True)
        ]
        for step in range(3):
            for param, optimizer in zip(twins, optimizers, strict=True):
                param.grad = draw(step, (70, 64), dtype)
                optimizer.step()
        assert_same(*map(results, optimizers))
        assert "stream" not in peek(optimizers[0])[twins[0]]


def test_float16_is_refused():
    weight = Parameter(torch.ones(5, dtype=torch.float16))
    optimizer = optim.AdamW([("weight", weight)], **STOCHASTIC)
    weight.grad = torch.ones_like(weight)
    before = snapshot(optimizer)
    said = r'^parameter .weight. is torch.float16, and master_weights="stochastic" is for torch.bfloat16 [^\n]*$'
    for act in (optimizer.step, optimizer.init_state):
        with pytest.raises(ValueError, match=said):
            act()
        assert snapshot(optimizer) == before
    optimizer.param_groups[0]["master_weights"] = True
    optimizer.step()
    assert (weight < 1).all()


@pytest.mark.parametrize("wrong", ["Stochastic", "nearest", None, 1, 0.5], ids=str)
def test_other_values_are_refused(wrong):
    with pytest.raises((TypeError, ValueError), match=r"^master_weights: expected [^\n]*$"):
        optim.AdamW([weights_of()], master_weights=wrong)


def test_bytes_of_a_parameter():
    """6.06 bytes with 8-bit moments: weights and gradients of 2 bytes each, 2.0625 for the moments."""
    weight = Parameter(draw(0, (256, 512)).to(BF16))
    optimizer = optim.AdamW([weight], state_format="8bit", **STOCHASTIC)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = sum(tensor.nbytes for tensor in (weight, weight.grad, *optimizer.state[weight].values()))
    assert held / weight.numel() == pytest.approx(6.0625, abs=1e-3)
