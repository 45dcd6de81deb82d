"""The same kernels on CUDA tensors: values agree with the CPU's within the bounds of both."""

from __future__ import annotations

import pytest
import torch

from geopd.spectral import angle_error, decompose, leading_triples, principal_angles
from prescribed import normal, power_law, with_spectrum

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)], ids=str)
def test_decompositions_agree(shape: tuple[int, int]) -> None:
    W = with_spectrum(power_law(300), *shape)
    here, there = decompose(W, 20), decompose(W.cuda(), 20)
    assert there.sigma.is_cuda
    assert bool(((here.sigma - there.sigma.cpu()).abs() <= here.sigma_error + there.sigma_error.cpu()).all())
    for side in ("left", "right"):
        angles = principal_angles(getattr(here, side).cuda(), getattr(there, side))
        assert float(angles.max()) <= angle_error((here, there), 20)


def test_leading_triples_agree() -> None:
    W = 0.05 * normal(1, 500, 24) @ normal(2, 24, 400) + normal(3, 500, 400)
    here, there = leading_triples(W, 4), leading_triples(W.cuda(), 4)
    error = here.sigma_error[:4] + there.sigma_error[:4].cpu()
    assert bool(((here.sigma[:4] - there.sigma[:4].cpu()).abs() <= error).all())
