"""Two CPU processes (gloo) take the step of one, on the same fixed responses of unequal length."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from geopd.problems import character_tokenizer
from geopd.training import build_model
from tiny_on_policy import SHAPE, plain_logps

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def launch(script, processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command += [str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def weights_and_log(folder, objective, processes, accumulation):
    folder.mkdir()
    launch("two_process_step.py", processes, folder, json.dumps(objective), processes, accumulation)
    return load_file(folder / "end"), json.loads((folder / "log.json").read_text())


@pytest.mark.parametrize(
    ("objective", "accumulation"),
    [({"alpha": 1.0}, 2), ({"alpha": 0.3, "normalise": True, "token_selection": "random", "rho": 0.5}, 1)],
    ids=["distillation_in_two_parts_each", "normalised_mixture_of_random_tokens"],
)
def test_two_processes_take_the_step_of_one(objective, accumulation, tmp_path):
    one, log = weights_and_log(tmp_path / "one", objective, 1, 1)
    start = dict(build_model(SHAPE, character_tokenizer(), 0).named_parameters())
    assert max(float((one[name] - start[name].detach()).abs().max()) for name in one) > 1e-3
    two, other_log = weights_and_log(tmp_path / "two", objective, 2, accumulation)
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=1e-6), name
    for key in ("opd/reverse_kl", "opd/advantage_rms", "rlvr/advantage_rms", "opd/signal_share"):
        first, second = ([row[key] for row in rows if key in row] for rows in (log, other_log))
        assert first == pytest.approx(second, abs=1e-6), key


def test_a_teacher_sharded_like_its_student_scores_and_writes_as_a_whole_one(tmp_path):
    """FSDP2 over two processes, each with responses of its own and another number of tokens to write."""
    launch("sharded_teacher.py", 2, tmp_path)
    model = build_model(SHAPE, character_tokenizer(), 1)
    for rank in range(2):
        scores = load_file(tmp_path / f"scores{rank}")
        for prompt, answer, logps in zip(scores["prompts"], scores["answers"], scores["logps"], strict=True):
            assert torch.allclose(logps, plain_logps(model, prompt, answer, 0.9), atol=1e-6)
        settings = {"max_new_tokens": 2 + 4 * rank, "do_sample": False}
        whole = model.generate(scores["prompts"], attention_mask=torch.ones_like(scores["prompts"]), **settings)
        written = json.loads((tmp_path / f"written{rank}.json").read_text())
        end = model.config.eos_token_id
        assert written == [
            row[: row.index(end) + 1] if end in row else row for row in whole[:, scores["prompts"].shape[1] :].tolist()
        ]
