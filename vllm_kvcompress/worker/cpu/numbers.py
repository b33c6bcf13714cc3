"""Which type of NumPy's array tells kernels how the elements of a cache are to be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba.core import types

FLOAT32, BFLOAT16, FLOAT16 = types.float32, types.int16, types.uint16
E4M3, E5M2 = types.uint8, types.int8
"""Tags, as numba has them: integers of the right size that stand for other numbers."""

TAGS: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(np.int16),
    torch.float16: np.dtype(np.uint16),
    torch.float8_e4m3fn: np.dtype(np.uint8),
    torch.float8_e5m2: np.dtype(np.int8),
}
"""The same tags as NumPy has them, by the type of the cache's elements."""

SCALES = {torch.float8_e4m3fn: 2.0**8}
"""By what vectors have to be multiplied to be the numbers they stand for, where not 1."""
