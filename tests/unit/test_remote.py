"""The HTTP engine against a server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest

from stepwiser_jax.records import UserError
from stepwiser_jax.runtime import remote
from stepwiser_jax.runtime.remote import RemoteEngine
from stepwiser_jax.runtime.sampling import SamplingParams, StopReason

PARAMS = SamplingParams(4, temperature=0.7, top_p=0.9, stop_ids=(9,))
KEY = jax.random.key(0)


def completion(ids, *, finish="stop", **changes):
    choice = {
        "token_ids": ids,
        "logprobs": {"token_logprobs": [-0.5 * i for i in range(len(ids))]},
        "finish_reason": finish,
    }
    return 200, {"choices": [choice | changes]}


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
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if len(bodies) in broken else body)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("localhost", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        url = f"http://localhost:{server.server_port}/v1/"
        return RemoteEngine(url, "teacher", **{"retries": 3} | settings), bodies

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def generate(engine, prompts=((1, 2), (3,)), params=PARAMS):
    rows = [f"r{p}/{g}" for p in range(len(prompts)) for g in range(2)]
    return engine.generate(prompts, params, key=KEY, row_ids=rows, group_size=2)


def test_rows_come_back_where_they_belong_with_ids_and_logprobs(serve):
    engine, bodies = serve(lambda body: completion([*body["prompt"], 9]), concurrent_requests=2)
    output = generate(engine)
    assert [output.ids(b) for b in range(4)] == [[1, 2, 9], [1, 2, 9], [3, 9], [3, 9]]
    np.testing.assert_array_equal(output.logprobs_BC[0], np.float32([0, -0.5, -1, 0]))
    assert set(output.stop_reason_B) == {StopReason.STOP_ID}
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
    assert set(generate(engine).stop_reason_B) == {StopReason.LENGTH}
    engine, _ = serve(lambda body: completion([5]))
    params = SamplingParams(4, stop_ids=(9,), stop_strings=("</chunk>",))
    assert set(generate(engine, params=params).stop_reason_B) == {StopReason.STOP_STRING}


def test_a_busy_server_is_asked_again(serve):
    answers = iter([(503, {}), (429, {})])
    engine, bodies = serve(lambda body: next(answers, None) or completion([9]))
    generate(engine)
    assert len(bodies) == 4 + 2


def test_half_an_answer_is_asked_for_again(serve):
    engine, bodies = serve(lambda body: completion([9]), broken=(1, 3))
    assert [generate(engine).ids(b) for b in range(4)] == [[9]] * 4
    assert len(bodies) > 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((503, {"error": "loading"}), "no answer in 4 attempts .503 .*loading"),
        ((404, {"error": "no model 'teacher'"}), "refuses: 404 .*no model 'teacher'"),
        (completion([9], token_ids=None), "returns no token_ids"),
        ((200, {"error": "out of memory"}), "returns no token_ids.*out of memory"),
        (completion([9], logprobs=None), "returns no logprobs.token_logprobs"),
        (completion([1, 2, 3, 4, 9]), "5 token ids .* from 1 to 4"),
        (completion([9], logprobs={"token_logprobs": [0.0, 0.0]}), "1 token ids and 2 log-probs"),
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
    engine = RemoteEngine("http://localhost:9", "teacher", retries=0)
    with pytest.raises(UserError, match=r"gave no answer in 1 attempts .*start it, or"):
        generate(engine)
