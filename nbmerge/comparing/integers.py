"""The statistics of integers: counts and |Δ|, both exact."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nbmerge.comparing.elements import as_integers
from nbmerge.comparing.tally import Tally, bit_lengths, counts
from nbmerge.dtypes import DType
from nbmerge.engine.read import Words


def integers(a: Words, b: Words, dtype: DType, tally: Tally, places: npt.NDArray[np.intp]) -> None:
    """Adds the sizes of changes. All elements changed; places: where each is."""
    before, after = as_integers(a, dtype), as_integers(b, dtype)
    # The difference of the greater and the lesser fits the unsigned type of the same size, also where it wraps.
    sizes = np.maximum(before, after).view(a.dtype) - np.minimum(before, after).view(a.dtype)
    for bits, count in counts(bit_lengths(sizes)).items():
        tally.magnitudes[bits - 1] += count
    at = int(sizes.argmax())
    tally.offer(int(sizes[at]), int(places[at]), int(before[at]), int(after[at]))
