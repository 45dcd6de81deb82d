"""A served teacher over real HTTP: its numbers against a direct forward, and every way in which a server can fail."""

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from geopd.problems import character_tokenizer
from geopd.training.language_model import ModelShape, build_model
from geopd.training.teacher_server import ServerTeacher
from model_server import ModelServer, serving

SHAPE = ModelShape(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=48)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(SHAPE, tokenizer, seed=1).eval()


@pytest.fixture
def state(model, tokenizer, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return ModelServer(model, tokenizer)


@pytest.fixture
def url(state):
    with serving(state) as address:
        yield address


@pytest.fixture
def batch():
    """Five rows of unequal prompts and responses, one of them without a response; B=5, P=6, T=5."""
    generator = torch.Generator().manual_seed(0)
    prompt_ids = torch.randint(2, 20, (5, 6), generator=generator)
    completion_ids = torch.randint(2, 20, (5, 5), generator=generator)
    prompt_mask = torch.tensor([[0] * (6 - n) + [1] * n for n in (6, 1, 3, 4, 2)])
    completion_mask = torch.tensor([[1] * n + [0] * (5 - n) for n in (5, 2, 0, 1, 4)])
    return prompt_ids * prompt_mask, prompt_mask, completion_ids * completion_mask, completion_mask


def direct(model, batch):
    """Row by row and unpadded: log softmax of the model's own logits at the response tokens."""
    prompt_ids, prompt_mask, completion_ids, completion_mask = batch
    expected = torch.zeros(completion_ids.shape)
    for row in range(len(prompt_ids)):
        prompt = prompt_ids[row][prompt_mask[row].bool()]
        response = completion_ids[row][completion_mask[row].bool()]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0]
        for place, token in enumerate(response):
            expected[row, place] = torch.log_softmax(logits[len(prompt) + place - 1], dim=-1)[token]
    return expected


def teacher(url, **settings):
    return ServerTeacher(url, **{"retries": 2, "backoff": 0.001, "timeout": 5.0, **settings})


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_served_log_probabilities_are_those_of_a_direct_forward(url, model, batch, batch_size, suffix):
    found = teacher(url + suffix, batch_size=batch_size).token_logps(*batch, 1.0)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.allclose(found, direct(model, batch), atol=1e-5)
    assert torch.equal(found[batch[3] == 0], torch.zeros(int((batch[3] == 0).sum())))


def test_a_server_without_prompt_logprobs_is_asked_for_an_echo(url, state, model, batch, caplog):
    state.refused_fields = ("prompt_logprobs",)
    asking = teacher(url, batch_size=2)
    with caplog.at_level(logging.WARNING):
        found = asking.token_logps(*batch, 1.0)
    assert torch.allclose(found, direct(model, batch), atol=1e-5)
    assert "echo" in caplog.text
    asking.token_logps(*batch, 1.0)
    assert sum("prompt_logprobs" in request for request in state.requests) == 1


def test_a_server_that_ignores_prompt_logprobs_is_asked_for_an_echo(url, state, model, batch):
    whole = state.choice

    def choice(index, ids, body):
        return whole(index, ids, body) if "echo" in body else {"index": index, "text": "x", "prompt_logprobs": None}

    state.choice = choice
    assert torch.allclose(teacher(url).token_logps(*batch, 1.0), direct(model, batch), atol=1e-5)
    with pytest.raises(ValueError, match="no prompt_logprobs"):
        teacher(url, style="prompt_logprobs").token_logps(*batch, 1.0)


def test_rows_are_batched_asked_concurrently_and_only_where_there_is_a_response(url, state, model, batch):
    state.edit = lambda reply: time.sleep(0.05) or reply
    twice = tuple(torch.cat([part, part]) for part in batch)
    found = teacher(url, batch_size=2, concurrency=2).token_logps(*twice, 1.0)
    assert torch.allclose(found, torch.cat([direct(model, batch)] * 2), atol=1e-5)
    assert [len(request["prompt"]) for request in state.requests] == [2, 2, 2, 2]
    assert state.most_at_once == 2
    assert all(request["temperature"] == 1.0 and request["model"] == "tiny" for request in state.requests)


def test_nothing_is_sent_for_a_batch_without_responses(url, state, batch):
    empty = (*batch[:3], torch.zeros_like(batch[3]))
    assert torch.equal(teacher(url).token_logps(*empty, 1.0), torch.zeros(batch[3].shape))
    assert not state.requests


@pytest.mark.parametrize("status", [429, 500, 503])
def test_two_failures_are_tried_again(url, state, model, batch, status):
    state.faults = [(status, {"error": {"message": "busy"}})] * 2
    assert torch.allclose(teacher(url).token_logps(*batch, 1.0), direct(model, batch), atol=1e-5)
    assert len(state.requests) == 3


def test_a_third_failure_is_told_with_what_came_back(url, state, batch):
    state.faults = [(500, {"error": {"message": "out of memory"}})] * 3
    with pytest.raises(
        ValueError, match=r"v1/completions answered HTTP 500: out of memory \(given up after 3 attempts"
    ):
        teacher(url).token_logps(*batch, 1.0)


def test_waits_double_and_obey_retry_after(url):
    server = teacher(url, backoff=1.0)._server
    for attempt, longest in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)):
        assert longest / 2 <= server._wait(attempt, None) <= longest
    assert server._wait(0, "7") == 7.0
    assert server._wait(0, "3600") == 30.0


def test_waiting_does_not_move_the_random_state_of_training(url, state, batch):
    import random

    state.faults = [(500, {})] * 2
    before = random.getstate(), torch.get_rng_state()
    teacher(url).token_logps(*batch, 1.0)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_hanging_server_times_out(url, state, batch):
    state.faults = [("hang", 0.6)] * 2
    with pytest.raises(ValueError, match=r"did not answer in 0.2 s: raise the teacher's timeout"):
        teacher(url, timeout=0.2, retries=1).token_logps(*batch, 1.0)
    assert torch.isfinite(teacher(url).token_logps(*batch, 1.0)).all()


def test_a_refused_connection_names_the_address(batch, state):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        ValueError, match=rf"http://127.0.0.1:{port}/v1/models could not be reached .*refused.*start it"
    ):
        teacher(f"http://127.0.0.1:{port}").token_logps(*batch, 1.0)


def test_a_connection_closed_without_an_answer_is_tried_again(url, state, model, batch):
    state.faults = [("hang", 0.0)] * 2
    assert torch.allclose(teacher(url).token_logps(*batch, 1.0), direct(model, batch), atol=1e-5)
    state.faults = [("hang", 0.0)] * 3
    with pytest.raises(ValueError, match=r"could not be reached .*closed connection.* \(given up after 3 attempts\)"):
        teacher(url).token_logps(*batch, 1.0)


@contextmanager
def broken_bodies(status, how, count):
    """The address of a server whose first ``count`` errors promise 100 bytes and stall, or break off, after 5."""
    told, released = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            told.append(self.path)
            if len(told) > count:
                body = json.dumps({"data": [{"id": "tiny"}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            self.send_response(status)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"first")
            self.wfile.flush()
            if how == "stalls":
                released.wait(10.0)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", told
    finally:
        released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("how", ["stalls", "breaks off"])
def test_an_error_whose_body_stalls_or_breaks_off_is_tried_again_like_any_other(how, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for status in (429, 503):
        with broken_bodies(status, how, count=2) as (url, told):
            assert teacher(url, timeout=0.3).served_model() == ("tiny", None)
            assert len(told) == 3
    for status, message, attempts in [(500, r"'' \(given up after 3 attempts\)", 3), (400, "''$", 1)]:
        with broken_bodies(status, how, count=3) as (url, told):
            with pytest.raises(ValueError, match=f"/v1/models answered HTTP {status}: {message}"):
                teacher(url, timeout=0.3).served_model()
            assert len(told) == attempts


def test_a_refusal_is_told_while_others_still_retry_or_hang(url, state, batch):
    """One request of four is refused; the others would be tried again for minutes, or hang for seconds."""
    hold = threading.Event()

    def completions(body):
        state.requests.append(body)
        if len(state.requests) == 1:
            hold.wait(5.0)
            return 400, {"error": {"message": "no such adapter"}}
        if len(state.requests) == 2:
            return "hang", 8.0
        if len(state.requests) == 4:  # the refusal waits until all four are on their way
            hold.set()
        return 503, {"error": {"message": "busy"}}

    state.completions = completions
    asking = teacher(url, batch_size=1, concurrency=4, retries=8, backoff=30.0, style="echo", timeout=60.0)
    asking.served_model()
    started = time.monotonic()
    with pytest.raises(ValueError, match="HTTP 400: no such adapter"):
        asking.token_logps(*batch, 1.0)
    assert time.monotonic() - started < 6.0
    sent = len(state.requests)
    time.sleep(0.2)
    assert len(state.requests) == sent == 4


def test_an_answer_that_is_not_json_is_shown(url, state, batch):
    state.faults = [(200, b"<html>welcome</html>")]
    with pytest.raises(ValueError, match="not JSON: '<html>welcome"):
        teacher(url).token_logps(*batch, 1.0)


def test_a_redirect_is_refused(url, state, batch):
    state.faults = [(302, {})]
    with pytest.raises(ValueError, match=r"redirect to http://elsewhere\.invalid/; pass the final address"):
        teacher(url).token_logps(*batch, 1.0)


def shorter(reply):
    for choice in reply["choices"]:
        choice["prompt_logprobs"].pop()
    return reply


def other_token(reply):
    for choice in reply["choices"]:
        choice["prompt_logprobs"] = [entry and {"23": {"logprob": -1.0}} for entry in choice["prompt_logprobs"]]
    return reply


def own_value(value):
    def edit(reply):
        for choice in reply["choices"]:
            for entry in choice["prompt_logprobs"][1:]:
                for reported in entry.values():
                    reported["logprob"] = value
        return reply

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda reply: {"choices": reply["choices"][1:]}, "3 choices for 4 sequences"),
        (lambda _: {"error": "none"}, "no choices for 4 sequences"),
        (shorter, "of 10 tokens where 11 were sent"),
        (other_token, r"no log-probability of token id \d+ at position 6, only of 23: .*share token ids"),
        (own_value(float("nan")), "log-probability nan: check that the teacher does not overflow"),
        (own_value(-9999.0), "log-probability -9999"),
        (own_value(12.5), "above log-probability 0 at position 6, which are logits: .*--logprobs-mode raw_logprobs"),
        (own_value(-0.1), "which are logits"),
        (own_value("low"), "'low'.* at position 6 where a log-probability belongs"),
    ],
)
def test_an_unusable_answer_is_told(url, state, batch, edit, message):
    state.edit = edit
    with pytest.raises(ValueError, match=message):
        teacher(url).token_logps(*batch, 1.0)


def echoed(change):
    def edit(reply):
        for choice in reply["choices"]:
            choice["logprobs"] = change(choice["logprobs"])
        return reply

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (echoed(lambda _: None), "returned no log-probabilities: serve the teacher with one"),
        (echoed(lambda logprobs: {"token_logprobs": logprobs["token_logprobs"][:3]}), "of 3 tokens where 11 were sent"),
        (echoed(lambda _: {"token_logprobs": [None] * 12}), "'None' at position 6"),
        (lambda reply: {**reply, "usage": {"prompt_tokens": 7}}, "counted 7 prompt tokens where 25 were sent"),
    ],
)
def test_an_unusable_echo_is_told(url, state, batch, edit, message):
    state.edit = edit
    with pytest.raises(ValueError, match=message):
        teacher(url, style="echo").token_logps(*batch, 1.0)


def test_a_model_that_is_not_served_is_named_with_those_that_are(url, state, batch):
    with pytest.raises(ValueError, match="serves no model 'huge', only tiny"):
        teacher(url, model="huge").token_logps(*batch, 1.0)
    state.models = [{"id": "tiny"}, {"id": "small"}]
    with pytest.raises(ValueError, match=r"serves 2 models \(tiny, small\): pass the teacher's model name"):
        teacher(url).token_logps(*batch, 1.0)
    assert torch.isfinite(teacher(url, model="tiny").token_logps(*batch, 1.0)).all()
    state.faults = [(404, {"error": {"message": "The model `tiny` does not exist."}})]
    with pytest.raises(ValueError, match=r"`tiny` does not exist\.; the server lacks this model"):
        teacher(url, model="tiny").token_logps(*batch, 1.0)


def test_an_address_that_is_another_service_is_told(url, state, batch):
    state.models = "many"
    with pytest.raises(ValueError, match="must be an OpenAI-compatible API"):
        teacher(url).token_logps(*batch, 1.0)


def test_a_sequence_beyond_the_context_is_refused_before_and_after_asking(url, state, batch):
    state.models = [{"id": "tiny", "max_model_len": 11}]
    with pytest.raises(ValueError, match=r"takes 11 tokens .* has 11, plus one: serve with --max-model-len 12"):
        teacher(url).token_logps(*batch, 1.0)
    assert not state.requests
    state.models = [{"id": "tiny"}]
    state.faults = [(400, {"message": "This model's maximum context length is 11 tokens."})]
    with pytest.raises(ValueError, match=r"context length is 11 tokens\.; serve with a larger --max-model-len"):
        teacher(url).token_logps(*batch, 1.0)


def test_another_training_temperature_is_refused(url, state, batch):
    with pytest.raises(ValueError, match=r"temperature=0.7: .* at temperature 1 only; .* load the teacher in process"):
        teacher(url).token_logps(*batch, 0.7)
    assert not state.requests


def test_the_key_is_read_from_the_named_variable_and_sent(url, state, batch, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "secret")
    teacher(url, api_key_env="TEACHER_KEY").token_logps(*batch, 1.0)
    assert state.headers["Authorization"] == "Bearer secret"
    state.faults = [(401, {"error": "Unauthorized"})]
    with pytest.raises(ValueError, match="Unauthorized; pass api_key_env"):
        teacher(url).token_logps(*batch, 1.0)
    with pytest.raises(ValueError, match="NO_SUCH_KEY: this environment variable is not set"):
        teacher(url, api_key_env="NO_SUCH_KEY")


def test_masks_that_are_no_padding_are_refused(url, batch):
    prompt_ids, prompt_mask, completion_ids, completion_mask = batch
    with pytest.raises(ValueError, match="prompt_mask of row 1 is not padded on the left"):
        teacher(url).token_logps(prompt_ids, prompt_mask.flip(1), completion_ids, completion_mask, 1.0)
    with pytest.raises(ValueError, match="completion_mask of row 1 has a hole"):
        teacher(url).token_logps(prompt_ids, prompt_mask, completion_ids, completion_mask.flip(1), 1.0)
    with pytest.raises(ValueError, match="prompt of row 0 is empty"):
        teacher(url).token_logps(prompt_ids, prompt_mask * 0, completion_ids, completion_mask, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        teacher(url).token_logps(prompt_ids, prompt_mask, completion_ids[:, :2], completion_mask, 1.0)


def test_unusable_settings_are_named():
    with pytest.raises(ValueError, match="no web address: write http://HOST:PORT"):
        ServerTeacher("file:///etc/passwd")
    with pytest.raises(ValueError, match="batch_size=0"):
        ServerTeacher("http://localhost", batch_size=0)
    with pytest.raises(ValueError, match="retries=-1"):
        ServerTeacher("http://localhost", retries=-1)
    with pytest.raises(ValueError, match="style 'chat' is unknown: use one of auto"):
        ServerTeacher("http://localhost", style="chat")
