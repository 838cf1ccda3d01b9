"""A report: sections of blocks, written as one HTML file without external assets.

All text is escaped; a block never takes HTML from its caller.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import ClassVar

import jinja2
from etils import epath
from matplotlib.figure import Figure as MatplotlibFigure

from olmax.reporting import figures
from olmax.reporting.estimates import Verdict
from olmax.reporting.files import write_text
from olmax.reporting.tables import Table


@dataclasses.dataclass
class Text:
    """One paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclasses.dataclass
class KeyNumbers:
    """A row of large numbers: (value, what it is)."""

    items: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "key_numbers"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was expected, the verdict that the numbers give, and the numbers."""

    claim: str
    verdict: Verdict
    evidence: str


@dataclasses.dataclass
class Findings:
    """A list of findings with their verdicts."""

    items: Sequence[Finding]
    kind: ClassVar[str] = "findings"


@dataclasses.dataclass
class Figure:
    """A figure, the sentence under it, and its description for those who cannot see it."""

    figure: MatplotlibFigure
    caption: str
    description: str
    kind: ClassVar[str] = "figure"

    @property
    def source(self) -> str:
        """The image as a data URI."""
        return figures.svg_data_uri(self.figure)


@dataclasses.dataclass
class TableBlock:
    """A table with its title and caption."""

    table: Table
    kind: ClassVar[str] = "table"


@dataclasses.dataclass
class Code:
    """Preformatted text; folded away when `summary` is given."""

    text: str
    summary: str = ""
    kind: ClassVar[str] = "code"


@dataclasses.dataclass
class Samples:
    """Generated text: (who generated it, prompt, continuation)."""

    items: Sequence[tuple[str, str, str]]
    kind: ClassVar[str] = "samples"


Block = Text | KeyNumbers | Findings | Figure | TableBlock | Code | Samples


@dataclasses.dataclass
class Section:
    """A heading with blocks under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The heading as a fragment identifier."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclasses.dataclass
class Report:
    """Everything one run has to say."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: str = ""

    def html(self) -> str:
        """The whole page: styles and figures are inside it, there is no script."""
        return _template().render(report=self)

    def write(self, path: epath.PathLike) -> epath.Path:
        """Writes the page to `path`, whole or not at all."""
        return write_text(path, self.html())


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("olmax.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")
