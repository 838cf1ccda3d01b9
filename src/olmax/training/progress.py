"""What a person sees of a training run: one line that stays up to date, or plain lines in a log."""

import sys
import time

import tqdm


class Progress:
    """Progress of a run of `total` steps, shown on stderr; silent where `enabled` is False."""

    def __init__(self, total: int, start: int, *, enabled: bool = True):
        self._total = total
        self._enabled = enabled
        self._started = (time.monotonic(), start)
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: float, tokens_per_second: float | None, mfu: float | None):
        """Shows where training stands after `step` steps."""
        if not self._enabled:
            return
        parts = [f"loss {loss:.4f}"]
        if tokens_per_second is not None:
            parts.append(f"{_short(tokens_per_second)} tok/s")
        if mfu is not None:
            parts.append(f"MFU {100 * mfu:.1f}%")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        when, first = self._started
        if step > first:
            left = (self._total - step) * (time.monotonic() - when) / (step - first)
            parts.append(f"ETA {tqdm.tqdm.format_interval(left)}")
        self.say(f"step {step}/{self._total}  " + "  ".join(parts))

    def say(self, text: str):
        """Prints a line without disturbing the bar."""
        if self._enabled:
            tqdm.tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self):
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _short(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"
