"""The adapter behind a projection: saved, merged, rounded, tied, planned, and kept frozen."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_on_policy
from checkpoints_on_disk import moved, save_model, save_tensors
from geopd.problems import character_tokenizer
from geopd.training.adapter_projection import adapted_layers, adapter_for
from geopd.training.bases_of_runs import basis_of_run
from geopd.training.basis import Basis, write_basis
from geopd.training.language_model import build_model, load_model
from geopd.training.leak import leak_of_checkpoint
from geopd.training.projection import Projection
from tiny_projection import LR, SHAPE, adam, begin, make_batches, make_world, merged_state_dict, start_of, trained

# PEFT reads the old name of this property when it wraps a model; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("projected"))


@pytest.fixture(scope="module")
def batches():
    return make_batches()


def test_a_saved_adapter_gives_the_same_logits_and_merges_to_them(world, batches, tmp_path):
    from peft import PeftModel

    projection = Projection(world / "update.safetensors", "adapter")
    model = trained(world, batches, tmp_path, projection).model.eval()
    ids = torch.stack([row["input_ids"] for row in batches[:2]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load_model(world / "start"), tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        merged = load_model(world / "start")
        merged.load_state_dict(merged_state_dict(model))
        assert torch.allclose(merged.eval()(input_ids=ids).logits, expected, atol=1e-5)
        assert torch.allclose(again.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (4, 4, False, 0.0)


def test_matrices_of_lower_rank_get_their_own_and_a_scale_of_one(world):
    full = Projection(world / "update.safetensors").read
    short = dict(full.vectors)
    short["layers.0.self_attn.q_proj"] = short["layers.0.self_attn.q_proj"][:, :3].contiguous()
    model = adapter_for(load_model(world / "start"), Basis(short, full.provenance))
    for name, layer in model.get_base_model().model.layers[0].self_attn.named_children():
        if name in ("q_proj", "k_proj"):  # three columns against four
            V = short[f"layers.0.self_attn.{name}"]
            assert torch.equal(layer.lora_A["default"].weight, V.T)
            assert layer.lora_B["default"].weight.shape[1] == V.shape[1]
            assert layer.scaling["default"] == 1.0


def test_a_bf16_model_holds_its_adapter_in_fp32_and_rounding_leaks_by_itself(world, batches, tmp_path):
    projection = Projection(world / "update.safetensors", "adapter")
    trainer = trained(world, batches, tmp_path, projection, model=load_model(world / "start").bfloat16())
    dtypes = {value.dtype for name, value in trainer.model.named_parameters() if ".lora_" in name}
    assert dtypes == {torch.float32}
    record = projection.record(trainer.model)
    assert record["leak"] < 1e-10
    assert record["base_moved"] == 0
    load_model(world / "start").bfloat16().save_pretrained(tmp_path / "start_bf16")
    rounded = {name: value.clone() for name, value in merged_state_dict(trainer.model).items()}
    assert {value.dtype for value in rounded.values()} == {torch.bfloat16}
    (tmp_path / "merged").mkdir()
    save_file(rounded, tmp_path / "merged" / "model.safetensors")
    on_disk = leak_of_checkpoint(tmp_path / "start_bf16", tmp_path / "merged", projection.read)
    assert record["leak_bf16"] == pytest.approx(on_disk.share, rel=1e-2)
    assert record["leak_bf16"] > 1e-6
    saved = projection.record(trainer.model, saved=tmp_path / "merged")
    both = leak_of_checkpoint(world / "start", tmp_path / "merged", projection.read, dtype=torch.bfloat16)
    assert saved["leak_bf16"] == both.share == pytest.approx(on_disk.share, rel=1e-12)


def test_the_leak_is_of_the_directions_the_model_holds(world):
    """A that has drifted from V leaks what the written-out projector says; the scale and B count in the energies."""
    projection = Projection(world / "update.safetensors", "adapter")
    model = projection.prepare(load_model(world / "start"))
    generator = torch.Generator().manual_seed(4)
    total = outside = 0.0
    with torch.no_grad():
        for name, layer in adapted_layers(model, projection.read).items():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            A += 0.1 * torch.randn(A.shape, generator=generator)
            B.normal_(generator=generator)
            D, V = (B.double() @ A.double()), projection.read.vectors[name].double()
            total += float((D**2).sum())
            outside += float(((D @ (torch.eye(V.shape[0]) - V @ V.T)) ** 2).sum())
    assert 0.01 < outside / total < 0.9
    assert projection.leak(model).share == pytest.approx(outside / total, rel=1e-9)


def test_merging_and_unmerging_in_place_is_noticed(world):
    projection = Projection(world / "update.safetensors", "adapter")
    model = projection.prepare(load_model(world / "start").bfloat16())
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B." in name:
                value.normal_(std=0.01)
    assert projection.base_moved(model) == 0
    model.merge_adapter()
    model.unmerge_adapter()
    assert projection.base_moved(model) > 0


def test_the_global_random_state_is_left_alone(world):
    torch.manual_seed(3)
    expected = torch.rand(3)
    model = load_model(world / "start")
    torch.manual_seed(3)
    Projection(world / "update.safetensors").prepare(model)
    assert torch.equal(torch.rand(3), expected)


def test_a_reference_adapter_does_not_set_the_directions_free(tmp_path):
    """With a KL term TRL switches to a second adapter and back, and PEFT makes every A trainable on the way."""
    from trl import GRPOTrainer

    tokenizer = character_tokenizer()
    for seed, name in enumerate(("base", "start")):
        build_model(tiny_on_policy.SHAPE, tokenizer, seed=seed).save_pretrained(tmp_path / name)
    write_basis(tmp_path / "b.safetensors", basis_of_run(tmp_path / "base", tmp_path / "start", k=2))
    projection = Projection(tmp_path / "b.safetensors")
    model = projection.prepare(load_model(tmp_path / "start"))
    trainer = tiny_on_policy.make(
        GRPOTrainer, tokenizer, tmp_path, model=model, config={"weight_decay": 0.0, "beta": 0.1}
    )
    A = {name: value for name, value in trainer.model.named_parameters() if ".lora_A.default" in name}
    projection.attach(trainer)
    trainer.train()
    before = {name: V.T for name, V in projection.read.vectors.items()}
    assert all(any(torch.equal(value, V) for V in before.values()) for value in A.values())
    assert 0 < projection.leak(trainer.model).share < 1e-10
    assert not any(value.requires_grad or value.grad is not None for value in A.values())
    with pytest.raises(ValueError, match=r"the optimiser holds its A, the frozen directions"):
        begin(projection, trainer.model, adam(trainer.model.parameters(), LR))


def test_a_model_without_storage_can_be_planned(world):
    with torch.device("meta"):
        model = build_model(SHAPE, character_tokenizer(), seed=0)
    adapted = Projection(world / "update.safetensors").prepare(model)
    trained = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    before, basis = start_of(world), Projection(world / "update.safetensors").read
    assert trained == sum(before[name].shape[0] * V.shape[1] for name, V in basis.vectors.items())


def test_biases_are_part_of_the_rest_and_are_saved(tmp_path):
    from peft import PeftModel

    base = save_model("qwen2", tmp_path / "base", dtype=torch.float32)
    save_tensors(tmp_path / "tuned", moved(load_file(base / "model.safetensors"), 1e-3))
    write_basis(tmp_path / "b.safetensors", basis_of_run(base, tmp_path / "tuned", k=2))
    model = Projection(tmp_path / "b.safetensors", train_rest=True).prepare(load_model(base))
    free = {name for name, value in model.named_parameters() if value.requires_grad}
    assert any(name.endswith("q_proj.base_layer.bias") for name in free)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in free:
                value += 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_model(base), tmp_path / "adapter")
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_tied_embedding_is_trained_and_saved_once(tmp_path):
    from peft import PeftModel

    for seed, name in enumerate(("base", "start")):
        save_model("qwen3", tmp_path / name, dtype=torch.float32, seed=seed, tie_word_embeddings=True)
    write_basis(tmp_path / "b.safetensors", basis_of_run(tmp_path / "base", tmp_path / "start", k=2))
    model = Projection(tmp_path / "b.safetensors", train_rest=True).prepare(load_model(tmp_path / "start")).eval()
    with torch.no_grad():
        for value in model.parameters():
            value += 0.01 * value.requires_grad
    assert (model.get_input_embeddings().weight - load_model(tmp_path / "start").lm_head.weight).abs().max() > 0
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_model(tmp_path / "start"), tmp_path / "adapter").eval()
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, expected)
        merged = model.merge_and_unload()
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
