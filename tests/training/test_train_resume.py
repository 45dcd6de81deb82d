"""An interrupted run goes on to the weights it would have had, or is refused with what stands in the way."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from geopd.training.config_file import parse_config
from geopd.training.resume import last_resume_point, resume_interval, updates_per_rollout
from tiny_runs import run, save_model, settings, weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class StopAfter(TrainerCallback):
    """The end of the process, as far as the run is concerned: between the step and its resume point."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):  # noqa: ARG002
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", 0)
    save_model(folder / "teacher", 1)
    return folder


# 6 prompts, 2 a rollout: on-policy runs pass through several epochs, whose order one generator draws
CASES = {
    "opd": ("opd", {}),
    "rlvr with accumulation": ("rlvr", {"gradient_accumulation_steps": 2, "dataset_limit": 12}),
    "mix over several updates a rollout": ("mix", {"steps_per_generation": 2, "dataset_limit": 12}),
    "mix with two passes over a rollout": ("mix", {"num_iterations": 2}),
    "opd with random tokens": ("opd", {"token_selection": "random", "rho": 0.5}),
    "sft through two epochs": ("sft", {}),
    "full reverse KL": ("opd", {"divergence": "reverse_kl"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_at_the_same_bits(name, models, tmp_path):
    paradigm, changes = CASES[name]
    changes = {"dataset_limit": 6, "max_steps": 10, "resume_every": 2, "checkpoint_steps": [2, 9]} | changes
    whole = run(paradigm, models, tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(paradigm, models, tmp_path / "killed", callbacks=[StopAfter(9)], **changes)
    assert not (tmp_path / "killed" / "training_log.json").exists()
    again = run(paradigm, models, tmp_path / "killed", **changes)
    assert (whole.resumed_from, again.resumed_from) == (0, 8)
    for step in (2, 9, 10):
        one, two = weights(whole.run, step), weights(again.run, step)
        assert all(torch.equal(one[key], two[key]) for key in one), step
    early, late = weights(whole.run, 2), weights(whole.run, 10)
    assert not any(torch.equal(early[key], late[key]) for key in early if early[key].dim() == 2)


def test_the_last_whole_resume_point_counts(models, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("opd", models, tmp_path, callbacks=[StopAfter(5)], resume_every=2)
    training = parse_config("opd", settings=settings("opd", models, tmp_path)).training
    points = sorted(folder.name for folder in (tmp_path / "resume").iterdir())
    assert points == ["checkpoint-4"]  # one at a time: an optimiser state is twice its weights
    (tmp_path / "resume" / "checkpoint-6").mkdir()  # cut short: no trainer_state.json yet
    assert last_resume_point(tmp_path, training).name == "checkpoint-4"


def test_a_finished_run_is_left_as_it_is(models, tmp_path):
    first = run("rlvr", models, tmp_path, max_steps=2, checkpoint_steps=[1])
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = run("rlvr", models, tmp_path, max_steps=2, checkpoint_steps=[1])
    assert (again.resumed_from, again.history) == (2, first.history)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    assert not (tmp_path / "resume").exists()


def test_a_run_cut_before_its_first_resume_point_starts_over(models, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("rlvr", models, tmp_path, callbacks=[StopAfter(1)], resume_every=2, checkpoint_steps=[1])
    # other settings would leave two runs' checkpoints in one folder
    with pytest.raises(ValueError, match="remove the folder, or choose another output_dir"):
        run("rlvr", models, tmp_path, resume_every=2, checkpoint_steps=[1], learning_rate=1e-2)
    assert run("rlvr", models, tmp_path, resume_every=2, checkpoint_steps=[1]).resumed_from == 0


def test_a_run_that_an_alarm_ends_keeps_its_last_weights(models, tmp_path):
    alarms = {"stable_rank": [1000.0, 2000.0], "stop": True}
    outcome = run("opd", models, tmp_path, monitor={"every": 3, "similarity_k": 4, "alarms": alarms})
    assert outcome.updates == 3
    assert weights(tmp_path, 3)
    again = run("opd", models, tmp_path)  # the monitor decides no weight that was trained
    assert (again.resumed_from, again.updates) == (3, 8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"learning_rate": 2e-3}, r"training\.learning_rate=0\.001 and this call has 0\.002"),
        ({"alpha": 0.25}, r"signal\.alpha=its default and this call has 0\.25"),
        ({"dataset_limit": 13}, r"data\.dataset_limit=12"),
        ({"rho": 0.5, "token_selection": "random"}, r"signal\.rho=its default"),
    ],
)
def test_other_settings_are_refused_by_name(change, match, models, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("mix", models, tmp_path, callbacks=[StopAfter(3)], resume_every=2)
    with pytest.raises(ValueError, match=match):
        run("mix", models, tmp_path, resume_every=2, **change)


def test_other_data_are_refused(models, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("rlvr", models, tmp_path, callbacks=[StopAfter(3)], resume_every=2, dataset_seed=1)
    with pytest.raises(ValueError, match="dataset_seed=1 and this call has 2"):
        run("rlvr", models, tmp_path, resume_every=2, dataset_seed=2)


def test_logging_may_change_on_the_way(models, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("rlvr", models, tmp_path, callbacks=[StopAfter(3)], resume_every=2, logging_steps=1)
    assert run("rlvr", models, tmp_path, resume_every=4, logging_steps=5).resumed_from == 2


@pytest.mark.parametrize(
    ("micro", "passes", "accumulated", "updates"),
    [(1, 1, 1, 1), (4, 1, 4, 1), (8, 1, 4, 2), (2, 2, 1, 4), (152, 1, 4, 38), (256, 1, 16, 16), (3, 1, 2, 3)],
)
def test_updates_a_rollout_lasts(micro, passes, accumulated, updates):
    """By brute force: the first update whose end is also the end of a rollout."""
    counted = next(n for n in range(1, 500) if n * accumulated % (micro * passes) == 0)
    training = SimpleNamespace(
        steps_per_generation=micro, num_iterations=passes, gradient_accumulation_steps=accumulated
    )
    assert updates_per_rollout(training) == counted == updates


def test_a_resume_point_between_rollouts_is_refused_with_its_neighbours():
    training = SimpleNamespace(steps_per_generation=152, num_iterations=1, gradient_accumulation_steps=4)
    assert resume_interval(training, None) == 76
    assert resume_interval(training, 0) == 0
    with pytest.raises(ValueError, match=r"resume_every=50: a rollout lasts 38 steps here.*use 38 or 76"):
        resume_interval(training, 50)
    with pytest.raises(ValueError, match="use 38, or 0"):
        resume_interval(training, 10)


def test_a_point_between_rollouts_is_not_taken_up(tmp_path):
    point = tmp_path / "resume" / "checkpoint-40"
    point.mkdir(parents=True)
    (point / "trainer_state.json").write_text(json.dumps({}))
    training = SimpleNamespace(steps_per_generation=38, num_iterations=1, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match=r"lies between two rollouts .*nearest boundary is step 38"):
        last_resume_point(tmp_path, training)
    shutil.rmtree(point)
    assert last_resume_point(tmp_path, training) is None
