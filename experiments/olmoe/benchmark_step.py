"""One training step of a model preset, timed on request (see `benchmark.py`)."""

import json
import sys
import time

import numpy as np

from olmax import cpu_tuning


def main() -> None:
    """Serves timing requests until standard input ends."""
    cpu_tuning.apply()
    import jax
    import jaxlib

    from olmax.models import Decoder, Execution, get_preset
    from olmax.training.objectives import NextToken
    from olmax.training.optimizers import AdamWConfig
    from olmax.training.schedules import ScheduleConfig
    from olmax.training.step import make_train_step

    asked = json.loads(sys.argv[1])
    config = get_preset(asked["preset"])
    execution = Execution(compute_dtype=asked["dtype"], unroll_layers=True)
    training = make_train_step(
        lambda rngs: Decoder(config, execution, rngs=rngs),
        NextToken(),
        AdamWConfig(),
        ScheduleConfig("constant", peak=3e-4),
    )
    size = (asked["batch_size"], asked["seq_len"])
    tokens_BL = np.random.default_rng(0).integers(2, config.vocab_size, size, np.int32)
    batch = training.place({"tokens": tokens_BL})
    state = training.initialize()
    step = training.step.lower(state, batch).compile()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    ready = {
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "parameters": config.num_params,
        "active_parameters": config.num_active_params,
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds, "loss": float(metrics["loss"])}), flush=True)


if __name__ == "__main__":
    main()
