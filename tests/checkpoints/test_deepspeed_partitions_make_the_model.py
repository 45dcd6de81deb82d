"""DeepSpeed's folders: the fixtures are its own (``deepspeed_writer.py``), and so are the masters expected of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_on_disk import save_tensors
from geopd.checkpoints import CheckpointError, checkpoint_digest, holds_weights, open_checkpoint, open_run
from hostile import poisoned

GOLDEN = Path(__file__).parent / "golden"
STATES = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
STEP = "global_step2"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


@pytest.fixture(params=[1, 2, 3])
def zero(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a stage's checkpoint."""
    return shutil.copytree(GOLDEN / f"zero{request.param}", tmp_path / f"zero{request.param}")


def states(root: Path) -> dict[int, Path]:
    return {rank: next((root / STEP).glob("*" + STATES.format(rank))) for rank in (0, 1)}


def changed(file: Path, change: Any) -> None:
    """The file loaded (DeepSpeed's classes as plain numbers and None), changed and saved again."""
    from geopd.checkpoints.deepspeed_format import _ALLOWED
    from geopd.checkpoints.torch_zip import StoredTensor, TorchZip

    opened = TorchZip(file, _ALLOWED)

    def plain(value: Any) -> Any:
        match value:
            case dict():
                return {key: plain(held) for key, held in value.items()}
            case list():
                return [plain(held) for held in value]
            case StoredTensor():
                return opened.read(value).clone()
        return value if isinstance(value, int | float | str | tuple) else None

    state = plain(opened.value)
    change(state)
    torch.save(state, file)


def test_the_masters_and_their_digest_are_those_of_deepspeeds_own_conversion(zero: Path, tmp_path: Path) -> None:
    expected = load_file(zero / "masters.safetensors")
    for path in (zero, zero / STEP):
        checkpoint = open_checkpoint(path)
        assert checkpoint.format == "DeepSpeed ZeRO"
        assert (checkpoint.unreadable, checkpoint.warnings) == ({}, ())
        # the frozen weight is left out by the conversion of stage 1, and lies in the model states
        assert set(checkpoint.tensors) == set(expected) | {"frozen.weight"}
        for name, tensor in expected.items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
        assert checkpoint.tensors["first.weight"].dtype == "F32"
    held = {name: checkpoint.read(name) for name in checkpoint.tensors}
    assert checkpoint.digest() == checkpoint_digest(
        save_tensors(tmp_path / "plain", {n: t.clone() for n, t in held.items()})
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_the_model_states_alone_are_the_masters_rounded(stage: int) -> None:
    root = GOLDEN / f"zero{stage}"
    masters = open_checkpoint(root)
    weights = open_checkpoint(root / STEP / "mp_rank_00_model_states.pt")
    assert weights.format == "DeepSpeed model states"
    assert set(weights.tensors) == set(masters.tensors)
    for name in weights.tensors:
        stored = weights.read(name)
        assert torch.equal(stored, masters.read(name).to(stored.dtype))
    assert weights.tensors["first.weight"].dtype == {1: "BF16", 2: "F32"}[stage]


def test_the_model_states_of_stage_3_point_to_their_folder() -> None:
    file = GOLDEN / "zero3" / STEP / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    assert "its weights are spread over the ranks (stage 3); name its folder instead" in refusal(file)


def test_without_optimiser_states_the_weights_are_the_models(tmp_path: Path) -> None:
    root = shutil.copytree(GOLDEN / "zero1", tmp_path / "zero1")
    for file in states(root).values():
        file.unlink()
    checkpoint = open_checkpoint(root)
    assert checkpoint.tensors["first.weight"].dtype == "BF16"
    assert "no *_optim_states.pt, which hold the fp32 masters" in checkpoint.warnings[0]


def test_a_folder_of_steps_is_a_run(tmp_path: Path) -> None:
    root = shutil.copytree(GOLDEN / "zero2", tmp_path / "run")
    shutil.copytree(root / STEP, root / "global_step4")
    run = open_run(root)
    assert [step for step, _ in run.checkpoints] == [2, 4]
    assert all(holds_weights(path) for _, path in run.checkpoints)


def test_a_missing_rank_is_named(zero: Path) -> None:
    states(zero)[1].unlink()
    assert "the *_optim_states.pt of rank 1 is missing (1 of 2 ranks are)" in refusal(zero)


def test_a_stale_rank_is_told(zero: Path) -> None:
    file = states(zero)[1]
    shutil.copy(file, file.with_name(file.name.replace("rank_1", "rank_2")))
    assert "3 *_optim_states.pt for 2 ranks: remove the stale ones" in refusal(zero)


def test_a_tensor_parallel_model_is_refused(zero: Path) -> None:
    file = states(zero)[1]
    shutil.copy(file, file.with_name(file.name.replace("mp_rank_00", "mp_rank_01")))
    assert "of a tensor-parallel model, whose parts are not joined" in refusal(zero)


def test_partitions_that_do_not_fit_the_parameters_are_refused(zero: Path) -> None:
    model = sorted((zero / STEP).glob("*_model_states.pt"))[0]
    changed(model, lambda state: state["param_shapes"][0].update({"second.weight": (50, 3)}))
    assert "its parameters and the ranks' partitions do not fit" in refusal(zero)


def test_states_without_partitions_are_refused(zero: Path) -> None:
    def stripped(state: dict[str, Any]) -> None:
        for key in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
            state["optimizer_state_dict"].pop(key, None)

    changed(states(zero)[0], stripped)
    assert "the flat fp32 partitions; save the optimiser state too" in refusal(zero)


def test_an_unknown_stage_is_named(zero: Path) -> None:
    changed(states(zero)[0], lambda state: state["optimizer_state_dict"].update(zero_stage=7))
    assert "of ZeRO stage 7; stages 1, 2 and 3 are read" in refusal(zero)


def test_latest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / "latest").write_text(f"{GOLDEN / 'zero1' / STEP}")
    assert not holds_weights(root)
    (root / "latest").write_text("../golden")
    assert not holds_weights(root)


def test_a_malicious_state_is_not_run(zero: Path, tmp_path: Path) -> None:
    poisoned(states(zero)[1], tmp_path / "canary")
    assert "nothing was run" in refusal(zero)
    assert not (tmp_path / "canary").exists()


def test_twelve_ranks_are_joined_by_number(tmp_path: Path) -> None:
    """As text, rank 10 comes before rank 2."""
    ranks, frozen, trained = 12, torch.arange(48.0).view(8, 6), torch.arange(100.0, 124.0).view(4, 6)
    for rank, (kept, moved) in enumerate(
        zip(frozen.flatten().chunk(ranks), trained.flatten().chunk(ranks), strict=True)
    ):
        model = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [{"t": trained.shape}],
            "frozen_param_shapes": {"f": frozen.shape},
            "frozen_param_fragments": {"f": kept.clone()},
        }
        optimiser = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [moved.clone()]}
        torch.save(model, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": optimiser}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    found = open_checkpoint(tmp_path)
    assert torch.equal(found.read("f"), frozen)
    assert torch.equal(found.read("t"), trained)


def test_two_files_of_one_rank_are_refused(tmp_path: Path) -> None:
    torch.save({"module": {}, "param_shapes": [{"t": torch.Size([4])}]}, tmp_path / "mp_rank_00_model_states.pt")
    for prefix in ("", "bf16_"):
        state = {"zero_stage": 1, "partition_count": 1, "single_partition_of_fp32_groups": [torch.ones(4)]}
        torch.save({"optimizer_state_dict": state}, tmp_path / f"{prefix}zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=r"are of one rank: remove the stale one"):
        open_checkpoint(tmp_path)


def test_one_partition_named_many_times_is_no_large_model(tmp_path: Path) -> None:
    part = torch.ones(1 << 16)
    torch.save(
        {"module": {}, "param_shapes": [{"t": torch.Size([100, 1 << 16])}]},
        tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt",
    )
    state = {"zero_stage": 3, "partition_count": 1, "fp32_flat_groups": [part] * 100}
    torch.save({"optimizer_state_dict": state}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=r"its fp32_flat_groups claim 26,214,400 bytes of "):
        open_checkpoint(tmp_path)
