"""Guards what becomes of parameters: frozen, tied, reparametrized, swapped, converted, assigned.

Each model is trained from one seed with this AdamW and with torch's: losses and weights agree to a relative 1e-4 and an
absolute 1e-5. What is ours alone, swaps and conversions, agrees to the bit. docs/ecosystem.md is the table of all.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import lucid.optim as optim
from beside_torch import (
    FORMATS,
    as_with_torch,
    batch,
    make_model,
    same,
    steps_of,
    train,
    weights,
)

# Parameters that are frozen, tied, or come later


class Adapted(nn.Module):
    """A linear layer that is frozen, and the low-rank product that is learned beside it (LoRA)."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = Parameter(torch.randn(rank, base.in_features) / 4)
        self.up = Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T

    @torch.no_grad()
    def merge(self):
        self.base.weight += self.up @ self.down
        self.up.zero_()


@pytest.mark.parametrize("given", ["all", "those that learn"])
def test_adapters_of_a_frozen_model_that_are_merged_and_unfrozen_later(given):
    def run(make):
        model = make_model()
        model[0], model[2] = Adapted(model[0], 2), Adapted(model[2], 1)
        base = [*model[0].base.parameters(), *model[2].base.parameters()]
        adapters = [model[0].down, model[0].up, model[2].down, model[2].up]
        optimizer = make(model.parameters() if given == "all" else adapters, lr=0.02)
        frozen = [param.detach().clone() for param in base]
        losses = train(model, optimizer, 0, 10)
        assert same([param.detach() for param in base], frozen)
        assert steps_of(optimizer, *base, *adapters) == [0] * 4 + [10] * 4
        assert len(optimizer.state) == 4
        before = model(batch()[0])
        for layer in (model[0], model[2]):
            layer.merge()
        torch.testing.assert_close(model(batch()[0]), before)
        for param in base:
            param.requires_grad_(True)
        for param in adapters:
            param.requires_grad_(False)
        if given != "all":
            optimizer.add_param_group({"params": base, "lr": 0.01})
        kept = [param.detach().clone() for param in adapters]
        optimizer.zero_grad()
        losses += train(model, optimizer, 10, 20)
        assert steps_of(optimizer, *base, *adapters) == [10] * 8
        assert same([param.detach() for param in adapters], kept)
        assert not any(torch.equal(param, old) for param, old in zip(base, frozen, strict=True))
        return model, losses

    as_with_torch(run)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)

    def train_steps(self, optimizer, steps):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.head(self.embed(torch.arange(7))), torch.arange(7).roll(1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("steps_before", [0, 5])
def test_weights_tied_after_the_optimizer_was_made(steps_before):
    def run(make):
        model = Tokens()
        optimizer = make(model.parameters(), lr=0.05)
        model.train_steps(optimizer, steps_before)
        optimizer.zero_grad()
        old, rests = model.head.weight, model.head.weight.detach().clone()
        model.head.weight = model.embed.weight
        losses = model.train_steps(optimizer, 10)
        assert torch.equal(old, rests)  # listed still, and without a gradient
        assert steps_of(optimizer, model.embed.weight, old) == [steps_before + 10, steps_before]
        return model, losses

    as_with_torch(run)


def test_weights_untied_later():
    def run(make):
        model = Tokens()
        model.head.weight = model.embed.weight
        optimizer = make(model.parameters(), lr=0.05)
        losses = model.train_steps(optimizer, 5)
        model.head.weight = Parameter(model.embed.weight.detach().clone())
        optimizer.add_param_group({"params": [model.head.weight]})
        losses += model.train_steps(optimizer, 10)
        assert steps_of(optimizer, model.embed.weight, model.head.weight) == [15, 10]
        return model, losses

    as_with_torch(run)


# Parametrizations


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


def symmetric(layer):
    parametrize.register_parametrization(layer, "weight", Symmetric())


PARAMETRIZATIONS = [spectral_norm, weight_norm, orthogonal, symmetric]


def make_parametrized(apply):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    apply(model[0])
    return model


@pytest.mark.parametrize("apply", PARAMETRIZATIONS, ids=lambda f: f.__name__)
def test_parametrized_layers_train_as_with_torch(apply):
    def run(make):
        model = make_parametrized(apply)
        return model, train(model, make(model.parameters(), lr=0.02), 0, 30)

    as_with_torch(run)


@pytest.mark.parametrize("apply", PARAMETRIZATIONS, ids=lambda f: f.__name__)
def test_parametrizations_removed_in_the_middle(apply):
    """The one tensor that was parametrized stays, with its state; weight_norm's two become a new one, to be added."""

    def run(make):
        model = make_parametrized(apply)
        optimizer = make(model.parameters(), lr=0.02)
        losses = train(model, optimizer, 0, 15)
        known = list(optimizer.state)
        optimizer.zero_grad()
        parametrize.remove_parametrizations(model[0], "weight")
        is_new = not any(model[0].weight is param for param in known)
        assert is_new == (apply is weight_norm)
        if is_new:
            before = model[0].weight.detach().clone()
            losses += train(model, optimizer, 15, 17)
            assert torch.equal(model[0].weight, before)  # the optimizer does not know it
            optimizer.add_param_group({"params": [model[0].weight]})
        losses += train(model, optimizer, 17, 30)
        assert steps_of(optimizer, model[0].weight) == [13 if is_new else 28]
        return model, losses

    as_with_torch(run)


def test_pruned_weights_that_are_made_permanent_in_the_middle():
    """The mask hides elements from the model, whose parameter stays the one that the optimizer has."""

    def run(make):
        model = make_model()
        optimizer = make(model.parameters(), lr=0.02)
        weight = model[0].weight
        losses = train(model, optimizer, 0, 5)
        prune.l1_unstructured(model[0], "weight", 0.5)
        assert model[0].weight_orig is weight
        losses += train(model, optimizer, 5, 15)
        prune.remove(model[0], "weight")
        assert model[0].weight is weight
        assert int((weight == 0).sum()) == 32
        losses += train(model, optimizer, 15, 20)
        assert steps_of(optimizer, weight) == [20]
        return model, losses

    as_with_torch(run)


# Tensors that are swapped, converted, assigned


@pytest.fixture(params=[False, True], ids=["in place", "swapped"])
def swap(request):
    """Whether modules that are converted put new tensors into the same Parameters, or new memory."""
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("in_backward", [False, True], ids=["", "in backward"])
@pytest.mark.parametrize("state_format", FORMATS)
def test_swapped_tensors(state_format, in_backward):
    runs = []
    for swapped in (False, True):
        model = make_model()
        optimizer = optim.AdamW(model.parameters(), lr=0.02, state_format=state_format)
        optimizer.step_in_backward(in_backward)
        train(model, optimizer, 0, 3)
        optimizer.zero_grad()
        params = list(model.parameters())
        if swapped:
            for param in params:
                other = param.detach().clone()
                hooks = param._post_accumulate_grad_hooks
                torch.utils.swap_tensors(param, Parameter(other))
                assert param.data_ptr() == other.data_ptr()
                assert param._post_accumulate_grad_hooks is hooks
        train(model, optimizer, 3, 6)
        assert all(map(torch.Tensor.is_set_to, params, model.parameters()))
        assert steps_of(optimizer, *params) == [6] * 4
        runs.append(weights(model))
    assert same(*runs)


def train_in(dtype, model, optimizer, start, stop):
    for step in range(start, stop):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_converted_in_the_middle_goes_on(dtype, state_format, swap):
    """As an optimizer that was made after the conversion and has loaded the state; float64 has to be told to load."""
    model = make_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.02, state_format=state_format)
    train(model, optimizer, 0, 3)
    optimizer.zero_grad()
    params = list(model.parameters())
    model.to(dtype)
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    twin = make_model().to(dtype)
    twin.load_state_dict(model.state_dict())
    made_after = optim.AdamW(twin.parameters(), lr=0.02, state_format=state_format)
    made_after.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if dtype is torch.float64:
        before = weights(model)
        with pytest.raises(ValueError, match="load it with load_state_dict, which converts"):
            train_in(dtype, model, optimizer, 3, 4)
        assert same(weights(model), before)
        optimizer.load_state_dict(optimizer.state_dict())
    train_in(dtype, model, optimizer, 3, 6)
    train_in(dtype, twin, made_after, 3, 6)
    assert steps_of(optimizer, *params) == [6] * 4
    assert same(weights(model), weights(twin))
    assert {param.dtype for param in params} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torchs_adamw_stops_at_a_model_converted_in_the_middle(dtype):
    """What docs/ecosystem.md says of it; where this fails, torch has learnt it."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    train(model, optimizer, 0, 3)
    optimizer.zero_grad()
    model.to(dtype)
    with pytest.raises(RuntimeError, match="expected dtype float"):
        train_in(dtype, model, optimizer, 3, 4)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_state_dict_loaded_into_the_model(assign, swap):
    """assign=True makes new Parameters, which no optimizer knows, unless they are swapped."""
    model, reference = make_model(), make_model()
    optimizer, its = (optim.AdamW(each.parameters(), lr=0.02) for each in (model, reference))
    for each in ((model, optimizer), (reference, its)):
        train(*each, 0, 3)
    optimizer.zero_grad()
    old = list(model.parameters())
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=assign)
    kept = model[0].weight is old[0]
    assert kept == (swap or not assign)
    if not kept:
        before = weights(model)
        train(model, optimizer, 3, 5)
        assert same(weights(model), before)
        saved = optimizer.state_dict()
        optimizer = optim.AdamW(model.parameters(), lr=0.02)
        optimizer.load_state_dict(saved)
    train(model, optimizer, 3, 6)
    train(reference, its, 3, 6)
    assert same(weights(model), weights(reference))


# Modules that have no values yet


def test_lazy_modules():
    def run(make):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.LazyLinear(1))
        with pytest.raises(ValueError, match="run the model once"):
            optim.decay_groups(model, weight_decay=0.1)
        optimizer = make(model.parameters(), lr=0.02)
        optimizer.step()  # without gradients: nothing
        assert not optimizer.state
        losses = train(model, optimizer, 0, 20)
        assert steps_of(optimizer, *model.parameters()) == [20] * 4
        return model, losses

    as_with_torch(run)


def test_a_model_on_the_meta_device(swap):
    """to_empty makes new Parameters, which no optimizer knows, unless they are swapped."""
    with torch.device("meta"):
        model = make_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.02)
    with pytest.raises(ValueError, match="materialise the model"):
        optimizer.init_state()
    model.to_empty(device="cpu")
    reference = make_model()
    model.load_state_dict(reference.state_dict())
    if not swap:
        train(model, optimizer, 0, 3)
        assert same(weights(model), weights(reference))
        optimizer = optim.AdamW(model.parameters(), lr=0.02)
        optimizer.zero_grad()
    train(model, optimizer, 0, 3)
    train(reference, optim.AdamW(reference.parameters(), lr=0.02), 0, 3)
    assert same(weights(model), weights(reference))
