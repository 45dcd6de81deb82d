"""Pairing says of every tensor what it is compared with, or why it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints_on_disk import moved, q_name, save_model, save_tensors, small_weights
from geopd.checkpoints import CheckpointError, open_checkpoint
from geopd.matrices import Pairing, pair_checkpoints

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def pair(tmp_path: Path, before: dict[str, Tensor], after: dict[str, Tensor], **config: object) -> Pairing:
    return pair_checkpoints(
        open_checkpoint(save_tensors(tmp_path / "before", before, config)),
        open_checkpoint(save_tensors(tmp_path / "after", after, config)),
    )


def reasons(pairing: Pairing) -> dict[str, str]:
    return {skip.name: skip.reason for skip in pairing.skipped}


def test_everything_matches_itself(tmp_path: Path) -> None:
    weights = small_weights()
    pairing = pair(tmp_path, weights, moved(weights, 1e-3))
    assert pairing.skipped == ()
    assert pairing.warnings == ()
    assert {p.origin_tensor for p in pairing.matched.values()} == set(weights)
    q = pairing.matched["layers.0.self_attn.q_proj"]
    assert (q.shape, q.origin_dtype, q.tuned_dtype, q.nbytes) == ((24, 16), "BF16", "BF16", 2 * 2 * 24 * 16)


@pytest.mark.parametrize("side", ["before", "after"])
def test_missing_on_one_side(tmp_path: Path, side: str) -> None:
    weights, fewer = small_weights(), small_weights()
    del fewer[q_name(1)]
    both = (fewer, weights) if side == "before" else (weights, fewer)
    pairing = pair(tmp_path, *both)
    assert reasons(pairing) == {"layers.1.self_attn.q_proj": f"missing in {tmp_path / side / 'model.safetensors'}"}
    assert "layers.1.self_attn.q_proj" not in pairing.matched
    assert not pairing.skipped[0].failed


def test_resized_vocabulary_is_named_as_such(tmp_path: Path) -> None:
    weights = small_weights()
    after = weights | {EMBEDDING: torch.zeros(48, 16, dtype=torch.bfloat16)}
    assert reasons(pair(tmp_path, weights, after)) == {
        "embed_tokens": "vocabulary resized from 40 to 48 rows: not compared"
    }


def test_other_shapes_are_told(tmp_path: Path) -> None:
    weights = small_weights()
    after = weights | {q_name(): torch.zeros(16, 24, dtype=torch.bfloat16)}
    assert reasons(pair(tmp_path, weights, after)) == {
        "layers.0.self_attn.q_proj": "shapes differ: 24x16 against 16x24"
    }


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    weights = small_weights()
    pairing = pair(tmp_path, weights, weights, tie_word_embeddings=True)
    assert len([w for w in pairing.warnings if "tied to the embedding" in w and "counted once" in w]) == 2
    assert "lm_head" not in pairing.matched


def test_a_tied_model_as_saved(tmp_path: Path) -> None:
    tied = open_checkpoint(save_model("llama", tmp_path / "tied", tie_word_embeddings=True))
    assert HEAD not in tied.tensors
    pairing = pair_checkpoints(tied, tied)
    assert any("tie_word_embeddings" in warning for warning in pairing.warnings)


def test_a_head_untied_during_training(tmp_path: Path) -> None:
    weights = small_weights()
    before = open_checkpoint(save_tensors(tmp_path / "b", weights, {"tie_word_embeddings": True}))
    untied = weights | {HEAD: weights[EMBEDDING].clone()}
    after = open_checkpoint(save_tensors(tmp_path / "a", untied, {"tie_word_embeddings": False}))
    (skip,) = pair_checkpoints(before, after).skipped
    assert skip.name == "lm_head"
    assert "tied to the embedding there (tie_word_embeddings)" in skip.reason


def test_what_is_no_float_matrix_is_left_out_with_its_reason(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.mlp.experts.stacked": torch.zeros(2, 3, 4),
        "model.layers.0.counts": torch.zeros(3, 3, dtype=torch.int32),
        "model.layers.0.flags": torch.zeros(3, 3, dtype=torch.bool),
        "model.scalar": torch.tensor(1.0),
        "model.nothing": torch.zeros(0),
    }
    weights = small_weights()
    assert reasons(pair(tmp_path, weights | extra, weights | extra)) == {
        "layers.0.mlp.experts.stacked": "not a matrix or vector: its shape is 2x3x4",
        "layers.0.counts": "not a float weight: stored as I32",
        "layers.0.flags": "not a float weight: stored as BOOL",
        "scalar": "not a matrix or vector: its shape is scalar",
        "nothing": "not a matrix or vector: its shape is 0",
    }


def test_mixed_precision_is_announced(tmp_path: Path) -> None:
    weights = small_weights()
    pairing = pair(tmp_path, {name: w.float() for name, w in weights.items()}, weights)
    assert len(pairing.matched) == len(weights)
    (warning,) = pairing.warnings
    assert warning.startswith(f"{len(weights)} tensors are F32 at the origin and BF16 in {tmp_path / 'after'}")


def test_wrapped_names_meet_plain_ones(tmp_path: Path) -> None:
    weights = small_weights()
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}
    pairing = pair(tmp_path, weights, wrapped)
    assert pairing.skipped == ()
    assert pairing.matched["layers.0.self_attn.q_proj"].tuned_tensor == f"module._orig_mod.{q_name()}"


def both_with_head(weights: dict[str, Tensor], head: Tensor) -> dict[str, Tensor]:
    return weights | {HEAD: head.clone()}


def test_a_head_stored_with_the_embeddings_content_is_counted_once(tmp_path: Path) -> None:
    before, after = small_weights(), moved(small_weights(), 1e-2)
    pairing = pair(tmp_path, both_with_head(before, before[EMBEDDING]), both_with_head(after, after[EMBEDDING]))
    assert reasons(pairing) == {"lm_head": "stored with the embedding's content on both sides: tied, counted once"}
    assert "embed_tokens" in pairing.matched


def test_a_head_of_another_dtype_with_the_embeddings_content_is_counted_once(tmp_path: Path) -> None:
    before, after = ({name: w.float() + i for name, w in small_weights().items()} for i in range(2))
    heads = [side[EMBEDDING].to(torch.bfloat16) for side in (before, after)]
    pairing = pair(tmp_path, both_with_head(before, heads[0]), both_with_head(after, heads[1]))
    assert reasons(pairing) == {"lm_head": "stored with the embedding's content on both sides: tied, counted once"}
    heads[1][0, 0] += 1
    apart = pair(tmp_path / "apart", both_with_head(before, heads[0]), both_with_head(after, heads[1]))
    assert "lm_head" in apart.matched


@pytest.mark.parametrize("row", [0, -1])
def test_a_head_that_differs_in_one_row_on_one_side_is_compared(tmp_path: Path, row: int) -> None:
    weights = small_weights()
    head = weights[EMBEDDING].clone()
    head[row] += 1
    pairing = pair(tmp_path, both_with_head(weights, weights[EMBEDDING]), both_with_head(weights, head))
    assert pairing.skipped == ()
    assert "lm_head" in pairing.matched


def test_identical_checkpoints_are_a_result(tmp_path: Path) -> None:
    weights = small_weights()
    pairing = pair(tmp_path, weights, weights)
    assert len(pairing.matched) == len(weights)
    assert pairing.skipped == ()


OTHER = {"h.0.mixer.in_proj.weight": torch.ones(3, 3), "h.0.mixer.out_proj.weight": torch.ones(3, 3)}
ADAPTER = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(4, 2),
}


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ({f"actor.{name}": w for name, w in small_weights().items()}, "begin with 'actor.model.', as a wrapper leaves"),
        (ADAPTER, "holds an adapter, not whole weights: name the folder with its adapter_config.json"),
        (OTHER, "two architectures, or not both of them language models"),
    ],
    ids=["wrapper", "adapter", "architecture"],
)
def test_names_that_match_nowhere_are_an_error_with_the_likely_reason(
    tmp_path: Path, after: dict[str, Tensor], reason: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        pair(tmp_path, small_weights(), after)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'after' / 'model.safetensors'}: nothing in it matches {tmp_path / 'before'}")
    assert sorted(after)[0] in text
    assert sorted(small_weights())[0] in text
    assert reason in text
    assert text.endswith("is this the run's base?")


def test_two_model_types_are_named(tmp_path: Path) -> None:
    before = open_checkpoint(save_tensors(tmp_path / "b", small_weights(), {"model_type": "llama"}))
    after = open_checkpoint(save_tensors(tmp_path / "a", OTHER, {"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"config\.json says llama and mamba: two architectures"):
        pair_checkpoints(before, after)


def test_a_damaged_fused_tensor_is_lost_under_its_canonical_names(tmp_path: Path) -> None:
    from checkpoints_on_disk import save_shards

    fused = {f"model.layers.{i}.self_attn.qkv_proj.weight": torch.ones(8, 4) for i in range(2)}
    names = sorted(fused)
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    whole = open_checkpoint(save_tensors(tmp_path / "whole", fused, config))
    path = save_shards(tmp_path / "broken", [{names[0]: fused[names[0]]}, {names[1]: fused[names[1]]}])
    (path / "config.json").write_text('{"num_attention_heads": 2, "num_key_value_heads": 1}')
    (path / "model-00002-of-00002.safetensors").unlink()
    pairing = pair_checkpoints(whole, open_checkpoint(path))
    assert set(pairing.matched) == {f"layers.0.self_attn.{what}_proj" for what in "qkv"}
    assert {skip.name for skip in pairing.skipped} == {f"layers.1.self_attn.{what}_proj" for what in "qkv"}
    assert all(skip.failed and "absent" in skip.reason and skip.pair is not None for skip in pairing.skipped)
