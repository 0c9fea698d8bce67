"""Guards the site: it builds without a warning, fetches nothing from elsewhere, and no link on it leads nowhere."""

import json
import os
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


class Reader(HTMLParser):
    """What a page of the site refers to, and the names within it."""

    def __init__(self, text):
        super().__init__()
        self.names, self.links, self.assets = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.names |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag == "link" and values.get("href"):
            if values.get("rel") not in ("prev", "next", "canonical"):
                self.assets.append(values["href"])
        else:
            self.assets += [values[key] for key in ("src", "srcset", "data", "poster") if values.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "mkdocs.yml", "-d", folder],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stderr  # --quiet would keep mkdocs from counting them
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Reader(path.read_text()) for path in sorted(site.rglob("*.html"))}


def nav_of(items):
    for item in items:
        for value in item.values():
            yield from [value] if isinstance(value, str) else nav_of(value)


def config():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    return yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def test_every_page_of_the_nav_is_there(site):
    sources = list(nav_of(config()["nav"]))
    assert len(sources) == len(set(sources)) > 20
    for source in sources:
        page = site / source.removesuffix(".md") / "index.html"
        assert (site / "index.html" if source == "index.md" else page).exists(), source


def test_every_page_of_docs_is_in_the_nav():
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(nav_of(config()["nav"]))


def test_nothing_comes_from_elsewhere(site, pages):
    for path, page in pages.items():
        outside = [asset for asset in page.assets if urllib.parse.urlsplit(asset).netloc]
        assert not outside, (path.relative_to(site), outside)
    for style in site.rglob("*.css"):
        text = style.read_text()
        assert "url(http" not in text
        assert "url(//" not in text
        assert "@import" not in text


def test_every_link_leads_somewhere(site, pages):
    count = 0
    for path, page in pages.items():
        if path.name == "404.html":  # served from anywhere, so that its links are from the root
            continue
        for link in [*page.links, *page.assets]:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme == "https", link
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            assert target.exists(), (path.relative_to(site), link)
            if parts.fragment and target.suffix == ".html":
                name = urllib.parse.unquote(parts.fragment)
                assert name in pages[target].names or name == "__top", (path.relative_to(site), link)
            count += 1
    assert count > 1000


def test_the_search_knows_the_pages(site):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    places = {entry["location"].partition("#")[0] for entry in entries}
    assert {"", "faq/", "api/", "benchmarks/RESULTS/", "changelog/"} <= places
    assert any("state_format" in entry["text"] for entry in entries if entry["location"].startswith("api/"))
    assert any(entry["location"] == "clipping/#nonfinite" for entry in entries)


def test_docstrings_are_there(site):
    text = (site / "api" / "index.html").read_text()
    for name in ("AdamW", "decay_groups", "DecayGroups", "Optimizer.step", "checkpoint.load_optimizer"):
        assert f'id="lucid.optim.{name}"' in text, name


def test_sources_have_become_their_paths(site):
    text = (site / "scale" / "index.html").read_text()
    assert "<code>examples/train_fsdp.py</code>" in text
    assert "../examples" not in text
