"""``geopd train`` as a user types it: help, refusals, dry runs, runs, and the launcher of several processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from command_line import geopd, start_geopd
from geopd.training import read_evaluations
from tiny_runs import save_model, settings, weights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, and one configuration a paradigm."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "student", 0)
    save_model(folder / "teacher", 1)
    for paradigm in ("sft", "opd", "rlvr", "mix"):
        values = settings(paradigm, folder, folder / "runs" / paradigm)
        (folder / f"{paradigm}.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_help_needs_no_configuration():
    assert "geopd train {sft,opd,rlvr,mix}" in geopd("train", "--help").out
    for paradigm, field in (("sft", "--packing"), ("opd", "--teacher_url"), ("mix", "--alpha")):
        shown = geopd("train", paradigm, "--help")
        assert (shown.code, shown.err) == (0, "")
        assert field in shown.out
    assert geopd("train").code == 2
    assert "train" in geopd("--help").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grpo"], "paradigm 'grpo' is unknown: use sft, opd, rlvr, mix"),
        (["--config", "x.yaml"], "--config comes too early"),
        (["opd", "--config"], "--config needs a value"),
        (["opd", "--config", "/not/here.yaml"], "/not/here.yaml: no such file"),
        (["opd", "--config", "{opd}", "--lerning_rate", "1"], "did you mean learning_rate?"),
        (["opd", "--config", "{opd}", "--processes", "2"], "--processes 2: give a number of devices, with --dry-run"),
        (["opd", "--config", "{opd}", "--dry-run", "--processes", "two"], "--processes two"),
        (["opd", "--config", "{opd}", "--dry-run", "--model_name_or_path", "/not/here"], "no tokenizer to be had"),
        (["sft", "--config", "{opd}"], "'max_completion_length' is unknown"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(words, said, world):
    done = geopd("train", *(word.format(opd=world / "opd.yaml") for word in words))
    assert said in done.complaint()


def test_a_dry_run_says_everything_and_touches_nothing(world):
    done = geopd(
        "train", "opd", "--config", world / "opd.yaml", "--dry-run", "--processes", 4, "--checkpoint_steps", 2, 5
    )
    assert done.code == 0
    for said in (
        "opd: sampled-token reverse KL to the teacher",
        "data         12 rows",
        "rollout      8 prompts, 16 responses of at most 6 tokens, every 1 updates",
        "updates      8 of 16 sequences on 4 devices",
        "checkpoints  at 2, 5, 8 (3)",
        "sharded",
        "dry run: nothing was trained",
    ):
        assert said in done.out, said
    assert not (world / "runs" / "opd").exists()
    plan = json.loads(geopd("train", "mix", "--config", world / "mix.yaml", "--dry-run", "--json").out)
    assert (plan["updates"], plan["rollout"]["prompts"]) == (8, 2)
    assert plan["memory"]["total"] == sum(
        plan["memory"][k] for k in ("weights", "gradients", "adam", "teacher", "activations")
    )


def test_a_run_and_the_same_command_again(world):
    command = ("train", "rlvr", "--config", world / "rlvr.yaml", "--max_steps", 3, "--json")
    first = geopd(*command)
    assert first.code == 0, first.err
    outcome = json.loads(first.out)  # nothing else is on stdout
    assert outcome == {"run": str(world / "runs" / "rlvr"), "updates": 3, "planned": 3, "resumed_from": 0}
    assert "step 3/3  " in first.err
    again = geopd(*command)
    assert json.loads(again.out)["resumed_from"] == 3
    assert "already done" in geopd(*command[:-1]).out
    other = geopd(*command, "--learning_rate", "0.5")
    assert "begun with training.learning_rate=0.001 and this call has 0.5" in other.complaint()


def test_a_run_that_an_alarm_stops_says_so_and_goes_on_without_it(world, tmp_path):
    alarms = {"stable_rank": [1000.0, 2000.0], "stop": True}
    watched = json.dumps({"every": 4, "similarity_k": 4, "alarms": alarms})
    command = ("train", "opd", "--config", world / "opd.yaml", "--output_dir", tmp_path / "run", "--logging_steps", 1)
    first = geopd(*command, "--monitor", watched)
    assert first.out.startswith(f"4 of 8 updates, stopped by an alarm -> {tmp_path / 'run'}\n")
    assert "goes on from there" in first.out
    again = geopd(*command, "--monitor", watched)
    assert again.out.startswith("4 of 8 updates already done, stopped by an alarm")
    onward = geopd(*command)
    assert "going on from step 4 of 8" in onward.err
    assert "step 5/8  " in onward.err
    assert "step 4/8  " not in onward.err
    assert onward.out.startswith(f"8 updates -> {tmp_path / 'run'}")


@pytest.mark.slow
def test_a_bar_is_for_terminals(world, tmp_path):
    """On a pseudo-terminal there is a bar, unless the outcome is asked for as JSON."""
    import pty
    import termios

    values = yaml.safe_load((world / "rlvr.yaml").read_text())
    del values["disable_tqdm"]
    (tmp_path / "rlvr.yaml").write_text(yaml.safe_dump(values))
    for words, barred in (([], True), (["--json"], False)):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 120))
        command = [sys.executable, "-m", "geopd", "train", "rlvr", "--config", str(tmp_path / "rlvr.yaml"), *words]
        command += ["--output_dir", str(tmp_path / f"run{barred}"), "--max_steps", "2"]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=theirs, text=True)
        process.communicate(timeout=120)
        os.close(theirs)
        os.set_blocking(ours, False)
        shown = os.read(ours, 1 << 16).decode()
        os.close(ours)
        assert process.returncode == 0, shown
        assert ("| 2/2 [" in shown) == barred, shown


def test_damaged_weights_and_a_full_disk_have_their_codes(world, tmp_path):
    import resource

    save_model(tmp_path / "cut", 0)
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    command = ("train", "rlvr", "--config", world / "rlvr.yaml", "--output_dir", tmp_path / "run")
    assert "model.safetensors is damaged" in geopd(*command, "--model_name_or_path", tmp_path / "cut").complaint()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        full = geopd(*command, "--max_steps", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.code == 1
    assert full.err.splitlines()[-1].startswith(f"geopd: {tmp_path / 'run' / 'checkpoint-1'} cannot be written")
    assert "Traceback" not in full.err


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(world, tmp_path):
    """SIGKILL in the middle, the same command again, and the bits of a run that nothing disturbed."""
    common = ("train", "opd", "--config", world / "opd.yaml", "--max_steps", "40", "--resume_every", "2")
    whole = start_geopd(*common, "--output_dir", str(tmp_path / "whole"))
    killed = start_geopd(*common, "--output_dir", str(tmp_path / "killed"))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "resume").glob("checkpoint-*/trainer_state.json")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "training_log.json").exists()
    again = start_geopd(*common, "--output_dir", str(tmp_path / "killed"), "--json")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["resumed_from"] > 0
    whole.communicate(timeout=120)
    assert whole.returncode == 0
    one, two = weights(tmp_path / "whole", 40), weights(tmp_path / "killed", 40)
    assert all((one[key] == two[key]).all() for key in one)


@pytest.mark.slow
def test_accelerate_launches_the_module(world):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "geopd", "train", "opd"]
    command += ["--config", str(world / "opd.yaml"), "--dry-run"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dry run: nothing was trained" in done.stdout


@pytest.mark.slow
def test_two_processes_train_one_run(world, tmp_path):
    """What accelerate launches on several devices: both train, one writes, evaluations are shared out."""
    evaluation = {"dataset": "problem:arithmetic", "split": "selection", "limit": 7, "decodings": ["greedy"]}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "geopd"),
        *("train", "rlvr", "--config", str(world / "rlvr.yaml"), "--output_dir", str(tmp_path / "two")),
        *("--max_steps", "3", "--checkpoint_steps", "1", "--evaluation", json.dumps(evaluation), "--json"),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"updates": 3') == 1
    manifest = json.loads((tmp_path / "two" / "run.json").read_text())
    assert manifest["settings"]["processes"] == 2
    assert set(weights(tmp_path / "two", 1)) == set(weights(tmp_path / "two", 3))
    rows = read_evaluations(tmp_path / "two")
    assert [(row.step, row.n) for row in rows] == [(1, 7), (3, 7)]
