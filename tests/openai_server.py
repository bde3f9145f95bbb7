"""A real OpenAI-compatible server with a tiny random Llama, and a proxy before it that puts faults in."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tiny_models import SPECIAL, VOCAB_SIZE, make_processor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_serve_available

MODEL = "tiny/llama"
TEMPLATE = "<s> {% for message in messages %}{{ message['content'] }} {% endfor %}ASSISTANT: "
SERVE = "from transformers.cli.transformers import main; main()"


def make_llama():
    """(model, tokenizer) with a chat template."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, initializer_range=0.2, **sizes, **tokens)).eval()
    model.lm_head.weight.data[: len(SPECIAL)] = 0  # so that every answer has words
    tokenizer = make_processor().tokenizer
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@contextmanager
def transformers_serve(folder: Path):
    """The address of `transformers serve` in a process of its own, whose models are those of a cache in `folder`."""
    if not is_serve_available():
        pytest.skip("needs transformers serve: pip install openai fastapi uvicorn")
    saved = folder / "models--tiny--llama" / "snapshots" / ("0" * 40)
    for part in make_llama():
        part.save_pretrained(saved)
    (folder / "models--tiny--llama" / "refs").mkdir()
    (folder / "models--tiny--llama" / "refs" / "main").write_text(saved.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline, "transformers serve does not answer"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


class Proxy:
    """Hands requests on, or answers them itself where `fault` of the request's number (from 0) and body says how.

    Attributes:
        bodies: what was asked, as JSON, in the order of arrival; None of a GET.
        keys: the Authorization header of each.
        most: requests that were in flight at a time.
    """

    def __init__(self, target=None, fault=lambda number, body: None, delay=0.0):
        self.target, self.fault, self.delay = target, fault, delay
        self.bodies, self.keys, self.most = [], [], 0
        self._in_flight, self._lock, self._server = 0, threading.Lock(), None
        self._start(0)

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}/v1"

    def _start(self, port):
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy, self._port = self, self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    def die(self, seconds):
        """Go away, with all that is in flight unanswered, and come back."""

        def come_back():
            self.close()
            time.sleep(seconds)
            self._start(self._port)

        threading.Thread(target=come_back).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def handle(self, request):
        length = int(request.headers.get("Content-Length", 0))
        data = request.rfile.read(length) if length else None
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(data and json.loads(data))
            self.keys.append(request.headers.get("Authorization"))
            self._in_flight += 1
            self.most = max(self.most, self._in_flight)
        try:
            time.sleep(self.delay)
            answered = self.fault(number, self.bodies[number])
            status, headers, body, sent = answered or self._ask(request.command, request.path, data)
        finally:
            with self._lock:
                self._in_flight -= 1
        if status is None:  # no answer at all
            return
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            request.send_header(name, str(value))
        request.end_headers()
        request.wfile.write(body[:sent])

    def _ask(self, method, path, data):
        address = self.target + path.removeprefix("/v1")
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, {}, reply.read(), None
        except urllib.error.HTTPError as error:
            return error.code, {}, error.read(), None


def answer(body, status=200, sent=None, **headers):
    """An answer of the proxy's own; only `sent` bytes of it arrive."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, data, sent


def completion(text, finish_reason="stop"):
    """The body of a whole answer."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}


NO_ANSWER = None, {}, b"", None
FAULTS = {
    "busy": answer({"error": "busy"}, 429, Retry_After="0.3"),
    "broken": answer({"error": "broken"}, 500),
    "away": answer(b"<html>no gateway</html>", 503, Content_Type="text/html"),
    "half JSON": answer(b'{"choices": [{"message": {"ro'),
    "no JSON": answer(b"<html></html>", Content_Type="text/html"),
    "cut off": answer(completion("w1 w2"), sent=40),
    "an error as an answer": answer({"error": {"message": "overloaded"}}),
    "no choice": answer({**completion(""), "choices": []}),
    "no word": NO_ANSWER,
}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.proxy.handle(self)

    do_GET = do_POST

    def log_message(self, *_):
        pass
