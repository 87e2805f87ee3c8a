"""The page is whole, stands alone, and fits its window."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hypermlp_lab.page import svg
from hypermlp_lab.study import figures, report
from hypermlp_lab.study.plan import VARIANTS
from hypermlp_lab.study.results import Results
from tests.browser import title_of
from tests.study.fakes import study
from tests.study.test_statistics import fake_score

_VOID = {"meta", "link", "br", "path", "use"}


@pytest.fixture(scope="module")
def results() -> Results:
    return study(fake_score)


@pytest.fixture(scope="module")
def page(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return report.write(results, folder, folder / "pictures")


class Checker(HTMLParser):
    """Collects names, references and tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag not in _VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        self.links += [values[name] for name in ("href", "src", "xlink:href") if name in values]
        self.links += re.findall(r"url\(([^)]*)\)", values.get("clip-path", "") + values.get("style", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag


def test_the_page_stands_alone(page: Path, results: Results) -> None:
    text = page.read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    for link in checker.links:
        assert link == "data:," or link.startswith("#")
        if link.startswith("#"):
            assert link[1:] in checker.ids
    assert "<script" not in text
    assert "{{" not in text
    for name in figures.figures(results):
        assert f"figure-{name}" in checker.ids
        assert (page.parent / f"{name}.svg").read_text().startswith("<?xml")
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (page.parent / "pictures" / f"study-{name}.svg").exists()
    for tier in VARIANTS:
        for variant in tier:
            assert variant.name in text
    assert "abc1234" in text
    assert "81.12" in text


def test_pictures_are_the_same_for_the_same_data(results: Results) -> None:
    first, again = (figures.figures(results)["variants"][1] for _ in range(2))
    assert svg(first, "variants") == svg(again, "variants")


def test_an_incomplete_study_has_a_page(tmp_path: Path) -> None:
    text = report.write(study(fake_score, most=60), tmp_path).read_text()
    assert "not complete" in text
    assert "no data" in text


@pytest.mark.parametrize("part", ["answer", "claims", "components", "scores", "settings"])
def test_markdown_for_the_documentation(part: str, results: Results) -> None:
    text = report.markdown(results, part)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert bool(tables) == (part != "answer")
    for block in re.split(r"\n\n", text):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1
    with pytest.raises(ValueError, match="part"):
        report.markdown(results, "all")


@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser_nothing_is_wider_than_the_page(page: Path, width: int, tmp_path: Path) -> None:
    # the page has no script of its own: one is added that reports on it, errors included
    probe = """<script>
        const errors = []; window.onerror = message => errors.push(message);
        window.onload = () => {
            const wide = [...document.querySelectorAll("body > *, figure *")].filter(
                e => e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.tagName);
            const drawn = [...document.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect());
            document.title = JSON.stringify({errors, wide, scroll: document.documentElement.scrollWidth,
                inner: window.innerWidth, drawn: drawn.filter(r => r.width > 200 && r.height > 100).length});
        };</script>"""
    probed = tmp_path / "page.html"
    probed.write_text(page.read_text().replace("<head>", "<head>" + probe))
    # a window has a least width: the page is looked at in a frame of the width that is wanted
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<title></title><iframe id="f" src="page.html" style="width:{width}px;height:800px;border:0"></iframe>'
        "<script>f.onload = () => setTimeout(() => document.title = f.contentDocument.title, 200)</script>"
    )
    seen = title_of(frame.as_uri(), tmp_path)
    assert seen["errors"] == []
    assert seen["wide"] == []
    assert seen["inner"] == width
    assert seen["scroll"] <= width
    assert seen["drawn"] == 5
