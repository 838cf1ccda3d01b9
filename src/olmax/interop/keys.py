"""Reading foreign configuration files strictly: every key is read, accepted as harmless, or
refused.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from olmax.errors import UserError

_logger = logging.getLogger(__name__)


class Keys:
    """The keys of one mapping of a configuration file, and which of them have been looked at."""

    def __init__(self, values: Any, file: str, prefix: str = ""):
        if not isinstance(values, Mapping):
            raise UserError(f"{file}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys")
        self.values = values
        self.file = file
        self.prefix = prefix
        self._seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Value of `key`; the default where it is absent or null."""
        self._seen.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """Value of `key`, which must be a positive integer."""
        value = self.get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, "must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Value of `key`, which must be a positive number."""
        value = self.get(key, default)
        if isinstance(value, str):
            # YAML 1.1 reads 1e-6 (no dot) as a string.
            try:
                value = float(value)
            except ValueError:
                raise self.error(key, "must be a number") from None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(key, "must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Value of `key`, which must be true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def child(self, key: str) -> "Keys":
        """The mapping under `key`."""
        return Keys(self.get(key), self.file, f"{self.prefix}{key}.")

    def require(self, key: str, *allowed: Any, default: Any = None) -> None:
        """Refuses a value of `key` other than the allowed ones (null and absent mean the
        default).
        """
        value = self.get(key, default)
        if not any(
            value == good and isinstance(value, bool) == isinstance(good, bool) for good in allowed
        ):
            wanted = " or ".join(repr(good) for good in allowed)
            raise self.error(key, f"is not supported (only {wanted})")

    def skip(self, *keys: str) -> None:
        """Marks keys that do not change the function."""
        self._seen.update(keys)

    def unread(self) -> dict[str, Any]:
        """Keys that nobody looked at and that say something (neither null nor false)."""
        return {
            key: value
            for key, value in self.values.items()
            if key not in self._seen and value is not None and value is not False
        }

    def refuse_unread(self) -> None:
        """Raises for the first key that nobody looked at."""
        for key in self.unread():
            raise self.error(key, "is not known here and may change the computation")

    def warn_unread(self, suspicious: Collection[str] = ()) -> None:
        """Raises for unread keys that contain a suspicious word, and logs the others."""
        unread = self.unread()
        for key in unread:
            if any(word in key.lower() for word in suspicious):
                raise self.error(key, "is not supported and may change the computation")
        if unread:
            names = ", ".join(self.prefix + key for key in unread)
            _logger.warning("%s: ignored unknown keys: %s", self.file, names)

    def error(self, key: str, problem: str) -> UserError:
        """An error that names the key, its value and the file."""
        return UserError(f"{self.file}: {self.prefix}{key} = {self.values.get(key)!r} {problem}")
