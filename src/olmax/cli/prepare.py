"""`olmax prepare`: documents to packed token shards."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Tokenises documents and packs them into shards that training reads."""

    input: tuple[str, ...]
    """Files, globs or directories, in quotes where the shell would expand them. NAME=PATTERN puts
    them into a source of that name; patterns without a name form the source `text`."""
    tokenizer: str
    """A tokenizer.json, or a directory that holds one."""
    output: str
    """Directory to make."""
    sequence_length: int = 4096
    """Tokens of an instance."""
    format: Literal["auto", "jsonl", "text", "parquet"] = "auto"
    """Of the input; auto goes by the endings (.jsonl .json .txt .md, also with .gz or .zst, and
    .parquet)."""
    text_field: str = "text"
    """Field or column that holds the text."""
    max_tokens: int | None = None
    """Stop each source after so many tokens."""
    export_npy: bool = False
    """Also write each source as a raw uint32 token file <source>.npy, as OLMo's trainers read
    it."""
    overwrite: bool = False
    """Replace an output directory that was prepared from something else."""

    def run(self) -> None:
        """Prepares, or says that the directory already holds the same."""
        import pathlib

        import rich
        import rich.table

        from olmax.data import npy, prepared, sources
        from olmax.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_file(self.tokenizer)
        patterns: dict[str, list[str]] = {}
        for entry in self.input:
            name, equals, pattern = entry.partition("=")
            if not equals or "/" in name:
                name, pattern = "text", entry
            patterns.setdefault(name, []).append(pattern)
        manifest = prepared.prepare(
            [
                sources.files(
                    matching,
                    name=name,
                    format=None if self.format == "auto" else self.format,
                    text_field=self.text_field,
                )
                for name, matching in patterns.items()
            ],
            tokenizer,
            self.output,
            sequence_length=self.sequence_length,
            max_tokens=self.max_tokens,
            overwrite=self.overwrite,
        )
        if self.export_npy:
            for source in prepared.open_prepared(self.output):
                npy.export_npy(source, pathlib.Path(self.output) / f"{source.name}.npy")
        table = rich.table.Table(
            title=f"{self.output} ({manifest.fingerprint})", title_justify="left"
        )
        table.add_column("source")
        for column in ("documents", "tokens", "instances", "shards"):
            table.add_column(column, justify="right")
        for source in manifest.sources:
            counts = (source.documents, source.tokens, source.instances, len(source.shards))
            table.add_row(source.name, *(f"{count:,}" for count in counts))
        rich.print(table)
