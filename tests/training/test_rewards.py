"""Rewards by name: what each scores, how a hanging verifier is killed, and what a bad name or function is told."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from geopd.problems import distinct_problems, distinct_string_problems
from geopd.training.killable_verifier import KillableVerifier, VerifierFault
from geopd.training.rewards import MathReward, reward_functions

OWN_VERIFIER = '''
"""A verifier whose behaviour is its input."""

import os
import time


def score(answer, response):
    if response == "hang":
        time.sleep(600)
    if response == "die":
        os._exit(3)
    if response == "raise":
        raise KeyError("no such thing")
    if response == "print":
        print("not a reply")
        os.write(1, b"nor this")
    if response == "pid":
        return os.getpid()
    if response == "fill":
        return len(bytearray(64 << 30))
    return float(answer == response)
'''


def one(name, **settings):
    return reward_functions([name], **settings)[0]


def as_messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("conversational", [False, True])
def test_exact_compares_what_stands_after_the_last_marker(conversational):
    texts = ["work Answer: 4", "Answer: 5\nno, Answer: 4 \n\nbye", "Answer: 4.0", "4", "Answer:\n4\n", "Answer: 14", ""]
    completions = as_messages(texts) if conversational else texts
    found = one("exact")(prompts=["q"] * 7, completions=completions, answer=[" 4"] * 7, trainer_state=None)
    assert found == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_exact_takes_another_marker_or_none():
    assert one("exact", answer_marker="####")(["q"], ["Answer: 3 #### 4"], answer=["4"]) == [1.0]
    assert one("exact", answer_marker="")(["q", "q"], [" 4\n", "so 4"], answer=["4", "4"]) == [1.0, 0.0]


def test_content_in_parts_and_missing_content_are_read():
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": "Answer: "}, {"type": "text", "text": "4"}]}]]
    called = [[{"role": "assistant", "content": None, "tool_calls": []}]]
    assert one("exact")(["q", "q"], [*parts, *called], answer=["4", "4"]) == [1.0, 0.0]


@pytest.mark.parametrize("name", ["exact", "math_verify"])
def test_a_missing_ground_truth_is_told(name):
    with pytest.raises(ValueError, match=f"reward '{name}' needs the column answer: load data with a ground truth"):
        one(name)(["q"], ["a"])
    with pytest.raises(ValueError, match="the answer to 'second' is None, not a text"):
        one(name)(["first", "second"], ["a", "b"], answer=["1", None])


@pytest.mark.parametrize("conversational", [False, True])
def test_arithmetic_agrees_with_python(conversational):
    problems = distinct_problems("train", 40, seed=0)
    right = [str(eval(p.prompt.rstrip("=").replace(" ", ""))) for p in problems]
    completions = [f"1>{answer}" if i % 2 else f">{answer}1" for i, answer in enumerate(right)]
    prompts = [p.prompt for p in problems]
    if conversational:
        prompts, completions = [[{"role": "user", "content": p}] for p in prompts], as_messages(completions)
    assert one("arithmetic")(prompts=prompts, completions=completions, answer=right) == [
        float(i % 2) for i in range(40)
    ]
    with pytest.raises(ValueError, match="is not an arithmetic question"):
        one("arithmetic")(["What is 2+2?"], [">4"])


@pytest.mark.parametrize("conversational", [False, True])
def test_strings_agrees_with_python(conversational):
    problems = distinct_string_problems("train", 40, seed=0)
    right = [{"c": p.digits, "r": p.digits[::-1], "s": "".join(sorted(p.digits))}[p.task] for p in problems]
    completions = [f">{answer}" if i % 2 else f">{answer}1" for i, answer in enumerate(right)]
    prompts = [p.prompt for p in problems]
    if conversational:
        prompts, completions = [[{"role": "user", "content": p}] for p in prompts], as_messages(completions)
    assert one("strings")(prompts=prompts, completions=completions, answer=right) == [float(i % 2) for i in range(40)]
    with pytest.raises(ValueError, match=r"prompt ' 12\+ 30=' is not a string question"):
        one("strings")([" 12+ 30="], [">42"])


@pytest.fixture(scope="module")
def mathematics():
    reward = MathReward(seconds=5.0)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("34", "Answer: 34", 1.0),
        ("34", r"Thus \boxed{34}.", 1.0),
        ("34", "34, or rather Answer: 35", 0.0),
        (r"\frac{1}{2}", "Answer: 0.5", 1.0),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1.0),
        (r"2\sqrt{3}", r"\boxed{2}", 0.0),
        ("x^2+1", "Answer: $1+x^2$", 1.0),
        ("$7$", "It is $7$", 1.0),
        (r"\boxed{7}", "It is 8", 0.0),
        ("34", "I do not know", 0.0),
    ],
)
def test_math_verify_compares_values_not_texts(mathematics, answer, response, expected):
    assert mathematics(["q"], [response], answer=[answer]) == [expected]
    assert mathematics(["q"], as_messages([response]), answer=[answer]) == [expected]


def test_math_verify_works_outside_the_main_thread(mathematics):
    found = []
    thread = threading.Thread(target=lambda: found.extend(mathematics(["q"] * 2, ["Answer: 2"] * 2, answer=["2", "3"])))
    thread.start()
    thread.join()
    assert found == [1.0, 0.0]


def test_a_response_that_hangs_math_verify_is_killed_counted_and_the_next_is_scored(caplog):
    """A tower of powers makes the comparison compute a number of 370 million digits."""
    reward, logged = MathReward(seconds=3.0), []
    reward(["q"], ["Answer: 2"], answer=["2"])
    first = reward._verifier._process.pid
    with caplog.at_level(logging.WARNING):
        started = time.monotonic()
        scores = reward(
            ["q"] * 3,
            ["Answer: 2", r"\boxed{9^{9^{9}}}", "Answer: 2"],
            answer=["2"] * 3,
            log_metric=lambda name, value: logged.append((name, value)),
        )
        elapsed = time.monotonic() - started
    assert scores == [1.0, 0.0, 1.0]
    assert 3.0 < elapsed < 60.0
    assert reward.faults == {"timeout": 1}
    assert logged == [("math_verify/not_judged", 1.0), ("math_verify/unparsable_answers", 0.0)]
    assert "no score after 3 s; the worker was killed" in caplog.text
    assert_reaped(first)
    second = reward._verifier._process.pid
    reward.close()
    assert_reaped(second)


def test_ground_truths_that_are_no_mathematics_are_named_once_each_and_counted_apart(mathematics, caplog):
    before, logged = mathematics.faults.copy(), []
    prompts, answers = ["first", "first", "second", "third", "third"], ["", "", "2", "$ $", "$ $"]
    with caplog.at_level(logging.WARNING):
        scores = mathematics(
            prompts, ["Answer: 2"] * 5, answer=answers, log_metric=lambda name, value: logged.append((name, value))
        )
        assert mathematics(["first"], ["Answer: 2"], answer=[""]) == [0.0]
    assert scores == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert logged == [("math_verify/not_judged", 0.0), ("math_verify/unparsable_answers", 4.0)]
    assert mathematics.faults == before
    assert mathematics.unparsable_answers == {"": 3, "$ $": 2}
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "the answer '' cannot be parsed as mathematics; every response to 'first' scores 0: mend or drop" in told[0]
    assert "the answer '$ $' cannot be parsed as mathematics; every response to 'third' scores 0" in told[1]


def test_math_verify_missing_is_told_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="run `pip install math-verify`"):
        reward_functions(["math_verify"])


def assert_reaped(pid):
    """Neither running nor a zombie: the system knows no such child."""
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_verifier.py").write_text(OWN_VERIFIER)
    monkeypatch.syspath_prepend(tmp_path)
    verifier = KillableVerifier("own_verifier:score", seconds=2.0)
    yield verifier
    verifier.close()


def test_every_way_to_fail_costs_one_item_and_leaves_no_process(own):
    pids = []
    for response, kind, message in [
        ("hang", "timeout", "no score after 2 s"),
        ("die", "ended", "the worker ended with code 3"),
        ("raise", "KeyError", "no such thing"),
        ("fill", "MemoryError", "^$"),
    ]:
        pids.append(int(own.score("", "pid")))
        with pytest.raises(VerifierFault, match=message) as fault:
            own.score("", response)
        assert fault.value.kind == kind
        assert own.score("x", "x") == 1.0
    own.close()
    assert len(set(pids)) == 3  # an item that raises does not cost the worker
    for pid in set(pids):
        assert_reaped(pid)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_died_between_two_items_costs_neither_its_score(own, how):
    pid = int(own.score("", "pid"))
    os.kill(pid, how)
    own._process.wait()
    assert own.score("x", "x") == 1.0
    assert int(own.score("", "pid")) != pid
    assert_reaped(pid)


def test_what_a_verifier_prints_is_no_reply(own):
    assert own.score("print", "print") == 1.0
    assert own.score("x", "y") == 0.0


def test_a_long_response_and_any_character_arrive_whole(own):
    text = "é\n\u2028\x00𝕏" * 100_000
    assert own.score(text, text) == 1.0


def test_a_dropped_verifier_ends_its_worker(own):
    other = KillableVerifier("own_verifier:score", seconds=1.0)
    pid = int(other.score("", "pid"))
    del other
    assert_reaped(pid)


def test_a_fork_leaves_the_parents_worker_alone(own):
    pid = int(own.score("", "pid"))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if int(own.score("", "pid")) != pid else 2
            own.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert int(own.score("", "pid")) == pid


def test_a_worker_ends_with_its_parent_even_in_the_middle_of_an_item(tmp_path):
    """Killed parents cannot clean up: the idle worker sees its input end, the busy one is ended by its own alarm."""
    (tmp_path / "own_verifier.py").write_text(OWN_VERIFIER)
    for last, longest in (("x", 20.0), ("hang", 30.0)):
        script = (
            "from geopd.training.killable_verifier import KillableVerifier, _exchange\n"
            "own = KillableVerifier('own_verifier:score', seconds=1.0)\n"
            "print(int(own.score('', 'pid')), flush=True)\n"
            f'own._process.stdin.write(b\'["", "{last}"]\\n\'); own._process.stdin.flush()\n'
            "import os, time; time.sleep(0.3); os.kill(os.getpid(), 9)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == -9, done.stderr
        pid, deadline = int(done.stdout), time.monotonic() + longest
        while running(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not running(pid)


def running(pid):
    """Whether a process that is not our child computes or waits; one that only awaits its reaper has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_verifier_that_cannot_be_started_is_told(capfd):
    broken = KillableVerifier("no_such_module:score", seconds=1.0)
    with pytest.raises(ValueError, match=r"no_such_module:score could not be started \(code 1\): its message is above"):
        broken.score("", "")
    assert "No module named 'no_such_module'" in capfd.readouterr().err
    with pytest.raises(ValueError, match="seconds=0"):
        KillableVerifier("x:y", seconds=0)


OWN_REWARD = """
from __future__ import annotations

import asyncio
from dataclasses import dataclass

CONSTANT = 3


@dataclass
class Setting:
    base: float = 0.5


def lengths(prompts, completions, level, **columns):
    return [len(c) * Setting().base if l else None for c, l in zip(completions, level)]


def failing(prompts, completions, **columns):
    return [columns["missing"] for _ in prompts]


def scalar(prompts, completions, **columns):
    return 1.0


def texts(prompts, completions, **columns):
    return ["good" for _ in prompts]


async def loop_of(text):
    await asyncio.sleep(0.001)
    return float(id(asyncio.get_running_loop()))


async def slow(prompts, completions, **columns):
    return list(await asyncio.gather(*map(loop_of, completions)))


async def failing_later(prompts, completions, **columns):
    await asyncio.sleep(0.001)
    raise KeyError("late")


async def scalar_later(prompts, completions, **columns):
    return 1.0


class Slow:
    async def __call__(self, prompts, completions, **columns):
        return await slow(prompts, completions)


instance = Slow()
"""


@pytest.mark.parametrize("place", ["own_rewards_module", "own_rewards_module.py"])
def test_a_reward_of_ones_own_is_called_with_all_columns(tmp_path, place):
    (tmp_path / "own_rewards_module.py").write_text(OWN_REWARD)
    before = list(sys.path)
    reward = one(f"{place}:lengths", folder=tmp_path)
    assert reward(prompts=["a", "b"], completions=["ab", "abcd"], level=[1, 0], answer=["", ""]) == [1.0, None]
    assert reward.__name__ == f"{place}:lengths"
    assert sys.path == before


def test_a_reward_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_cwd.py").write_text(OWN_REWARD)
    monkeypatch.chdir(tmp_path)
    assert one("rewards_of_cwd:lengths")(["a"], ["abc"], level=[1]) == [1.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "exactly",
            "reward 'exactly' is unknown: use exact, math_verify, arithmetic, strings, or package.module:function",
        ),
        (":f", "reward ':f' is unknown"),
        (
            "nowhere.at_all:f",
            "nowhere.at_all cannot be imported from .* .ModuleNotFoundError: No module named 'nowhere'",
        ),
        ("nowhere.py:f", "nowhere.py cannot be imported from .* .FileNotFoundError: no such file"),
        ("own.py:absent", "own.py has no 'absent'; check the name after the colon"),
        ("own.py:CONSTANT", "is int, not a function"),
        ("broken.py:f", "broken.py cannot be imported from .* .ZeroDivisionError"),
    ],
)
def test_a_reward_that_cannot_be_had_is_told_by_name(tmp_path, name, message):
    (tmp_path / "own.py").write_text(OWN_REWARD)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=message):
        one(name, folder=tmp_path)


@pytest.mark.parametrize("name", ["slow", "instance"])
def test_an_async_reward_is_awaited_on_one_loop_that_ends_with_it(tmp_path, name):
    """Calls from plain code, from a thread, and from code that runs in a loop of its own."""
    (tmp_path / "own.py").write_text(OWN_REWARD)
    reward, batch = one(f"own.py:{name}", folder=tmp_path), {"prompts": ["a", "b"], "completions": ["x", "y"]}
    first = reward(**batch)

    async def within_a_loop():
        return reward(**batch)

    found = []
    thread = threading.Thread(target=lambda: found.append(reward(**batch)))
    thread.start()
    thread.join()
    assert first == found[0] == asyncio.run(within_a_loop())
    assert first[0] == first[1]
    threads = [thread for thread in threading.enumerate() if thread.name == f"own.py:{name}"]
    assert len(threads) == 1
    del reward
    threads[0].join(5.0)
    assert not threads[0].is_alive()


def test_errors_of_a_reward_of_ones_own_carry_its_name(tmp_path):
    (tmp_path / "own.py").write_text(OWN_REWARD)
    for function, message in [
        ("failing", r"reward 'own.py:failing' failed \(KeyError: 'missing'\)"),
        ("failing_later", r"reward 'own.py:failing_later' failed \(KeyError: 'late'\)"),
        ("scalar_later", "reward 'own.py:scalar_later' returned float: return a list with one number"),
        ("scalar", "reward 'own.py:scalar' returned float: return a list with one number or None a completion"),
        ("texts", "reward 'own.py:texts' returned 'good' in its list: return numbers or None"),
    ]:
        with pytest.raises(ValueError, match=message):
            one(f"own.py:{function}", folder=tmp_path)(prompts=["a"], completions=["b"])


def test_each_is_reported_under_the_name_it_was_asked_by():
    names = ["exact", "math_verify", "arithmetic", "strings"]
    assert [reward.__name__ for reward in reward_functions(names)] == names


def test_a_name_given_twice_is_refused():
    with pytest.raises(ValueError, match="exact, exact: one is given twice"):
        reward_functions(["exact", "exact"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_gives_a_conversation_and_its_answer_to_each_reward(tmp_path, mathematics):
    """One step of GRPO on data in the schema of dapo-math-17k logs the means of the rewards called by hand."""
    from trl import GRPOConfig, GRPOTrainer

    from geopd.problems import character_tokenizer
    from geopd.training.data import load_prompts
    from geopd.training.language_model import ModelShape, build_model

    rows = [
        {"prompt": [{"role": "user", "content": f"{n}+1="}], "reward_model": {"ground_truth": str(n)}} for n in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    seen = []

    def digits(prompts, completions, answer, **columns):
        seen.append((prompts, completions, answer))
        return [float(truth in completion[0]["content"]) for truth, completion in zip(answer, completions, strict=True)]

    trainer = GRPOTrainer(
        model=build_model(ModelShape(32, 1, 2, 1, 32), tokenizer, seed=0),
        reward_funcs=[*reward_functions(["exact"], answer_marker=""), mathematics, digits],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=4,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=load_prompts(tmp_path / "rows.jsonl", needs_answer=True),
        processing_class=tokenizer,
    )
    trainer.train()
    logged, (prompts, completions, answer) = trainer.state.log_history[0], seen[0]
    assert {prompt[0]["content"][0] for prompt in prompts} == set(answer)
    for name, reward in [("exact", one("exact", answer_marker="")), ("math_verify", mathematics)]:
        by_hand = reward(prompts, completions, answer=answer)
        assert logged[f"rewards/{name}/mean"] == pytest.approx(sum(by_hand) / 4)
    assert logged["math_verify/not_judged"] == 0.0
