"""mkdocs' hook: pages of the site that are not in docs/, and links that leave it.

Links are written as they work in the repository. On the site one to a page of this list leads to that page, and one
to a source, a test or an example, which the site does not have, becomes its path. One to nothing is left alone, and
mkdocs, which is strict, stops at it. Where a docstring names a page, `docs/numerics.md`, the site links it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {  # in the repository: on the site
    "benchmarks/RESULTS.md": "benchmarks/RESULTS.md",
    "benchmarks/RESULTS-gpu.md": "benchmarks/RESULTS-gpu.md",
    "benchmarks/QUALITY.md": "benchmarks/QUALITY.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
SOURCES = {on_site: in_repository for in_repository, on_site in PAGES.items()}
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"<code>docs/(\w+)\.md</code>")
CODE = re.compile(r"`\w+`")
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files, config):
    """Add the pages that are not in docs/."""
    for in_repository, on_site in PAGES.items():
        files.append(File.generated(config, on_site, content=(ROOT / in_repository).read_text("utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Mend the links of a page, but not what is code."""
    folder = posixpath.dirname(SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    here = posixpath.dirname(page.file.src_uri)

    def mended(link):
        target = posixpath.normpath(posixpath.join(folder, link["path"]))
        on_site = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if on_site is not None:
            path = posixpath.relpath(on_site, here or ".")
            return f"{link['image']}[{link['text']}]({path}{link['anchor'] or ''})"
        if not (ROOT / target).exists():
            return link[0]
        text = link["text"]
        if CODE.fullmatch(text):  # the name of a test
            name = text.strip("`").replace("_", "_<wbr>")  # a long name breaks after an underscore
            return f'<code title="{target}">{name}</code>'
        bare = text in ("test", "tests") or text.strip("`") == target
        return f"`{target}`" if bare else f"{text} (`{target}`)"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(mended, part) for part in parts)


def on_page_content(html, page, config, files):
    """Link the pages that are named by their path."""

    def linked(named):
        target = files.get_file_from_path(f"{named[1]}.md")
        return named[0] if target is None else f'<a href="{target.url_relative_to(page.file)}">{named[0]}</a>'

    return NAMED.sub(linked, html)
