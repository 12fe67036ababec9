"""How far apart colours look, also to the colour-blind: CIEDE2000 after the simulation of Machado et al.

G. M. Machado, M. M. Oliveira, L. A. F. Fernandes, "A Physiologically-based Model for Simulation of Color Vision
Deficiency", IEEE TVCG 15(6), 2009: matrices of severity 1.0, for linear RGB. G. Sharma, W. Wu, E. N. Dalal, "The
CIEDE2000 Color-Difference Formula", 2005.
"""

from collections.abc import Sequence

import numpy as np

MACHADO = {
    "everyone else": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])  # D65


def lab(colours: Sequence[Sequence[int]] | np.ndarray, vision: str) -> np.ndarray:
    """Returns (n, 3) CIELAB of sRGB colours (n, 3) in [0, 255], as an eye of a vision sees them."""
    srgb = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ MACHADO[vision].T, 0, 1)
    t = seen @ _TO_XYZ.T / _WHITE
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns CIEDE2000 of CIELAB colours (..., 3) and (..., 3)."""
    (L1, a1, b1), (L2, a2, b2) = np.moveaxis(one, -1, 0), np.moveaxis(other, -1, 0)
    chroma = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    grey = 1.5 - 0.5 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    C1, C2 = np.hypot(grey * a1, b1), np.hypot(grey * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, grey * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180
    dH = 2 * np.sqrt(C1 * C2) * np.sin(np.radians(turn / 2))
    L, C, h = (L1 + L2) / 2, (C1 + C2) / 2, (h1 + turn / 2) % 360
    waves = ((-0.17, 1, 30), (0.24, 2, 0), (0.32, 3, -6), (-0.20, 4, 63))
    T = 1 + sum(size * np.cos(np.radians(times * h - start)) for size, times, start in waves)
    S = 1 + 0.015 * (L - 50) ** 2 / np.sqrt(20 + (L - 50) ** 2), 1 + 0.045 * C, 1 + 0.015 * C * T
    rotation = -2 * np.sqrt(C**7 / (C**7 + 25.0**7)) * np.sin(np.radians(60 * np.exp(-(((h - 275) / 25) ** 2))))
    dL, dC, dH = (L2 - L1) / S[0], (C2 - C1) / S[1], dH / S[2]
    return np.sqrt(dL**2 + dC**2 + dH**2 + rotation * dC * dH)


def apart(colours: Sequence[Sequence[int]], vision: str) -> np.ndarray:
    """Returns (n, n) CIEDE2000 between colours; the diagonal is infinite."""
    seen = lab(colours, vision)
    found = difference(seen[:, None], seen[None])
    np.fill_diagonal(found, np.inf)
    return found
