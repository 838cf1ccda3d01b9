"""The numbers of the OLMo 2 paper that reports are compared with."""

import functools
import json
import pathlib
from typing import Any

PATH = pathlib.Path(__file__).with_name("published.json")


@functools.cache
def load() -> dict[str, Any]:
    """Contents of published.json; every table names its source."""
    return json.loads(PATH.read_text())
