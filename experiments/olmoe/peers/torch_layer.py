"""The peer of the layer benchmark: transformers' OlmoeSparseMoeBlock, forward and backward on
request.

Runs in the peers' environment (`make peers`), not in ours. `experiments/olmoe/benchmark.py` starts
it with the shape as one JSON argument, then writes one number of runs a line to its standard input
and reads back the seconds of every run."""

import json
import sys
import time

import torch
import transformers
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock


def main() -> None:
    """Serves timing requests until standard input ends."""
    shape = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(shape["threads"])
    config = transformers.OlmoeConfig(
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_experts=shape["n_experts"],
        num_experts_per_tok=shape["experts_per_token"],
    )
    config._experts_implementation = shape["implementation"]
    dtype = getattr(torch, shape["dtype"])
    block = OlmoeSparseMoeBlock(config).to(dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    size = (1, shape["tokens"], shape["d_model"])
    x_BLD = torch.randn(size, dtype=dtype, requires_grad=True)
    dy_BLD = torch.randn(size, dtype=dtype)

    def run() -> None:
        block(x_BLD).backward(dy_BLD)
        x_BLD.grad = None
        block.zero_grad(set_to_none=True)

    run()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
