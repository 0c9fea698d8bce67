"""Guards that features compose: every pair on in one training gives the bits of the plain loop, or is refused."""

import re
import traceback
from pathlib import Path

import pytest
import torch

from bits import on, peek
from composing import SHARDED, TITLES, Training, assert_alike, excluded, matrix
from offloading import offload_all
from pinning import lies_in, pretend_pinned

ALONE = [feature for feature in TITLES if feature not in (*SHARDED, "capture", "host")]


@pytest.mark.parametrize("engine_name", ["cpu", "cuda"])
@pytest.mark.parametrize("one", ALONE)
def test_pairs_on_one_process(one, engine_name):
    for other in ALONE[ALONE.index(one) :]:
        if excluded(one, other):
            continue
        features = {one, other}
        with on(engine_name):
            ours = Training(features).run()
        assert_alike(ours, Training(features, twin=True).run(), features)


@pytest.mark.parametrize("other", [each for each in (*ALONE, "host") if not excluded("capture", each)])
def test_pairs_with_a_captured_step(other, capturing, monkeypatch):
    features = {"capture", other}
    pretend_pinned(monkeypatch)
    with on("cuda"):
        ours = Training(features, capturing=capturing).run()
    assert_alike(ours, Training(features, twin=True).run(), features)


@pytest.mark.parametrize("other", ALONE)
def test_pairs_with_state_on_the_host(other, monkeypatch):
    features, arena = {"host", other}, pretend_pinned(monkeypatch)
    with on("cuda"):
        ours = Training(features).run()
    assert all(lies_in(arena, entry) for entry in peek(ours.optimizer).values())
    assert_alike(ours, Training(features, twin=True).run(), features)


@pytest.mark.parametrize("other", ALONE)
def test_pairs_with_state_that_is_staged(other, monkeypatch):
    features, log = {"host", other}, []
    with monkeypatch.context() as patch:
        offload_all(patch, log)
        ours = Training(features).run()
    assert log
    assert_alike(ours, Training(features, twin=True).run(), features)


def pairs_of_ranks(one, others, engine_name):
    torch._dynamo.reset()
    failed = []
    for other in others:
        features = {one, other}
        try:
            with pytest.MonkeyPatch.context() as patch, on(engine_name):
                if "host" in features and engine_name == "cuda":
                    pretend_pinned(patch)
                elif "host" in features and one == "shard_group":
                    offload_all(patch, [])
                ours = Training(features).run()
            assert_alike(ours, Training(features, twin=True).run(), features)
        except Exception:
            failed.append(f"{sorted(features)}: {traceback.format_exc()[-1500:]}")
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("engine_name", ["cpu", "cuda"])
@pytest.mark.parametrize("one", SHARDED)
def test_pairs_on_several_processes(ranks, one, engine_name):
    others = [*ALONE, "host", *SHARDED[: SHARDED.index(one)]]
    others = [other for other in others if not excluded(one, other)]
    ranks.run(4 if one in ("hsdp", "tp") else 2, pairs_of_ranks, one, others, engine_name)


def refused(pairs):
    for features in pairs:
        with pytest.MonkeyPatch.context() as patch:
            offload_all(patch, [])
            with pytest.raises(ValueError, match="does not work for sharded parameters without the CUDA engine"):
                Training(features).run()


def test_staged_state_is_refused_for_shards(ranks):
    ranks.run(2, refused, [{"host", one} for one in ("fsdp2", "tp")])


@pytest.mark.parametrize("option", ["clip", "spike"])
def test_a_norm_is_refused_in_backward(option):
    with pytest.raises(ValueError, match="does not work in backward"):
        Training({option, "backward"})


def test_the_page_has_these_pairs():
    page = (Path(__file__).parents[1] / "docs/compose.md").read_text()
    _, table, _ = re.split(r"<!-- (?:matrix|end) -->", page)
    assert table.strip() == matrix()
