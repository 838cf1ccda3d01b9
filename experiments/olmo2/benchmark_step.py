"""Our side of the throughput benchmark: the trainer's own step, timed on request.

`experiments/olmo2/benchmark.py` starts it with the shape as one JSON argument, then writes one
number of steps a line to its standard input and reads back the seconds of every step. The side of
torch, `peers/torch_step.py`, works the same way. `experiments/olmo2/ablation.py` adds fields that
switch single settings off.
"""

import json
import sys
import time

import numpy as np

from olmax import cpu_tuning


def main() -> None:
    """Serves timing requests until standard input ends."""
    shape = json.loads(sys.argv[1])
    cpu_tuning.set_environment()
    if shape.get("keep_freed_memory", True):
        cpu_tuning.keep_freed_memory()
    import jax
    import jaxlib

    from olmax.models import Decoder, DecoderConfig, Execution
    from olmax.training.objectives import NextToken
    from olmax.training.optimizers import AdamWConfig
    from olmax.training.schedules import ScheduleConfig
    from olmax.training.step import make_train_step

    config = DecoderConfig(
        d_model=shape["d_model"],
        n_layers=shape["n_layers"],
        n_heads=shape["n_heads"],
        n_kv_heads=shape["n_heads"],
        head_dim=shape["d_model"] // shape["n_heads"],
        d_ff=shape["d_ff"],
        vocab_size=shape["vocab_size"],
        max_seq_len=shape["seq_len"],
    )
    execution = Execution(
        **{"compute_dtype": shape["dtype"], "unroll_layers": True, **shape.get("execution", {})}
    )
    training = make_train_step(
        lambda rngs: Decoder(config, execution, rngs=rngs),
        NextToken(),
        AdamWConfig(),
        ScheduleConfig("constant", peak=3e-4),
    )
    size = (shape["batch_size"], shape["seq_len"])
    tokens_BL = np.random.default_rng(0).integers(2, shape["vocab_size"], size, np.int32)
    batch = training.place({"tokens": tokens_BL})
    state = training.initialize()

    start = time.perf_counter()
    step = training.step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    state, metrics = step(state, batch)
    ready = {
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "parameters": config.num_params,
        "flops_per_token": config.matmul_flops_per_token(shape["seq_len"]),
        "compile_seconds": compile_seconds,
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        seconds, processor_seconds = [], []
        for _ in range(int(line)):
            start, processor_start = time.perf_counter(), time.process_time()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
            processor_seconds.append(time.process_time() - processor_start)
        answer = {
            "seconds": seconds,
            "processor_seconds": processor_seconds,
            "loss": float(metrics["loss"]),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
