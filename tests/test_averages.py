"""Guards averages of weights as users see them: in the parameters for a while, by name, in another model.

What a step keeps is tested elsewhere. Here: within `averaged` the parameters are the averages, afterwards everything is
what it was, to the bit, whatever happens inside; what cannot be done inside is refused and changes nothing.
"""

import contextlib
import copy
import pickle
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import lucid.optim as optim
from averaging import KINDS, SHAPES, master_of, params_of, rounded, world
from bits import World, assert_same, on, peek, results, same, snapshot
from interrupting import Interrupts
from lucid.optim import exchange

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def values(optimizer):
    return [param.detach().clone() for param in params_of(optimizer)]


def assert_values(optimizer, wanted):
    for param, value in zip(params_of(optimizer), wanted, strict=True):
        assert same(param.detach(), value)


# In the parameters


@EVERY_KIND
def test_parameters_hold_averages_and_then_their_weights_again(kind):
    trained = world(kind)
    optimizer = trained.optimizer
    averages = [peek(optimizer)[param]["ema"].clone() for param in params_of(optimizer)]
    weights, before = values(optimizer), snapshot(optimizer, *trained.params)
    for _ in range(2):
        with optimizer.averaged():
            assert_values(optimizer, [rounded(average, trained.dtype) for average in averages])
            moved = [not same(*pair) for pair in zip(values(optimizer), weights, strict=True) if pair[0].numel()]
            assert all(moved)
        assert snapshot(optimizer, *trained.params) == before


@EVERY_KIND
def test_training_goes_on_as_if_nobody_had_looked(kind):
    looked, twin = world(kind), world(kind)
    for _ in range(2):
        with looked.optimizer.averaged():
            pass
        with on("reference"):
            looked.run(2)
            twin.run(2)
        assert_same(results(looked.optimizer), results(twin.optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_value_is_lost_on_the_way(dtype):
    """Zeros, subnormals, the largest, infinities and NaN, as weight and as average."""
    info = torch.finfo(torch.float32 if dtype != torch.float64 else dtype)
    special = [
        0.0,
        -0.0,
        info.smallest_normal,
        info.tiny * 2**-20,
        info.max,
        -info.max,
        torch.inf,
        -torch.inf,
        torch.nan,
    ]
    special += [1.0, -1.0, 1 + 2**-8, 1 + 2**-8 + 2**-16, 1 + 3 * 2**-8, 65504.0, 65519.0, 65520.0, 2**-25, 1e-7]
    first = torch.tensor(special, dtype=torch.float64)
    pairs = torch.cartesian_prod(first, first).to(torch.float64)
    param = Parameter(pairs[:, 0].to(dtype))
    optimizer = optim.AdamW([param], ema_decay=0.5, master_weights=False)
    optimizer.init_state()
    average = optimizer.state[param]["ema"].copy_(pairs[:, 1])
    kept = average.clone()
    weight = param.detach().clone()
    with optimizer.averaged():
        assert same(param.detach(), rounded(kept, dtype).where(~kept.isnan(), torch.nan))
    assert same(average, kept)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(param.detach().view(integer), weight.view(integer))  # the same NaN too


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_weight_that_was_overwritten_comes_back(kind):
    """Though it is no longer what its master weight rounds to."""
    trained = world(kind)
    with torch.no_grad():
        trained.params[0][3:9].fill_(0.3)
        trained.params[1].zero_()
    before = snapshot(trained.optimizer, *trained.params)
    with trained.optimizer.averaged():
        pass
    assert snapshot(trained.optimizer, *trained.params) == before


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, GeneratorExit, SystemExit])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_whatever_is_raised_inside(kind, raised):
    optimizer = world(kind).optimizer
    before = snapshot(optimizer, *params_of(optimizer))
    with pytest.raises(raised, match="stop"), optimizer.averaged():
        raise raised("stop")
    assert snapshot(optimizer, *params_of(optimizer)) == before
    with on("reference"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16 alone"])
@pytest.mark.parametrize("at", range(2, 7))
def test_an_exchange_that_fails_halfway_is_undone(kind, at, monkeypatch):
    optimizer = world(kind).optimizer
    before = snapshot(optimizer, *params_of(optimizer))
    of = {"float32": exchange._Swapped, "bfloat16": exchange._Packed, "float16 alone": exchange._Kept}[kind]
    calls, enter = [], of.enter

    def fail(piece):
        calls.append(piece)
        if len(calls) == at:
            raise MemoryError("stop")
        enter(piece)

    monkeypatch.setattr(exchange, "_ELEMENTS", 1000)
    monkeypatch.setattr(of, "enter", fail)
    with pytest.raises(MemoryError, match="stop"), optimizer.averaged():
        raise AssertionError
    assert snapshot(optimizer, *params_of(optimizer)) == before
    monkeypatch.undo()
    with optimizer.averaged():
        pass


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16 alone"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that strikes a dying generator
def test_an_interrupt_at_every_point(kind):
    """All parameters hold averages inside, and all hold their weights afterwards, wherever Ctrl-C strikes."""
    trained = world(kind, shapes=((3,), (2, 2)))
    optimizer = trained.optimizer
    before = snapshot(optimizer, *trained.params)
    with optimizer.averaged():
        inside = values(optimizer)
    wrong = []
    for at in range(1, 2000):
        interrupts = Interrupts(at, "lucid")
        sys.setprofile(interrupts)
        try:
            with optimizer.averaged():
                sys.setprofile(None)
                assert_values(optimizer, inside)
                sys.setprofile(interrupts)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        if snapshot(optimizer, *trained.params) != before:
            wrong.append(interrupts.where)
        if interrupts.where is None:
            break
    assert at > 50
    assert not wrong
    with on("reference"):
        trained.run(1)


class Made(TorchDispatchMode):
    """The tensors that are made: the bytes of the largest, and of those that live."""

    def __init__(self):
        super().__init__()
        self.largest, self.all = 0, []

    @property
    def living(self):
        return sum(tensor.nbytes for made in self.all if (tensor := made()) is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not func.is_view and not func._schema.name.endswith("_"):
            self.largest = max(self.largest, made.nbytes)
            self.all.append(weakref.ref(made))
        return made


@pytest.mark.parametrize(
    ("kind", "largest", "kept"), [("float32", 4, 0), ("bfloat16", 8, 0), ("float16", 2, 0), ("float16 alone", 2, 2)]
)
def test_there_is_no_second_copy_of_the_model(kind, largest, kept):
    trained = world(kind, steps=1, shapes=((1000, 700), (100, 100, 70)))
    with Made() as made, trained.optimizer.averaged():
        assert made.living == kept * 1_400_000
    assert made.largest == largest * exchange._ELEMENTS


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "float16 alone"])
def test_any_dense_layout(kind, monkeypatch):
    monkeypatch.setattr(exchange, "_ELEMENTS", 50)
    dtype, options = KINDS[kind]
    whole = torch.arange(4.0 * 3 * 5 * 6).view(4, 3, 5, 6)
    params = [
        Parameter(whole.to(dtype, memory_format=torch.channels_last, copy=True)),
        Parameter(torch.arange(20.0 * 30).view(20, 30).to(dtype).t()),
        Parameter(torch.arange(20.0 * 30).view(20, 30).to(dtype)[3:11:2, 4:9]),
    ]
    optimizer = optim.AdamW(params, lr=0.1, ema_decay=0.5, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    with on("reference"):
        optimizer.step()
    averages, before = optimizer.averages(), snapshot(optimizer, *params)
    with optimizer.averaged():
        assert_values(optimizer, [rounded(average.contiguous(), dtype) for average in averages.values()])
    assert snapshot(optimizer, *params) == before


def test_parameters_that_share_memory():
    base = torch.arange(12.0)
    params = [Parameter(base[:8]), Parameter(base[4:]), Parameter(base[:8].view(2, 4))]
    optimizer = optim.AdamW(params, ema_decay=0.5)
    optimizer.init_state()
    for number, param in enumerate(params):
        optimizer.state[param]["ema"].fill_(float(number))
    with optimizer.averaged():
        assert base.tolist() == [2.0] * 8 + [1.0] * 4
    assert base.tolist() == list(range(12))
    assert [set(optimizer.state[param]["ema"].flatten().tolist()) for param in params] == [{0.0}, {1.0}, {2.0}]


def test_groups_without_averages_and_parameters_without_state_keep_their_weights():
    params = [Parameter(torch.full((3,), float(number))) for number in range(5)]
    frozen = params[3].requires_grad_(False)
    groups = [
        {"params": params[:2], "ema_decay": 0.5},
        {"params": [params[2]]},
        {"params": params[3:], "ema_decay": 0.9},
    ]
    optimizer = optim.AdamW(groups, lr=0.1)
    params[0].grad, params[2].grad = torch.ones(3), torch.ones(3)
    with on("reference"):
        optimizer.step()
    for group in optimizer.param_groups[1:]:
        group["params"].append(params[0])  # in three groups; one of them keeps no averages
    weights = values(optimizer)
    assert set(optimizer.averages()) == {0, 1, 4, 5}
    with optimizer.averaged():
        inside = values(optimizer)
    changed = [not same(*pair) for pair in zip(inside, weights, strict=True)]
    assert changed == [True, False, False, True, False, False, True]
    assert frozen not in peek(optimizer)


def test_no_group_keeps_averages():
    optimizer = World().run(2).optimizer
    before = snapshot(optimizer, *params_of(optimizer))
    for ask in (
        optimizer.averages,
        optimizer.averaged().__enter__,
        lambda: optimizer.copy_averages_to(nn.Linear(2, 1)),
    ):
        with pytest.raises(ValueError, match=r"averages: no parameter group keeps any; set ema_decay, .*\)$"):
            ask()
    assert snapshot(optimizer, *params_of(optimizer)) == before


def test_averages_begin_with_the_weights_where_they_are_switched_on_later():
    with on("reference"):
        for kind, (dtype, options) in KINDS.items():
            trained = World(dtype, SHAPES, **options).run(3)
            optimizer = trained.optimizer
            for group in optimizer.param_groups:
                group["ema_decay"] = 0.75
            masters = [master_of(param, peek(optimizer)[param]).clone() for param in trained.params]
            for found, master in zip(optimizer.averages().values(), masters, strict=True):
                assert same(found, master), kind
            trained.run(1)
            for param, master in zip(trained.params, masters, strict=True):
                new, average = (master_of(param, peek(optimizer)[param]), peek(optimizer)[param]["ema"])
                assert torch.allclose(average, 0.75 * master + 0.25 * new, rtol=1e-6, atol=0), kind
                assert not master.numel() or not same(average, new), kind


def test_a_stale_graph_is_an_error():
    """As after a step: autograd must not use an average for the weight that the forward has used."""
    param = Parameter(torch.ones(3))
    optimizer = optim.AdamW([param], ema_decay=0.5)
    optimizer.init_state()
    loss = param.square().sum()
    with optimizer.averaged():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_forgets_the_casts_of_the_weights():
    model = nn.Linear(4, 4)
    optimizer = optim.AdamW(model.parameters(), ema_decay=0.5)
    optimizer.init_state()
    for param in model.parameters():
        optimizer.state[param]["ema"].zero_()
    x = torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        first = model(x)
        with optimizer.averaged():
            assert not model(x).any()
        assert torch.equal(model(x), first)


@pytest.mark.parametrize("outside", [torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad])
def test_in_every_mode_of_autograd(outside, inside):
    trained = world("bfloat16")
    before = snapshot(trained.optimizer, *trained.params)
    with outside(), trained.optimizer.averaged(), inside():
        assert not any(param.is_inference() for param in trained.params)
    assert snapshot(trained.optimizer, *trained.params) == before
    with on("reference"):
        trained.run(1)


def test_a_model_that_is_moved_or_converted_inside_is_back_at_its_address():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    model.empty = Parameter(torch.ones(0))  # has no address
    optimizer = optim.AdamW([{"params": model[0].parameters(), "ema_decay": 0.5}, {"params": model[1].parameters()}])
    optimizer.add_param_group({"params": [model.empty], "ema_decay": 0.5})
    optimizer.init_state()
    before = snapshot(optimizer, *model.parameters())
    with optimizer.averaged():
        model.bfloat16()
        model(torch.ones(1, 3, dtype=torch.bfloat16))
    assert snapshot(optimizer, *model.parameters()) == before
    with optimizer.averaged():
        model[0].weight.data = model[0].weight.data.t()  # at the same address
    assert snapshot(optimizer, *model.parameters()) == before


# What cannot be done inside

REFUSED = {
    "step": lambda world: world.step(),
    "step with a closure": lambda world: world.optimizer.step(lambda: torch.tensor(1.0)),
    "entering again": lambda world: world.optimizer.averaged().__enter__(),
    "averages": lambda world: world.optimizer.averages(),
    "copy_averages_to": lambda world: world.optimizer.copy_averages_to(nn.Linear(2, 1)),
    "reading the state": lambda world: world.optimizer.state,
    "replacing the state": lambda world: setattr(world.optimizer, "state", {}),
    "init_state": lambda world: world.optimizer.param_groups[0].update(amsgrad=True) or world.optimizer.init_state(),
    "state_dict": lambda world: world.optimizer.state_dict(),
    "torch_state_dict": lambda world: world.optimizer.torch_state_dict(),
    "load_state_dict": lambda world: world.optimizer.load_state_dict(world.saved),
    "add_param_group": lambda world: world.optimizer.add_param_group({"params": [Parameter(torch.ones(2))]}),
    "pickle": lambda world: pickle.dumps(world.optimizer),
    "deepcopy": lambda world: copy.deepcopy(world.optimizer),
}


@pytest.mark.parametrize("call", REFUSED)
def test_inside_it_is_refused_and_changes_nothing(call):
    trained = world()
    trained.saved = copy.deepcopy(trained.optimizer.state_dict())
    outside = snapshot(trained.optimizer, *trained.params)
    with on("reference"), trained.optimizer.averaged():
        inside = snapshot(trained.optimizer, *trained.params)
        trained.set_gradients()
        for param in trained.params:
            param.grad = None
        with pytest.raises(RuntimeError, match=r"^within averaged\(\) the parameters hold averages.* of that block$"):
            REFUSED[call](trained)
        for param in trained.params:
            param.grad = None
        trained.optimizer.param_groups[0]["amsgrad"] = False
        assert snapshot(trained.optimizer, *trained.params)[0] == inside[0]
        assert snapshot(trained.optimizer, *trained.params)[3] == inside[3]
    after = snapshot(trained.optimizer, *trained.params)
    assert (after[0], after[1], after[3]) == (outside[0], outside[1], outside[3])
    with on("reference"):
        trained.run(1)


def test_a_backward_that_would_step_is_refused_inside():
    trained = world()
    optimizer = trained.optimizer
    optimizer.step_in_backward()
    before = snapshot(optimizer, *trained.params)
    with optimizer.averaged(), pytest.raises(RuntimeError, match=r"^within averaged\(\)"):
        sum(param.sum() for param in trained.params).backward()
    optimizer.zero_grad()
    for param in trained.params:
        param.grad = None
    after = snapshot(optimizer, *trained.params)
    assert (after[0], after[3]) == (before[0], before[3])


def test_another_thread_cannot_step_inside():
    trained = world()
    trained.set_gradients()
    raised = []

    def step():
        try:
            trained.optimizer.step()
        except RuntimeError as error:
            raised.append(str(error))

    with on("reference"), trained.optimizer.averaged():
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert len(raised) == 1
    assert raised[0].startswith("within averaged()")


def test_within_a_step_it_is_refused():
    trained = world()
    optimizer, raised = trained.optimizer, []
    read = optimizer._hyperparameters

    def reading(group, **more):
        if optimizer._stepper._stepping and not raised:
            with contextlib.suppress(RuntimeError):
                raised.append(None)
                with optimizer.averaged():
                    raise AssertionError
            raised.append("refused")
        return read(group, **more)

    optimizer._hyperparameters = reading
    trained.set_gradients()
    optimizer.param_groups[0]["eps"] = 1e-7
    with on("reference"):
        optimizer.step()
    assert raised == [None, "refused"]


def test_a_saved_model_has_the_averages():
    model = nn.Linear(3, 2)
    optimizer = optim.AdamW(model.named_parameters(), lr=0.1, ema_decay=0.5)
    model(torch.ones(1, 3)).sum().backward()
    with on("reference"):
        optimizer.step()
    with optimizer.averaged():
        saved = copy.deepcopy(model.state_dict())
    assert saved.keys() == optimizer.averages().keys()
    assert all(torch.equal(saved[name], average) for name, average in optimizer.averages().items())


# By name, and in another model


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)
        self.tied = self.last


def trained_net(dtype=torch.float32, **options):
    torch.manual_seed(1)
    net = Net().to(dtype)
    optimizer = optim.AdamW(net.named_parameters(), lr=0.1, **{"ema_decay": 0.5} | options)
    for step in range(3):
        for param in net.parameters():
            param.grad = torch.full_like(param, 1.0 + step)
        with on("reference"):
            optimizer.step()
    return net, optimizer


@EVERY_KIND
def test_averages_are_copies_in_full_precision(kind):
    trained = world(kind)
    found = trained.optimizer.averages()
    assert list(found) == list(range(len(SHAPES)))
    for param, average in zip(trained.params, found.values(), strict=True):
        assert same(average, peek(trained.optimizer)[param]["ema"])
    before = snapshot(trained.optimizer, *trained.params)
    for average in found.values():
        average.zero_()
    for average in world(kind, steps=0).optimizer.averages().values():  # the weights
        average.zero_()
    assert snapshot(trained.optimizer, *trained.params) == before


def test_averages_have_the_names_of_the_parameters():
    net, optimizer = trained_net()
    assert list(optimizer.averages()) == [name for name, _ in net.named_parameters()]
    optimizer.param_groups[0]["param_names"][0] = optimizer.param_groups[0]["param_names"][1]
    with pytest.raises(
        ValueError, match=r"^averages: two parameters are named 'first.bias'; give them different names$"
    ):
        optimizer.averages()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_averages_are_copied_to_another_model_as_averaged_shows_them(kind, dtype):
    net, optimizer = trained_net(kind)
    with torch.no_grad():
        optimizer.state[net.first.weight]["ema"].fill_(1 + 2**-8)  # halfway between two numbers in bfloat16
    other = Net().to(dtype)
    other.extra = Parameter(torch.ones(3))
    buffers = {name: buffer.clone() for name, buffer in other.named_buffers()}
    before = snapshot(optimizer, *net.parameters())
    optimizer.copy_averages_to(other)
    assert snapshot(optimizer, *net.parameters()) == before
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in other.named_buffers())
    assert other.extra.tolist() == [1.0] * 3
    own = dict(other.named_parameters())
    for name, average in optimizer.averages().items():
        assert same(own[name].detach(), rounded(average, dtype))
    if dtype == kind:
        with optimizer.averaged():
            assert all(same(param.detach(), own[name].detach()) for name, param in net.named_parameters())


def test_a_model_that_does_not_fit_is_refused_and_unchanged():
    _, optimizer = trained_net()
    others = {
        r"^model: expected parameter 'first.weight' of shape \(4, 3\) .*, got torch.float32 of shape \(5, 3\)$": Net(5),
        r"^model: expected a parameter 'last.weight' in it, got .*trained$": Net(),
        r"^model: expected a parameter 'first.weight' in it": nn.DataParallel(Net()),
        r"^model: expected parameter 'last.bias' of .* same kind of numbers": Net(),
    }
    del others[next(message for message in others if "last.weight" in message)].last
    (wrong,) = [other for message, other in others.items() if "same kind of" in message and "first" not in message]
    wrong.last.bias = Parameter(wrong.last.bias.detach().to(torch.complex64))
    for message, other in others.items():
        if "last.weight" in message:
            del other.tied
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=message):
            optimizer.copy_averages_to(other)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    coded = Net()
    coded.first.weight = Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"^model: expected parameter 'first.weight' .* same kind .*, got torch.int8"):
        optimizer.copy_averages_to(coded)
    with pytest.raises(ValueError, match=r"^model: expected memory for parameter 'first.weight', got .* meta device"):
        optimizer.copy_averages_to(Net().to("meta"))
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got \{\}$"):
        optimizer.copy_averages_to({})
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got 3$"), optimizer.averaged(3):
        raise AssertionError
    unnamed = world().optimizer
    with pytest.raises(
        ValueError, match=r"^copy_averages_to: expected names for all parameters, parameter 0 of group 0"
    ):
        unnamed.copy_averages_to(Net())


def test_an_average_of_the_wrong_shape_is_refused():
    trained = world()
    trained.optimizer.state[trained.params[1]]["ema"] = torch.ones(8)
    before = snapshot(trained.optimizer, *trained.params)
    for ask in (trained.optimizer.averages, trained.optimizer.averaged().__enter__):
        with pytest.raises(
            ValueError, match=r"^state 'ema' of parameter 1 of group 0 has shape \(8,\), expected \(7,\)"
        ):
            ask()
    assert snapshot(trained.optimizer, *trained.params) == before


@pytest.mark.parametrize("value", [1.0, -0.1, torch.nan, 2, True, "0.9"])
def test_a_decay_out_of_range_is_refused(value):
    with pytest.raises((ValueError, TypeError), match=r"^ema_decay: expected a number"):
        optim.AdamW([Parameter(torch.ones(2))], ema_decay=value)


def test_the_averages_are_those_of_torchs_averaged_model():
    """In float32, where both move: the same to float32's precision, begun at the same weights."""
    torch.manual_seed(1)
    net = Net()
    optimizer = optim.AdamW(net.named_parameters(), lr=0.1, ema_decay=0.9)
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(net)
    for step in range(20):
        for param in net.parameters():
            param.grad = torch.full_like(param, (-1.0) ** step + 0.1 * step)
        optimizer.step()
        theirs.update_parameters(net)
    for name, average in theirs.module.named_parameters():
        assert torch.allclose(optimizer.averages()[name], average, rtol=1e-5, atol=1e-6)
