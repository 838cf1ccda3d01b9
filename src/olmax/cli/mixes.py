"""`olmax mixes`: the published data mixes as tables."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mixes:
    """Prints the published data mixes: tokens and shares, as released and as the papers print
    them."""

    name: str | None = None
    """One mix only, for example dolmino_mix_1124_50b."""

    def run(self) -> None:
        """Prints the tables."""
        import rich

        from olmax.data import mixtures

        for name in mixtures.MIXES if self.name is None else [self.name]:
            rich.print(mixtures.table(mixtures.get(name)))
