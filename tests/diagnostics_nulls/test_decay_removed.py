"""Weight decay planted beside other updates is found, and what is left is measured without it."""

from __future__ import annotations

import pytest
import torch
from planted_updates import compare, planted, stable_rank, structure, weights

from geopd.diagnostics import decay, select, spectral_shift
from geopd.diagnostics.decay import REMOVED, measure, measure_spectral_shift, measure_stable_rank
from geopd.results import Status
from prescribed import power_law, with_spectrum

DECAY = -2.9e-3


@pytest.mark.parametrize("shape", [(200, 120), (60, 300)], ids=str)
def test_planted_decay_is_found_and_removed(shape: tuple[int, int]) -> None:
    W = weights("columns", *shape)
    d = 1e-5 * structure("rank 4", W)
    d -= float((d * W).sum() / W.square().sum()) * W
    item = compare(W, W + DECAY * W + d)
    (c,) = measure(item)
    assert c.value == pytest.approx(DECAY, rel=1e-10)
    (rank,) = measure_stable_rank(item)
    assert rank.value == pytest.approx(stable_rank(d), rel=1e-8)
    assert stable_rank(item.update()) > 3 * stable_rank(d), "decay must be what the raw value reads"
    assert (rank.setting, rank.is_default, rank.status) == ("decay=removed;view=native", False, Status.OK)


def test_the_shift_without_decay_needs_no_further_spectrum_and_is_exact() -> None:
    W = with_spectrum(power_law(90, 0.7), 120, 90)
    d = 1e-4 * structure("rank 16", W)
    d -= float((d * W).sum() / W.square().sum()) * W
    c = -0.05
    item = compare(W, (1 + c) * W + d)
    (row,) = measure_spectral_shift(item)
    sigma = torch.linalg.svdvals(W)

    def shift(update: torch.Tensor) -> float:
        return float(
            torch.linalg.vector_norm(torch.linalg.svdvals(W + update) - sigma) / torch.linalg.vector_norm(sigma)
        )

    assert row.error is not None
    assert row.value == pytest.approx(shift(d / (1 + c)), rel=1e-9, abs=row.error)
    # the shift of d itself lies within the stated distance
    mirsky = abs(c / (1 + c)) * float(torch.linalg.matrix_norm(d) / torch.linalg.matrix_norm(W))
    assert abs((row.value or 0.0) - shift(d)) <= mirsky
    plain = spectral_shift.measure(item)[0].value
    assert plain == pytest.approx(0.05, rel=0.02)
    assert (row.setting, row.is_default) == (REMOVED, False)


def test_pure_decay_leaves_no_shift_and_no_rank() -> None:
    W = weights("plain", 80, 50)
    item = compare(W, 0.75 * W)
    assert measure(item)[0].value == pytest.approx(-0.25, rel=1e-14)
    (shift,), (rank,) = measure_spectral_shift(item), measure_stable_rank(item)
    assert shift.value is not None
    assert shift.error is not None
    assert shift.value <= shift.error + 1e-14
    assert (rank.value, rank.status, rank.note) == (None, Status.UNDEFINED, "the update is nothing but decay")


def test_bf16_decay_of_the_paper_is_seen() -> None:
    """Within a tenth: a decay of half a step an entry rounds to none or to a whole one."""
    W = weights("plain", 300, 300)
    item = planted(W, DECAY * W.bfloat16().double() + 2e-5 * structure("rank 16", W), "on-grid")
    assert measure(item)[0].value == pytest.approx(DECAY, rel=0.1)


def test_the_coefficient_of_an_update_that_ignores_the_weights() -> None:
    """Its sd is ||dW|| / (||W0|| sqrt(mn)); and an update of 1e-12 keeps its digits."""
    W = weights("plain", 200, 200)
    values = []
    for size in (1e-3, 1e-12):
        item = compare(W, W + size * structure("white", W))
        (row,) = measure(item)
        assert row.error is not None
        assert abs(row.value or 1.0) < 4 * size / 0.02 / 200
        assert row.error < 1e-9 if size > 1e-6 else row.error < 1e-20
        values.append((row.value or 0.0) / size)
    assert values[0] == pytest.approx(values[1], rel=0.02)


def test_undefined_with_its_reason() -> None:
    W = weights("plain", 12, 8)
    zero = torch.zeros_like(W)
    assert [measure(compare(zero, W))[0].value, measure_stable_rank(compare(zero, W))[0].value] == [None, None]
    assert measure_spectral_shift(compare(zero, W))[0].setting == REMOVED
    same = compare(W, W.clone())
    assert (measure(same)[0].value, measure_spectral_shift(same)[0].value) == (0.0, 0.0)
    assert measure_stable_rank(same)[0].note == "the update is exactly zero"
    (gone,) = measure_spectral_shift(compare(W, -W))
    assert gone.status is Status.UNDEFINED
    assert gone.note is not None
    assert gone.note.startswith("c = -2")


def test_values_are_streamed_and_inputs_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    W = weights("plain", 64, 32)
    after = W + 1e-3 * structure("rank 4", W)
    whole = measure(compare(W, after))[0]
    kept, moved = W.clone(), after.clone()
    monkeypatch.setattr(decay, "row_blocks", lambda shape: (slice(i, i + 5) for i in range(0, shape[0], 5)))
    assert measure(compare(W, after))[0].value == whole.value
    assert torch.equal(W, kept)
    assert torch.equal(after, moved)


def test_variants_come_with_their_metric() -> None:
    item = compare(weights("plain", 40, 30), weights("plain", 40, 30, seed=1))
    for metric in ("stable_rank", "spectral_shift"):
        rows = [row for diagnostic in select([metric]) for row in diagnostic.measure(item) if row.metric == metric]
        assert [(row.setting, row.is_default) for row in rows] == [("view=native", True), (REMOVED, False)]
