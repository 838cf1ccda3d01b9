"""Our side of the layer benchmark: one MoE block, forward and backward on request (see
`peers/torch_layer.py`)."""

import json
import sys
import time

from olmax import cpu_tuning


def main() -> None:
    """Serves timing requests until standard input ends."""
    cpu_tuning.apply()
    import jax
    import jaxlib
    from flax import nnx

    from olmax.models import DecoderConfig, Execution, MoEConfig
    from olmax.models.moe import MoE

    shape = json.loads(sys.argv[1])
    config = DecoderConfig(
        d_model=shape["d_model"],
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=2,
        d_ff=shape["d_ff"],
        moe=MoEConfig(shape["n_experts"], shape["experts_per_token"]),
    )
    dtype = shape["dtype"]
    # Parameters in the dtype of the products, as the peer has them.
    execution = Execution(compute_dtype=dtype, param_dtype=dtype)
    graphdef, state = nnx.split(MoE(config, execution, rngs=nnx.Rngs(0)))
    size = (1, shape["tokens"], shape["d_model"])
    x_BLD, dy_BLD = (jax.random.normal(jax.random.key(i), size, dtype) for i in (1, 2))

    @jax.jit
    def run(state, x_BLD, dy_BLD):
        y_BLD, back = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x)[0], state, x_BLD)
        return y_BLD, back(dy_BLD)

    jax.block_until_ready(run(state, x_BLD, dy_BLD))
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            jax.block_until_ready(run(state, x_BLD, dy_BLD))
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
