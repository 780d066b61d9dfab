"""The HTTP engine against a server on this machine."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest

from stepwiser_jax.errors import UserError
from stepwiser_jax.inference import remote
from stepwiser_jax.inference.params import SamplingParams, StopReason
from stepwiser_jax.inference.remote import RemoteEngine

PARAMS = SamplingParams(4, temperature=0.7, top_p=0.9, stop_ids=(9,))
KEY = jax.random.key(0)


def completion(ids, *, finish="stop", **changes):
    choice = {
        "token_ids": ids,
        "logprobs": {"token_logprobs": [-0.5 * i for i in range(len(ids))]},
        "finish_reason": finish,
    }
    return 200, {"choices": [choice | changes]}


def logprobs(*values):
    return {"token_logprobs": values}


@pytest.fixture
def serve(monkeypatch):
    """`serve(answer)` -> (an engine, the bodies it was sent); `answer(body)`: (status, JSON), of
    which the requests numbered in `broken` get half."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    servers = []

    def start(answer, broken=(), **settings):
        bodies = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                assert self.path == "/v1/completions"
                bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, content = answer(bodies[-1])
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://elsewhere/")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if len(bodies) in broken else body)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("localhost", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        url = f"http://localhost:{server.server_port}/v1/"
        settings = {"vocab_size": 64, "retries": 3} | settings
        return RemoteEngine(url, "teacher", **settings), bodies

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def generate(engine, prompts=((1, 2), (3,)), params=PARAMS):
    rows = [f"r{p}/{g}" for p in range(len(prompts)) for g in range(2)]
    return engine.generate(prompts, params, key=KEY, row_ids=rows, group_size=2)


def reasons(completions):
    return {completion.stop_reason for completion in completions}


def test_rows_come_back_where_they_belong_with_ids_and_logprobs(serve):
    engine, bodies = serve(lambda body: completion([*body["prompt"], 9]), concurrent_requests=2)
    completions = generate(engine)
    assert [completion.row_id for completion in completions] == ["r0/0", "r0/1", "r1/0", "r1/1"]
    assert [completion.tokens.tolist() for completion in completions] == [
        [1, 2, 9],
        [1, 2, 9],
        [3, 9],
        [3, 9],
    ]
    np.testing.assert_array_equal(completions[0].logprobs, np.float32([0, -0.5, -1]))
    assert completions[0].tokens.dtype == np.int32 and completions[0].logprobs.dtype == np.float32
    assert reasons(completions) == {StopReason.STOP_ID}
    assert len({body["seed"] for body in bodies}) == 4, "rows must differ in their noise"
    sent = bodies[0]
    assert (sent["max_tokens"], sent["temperature"], sent["top_p"]) == (4, 0.7, 0.9)
    assert sent["stop_token_ids"] == [9] and sent["return_token_ids"]
    seeds = {(tuple(b["prompt"]), b["seed"]) for b in bodies}
    bodies.clear()
    generate(engine)
    assert {(tuple(b["prompt"]), b["seed"]) for b in bodies} == seeds


def test_why_a_row_ended(serve):
    engine, _ = serve(lambda body: completion([5, 6, 7, 8], finish="length"))
    assert reasons(generate(engine)) == {StopReason.LENGTH}
    engine, _ = serve(lambda body: completion([5]))
    params = SamplingParams(4, stop_ids=(9,), stop_strings=("</chunk>",))
    assert reasons(generate(engine, params=params)) == {StopReason.STOP_STRING}


def test_a_busy_server_is_asked_again(serve):
    answers = iter([(503, {}), (429, {})])
    engine, bodies = serve(lambda body: next(answers, None) or completion([9]))
    generate(engine)
    assert len(bodies) == 4 + 2


def test_half_an_answer_is_asked_for_again(serve):
    engine, bodies = serve(lambda body: completion([9]), broken=(1, 3))
    assert [completion.tokens.tolist() for completion in generate(engine)] == [[9]] * 4
    assert len(bodies) > 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((503, {"error": "loading"}), "no answer in 4 attempts .503 .*loading"),
        ((404, {"error": "no model 'teacher'"}), "refuses: 404 .*no model 'teacher'"),
        ((302, {}), "refuses: 302 to http://elsewhere/"),
        ((200, {"error": "out of memory"}), "choices: Field required.*out of memory"),
        ((200, [3]), "Input should be an object"),
        ((200, {"choices": None}), "choices: Input should be a valid array"),
        ((200, {"choices": []}), "at least 1 item"),
        ((200, {"choices": completion([9])[1]["choices"] * 2}), "at most 1 item"),
        (completion([9], token_ids=None), "choices.0.token_ids: Input should be a valid array"),
        (completion([9], token_ids=[1.5]), "token_ids.0: Input should be a valid integer"),
        (completion([9], token_ids=[True]), "token_ids.0: Input should be a valid integer"),
        (completion([9], token_ids=["5"]), "token_ids.0: Input should be a valid integer"),
        (completion([-5, 9]), "token ids from -5 to 9, server.tokenizer has those below 64"),
        (completion([64, 9]), "token ids from 9 to 64"),
        (completion([2**80, 9]), f"token ids from 9 to {2**80}"),
        (completion([9, 9]), r"one of the end tokens \[9\] before the end"),
        (completion([9], logprobs=None), "choices.0.logprobs: Input should be an object"),
        (completion([9], logprobs=logprobs(None)), "token_logprobs.0: Input should be a valid num"),
        (completion([9], logprobs=logprobs(True)), "token_logprobs.0: Input should be a valid num"),
        (completion([9], logprobs=logprobs(float("nan"))), "logprobs.0: Input should be a finite"),
        (completion([9], logprobs=logprobs(-float("inf"))), "logprobs.0: Input should be a finite"),
        (completion([9], logprobs=logprobs(50)), "logprobs.0: Input should be less than or equal"),
        (completion([9], finish_reason=3), "finish_reason: Input should be a valid string"),
        (completion([9], text="x" * 2**21), "more than 10[0-9]{5} bytes"),
        ((500, {"error": "x" * 2**21}), "no answer in 4 attempts .500 .{300}.:"),
        (completion([1, 2, 3, 4, 9]), "5 token ids .* from 1 to 4"),
        (completion([9], logprobs=logprobs(0.0, 0.0)), "1 token ids and 2 log-probs"),
        (completion([]), "0 token ids"),
        (completion([9], prompt_token_ids=[0, 1, 2]), "another prompt"),
        (completion([5]), r"without one of the end tokens \[9\]"),
    ],
)
def test_what_cannot_be_used_is_refused(serve, answer, message):
    engine, _ = serve(lambda body: answer)
    with pytest.raises(UserError, match=message):
        generate(engine)


def test_nobody_there():
    engine = RemoteEngine("http://localhost:9", "teacher", vocab_size=64, retries=0)
    with pytest.raises(UserError, match=r"gave no answer in 1 attempts .*start it, or"):
        generate(engine)


@pytest.mark.parametrize("slow", ["body", "headers"])
def test_a_server_that_drips_is_cut_off(slow):
    """Every byte comes in time, and the answer never."""
    listener, over = socket.create_server(("localhost", 0)), threading.Event()

    def drip():
        connection, _ = listener.accept()
        connection.recv(2**16)
        if slow == "body":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        else:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        with contextlib.suppress(OSError):
            for _ in range(250):
                connection.sendall(b"{")
                over.wait(0.02)
            connection.close()

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    url = f"http://localhost:{listener.getsockname()[1]}"
    engine = RemoteEngine(url, "teacher", vocab_size=64, timeout_seconds=0.3, retries=0)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"no answer in 1 attempts .not the whole of one in 0.3 sec"
    ):
        engine.generate([[1]], PARAMS, key=KEY, row_ids=["r"])
    assert time.monotonic() - began < 5
    over.set()
    thread.join()
    listener.close()


def test_json_of_any_depth_is_no_answer(serve):
    """Python's own parser would raise RecursionError."""
    engine, _ = serve(lambda body: (200, b"[" * 100_000), retries=0)
    with pytest.raises(UserError, match=r"no answer in 1 attempts .*recursion limit"):
        generate(engine)
