"""Error measures that every refinement is judged by."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["relative_mse", "snr_db"]

FloatArray = npt.NDArray[np.floating[Any]]


def relative_mse(reference: FloatArray, approximation: FloatArray) -> float:
    """Sum of squared errors over sum of squares: 0 for equality, 1 for an answer of all zeros.

    Computed in float64. A zero reference gives 0 if the approximation is zero too, else infinity. Non-finite
    approximations give infinity, so that they can never win a comparison.
    """
    x = np.asarray(reference, np.float64)
    error = float(np.sum(np.square(np.asarray(approximation, np.float64) - x)))
    if not np.isfinite(error):
        return float("inf")
    signal = float(np.sum(np.square(x)))
    if signal == 0:
        return 0.0 if error == 0 else float("inf")
    return error / signal


def snr_db(reference: FloatArray, approximation: FloatArray) -> float:
    """Signal-to-noise ratio, -10 log10(`relative_mse`), in dB; infinity for equality."""
    noise = relative_mse(reference, approximation)
    return float("inf") if noise == 0 else float(-10 * np.log10(noise))
