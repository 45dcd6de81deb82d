"""Each known failure is said once, with its figure and remedy, from the logs TRL really writes."""

import logging
from types import SimpleNamespace

import pytest

from geopd.problems import character_tokenizer
from geopd.training import ScoreWeightedTrainer
from geopd.training.health import TrainingHealth
from geopd.training.objective import Objective
from tiny_on_policy import make

ARGS = SimpleNamespace(max_completion_length=64)


def run(health, rows, *, main=True):
    """The callback sees each row as Trainer.log shows it: appended to the history first."""
    state = SimpleNamespace(is_world_process_zero=main, log_history=[], global_step=0)
    for row in rows:
        state.global_step += 10
        state.log_history.append({**row, "step": state.global_step})
        health.on_log(ARGS, state, None, logs=row)


def lengths(*values):
    return [{"completions/mean_length": value} for value in values]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="geopd.training.health")
    return lambda: [record.getMessage() for record in caplog.records]


def test_growing_completions_are_said_once_at_the_first_crossing(said):
    run(TrainingHealth(window=2), lengths(10, 10, 15, 20, 24, 30, 60, 100))
    (message,) = said()
    assert message.startswith("step 50: completions have grown from 10.0 to 22.0 tokens")
    assert "lower the learning rate" in message


@pytest.mark.parametrize(
    "values",
    [(10, 10, 30), (10, 10, 15, 19.9), (10, 40, 30, 39, 39), (60, 40, 20, 10)],
    ids=["too_few", "below_the_factor", "no_longer_growing", "shrinking"],
)
def test_lengths_that_are_not_running_away_are_not_said(values, said):
    run(TrainingHealth(window=2), lengths(*values))
    assert said() == []


def test_a_resumed_run_remembers_how_long_completions_were(said):
    health, rows = TrainingHealth(window=2), lengths(10, 10, 20)
    history = [*rows, {"completions/mean_length": 30.0}]
    state = SimpleNamespace(is_world_process_zero=True, log_history=history, global_step=40)
    health.on_log(ARGS, state, None, logs=history[-1])
    assert "from 10.0 to 25.0" in said()[0]


def test_mostly_truncated_completions_are_said_with_the_limit(said):
    run(TrainingHealth(), [{"completions/clipped_ratio": value} for value in (0.5, 0.62, 0.9)])
    (message,) = said()
    assert message.startswith("step 20: 62% of completions were cut off at max_completion_length=64: raise it")


def test_sampler_and_trainer_that_disagree_are_said_in_nats(said):
    rows = [{"sampling/sampling_logp_difference/mean": value} for value in (0.02, 0.1, 0.256, 0.3)]
    run(TrainingHealth(), rows)
    (message,) = said()
    assert message.startswith("step 30: sampler and trainer differ by 0.256 nats a sampled token")
    assert "vllm_importance_sampling_correction" in message


@pytest.mark.parametrize(
    ("vllm", "correction", "main", "messages"),
    [(True, False, True, 1), (True, True, True, 0), (False, False, True, 0), (True, False, False, 0)],
)
def test_a_mismatch_that_is_not_measured_is_said_when_training_begins(vllm, correction, main, messages, said):
    args = SimpleNamespace(use_vllm=vllm, vllm_importance_sampling_correction=correction)
    TrainingHealth().on_train_begin(args, SimpleNamespace(is_world_process_zero=main), None)
    assert len(said()) == messages
    for message in said():
        assert "is not measured; turn it on" in message
        assert "sampling/sampling_logp_difference/mean" in message


def test_every_failure_is_said_by_itself_and_only_on_the_main_process(said):
    row = {"completions/clipped_ratio": 1.0, "sampling/sampling_logp_difference/mean": 1.0}
    run(TrainingHealth(), [row, row], main=False)
    assert said() == []
    run(TrainingHealth(), [row, row])
    assert len(said()) == 2


def test_figures_that_are_missing_or_of_an_evaluation_are_passed_over(said):
    rows = [{"completions/clipped_ratio": None}, {"eval_completions/clipped_ratio": 1.0}, {"train_runtime": 1.0}]
    run(TrainingHealth(), rows)
    assert said() == []


def equal(*shares, reward=0.0):
    return [{"frac_reward_zero_std": share, "reward": reward} for share in shares]


def test_rewards_that_are_equal_for_every_prompt_are_said_once_after_the_window(said):
    run(TrainingHealth(window=3, rewarded=True), equal(1.0, 0.5, 1.0, 1.0, 1.0, 1.0))
    (message,) = said()
    assert message.startswith(
        "step 50: the responses to every prompt got equal rewards in the last 3 logs (mean reward 0)"
    )
    assert "num_generations or temperature" in message


@pytest.mark.parametrize(
    ("rewarded", "shares"), [(False, (1.0,) * 6), (True, (1.0, 1.0, 0.99, 1.0, 1.0)), (True, (1.0, 1.0))]
)
def test_rewards_that_teach_or_are_not_learnt_from_are_not_said(rewarded, shares, said):
    run(TrainingHealth(window=3, rewarded=rewarded), equal(*shares))
    assert said() == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_real_run_whose_reward_is_constant_is_warned_of(tmp_path, said):
    from geopd.training import parse_config, train
    from tiny_runs import save_model, settings

    save_model(tmp_path / "student")
    (tmp_path / "constant.py").write_text("def none(completions, **_):\n    return [0.0] * len(completions)\n")
    given = settings("rlvr", tmp_path, tmp_path / "run", reward=[f"{tmp_path / 'constant.py'}:none"], logging_steps=1)
    train(parse_config("rlvr", settings=given), quiet=True)
    assert any("so the reward teaches nothing" in message for message in said())


@pytest.mark.parametrize("setting", [{"growth": 1.0}, {"truncated": 1.0}, {"mismatch": 0.0}, {"window": 0}], ids=str)
def test_thresholds_out_of_range_are_named(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        TrainingHealth(**setting)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_real_run_that_never_ends_its_responses_is_warned_of(tmp_path, said):
    """The names of the figures are TRL's own: an untrained model of 24 tokens rarely ends within 2."""
    config = {"max_completion_length": 2, "logging_steps": 1}
    trainer = make(
        ScoreWeightedTrainer,
        character_tokenizer(),
        tmp_path,
        steps=1,
        config=config,
        objective=Objective(0.0),
        callbacks=[TrainingHealth()],
    )
    trainer.train()
    assert "of completions were cut off at max_completion_length=2" in said()[0]
    logged = {key for row in trainer.state.log_history for key in row}
    assert "completions/mean_length" in logged
