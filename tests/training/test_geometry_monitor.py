"""What the monitor logs, where and when: against dense float64 decompositions of the weights it looked at."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from checkpoints_on_disk import save_model
from geopd.matrices import canonical_names
from geopd.problems import character_tokenizer, distinct_problems
from geopd.training.basis import Basis, write_basis
from geopd.training.geometry_alarms import Alarms
from geopd.training.language_model import ModelShape, build_model, load_model
from geopd.training.live_geometry import METRICS
from geopd.training.monitor import GeometryMonitor
from tiny_projection import provenance

# TRL 1.16 reads the old name of this property at every rollout; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHAPE = ModelShape(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=48)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
K = 4


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def origin(tokenizer, tmp_path_factory):
    """W0 on disk, the weights every model here starts from."""
    folder = tmp_path_factory.mktemp("origin")
    start(tokenizer).save_pretrained(folder)
    return folder


def start(tokenizer):
    return build_model(SHAPE, tokenizer, seed=0)


def texts(tokenizer, count=64):
    ids = [tokenizer(p.prompt)["input_ids"] for p in distinct_problems("train", count, 0)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def settings(folder, steps, **changed):
    return {
        "output_dir": str(folder), "max_steps": steps, "learning_rate": 1e-3, "per_device_train_batch_size": 8,
        "logging_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "seed": 3,
        "save_strategy": "no", "dataloader_pin_memory": False, **changed,
    }  # fmt: skip


def plain_trainer(tokenizer, folder, steps=4, model=None, **changed):
    args = TrainingArguments(**settings(folder, steps, **changed))
    return Trainer(model=model or start(tokenizer), args=args, train_dataset=texts(tokenizer))


def sft_trainer(tokenizer, folder, steps=4, **changed):
    extra = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    args = SFTConfig(**settings(folder, steps, activation_checkpointing=False, **extra, **changed))
    return SFTTrainer(model=start(tokenizer), args=args, train_dataset=texts(tokenizer), processing_class=tokenizer)


def reward(completions, **_):
    return [float(sum(character.isdigit() for character in text) % 2) for text in completions]


def grpo_trainer(tokenizer, folder, steps=4, **changed):
    extra = {"num_generations": 4, "max_completion_length": 4, "activation_checkpointing": False}
    prompts = [problem.prompt for problem in distinct_problems("train", 40, 0)]
    return GRPOTrainer(
        model=start(tokenizer), reward_funcs=reward, args=GRPOConfig(**settings(folder, steps, **extra, **changed)),
        train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
    )  # fmt: skip


TRAINERS = {"Trainer": plain_trainer, "SFTTrainer": sft_trainer, "GRPOTrainer": grpo_trainer}


class Report(TrainerCallback):
    """What a reporting integration is given, at the place in the list where W&B, TensorBoard and trackio stand."""

    def __init__(self):
        self.lines = []

    def on_log(self, _args, state, _control, logs=None, **_):
        self.lines.append((state.global_step, dict(logs)))

    @classmethod
    def into(cls, trainer):
        report = cls()
        trainer.callback_handler.callbacks.insert(1, report)
        return report

    def geometry(self, name):
        return {step: line[f"geometry/{name}"] for step, line in self.lines if f"geometry/{name}" in line}


class Weights(TrainerCallback):
    """A copy of the weights after every step."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, _args, state, _control, model=None, **_):
        self.at[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}


def recorded(folder):
    return [json.loads(line) for line in (folder / "geometry.jsonl").read_text().splitlines()]


def canonical(weights):
    names = canonical_names({name: tuple(W.shape) for name, W in weights.items()})
    return {names[name].name: W for name, W in weights.items()}


def dense(before, after):
    """Values and V_K of one update by LAPACK's SVD in float64."""
    dW = after.double() - before.double()
    _, sigma, Vh = torch.linalg.svd(dW, full_matrices=False)
    energy = float(sigma.square().sum())
    values = {
        "stable_rank": energy / float(sigma[0]) ** 2,
        "update_norm": energy**0.5,
        "top_energy": float(sigma[:K].square().sum()) / energy,
        "visible_share": float((after.bfloat16() != before.bfloat16()).double().mean()),
    }
    return values, Vh[:K].T


def assert_same(found, expected, rel=1e-5):
    undefined = [name for name, value in expected.items() if value is None]
    assert [name for name in expected if found[name] is None] == undefined
    kept = {name: value for name, value in expected.items() if value is not None}
    assert {name: found[name] for name in kept} == pytest.approx(kept, rel=rel)


def similarity(V, other):
    return float(torch.linalg.matrix_norm(V.T @ other) ** 2) / K


def test_every_value_is_that_of_a_dense_float64_decomposition(tokenizer, origin, tmp_path):
    generator = torch.Generator().manual_seed(5)
    trainer = plain_trainer(tokenizer, tmp_path)
    W0 = canonical({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    bases = {
        name: torch.linalg.qr(torch.randn(W.shape[1], K + 2, generator=generator)).Q.contiguous()
        for name, W in W0.items()
        if name.rsplit(".", 1)[-1] in ATTENTION
    }
    write_basis(tmp_path / "basis.safetensors", Basis(bases, provenance()))
    weights = Weights()
    trainer.add_callback(weights)
    reference = tmp_path / "basis.safetensors"
    GeometryMonitor(origin, every=2, similarity_k=K, reference=reference).attach(trainer)
    report = Report.into(trainer)
    trainer.train()

    looks, previous = recorded(tmp_path), {}
    assert [line["step"] for line in looks] == [2, 4]
    for line in looks:
        after = canonical(weights.at[line["step"]])
        assert sorted(row["name"] for row in line["matrices"]) == sorted(bases)
        expected = {}
        for row in line["matrices"]:
            values, V = dense(W0[row["name"]], after[row["name"]])
            values["similarity_reference"] = similarity(V, bases[row["name"]][:, :K].double())
            values["similarity_previous"] = similarity(V, previous[row["name"]]) if previous else None
            expected[row["name"]] = values
            assert_same(row["values"], values)
            assert row["note"] is None
        previous = {name: dense(W0[name], after[name])[1] for name in bases}
        for metric in METRICS:
            held = [values[metric] for values in expected.values() if values[metric] is not None]
            logged = report.geometry(metric)
            assert (line["step"] in logged) == bool(held)
            if held:
                assert logged[line["step"]] == pytest.approx(sum(held) / len(held), rel=1e-5)
                keys = [v[metric] for name, v in expected.items() if name.endswith("k_proj")]
                assert report.geometry(f"{metric}/k_proj")[line["step"]] == pytest.approx(sum(keys) / 2, rel=1e-5)


def test_an_origin_and_a_model_in_bf16_are_compared_as_they_are(tokenizer, tmp_path):
    model = start(tokenizer).bfloat16()
    model.save_pretrained(tmp_path / "origin")
    W0 = canonical({name: p.detach().clone() for name, p in model.named_parameters()})
    trainer = plain_trainer(tokenizer, tmp_path, steps=1, model=model, learning_rate=5e-5)
    GeometryMonitor(tmp_path / "origin", every=1, similarity_k=K).attach(trainer)
    trainer.train()
    after = canonical(dict(model.named_parameters()))
    for row in recorded(tmp_path)[0]["matrices"]:
        assert after[row["name"]].dtype == torch.bfloat16
        values, _ = dense(W0[row["name"]], after[row["name"]].detach())
        assert_same(row["values"], values)
        assert 0 < values["visible_share"] < 1


@pytest.mark.parametrize("name", TRAINERS)
def test_reporting_callbacks_see_the_values_at_the_step_of_the_look(name, tokenizer, origin, tmp_path):
    """Looks at 3 and 6, the trainer's own lines at 2, 4 and 6: one look has a line of its own, the other joins one."""
    trainer = TRAINERS[name](tokenizer, tmp_path, steps=6)
    GeometryMonitor(origin, every=3, similarity_k=K).attach(trainer)
    report = Report.into(trainer)
    trainer.train()
    norms = {line["step"]: line["means"]["update_norm"] for line in recorded(tmp_path)}
    assert sorted(norms) == [3, 6]
    assert report.geometry("update_norm") == norms
    assert {
        e["step"]: e["geometry/update_norm"] for e in trainer.state.log_history if "geometry/update_norm" in e
    } == norms
    with_both = [step for step, line in report.lines if "loss" in line and "geometry/update_norm" in line]
    assert with_both == [6]
    assert [step for step, line in report.lines if "loss" in line] == [2, 4, 6]


@pytest.mark.parametrize("name", ["SFTTrainer", "GRPOTrainer"])
def test_training_and_its_own_metrics_are_bit_equal_without_the_monitor(name, tokenizer, origin, tmp_path):
    """Sampling, dropout and data order come from the global random state, so it must be left where it was."""
    weights, lines = [], []
    for watched in (True, False):
        trainer = TRAINERS[name](tokenizer, tmp_path / str(watched), steps=4)
        trainer.model.config.attention_dropout = 0.1
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        if watched:
            GeometryMonitor(origin, every=1, similarity_k=K, matrices=["layers"]).attach(trainer)
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
        lines.append([
            {key: value for key, value in line.items() if "geometry" not in key and "time" not in key}
            for line in trainer.state.log_history if "loss" in line
        ])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2


def test_a_resumed_run_records_the_looks_of_an_uninterrupted_one(tokenizer, origin, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = plain_trainer(tokenizer, tmp_path / "whole", steps=6, **saving)
    GeometryMonitor(origin, every=2, similarity_k=K).attach(whole)
    whole.train()
    expected = recorded(tmp_path / "whole")

    parted = plain_trainer(tokenizer, tmp_path / "parted", steps=6, **saving)
    GeometryMonitor(origin, every=2, similarity_k=K).attach(parted)
    parted.train()
    file = tmp_path / "parted" / "geometry.jsonl"
    file.write_text(file.read_text() + '{"step": 8, "mea')  # a run that was killed while it wrote
    again = plain_trainer(tokenizer, tmp_path / "parted", steps=6, **saving)
    GeometryMonitor(origin, every=2, similarity_k=K).attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "parted" / "checkpoint-2"))
    found = recorded(tmp_path / "parted")
    assert [line["step"] for line in found] == [2, 4, 6]
    for line, other in zip(found, expected, strict=True):
        assert line["means"] == pytest.approx(other["means"], rel=1e-6)
    assert found[1]["means"]["similarity_previous"] > 0


def test_a_new_run_in_the_same_folder_drops_the_old_looks(tokenizer, origin, tmp_path):
    for steps in (3, 2):
        trainer = plain_trainer(tokenizer, tmp_path, steps=steps)
        GeometryMonitor(origin, every=1, similarity_k=K).attach(trainer)
        trainer.train()
    assert [line["step"] for line in recorded(tmp_path)] == [1, 2]


def test_share_of_step_time_is_logged_once(tokenizer, origin, tmp_path, caplog):
    trainer = plain_trainer(tokenizer, tmp_path, steps=8)
    GeometryMonitor(origin, every=2, similarity_k=K).attach(trainer)
    report = Report.into(trainer)
    with caplog.at_level(logging.INFO, "geopd.training.monitor"):
        trainer.train()
    shares = report.geometry("share_of_step_time")
    assert list(shares) == [4]
    assert shares[4] > 0
    assert [r.message for r in caplog.records if "of the time of 2 steps" in r.message] != []


def test_a_run_of_one_look_logs_its_cost_when_it_ends(tokenizer, origin, tmp_path):
    trainer = plain_trainer(tokenizer, tmp_path, steps=3)
    GeometryMonitor(origin, every=2, similarity_k=K).attach(trainer)
    report = Report.into(trainer)
    trainer.train()
    shares = report.geometry("share_of_step_time")
    assert list(shares) == [3]
    seconds = recorded(tmp_path)[0]["seconds"]
    assert shares[3] > 0
    assert seconds > 0


def alarmed(folder):
    return [line["alarms"] for line in recorded(folder)]


def test_bf16_weights_that_swallow_every_step_set_off_the_alarm(tokenizer, tmp_path, caplog):
    """A step of 1e-9 is far below half a bf16 spacing of weights of about 0.02: nothing moves, look after look."""
    model = start(tokenizer).bfloat16()
    with torch.no_grad():
        for value in model.parameters():
            value[value.abs() < 1e-4] = 0.01  # next to 0 the spacing is finer
    model.save_pretrained(tmp_path / "w0")
    steps = {"learning_rate": 1e-9, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    trainer = plain_trainer(tokenizer, tmp_path, steps=6, model=model, **steps)
    alarms = Alarms(invisible_below=0.01, stop=True)
    GeometryMonitor(tmp_path / "w0", every=2, similarity_k=K, alarms=alarms).attach(trainer)
    with caplog.at_level(logging.WARNING, "geopd.training.monitor"):
        trainer.train()
    assert recorded(tmp_path)[-1]["means"]["update_norm"] == 0.0
    assert [bool(found) for found in alarmed(tmp_path)] == [False, True]
    assert trainer.state.global_step == 4
    assert "no weight moved at a learning rate of 1e-09" in caplog.text


def test_a_healthy_warm_up_in_fp32_sets_off_nothing(tokenizer, origin, tmp_path):
    """From a learning rate of 0 the share is far below the limit at the first looks, and grows."""
    warm = {"learning_rate": 1e-5, "warmup_steps": 8, "lr_scheduler_type": "constant_with_warmup"}
    trainer = plain_trainer(tokenizer, tmp_path, steps=8, **warm)
    alarms = Alarms(invisible_below=0.5, stop=True)
    GeometryMonitor(origin, every=1, similarity_k=K, alarms=alarms).attach(trainer)
    trainer.train()
    looks = recorded(tmp_path)
    assert alarmed(tmp_path) == [[]] * 8
    assert [line["learning_rate"] for line in looks] == pytest.approx([1e-5 * step / 8 for step in range(8)])
    assert 0.0 == looks[0]["means"]["visible_share"] < looks[3]["means"]["visible_share"] < 0.5


def test_expert_stacks_that_are_not_watched_are_counted_once(tmp_path, caplog):
    base = save_model("qwen3_moe", tmp_path / "moe", dtype=torch.float32)
    for patterns, expected in (("layers", 1), ("attention", 0)):
        rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 8
        args = TrainingArguments(**settings(tmp_path / patterns, 2))
        trainer = Trainer(model=load_model(base), args=args, train_dataset=rows)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "geopd.training.monitor"):
            GeometryMonitor(base, every=1, similarity_k=2, matrices=patterns).attach(trainer)
            trainer.train()
        said = [r.message for r in caplog.records if "experts" in r.message]
        assert said == ["4 stacks of experts are not watched, such as layers.0.mlp.experts.down_proj"] * expected


def test_an_update_that_is_zero_or_of_low_rank_leaves_values_undefined(tokenizer, origin, tmp_path):
    trainer = plain_trainer(tokenizer, tmp_path, steps=2, learning_rate=0.0)
    GeometryMonitor(origin, every=1, similarity_k=K).attach(trainer)
    with torch.no_grad():
        trainer.model.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.5  # rank 1 < K
    trainer.train()
    rows = {row["name"]: row["values"] for row in recorded(tmp_path)[1]["matrices"]}
    rank_one = {"stable_rank": 1.0, "update_norm": 0.5, "top_energy": 1.0, "visible_share": 1 / 1024}
    assert_same(rows["layers.0.self_attn.q_proj"], dict.fromkeys(METRICS) | rank_one, rel=1e-6)
    nothing = dict.fromkeys(METRICS) | {"update_norm": 0.0, "visible_share": 0.0}
    assert rows["layers.1.self_attn.q_proj"] == nothing


def test_a_matrix_that_is_not_finite_is_named_and_left_out(tokenizer, origin, tmp_path, caplog):
    class Spoiler(TrainerCallback):
        def on_step_end(self, _args, _state, _control, model=None, **_):
            model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")

    trainer = plain_trainer(tokenizer, tmp_path, steps=1)
    trainer.add_callback(Spoiler())
    GeometryMonitor(origin, every=1, similarity_k=K).attach(trainer)
    with caplog.at_level(logging.WARNING, "geopd.training.monitor"):
        trainer.train()
    warned = [r.message for r in caplog.records if r.name == "geopd.training.monitor"]
    assert len(warned) == 1
    assert "1 of 8 matrices left out, first layers.0.self_attn.q_proj: not finite" in warned[0]
    assert recorded(tmp_path)[0]["means"]["update_norm"] > 0
    row = next(r for r in recorded(tmp_path)[0]["matrices"] if r["name"] == "layers.0.self_attn.q_proj")
    assert set(row["values"].values()) == {None}
    assert "not finite" in row["note"]


@pytest.mark.parametrize("stop", [False, True])
def test_an_alarm_warns_once_with_figures_and_stops_if_asked(stop, tokenizer, origin, tmp_path, caplog):
    trainer = plain_trainer(tokenizer, tmp_path, steps=4)
    alarms = Alarms(stable_rank=(100.0, 200.0), stop=stop)
    GeometryMonitor(origin, every=1, similarity_k=K, alarms=alarms).attach(trainer)
    with caplog.at_level(logging.WARNING, "geopd.training.monitor"):
        trainer.train()
    warned = [r.message for r in caplog.records if r.name == "geopd.training.monitor"]
    first = recorded(tmp_path)[0]
    assert len(warned) == 1
    assert f"{first['means']['stable_rank']:.4g} left the band 100 to 200" in warned[0]
    assert first["alarms"]
    assert trainer.state.global_step == (1 if stop else 4)


def test_an_alarm_raised_before_an_interruption_is_not_raised_again(tokenizer, origin, tmp_path, caplog):
    alarms = Alarms(stable_rank=(100.0, 200.0))
    for resumed in (False, True):
        caplog.clear()
        trainer = plain_trainer(tokenizer, tmp_path, steps=4, save_strategy="steps", save_steps=2)
        GeometryMonitor(origin, every=1, similarity_k=K, alarms=alarms).attach(trainer)
        with caplog.at_level(logging.WARNING, "geopd.training.monitor"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        warned = [r for r in caplog.records if r.name == "geopd.training.monitor"]
        assert len(warned) == (0 if resumed else 1)


def test_values_that_a_later_callback_keeps_from_the_log_get_their_own_line(tokenizer, origin, tmp_path):
    class Silent(TrainerCallback):
        def on_step_end(self, _args, _state, control, **_):
            control.should_log = False

    trainer = plain_trainer(tokenizer, tmp_path, steps=4)
    GeometryMonitor(origin, every=2, similarity_k=K).attach(trainer)
    trainer.add_callback(Silent())
    report = Report.into(trainer)
    trainer.train()
    assert report.geometry("update_norm") == {line["step"]: line["means"]["update_norm"] for line in recorded(tmp_path)}


def test_unusable_settings_are_refused_before_the_first_step(tokenizer, origin, tmp_path):
    def refused(message, path=origin, **options):
        trainer = plain_trainer(tokenizer, tmp_path)
        with pytest.raises(ValueError, match=message):
            GeometryMonitor(path, **{"similarity_k": K} | options).attach(trainer)

    refused("no such file or folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("name the folder that holds weights", tmp_path / "empty")
    refused("select none of the model's 16 matrices", matrices="*.qkv_proj")
    refused("similarity_k=17: choose 1 to 16, the smaller side of layers.0.self_attn.k_proj", similarity_k=17)
    wide = build_model(ModelShape(hidden=64, layers=2, heads=2, key_value_heads=1, intermediate=48), tokenizer, 0)
    wide.save_pretrained(tmp_path / "wide")
    refused("is 32x64 and the model's layers.0.self_attn.k_proj is 16x32", tmp_path / "wide")
    shallow = build_model(ModelShape(hidden=32, layers=1, heads=2, key_value_heads=1, intermediate=48), tokenizer, 0)
    shallow.save_pretrained(tmp_path / "shallow")
    refused("has no tensor for the model's layers.1.self_attn.k_proj", tmp_path / "shallow")
    with pytest.raises(ValueError, match="every=0"):
        GeometryMonitor(origin, every=0)


def test_an_unfit_reference_is_refused_before_the_first_step(tokenizer, origin, tmp_path):
    names = [f"layers.{i}.self_attn.{leaf}" for i in range(2) for leaf in ATTENTION]

    def refused(message, kind="update", **bases):
        tensors = {name: torch.eye(32)[:, :K].contiguous() for name in names} | bases
        masks = {name: torch.zeros(5, 4, dtype=torch.uint8) for name in names}
        basis = Basis({}, provenance(kind=kind, widths=dict.fromkeys(names, 32)), masks)
        write_basis(tmp_path / "b.safetensors", basis if kind == "mask" else Basis(tensors, provenance()))
        with pytest.raises(ValueError, match=message):
            GeometryMonitor(origin, similarity_k=K, reference=tmp_path / "b.safetensors").attach(
                plain_trainer(tokenizer, tmp_path)
            )

    refused("basis of layers.0.self_attn.q_proj is 32x3", **{names[0]: torch.eye(32, 3)})
    refused("basis of layers.0.self_attn.q_proj is 16x4, and 32 rows", **{names[0]: torch.eye(16, 4)})
    refused("a coordinate mask", kind="mask")
    write_basis(tmp_path / "one.safetensors", Basis({names[0]: torch.eye(32)}, provenance()))
    save_file({name: torch.eye(32) for name in names}, tmp_path / "bare.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for file, message in (
        ("one", "has no basis for layers.0.self_attn.k_proj"),
        ("bare", "reference .*bare.safetensors: safetensors, but not a basis; make one with `geopd basis"),
        ("text", "reference .*text.safetensors: not a safetensors file"),
        ("gone", "reference .*gone.safetensors: no such basis file"),
    ):
        with pytest.raises(ValueError, match=message):
            GeometryMonitor(origin, similarity_k=K, reference=tmp_path / f"{file}.safetensors").attach(
                plain_trainer(tokenizer, tmp_path)
            )


def test_a_reference_that_disappears_in_mid_run_is_no_longer_needed(tokenizer, origin, tmp_path):
    class Remover(TrainerCallback):
        def on_step_begin(self, _args, _state, _control, **_):
            (tmp_path / "b.safetensors").write_bytes(b"damaged")

    names = [f"layers.{i}.self_attn.{leaf}" for i in range(2) for leaf in ATTENTION]
    basis = Basis({name: torch.eye(32)[:, :K].contiguous() for name in names}, provenance())
    write_basis(tmp_path / "b.safetensors", basis)
    trainer = plain_trainer(tokenizer, tmp_path, steps=2)
    trainer.add_callback(Remover())
    GeometryMonitor(origin, every=1, similarity_k=K, reference=tmp_path / "b.safetensors").attach(trainer)
    trainer.train()
    for line in recorded(tmp_path):
        assert all(row["values"]["similarity_reference"] is not None for row in line["matrices"])


def test_a_monitor_is_attached_exactly_once(tokenizer, origin, tmp_path):
    trainer = plain_trainer(tokenizer, tmp_path)
    monitor = GeometryMonitor(origin, similarity_k=K).attach(trainer)
    for other in (monitor, GeometryMonitor(origin, similarity_k=K)):
        with pytest.raises(ValueError, match="attached already"):
            other.attach(trainer)
    with pytest.raises(ValueError, match="attached already"):
        monitor.attach(plain_trainer(tokenizer, tmp_path))
    loose = plain_trainer(tokenizer, tmp_path)
    loose.add_callback(GeometryMonitor(origin, similarity_k=K))
    with pytest.raises(ValueError, match="is not attached"):
        loose.train()


def test_a_damaged_record_is_named(tokenizer, origin, tmp_path):
    (tmp_path / "geometry.jsonl").write_text('{"st\n{"step": 1, "means": {}}\n')
    trainer = plain_trainer(tokenizer, tmp_path)
    GeometryMonitor(origin, similarity_k=K).attach(trainer)
    with pytest.raises(ValueError, match=r"geometry.jsonl: line 1 is not JSON"):
        trainer.train()


def test_the_documented_example_runs_as_it_stands(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "watch.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(example, "watch.md", "exec"), {})
    looks = recorded(tmp_path / "run")
    assert [line["step"] for line in looks] == [10, 20, 30]
    assert set(METRICS) - {"similarity_reference"} <= set(looks[-1]["means"])
