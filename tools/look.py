"""Look at the built site in a real browser: nothing is wider than the window, nothing fails, the search finds pages.

    make docs
    pip install playwright                       # not in .venv: this is no part of the tests
    python tools/look.py --browser /usr/bin/chromium --out build/look

Every page at the width of a desktop, of a tablet and of a telephone, in light and dark; a screenshot of each goes to
`--out`.
"""

import argparse
import functools
import http.server
import threading
from pathlib import Path

from playwright.sync_api import TimeoutError, sync_playwright

SITE = Path(__file__).parents[1] / "build" / "site"
WIDTHS = {"desktop": (1280, 900), "tablet": (820, 1100), "phone": (390, 844)}
SEARCHES = {  # what is typed, and the page to which one of the first results leads
    "nonfinite": "clipping/",
    "amsgrad": "update/",
    "GradScaler": "amp/",
    "bitsandbytes": "migrate/",
    "load_optimizer": "api/",
    "residual": "formats/",
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_):
        """Say nothing."""


def main():
    """Look at every page, and search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--out", type=Path, default=Path("build/look"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_address[1]}/"
    faults = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.browser, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for name, (width, height) in WIDTHS.items():
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                page = context.new_page()
                watch(page, root, faults)
                for path in sorted(SITE.rglob("index.html")):
                    place = "" if path.parent == SITE else f"{path.parent.relative_to(SITE)}/"
                    faults += [f"{place} {name} {scheme}: {fault}" for fault in look(page, root + place)]
                    file = f"{place.strip('/').replace('/', '-') or 'index'}-{name}-{scheme}.png"
                    page.screenshot(path=arguments.out / file)
                if scheme == "light":
                    faults += [f"{name}: {fault}" for fault in search(page, root, arguments.out / f"search-{name}.png")]
                context.close()
        browser.close()
    print("\n".join(faults) or "nothing to mend")
    raise SystemExit(bool(faults))


def watch(page, root, faults):
    """Note errors of scripts, files that are not there, and whatever is asked of another server."""
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(f"not loaded: {request.url}"))
    page.on("request", lambda request: None if request.url.startswith(root) else faults.append(f"to {request.url}"))


def look(page, address):
    """Open a page; return what is wrong with it."""
    page.goto(address, wait_until="load")
    page.wait_for_timeout(100)
    wide, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    if wide > window:
        yield f"{wide} px wide in a window of {window}"
    for image in page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"):
        yield f"a picture is not there: {image}"


def search(page, root, file):
    """Type what is to be found; return what was not, or leads elsewhere."""
    page.goto(root, wait_until="load")
    box = page.locator("input.md-search__input")
    if not box.is_visible():
        page.locator("label.md-header__button[for=__search]").click()
    for words, wanted in SEARCHES.items():
        box.fill("")
        box.press_sequentially(words)
        try:
            link = page.locator(f'.md-search-result__link[href*="/{wanted}?h={words.lower()}"]').first
            link.wait_for(timeout=10_000)
        except TimeoutError:
            yield f"{words!r} did not find {wanted}"
    page.screenshot(path=file)
    link.click()
    page.wait_for_url(f"**/{wanted}**")


if __name__ == "__main__":
    main()
