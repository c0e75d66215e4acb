"""How sure a share is."""

import math

Z = 1.959964
"""Two-sided 95 % of a normal distribution."""


def wilson(hits: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score (E. B. Wilson, 1927); 0 to 1 without trials."""
    if total == 0:
        return 0.0, 1.0
    share, spread = hits / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
