"""The built documentation: what docstrings and equations become, and that nothing is wider than a phone."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.browser import title_of

ROOT = Path(__file__).resolve().parent.parent
_NEEDS = ("mkdocs", "material", "mkdocstrings_handlers", "math_core")
# every page in a frame, one after the other; what is inside something that scrolls may be wider
_PROBE = """<title></title><iframe id="f" style="width:WIDTHpx;height:800px;border:0"></iframe><script>
const scrolls = e => e && e.nodeName !== "BODY" &&
    (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
const seen = {}, pages = PAGES;
function look(page) {
    const d = f.contentDocument, w = f.contentWindow;
    const wide = [...d.querySelectorAll("article *")].filter(e => e.getBoundingClientRect().right > w.innerWidth + 1
        && !scrolls(e.parentElement)).map(e => e.nodeName + " " + e.className);
    const low = [...d.querySelectorAll(".equation")].filter(e => e.scrollHeight > e.clientHeight + 1).length;
    seen[page] = {wide, low, inner: w.innerWidth, scroll: d.documentElement.scrollWidth, errors: w.errors,
        math: [...d.querySelectorAll("math")].filter(e => e.getBoundingClientRect().width > 5).length};
}
function next() {
    const page = pages.shift();
    if (page === undefined) { document.title = JSON.stringify(seen); return; }
    f.onload = () => setTimeout(() => { look(page); next(); }, 300);
    f.src = page;
}
next();
</script>"""
_ERRORS = """<script>window.errors = []; onerror = message => errors.push(message);
onunhandledrejection = event => errors.push(String(event.reason));
console.error = console.warn = (...all) => errors.push(all.join(" "));</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the docs extra: {', '.join(missing)} not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


class Text(HTMLParser):
    """Collects the text of a page, and that of its quotations."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = self.quoted = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("blockquote", "script"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            self.open.remove(tag)

    def handle_data(self, data: str) -> None:
        if "script" not in self.open:
            self.text += data
        if "blockquote" in self.open:
            self.quoted += data


def pages(site: Path) -> dict[str, str]:
    found = {str(p.parent.relative_to(site)): p.read_text() for p in site.rglob("index.html")}
    assert {"api", "mathematics", "swap/gpt2"} <= found.keys()
    return found


def test_roles_and_examples_are_not_shown_as_text(site: Path) -> None:
    for name, page in pages(site).items():
        shown = Text(page)
        assert re.findall(r":(?:class|func|meth|attr|data|mod|exc):", shown.text) == [], name
        assert shown.quoted == "", name  # an example whose >>> was read as Markdown
        assert "arithmatex" not in page, name
    assert '<span class="gp">&gt;&gt;&gt; </span>' in pages(site)["api"]  # a prompt in code
    links = re.findall(r'<a class="autorefs autorefs-internal"[^>]*><code>(\w+)</code></a>', pages(site)["api"])
    assert {"HyperMLP", "HyperConfig", "sample"} <= set(links)


def test_what_signatures_name_is_on_the_page(site: Path) -> None:
    """Every class of this library that one takes or gives, and every union of them; choices of words say themselves."""
    signatures = re.findall(r'<div class="doc-signature highlight">.*?</pre>', pages(site)["api"], re.DOTALL)
    named = {name for text in signatures for name in re.findall(r'<span title="(hypermlp[\w.]+)"', text)}
    assert len(signatures) > 80
    assert "hypermlp.ops.attention.Backend" in named
    for name in named:
        module, _, thing = name.rpartition(".")
        assert not isinstance(getattr(importlib.import_module(module), thing), type | types.UnionType), name


def test_a_page_has_a_switch_for_its_theme(site: Path) -> None:
    for name, page in pages(site).items():
        assert page.count('name="__palette"') == 3, name  # the system's, light, dark


@pytest.mark.parametrize("layer", ["HyperGLU", "HyperMLP", "SoftmaxAttention", "ReLUAttention"])
def test_a_layer_has_a_signature_and_a_table_of_its_arguments(site: Path, layer: str) -> None:
    from hypermlp.config import HyperConfig, HyperFields

    page = pages(site)["api"]
    start = page.index(f'id="hypermlp.{layer}"')
    entry = page[start : page.index(f'id="hypermlp.{layer}.forward"', start)]
    signature = Text(entry[: entry.index("</pre>")]).text
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", entry, re.DOTALL)
    cells = [[Text(cell).text.strip() for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)] for row in rows]
    table = {cell[0]: cell[1:] for cell in cells if len(cell) == 4}
    assert table["hidden_size"][2] == "required"
    assert table["device"][2] == table["dtype"][2] == "None"
    for name in HyperFields.__annotations__:
        default = HyperConfig.__dataclass_fields__[name].default
        assert table[name][0], name
        assert table[name][2] == repr(default), name
        assert re.search(rf"\b{name}: [^\n]+ = ", signature), name


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def send_error(self, code: int, *args: Any, **kwargs: Any) -> None:
        self.server.missing.append(f"{code} {self.path}")  # type: ignore[attr-defined]
        super().send_error(code, *args, **kwargs)


@pytest.fixture
def server(site: Path) -> Iterator[ThreadingHTTPServer]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    httpd.missing = []  # type: ignore[attr-defined]
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_is_wider_than_the_page(
    site: Path, server: ThreadingHTTPServer, width: int, tmp_path: Path
) -> None:
    for page in site.rglob("index.html"):
        text = page.read_text()
        if _ERRORS not in text:
            page.write_text(text.replace("<head>", f"<head>{_ERRORS}", 1))
    names = sorted(f"/{name}/".replace("/./", "/") for name in pages(site))
    frame = site / "frame.html"
    frame.write_text(_PROBE.replace("WIDTH", str(width)).replace("PAGES", repr(names)))
    seen = title_of(f"http://127.0.0.1:{server.server_port}/frame.html", tmp_path)
    assert set(seen) == set(names)
    for name, page in seen.items():
        assert page["errors"] == [], name
        assert page["wide"] == [], name
        assert page["low"] == 0, name
        assert page["inner"] == width
        assert page["scroll"] <= width, name
    assert seen["/mathematics/"]["math"] > 60
    assert [path for path in server.missing if "favicon" not in path] == []  # type: ignore[attr-defined]
