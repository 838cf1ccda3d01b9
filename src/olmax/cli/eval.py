"""`olmax eval`: benchmark tasks on a model."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Eval:
    """Run OLMES request files on a model; print a table with standard errors and write the results
    as JSON.

    Example: olmax eval --model runs/a --requests olmes_requests --output results.json
    """

    model: str
    """Model path: Hugging Face directory, hub id, run directory or checkpoint."""
    requests: tuple[str, ...]
    """Request files (.jsonl, .jsonl.gz), directories of them, or tasks below
    $OLMAX_DATA_DIR/olmes_requests such as arc_easy/val_rc_5shot."""
    output: str
    """JSON file to write."""
    limit: int | None = None
    """Questions of each task, spread over its file; all when left out."""
    pmi: bool = False
    """Score unconditional requests too, for acc_uncond."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of parameters and matrix products."""
    batch_tokens: int = 16384
    """Tokens of a forward pass, padding included."""
    mesh: str | None = None
    """Devices to use, such as fsdp=4,tensor=2; one device when left out."""

    def run(self) -> None:
        """Reads all requests, then scores, then prints and writes."""
        import sys

        import rich.console

        from olmax.cli.output import check_output, write
        from olmax.evaluation.requests import read_tasks

        tasks = read_tasks(self.requests)
        check_output(self.output)

        import json

        from olmax import pretrained, sharding
        from olmax.errors import UserError
        from olmax.evaluation.suite import Suite
        from olmax.reporting.files import environment, jsonable

        mesh = None if self.mesh is None else sharding.make_mesh(self.mesh)
        model = pretrained.load(self.model, dtype=self.dtype, mesh=mesh)
        if model.tokenizer is None:
            raise UserError(f"{self.model}: no tokenizer.json beside the model; put one there")
        suite = Suite(model.tokenizer, tasks, limit=self.limit, pmi=self.pmi)
        results = suite(model.model, batch_tokens=self.batch_tokens, mesh=mesh, progress=True)
        whole = {
            "model": self.model,
            "dtype": self.dtype,
            "limit": self.limit,
            **results.to_json(),
            "environment": environment(),
        }
        write(self.output, json.dumps(jsonable(whole), indent=1, ensure_ascii=False) + "\n")
        # Into a file or a pipe nothing is cut off.
        width = None if sys.stdout.isatty() else 160
        rich.console.Console(width=width).print(results.table().rich())
