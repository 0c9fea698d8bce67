"""Guards `decay_groups`: what decays and what does not, and by which arguments.

A parameter in the wrong group is silent: training runs, a little worse. So each kind of module and name is listed here
with where it must go and the reason that is printed, and what cannot be right, a pattern with a typo for example, must
be refused in a sentence that names it. What is printed, and training with the groups, is in test_decay_groups_use.py.
"""

import math
import re
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrizations, parametrize

import lucid.optim as optim
from decaying import BIAS, EMBEDDING, FROZEN, KEPT_EMBEDDING, NORM, ONE, SCALAR, WEIGHT, Transformer, holding, where

# What goes where


def affine(norm):
    return norm, {"weight": NORM, "bias": BIAS}


RNN = {"weight_ih_l0": WEIGHT, "weight_hh_l0": WEIGHT, "bias_ih_l0": BIAS, "bias_hh_l0": BIAS}
LAYER = {"weight": WEIGHT, "bias": BIAS}

MODULES = {
    "Linear": (nn.Linear(3, 2), LAYER),
    "Linear of one output": (nn.Linear(3, 1), LAYER),
    "Bilinear": (nn.Bilinear(2, 3, 4), LAYER),
    "Conv1d": (nn.Conv1d(2, 3, 3), LAYER),
    "Conv2d of one channel": (nn.Conv2d(1, 1, 1), LAYER),
    "ConvTranspose3d": (nn.ConvTranspose3d(2, 3, 3), LAYER),
    "LayerNorm": affine(nn.LayerNorm(3)),
    "LayerNorm over 3 axes": affine(nn.LayerNorm((2, 3, 4))),
    "RMSNorm": (nn.RMSNorm(3), {"weight": NORM}),
    "RMSNorm over 2 axes": (nn.RMSNorm((2, 3)), {"weight": NORM}),
    "GroupNorm": affine(nn.GroupNorm(1, 3)),
    "BatchNorm1d": affine(nn.BatchNorm1d(3)),
    "BatchNorm2d": affine(nn.BatchNorm2d(3)),
    "BatchNorm3d": affine(nn.BatchNorm3d(3)),
    "SyncBatchNorm": affine(nn.SyncBatchNorm(3)),
    "InstanceNorm1d": affine(nn.InstanceNorm1d(3, affine=True)),
    "InstanceNorm2d": affine(nn.InstanceNorm2d(3, affine=True)),
    "InstanceNorm3d": affine(nn.InstanceNorm3d(3, affine=True)),
    "Embedding": (nn.Embedding(3, 2), {"weight": EMBEDDING}),
    "EmbeddingBag": (nn.EmbeddingBag(3, 2), {"weight": EMBEDDING}),
    "MultiheadAttention": (
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        {"in_proj_weight": WEIGHT, "in_proj_bias": BIAS, "bias_k": BIAS, "bias_v": BIAS}
        | {"out_proj.weight": WEIGHT, "out_proj.bias": BIAS},
    ),
    "MultiheadAttention of other sizes": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False),
        dict.fromkeys(["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"], WEIGHT),
    ),
    "RNN": (nn.RNN(3, 2), RNN),
    "GRU": (nn.GRU(3, 2), RNN),
    "LSTM with a projection": (nn.LSTM(3, 4, proj_size=2), RNN | {"weight_hr_l0": WEIGHT}),
    "LSTMCell": (nn.LSTMCell(3, 2), {name.removesuffix("_l0"): to for name, to in RNN.items()}),
    "PReLU": (nn.PReLU(), {"weight": ONE}),
    "PReLU of channels": (nn.PReLU(3), {"weight": ONE}),
    "parameters held by the model": (
        holding(scale=(), gain=(3,), table=(1, 4, 3), mixing=(3, 3), bias=(3,)),
        {"scale": SCALAR, "gain": ONE, "table": WEIGHT, "mixing": WEIGHT, "bias": BIAS},
    ),
    "biases of many axes": (
        holding(bias=(1, 3, 1, 1), up_bias=(4, 3), relative_position_bias_table=(4, 3), bias2=(2, 2), biases=(2, 2)),
        dict.fromkeys(["bias", "up_bias", "relative_position_bias_table", "bias2", "biases"], BIAS),
    ),
    "names that only look like a bias": (
        holding(unbiased=(2, 2), biased_weight=(2, 2), debias=(2, 2)),
        dict.fromkeys(["unbiased", "biased_weight", "debias"], WEIGHT),
    ),
    "a norm of one's own": (holding(called="MyRMSNorm", weight=(3,)), {"weight": NORM}),
    "a norm with one gain a head": (holding(called="HeadNorm", gain=(2, 3)), {"gain": NORM}),
    "a norm of images": (holding(called="LayerNorm2d", weight=(3, 1, 1)), {"weight": NORM}),
    "a norm in small letters": (holding(called="Layernorm", weight=(1, 3)), {"weight": NORM}),
    "a norm spelt out": (holding(called="ResponseNormalization", weight=(1, 3)), {"weight": NORM}),
    "a norm by its base": (holding(type("MyNorm", (nn.Module,), {}), "Gated", gain=(2, 3)), {"gain": NORM}),
    "a norm fused with a layer": (
        holding(called="LayerNormLinear", layer_norm_weight=(3,), layer_norm_bias=(3,), weight=(3, 3), bias=(3,)),
        {"layer_norm_weight": ONE, "layer_norm_bias": BIAS, "weight": WEIGHT, "bias": BIAS},
    ),
    "a class named for a distribution": (holding(called="Normal", weight=(3, 3)), {"weight": WEIGHT}),
    "a layer named for its norm": (type("WeightNorm", (nn.Linear,), {})(3, 2), LAYER),
    "an embedding of one's own": (holding(called="PositionEmbedding", table=(4, 3)), {"table": EMBEDDING}),
    "embeddings of one's own": (
        holding(called="ViTEmbeddings", cls_token=(1, 1, 3), position=(1, 4, 3), scale=(3,)),
        {"cls_token": EMBEDDING, "position": EMBEDDING, "scale": ONE},
    ),
    "a subclass of Embedding": (type("Positions", (nn.Embedding,), {})(3, 2), {"weight": EMBEDDING}),
    "a convolution named for embedding": (type("PatchEmbedding", (nn.Conv2d,), {})(3, 2, 2), LAYER),
    "lists and dicts of parameters": (
        nn.ModuleList(
            [
                nn.ParameterList([torch.ones(2, 2), torch.ones(2)]),
                nn.ParameterDict({"bias": torch.ones(2, 2), "weight": torch.ones(2, 2)}),
            ]
        ),
        {"0.0": WEIGHT, "0.1": ONE, "1.bias": BIAS, "1.weight": WEIGHT},
    ),
}


@pytest.mark.parametrize(("model", "wanted"), MODULES.values(), ids=MODULES.keys())
def test_a_module_alone_and_within_others(model, wanted):
    assert where(optim.decay_groups(model, 0.1)) == wanted
    outer = nn.ModuleDict({"Norm": nn.Sequential(model)})  # what is around it says nothing
    assert where(optim.decay_groups(outer, 0.1)) == {f"Norm.0.{name}": to for name, to in wanted.items()}


def test_every_norm_and_embedding_of_torch_is_in_the_table():
    listed = {type(model) for model, _ in MODULES.values()}
    named = [getattr(nn, name) for name in dir(nn) if re.search(r"Norm(\dd)?$|Embedding(Bag)?$", name)]
    having_parameters = {cls for cls in named if cls is not nn.LocalResponseNorm and "Lazy" not in cls.__name__}
    assert len(having_parameters) == 12
    assert having_parameters <= listed


@pytest.mark.parametrize("name", [name for name, (_, wanted) in MODULES.items() if EMBEDDING in wanted.values()])
def test_embeddings_do_not_decay_by_choice(name):
    model, wanted = MODULES[name]
    wanted = {name: KEPT_EMBEDDING if to == EMBEDDING else to for name, to in wanted.items()}
    assert where(optim.decay_groups(model, 0.1, decay_embeddings=False)) == wanted


def test_a_lazy_layer_once_run_is_what_it_became():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: lazy modules are new
        model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"lazy '0\.weight'; run the model once on an input before"):
        optim.decay_groups(model)
    model(torch.ones(2, 3))
    wanted = {"0.weight": WEIGHT, "0.bias": BIAS, "1.weight": NORM, "1.bias": BIAS}
    assert where(optim.decay_groups(model)) == wanted


# What a parametrization keeps in place of a tensor


@pytest.mark.parametrize("dim", [0, None], ids=["a norm a row", "one norm"])
def test_both_tensors_of_weight_norm_go_where_the_weight_would(dim):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3), dim=dim))
    path = "0.parametrizations.weight.original"
    wanted = {"0.bias": BIAS, f"{path}0": WEIGHT, f"{path}1": WEIGHT}
    assert where(optim.decay_groups(model, 0.1)) == wanted


def test_a_model_that_is_itself_parametrized():
    model = parametrizations.spectral_norm(nn.Linear(4, 3))
    wanted = {"bias": BIAS, "parametrizations.weight.original": WEIGHT}
    assert where(optim.decay_groups(model, 0.1)) == wanted


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.factor * x


@pytest.mark.parametrize(
    ("make", "key", "to"),
    [
        (lambda: nn.Embedding(3, 2), "weight", KEPT_EMBEDDING),
        (lambda: nn.LayerNorm((2, 3)), "weight", NORM),
        (lambda: holding(bias=(2, 2)), "bias", BIAS),
        (lambda: nn.Conv1d(2, 3, 1), "weight", WEIGHT),
    ],
    ids=["embedding", "norm", "bias", "convolution"],
)
def test_a_parametrized_tensor_keeps_its_role_and_its_parametrization_goes_by_shape(make, key, to):
    model = nn.ModuleList([make()])
    parametrize.register_parametrization(model[0], key, Doubled())
    placed = where(optim.decay_groups(model, 0.1, decay_embeddings=False))
    assert placed[f"0.parametrizations.{key}.original"] == to
    assert placed[f"0.parametrizations.{key}.0.factor"] == SCALAR


# Shared parameters


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize(
    ("options", "to"),
    [
        ({}, "decay"),
        ({"decay_embeddings": False}, "no decay"),
        ({"decay_embeddings": False, "decay": "*head.weight"}, "decay"),
        ({"decay_embeddings": False, "decay": "*tokens.weight"}, "decay"),
        ({"no_decay": "*head.weight"}, "no decay"),
        ({"no_decay": "*tokens.weight"}, "no decay"),
    ],
)
def test_a_tied_embedding_comes_once_and_is_an_embedding(options, to, head_first):
    layers = [("tokens", nn.Embedding(5, 3)), ("head", nn.Linear(3, 5, bias=False))]
    model = nn.Sequential(OrderedDict(reversed(layers) if head_first else layers))
    model.head.weight = model.tokens.weight
    groups = optim.decay_groups(model, 0.1, **options)
    [(name, (goes, why))] = where(groups).items()
    assert [name] == [name for name, _ in model.named_parameters()]
    assert goes == to
    assert groups.placed[0].also == (("tokens.weight",) if head_first else ("head.weight",))
    if options == {"decay_embeddings": False}:
        assert why == "embedding"
    assert f"also {groups.placed[0].also[0]}" in str(groups)


def test_of_a_shared_parameters_uses_one_that_says_no_is_enough():
    model = nn.ModuleDict({"layer": nn.Linear(3, 3, bias=False), "norm": nn.LayerNorm((3, 3), bias=False)})
    model["norm"].weight = model["layer"].weight
    assert where(optim.decay_groups(model, 0.1)) == {"layer.weight": NORM}


def test_a_shared_module_comes_once_with_all_its_names():
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": layer})
    groups = optim.decay_groups(model, 0.1, no_decay="b.0.weight")
    assert where(groups) == {"a.weight": ("no decay", "pattern 'b.0.weight'"), "a.bias": BIAS}
    assert groups.placed[0].also == ("b.0.weight", "c.weight")
    assert len(optim.AdamW(groups).param_groups[0]["params"]) == 2


def test_two_names_in_one_module_are_one_parameter():
    model = holding(first=(2, 2))
    model.second = model.first
    groups = optim.decay_groups(model, 0.1, no_decay=["second"])
    assert where(groups) == {"first": ("no decay", "pattern 'second'")}


# Frozen and missing parameters


def test_frozen_parameters_are_left_out_and_listed():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    groups = optim.decay_groups(model, 0.1)
    assert where(groups) == {
        "0.weight": FROZEN,
        "0.bias": FROZEN,
        "1.weight": NORM,
        "1.bias": BIAS,
        "2.weight": WEIGHT,
        "2.bias": BIAS,
    }
    held = {id(param) for group in groups for _, param in group["params"]}
    assert held == {id(param) for param in model.parameters() if param.requires_grad}
    assert "Frozen, left out: 2 tensors, 9 parameters" in str(groups)


def test_a_pattern_may_match_frozen_parameters_only_and_leaves_them_out():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    groups = optim.decay_groups(model, 0.1, no_decay="0.weight", decay="0.bias")
    assert where(groups) == {"0.weight": FROZEN, "0.bias": FROZEN, "1.weight": WEIGHT, "1.bias": BIAS}


def test_a_model_with_nothing_to_train_is_refused():
    model = nn.Linear(2, 3).requires_grad_(False)
    with pytest.raises(ValueError, match=r"a parameter to train, got 2 parameters, all frozen; unfreeze some"):
        optim.decay_groups(model)
    with pytest.raises(ValueError, match=r"a parameter to train, got a ReLU without any"):
        optim.decay_groups(nn.ReLU())


def test_a_group_that_would_be_empty_is_left_out():
    [group] = optim.decay_groups(nn.Linear(2, 3, bias=False), 0.1)
    assert group["weight_decay"] == 0.1
    [group] = optim.decay_groups(nn.LayerNorm(3), 0.1)
    assert group["weight_decay"] == 0.0
    assert [name for name, _ in group["params"]] == ["weight", "bias"]


# Patterns


def test_patterns_decide_before_type_and_shape():
    groups = optim.decay_groups(
        Transformer(1), 0.1, decay=["*.norm.weight", "scale"], no_decay=("places.*", "blocks.[0-9].mlp.?.weight")
    )
    placed = where(groups)
    by_pattern = {name: to for name, to in placed.items() if "pattern" in to[1]}
    assert by_pattern == {
        "places.weight": ("no decay", "pattern 'places.*'"),
        "scale": ("decay", "pattern 'scale'"),
        "blocks.0.norm.weight": ("decay", "pattern '*.norm.weight'"),
        **{f"blocks.0.mlp.{n}.weight": ("no decay", "pattern 'blocks.[0-9].mlp.?.weight'") for n in range(4)},
    }
    assert placed["blocks.0.attention.in_proj_weight"] == WEIGHT


@pytest.mark.parametrize("kind", [list, tuple, set, iter, lambda patterns: dict.fromkeys(patterns).keys()])
def test_patterns_come_in_any_iterable_or_as_one_string(kind):
    model = nn.Linear(2, 3)
    wanted = {"weight": ("no decay", "pattern 'wei*'"), "bias": BIAS}
    assert where(optim.decay_groups(model, no_decay="wei*")) == wanted
    assert where(optim.decay_groups(model, no_decay=kind(["wei*"]))) == wanted


def test_a_name_is_its_own_pattern_whatever_its_signs():
    model = nn.ParameterDict({"w[0]": torch.ones(2, 2), "w0": torch.ones(2, 2)})
    wanted = {"w[0]": ("no decay", "pattern 'w[0]'"), "w0": ("no decay", "pattern 'w[0]'")}
    assert where(optim.decay_groups(model, 0.1, no_decay="w[0]")) == wanted


def test_timms_exceptions_are_taken_as_the_docstring_says():
    model = holding(pos_embed=(1, 4, 3), cls_token=(1, 1, 3), head=(3, 2))
    model.no_weight_decay = lambda: {"pos_embed", "cls_token", "dist_token"}  # some are of other variants
    groups = optim.decay_groups(model, 0.1, no_decay=model.no_weight_decay() & dict(model.named_parameters()).keys())
    assert {name: goes for name, (goes, _) in where(groups).items()} == {
        "pos_embed": "no decay",
        "cls_token": "no decay",
        "head": "decay",
    }


@pytest.mark.parametrize("argument", ["decay", "no_decay"])
@pytest.mark.parametrize("typo", ["scael", "SCALE", "cale", "", "*.scale", "blocks", "blocks.9.*"])
def test_a_pattern_that_matches_nothing_is_named(argument, typo):
    with pytest.raises(ValueError, match=rf"^{argument}: expected patterns that match whole names") as raised:
        optim.decay_groups(Transformer(1), **{argument: ["*.mlp.*", typo]})
    assert f"got {typo!r}, which matches none" in str(raised.value)
    assert "'scale'" in str(raised.value)  # a name, as an example


def test_a_name_matched_by_both_is_named_with_the_patterns():
    with pytest.raises(ValueError, match=r"^decay, no_decay: expected each parameter in one of them") as raised:
        optim.decay_groups(Transformer(1), decay=["scale", "blocks.0.norm.*"], no_decay="*.norm.bias")
    assert "'blocks.0.norm.bias' in both, by 'blocks.0.norm.*' and '*.norm.bias'" in str(raised.value)


def test_a_tied_parameter_matched_by_both_under_two_names_is_refused():
    with pytest.raises(ValueError, match=r"^decay, no_decay: expected each parameter in one of them") as raised:
        optim.decay_groups(Transformer(1), decay="tokens.*", no_decay="head.*")
    wanted = "'tokens.weight', which is also 'head.weight', in both, by 'tokens.*' and 'head.*'"
    assert wanted in str(raised.value)


@pytest.mark.parametrize("argument", ["decay", "no_decay"])
@pytest.mark.parametrize(
    ("wrong", "got"),
    [(None, "NoneType"), (3, "int"), ([3], "int"), (["weight", None], "NoneType"), (b"weight", "int")],
)
def test_what_is_no_pattern_is_refused(argument, wrong, got):
    with pytest.raises(TypeError, match=rf"^{argument}: expected patterns of names such as .*, got {got}$"):
        optim.decay_groups(nn.Linear(2, 3), **{argument: wrong})


# The other arguments


@pytest.mark.parametrize(
    ("model", "got"),
    [(None, "NoneType"), ([nn.Linear(1, 1)], "list"), (nn.Linear(1, 1).parameters(), "generator"), (nn.Linear, "type")],
)
def test_what_is_no_model_is_refused(model, got):
    with pytest.raises(TypeError, match=rf"^model: expected a torch\.nn\.Module, got {got}; give the model itself"):
        optim.decay_groups(model)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (-0.1, ValueError),
        (math.inf, ValueError),
        (math.nan, ValueError),
        ("0.1", TypeError),
        (True, TypeError),
        (1j, TypeError),
    ],
)
def test_weight_decay_is_refused_in_the_words_of_adamw(wrong, error):
    model = nn.Linear(2, 3)
    with pytest.raises(error, match=r"^weight_decay: expected a number") as ours:
        optim.decay_groups(model, wrong)
    with pytest.raises(error) as adamws:
        optim.AdamW(model.parameters(), weight_decay=wrong)
    assert str(ours.value) == str(adamws.value)


def test_decay_embeddings_is_true_or_false():
    with pytest.raises(TypeError, match=r"^decay_embeddings: expected True or False, got 0\.0$"):
        optim.decay_groups(nn.Linear(2, 3), 0.1, decay_embeddings=0.0)


@pytest.mark.parametrize(
    ("own", "optimizers", "wanted"), [(None, 0.3, 0.3), (None, None, 0.01), (0.1, 0.3, 0.1), (0, 0.3, 0)]
)
def test_without_weight_decay_the_optimizers_counts(own, optimizers, wanted):
    options = {} if optimizers is None else {"weight_decay": optimizers}
    optimizer = optim.AdamW(optim.decay_groups(nn.Linear(2, 3), own), **options)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [wanted, 0.0]
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]
