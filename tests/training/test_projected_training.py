"""Training inside a basis against plain-torch loops, and its leak against closed forms."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer

import tiny_on_policy
from geopd.problems import character_tokenizer
from geopd.training.bases_of_runs import basis_of_run
from geopd.training.basis import Basis, pack_mask, write_basis
from geopd.training.language_model import build_model, load_model
from geopd.training.leak import Leak, outside_energy
from geopd.training.named_parameters import named_parameters
from geopd.training.optimiser_hooks import ScaledSteps
from geopd.training.projection import Projection
from tiny_projection import (
    CLIP,
    LR,
    STEPS,
    adam,
    arguments,
    make_batches,
    make_world,
    merged_state_dict,
    plain_loop,
    provenance,
    sgd,
    start_of,
    trained,
    trainer_of,
)

# PEFT reads the old name of this property when it wraps a model; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("projected"))


@pytest.fixture(scope="module")
def batches():
    return make_batches()


def share_outside(D, V):
    """||D (I - V V^T)||^2 / ||D||^2 with the projector written out."""
    D, V = D.double(), V.double()
    rest = D @ (torch.eye(V.shape[0], dtype=torch.float64) - V @ V.T)
    return float((rest**2).sum() / (D**2).sum())


@pytest.mark.parametrize(("optim", "optimiser_of"), [("adamw_torch", adam), ("sgd", sgd)])
def test_gradient_mode_is_a_plain_loop_with_projected_gradients(optim, optimiser_of, world, batches, tmp_path):
    projection = Projection(world / "update.safetensors", "gradient")
    trainer = trained(world, batches, tmp_path, projection, optim=optim)
    basis = projection.read

    def project(name, weight):
        weight.grad = weight.grad @ basis.vectors[name] @ basis.vectors[name].T

    expected = plain_loop(world, batches, optimiser_of, project, basis.names)
    found = {name: p.parameter.detach() for name, p in named_parameters(trainer.model).items()}
    before = start_of(world)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-6), name
        assert torch.equal(weight, before[name]) == (name not in basis.names)


def test_a_leak_is_what_the_optimiser_makes_of_it(world, batches, tmp_path):
    """SGD keeps a projected gradient inside; Adam's elementwise step does not, and the log says by how much."""
    logged = {}
    for optim in ("sgd", "adamw_torch"):
        projection = Projection(world / "update.safetensors", "gradient", leak_every=2)
        trainer = trained(world, batches, tmp_path / optim, projection, optim=optim)
        rows = [row for row in trainer.state.log_history if "projection/leak" in row]
        assert [row["step"] for row in rows] == [2, 4]
        logged[optim] = rows[-1]["projection/leak"]
        before, weights = start_of(world), named_parameters(trainer.model)
        moves = {name: (weights[name].parameter.detach() - before[name]).double() for name in projection.read.names}
        shares = {name: share_outside(D, projection.read.vectors[name]) for name, D in moves.items()}
        energy = {name: float((D**2).sum()) for name, D in moves.items()}
        expected = sum(shares[name] * energy[name] for name in moves) / sum(energy.values())
        assert logged[optim] == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert rows[-1]["projection/leak_worst"] == pytest.approx(max(shares.values()), rel=1e-6, abs=1e-12)
    assert logged["sgd"] < 1e-6
    assert 0.1 < logged["adamw_torch"] < 0.9


def test_fp32_masters_of_a_bf16_model_start_from_the_rounded_weights(world, batches, tmp_path):
    """An fp32 start on disk, loaded in bf16 and trained in fp32, as FSDP's mixed precision does it."""
    projection = Projection(world / "update.safetensors", "gradient")
    model = projection.prepare(load_model(world / "start").bfloat16()).float()
    trainer = Trainer(model=model, args=arguments(tmp_path, optim="sgd"), train_dataset=batches)
    projection.attach(trainer)
    trainer.train()
    assert projection.leak(trainer.model).share < 1e-6


def test_adapter_mode_is_adam_in_the_coordinates_and_never_leaves_the_span(world, batches, tmp_path):
    projection = Projection(world / "update.safetensors", "adapter")
    trainer = trained(world, batches, tmp_path, projection)
    basis, before, merged = projection.read, start_of(world), merged_state_dict(trainer.model)
    assert set(merged) == set(load_model(world / "start").state_dict())
    expected = adam_in_coordinates(world, batches, basis)
    for name, V in basis.vectors.items():
        D = merged[f"model.{name}.weight"].double() - before[name].double()
        assert float((D**2).sum()) > 0
        assert share_outside(D, V) < 1e-6, name
        assert torch.allclose(D.float(), expected[name], atol=1e-6), name
    leak = projection.leak(trainer.model)
    assert leak.share < 1e-10
    assert trainer.state.log_history[-1]["projection/base_moved"] == 0


def adam_in_coordinates(world, batches, basis, factor=lambda _: 1.0):
    """B from zero with gradient (dL/dW) V, by hand: no adapter, the weights are rebuilt every step."""
    model = load_model(world / "start").requires_grad_(False)
    weights = {name: p.parameter for name, p in named_parameters(model).items() if name in basis.names}
    start = {name: weight.clone() for name, weight in weights.items()}
    B = {name: torch.zeros(weights[name].shape[0], V.shape[1]) for name, V in basis.vectors.items()}
    optimiser = torch.optim.AdamW(
        [{"params": [B[name]], "lr": LR * factor(V)} for name, V in basis.vectors.items()], weight_decay=0.0
    )
    for weight in weights.values():
        weight.requires_grad_(True)
    for step in range(STEPS):
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(start[name] + B[name] @ basis.vectors[name].T)
        model.zero_grad()
        ids = torch.stack([row["input_ids"] for row in batches[step * 4 : step * 4 + 4]])
        model(input_ids=ids, labels=ids).loss.backward()
        for name, V in basis.vectors.items():
            B[name].grad = weights[name].grad @ V
        torch.nn.utils.clip_grad_norm_(B.values(), CLIP)
        optimiser.step()
    return {name: b @ basis.vectors[name].T for name, b in B.items()}


def test_sqrt_scale_is_a_learning_rate_of_its_own_for_every_matrix(world, batches, tmp_path):
    projection = Projection(world / "update.safetensors", "adapter", lr_scale="sqrt")
    trainer = trained(world, batches, tmp_path, projection)
    expected = adam_in_coordinates(world, batches, projection.read, lambda V: math.sqrt(V.shape[0] / V.shape[1]))
    before, merged = start_of(world), merged_state_dict(trainer.model)
    for name in projection.read.names:
        assert torch.allclose(merged[f"model.{name}.weight"] - before[name], expected[name], atol=2e-6), name


def test_scaled_steps_are_a_larger_learning_rate():
    x, y = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    slow, fast = torch.optim.Adam([x], lr=0.01), torch.optim.Adam([y], lr=0.03)
    scaled = ScaledSteps([(x, 3.0)])
    slow.register_step_pre_hook(scaled.before)
    slow.register_step_post_hook(scaled.after)
    for _ in range(5):
        for parameter, optimiser in ((x, slow), (y, fast)):
            optimiser.zero_grad()
            (parameter.cos() ** 2).sum().backward()
            optimiser.step()
    assert torch.allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_entries_outside_a_mask_stay_still_to_the_last_bit(optim, world, batches, tmp_path):
    projection = Projection(world / "mask.safetensors", "mask")
    trainer = trained(world, batches, tmp_path, projection, optim=optim)
    basis, before, weights = projection.read, start_of(world), named_parameters(trainer.model)
    for name in basis.names:
        mask, moved = basis.mask(name), weights[name].parameter.detach() != before[name]
        assert int((~mask).sum()) > 0
        assert not bool((moved & ~mask).any()), name
        assert float(moved[mask].float().mean()) > 0.99, name
    assert projection.leak(trainer.model).share == 0.0

    def keep(name, weight):
        weight.grad = weight.grad * basis.mask(name)

    expected = plain_loop(world, batches, adam if optim == "adamw_torch" else sgd, keep, basis.names)
    for name in basis.names:
        assert torch.allclose(weights[name].parameter.detach(), expected[name], atol=1e-6), name


def test_optimiser_state_is_m_by_k(world, batches, tmp_path):
    projection = Projection(world / "update.safetensors", "adapter")
    trainer = trained(world, batches, tmp_path, projection)
    before = start_of(world)
    states = trainer.optimizer.state.values()
    entries = sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in states)
    assert entries == 2 * sum(before[name].shape[0] * V.shape[1] for name, V in projection.read.vectors.items())
    frozen = {name for name, value in trainer.model.named_parameters() if not value.requires_grad}
    assert all((".lora_B." in name) == (name not in frozen) for name, _ in trainer.model.named_parameters())


@pytest.mark.parametrize("mode", ["adapter", "gradient"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(mode, world, batches, tmp_path):
    def project():
        return Projection(world / "update.safetensors", mode, lr_scale="sqrt" if mode == "adapter" else "none")

    whole = trained(world, batches, tmp_path / "whole", project())
    saving = {"save_strategy": "steps", "save_steps": 2}
    trained(world, batches, tmp_path / "cut", project(), **saving)
    resumed = trainer_of(world, batches, tmp_path / "cut", project(), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert resumed.state.global_step == STEPS
    for (name, value), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(value, expected), name


def test_the_leak_joins_the_log_of_an_on_policy_trainer_and_clears_nothing(tmp_path):
    """GRPO's own log averages what it has buffered and forgets it: the leak must not go through there."""
    from trl import GRPOTrainer

    tokenizer = character_tokenizer()
    base = build_model(tiny_on_policy.SHAPE, tokenizer, seed=0)
    base.save_pretrained(tmp_path / "base")
    build_model(tiny_on_policy.SHAPE, tokenizer, seed=1).save_pretrained(tmp_path / "start")
    write_basis(tmp_path / "b.safetensors", basis_of_run(tmp_path / "base", tmp_path / "start", k=2))
    histories = []
    for every in (1, 100):
        projection = Projection(tmp_path / "b.safetensors", leak_every=every)
        model = projection.prepare(load_model(tmp_path / "start"))
        trainer = tiny_on_policy.make(
            GRPOTrainer, tokenizer, tmp_path, steps=4, model=model, config={"weight_decay": 0.0, "logging_steps": 2}
        )
        projection.attach(trainer)
        trainer.train()
        histories.append(trainer.state.log_history)
    often, once = ([row for row in rows if "reward" in row] for rows in histories)
    assert [row["step"] for row in histories[0] if "projection/leak" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in histories[1] if "projection/leak" in row] == [4]
    assert all(row["projection/leak"] < 1e-6 for rows in histories for row in rows if "projection/leak" in row)
    timed = ("time", "runtime", "per_second")
    same = [{k: v for k, v in row.items() if not any(t in k for t in timed)} for rows in (often, once) for row in rows]
    assert len(same) == 4
    assert same[:2] == same[2:]


def test_the_documented_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "lock.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(example, "lock.md", "exec"), {})
    (printed,) = [line for line in capsys.readouterr().out.splitlines() if "basis_digest" in line]
    record = ast.literal_eval(printed)
    assert 0 < record["leak"] < 1e-10
    assert (record["mode"], record["lr_scale"], record["base_moved"]) == ("adapter", "sqrt", 0)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("mode", ["adapter", "gradient", "mask"])
def test_the_rest_is_trained_in_every_mode_or_in_none(mode, world, batches, tmp_path):
    rest = {name for name in start_of(world) if name not in Projection(world / "update.safetensors").read.names}
    rest.discard("layers.0.mlp.up_proj")  # a matrix that is not in the basis stays as it is
    kind = "mask" if mode == "mask" else "update"
    for train_rest in (False, True):
        projection = Projection(world / f"{kind}.safetensors", mode, train_rest=train_rest)
        trainer = trained(world, batches, tmp_path / str(train_rest), projection)
        if mode == "adapter":
            after = {
                k.removeprefix("model.").removesuffix(".weight"): v for k, v in merged_state_dict(trainer.model).items()
            }
        else:
            after = {name: p.parameter.detach() for name, p in named_parameters(trainer.model).items()}
        before = start_of(world)
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert moved == {*projection.read.names, *(rest if train_rest else ())}


def test_outside_energy_by_closed_form():
    """D = a u v1^T + b u w^T with v1 in the span and w orthogonal to it leaks b^2 / (a^2 + b^2)."""
    Q = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    u = torch.linalg.qr(torch.randn(7, 1, dtype=torch.float64)).Q
    D = 3e-4 * u @ Q[:, :1].T + 1e-4 * u @ Q[:, 5:6].T
    basis = Basis({"w": Q[:, :4].float()}, provenance())
    total, outside = outside_energy(D, basis, "w").tolist()
    assert outside / total == pytest.approx(1 / 10, rel=1e-6)
    mask = torch.zeros(7, 12, dtype=torch.bool)
    mask[2, 3] = mask[6, 11] = True
    masked = Basis({}, provenance(kind="mask", widths={"w": 12}), {"w": pack_mask(mask)})
    total, outside = outside_energy(torch.ones(7, 12), masked, "w").tolist()
    assert (total, outside) == (84.0, 82.0)
    leak = Leak({"a": 4.0, "b": 0.0}, {"a": 1.0, "b": 0.0})
    assert (leak.share, leak.by_matrix, leak.worst) == (0.25, {"a": 0.25, "b": None}, ("a", 0.25))
    assert (Leak().share, Leak().worst) == (None, None)
