"""Guards how the groups of `decay_groups` are used: printed, in an optimizer, under wrappers of several processes."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import lucid.optim as optim
from decaying import BIAS, EMBEDDING, NORM, WEIGHT, Transformer, seeded, train, where

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
