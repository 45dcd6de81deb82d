"""Which weights are watched under which name, and that adapters count as if they were merged."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from checkpoints_on_disk import save_model, save_tensors
from geopd.checkpoints import open_checkpoint
from geopd.matrices import canonical_names, canonical_view
from geopd.training.basis import Basis, write_basis
from geopd.training.live_geometry import TOLERANCE, LiveGeometry
from geopd.training.live_weights import live_matrices
from tiny_projection import provenance

# PEFT 0.21 and TRL 1.16 read the old name of this property; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

K = 4


@pytest.fixture
def origin(tmp_path):
    return save_model("qwen3", tmp_path / "origin", dtype=torch.float32)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def watched(model, folder, *patterns):
    return live_matrices(model, open_checkpoint(folder), patterns or ("attention",))


def values(model, folder, *patterns, k=K):
    geometry = LiveGeometry(canonical_view(open_checkpoint(folder)), watched(model, folder, *patterns), k)
    return {row.name: row.values for row in geometry.look()}


def drawn(shape, scale, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def adapted(model, seed=1, **settings):
    """LoRA whose B is not zero, so that it moves the weights."""
    defaults = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"]}
    found = peft.get_peft_model(model, peft.LoraConfig(**defaults | settings))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.copy_(drawn(parameter.shape, 1e-3, seed))
    return found


def dense(merged, folder):
    """Values by float64 SVD of the merged model's weights against the stored ones."""
    stored = load_file(folder / "model.safetensors")
    names = canonical_names({name: tuple(W.shape) for name, W in stored.items()})
    after = dict(merged.named_parameters())
    found = {}
    for name, W0 in stored.items():
        if W0.dim() != 2 or name not in after:
            continue
        dW = after[name].detach().double() - W0.double()
        sigma = torch.linalg.svdvals(dW)
        energy = float(sigma.square().sum())
        found[names[name].name] = {
            "update_norm": energy**0.5,
            "stable_rank": energy / float(sigma[0]) ** 2 if energy else None,
            "top_energy": float(sigma[:K].square().sum()) / energy if energy else None,
            "visible_share": float((after[name].bfloat16() != W0.bfloat16()).double().mean()),
        }
    return found


def test_a_head_renamed_on_loading_is_found_in_the_origin(tmp_path):
    """GPT-NeoX: ``embed_out`` on disk, ``lm_head`` in memory."""
    folder = save_model("gpt_neox", tmp_path / "neox", dtype=torch.float32)
    model = load(folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 0.25
    (head,) = [matrix for matrix in watched(model, folder, "all") if matrix.weight.module == "head"]
    assert head.weight.name == "lm_head"
    found = values(model, folder, "all")
    assert found["lm_head"]["update_norm"] == pytest.approx(0.25)
    assert sum(row["update_norm"] for row in found.values()) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("family", "parameter", "move", "moved"),
    [
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.weight", (slice(0, 8),), "layers.1.self_attn.q_proj"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight", (slice(48, 96),), "layers.1.mlp.up_proj"),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", (slice(None), slice(0, 8)), "layers.1.mlp.up_proj"),
    ],
)
def test_fused_and_transposed_parameters_are_watched_as_canonical_matrices(family, parameter, move, moved, tmp_path):
    """A patch of one fused parameter moves the one matrix it belongs to, in that matrix's own orientation."""
    names = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16} if family == "gpt2" else {}
    settings = names | {"bos_token_id": 0, "eos_token_id": 0}
    folder = save_model(family, tmp_path / family, dtype=torch.float32, **settings)
    model = load(folder)
    patch = dict(model.named_parameters())[parameter].detach()[move]
    patch += drawn(patch.shape, 1e-2, 3)
    before = load_file(folder / "model.safetensors")
    stored = before.get(parameter, before.get(parameter.removeprefix("transformer.")))
    delta = (patch.double() - stored[move].double()).norm()
    found = values(model, folder, "layers")
    assert {name for name, row in found.items() if row["update_norm"]} == {moved}
    assert found[moved]["update_norm"] == pytest.approx(float(delta), rel=1e-6)
    tall = {matrix.weight.name: matrix.shape for matrix in watched(model, folder, "layers")}
    assert tall["layers.1.mlp.up_proj"][0] > tall["layers.1.mlp.up_proj"][1] == 32


def assert_close(found, expected, rel):
    for name, row in found.items():
        for metric, value in expected[name].items():
            assert row[metric] == (None if value is None else pytest.approx(value, rel=rel)), (name, metric)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapters_effective_weights_are_the_merged_ones(settings, origin):
    model = adapted(load(origin), **settings)
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight += 0.01
    found = values(model, origin, "attention", "lm_head")
    expected = dense(copy.deepcopy(model).merge_and_unload(), origin)
    # the merged weight is rounded to float32 at the size of W0, ours at that of the update
    assert_close(found, expected, rel=1e-3)
    assert found["layers.0.self_attn.q_proj"]["update_norm"] > 0
    assert found["layers.0.self_attn.k_proj"]["update_norm"] == 0
    assert (found["lm_head"]["update_norm"] > 0) == ("modules_to_save" in settings)
    assert "base_layer" in dict(model.named_modules())["base_model.model.model.layers.0.self_attn.q_proj"]._modules


def test_an_embedding_adapter_counts_too(origin):
    model = adapted(load(origin), target_modules=["embed_tokens", "q_proj"])
    found = values(model, origin, "embed_tokens", "*.q_proj")
    assert_close(found, dense(copy.deepcopy(model).merge_and_unload(), origin), rel=1e-3)
    assert found["embed_tokens"]["update_norm"] > 0


def test_an_adapter_merged_in_place_is_not_counted_twice(origin):
    model = adapted(load(origin))
    before = values(model, origin)
    model.merge_adapter()
    assert_close(values(model, origin), before, rel=1e-3)


def test_a_tiny_delta_keeps_its_digits_beside_a_large_weight(origin):
    """Rounded into W at float32, a delta of 1e-9 relative would be gone."""
    model = adapted(load(origin))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-8)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    A, B = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    sigma = torch.linalg.svdvals(B @ A * 1.5)
    row = values(model, origin)["layers.0.self_attn.q_proj"]
    assert row["update_norm"] == pytest.approx(float(torch.linalg.vector_norm(sigma)), rel=1e-5)
    assert row["stable_rank"] == pytest.approx(float((sigma / sigma[0]).square().sum()), rel=1e-5)


def test_beyond_an_adapters_rank_there_is_no_similarity(origin):
    model = adapted(load(origin), r=3)
    geometry = LiveGeometry(open_checkpoint(origin), watched(model, origin, "*.q_proj"), 4)
    for _ in range(2):
        assert {row.values["similarity_previous"] for row in geometry.look()} == {None}
    geometry = LiveGeometry(open_checkpoint(origin), watched(model, origin, "*.q_proj"), 3)
    geometry.look()
    assert [row.values["similarity_previous"] for row in geometry.look()] == pytest.approx([1.0, 1.0])


def test_other_adapters_are_refused_by_name(origin):
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is adapted by .*Linear, not by plain LoRA"):
        watched(adapted(load(origin), use_dora=True), origin)
    ia3 = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match="not by plain LoRA"):
        watched(peft.get_peft_model(load(origin), ia3), origin)
    tokens = adapted(load(origin), trainable_token_indices=[1])
    assert watched(tokens, origin)
    with pytest.raises(ValueError, match="embed_tokens is adapted by"):
        watched(tokens, origin, "embed_tokens")


def test_wrappers_leave_the_names_alone(origin):
    plain = [matrix.weight.name for matrix in watched(load(origin), origin, "all")]
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = load(origin)
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = model
    assert [matrix.weight.name for matrix in watched(wrapped, origin, "all")] == plain
    assert len(plain) == 2 * 7 + 2


def test_a_tied_head_is_watched_once(tmp_path):
    folder = save_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [matrix.weight.name for matrix in watched(model, folder, "all")]
    assert "embed_tokens" in names
    assert "lm_head" not in names
    with pytest.raises(ValueError, match="tied weights have one name"):
        watched(model, folder, "lm_head")


def test_a_fused_matrix_is_watched_whole_and_a_stack_not_at_all(tmp_path):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Module()])
            self.layers[0].qkv_proj = nn.Linear(8, 24, bias=False)
            self.layers[0].experts = nn.Parameter(torch.zeros(2, 8, 8))

    model = Fused()
    folder = save_tensors(tmp_path / "fused", model.state_dict())
    assert [matrix.weight.name for matrix in watched(model, folder, "layers")] == ["layers.0.qkv_proj"]
    with pytest.raises(ValueError, match="select none of the model's 1 matrices"):
        watched(model, folder, "*.experts")


def test_what_cannot_be_compared_is_named(origin, tmp_path):
    model = load(origin)
    tensors = load_file(origin / "model.safetensors")
    lacking = save_tensors(tmp_path / "lacking", {n: W for n, W in tensors.items() if "layers.1.self_attn.o" not in n})
    with pytest.raises(ValueError, match=r"has no tensor for the model's layers.1.self_attn.o_proj \(32x32\)"):
        watched(model, lacking)
    whole = {n: W.to(torch.int8) for n, W in tensors.items()}
    with pytest.raises(ValueError, match="stored as I8: pass an origin of float weights"):
        watched(model, save_tensors(tmp_path / "whole", whole))
    model.model.layers[1].self_attn.o_proj.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), False)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.o_proj is held as uint8 \(quantised\)"):
        watched(model, origin)


def test_a_damaged_shard_of_the_origin_is_named(tmp_path):
    folder = save_model("qwen3", tmp_path / "shards", dtype=torch.float32, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    model = load(folder)
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    with pytest.raises(ValueError, match=shards[1].name):
        watched(model, folder, "all")


def test_a_matrix_too_large_for_a_whole_decomposition_is_right_within_the_tolerance(tmp_path):
    """The Krylov path: 400 x 300 with a decaying spectrum, K = 2."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(400, 300, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64)).Q
    sigma = torch.arange(1, 301, dtype=torch.float64) ** -0.7
    W0 = torch.randn(400, 300, generator=generator)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(300, 400, bias=False)])
    model.layers[0].weight.data = (W0.double() + 1e-2 * (U * sigma) @ V.T).float()
    folder = save_tensors(tmp_path / "w", {"layers.0.weight": W0})
    write_basis(tmp_path / "basis.safetensors", Basis({"layers.0": V[:, :2].float().contiguous()}, provenance()))
    origin = open_checkpoint(folder)
    geometry = LiveGeometry(origin, live_matrices(model, origin, ["layers"]), 2, tmp_path / "basis.safetensors")
    (row,) = geometry.look()
    energy = float(sigma.square().sum())
    assert row.values["stable_rank"] == pytest.approx(energy, rel=TOLERANCE)
    assert row.values["top_energy"] == pytest.approx(float(sigma[:2].square().sum()) / energy, rel=TOLERANCE)
    assert row.values["similarity_reference"] == pytest.approx(1.0, abs=TOLERANCE)


def test_a_look_multiplies_in_full_precision_and_leaves_trainings_setting_alone(origin, monkeypatch):
    model = adapted(load(origin))
    inside = []
    before = torch.get_float32_matmul_precision()
    real = peft.tuners.lora.Linear.get_delta_weight

    def watched_delta(layer, name):
        inside.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return real(layer, name)

    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", watched_delta)
    try:
        torch.set_float32_matmul_precision("medium")
        values(model, origin)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(inside) == {("ieee", "ieee")}
