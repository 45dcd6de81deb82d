"""Weyl, Mirsky and Wedin at run time: right numbers pass them, a spoilt spectrum or subspace becomes ``failed``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from geopd.diagnostics import Comparison, OriginMatrix, Parameters, Rank, select
from geopd.diagnostics import comparison as comparison_module
from geopd.diagnostics.perturbation import violation
from geopd.results import Status
from geopd.spectral import decompose
from prescribed import normal, power_law, with_spectrum

PARAMETERS = Parameters(rotation_k=Rank("4"), principal_rank=Rank("4"))


def pair(size: float) -> Comparison:
    before = with_spectrum(power_law(40), 60, 40)
    return Comparison(OriginMatrix(before, PARAMETERS), before + size * normal(4, 60, 40))


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0])
def test_right_numbers_pass(size: float) -> None:
    assert violation(pair(size)) is None


def test_wedin_holds_where_the_gap_of_the_origin_alone_would_break_it() -> None:
    before = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    after = before + torch.tensor([[0.0, 0.9], [0.9, 0.0]], dtype=torch.float64)
    one = Parameters(rotation_k=Rank("1"), principal_rank=Rank("1"))
    assert violation(Comparison(OriginMatrix(before, one), after)) is None


@pytest.mark.parametrize("bound", ["Weyl", "Mirsky", "Wedin"])
def test_a_wrong_number_is_failed_and_named(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = pair(1e-6)
    right = decompose(comparison.stored, 4)
    assert violation(comparison) is None
    if bound == "Weyl":
        wrong = replace(right, sigma=right.sigma + torch.eye(40, dtype=torch.float64)[0] * 1e-3)
    elif bound == "Mirsky":
        # every value off by less than ||dW||_2, all together by more than ||dW||_F
        top, norm = float(comparison.update_decomposition.sigma[0]), comparison.update_norm[0]
        assert top * 40**0.5 > norm
        wrong = replace(right, sigma=comparison.origin.decomposition.sigma + 0.999 * top)
    else:
        turned = right.left.clone()
        turned[:, 0] = torch.linalg.qr(torch.cat([right.left, normal(9, 60, 1)], dim=1)).Q[:, -1]
        wrong = replace(right, left=turned)
    spoilt = pair(1e-6)
    _ = spoilt.update_decomposition, spoilt.origin.decomposition
    monkeypatch.setattr(comparison_module, "decompose", lambda *_: wrong)
    reason = violation(spoilt)
    assert reason is not None
    assert reason.startswith(bound)
    rows = [item for diagnostic in select(["spectral_shift"]) for item in diagnostic.measure(spoilt)]
    rows += [item for diagnostic in select(["rotation_left_max_deg"]) for item in diagnostic.measure(spoilt)]
    assert all(item.status is Status.FAILED and item.value is None for item in rows)
    assert all(item.note is not None and item.note.startswith(bound) for item in rows)
