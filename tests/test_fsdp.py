"""Guards that parameters spread over processes (FSDP2, tensor parallelism) get the bits of one process.

Every case runs on one to four ranks that each also step the whole parameters by themselves, with the same gradients.
"""

import copy
import warnings

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import lucid.optim as optim
from bits import SEALED, draw, is_sealed, on, same, through_a_file
from sharded import DTYPES, FORMATS, SHAPES, assert_whole, give_gradients, spread_over, whole


def steps_alike(engine_name, dtype, state_format, amsgrad):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    spread, plain = spread_over(mesh, [Shard(0)], SHAPES, dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1, "state_format": state_format, "amsgrad": amsgrad, "seed": 3}
    ours, theirs = optim.AdamW(spread, **options), optim.AdamW(plain, **options)
    steps = 4 if engine_name == "reference" else SEALED + 4
    for step in range(steps):
        give_gradients(spread, plain, step)
        with on(engine_name):
            ours.step()
        theirs.step()
    assert is_sealed(ours) == (engine_name != "reference")
    assert_whole(ours, theirs, f"{dtype} {state_format}")


@pytest.mark.parametrize("engine_name", ["cpu", "reference"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shards_get_the_bits_of_the_whole(ranks, world, engine_name):
    ranks.run(world, all_formats_alike, engine_name)


def all_formats_alike(engine_name):
    for dtype in DTYPES:
        for state_format in FORMATS:
            steps_alike(engine_name, dtype, state_format, amsgrad=dtype == torch.float32)


# fully_shard itself


class Net(torch.nn.Module):
    """Layers that are wrapped one by one, an embedding tied to the output, a frozen bias, a part that joins later."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(50, 96)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(96, 96) for _ in range(2))
        self.norm = torch.nn.LayerNorm(96)
        self.head = torch.nn.Linear(96, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.later = torch.nn.Linear(96, 5)
        self.layers[0].bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(self.norm(x)).float().square().mean() + self.later(x).float().square().mean()


def trains_alike(per_layer, state_format, options, dtype=torch.float32):
    """Train under fully_shard; give its gradients, gathered, to one that is whole."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    net, twin = Net(dtype), Net(dtype)
    mesh = init_device_mesh("cpu", (world,))
    for layer in net.layers if per_layer else ():
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)

    def groups(model):
        later = {id(p) for p in model.later.parameters()}
        return [p for p in model.parameters() if id(p) not in later], list(model.later.parameters())

    arguments = {"lr": 1e-2, "state_format": state_format}
    ours, theirs = optim.AdamW(groups(net)[0], **arguments), optim.AdamW(groups(twin)[0], **arguments)
    for step in range(6):
        if step == 3:
            for optimizer, model in ((ours, net), (theirs, twin)):
                optimizer.add_param_group({"params": groups(model)[1], "lr": 3e-3})
        tokens = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(10 * step + rank))
        net(tokens).backward()
        for ours_param, param in zip(net.parameters(), twin.parameters(), strict=True):
            param.grad = None if ours_param.grad is None else whole(ours_param.grad)
        assert sum(param.grad is not None for param in twin.parameters()) == 8  # of 9
        ours.step()
        theirs.step()
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
    assert_whole(ours, theirs, f"{per_layer} {state_format} {options}")


def all_ways_of_sharding():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    trains_alike(True, "fp32", {})
    trains_alike(True, "8bit", {"reshard_after_forward": False})
    trains_alike(False, "8bit", {"mp_policy": policy})
    trains_alike(True, "bf16", {"mp_policy": policy, "reshard_after_forward": False})
    trains_alike(True, "bf16", {}, torch.bfloat16)
    trains_alike(False, "8bit", {}, torch.bfloat16)
    trains_alike(True, "fp32", {"shard_placement_fn": lambda param: Shard(param.dim() - 1)})
    trains_alike(True, "bf16", {"shard_placement_fn": lambda param: Shard(param.dim() - 1)})


@pytest.mark.parametrize("world", [1, 2, 3])
def test_fully_shard(ranks, world):
    ranks.run(world, all_ways_of_sharding)


# Other placements


def spread_in_many_ways(engine_name):
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    cases = [
        (flat, [Shard(1)], [(5, 1024), (6, 10), (4, 512, 3), (7, 3, 2, 2)], FORMATS),
        (flat, [Shard(1)], [(130, 200), (3, 5)], ["fp32", "bf16"]),
        (flat, [Shard(2)], [(6, 5, 70), (3, 4, 2, 5)], ["fp32", "bf16"]),
        (flat, [Replicate()], [(33, 200), (5,), ()], FORMATS),
        (square, [Replicate(), Shard(0)], SHAPES, FORMATS),
        (square, [Shard(0), Shard(0)], SHAPES, FORMATS),
        (square, [_StridedShard(0, split_factor=2), Shard(0)], [(48, 200), (8,)], FORMATS),
        (square, [Shard(0), Shard(1)], [(33, 512), (5, 3, 100), (2, 9)], FORMATS),
        (square, [Shard(1), Shard(0)], [(33, 512), (5, 2)], FORMATS),
        (square, [Shard(0), Shard(2)], [(9, 4, 50), (5, 3, 1)], ["fp32", "bf16"]),
        (square, [Shard(1), Shard(2)], [(9, 4, 50), (5, 3, 1)], ["fp32"]),
    ]
    for mesh, placements, shapes, formats in cases:
        for state_format in formats:
            for dtype in (torch.float32, torch.bfloat16):
                spread, plain = spread_over(mesh, placements, shapes, dtype)
                ours, theirs = (optim.AdamW(p, lr=1e-2, state_format=state_format) for p in (spread, plain))
                for step in range(3):
                    give_gradients(spread, plain, step)
                    with on(engine_name):
                        ours.step()
                    theirs.step()
                assert_whole(ours, theirs, f"{placements} {state_format} {dtype}")


@pytest.mark.slow
@pytest.mark.parametrize("engine_name", ["cpu", "reference"])
def test_tensor_parallel_and_hybrid_placements(ranks, engine_name):
    ranks.run(4, spread_in_many_ways, engine_name)


def refused_placements():
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for mesh, placements, shape, state_format, said in [
        (flat, [Shard(1)], (130, 200), "8bit", "cuts the blocks"),
        (flat, [Shard(1)], (100, 640), "8bit", "cuts the blocks"),
        (flat, [Shard(2)], (9, 4, 512), "8bit", "cuts the blocks"),
        (square, [Shard(1), Shard(1)], (100, 512), "8bit", "cuts the blocks"),
        (square, [Shard(1), Shard(2)], (9, 4, 50), "bf16", "stochastic rounding"),
        (square, [Shard(1), Shard(2)], (9, 1, 50), "bf16", "stochastic rounding"),  # some ranks hold nothing of it
        (square, [_StridedShard(0, split_factor=2), Replicate()], (8, 50), "bf16", "stochastic rounding"),
    ]:
        (param,), (plain,) = spread_over(mesh, placements, [shape])
        optimizer = optim.AdamW([param], state_format=state_format)
        give_gradients([param], [plain], 0)
        for act in (optimizer.step, optimizer.init_state):
            with pytest.raises(ValueError, match=said):
                act()
        assert torch.equal(whole(param), plain.detach())
        assert not optimizer.state
    (param,), (plain,) = spread_over(flat, [Shard(0)], [(8, 3)])
    optimizer = optim.AdamW([param])
    local = param.detach().to_local()
    param.grad = DTensor.from_local(torch.ones(4, 3), square, [Shard(0), Replicate()])
    with pytest.raises(ValueError, match="sharded over"):
        optimizer.step()
    partial = torch.nn.Parameter(DTensor.from_local(local.clone(), flat, [Partial()]))
    partial.grad = distribute_tensor(torch.ones(partial.shape), flat, [Replicate()])
    with pytest.raises(ValueError, match="partial sum"):
        optim.AdamW([partial]).step()


def strides_of_state():
    """State lies in memory as its parameter does; codes do not."""
    mesh = init_device_mesh("cpu", (2,))
    plain = torch.nn.Parameter(draw(0, (8, 6, 10, 12)).contiguous(memory_format=torch.channels_last))
    spread = torch.nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
    for state_format in FORMATS:
        optimizer = optim.AdamW([spread], state_format=state_format)
        optimizer.init_state()
        for key, value in optimizer.state[spread].items():
            if key.endswith("_code"):
                assert value.to_local().is_contiguous()
            elif isinstance(value, DTensor) and not key.endswith("_scale"):
                assert value.to_local().stride() == spread.to_local().stride()
            if isinstance(value, DTensor) and value.to_local().stride() == spread.to_local().stride():
                assert value.stride() == spread.stride()
            elif isinstance(value, DTensor):
                assert value.stride() == torch.empty(value.shape).stride()


def test_state_has_the_strides_of_its_parameter(ranks):
    ranks.run(2, strides_of_state)


def test_what_cannot_be_right_is_refused(ranks):
    ranks.run(4, refused_placements)


def gradients_spread_otherwise():
    """As tensor parallelism makes them: sums still to be taken, or another placement."""
    mesh = init_device_mesh("cpu", (2,))
    spread, plain = spread_over(mesh, [Shard(0)], [(64, 70), (9,)])
    same_everywhere, plain_too = spread_over(mesh, [Replicate()], [(64, 70), (9,)])
    ours = optim.AdamW(spread + same_everywhere, state_format="8bit", max_grad_norm=1e3)
    theirs = optim.AdamW(plain + plain_too, state_format="8bit")
    for step in range(SEALED + 2):
        give_gradients(spread + same_everywhere, plain + plain_too, step)
        for param in spread:
            param.grad = param.grad.redistribute(placements=[Replicate()])
        for param in same_everywhere:
            param.grad = DTensor.from_local(param.grad.to_local() / 2, mesh, [Partial()])
        ours.step()
        theirs.step()
    assert_whole(ours, theirs)


def test_gradients_that_are_spread_otherwise(ranks):
    ranks.run(2, gradients_spread_otherwise)


# Around the step


def in_backward_is_left_to_the_step():
    mesh = init_device_mesh("cpu", (2,))
    runs = []
    for in_backward in (False, True):
        net = fully_shard(Net(), mesh=mesh)
        optimizer = optim.AdamW(net.parameters(), lr=1e-2, state_format="8bit")
        if in_backward:
            optimizer.step_in_backward()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", RuntimeWarning)
            for step in range(3):
                net(torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(step))).backward()
                optimizer.step()
                assert in_backward == all(param.grad is None for param in net.parameters())
                optimizer.zero_grad()
        assert sum("does nothing while a process group" in str(each.message) for each in said) == in_backward
        runs.append([whole(param) for param in net.parameters()])
    assert all(map(same, *runs))


def test_step_in_backward(ranks):
    ranks.run(2, in_backward_is_left_to_the_step)


def forward_first(make):
    """After a forward that leaves weights gathered, they are other Parameters, which backward gives no gradient."""
    for kept in (False, True):
        net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        for layer in net:
            fully_shard(layer, reshard_after_forward=not kept)
        fully_shard(net)
        loss = net(torch.ones(2, 8)).sum()
        unsharded = [not isinstance(param, DTensor) for param in net.parameters()]
        assert unsharded == [kept] * 4
        optimizer = make(net.parameters(), lr=1e-1)
        loss.backward()
        before = [whole(param) for param in net.parameters()]
        optimizer.step()
        moved = [not torch.equal(*pair) for pair in zip(before, map(whole, net.parameters()), strict=True)]
        assert moved == [not kept] * 4
    # What to do: go back to the shards first.
    net(torch.ones(2, 8))
    for module in net:
        module.reshard()
    optimizer = make(net.parameters(), lr=1e-1)
    net(torch.ones(2, 8)).sum().backward()
    before = [whole(param) for param in net.parameters()]
    optimizer.step()
    assert all(not torch.equal(*pair) for pair in zip(before, map(whole, net.parameters()), strict=True))


@pytest.mark.parametrize("make", [optim.AdamW, torch.optim.AdamW], ids=["lucid", "torch"])
def test_an_optimizer_made_after_a_forward(ranks, make):
    ranks.run(2, forward_first, make)


def state_goes_round():
    """By state_dict, copy and pickle, whole state into shards, and state made before the first gradient."""
    mesh = init_device_mesh("cpu", (3,))
    for state_format in FORMATS:
        options = {"lr": 1e-2, "state_format": state_format}
        spread, plain = spread_over(mesh, [Shard(0)], SHAPES)
        ours, theirs = optim.AdamW(spread, **options), optim.AdamW(plain, **options)
        ours.init_state()
        assert all(
            isinstance(entry.get("exp_avg", entry.get("exp_avg_code")), DTensor) for entry in ours.state.values()
        )
        for step in range(2):
            give_gradients(spread, plain, step)
            ours.step()
            theirs.step()
        twins = []
        for saved in (ours.state_dict(), theirs.state_dict(), through_a_file(theirs.state_dict())):
            params = [torch.nn.Parameter(param.detach().clone()) for param in spread]
            twins.append(optim.AdamW(params, **options))
            twins[-1].load_state_dict(saved)
        twins.append(copy.deepcopy(ours))
        for twin in twins:
            assert_whole(twin, theirs, "copied")
        with pytest.raises(ValueError, match="full_tensor"):
            optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in plain]).load_state_dict(ours.state_dict())
        give_gradients(spread, plain, 2)
        theirs.step()
        for twin in twins:
            for param, given in zip(twin.param_groups[0]["params"], spread, strict=True):
                param.grad = given.grad
            twin.step()
            assert_whole(twin, theirs, "after a copy")


def test_state_is_saved_copied_and_loaded(ranks):
    ranks.run(3, state_goes_round)


def torchs_dummy_step():
    mesh = init_device_mesh("cpu", (3,))
    for state_format in FORMATS:
        for max_norm in (None, 1e9):
            net, twin = fully_shard(Net(), mesh=mesh), Net()
            options = {"lr": 1e-2, "state_format": state_format}
            ours = optim.AdamW(net.parameters(), max_grad_norm=max_norm, nonfinite="skip", **options)
            theirs = optim.AdamW(twin.parameters(), **options)
            get_optimizer_state_dict(net, ours)
            assert {float(entry["step"]) for entry in ours.state.values()} == {0.0}
            params = [p for p in net.parameters() if p.requires_grad]
            for step in range(2):
                give_gradients(params, [p for p in twin.parameters() if p.requires_grad], step)
                ours.step()
                theirs.step()
            assert_whole(ours, theirs, state_format)


def test_torchs_dummy_step_counts_nothing(ranks):
    ranks.run(3, torchs_dummy_step)


def offloaded():
    mesh = init_device_mesh("cpu", (2,))
    net, twin = Net(), Net()
    fully_shard(net, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    ours, theirs = (optim.AdamW(model.parameters(), lr=1e-2, state_format="8bit") for model in (net, twin))
    for step in range(3):
        net(torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(step))).backward()
        for left, right in zip(net.parameters(), twin.parameters(), strict=True):
            right.grad = None if left.grad is None else whole(left.grad)
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert_whole(ours, theirs)


def test_cpu_offload(ranks):
    ranks.run(2, offloaded)


def changes_between_steps():
    """What the plan knows of shards, changed behind its back."""
    mesh = init_device_mesh("cpu", (2,))

    def new_state(ours, theirs, spread, plain):
        ours.state[spread[0]]["exp_avg"] = distribute_tensor(torch.ones(plain[0].shape), mesh, [Shard(0)])
        theirs.state[plain[0]]["exp_avg"] = torch.ones(plain[0].shape)

    def state_of_a_held_shard(ours, theirs, spread, plain):
        held[0].fill_(2.0)
        theirs.state[plain[0]]["exp_avg_sq"].fill_(2.0)

    def new_memory(ours, theirs, spread, plain):
        spread[0]._local_tensor = spread[0]._local_tensor.clone()

    def in_place(ours, theirs, spread, plain):
        with torch.no_grad():
            for param in (spread[0], plain[0]):
                param.mul_(0.5)

    def new_memory_of_state(ours, theirs, spread, plain):
        value = ours.state[spread[0]]["exp_avg"]
        value._local_tensor = value._local_tensor + 1
        theirs.state[plain[0]]["exp_avg"] += 1

    def amsgrad(ours, theirs, spread, plain):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["amsgrad"] = True

    def other_gradient(ours, theirs, spread, plain):
        spread[0].grad = spread[0].grad.redistribute(placements=[Replicate()])

    for change in (
        new_state,
        state_of_a_held_shard,
        new_memory,
        in_place,
        new_memory_of_state,
        amsgrad,
        other_gradient,
    ):
        for quiet in (1, SEALED):
            spread, plain = spread_over(mesh, [Shard(0)], [(33, 20), (7,)])
            ours, theirs = optim.AdamW(spread, lr=1e-2), optim.AdamW(plain, lr=1e-2)
            ours.init_state()
            held = [ours.state[spread[0]]["exp_avg_sq"].to_local()] if change is state_of_a_held_shard else []
            for step in range(quiet):
                give_gradients(spread, plain, step)
                ours.step()
                theirs.step()
            assert is_sealed(ours) == (quiet == SEALED and not held)
            for step in range(quiet, quiet + 3):
                give_gradients(spread, plain, step)
                if step == quiet:
                    change(ours, theirs, spread, plain)
                ours.step()
                theirs.step()
            assert_whole(ours, theirs, change.__name__)


def test_changes_between_steps_are_seen(ranks):
    ranks.run(2, changes_between_steps)


def refused_state():
    """State that is not spread as its parameter is."""
    mesh = init_device_mesh("cpu", (2,))
    spread, plain = spread_over(mesh, [Shard(0)], [(33, 20)])
    optimizer = optim.AdamW(spread)
    for step in range(2):
        give_gradients(spread, plain, step)
        optimizer.step()
    entry = optimizer.state[spread[0]]
    right = entry["exp_avg"]
    for wrong in (right.full_tensor(), right.redistribute(placements=[Replicate()])):
        entry["exp_avg"] = wrong
        before = whole(spread[0])
        with pytest.raises(ValueError, match="not sharded like the parameter"):
            optimizer.step()
        assert torch.equal(before, whole(spread[0]))
    entry["exp_avg"] = right
    optimizer.step()


def test_state_that_is_spread_otherwise_is_refused(ranks):
    ranks.run(2, refused_state)


class Dispatched(TorchDispatchMode):
    """Collects the operations that torch runs."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith("profiler."):  # torch's own, around the step of every optimizer
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def nothing_dispatched():
    mesh = init_device_mesh("cpu", (2,))
    for state_format in FORMATS:
        spread, plain = spread_over(mesh, [Shard(0)], SHAPES)
        optimizer = optim.AdamW(spread, state_format=state_format)
        give_gradients(spread, plain, 0)
        optimizer.step()
        with Dispatched() as dispatched:
            for _ in range(SEALED):
                optimizer.step()
        assert dispatched.operations == ["aten.zeros.default"]  # once, to find out who else holds the state


def test_a_step_runs_no_operation_of_torch(ranks):
    ranks.run(2, nothing_dispatched)
