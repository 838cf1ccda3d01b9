"""olmax: fully open language and vision-language models in JAX.

`import olmax` is cheap: jax, flax and tensorflow are imported by the parts that need them.
"""

__version__ = "0.1.0"


def load(path: str, dtype: str = "float32", **kwargs):
    """Loads a model for scoring, generation and logits; see `olmax.pretrained.load`.

    Where JAX has not started yet, XLA's CPU backend gets the settings that make it right and fast
    (`olmax.cpu_tuning.set_environment`).
    """
    from olmax import cpu_tuning

    cpu_tuning.set_environment()
    from olmax import pretrained

    return pretrained.load(path, dtype=dtype, **kwargs)
