"""What a training command is going to train, read by its own parser."""

import contextlib
import importlib
import io
import sys
from collections.abc import Sequence

from olmax.errors import UserError
from olmax.training.config import TrainConfig

_HINT = "give --plan plan.json (from `olmax plan --output`), or --no-check"


def train_config(command: Sequence[str]) -> TrainConfig:
    """The configuration that `python -m experiments.<paper> ...` resolves to.

    An experiment's `__main__` has `parse(argv)`, whose result has `recipe.pretrain`, a
    `TrainConfig`. Parsing it here also finds mistyped options before a pod does.

    Raises:
      UserError: another kind of command, or one that its own parser refuses.
    """
    words = list(command)
    if "-m" not in words or words.index("-m") + 1 >= len(words):
        raise UserError(f"cannot tell what {' '.join(words[:3])!r} trains; {_HINT}")
    at = words.index("-m") + 1
    module = words[at]
    # `python -m` would find it in the current directory.
    if "" not in sys.path:
        sys.path.insert(0, "")
    said = io.StringIO()
    try:
        parse = importlib.import_module(f"{module}.__main__").parse
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            config = parse(words[at + 1 :]).recipe.pretrain
    except UserError as error:
        raise UserError(f"python -m {module} refuses its options: {error}") from None
    except SystemExit:
        raise UserError(f"cannot tell what the command trains; {_HINT}") from None
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot tell what {module} trains ({error}); {_HINT}") from error
    if not isinstance(config, TrainConfig):
        raise UserError(f"cannot tell what {module} trains; {_HINT}")
    return config
