"""The string problems as training data: their rows are the package's own draws, and every paradigm trains on them."""

import pytest
import torch
from safetensors.torch import load_file

from geopd.problems import distinct_string_problems, parse_string_prompt, split_of_string, verify_string
from geopd.training import read_evaluations
from geopd.training.data import load_demonstrations, load_prompts
from tiny_runs import run, save_model, weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EVALUATION = {"dataset": "problem:strings", "split": "selection", "limit": 12, "decodings": ["greedy"]}


def test_prompts_are_the_distinct_draws_of_their_split():
    for split, wanted in ((None, "train"), ("selection", "selection"), ("held_out", "held_out")):
        rows = load_prompts("problem:strings", split=split, limit=200, seed=3)
        assert rows["prompt"][:] == [problem.prompt for problem in distinct_string_problems(wanted, 200, 3)]
        for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True):
            assert verify_string(parse_string_prompt(prompt), f">{answer}") == 1.0
        assert {split_of_string(parse_string_prompt(prompt)) for prompt in rows["prompt"]} == {wanted}


def test_all_prompts_without_a_limit_are_ten_thousand():
    assert len(set(load_prompts("problem:strings")["prompt"])) == 10_000


def test_demonstrations_slip_at_the_rate_asked_for():
    clean = load_demonstrations("problem:strings", limit=300, seed=1)
    assert [scored(row) for row in clean] == [1.0] * 300
    assert clean[:] == load_demonstrations("problem:strings", limit=300, seed=1)[:]
    slipped = load_demonstrations("problem:strings?slip=0.2", limit=1000, seed=1)
    assert slipped["prompt"][:300] == clean["prompt"][:]
    assert 150 < sum(1 - scored(row) for row in slipped) < 250


def scored(row):
    return verify_string(parse_string_prompt(row["prompt"]), row["completion"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", 0)
    save_model(folder / "teacher", 1)
    return folder


@pytest.mark.parametrize("paradigm", ["sft", "opd", "rlvr", "mix"])
def test_every_paradigm_trains_and_is_judged_on_strings(models, paradigm):
    """The reward refuses any other prompt, so a run that ends has been given questions of this domain only."""
    out, changes = models / paradigm, {"evaluation": EVALUATION | {"max_new_tokens": 8, "reward": "strings"}}
    if paradigm != "sft":
        changes |= {"reward": ["strings"]}
    if paradigm == "mix":
        changes |= {"alpha": 0.5}
    run(paradigm, models, out, dataset="problem:strings", max_steps=2, resume_every=0, **changes)
    (last,) = [row for row in read_evaluations(out) if row.step == 2]
    assert (last.benchmark, last.decoding, last.n) == ("selection", "greedy", 12)
    if paradigm in ("sft", "opd"):  # equal rewards, such as an untrained model's zeros, teach nothing
        start, end = load_file(models / "student" / "model.safetensors"), weights(out, 2)
        assert any(not torch.equal(end[name], start[name]) for name in end)
