"""What cannot be confined, or would make arms incomparable, is refused by name."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from checkpoints_on_disk import moved, save_model, save_tensors
from geopd.problems import character_tokenizer
from geopd.training.bases_of_runs import basis_of_run
from geopd.training.basis import Basis, write_basis
from geopd.training.language_model import ModelShape, build_model, load_model
from geopd.training.leak import leak_of_checkpoint
from geopd.training.named_parameters import globs_over
from geopd.training.projection import Projection
from tiny_projection import LR, SHAPE, adam, arguments, begin, make_batches, make_world, provenance, trained, trainer_of

# PEFT reads the old name of this property when it wraps a model; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("projected"))


@pytest.fixture(scope="module")
def batches():
    return make_batches()


def test_a_run_that_was_not_confined_cannot_be_resumed_inside(world, batches, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    free = Projection(world / "update.safetensors", "gradient").prepare(load_model(world / "start"))
    Trainer(model=free, args=arguments(tmp_path, **saving), train_dataset=batches).train()
    inside = trainer_of(world, batches, tmp_path, Projection(world / "update.safetensors", "gradient"), **saving)
    with pytest.raises(ValueError, match=r"cannot resume at step 2 .*it was not confined.*start a new run"):
        inside.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trained(world, batches, tmp_path / "random", Projection(world / "random.safetensors", "gradient"), **saving)
    other = trainer_of(world, batches, tmp_path, Projection(world / "update.safetensors", "gradient"), **saving)
    with pytest.raises(ValueError, match=r"cannot resume at step 2 .*it was confined to .*'mode': 'gradient'"):
        other.train(resume_from_checkpoint=str(tmp_path / "random" / "checkpoint-2"))


def test_a_run_cannot_be_resumed_from_another_start(world, batches, tmp_path):
    """The start is told by its content: at another place it is the same."""
    saving, basis = {"save_strategy": "steps", "save_steps": 2}, world / "update.safetensors"
    trained(world, batches, tmp_path, Projection(basis, "gradient", start=world / "start"), **saving)
    other = trainer_of(world, batches, tmp_path, Projection(basis, "gradient", start=world / "base"), **saving)
    with pytest.raises(ValueError, match=r"cannot resume at step 2 .*it was confined to .*'start': '[0-9a-f]{32}'"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    shutil.copytree(world / "start", tmp_path / "elsewhere")
    same = trainer_of(world, batches, tmp_path, Projection(basis, "gradient", start=tmp_path / "elsewhere"), **saving)
    same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same.state.global_step == 4


def test_a_rest_of_another_dtype_is_refused_under_fsdp(world, batches, tmp_path, monkeypatch):
    """FSDP shards what is trained in one dtype; in mixed precision Accelerate sees to it."""
    projection = Projection(world / "update.safetensors", train_rest=True)
    for dtype, precision in ((torch.bfloat16, "no"), (torch.bfloat16, "bf16"), (torch.float32, "no")):
        model = projection.prepare(load_model(world / "start").to(dtype))
        trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=batches)
        with monkeypatch.context() as patch:
            patch.setattr(trainer.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=2), raising=False)
            patch.setattr(trainer.accelerator.state, "_mixed_precision", precision)
            if (dtype, precision) != (torch.bfloat16, "no"):
                projection.attach(trainer)
                continue
            with pytest.raises(ValueError, match=r"the adapter is float32 and the rest bfloat16.*`bf16: true`"):
                projection.attach(trainer)


def test_an_optimiser_that_cannot_be_confined_is_refused(world):
    projection = Projection(world / "update.safetensors", "gradient")
    model = projection.prepare(load_model(world / "start"))
    weights = [value for value in model.parameters() if value.requires_grad]
    with pytest.raises(ValueError, match=r"SimpleNamespace takes no hooks before its step"):
        begin(projection, model, SimpleNamespace(param_groups=[]))
    with pytest.raises(ValueError, match=r"the optimiser does not hold it: build the trainer around"):
        begin(projection, model, adam(weights[1:], LR))
    with pytest.raises(ValueError, match=r"the optimiser decays weights \(weight_decay=0.1\)"):
        begin(projection, model, torch.optim.AdamW(weights, weight_decay=0.1))


def test_trainers_that_hide_the_matrices_are_refused(world, batches, tmp_path, monkeypatch):
    projection = Projection(world / "update.safetensors", "gradient")
    model = projection.prepare(load_model(world / "start"))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=batches)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=1), raising=False)
        with pytest.raises(ValueError, match=r"cannot work under FSDP 1.*fsdp_version 2"):
            projection.attach(trainer)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ValueError, match="mode 'gradient' cannot work under DeepSpeed"):
        projection.attach(trainer)


def test_a_parameter_that_no_adapter_saves_is_refused(world):
    model = load_model(world / "start")
    model.model.layers[0].register_parameter("gain", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"train_rest: model.layers.0.gain is not the weight of a module of its own"):
        Projection(world / "update.safetensors", train_rest=True).prepare(model)


def test_checkpoints_that_do_not_belong_together_have_no_leak(world, tmp_path):
    basis = Projection(world / "update.safetensors").read
    save_file({"lm_head.weight": torch.zeros(24, 32)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"head.safetensors: no matrix layers.0.*`start`"):
        leak_of_checkpoint(tmp_path / "head.safetensors", world / "start", basis)
    narrow = {f"model.{name}.weight": torch.zeros(2, V.shape[0]) for name, V in basis.vectors.items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"is 2 x \d+ there and \d+ x \d+ now"):
        leak_of_checkpoint(tmp_path / "narrow.safetensors", world / "start", basis)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "exact"}, "mode 'exact' is unknown: use one of adapter, gradient, mask"),
        ({"lr_scale": "linear"}, "lr_scale 'linear' is unknown"),
        ({"mode": "gradient", "lr_scale": "sqrt"}, "is for mode 'adapter'"),
        ({"leak_every": 0}, "leak_every=0"),
        ({"leak_every": "10"}, "leak_every='10': give a whole number"),
        ({"leak_every": True}, "leak_every=True: give a whole number"),
        ({"mode": ["mask"]}, r"mode \['mask'\] is unknown"),
        ({"train_rest": "false"}, "train_rest='false': give true or false"),
        ({"start": 3}, "start=3: give a path"),
    ],
)
def test_unusable_settings_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        Projection("basis.safetensors", **settings)


def test_a_basis_that_is_no_path_is_named():
    with pytest.raises(ValueError, match=r"projection basis=\['b'\]: give a path"):
        Projection(["b"])


def asked(**changed):
    given = {
        "weight_decay": 0.0,
        "deepspeed": None,
        "deepspeed_plugin": None,
        "optim": "adamw_torch",
        "adam_epsilon": 1e-8,
    }
    return SimpleNamespace(**(given | changed))


@pytest.mark.parametrize(
    ("kind", "settings", "args", "match"),
    [
        ("update", {}, {"weight_decay": 0.1}, r"weight_decay=0.1: a projection needs 0"),
        ("update", {"mode": "gradient"}, {"deepspeed": "z3.json"}, "mode 'gradient' cannot work under DeepSpeed"),
        ("update", {"lr_scale": "sqrt"}, {"deepspeed": "z3.json"}, "lr_scale 'sqrt' cannot work under DeepSpeed"),
        ("mask", {"mode": "mask"}, {"optim": "muon"}, "optim=muon.*elementwise optimiser"),
        ("mask", {"mode": "mask"}, {"adam_epsilon": 0.0}, "epsilon above 0"),
        ("mask", {"mode": "adapter"}, {}, "holds a coordinate mask, which mode 'adapter' cannot use"),
        ("update", {"mode": "mask"}, {}, "holds a subspace, which mode 'mask' cannot use"),
    ],
)
def test_arguments_that_would_break_the_comparison_are_refused(kind, settings, args, match, world):
    with pytest.raises(ValueError, match=match):
        Projection(world / f"{kind}.safetensors", **settings).check(asked(**args))


def test_an_adapter_under_deepspeed_is_fine(world):
    Projection(world / "update.safetensors").check(asked(deepspeed="z3.json"))


def test_a_model_that_does_not_fit_is_refused(world):
    other = build_model(
        ModelShape(hidden=16, layers=1, heads=2, key_value_heads=1, intermediate=48), character_tokenizer(), 0
    )
    with pytest.raises(ValueError, match=r"basis was not made for a weight of shape 48 x 16: use the basis of"):
        Projection(world / "update.safetensors").prepare(other)
    with pytest.raises(ValueError, match=r"not made for a weight of shape 48 x 16: use the basis of this model"):
        Projection(world / "update.safetensors", "gradient").prepare(other)
    projection = Projection(world / "update.safetensors")
    with pytest.raises(ValueError, match="already carries a PEFT adapter"):
        projection.prepare(projection.prepare(load_model(world / "start")))


@pytest.mark.parametrize("mode", ["adapter", "gradient"])
def test_expert_stacks_and_missing_matrices_are_refused_by_name(mode, world, tmp_path):
    """The basis of ``geopd basis`` holds every expert by default; the globs in the message make one that fits."""
    base = save_model("qwen3_moe", tmp_path / "moe", dtype=torch.float32)
    save_tensors(tmp_path / "tuned", moved(load_file(base / "model.safetensors"), 1e-3))
    write_basis(tmp_path / "default.safetensors", basis_of_run(base, tmp_path / "tuned", k=2))
    match = r"experts.0.down_proj: the basis names it and the model holds its experts in stacks such as .*--matrices"
    with pytest.raises(ValueError, match=match) as refused:
        Projection(tmp_path / "default.safetensors", mode).prepare(load_model(base))
    globs = re.findall(r"--matrices '([^']+)'", str(refused.value))
    assert ("layers.*.mlp.gate" in globs) == (mode == "gradient")  # the router is no nn.Linear
    write_basis(tmp_path / "fits.safetensors", basis_of_run(base, tmp_path / "tuned", k=2, matrices=globs))
    projection = Projection(tmp_path / "fits.safetensors", mode)
    assert len(projection.read.names) == (8 if mode == "adapter" else 10)
    assert projection.prepare(load_model(base)) is not None


@pytest.mark.parametrize("mode", ["adapter", "gradient"])
def test_matrices_that_are_fused_in_memory_are_refused_by_name(mode, tmp_path):
    """GPT-NeoX: q, k and v are one parameter, the others have canonical names on disk and in memory alike."""
    base = save_model("gpt_neox", tmp_path / "neox", dtype=torch.float32)
    save_tensors(tmp_path / "tuned", moved(load_file(base / "model.safetensors"), 1e-3))
    shutil.copy(base / "config.json", tmp_path / "tuned")
    write_basis(tmp_path / "layers.safetensors", basis_of_run(base, tmp_path / "tuned", k=2))
    match = (
        r"layers.0.self_attn.k_proj: .* inside gpt_neox.layers.0.attention.query_key_value.weight, in another layout"
    )
    with pytest.raises(ValueError, match=match) as refused:
        Projection(tmp_path / "layers.safetensors", mode).prepare(load_model(base))
    globs = re.findall(r"--matrices '([^']+)'", str(refused.value))
    assert globs == [f"layers.*.{name}" for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj")]
    write_basis(
        tmp_path / "fits.safetensors", basis_of_run(base, tmp_path / "tuned", k=2, matrices=[*globs, "lm_head"])
    )
    assert Projection(tmp_path / "fits.safetensors", mode).prepare(load_model(base)) is not None


@pytest.mark.parametrize("mode", ["adapter", "gradient"])
def test_a_basis_of_no_matrix_of_the_model_is_refused(mode, world, tmp_path):
    V = torch.eye(32)[:, :2].contiguous()
    write_basis(tmp_path / "b.safetensors", Basis({"layers.7.mlp.gate_proj": V}, provenance()))
    with pytest.raises(ValueError, match=r"has no such matrix: use a basis of this model's matrices"):
        Projection(tmp_path / "b.safetensors", mode).prepare(load_model(world / "start"))


def test_globs_stand_for_names_and_for_no_other():
    names = ["layers.0.q", "layers.11.q", "layers.0.mlp.experts.3.up", "head"]
    assert globs_over(names) == ["layers.*.q", "layers.*.mlp.experts.*.up", "head"]
    assert globs_over(names[:2], ["layers.4.q"]) == ["layers.0.q", "layers.11.q"]


def test_what_no_linear_layer_holds_is_refused_by_an_adapter(world, tmp_path):
    V = torch.eye(32)[:, :2].contiguous()
    write_basis(tmp_path / "b.safetensors", Basis({"embed_tokens": V}, provenance()))
    with pytest.raises(ValueError, match=r"embed_tokens: an adapter needs an nn.Linear.*this is Embedding"):
        Projection(tmp_path / "b.safetensors").prepare(load_model(world / "start"))


def test_a_start_that_is_not_the_models_is_refused(world, batches, tmp_path):
    basis = world / "update.safetensors"
    with pytest.raises(ValueError, match="is not the model's"):
        trained(world, batches, tmp_path, Projection(basis, "gradient", start=world / "base"))
    fresh = build_model(SHAPE, character_tokenizer(), seed=0)
    with pytest.raises(ValueError, match="give its folder as the projection's `start`"):
        trainer_of(world, batches, tmp_path, Projection(basis, "gradient"), model=fresh)


def test_a_model_that_was_not_prepared_is_refused(world, batches, tmp_path):
    trainer = Trainer(model=load_model(world / "start"), args=arguments(tmp_path), train_dataset=batches)
    with pytest.raises(ValueError, match=r"has no adapter on it; call Projection.prepare"):
        Projection(world / "update.safetensors").attach(trainer)
    with pytest.raises(ValueError, match="is trainable although the projection says otherwise"):
        Projection(world / "update.safetensors", "gradient").attach(trainer)


def test_a_used_optimiser_is_refused(world, batches, tmp_path):
    projection = Projection(world / "update.safetensors", "gradient")
    model = projection.prepare(load_model(world / "start"))
    optimiser = adam([p for p in model.parameters() if p.requires_grad], LR)
    for group in optimiser.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimiser.step()
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=batches, optimizers=(optimiser, None)
    )  # fmt: skip
    projection.attach(trainer)
    with pytest.raises(ValueError, match="carries moments from before"):
        trainer.train()
