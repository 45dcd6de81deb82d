"""Names are gone through once: a header of many thousand tensors is laid out in a moment, whatever it makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from geopd.checkpoints import TensorInfo
from geopd.matrices import layout_of
from geopd.matrices.quantised import Quantised

MANY = 20_000  # to go through all names for each would take minutes
HEADS = {"num_attention_heads": 1, "model_type": "llama"}


def laid_out(*names: str) -> Callable[[], int]:
    shapes = {name.format(i): (2, 1, 1) if "experts" in name else (2, 1) for i in range(MANY) for name in names}
    return lambda: len(layout_of(shapes, HEADS).pieces)


def recognised() -> int:
    names = ("{}.weight", "{}.weight.absmax", "{}.weight.quant_state.bitsandbytes__nf4")
    tensors = [TensorInfo(name.format(i), (1,), "U8", 1) for i in range(MANY) for name in names]
    found = Quantised.among({info.name: info for info in tensors})
    return len(found.refused) + len(found.companions)


CASES: dict[str, tuple[Callable[[], int], int]] = {
    "parts that are there whole too": (
        laid_out("layers.{}.feed_forward.w1.weight", "model.layers.{}.mlp.gate_proj.weight"),
        2 * MANY,
    ),
    "rows in Meta's order": (laid_out("layers.{}.attention.wq.weight"), MANY),
    "stacks": (laid_out("layers.{}.mlp.experts.down_proj"), 2 * MANY),
    "four bits": (recognised, 3 * MANY),
}


@pytest.mark.parametrize("case", CASES)
def test_the_time_grows_with_the_names(case: str) -> None:
    lay, expected = CASES[case]
    started = time.monotonic()
    assert lay() == expected
    assert time.monotonic() - started < 4
