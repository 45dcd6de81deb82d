"""Other people's weights are left alone, damaged files are named, and an early end can be gone on from."""

import json
import logging
import resource

import pytest
import torch
from datasets import Dataset
from test_train_resume import StopAfter

from geopd.training import load_model, load_tokenizer, plan_run, save_checkpoint
from geopd.training.config_file import help_of, parse_config
from geopd.training.run_record import settings_of
from tiny_runs import run, save_model, settings, weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ALARM = {"monitor": {"every": 3, "similarity_k": 4, "alarms": {"stable_rank": [1000.0, 2000.0], "stop": True}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", 0)
    save_model(folder / "teacher", 1)
    return folder


def plan(paradigm, models, out, **changes):
    return plan_run(parse_config(paradigm, settings=settings(paradigm, models, out, **changes)))


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def interrupted(paradigm, models, out, **changes):
    with pytest.raises(KeyboardInterrupt):
        run(paradigm, models, out, callbacks=[StopAfter(3)], resume_every=2, **changes)
    return out / "resume" / "checkpoint-2"


@pytest.mark.parametrize("start", [run, plan])
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_another_paradigm_is_refused_by_name(start, finished, models, tmp_path):
    if finished:
        run("opd", models, tmp_path, max_steps=4, resume_every=2)
    else:
        interrupted("opd", models, tmp_path, max_steps=4)
    with pytest.raises(ValueError, match="is an opd run and this call is mix: choose another output_dir"):
        start("mix", models, tmp_path, max_steps=4, resume_every=2)


@pytest.mark.parametrize("start", [run, plan])
@pytest.mark.parametrize("name", ["checkpoint-2", "checkpoint-500", "global_step_7", "resume", "model.safetensors"])
def test_weights_of_another_program_are_left_alone(name, start, models, tmp_path):
    save_model(tmp_path if name.endswith("safetensors") else tmp_path / name, 5)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"holds {name} and no run\.json, so another program wrote it: choose"):
        start("rlvr", models, tmp_path, max_steps=2, checkpoint_steps=[2])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("start", [run, plan])
@pytest.mark.parametrize(
    ("key", "folder"), [("model_name_or_path", "student"), ("teacher", "teacher"), ("origin", "teacher")]
)
def test_a_folder_that_the_run_reads_is_not_written_to(key, folder, start, models):
    before = contents(models)
    with pytest.raises(ValueError, match=f"is the folder that {key if key != 'origin' else '(teacher|origin)'} names"):
        start("opd", models, models / folder, **({"origin": str(models / folder)} if key == "origin" else {}))
    assert contents(models) == before


def test_a_checkpoint_is_not_replaced_unasked(models, tmp_path):
    model, tokenizer = load_model(models / "student"), load_tokenizer(models / "student")
    save_checkpoint(model, tokenizer, tmp_path, 1)
    with pytest.raises(ValueError, match="checkpoint-1 is there already"):
        save_checkpoint(model, tokenizer, tmp_path, 1)
    assert save_checkpoint(model, tokenizer, tmp_path, 1, replace=True).is_dir()


@pytest.mark.parametrize("name", ["model_name_or_path", "teacher"])
def test_weights_cut_short_are_named(name, models, tmp_path):
    save_model(tmp_path / "cut", 1)
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut/model\.safetensors is damaged .*copy or download it again"):
        run("opd", models, tmp_path / "run", **{name: str(tmp_path / "cut")})


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_resume_point_is_named(name, models, tmp_path):
    point = interrupted("rlvr", models, tmp_path)
    file = point / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"checkpoint-2/{name} is damaged .*remove .*checkpoint-2 to train from"):
        run("rlvr", models, tmp_path, resume_every=2)


@pytest.mark.parametrize(("every", "checkpoints", "limit"), [(0, [1], 30_000), (1, [8], 30_000), (1, [8], 130_000)])
def test_a_disk_that_is_full_is_said_and_nothing_half_written_stays(every, checkpoints, limit, models, tmp_path):
    """The kernel's own limit on the size of a file: between the weights and the optimiser's state for the last."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint-1 cannot be written \(.*make room on its disk"):
            run("rlvr", models, tmp_path, resume_every=every, checkpoint_steps=checkpoints)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.rglob("checkpoint-1"))


def test_a_dry_run_refuses_what_the_run_would(models, tmp_path, monkeypatch):
    run("rlvr", models, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"training\.learning_rate=0\.001 and this call has 0\.5"):
        plan("rlvr", models, tmp_path, max_steps=1, learning_rate=0.5)
    assert any("holds this run, ended at step 1" in note for note in plan("rlvr", models, tmp_path, max_steps=1).notes)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp on CPU"):
        plan("rlvr", models, tmp_path / "other")


@pytest.mark.parametrize("start", [run, plan])
def test_adapters_that_cannot_be_merged_are_refused_before_training(start, models, tmp_path):
    dora = {"use_peft": True, "use_dora": True, "lora_r": 4, "lora_target_modules": ["q_proj", "o_proj"]}
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.* cannot be merged"):
        start("opd", models, tmp_path / "run", **dora)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_that_an_alarm_ended_goes_on_without_it_to_the_same_bits(models, tmp_path):
    whole = run("opd", models, tmp_path / "whole", resume_every=4)
    stopped = run("opd", models, tmp_path / "stopped", resume_every=4, **ALARM)
    assert (stopped.updates, stopped.planned) == (3, 8)
    again = run("opd", models, tmp_path / "stopped", resume_every=4, **ALARM)  # still set: nothing to do
    assert (again.updates, again.planned, again.resumed_from) == (3, 8, 3)
    onward = run("opd", models, tmp_path / "stopped", resume_every=4)
    assert (onward.updates, onward.resumed_from) == (8, 3)
    one, two = weights(whole.run, 8), weights(onward.run, 8)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not (tmp_path / "stopped" / "resume").exists()


def test_a_finished_run_is_done_whatever_the_rows_become(models, tmp_path):
    """Packing makes fewer steps of the rows than they count for before it."""
    first = run("sft", models, tmp_path, packing=True, max_length=64, resume_every=0, num_train_epochs=1)
    again = run("sft", models, tmp_path, packing=True, max_length=64, resume_every=0, num_train_epochs=1)
    assert again.resumed_from == again.updates == again.planned == first.updates == first.planned


def test_a_last_checkpoint_that_is_gone_and_a_log_cut_short_are_noticed(models, tmp_path):
    import shutil

    run("rlvr", models, tmp_path, max_steps=2)
    log = tmp_path / "training_log.json"
    whole = log.read_text()
    for text in (whole[: len(whole) // 2], "[]", "{}"):
        log.write_text(text)
        with pytest.raises(ValueError, match=r"training_log\.json is not the log of a run"):
            run("rlvr", models, tmp_path, max_steps=2)
    log.write_text(whole)
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2: the run has ended .*remove .*training_log\.json"):
        run("rlvr", models, tmp_path, max_steps=2)
    log.unlink()
    assert run("rlvr", models, tmp_path, max_steps=2).updates == 2


def test_one_edited_row_among_many_is_noticed(models, tmp_path):
    config = parse_config("rlvr", settings=settings("rlvr", models, tmp_path))
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(25_000)]
    edited = [*rows]
    edited[12_347] = edited[12_347] | {"answer": "0"}

    def digest(dataset):
        return settings_of(config, dataset, 1)["rows"]["digest"]

    plain = Dataset.from_list(rows)
    assert digest(plain) != digest(Dataset.from_list(edited))
    assert digest(plain) != digest(plain.select([1, 0, *range(2, 25_000)]))
    plain.save_to_disk(tmp_path / "saved", num_shards=3)
    assert digest(plain) == digest(Dataset.load_from_disk(str(tmp_path / "saved")))


def test_edited_data_between_kill_and_resume_are_refused(models, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i:02}+01=", "answer": str(i + 1)} for i in range(90)]
    file.write_text("\n".join(map(json.dumps, rows)))
    common = {"dataset": str(file), "dataset_limit": None, "reward": ["exact"]}
    interrupted("rlvr", models, tmp_path / "run", **common)
    rows[1]["answer"] = "0"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"was begun with other data \(rows\.digest"):
        run("rlvr", models, tmp_path / "run", resume_every=2, **common)


def test_a_reward_that_the_loss_does_not_use_is_said_once(models, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="geopd.training.run")
    run("opd", models, tmp_path / "run", divergence="jsd", max_steps=1)
    said = [record.getMessage() for record in caplog.records if "is not part of the loss" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("reward [arithmetic] is not part of the loss: divergence=jsd")
    notes = plan("opd", models, tmp_path / "plan", divergence="jsd").notes
    assert any("is not part of the loss" in note for note in notes)
    assert not any("loss" in note for note in plan("opd", models, tmp_path / "plan").notes)


@pytest.mark.parametrize(
    ("paradigm", "given", "match"),
    [
        ("opd", {"teacher": None}, "^a teacher is needed: give it as `teacher`"),
        ("rlvr", {"teacher": "x"}, "'teacher' is unknown to rlvr: it belongs to opd and mix"),
        ("sft", {"alpha": 0.5}, "'alpha' is unknown to sft: it belongs to mix"),
        ("sft", {"reward": ["exact"]}, "'reward' is unknown to sft: it belongs to opd, rlvr and mix"),
        ("opd", {"max_steps": 0}, "max_steps=0: give 1 or more, or -1"),
        ("opd", {"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0.*: give more than 0"),
        ("opd", {"dry_run": True}, "'dry_run' is unknown; did you mean the flag --dry-run"),
    ],
)
def test_messages_name_what_is_meant(paradigm, given, match, models, tmp_path):
    with pytest.raises(ValueError, match=match):
        parse_config(paradigm, settings=settings(paradigm, models, tmp_path, **given))


def test_a_flag_with_an_underscore_names_the_one_with_a_dash(models, tmp_path):
    with pytest.raises(ValueError, match="--dry_run is unknown; did you mean the flag --dry-run"):
        parse_config("opd", ["--dry_run"], settings=settings("opd", models, tmp_path))


def test_a_bare_module_name_gets_the_glob_that_works(models, tmp_path):
    with pytest.raises(ValueError, match=r"for every q_proj write '\*\.q_proj'"):
        plan("opd", models, tmp_path / "run", monitor={"matrices": ["q_proj"], "similarity_k": 4})
    plan("opd", models, tmp_path / "run", monitor={"matrices": ["*.q_proj"], "similarity_k": 4})


@pytest.mark.parametrize("paradigm", ["sft", "opd", "rlvr", "mix"])
def test_help_shows_the_commands_own_flags_first(paradigm):
    text = help_of(paradigm)
    places = [
        text.index(f"\n  --{flag}")
        for flag in ("config FILE", "dry-run", "dataset ", "model_name_or_path", "learning_rate")
    ]
    assert places == sorted(places)
    assert all(f"\n  {flag}" in text for flag in ("--processes N", "--json"))
