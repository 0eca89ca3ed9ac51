"""How many sublayers make a block whose streams backward rebuilds (mHC, section 4.3)."""

import math
from typing import Literal

from manifold_hc.errors import ConfigError

Recompute = int | Literal["none", "auto"] | None
"""Whether streams are rebuilt, and how many sublayers make a block; "none" is None."""


def block_length(recompute: Recompute, sublayers: int, n: int) -> int | None:
    """Sublayers a block; None where nothing is recomputed.

    "auto": the length L_r that minimises what is held at once, `n ceil(L / L_r) + (n + 2) L_r`
    times C numbers a token (mHC, equation 20), the smallest one if there are several.
    Raises ConfigError for a length below 1 or above the sublayers.
    """
    if recompute in (None, "none"):
        return None
    if recompute == "auto":
        return min(
            range(1, sublayers + 1),
            key=lambda length: n * math.ceil(sublayers / length) + (n + 2) * length,
        )
    if isinstance(recompute, bool) or not isinstance(recompute, int):
        raise ConfigError(f'recompute: must be None, "auto" or a block length but is {recompute!r}')
    if not 1 <= recompute <= sublayers:
        raise ConfigError(
            f"recompute: a block must have 1 to {sublayers} sublayers, as many as the stack, "
            f'but has {recompute}; "auto" chooses'
        )
    return recompute
