"""Guards the pages: every ```python block on them runs, and what it asserts is so; no code on them is left out.

The blocks of a page run one after another in one namespace, as someone would who reads it from the top. Those under
`<!-- run: 2 processes -->` (FSDP2 and the like) run so in each of two processes, in a namespace of their own. Commands
are not run, but what they name is there.
"""

import ast
import inspect
import os
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, PartialState
from transformers.utils.logging import disable_progress_bar

import lucid.optim as optim
from blocks import PROCESSES, blocks_of, run
from frameworks import LIGHTNINGS_WARNINGS, as_torchrun, forget
from llama import make_llama

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
PAGES += [page for folder in ("docs", "benchmarks") for page in sorted((ROOT / folder).glob("*.md"))]

FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {"bash", "text"}  # commands; formulas, output, and what else is no code


def with_blocks(processes):
    return pytest.mark.parametrize(
        "page", [page for page in PAGES if blocks_of(page, processes)], ids=lambda page: page.stem
    )


# One process


@pytest.fixture
def quiet():
    disable_progress_bar()
    yield
    forget()


@with_blocks(processes=False)
@pytest.mark.filterwarnings(*(f"ignore:{said}:{kind.__name__}" for said, kind in LIGHTNINGS_WARNINGS))
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, quiet):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_there_are_pages():
    assert {"README", "index", "faq", "RESULTS"} <= {page.stem for page in PAGES}
    assert blocks_of(ROOT / "README.md", processes=False)


# Two processes


def run_here(page, folder):
    os.chdir(folder)
    with as_torchrun(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' own
        disable_progress_bar()
        forget()
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU  # or Accelerate takes DDP on CPUs
        try:
            run(page, processes=True)
        finally:
            forget()


@with_blocks(processes=True)
def test_the_code_for_processes_runs(page, ranks, tmp_path):
    if page.stem == "frameworks":
        make_llama().save_pretrained(tmp_path / "llama")  # a folder that its reader has
    ranks.run(2, run_here, page, str(tmp_path))


# Nothing is left out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_is_fenced_and_its_kind_known(page):
    text = page.read_text()
    for indent, kind, code in FENCE.findall(text):
        assert kind == "python" or kind in NOT_RUN, f"a block of kind {kind!r}:\n{code}"
        assert not indent, f"not found by the tests, since it is indented:\n{code}"
        if kind == "text":
            assert not re.search(r"\bimport |\boptim\.|\boptimizer\.(?!py\b)", code), (
                f"Python that does not run:\n{code}"
            )
    outside = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)
    outside = re.sub(r"^::: \S+\n(    .*\n)+", "", outside, flags=re.MULTILINE)  # mkdocstrings' options
    assert "```" not in outside, "a fence that does not end"
    indented = [line for line in outside.split("\n") if line.startswith(("    ", "\t"))]
    assert not indented, f"an indented block is no fence: {indented}"
    assert text.count(PROCESSES) == len(blocks_of(page, processes=True))


def names_of(page):
    """What the page's headings are called in links, as on the forge: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere_in_the_repository_too(page):
    for path, name in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", FENCE.sub("", page.read_text())):
        if path.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not name or name in names_of(target), f"{path}#{name}"


def commands():
    for page in PAGES:
        for _, kind, code in FENCE.findall(page.read_text()):
            if kind == "bash":
                for line in code.replace("\\\n", " ").splitlines():
                    if words := shlex.split(line, comments=True):
                        yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_what_a_command_names_is_there(words):
    command, *rest = words
    if command == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets
    elif command == "python" and rest[0] == "-m":
        assert rest[1] in ("mkdocs", "lucid", "venv") or (ROOT / f"{rest[1].replace('.', '/')}.py").exists()
    elif command in ("python", "torchrun", "pytest"):
        (file,) = [word for word in rest if word.endswith(".py")]
        assert (ROOT / file).exists()
    else:
        assert command in ("pip", "lucid", "cd", "git"), f"nothing is known of {command!r}"


# What a page says of torch


def test_every_argument_of_torchs_adamw_is_mapped():
    table = re.findall(r"^\| `(\w+)(?:=([^`]+))?` \|", (ROOT / "docs" / "migrate.md").read_text(), re.MULTILINE)
    theirs = list(inspect.signature(torch.optim.AdamW).parameters.values())
    assert [name for name, _ in table] == [p.name for p in theirs]
    for (_, default), parameter in zip(table, theirs, strict=True):
        assert (ast.literal_eval(default) if default else parameter.empty) == parameter.default
    ours = inspect.signature(optim.AdamW).parameters
    gone = {"foreach", "fused", "capturable", "differentiable"}
    assert [p.name for p in theirs if p.name not in ours] == [p.name for p in theirs if p.name in gone]
