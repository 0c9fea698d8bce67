"""The quality study can say no, repeats no run that it has, and trains what it names."""

import json
from dataclasses import replace

import pytest
import torch
from benchmarks import quality, quality_report, quality_tasks, report
from benchmarks.quality_report import Difference, Spread
from benchmarks.quality_tasks import BASELINE, CONFIGURATIONS, TASKS, Configuration, Outcome

DIGITS = replace(TASKS["convnet"], steps=2, batch=4)
BASE = [1.00, 1.02, 1.04, 0.98, 0.96, 1.03]  # σ = 0.0308, from 0.96 to 1.04


def runs(losses):
    named = {BASELINE: BASE, "state 8bit": losses}
    return {name: {seed: Outcome(x, 0.5, x) for seed, x in enumerate(xs)} for name, xs in named.items()}


def verdict(losses):
    return Difference.of(runs(losses), "state 8bit").verdict


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([0.001, -0.001, 0.002, 0.0, -0.002, 0.001], "inside"),
        ([0.011, 0.009, 0.012, 0.010, 0.008, 0.010], "inside"),  # not zero, but less than another seed changes
        ([0.034, 0.032, 0.035, 0.033, 0.031, 0.033], "worse"),  # though the mean is still in the range
        ([0.101, 0.099, 0.102, 0.100, 0.098, 0.100], "worse"),
        ([-0.041, -0.039, -0.042, -0.040, -0.038, -0.040], "better"),
        ([0.05, -0.05, 0.06, -0.04, 0.03, -0.05], "unclear"),  # equal on average, too noisy to say so
        ([0.0, 0.0, 0.0, 0.0, 0.0, float("nan")], "worse"),
    ],
)
def test_the_verdict(change, expected):
    assert verdict([a + b for a, b in zip(BASE, change, strict=True)]) == expected


def test_the_interval_is_students():
    # By hand: d = (1, 2, 3, 4, 5, 6) / 1,000 has mean 3.5, s = 1.8708, and t(0.975, 5) = 2.5706.
    found = Difference.of(runs([base + (seed + 1) / 1000 for seed, base in enumerate(BASE)]), "state 8bit")
    assert found.mean == pytest.approx(0.0035)
    assert found.half == pytest.approx(2.5706 * 1.8708e-3 / 6**0.5, rel=1e-4)
    assert Spread.of(runs(BASE)).sigma == pytest.approx(0.03082, rel=1e-3)


def test_two_seeds_get_no_verdict():
    assert Difference.of(runs(BASE[:2]), "state 8bit") is None


def test_a_key_names_all_that_a_result_depends_on():
    run = quality.Run(DIGITS, CONFIGURATIONS[BASELINE], 0)
    others = [
        run.key("other bits"),
        run._replace(seed=1).key("bits"),
        run._replace(configuration=CONFIGURATIONS["torch fp32"]).key("bits"),
        run._replace(task=replace(DIGITS, steps=3)).key("bits"),
        run._replace(task=replace(DIGITS, lr=1e-5)).key("bits"),
        run._replace(task=TASKS["vit"]).key("bits"),
    ]
    keys = {run.key("bits"), *others}
    assert len(keys) == 1 + len(others)
    assert run._replace(task=replace(DIGITS, title="another title")).key("bits") == run.key("bits")
    assert json.loads(run.key("bits"))["torch"] == torch.__version__


def test_the_digest_of_bits_sees_another_update():
    one, other = (CONFIGURATIONS[name] for name in ("torch fp32", "torch bf16"))
    assert quality_tasks.bits(one) == quality_tasks.bits(one) != quality_tasks.bits(other)


def test_a_run_that_ended_is_not_repeated(tmp_path):
    journal = quality.Journal(tmp_path / "runs" / "journal.jsonl")
    study = quality.study([DIGITS], [CONFIGURATIONS["torch fp32"]], 2, journal)
    assert [run.seed for run in study.missing()] == [0, 1]
    key = next(iter(study.runs))
    ended = quality.Ended(Outcome(0.1, 0.9, 0.2), 3.0)
    journal.append(key, ended)
    with journal.path.open("a") as file:
        file.write('{"key": {"torn')
    assert [run.seed for run in study.missing()] == [1]
    journal.append(list(study.runs)[1], ended)
    assert study.missing() == []
    assert journal.read()[key] == ended


@pytest.mark.slow
def test_a_worker_trains_and_a_failure_keeps_the_others(tmp_path):
    unknown = Configuration("unknown", "lucid", state="3bit")
    ended = []
    todo = [quality.Run(DIGITS, unknown, 0), quality.Run(DIGITS, CONFIGURATIONS["torch fp32"], 0)]
    failed = quality.execute(todo, 1, lambda run, result: ended.append((run, result.outcome)))
    assert failed == ["convnet, unknown, seed 0"]
    assert ended == [(todo[1], quality_tasks.train(*todo[1]))]  # the same bits in another process


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_digits_train(name):
    outcome = quality_tasks.train(DIGITS, CONFIGURATIONS[name], seed=0)
    assert 1.5 < outcome.loss < 3.5
    assert 0 <= outcome.accuracy <= 1


def test_the_same_seed_starts_and_draws_alike():
    still = replace(DIGITS, lr=0.0)
    ours, theirs = (quality_tasks.train(still, CONFIGURATIONS[name], 3) for name in (BASELINE, "torch fp32"))
    rounded = quality_tasks.train(still, CONFIGURATIONS["torch bf16"], 3)
    assert ours == theirs != rounded
    assert rounded.loss == pytest.approx(ours.loss, rel=0.02)


def test_tables_and_picture(tmp_path):
    results = {DIGITS: runs([base + 0.001 for base in BASE])}
    text = quality_report.markdown(results, {DIGITS: 1.0})
    assert "| state 8bit | +1.00 ± 0.00 inside |" in " ".join(text.split())
    quality_report.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    page = f"before\n{quality_report.BEGIN}\nold\n{report.END}\nafter"
    assert "old" not in report.spliced(page, text, quality_report.BEGIN)
    with pytest.raises(ValueError, match="expected"):
        report.spliced("no markers", text, quality_report.BEGIN)
