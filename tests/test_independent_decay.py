"""Guards `weight_decay_schedule="independent"`: the decay λ·(α/α₀) follows the schedule and not the size of lr.

With powers of two for λ and α₀ it is α·(λ/α₀) to the bit. So each training here is compared with its twin: the default
schedule of the decay, and λ/α₀. A reference that moved, or was taken from the wrong place, gives other bits.
"""

import copy
import pickle
import random
import warnings
from fractions import Fraction

import lightning.pytorch as lightning
import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import Parameter
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, CyclicLR, LambdaLR, OneCycleLR, SequentialLR

import lucid.optim as optim
from bits import assert_same, draw, on, results, snapshot, through_a_file
from deciding import Pair, decisions
from frameworks import LIGHTNINGS_WARNINGS, forget
from lucid.engine import Scalars
from lucid.optim.checkpoint import load_optimizer
from sharded import everyone_has

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of torch.jit
    from torch.distributed.optim import ZeroRedundancyOptimizer

PEAK, DECAY = 2.0**-7, 2.0**-9
INDEPENDENT = {"weight_decay": DECAY, "weight_decay_schedule": "independent"}
COUPLED = {"weight_decay": DECAY / PEAK}
KEYS = ("weight_decay_schedule", "reference_lr", "cautious_decay", "ema_decay")


def params_of(shapes=((5, 3), (4,))):
    return [Parameter(draw(number, shape)) for number, shape in enumerate(shapes)]


class Twins:
    """Two trainings with the same parameters and gradients: with the independent decay, and with its equal."""

    def __init__(self, lr=PEAK, ours=None, **options):
        given = [{"lr": lr, **options, **INDEPENDENT, **(ours or {})}, {"lr": lr, **options, **COUPLED}]
        if isinstance(lr, torch.Tensor):
            given[1]["lr"] = lr.clone()
        self.optimizers = [optim.AdamW(params_of(), **each) for each in given]
        self.schedules = []
        self.done = 0

    def schedule(self, make):
        self.schedules = [make(optimizer) for optimizer in self.optimizers]
        return self

    def set_lr(self, lr):
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr

    def run(self, steps=6):
        for _ in range(steps):
            for optimizer in self.optimizers:
                give_gradients(optimizer, self.done)
                optimizer.step()
            for schedule in self.schedules:
                schedule.step()
            self.done += 1
        assert_same(*map(results, self.optimizers), f"after {self.done} steps")
        return self


def give_gradients(optimizer, step):
    for number, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
        param.grad = draw(100 * step + number, param.shape).to(param.dtype)


def refused(error, said, act, *optimizers):
    before = [snapshot(each) for each in optimizers]
    with pytest.raises(error, match=said) as raised:
        act()
    assert [snapshot(each) for each in optimizers] == before
    assert str(raised.value).count("\n") == 0


# The number itself


def test_the_decay_is_exact_arithmetic_rounded_in_this_order():
    chance, other = random.Random(0), 0
    for _ in range(2000):
        lr, decay, reference = (chance.uniform(0.5, 1.0) * 10.0 ** chance.randint(-9, 1) for _ in range(3))
        found = Scalars.of(lr, 0.9, 0.999, 1e-8, decay, False, 1, reference).d
        assert found == float(Fraction(decay) * Fraction(float(Fraction(lr) / Fraction(reference))))
        other += found != float(Fraction(float(Fraction(decay) * Fraction(lr))) / Fraction(reference))
    assert other > 100  # the order shows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_engine_takes_this_number(engine_name, dtype):
    lr, decay, reference = 0.0053, 0.7 * 1e20, 0.0983  # so large a decay that 1 - d is -d
    assert len({decay * (lr / reference), (decay * lr) / reference, lr * (decay / reference)}) == 3
    wanted = Fraction(decay) * Fraction(float(Fraction(lr) / Fraction(reference)))
    weight = Parameter(torch.ones(3, dtype=dtype))
    optimizer = optim.AdamW(
        [weight], lr, weight_decay=decay, weight_decay_schedule="independent", reference_lr=reference
    )
    weight.grad = torch.zeros_like(weight)
    with on(engine_name):
        optimizer.step()
    assert weight.tolist() == [torch.tensor(-float(wanted), dtype=dtype).item()] * 3


def test_the_size_of_lr_does_not_count_and_its_schedule_does():
    """Without gradients only the decay is left: the same for lr and 8·lr, and that of the schedule's sum."""
    ends = []
    for lr in (PEAK, 8 * PEAK):
        weight = Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = optim.AdamW([weight], lr=lr, **INDEPENDENT)
        schedule = CosineAnnealingLR(optimizer, 20)
        product = 1.0
        for _ in range(20):
            product *= 1 - DECAY * optimizer.param_groups[0]["lr"] / lr
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
            schedule.step()
        ends.append(weight.item())
        assert weight.item() == pytest.approx(product, rel=1e-14)
    assert ends[0] == pytest.approx(ends[1], rel=1e-14)


def test_it_is_the_papers_decay():
    """Algorithm 2 of Loshchilov and Hutter: a schedule η multiplies the step of a constant α, and λ."""
    start = draw(0, (50,), torch.float64)
    weight, wanted, m, v = Parameter(start.clone()), start.clone(), 0.0, 0.0
    optimizer = optim.AdamW([weight], lr=1e-3, weight_decay=3e-5, weight_decay_schedule="independent")
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 40)
    for t in range(1, 31):
        g, eta = draw(t, (50,), torch.float64), 1 - (t - 1) / 40
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        wanted = wanted - eta * (1e-3 * step + 3e-5 * wanted)
        weight.grad = g
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(weight.detach(), wanted, rtol=0, atol=1e-14)


# Schedules


def warm_up(step):
    return min(1.0, step / 4)


SCHEDULES = {
    "warm-up from 0": lambda optimizer: LambdaLR(optimizer, warm_up),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 12),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=PEAK, total_steps=14),
    "cyclic": lambda optimizer: CyclicLR(optimizer, PEAK / 1024, PEAK, step_size_up=3, cycle_momentum=False),
    "in sequence": lambda optimizer: SequentialLR(
        optimizer, [ConstantLR(optimizer, 0.1, 3), CosineAnnealingLR(optimizer, 9)], [3]
    ),
}


@pytest.mark.parametrize("lr", [PEAK, torch.tensor(PEAK), torch.tensor(PEAK, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedules_move_lr_and_not_its_reference(schedule, lr):
    twins = Twins(lr if isinstance(lr, float) else lr.clone()).schedule(schedule).run(12)
    (group,) = twins.optimizers[0].param_groups
    assert group["reference_lr"] == PEAK
    assert type(group["reference_lr"]) is float


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_schedule_made_later(schedule):
    Twins().run(3).schedule(schedule).run(9)


def test_lr_changed_by_hand_before_training_leaves_the_reference():
    """The decay is then λ·(new/old), as of a schedule; who means another α₀ sets both."""
    twins = Twins()
    twins.set_lr(PEAK / 8)
    twins.run(2)
    for optimizer, decay in zip(twins.optimizers, (DECAY, 8 * DECAY / PEAK), strict=True):
        optimizer.param_groups[0]["weight_decay"] = decay
    twins.optimizers[0].param_groups[0]["reference_lr"] = PEAK / 8
    twins.run(2)


def test_a_tensor_is_read_when_the_group_is_added():
    lr = torch.tensor(PEAK)
    twins = Twins(lr)
    assert twins.optimizers[0].param_groups[0]["lr"] is lr
    twins.run(2)
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["lr"].mul_(0.25)
    twins.run(2)
    assert twins.optimizers[0].param_groups[0]["reference_lr"] == PEAK


@pytest.mark.parametrize("lr", [0.0, 0, torch.tensor(0.0)], ids=str)
def test_a_group_that_begins_at_0_wants_a_reference(lr):
    params = params_of()
    refused(
        ValueError,
        r"^reference_lr: expected a number above 0, got None; .*the peak of the schedule",
        lambda: optim.AdamW(params, lr, weight_decay_schedule="independent"),
    )
    Twins(lr, ours={"reference_lr": PEAK}).run(1).schedule(lambda o: LambdaLR(o, warm_up)).run(2)


def test_a_device_that_decides_has_the_same_decay(device):
    options = {"weight_decay": 0.7e10, "weight_decay_schedule": "independent", "nonfinite": "skip"}  # shows all bits
    pair = Pair(torch.float64, **options)
    rates = [torch.tensor(0.007 * (1 + k), dtype=torch.float64) for k in range(2)]
    for world in pair.worlds:
        world.optimizer.param_groups[1]["reference_lr"] = 0.11
        for group, lr in zip(world.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
    for step in range(5):
        pair.each(lambda world: world.set_gradients())
        pair.step()
        rates[0].mul_(0.7)
        rates[1].mul_(1.3)
        pair.compare(f"step {step}")
    assert decisions(device) == 4  # the first step makes state, and the host decides it


# Groups


def test_groups_have_their_own():
    first, second = params_of()
    optimizer = optim.AdamW(
        [{"params": [first]}, {"params": [second], "lr": 8 * PEAK, "reference_lr": 2 * PEAK}], lr=PEAK, **INDEPENDENT
    )
    optimizer.add_param_group({"params": params_of(), "lr": 4 * PEAK, "initial_lr": PEAK / 25})
    optimizer.add_param_group({"params": params_of(), "lr": 0.0, "weight_decay_schedule": "lr"})
    assert [group["reference_lr"] for group in optimizer.param_groups] == [PEAK, 2 * PEAK, 4 * PEAK, None]
    assert optimizer.defaults["reference_lr"] is None
    shared = optim.AdamW([{"params": [first], "lr": 0.0}], reference_lr=PEAK, **INDEPENDENT)
    assert shared.param_groups[0]["reference_lr"] == PEAK
    before = len(optimizer.param_groups)
    refused(ValueError, "reference_lr", lambda: optimizer.add_param_group({"params": params_of(), "lr": 0}), optimizer)
    assert len(optimizer.param_groups) == before


def test_decay_groups():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    optimizer = optim.AdamW(optim.decay_groups(net, DECAY), PEAK, weight_decay_schedule="independent")
    assert [(group["weight_decay"], group["reference_lr"]) for group in optimizer.param_groups] == [
        (DECAY, PEAK),
        (0.0, PEAK),
    ]
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    wanted = [net[0].weight * (1 - DECAY), net[0].bias.clone(), net[1].weight.clone(), net[1].bias.clone()]
    optimizer.step()
    assert all(map(torch.equal, net.parameters(), wanted))


@pytest.mark.parametrize("decided", [False, True], ids=["", "clipped"])
def test_switched_between_steps(decided):
    """From the decay of torch to the independent one and back; a step reads what the group says then."""
    twins = Twins(**({"max_grad_norm": 1e-3, "nonfinite": "skip"} if decided else {})).run(2)
    ours, theirs = (optimizer.param_groups[0] for optimizer in twins.optimizers)
    ours.update(weight_decay_schedule="lr", weight_decay=DECAY / PEAK)
    twins.run(2)
    ours.update(weight_decay_schedule="independent", weight_decay=DECAY)
    twins.run(2)
    ours["reference_lr"], theirs["weight_decay"] = 4 * PEAK, DECAY / PEAK / 4
    twins.run(2)


def test_switched_on_without_a_reference():
    twins = Twins(ours={"weight_decay_schedule": "lr", "weight_decay": DECAY / PEAK}).run(2)
    ours = twins.optimizers[0]
    ours.param_groups[0].update(weight_decay_schedule="independent", weight_decay=DECAY)
    give_gradients(ours, 2)
    for act in (ours.step, ours.init_state):
        refused(ValueError, r"^reference_lr: expected a number above 0, got None", act, ours)
    ours.param_groups[0]["reference_lr"] = PEAK
    twins.run(2)


WRONG = {
    "0": (ValueError, 0),
    "negative": (ValueError, -1e-3),
    "NaN": (ValueError, float("nan")),
    "infinity": (ValueError, float("inf")),
    "text": (TypeError, "0.1"),
    "bool": (TypeError, True),
    "tensor": (TypeError, torch.tensor(0.1)),
    "list": (TypeError, [0.1]),
}


@pytest.mark.parametrize(("error", "wrong"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("schedule", ["lr", "independent"])
def test_bad_references(schedule, error, wrong):
    twins = Twins().run(2)
    ours = twins.optimizers[0]
    ours.param_groups[0]["weight_decay_schedule"] = schedule
    ours.param_groups[0]["reference_lr"] = wrong
    give_gradients(ours, 2)
    refused(error, "^reference_lr: expected", ours.step, ours)
    ours.param_groups[0].update(reference_lr=PEAK, weight_decay_schedule="independent")
    twins.run(1)
    options = {"weight_decay_schedule": schedule, "reference_lr": wrong}
    refused(error, "^reference_lr: expected", lambda: optim.AdamW(params_of(), **options))
    refused(error, "^reference_lr", lambda: ours.add_param_group({"params": params_of(), **options}), ours)


@pytest.mark.parametrize("wrong", ["Independent", None, True, 1, torch.tensor(1), ["independent"]], ids=str)
def test_bad_schedules(wrong):
    said = r"^weight_decay_schedule: expected one of 'lr', 'independent', got "
    refused(ValueError, said, lambda: optim.AdamW(params_of(), weight_decay_schedule=wrong))
    ours = Twins().run(2).optimizers[0]
    ours.param_groups[0]["weight_decay_schedule"] = wrong
    give_gradients(ours, 2)
    refused(ValueError, said, ours.step, ours)
    refused(ValueError, said, lambda: ours.add_param_group({"params": [], "weight_decay_schedule": wrong}), ours)


# Saved and loaded


def without_keys(saved):
    """As an earlier release saved it."""
    saved["param_groups"] = [
        {key: value for key, value in group.items() if key not in KEYS} for group in saved["param_groups"]
    ]
    return saved


@pytest.mark.parametrize("later", [False, True], ids=["a new one", "a trained one"])
def test_a_checkpoint_takes_the_reference_along(later):
    source = Twins().schedule(lambda optimizer: LambdaLR(optimizer, warm_up)).run(3)
    saved = [through_a_file(optimizer.state_dict()) for optimizer in source.optimizers]
    group = saved[0]["param_groups"][0]
    assert (group["weight_decay_schedule"], group["reference_lr"], group["lr"]) == ("independent", PEAK, 0.75 * PEAK)
    target = Twins(ours={"reference_lr": 3.0})
    if later:
        target.optimizers[0].param_groups[0]["reference_lr"] = PEAK
        target.run(2)
        target.optimizers[0].param_groups[0]["reference_lr"] = 3.0
    for optimizer, each in zip(target.optimizers, saved, strict=True):
        optimizer.load_state_dict(each)
    assert target.optimizers[0].param_groups[0]["reference_lr"] == PEAK
    target.run(3)


def test_checkpoints_without_it_leave_each_group_its_own():
    """Those of earlier releases, and torch's; lr comes from them, α₀ is the group's own."""
    old = optim.AdamW(params_of(), lr=PEAK / 2, **COUPLED)
    theirs = torch.optim.AdamW(params_of(), lr=PEAK / 2, weight_decay=DECAY / PEAK)
    for optimizer in (old, theirs):
        give_gradients(optimizer, 0)
        optimizer.step()
    for saved in (without_keys(old.state_dict()), theirs.state_dict()):
        twins = Twins()
        for optimizer in twins.optimizers:
            optimizer.load_state_dict(through_a_file(saved))
        (group,) = twins.optimizers[0].param_groups
        assert (group["weight_decay_schedule"], group["reference_lr"], group["lr"]) == ("independent", PEAK, PEAK / 2)
        group["weight_decay"] = DECAY
        twins.run(3)


def test_a_checkpoint_with_torchs_decay_switches_it_off():
    """As every hyperparameter, it comes from the checkpoint."""
    twins = Twins()
    saved = Twins(ours=COUPLED | {"weight_decay_schedule": "lr"}).run(2).optimizers[0].state_dict()
    for optimizer in twins.optimizers:
        optimizer.load_state_dict(copy.deepcopy(saved))
    (group,) = twins.optimizers[0].param_groups
    assert (group["weight_decay_schedule"], group["reference_lr"]) == ("lr", None)
    twins.run(2)


def test_groups_of_one_saved_group_keep_different_references(recwarn):
    named = [(str(number), param) for number, param in enumerate(params_of())]
    old = optim.AdamW(named, lr=PEAK)
    saved = without_keys(old.state_dict())
    own = [{"params": [each], "reference_lr": PEAK * (1 + k)} for k, each in enumerate(named)]
    optimizer = optim.AdamW(own, **INDEPENDENT)
    optimizer.load_state_dict(saved)
    assert [group["reference_lr"] for group in optimizer.param_groups] == [PEAK, 2 * PEAK]
    assert not recwarn.list
    with pytest.warns(UserWarning, match="differ in reference_lr here"):
        optimizer.load_state_dict(optim.AdamW(named, lr=PEAK, **INDEPENDENT).state_dict())
    assert [group["reference_lr"] for group in optimizer.param_groups] == [PEAK, PEAK]


@pytest.mark.parametrize("wrong", [0.0, -1.0, None, "0.1"])
def test_a_bad_reference_in_a_checkpoint(wrong):
    saved, target = Twins().run(1).optimizers[0].state_dict(), Twins().run(2).optimizers[0]
    saved["param_groups"][0]["reference_lr"] = wrong
    refused((ValueError, TypeError), "^reference_lr: expected", lambda: target.load_state_dict(saved), target)


@pytest.mark.parametrize("old", [False, True], ids=["", "of an earlier release"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints(old, tmp_path):
    nets = [torch.nn.Linear(5, 3) for _ in range(2)]
    source = optim.AdamW(nets[0].parameters(), lr=PEAK, **INDEPENDENT)
    target = optim.AdamW(nets[1].parameters(), lr=8 * PEAK, **INDEPENDENT)
    give_gradients(source, 0)
    source.step()
    saved = get_optimizer_state_dict(nets[0], source)
    dcp.save({"optimizer": without_keys(saved) if old else saved}, checkpoint_id=tmp_path)
    load_optimizer(nets[1], target, tmp_path)
    (group,) = target.param_groups
    assert (group["lr"], group["weight_decay_schedule"]) == (PEAK, "independent")
    assert group["reference_lr"] == (8 * PEAK if old else PEAK)


def test_torch_does_not_get_our_keys():
    ours = Twins().run(2).optimizers[0]
    assert not set(KEYS) & ours.torch_state_dict()["param_groups"][0].keys()
    theirs = torch.optim.AdamW(params_of())
    theirs.load_state_dict(ours.torch_state_dict())
    give_gradients(theirs, 2)
    theirs.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_reference(copied):
    twins = Twins().schedule(lambda optimizer: LambdaLR(optimizer, warm_up)).run(2)
    lrs = [optimizer.param_groups[0]["lr"] for optimizer in twins.optimizers]
    twins.optimizers, twins.schedules = [copied(optimizer) for optimizer in twins.optimizers], []
    assert lrs == [PEAK / 2] * 2
    twins.run(2)


def test_a_pickle_of_an_earlier_release():
    """Its groups and defaults lack the keys."""
    twins = Twins(ours=COUPLED | {"weight_decay_schedule": "lr"}).run(2)
    old = twins.optimizers[0]
    for group in (*old.param_groups, old.defaults):
        for key in KEYS:
            del group[key]
    twins.optimizers[0] = new = pickle.loads(pickle.dumps(old))
    twins.run(2)
    new.load_state_dict(through_a_file(new.state_dict()))
    twins.run(1)
    new.add_param_group({"params": params_of(), "lr": PEAK / 2, **INDEPENDENT})
    twins.optimizers[1].add_param_group({"params": params_of(), "lr": PEAK / 2, "weight_decay": 2 * DECAY / PEAK})
    assert new.param_groups[1]["reference_lr"] == PEAK / 2
    twins.run(2)
    new.param_groups[0].update(weight_decay_schedule="independent", weight_decay=DECAY, reference_lr=PEAK)
    twins.run(2)


# Tools that build groups anew


def zero_redundancy():
    for given in ({}, {"reference_lr": PEAK}):
        nets = [torch.nn.Sequential(*(torch.nn.Linear(9, 9) for _ in range(3))) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        for net in nets:
            for number, param in enumerate(net.parameters()):
                param.data.copy_(draw(number, param.shape))
        ours = ZeroRedundancyOptimizer(nets[0].parameters(), optim.AdamW, lr=PEAK, **INDEPENDENT, **given)
        theirs = optim.AdamW(nets[1].parameters(), lr=PEAK, **COUPLED)
        schedules = [LambdaLR(optimizer, warm_up) for optimizer in (ours, theirs)]
        for step in range(5):
            for net in nets:
                for number, param in enumerate(net.parameters()):
                    param.grad = draw(100 * step + number, param.shape)
            ours.step()
            theirs.step()
            for schedule in schedules:
                schedule.step()
        assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
        assert [group["reference_lr"] for group in (*ours.param_groups, *ours.optim.param_groups)] == [PEAK, PEAK]
        assert everyone_has([param.detach().numpy().tobytes() for param in nets[0].parameters()])
    assert distributed.get_world_size() == 2


def test_zero_redundancy_optimizer(ranks):
    ranks.run(2, zero_redundancy)


def test_accelerate():
    forget()
    twins, accelerator = Twins(), Accelerator(cpu=True)
    twins.schedule(lambda optimizer: LambdaLR(optimizer, warm_up))
    ours, schedule = accelerator.prepare(twins.optimizers[0], twins.schedules[0])
    for step in range(5):
        for optimizer in (twins.optimizers[0], twins.optimizers[1]):
            give_gradients(optimizer, step)
        for each in (ours, twins.optimizers[1], schedule, twins.schedules[1]):
            each.step()
    assert_same(*map(results, twins.optimizers))
    forget()


class Lit(lightning.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.options = options
        self.net = torch.nn.Linear(5, 3)
        self.net.load_state_dict({"weight": draw(0, (3, 5)), "bias": draw(1, (3,))})

    def training_step(self, batch, number):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        optimizer = optim.AdamW(self.parameters(), lr=PEAK, **self.options)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, warm_up), "interval": "step"}]


@pytest.mark.filterwarnings(*(f"ignore:{said}:{kind.__name__}" for said, kind in LIGHTNINGS_WARNINGS))
def test_lightning(tmp_path):
    nets = []
    for options in (INDEPENDENT, COUPLED):
        module = Lit(options)
        data = torch.utils.data.DataLoader(draw(7, (12, 5)), batch_size=2, shuffle=False)
        lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(module, data)
        nets.append(module.net)
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
