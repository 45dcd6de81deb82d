"""A tiny language model behind HTTP on loopback, speaking the dialect of vLLM's OpenAI-compatible server."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class ModelServer:
    """A tiny model behind HTTP, speaking vLLM's dialect; ``faults`` are taken first, one a completion request."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.faults = []
        self.requests = []
        self.models = [{"id": "tiny", "max_model_len": 64}]
        self.edit = lambda reply: reply
        self.refused_fields = ()
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    @torch.no_grad()
    def prompt_logps(self, ids):
        """Log-probabilities (n, vocabulary) of every place given those before it."""
        return torch.log_softmax(self.model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)

    def completions(self, body):
        """The reply to one request: (status, document)."""
        with self._lock:
            self.requests.append(body)
            fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            return fault
        for field in self.refused_fields:
            if field in body:
                return 400, {"error": {"message": f"unknown field {field}", "code": 400}}
        choices = [self.choice(index, ids, body) for index, ids in enumerate(body["prompt"])]
        # vLLM may list choices in any order
        return 200, self.edit(
            {"choices": choices[::-1], "usage": {"prompt_tokens": sum(len(ids) for ids in body["prompt"])}}
        )

    def choice(self, index, ids, body):
        table, best = self.prompt_logps(ids), {}
        own = [None] + [float(table[place - 1, ids[place]]) for place in range(1, len(ids))]
        if "prompt_logprobs" in body:
            entries = [None]
            for place in range(1, len(ids)):
                top = int(table[place - 1].argmax())
                best = {str(top): {"logprob": float(table[place - 1, top]), "rank": 1, "decoded_token": "?"}}
                entries.append({str(ids[place]): {"logprob": own[place], "rank": 5, "decoded_token": "?"}, **best})
            return {"index": index, "text": "x", "prompt_logprobs": entries}
        generated = float(table[-1].max())
        return {"index": index, "text": "x", "logprobs": {"token_logprobs": [*own, generated], "tokens": []}}

    def tokenize(self, body):
        if "prompt" not in body:
            ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
            return 200, {"tokens": ids}
        return 200, {"tokens": self.tokenizer(body["prompt"])["input_ids"]}

    @contextmanager
    def counted(self):
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        yield
        with self._lock:
            self._at_once -= 1


@contextmanager
def serving(state):
    """The address of a server that lives as long as the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, {"object": "list", "data": state.models})

        def do_POST(self):
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            state.headers = dict(self.headers)
            answers = {"/v1/completions": state.completions, "/tokenize": state.tokenize}
            if self.path not in answers or answers[self.path] is None:
                return self.answer(404, {"detail": "Not Found"})
            with state.counted():
                status, document = answers[self.path](json.loads(raw))
            return self.answer(status, document)

        def answer(self, status, document):
            if status == "hang":
                time.sleep(document)
                return
            raw = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            if status in (301, 302):
                self.send_header("Location", "http://elsewhere.invalid/")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
