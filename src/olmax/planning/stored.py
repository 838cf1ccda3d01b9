"""Plans on disk."""

import json
from typing import Any

from etils import epath

from olmax.errors import UserError

_NEEDED = ("model", "topology", "mesh", "per_device_bytes", "fits", "step_seconds", "parts")


def load(path: epath.PathLike) -> dict[str, Any]:
    """A plan.json as written by `olmax plan`.

    Raises:
      UserError: no such file, not JSON, or not a plan.
    """
    try:
        plan = json.loads(epath.Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such plan; `olmax plan --output` writes one") from None
    except (ValueError, IsADirectoryError) as error:
        raise UserError(f"{path}: not a plan: {error}") from error
    missing = [key for key in _NEEDED if not isinstance(plan, dict) or key not in plan]
    if missing:
        raise UserError(f"{path}: not a plan: it has no {', '.join(missing)}")
    return plan
