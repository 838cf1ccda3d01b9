"""`olmax generate`: continuations of prompts."""

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, printing as it goes, or a file of prompts.

    A file holds one JSON object a line: {prompt} and, if wanted, {id}. Out, in the same order:
    {id, prompt, completion, tokens, finish_reason}. A row ends (finish_reason stop) at an
    end-of-text token or a stop string, else (length) at --max-new-tokens or where prompt and
    completion fill the model's context.

    Example: olmax generate --model runs/olmo2-tiny/stage1 --prompt "def main" --temperature 0.8
    """

    model: str
    """Model path: Hugging Face directory, hub id, run directory or checkpoint."""
    prompt: str | None = None
    """Text to continue; the continuation is printed."""
    prompts: str | None = None
    """JSON lines file of prompts, instead of --prompt; needs --output."""
    output: str | None = None
    """JSON lines file to write."""
    max_new_tokens: int = 128
    """Tokens of a continuation at most."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probability reaches this."""
    top_k: int = 0
    """Keep so many of the most likely tokens; 0 keeps all."""
    seed: int = 0
    """Of the sampling; a row's result depends on the seed and its number alone."""
    stop: tuple[str, ...] = ()
    """Strings that end a continuation; they are cut off."""
    batch_size: int = 32
    """Prompts continued at one time."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of parameters and matrix products."""
    cache: Literal["paged", "contiguous"] = "paged"
    """Layout of the keys and values: a prompt takes memory and time for its own length (paged), or
    for that of the longest beside it."""
    mesh: str | None = None
    """Devices to use, such as fsdp=4,tensor=2; one device when left out."""

    def run(self) -> None:
        """Reads all prompts, then generates, then writes."""
        from olmax.cli.output import check_output, write_lines
        from olmax.errors import UserError

        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either --prompt TEXT or --prompts FILE")
        if self.prompts is not None and self.output is None:
            raise UserError("--prompts needs --output FILE")
        if self.output is not None:
            check_output(self.output)
        ids, texts, names = [0], [self.prompt or ""], ["--prompt"]
        if self.prompts is not None:
            ids, texts, names = _read_prompts(self.prompts)

        from olmax import pretrained, sharding

        mesh = None if self.mesh is None else sharding.make_mesh(self.mesh)
        model = pretrained.load(self.model, dtype=self.dtype, mesh=mesh)
        completions = model.complete(
            texts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stop,
            batch_size=self.batch_size,
            cache=self.cache,
            names=names,
            on_text=_print if self.prompt is not None else None,
            progress=self.prompts is not None,
        )
        if self.prompt is not None:
            print()
        if self.output is None:
            return
        rows = [
            {
                "id": identifier,
                "prompt": text,
                "completion": completion.text,
                "tokens": len(completion.ids),
                "finish_reason": completion.finish_reason,
            }
            for identifier, text, completion in zip(ids, texts, completions, strict=True)
        ]
        write_lines(self.output, rows)
        if self.prompts is not None:
            print(f"{self.output}: {len(rows):,} completions")


def _read_prompts(path: str) -> tuple[list[Any], list[str], list[str]]:
    """(ids, prompts, `file:line`) of a json lines file; a row without an id gets its number."""
    from etils import epath

    from olmax.data.sources import read_records, text_of
    from olmax.errors import UserError

    if not epath.Path(path).exists() or epath.Path(path).is_dir():
        raise UserError(f"{path}: no such file; give a json lines file of prompts")
    ids, prompts, names = [], [], []
    for where, record in read_records(path):
        ids.append(record.get("id", len(ids)))
        prompts.append(text_of(record, "prompt", where))
        names.append(where)
    if not prompts:
        raise UserError(f"{path}: holds no prompts")
    return ids, prompts, names


def _print(row: int, text: str) -> None:
    del row  # There is only one.
    print(text, end="", flush=True)
