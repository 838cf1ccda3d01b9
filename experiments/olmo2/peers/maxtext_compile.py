"""MaxText's ahead-of-time compilation of a training step, and the compiled program's text.

Run by the Python of the environment of `make peers-maxtext`:
`python maxtext_compile.py TEXT_FILE OPTIONS KEY=VALUE...`, OPTIONS of the compiler as JSON, keys
and values of MaxText's configuration. Writes the program to TEXT_FILE and prints one line of JSON
with the bytes of one device.
"""

import importlib.resources
import json
import os
import sys
import time

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")


def main() -> None:
    path, options, *settings = sys.argv[1:]
    import jax
    from absl import app

    compile_lowered = jax.stages.Lowered.compile

    def compile_and_keep(self, *args, **kwargs):
        start = time.monotonic()
        kwargs["compiler_options"] = (kwargs.get("compiler_options") or {}) | json.loads(options)
        compiled = compile_lowered(self, *args, **kwargs)
        seconds = time.monotonic() - start
        memory = compiled.memory_analysis()
        with open(path, "w") as file:
            file.write(compiled.as_text())
        found = {
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "compile_seconds": seconds,
        }
        print("MAXTEXT " + json.dumps(found), flush=True)
        return compiled

    jax.stages.Lowered.compile = compile_and_keep
    from maxtext.trainers.pre_train import train_compile

    base = str(importlib.resources.files("maxtext").joinpath("configs/base.yml"))
    app.run(train_compile.main, argv=["train_compile", base, *settings])


if __name__ == "__main__":
    main()
