"""The HTML page: everything in it, escaped, and nothing from outside."""

import html.parser
import re

from olmax.reporting import document, figures
from olmax.reporting.document import (
    Code,
    Figure,
    Finding,
    Findings,
    KeyNumbers,
    Report,
    Samples,
    Section,
    TableBlock,
    Text,
)
from olmax.reporting.estimates import Estimate
from olmax.reporting.tables import Table


class _Checker(html.parser.HTMLParser):
    """Collects tags and sees whether they are closed in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.anchors, self.ids = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "a":
            self.anchors.append(dict(attrs)["href"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _figure():
    with figures.style():
        figure, (axis,) = figures.panels(1, 1)
        axis.plot([0, 1], [1, 0], label="loss")
        axis.legend()
    return figure


def _report() -> Report:
    blocks = [
        Text("a < b & c"),
        KeyNumbers([("8.1 min", "all stages")]),
        Findings([Finding("It <works>", "not shown", "+0.1 ± 0.2")]),
        Figure(_figure(), "The loss.", 'A "falling" line'),
        TableBlock(Table(["name", "x"], [["row", Estimate(1.0, 0.5, 3)]], strong_rows=[0])),
        Code("{}", summary="Configuration"),
        Samples([("soup", "<|endoftext|>", "<script>alert(1)</script>")]),
    ]
    return Report("A run", "what it was", [Section("First part", blocks), Section("Next", [])])


def test_page_is_well_formed_and_holds_everything():
    page = _report().html()
    checker = _Checker()
    checker.feed(page)
    assert not checker.open
    assert checker.anchors == ["#first-part", "#next"]
    assert {"first-part", "next"} <= set(checker.ids)
    for text in ("a &lt; b &amp; c", "8.1 min", "It &lt;works&gt;", "not shown", "1.00 ± 0.50"):
        assert text in page


def test_page_needs_nothing_from_outside_and_runs_nothing():
    page = _report().html()
    checker = _Checker()
    checker.feed(page)
    assert "script" not in {tag for tag, _ in checker.seen}
    sources = [attrs["src"] for tag, attrs in checker.seen if "src" in attrs]
    assert len(sources) == 1 and sources[0].startswith("data:image/svg+xml;base64,")
    assert not re.search(r"url\(|@import|<link", page)


def test_equal_reports_are_equal_bytes(tmp_path):
    first = _report().write(tmp_path / "a.html").read_bytes()
    assert first == _report().write(tmp_path / "b.html").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_every_block_kind_is_in_the_template():
    kinds = {cls.kind for cls in document.Block.__args__}
    source = (document.__file__).replace("document.py", "report.html")
    with open(source) as file:
        text = file.read()
    assert all(f'block.kind == "{kind}"' in text for kind in kinds)


def test_png_of_a_figure(tmp_path):
    path = figures.save_png(_figure(), tmp_path / "deep" / "x.png", dpi=50)
    assert path.read_bytes().startswith(b"\x89PNG")
