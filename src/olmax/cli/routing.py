"""`olmax routing`: what the routers of a mixture of experts do with text."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Routing:
    """Analyse the routing of a model with experts: load, saturation between checkpoints,
    co-activation, domain and vocabulary specialisation; an HTML report and its numbers.

    Example: olmax routing --model runs/a --corpus code=src/*.py docs=docs/*.md --output routing
    """

    model: str
    """Model path: Hugging Face directory, hub id, run directory or checkpoint."""
    corpus: tuple[str, ...]
    """Text files, globs or directories as DOMAIN=PATTERN (as in `olmax prepare`)."""
    output: str
    """Directory for report.html and routing.json."""
    earlier: tuple[str, ...] = ()
    """Earlier checkpoints of the model as NAME=PATH, the earliest first, for router saturation."""
    layers: tuple[int, ...] = ()
    """Layers shown in detail; first, middle and last when left out."""
    window: int = 2048
    """Tokens that the model reads at a time; at most its context."""
    tokens: int = 204_800
    """Tokens of each domain; the window that passes this number is the last."""
    text_field: str = "text"
    """Field or column that holds the text."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of parameters and matrix products."""
    batch_tokens: int = 16384
    """Tokens of a forward pass."""
    mesh: str | None = None
    """Devices to use, such as fsdp=4,expert=2; one device when left out."""

    def run(self) -> None:
        """Runs every checkpoint over the corpus, then writes and prints."""
        import sys

        import rich.console
        from etils import epath

        from olmax import pretrained, sharding
        from olmax.errors import UserError

        mesh = None if self.mesh is None else sharding.make_mesh(self.mesh)
        model = pretrained.load(self.model, dtype=self.dtype, mesh=mesh)
        if model.config.moe is None:
            raise UserError(f"{self.model}: is dense; it has no experts to analyse")
        if model.tokenizer is None:
            raise UserError(f"{self.model}: no tokenizer.json beside the model; put one there")
        tokenizer = model.tokenizer

        from olmax.reporting.document import Report
        from olmax.reporting.files import environment, write_json
        from olmax.routing import analysis, collect, report, windows

        window = min(self.window, model.config.max_seq_len)
        corpus = windows(tokenizer, self._documents(), length=window, tokens=self.tokens)

        def routes(model):
            return collect(model, corpus, batch_tokens=self.batch_tokens, mesh=mesh, progress=True)

        final = routes(model.model)
        earlier = {}
        for entry in self.earlier:
            name, equals, path = entry.partition("=")
            if not equals:
                raise UserError(f"--earlier {entry}: write NAME=PATH, such as 10%={entry}")
            earlier[name] = routes(pretrained.load(path, dtype=self.dtype, mesh=mesh).model)
        found = analysis.analyse(final, layers=self.layers or None, earlier=earlier)
        output = epath.Path(self.output)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "routing.json", {**found, "environment": environment()})
        names = {i: tokenizer.decode([i]) for i in sorted(set(final.tokens_T.tolist()))}
        page = Report("Routing", self.model, report.sections(found, names=names))
        page.write(output / "report.html")
        console = rich.console.Console(width=None if sys.stdout.isatty() else 160)
        for table in (report.load_table(found), report.domain_table(found),
                      report.vocabulary_table(found)):  # fmt: skip
            console.print(table.rich())
        if earlier:
            console.print(report.saturation_table(found).rich())
        console.print(f"report: {output / 'report.html'}", highlight=False, soft_wrap=True)

    def _documents(self) -> dict[str, list[str]]:
        from olmax.data import sources

        patterns: dict[str, list[str]] = {}
        for entry in self.corpus:
            name, equals, pattern = entry.partition("=")
            if not equals or "/" in name:
                name, pattern = "text", entry
            patterns.setdefault(name, []).append(pattern)
        return {
            name: [
                document.text
                for document in sources.files(
                    matching, name=name, text_field=self.text_field
                ).read()
            ]
            for name, matching in patterns.items()
        }
