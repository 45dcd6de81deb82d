"""What a run leaves behind, against independent readings of it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from geopd.checkpoints import checkpoint_digest, open_run
from geopd.problems import character_tokenizer, parse_prompt, verify
from geopd.training import build_model, load_model, load_tokenizer, parse_config, read_evaluations
from geopd.training.bases_of_runs import basis_of_run
from geopd.training.basis import read_basis, write_basis
from geopd.training.checkpoint_schedule import merged_weights
from geopd.training.components import load_teacher
from geopd.training.data import load_prompts
from geopd.training.leak import leak_of_checkpoint
from geopd.training.trainers import build_trainer
from tiny_runs import SHAPE, run, save_model, settings, weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EVALUATION = {"dataset": "problem:arithmetic", "split": "selection", "limit": 12, "decodings": ["greedy", "avg@2"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", 0)
    save_model(folder / "teacher", 1)
    return folder


@pytest.fixture(scope="module")
def opd(models):
    """A run beside its origin, with everything that can look on."""
    folder = models / "opd"
    watched = {"monitor": {"every": 2, "similarity_k": 4}, "evaluation": EVALUATION, "resume_every": 0}
    run("opd", models, folder, checkpoint_steps=[0, 2], max_steps=4, logging_steps=1, **watched)
    return folder


def test_a_run_says_where_it_came_from(opd, models):
    found = open_run(opd, "opd")
    assert [step for step, _ in found.checkpoints] == [0, 2, 4]
    assert (found.manifest.paradigm, found.manifest.seed) == ("opd", 3)
    assert found.manifest.origin.path == "../student"  # a neighbour: both can be moved together
    assert found.origin_path() == models / "student"
    assert found.manifest.origin.digest == checkpoint_digest(models / "student")
    kept = found.manifest.settings
    assert kept["training"]["learning_rate"] == 1e-3
    assert kept["rows"]["count"] == 12
    assert kept["versions"]["trl"]


def test_measuring_finds_the_origin(opd, tmp_path):
    from geopd.engine import MeasureOptions, measure

    options = MeasureOptions(rotation_k="p/8", principal_rank="p/8", similarity_k=(4,))
    outcome = measure("origin", [f"opd={opd}"], tmp_path / "results", options=options, quiet=True, workers=1)
    assert outcome.exit_code == 0
    assert outcome.measured > 0


def test_checkpoints_are_the_weights_of_their_steps(opd, models):
    start, first = load_file(models / "student" / "model.safetensors"), weights(opd, 0)
    assert all(torch.equal(start[key], first[key]) for key in start)
    assert not torch.equal(weights(opd, 2)["lm_head.weight"], weights(opd, 4)["lm_head.weight"])
    assert load_tokenizer(opd / "checkpoint-2")("1+2=")["input_ids"]


def test_the_log_holds_training_geometry_and_evaluations(opd):
    log = json.loads((opd / "training_log.json").read_text())
    keys = {key for row in log for key in row}
    assert {"opd/reverse_kl", "geometry/stable_rank", "evaluation/selection/greedy"} <= keys
    assert [row["step"] for row in log if "geometry/update_norm" in row] == [2, 4]


def test_evaluations_are_the_accuracies_of_the_saved_checkpoints(opd):
    """Greedy decoding again, from the checkpoint on disk, by the model's own generation, one prompt at a time."""
    rows = {(row.step, row.decoding): row for row in read_evaluations(opd)}
    assert set(rows) == {(step, decoding) for step in (0, 2, 4) for decoding in EVALUATION["decodings"]}
    prompts = load_prompts("problem:arithmetic", split="selection", limit=12)["prompt"]
    model, tokenizer = load_model(opd / "checkpoint-4"), load_tokenizer(opd / "checkpoint-4")
    scores = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=6, pad_token_id=0)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        scores.append(verify(parse_prompt(prompt), text))
    assert rows[4, "greedy"].value == pytest.approx(sum(scores) / 12)
    assert rows[4, "greedy"].n == 12


def test_watching_changes_no_weight(opd, models, tmp_path):
    run("opd", models, tmp_path, checkpoint_steps=[0, 2], max_steps=4, logging_steps=1, resume_every=0)
    for step in (2, 4):
        one, two = weights(opd, step), weights(tmp_path, step)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_adapter_is_saved_merged_and_beside(models, tmp_path):
    """Against PEFT's own merge of the adapter that lies beside the merged weights."""
    from peft import PeftModel

    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "down_proj"], "max_steps": 3}
    outcome = run("opd", models, tmp_path, **lora)
    merged, start = weights(outcome.run, 3), load_file(models / "student" / "model.safetensors")
    assert set(merged) == set(start)
    base = AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, outcome.run / "checkpoint-3" / "adapter").merge_and_unload().state_dict()
    moved = {key for key in start if not torch.equal(merged[key], start[key])}
    assert moved == {key for key in start if "q_proj" in key or "down_proj" in key}
    assert all(torch.allclose(merged[key], theirs[key], atol=1e-7) for key in merged)


def test_adapters_that_are_no_plain_lora_are_refused():
    from peft import IA3Config, LoraConfig, get_peft_model

    tokenizer = character_tokenizer()
    dora = get_peft_model(build_model(SHAPE, tokenizer, 0), LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.* cannot be merged"):
        merged_weights(dora, dora.state_dict())
    scaled = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    other = get_peft_model(build_model(SHAPE, tokenizer, 0), scaled)
    with pytest.raises(ValueError, match="cannot be merged"):
        merged_weights(other, other.state_dict())


@pytest.mark.parametrize("mode", ["adapter", "gradient"])
def test_a_locked_run_records_its_leak_and_goes_on_to_the_same_bits(mode, models, opd, tmp_path):
    from test_train_resume import StopAfter

    start = opd / "checkpoint-2"
    basis = write_basis(tmp_path / "basis.safetensors", basis_of_run("origin", str(opd), step=2, k=4))
    locked = {
        "model_name_or_path": str(start),
        "origin": str(models / "student"),
        "projection": {"basis": str(basis), "mode": mode},
        "weight_decay": 0.0,
        "resume_every": 2,
        "max_steps": 5,
    }
    whole = run("opd", models, tmp_path / "whole", **locked)
    with pytest.raises(KeyboardInterrupt):
        run("opd", models, tmp_path / "killed", callbacks=[StopAfter(5)], **locked)
    again = run("opd", models, tmp_path / "killed", **locked)
    assert again.resumed_from == 4
    one, two = weights(whole.run, 5), weights(again.run, 5)
    assert all(torch.equal(one[key], two[key]) for key in one)
    record = open_run(whole.run).manifest.settings["projection_record"]
    measured = leak_of_checkpoint(start, whole.run / "checkpoint-5", read_basis(basis)).share
    assert record["leak"] == pytest.approx(measured, rel=0.01, abs=1e-9)
    assert (record["leak"] < 1e-6) == (mode == "adapter")


def test_a_projection_needs_arms_that_compare(models, opd, tmp_path):
    basis = write_basis(tmp_path / "basis.safetensors", basis_of_run("origin", str(opd), step=2, k=4))
    with pytest.raises(ValueError, match=r"weight_decay=0\.1"):
        run("opd", models, tmp_path / "run", projection={"basis": str(basis)})


def _plain_divergence(name, student, teacher):
    """Mean over tokens of KL(student || teacher), KL(teacher || student), or their mean to the midpoint."""

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    if name == "reverse_kl":
        return kl(student, teacher).mean()
    if name == "forward_kl":
        return kl(teacher, student).mean()
    middle = torch.log((student.exp() + teacher.exp()) / 2)
    return (kl(student, middle) / 2 + kl(teacher, middle) / 2).mean()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_full_divergences_are_what_their_names_say(name, models, tmp_path):
    config = parse_config("opd", settings=settings("opd", models, tmp_path, divergence=name))
    student, teacher = load_model(models / "student"), load_model(models / "teacher")
    tokenizer, rows = load_tokenizer(models / "student"), load_prompts("problem:arithmetic", limit=4)
    trainer = build_trainer(
        config, model=load_model(models / "student"), tokenizer=tokenizer, dataset=rows, rewards=[],
        teacher=load_teacher(config), callbacks=[],
    )  # fmt: skip
    prompts = torch.tensor(tokenizer(list(rows["prompt"]))["input_ids"])
    responses = torch.tensor([[5, 6, 7], [8, 9, 10], [4, 4, 4], [11, 5, 1]])
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": responses,
        "completion_mask": torch.ones_like(responses),
    }
    loss = trainer.compute_loss(trainer.model, inputs)
    ids = torch.cat([prompts, responses], dim=1)
    with torch.no_grad():
        logps = [torch.log_softmax(model(input_ids=ids).logits[:, -4:-1], -1) for model in (student, teacher)]
    assert float(loss.detach()) == pytest.approx(float(_plain_divergence(name, *logps)), rel=1e-4)


def test_origins_elsewhere_are_absolute_and_named_ones_win(models, tmp_path):
    away = tmp_path / "a" / "b" / "run"
    outcome = run("rlvr", models, away, max_steps=1, origin=str(models / "teacher"))
    origin = open_run(outcome.run).manifest.origin
    assert origin.path == str((models / "teacher").resolve())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"load_in_4bit": True}, "load_in_4bit and load_in_8bit round"),
        ({"evaluation": {"dataset": "problem:arithmetic", "limit": 4}, "reward": None}, "no reward to judge by"),
        ({"monitor": {"evry": 2}}, "monitor: .*evry"),
        ({"monitor": {"matrices": ["*nothing*"]}}, "geometry monitor: .*select none"),
        ({"evaluation": {"dataset": "nope.jsonl"}}, r"nope\.jsonl"),
        ({"monitor": {"every": 2, "origin": "/not/here"}}, "/not/here is not on this machine"),
        ({"model_name_or_path": "/not/here"}, "no tokenizer to be had"),
    ],
)
def test_unusable_settings_stop_before_training(change, match, models, tmp_path):
    with pytest.raises(ValueError, match=match):
        run("opd", models, tmp_path / "run", **change)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_teacher_of_another_vocabulary_is_refused(models, tmp_path):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    save_model(tmp_path / "teacher", 1)
    vocabulary = dict(character_tokenizer().get_vocab())
    first, second = sorted(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    other = Tokenizer(tokenizer_models.WordLevel(vocabulary))
    other.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ours = character_tokenizer()
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token=ours.eos_token, pad_token=ours.pad_token).save_pretrained(
        tmp_path / "teacher"
    )
    with pytest.raises(ValueError, match="differ in 2 token ids"):
        run("opd", models, tmp_path / "run", teacher=str(tmp_path / "teacher"))


def test_a_served_teacher_trains_like_the_same_one_in_process(models, tmp_path):
    """Over real HTTP on loopback; the server's figures are rounded differently, so to a tolerance."""
    from model_server import ModelServer, serving

    here = run("opd", models, tmp_path / "here", max_steps=2)
    with serving(ModelServer(load_model(models / "teacher"), load_tokenizer(models / "teacher"))) as url:
        quick = {"retries": 0, "timeout": 20, "style": "prompt_logprobs"}
        served = {"teacher": None, "teacher_url": url, "teacher_server": quick}
        there = run("opd", models, tmp_path / "there", max_steps=2, **served)
    one, two = weights(here.run, 2), weights(there.run, 2)
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


def test_the_chat_template_asks_and_the_reward_sees_messages(models):
    from geopd.training.evaluation_schedule import rewarded_task

    tokenizer = load_tokenizer(models / "student")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    seen = []

    def reward(prompts, completions, answer):
        seen.append((prompts, completions, answer))
        return [1.0, None] if len(prompts) == 2 else [0.0]

    rows = [{"prompt": [{"role": "user", "content": "1+2"}], "answer": "3"}, {"prompt": "4+4=", "answer": "8"}]
    task = rewarded_task(rows, tokenizer, reward)
    assert [task.prompt(row) for row in rows] == ["1+2=", "4+4="]
    assert task.judge(rows[:1], [">3"]) == [0.0]
    assert seen[0] == ([rows[0]["prompt"]], [[{"role": "assistant", "content": ">3"}]], ["3"])
    with pytest.raises(ValueError, match="gave None"):
        task.judge(rows, [">3", ">8"])
