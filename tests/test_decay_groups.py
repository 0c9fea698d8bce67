"""Guards `decay_groups`: what decays and what does not, and that one can see it.

A parameter in the wrong group is silent: training runs, a little worse. So each kind of module and
name is listed here with where it must go and the reason that is printed, and what cannot be right,
a pattern with a typo for example, must be refused in a sentence that names it.
"""

import copy
import math
import pickle
import re
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrizations, parametrize

import lucid.optim as optim

WEIGHT, EMBEDDING = ("decay", "weight"), ("decay", "embedding")
BIAS, NORM, ONE, SCALAR = (("no decay", why) for why in ("bias", "norm", "1-dimensional", "scalar"))
KEPT_EMBEDDING, FROZEN = ("no decay", "embedding"), ("frozen", "")


def where(groups):
    """What went where and why, from the list and, checked against it, from the groups themselves."""
    held = {}
    for group in groups:
        goes = "no decay" if group.get("weight_decay") == 0.0 else "decay"
        for name, param in group["params"]:
            assert isinstance(param, Parameter)
            assert name not in held
            held[name] = goes
    told = {item.name: (item.goes, item.why) for item in groups.placed}
    assert held == {name: goes for name, (goes, _) in told.items() if goes != "frozen"}
    return told


def holding(kind=nn.Module, called=None, **params):
    """A module of a class of that name with parameters of its own of these shapes."""
    module = type(called or "Holder", (kind,), {})()
    for name, shape in params.items():
        module.register_parameter(name, Parameter(torch.ones(shape)))
    return module


class Transformer(nn.Module):
    """A small GPT with tied embeddings, a scale of its own and repeated blocks."""

    def __init__(self, depth=3, tied=True):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.places = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(8),
                    "attention": nn.MultiheadAttention(8, 2, batch_first=True),
                    "mlp": nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 16), nn.PReLU(), nn.Linear(16, 8)),
                }
            )
            for _ in range(depth)
        )
        self.scale = Parameter(torch.tensor(1.0))
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, numbers):
        x = self.tokens(numbers) + self.places.weight
        for block in self.blocks:
            y = block["norm"](x)
            x = x + block["attention"](y, y, y, need_weights=False)[0]
            x = x + block["mlp"](x)
        return self.head(x) * self.scale


def numbers(step):
    return torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(step))


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        optimizer.zero_grad()
        x = numbers(step)
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten()).backward()
        optimizer.step()


def seeded(make, *args, **options):
    torch.manual_seed(0)
    return make(*args, **options)


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


# Wrappers: their prefixes are just names


def test_prefixes_of_wrappers_are_names():
    wanted = {"module.0.weight": WEIGHT, "module.0.bias": BIAS, "module.1.weight": NORM, "module.1.bias": BIAS}
    model = nn.DataParallel(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
    assert where(optim.decay_groups(model)) == wanted


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
    wanted = {"module.0.weight": WEIGHT, "module.0.bias": BIAS, "module.1.weight": NORM, "module.1.bias": BIAS}
    assert where(optim.decay_groups(model)) == wanted


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flattened_shards_are_refused(one_process, use_orig_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = torch.distributed.fsdp.FullyShardedDataParallel(
            nn.Linear(2, 3), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel, which flattens them; shard with .*fully_shard"):
        optim.decay_groups(nn.Sequential(sharded))


def test_fully_sharded_modules_keep_their_roles(one_process):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm((2, 3)), nn.Embedding(2, 3))
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for module in (*model, model):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    wanted = {"0.weight": WEIGHT, "0.bias": BIAS, "1.weight": NORM, "1.bias": BIAS, "2.weight": EMBEDDING}
    assert where(optim.decay_groups(model)) == wanted


# In print

TIED_GPT = """\
Weight decay: 14 tensors, 1,664 parameters
    tokens.weight                           (11, 8)  embedding, also head.weight
    places.weight                           (5, 8)   embedding
    blocks.*.attention.in_proj_weight × 3   (24, 8)  weight
    blocks.*.attention.out_proj.weight × 3  (8, 8)   weight
    blocks.*.mlp.1.weight × 3               (16, 8)  weight
    blocks.*.mlp.3.weight × 3               (8, 16)  weight
No weight decay: 25 tensors, 244 parameters
    scale                                   ()       pattern 'scale'
    blocks.*.norm.weight × 3                (8,)     norm
    blocks.*.norm.bias × 3                  (8,)     bias
    blocks.*.attention.in_proj_bias × 3     (24,)    bias
    blocks.*.attention.out_proj.bias × 3    (8,)     bias
    blocks.*.mlp.0.weight × 3               (8,)     norm
    blocks.*.mlp.1.bias × 3                 (16,)    bias
    blocks.*.mlp.2.weight × 3               (1,)     1-dimensional
    blocks.*.mlp.3.bias × 3                 (8,)     bias"""


def test_print_shows_what_went_where_at_a_glance():
    groups = optim.decay_groups(Transformer(), 0.1, no_decay="scale")
    assert str(groups) == TIED_GPT
    assert repr(groups) == str(groups)


def test_every_parameter_is_counted_once_in_print():
    model = Transformer(12, tied=False)
    model.blocks[3].requires_grad_(False)
    text = str(optim.decay_groups(model, 0.1))
    headings = [line.replace(",", "").split() for line in text.splitlines() if "tensors" in line]
    assert sum(int(words[-4]) for words in headings) == len(list(model.parameters()))
    assert sum(int(words[-2]) for words in headings) == sum(param.numel() for param in model.parameters())
    times = [line.split(" × ")[1].split()[0] if " × " in line else "1" for line in text.splitlines() if line[0] == " "]
    assert sum(map(int, times)) == len(list(model.parameters()))


def test_lines_are_one_only_where_shape_reason_and_other_names_are_the_same():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(6)), nn.Linear(2, 3, bias=False))
    model.extra = nn.ModuleDict({"tied": model[1]})
    text = str(optim.decay_groups(model, 0.1, decay="3.*"))
    assert text.splitlines() == [
        "Weight decay: 7 tensors, 30 parameters",
        "    *.weight × 4  (2, 2)  weight",
        "    1.weight      (2, 2)  weight, also extra.tied.weight",
        "    3.weight      (2, 2)  pattern '3.*'",
        "    6.weight      (3, 2)  weight",
    ]


def test_what_is_one_and_what_is_shared_by_many_is_said_so():
    model = nn.ModuleList([nn.Linear(1, 1, bias=False)] * 5)
    assert str(optim.decay_groups(model)).splitlines() == [
        "Weight decay: 1 tensor, 1 parameter",
        "    0.weight  (1, 1)  weight, also *.weight",
    ]
    model.requires_grad_(False)
    model.append(nn.LayerNorm(1, bias=False))
    assert str(optim.decay_groups(model)).splitlines() == [
        "No weight decay: 1 tensor, 1 parameter",
        "    5.weight  (1,)    norm",
        "Frozen, left out: 1 tensor, 1 parameter",
        "    0.weight  (1, 1)  also *.weight",
    ]


def test_a_folded_line_is_a_pattern_for_what_it_stands_for():
    groups = optim.decay_groups(Transformer(), 0.1, no_decay="blocks.*.mlp.1.weight")
    hit = [item.name for item in groups.placed if item.why.startswith("pattern")]
    assert hit == [f"blocks.{n}.mlp.1.weight" for n in range(3)]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda groups: pickle.loads(pickle.dumps(groups))])
def test_a_copy_prints_the_same(copied):
    groups = optim.decay_groups(Transformer(1), 0.1)
    twin = copied(groups)
    assert type(twin) is type(groups)
    assert twin.placed == groups.placed
    assert str(twin) == str(groups)
    assert [group["weight_decay"] for group in twin] == [0.1, 0.0]


# In an optimizer


def groups_by_hand(model):
    """The same groups with nothing of `decay_groups` in them."""
    params = dict(model.named_parameters())
    plain = [name for name in params if name.endswith(("norm.weight", "mlp.0.weight", "mlp.2.weight", "bias", "scale"))]
    return [
        {"params": [(name, params[name]) for name in params if name not in plain], "weight_decay": 0.1},
        {"params": [(name, params[name]) for name in plain], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
def test_training_is_that_with_groups_made_by_hand_bit_for_bit(state_format):
    models = [seeded(Transformer) for _ in range(2)]
    start = copy.deepcopy(models[0])
    for model, make in zip(models, [lambda model: optim.decay_groups(model, 0.1), groups_by_hand], strict=True):
        train(model, optim.AdamW(make(model), lr=3e-2, state_format=state_format), 0, 5)
    for ours, theirs, before in zip(*(model.parameters() for model in (*models, start)), strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, before)


def test_only_what_decays_decays():
    model = Transformer(1)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    groups = optim.decay_groups(model, 0.5)
    optimizer = optim.AdamW(groups, lr=0.5)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for item in groups.placed:
        factor = 0.75 if item.goes == "decay" else 1.0
        assert torch.equal(model.get_parameter(item.name), before[item.name] * factor), item.name


def test_the_optimizer_keeps_the_names_and_leaves_the_groups_as_they_were():
    model = Transformer(1)
    groups = optim.decay_groups(model, 0.1)
    kept = [dict(group, params=list(group["params"])) for group in groups]
    optimizers = [optim.AdamW(groups, lr=lr) for lr in (1e-3, 1e-4)]
    assert list(groups) == kept
    for optimizer in optimizers:
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        params = [param for group in optimizer.param_groups for param in group["params"]]
        assert all(model.get_parameter(name) is param for name, param in zip(names, params, strict=True))


def in_reverse(model):
    """The same layers, registered the other way round."""
    for name in reversed(list(model._modules)):
        model._modules[name] = model._modules.pop(name)
    return model


def test_state_is_loaded_by_name_into_a_model_of_another_order():
    model = seeded(Transformer, tied=False)
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2)
    train(model, optimizer, 0, 3)
    twin = in_reverse(Transformer(tied=False))
    twin.load_state_dict(model.state_dict())
    resumed = optim.AdamW(optim.decay_groups(twin, 0.1), lr=1e-2)
    saved = optimizer.state_dict()
    orders = [
        [name for g in groups for name in g["param_names"]] for groups in (saved["param_groups"], resumed.param_groups)
    ]
    assert orders[0] != orders[1]
    resumed.load_state_dict(saved)
    train(model, optimizer, 3, 6)
    train(twin, resumed, 3, 6)
    for name, param in model.named_parameters():
        assert torch.equal(param, twin.get_parameter(name)), name
        for key, value in optimizer.state[param].items():
            assert torch.equal(value, resumed.state[twin.get_parameter(name)][key]), (name, key)


def test_torchs_adamw_takes_the_groups_too():
    model = Transformer(1)
    optimizer = torch.optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_a_model_on_the_meta_device_or_of_another_dtype_is_grouped_alike():
    wanted = where(optim.decay_groups(Transformer(1), 0.1))
    with torch.device("meta"):
        assert where(optim.decay_groups(Transformer(1), 0.1)) == wanted
    assert where(optim.decay_groups(Transformer(1).bfloat16(), 0.1)) == wanted
