"""Quantised weights: fp8 by its scales in plain arithmetic, everything else refused by name with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints_on_disk import q_name, save_tensors, small_weights
from geopd.checkpoints import CheckpointError, open_checkpoint
from geopd.matrices import CanonicalCheckpoint, canonical_view, pair_checkpoints

STEM = q_name().removesuffix("weight")
FP8 = torch.float8_e4m3fn
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 3]}}


def view(path: Path, tensors: dict[str, Tensor], config: dict[str, object] | None = None) -> CanonicalCheckpoint:
    return canonical_view(open_checkpoint(save_tensors(path, tensors, config)))


def quantised(m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(FP8)


def test_block_scales_multiply_their_blocks(tmp_path: Path) -> None:
    Q, s = quantised(10, 7), 1 + torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    held = view(tmp_path, {q_name(): Q, f"{q_name()}_scale_inv": s}, BLOCKS)
    expected = torch.empty(10, 7)
    for i in range(10):
        for j in range(7):
            expected[i, j] = Q[i, j].float() * s[i // 4, j // 3]
    assert torch.equal(held.read(q_name()), expected)
    assert list(held.tensors) == [q_name()]
    info = held.tensors[q_name()]
    assert (info.shape, info.dtype, info.nbytes) == ((10, 7), "F32", 4 * 70)


@pytest.mark.parametrize("shape", [(), (1,), (10, 1), (10,)], ids=str)
def test_one_scale_or_one_a_row(shape: tuple[int, ...], tmp_path: Path) -> None:
    Q, s = quantised(10, 7), 1 + torch.rand(shape, generator=torch.Generator().manual_seed(1))
    held = view(tmp_path, {q_name(): Q, f"{q_name()}_scale": s, f"{STEM}input_scale": torch.ones(())})
    column = s.reshape(-1, 1) if s.numel() > 1 else s.reshape(())
    assert torch.equal(held.read(q_name()), Q.float() * column)
    assert list(held.tensors) == [q_name()]


def test_a_stack_of_experts_is_dequantised_expert_by_expert(tmp_path: Path) -> None:
    up = torch.stack([quantised(8, 6), quantised(8, 6)])
    scale = 1 + torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(1))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    held = view(tmp_path, {name: up, f"{name}_scale_inv": scale}, BLOCKS)
    wide = scale.repeat_interleave(4, 1).repeat_interleave(3, 2)
    assert torch.equal(held.read("layers.0.mlp.experts.1.up_proj.weight"), (up.float() * wide)[1, 4:])
    assert held.tensors["layers.0.mlp.experts.1.up_proj.weight"].dtype == "F32"


def test_scales_of_another_shape_are_named(tmp_path: Path) -> None:
    held = view(tmp_path, {q_name(): quantised(10, 7), f"{q_name()}_scale_inv": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: its scales have the shape \(2, 2\)"):
        held.read(q_name())


BYTES = torch.zeros(6, 1, dtype=torch.uint8)
REFUSED = {
    "bitsandbytes (4 bits)": {
        q_name(): BYTES,
        f"{q_name()}.absmax": torch.zeros(2),
        f"{q_name()}.quant_map": torch.zeros(16),
        f"{q_name()}.nested_absmax": torch.zeros(1),
        f"{q_name()}.quant_state.bitsandbytes__nf4": BYTES[:, 0].clone(),
    },
    "bitsandbytes (8 bits)": {q_name(): torch.zeros(4, 4, dtype=torch.int8), f"{STEM}SCB": torch.zeros(4)},
    "GPTQ": {
        f"{STEM}qweight": torch.zeros(2, 8, dtype=torch.int32),
        f"{STEM}qzeros": torch.zeros(1, 1, dtype=torch.int32),
        f"{STEM}scales": torch.zeros(1, 8),
        f"{STEM}g_idx": torch.zeros(16, dtype=torch.int32),
    },
    "GPTQ or AWQ": {f"{STEM}qweight": torch.zeros(2, 8, dtype=torch.int32), f"{STEM}scales": torch.zeros(1, 8)},
    "compressed-tensors (packed)": {
        f"{STEM}weight_packed": torch.zeros(2, 8, dtype=torch.int32),
        f"{STEM}weight_scale": torch.zeros(1, 8),
        f"{STEM}weight_shape": torch.zeros(2, dtype=torch.int64),
    },
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name_and_the_rest_is_measured(kind: str, tmp_path: Path) -> None:
    plain = small_weights()
    held = view(tmp_path / "q", {name: w for name, w in plain.items() if name != q_name()} | REFUSED[kind])
    assert set(held.tensors) == set(plain) - {q_name()}
    pairing = pair_checkpoints(open_checkpoint(save_tensors(tmp_path / "plain", plain)), held)
    (skip,) = pairing.skipped
    assert skip.name == "layers.0.self_attn.q_proj"
    assert skip.reason.startswith(f"{tmp_path / 'q'}")
    assert f"quantised by {kind}: load the model with transformers, `model.dequantize()`" in skip.reason
    assert not skip.failed
    assert len(pairing.matched) == len(plain) - 1


def test_mxfp4_stacks_are_refused_under_the_stacks_name(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    blocks = {f"{name}_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8), f"{name}_scales": BYTES[:4]}
    held = view(tmp_path, small_weights() | blocks)
    assert "MXFP4" in held.refused[name]
    assert set(held.tensors) == set(small_weights())


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    held = view(tmp_path, small_weights() | {q_name(): quantised(4, 4)})
    assert held.refused[q_name()].startswith("stored as F8_E4M3 without scales")


def test_a_block_larger_than_the_weight_is_the_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Q, s = quantised(4, 8), 1 + torch.rand(1, 8, generator=torch.Generator().manual_seed(1))
    repeats: list[int] = []
    original = Tensor.repeat_interleave
    monkeypatch.setattr(Tensor, "repeat_interleave", lambda self, n, **kw: repeats.append(n) or original(self, n, **kw))
    for size in (10**8, 10**30):
        config = {"quantization_config": {"weight_block_size": [size, 1]}}
        held = view(tmp_path / str(size), {q_name(): Q, f"{q_name()}_scale_inv": s}, config)
        assert torch.equal(held.read(q_name()), Q.float() * s)
    assert max(repeats) == 4, "no more is written out than the weight has rows"


@pytest.mark.parametrize("block", [[0, 128], [-1, 4], [4.0, 4], [True, 4], [4], "128x128", {"m": 4}], ids=str)
def test_a_block_that_is_no_size_is_named(block: object, tmp_path: Path) -> None:
    weights = {q_name(): quantised(4, 8), f"{q_name()}_scale_inv": torch.ones(1, 1)}
    config = {"quantization_config": {"weight_block_size": block}}
    with pytest.raises(
        CheckpointError, match=r"config\.json: weight_block_size .* is not two whole numbers above zero"
    ):
        view(tmp_path, weights, config)
    assert view(tmp_path / "plain", small_weights(), config).refused == {}
