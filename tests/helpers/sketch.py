"""A few numbers that stand for a large tensor: random projections, from which relative errors can be estimated.

For Rademacher vectors r, the mean of <a - b, r>^2 is ||a - b||^2. `PROJECTIONS` of them estimate a relative error well
enough to tell 1e-5 from 1e-4, and a recorded tensor of megabytes becomes 64 numbers.
"""

import zlib

import numpy as np
import torch

PROJECTIONS = 64


def sketch(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Projections `(PROJECTIONS,)` of a tensor, float64; the vectors depend on its name and size only."""
    values = tensor.detach().cpu().double().flatten().numpy()
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    signs = generator.integers(0, 2, size=(PROJECTIONS, values.size), dtype=np.int8) * 2.0 - 1.0
    return torch.from_numpy(signs @ values)


def relative_error(name: str, tensor: torch.Tensor, recorded: torch.Tensor, norm: float) -> float:
    """Estimate of ||tensor - reference|| / ||reference|| from the reference's sketch and norm."""
    return float((sketch(name, tensor) - recorded).pow(2).mean().sqrt() / norm)
