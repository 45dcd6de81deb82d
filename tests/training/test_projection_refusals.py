"""What cannot be confined, or would make arms incomparable, is refused by name."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import Trainer

from checkpoints_on_disk import save_model
from geopd.problems import character_tokenizer
from geopd.training.basis import Basis, write_basis
from geopd.training.language_model import ModelShape, build_model, load_model
from geopd.training.leak import leak_of_checkpoint
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
    ],
)
def test_unusable_settings_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        Projection("basis.safetensors", **settings)


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
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.* 16 x 48|made for 32 columns"):
        Projection(world / "update.safetensors").prepare(other)
    with pytest.raises(ValueError, match="not made for a weight of shape"):
        Projection(world / "update.safetensors", "gradient").prepare(other)
    projection = Projection(world / "update.safetensors")
    with pytest.raises(ValueError, match="already carries a PEFT adapter"):
        projection.prepare(projection.prepare(load_model(world / "start")))


@pytest.mark.parametrize("mode", ["adapter", "gradient"])
def test_expert_stacks_and_missing_matrices_are_refused_by_name(mode, world, tmp_path):
    model = load_model(save_model("qwen3_moe", tmp_path / "moe", dtype=torch.float32))
    V = torch.eye(32)[:, :2].contiguous()
    basis = Basis({"layers.0.mlp.experts.0.gate_proj": V}, provenance())
    write_basis(tmp_path / "experts.safetensors", basis)
    with pytest.raises(ValueError, match=r"experts.0.gate_proj: the basis names it.*geopd basis --matrices"):
        Projection(tmp_path / "experts.safetensors", mode).prepare(model)


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
