"""`olmax score`: log-likelihoods of continuations."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Score:
    """Score continuations given their contexts.

    In, one JSON object a line: {id, context, continuation}. Out, in the same order:
    {id, logprob, tokens, is_greedy}. Context and continuation are encoded apart and joined, no
    special tokens are added, and the context is cut from the left to fit the model's context. An
    empty context stands for the tokenizer's beginning-of-text token, or end of text without one.

    Example: olmax score --model runs/olmo2-tiny/stage1 --requests in.jsonl --output out.jsonl
    """

    model: str
    """Model path: Hugging Face directory, hub id, run directory or checkpoint."""
    requests: str
    """JSON lines file (plain, .gz or .zst)."""
    output: str
    """JSON lines file to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of parameters and matrix products."""
    batch_tokens: int = 16384
    """Tokens of a forward pass, padding included."""
    mesh: str | None = None
    """Devices to use, such as fsdp=4,tensor=2; one device when left out."""

    def run(self) -> None:
        """Reads all requests, then scores, then writes."""
        from olmax.cli.output import check_output, write_lines
        from olmax.evaluation.requests import read_requests

        requests = read_requests(self.requests)
        check_output(self.output)

        from olmax import pretrained, sharding

        mesh = None if self.mesh is None else sharding.make_mesh(self.mesh)
        model = pretrained.load(self.model, dtype=self.dtype, mesh=mesh)
        pairs = [(request.context, request.continuation) for request in requests]
        scores = model.score(
            pairs,
            batch_tokens=self.batch_tokens,
            names=[request.where for request in requests],
            progress=True,
        )
        rows = [
            {
                "id": request.id,
                "logprob": score.logprob,
                "tokens": score.tokens,
                "is_greedy": score.is_greedy,
            }
            for request, score in zip(requests, scores, strict=True)
        ]
        write_lines(self.output, rows)
        print(f"{self.output}: {len(rows):,} scores")
