"""`stepwiser serve`: a server in this process on a free port, and the judge of the package."""

import base64
import contextlib
import functools
import hashlib
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import jax
import numpy as np
import pytest

from stepwiser_jax.commands.serve import KEY, read_key, warm_up
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.params import StopReason
from stepwiser_jax.inference.remote import RemoteEngine
from stepwiser_jax.judges import reward
from stepwiser_jax.judges.base import Solution
from stepwiser_jax.judges.check import Checker
from stepwiser_jax.server import http, worker
from stepwiser_jax.server.http import Access, Server, is_loopback, listen, make_app
from stepwiser_jax.server.page import POLICY, SCRIPT, STYLE, TEMML, page_of
from stepwiser_jax.server.worker import GrowingText, Worker, rounds

QUESTION = "start 2 ; * 6 - 1 ; * 2 - 3 ?"
STEPS = ["2 * 6 = 7 ; 7 - 1 = 6", "6 * 2 = 2 ; 2 - 3 = 9"]
ASKED = {"question": QUESTION, "steps": STEPS}
LOOPBACK = Access(frozenset({"localhost", "127.0.0.1"}), None)


class Served:
    """A server in a thread of this process."""

    def __init__(self, checker, *, places=256, timeout=300.0, access=LOOPBACK):
        self.worker = Worker(checker, places)
        self.listener = listen("127.0.0.1", 0)
        self.address = self.listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.server = Server(make_app(self.worker, access, timeout=timeout), self.worker)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()
        self.client = httpx2.Client(base_url=self.url, timeout=300)

    def post(self, path="/check", body=None, **more):
        content = body if isinstance(body, bytes) else json.dumps(body or ASKED).encode()
        return self.client.post(path, content=content, **more)

    def end(self):
        self.server.drain()
        self.thread.join()
        self.client.close()


@contextlib.contextmanager
def serving(checker, **settings):
    served = Served(checker, **settings)
    try:
        yield served
    finally:
        served.end()


@pytest.fixture(scope="module")
def checker():
    return Checker.load()


@pytest.fixture(scope="module")
def served(checker):
    with serving(checker) as served:
        yield served


def as_verl_loads(path):
    """verl loads the reward by the path of its file."""
    spec = importlib.util.spec_from_file_location("custom_module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_score


def test_a_judge_rewards_solutions_that_verl_sends(served, checker, monkeypatch, capsys):
    compute_score = as_verl_loads(reward.__file__)

    def score(solution, **more):
        extra = {"split": "train", "index": 0, "question": QUESTION}
        return compute_score(
            data_source="arithmetic",
            solution_str=solution,
            ground_truth="9",
            extra_info=extra,
            url=served.url,
            **more,
        )

    solution = "\n\n".join(STEPS)
    found = checker(QUESTION, solution).to_fields()
    assert score(solution) == pytest.approx(min(c["p_positive"] for c in found["chunks"]))
    assert score(solution, form="accepted") == found["first_error"] / 2 == 0
    assert score(" \n") == 0
    assert score("7 " * 500) == 0 and "a solution earns 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"extra_info\['question'\] .*\(math\), found None"):
        compute_score("math", solution, "9", {"index": 0}, url=served.url)
    with pytest.raises(ValueError, match="expected a form of min, accepted, right, found 'sum'"):
        score(solution, form="sum")
    with pytest.raises(RuntimeError, match=r"expected a judge at .*:9, found none"):
        compute_score("math", solution, "9", {"question": QUESTION}, url="http://127.0.0.1:9")


def test_a_reward_waits_for_a_full_server_and_then_gives_up(checker, monkeypatch):
    held = Held(monkeypatch, checker)
    ask = functools.partial(reward.compute_score, "", STEPS[0], "", {"question": QUESTION})
    with serving(checker, places=1) as full, ThreadPoolExecutor(3) as clients:
        waiting = [clients.submit(ask, url=full.url)]
        assert held.began.wait(60)
        waiting.append(clients.submit(ask, url=full.url))
        while not full.worker._waiting:
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="answers 429"):
            ask(url=full.url, timeout=0.5)
        waiting.append(clients.submit(ask, url=full.url))
        held.go.set()
        assert len({future.result() for future in waiting}) == 1


class Held:
    """Keeps the judge from beginning: `began` is set when it wants to, and it waits for `go`."""

    def __init__(self, monkeypatch, checker):
        self.began, self.go, self.asked = threading.Event(), threading.Event(), []
        check = checker.check

        def held(solutions, reader=None):
            self.asked += [solution.question for solution in solutions]
            self.began.set()
            self.go.wait(60)
            return check(solutions, reader)

        monkeypatch.setattr(checker, "check", held)


@pytest.fixture
def held(monkeypatch, checker):
    held = Held(monkeypatch, checker)
    yield held
    held.go.set()


def message(answer):
    """Returns the message of an error in OpenAI's form."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == answer.status_code
    return error["message"]


def events(text):
    """Returns the names and data of server-sent events."""
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [
        (lines[0].removeprefix("event: ") if len(lines) > 1 else "", lines[-1][len("data: ") :])
        for lines in blocks
    ]


# --- answers --------------------------------------------------------------------------------------


def test_64_clients_at_once_get_what_the_judge_says_alone(served, checker):
    rng = np.random.default_rng(0)
    asked = []
    for i in range(64):
        a, b, c, d = rng.integers(0, 10, 4)
        steps = [f"{a} * {b} = {c} ; {c} - {d} = {(c - d) % 10}"] * (1 + i % 2)
        asked.append({"question": f"start {a} ; * {b} - {d} ?", "steps": steps, "id": f"s{i % 7}"})
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda body: served.post(body=body), asked))
    assert [answer.status_code for answer in answers] == [200] * 64
    named = enumerate(asked)  # in one batch every id is there once
    offline = checker.check([Solution(str(i), x["question"], tuple(x["steps"])) for i, x in named])
    for body, answer, expected in zip(asked, answers, offline, strict=True):
        found, fields = answer.json(), expected.to_fields() | {"id": body["id"]}
        assert found.pop("judge") == checker.judge.judge_id
        for ours, theirs in zip(found["chunks"], fields["chunks"], strict=True):
            # The rows of a batch are summed in another order.
            assert ours.pop("p_positive") == pytest.approx(theirs.pop("p_positive"), abs=1e-5)
        assert found == fields


def test_a_text_is_cut_and_may_be_streamed(served):
    whole = served.post().json()
    body = {"question": QUESTION, "solution": "\n\n".join(STEPS), "stream": True}
    answer = served.post(body=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = [(name, json.loads(data)) for name, data in events(answer.text)]
    names = [name for name, _ in found]
    assert names[0] == "begun" and names[-1] == "result"
    assert found[0][1] == {"chunks": STEPS} and found[-1][1] == whole
    for j, chunk in enumerate(whole["chunks"]):
        of_chunk = [(name, data) for name, data in found if data.get("chunk") == j]
        assert [name for name, _ in of_chunk].count("judged") == 1
        assert of_chunk[-1][1] == {"chunk": j} | {k: v for k, v in chunk.items() if k != "text"}
        written = "".join(data["text"] for name, data in of_chunk if name == "written")
        assert len(of_chunk) > 1 and chunk["reasoning"].startswith(written) and written


def test_votes_are_those_of_the_judge_whatever_they_are_batched_with(held, checker, monkeypatch):
    monkeypatch.setattr(checker, "settings", checker.settings.model_copy(update={"votes": 3}))
    other = {"question": QUESTION, "steps": ["2 * 6 = 2 ; 2 - 1 = 1"]}
    with serving(checker) as served, ThreadPoolExecutor(8) as pool:
        first = pool.submit(served.post)
        assert held.began.wait(60)
        rest = [pool.submit(served.post, body={**ASKED, "stream": True})]
        rest += [pool.submit(served.post, body=body) for body in (ASKED, other)]
        while len(served.worker._waiting) < 3:
            time.sleep(0.01)
        held.go.set()
        found = [x.result() for x in [first, *rest]]
    assert found[0].json() == found[2].json() == json.loads(events(found[1].text)[-1][1])
    offline = checker(QUESTION, STEPS)
    assert [c["reasoning"] for c in found[0].json()["chunks"]] == [
        c.completion for c in offline.chunks
    ]
    # The same ids, and so not together: the two that are equal are judged once.
    assert len(held.asked) == 4


# --- completions ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(checker):
    solution = checker.asked(Solution("x", QUESTION, tuple(STEPS)))
    return [checker.judge.prompt_ids(solution, j) for j in range(2)]


def test_our_client_of_such_servers_gets_what_the_engine_writes(served, checker, prompts):
    writer = checker.judge.writer
    engine = RemoteEngine(
        f"{served.url}/v1", checker.judge.judge_id, vocab_size=writer.tokenizer.vocab_size
    )
    params = writer.params(temperature=0.0)
    how = {"key": jax.random.key(0), "row_ids": ["a", "b"]}
    ours = writer.engine.generate(prompts, params, **how)
    theirs = engine.generate(prompts, params, **how)
    assert [x.tokens.tolist() for x in theirs] == [x.tokens.tolist() for x in ours]
    assert {x.stop_reason for x in theirs} == {StopReason.STOP_ID}

    drawn = writer.params(temperature=1.0, top_k=5)
    how["row_ids"] = [f"{p}/{g}" for p in range(2) for g in range(4)]
    once = engine.generate(prompts, drawn, **how, group_size=4)
    again = engine.generate(
        prompts[:1], drawn, **how | {"row_ids": how["row_ids"][:4]}, group_size=4
    )
    assert len({tuple(x.tokens) for x in once}) > 2
    for a, b in zip(once, again, strict=False):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def complete(served, prompt, **more):
    answer = served.post("/v1/completions", {"prompt": prompt, "max_tokens": 30, **more})
    assert answer.status_code == 200, answer.text
    return answer


def test_completions_in_the_words_of_openai_and_vllm(served, checker, prompts):
    (judged, _) = served.post().json()["chunks"]
    found = complete(served, prompts[0], temperature=0, n=2, logprobs=0).json()
    assert found["model"] == checker.judge.judge_id and found["object"] == "text_completion"
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    first, second = found["choices"]
    assert first["text"] == second["text"] == judged["reasoning"]
    assert first["finish_reason"] == "stop" and first["stop_reason"] is None
    assert "token_ids" not in first and set(first["logprobs"]["token_logprobs"]) == {0.0}
    read = found["usage"]
    assert read["prompt_tokens"] == len(prompts[0])
    assert read["total_tokens"] == read["prompt_tokens"] + read["completion_tokens"]

    (cut,) = complete(served, prompts[0], temperature=0, max_tokens=3).json()["choices"]
    assert cut["finish_reason"] == "length" and judged["reasoning"].startswith(cut["text"])
    (stopped,) = complete(served, prompts[0], temperature=0, stop=["|", "same"]).json()["choices"]
    assert stopped["stop_reason"] in ("|", "same")
    place = min(judged["reasoning"].find(x) % 1000 for x in ("|", "same"))
    assert stopped["text"] == judged["reasoning"][:place]
    end = checker.judge.writer.tokenizer.encode("|")
    how = {"stop_token_ids": end, "return_token_ids": True}
    (by_id,) = complete(served, prompts[0], temperature=0, **how).json()["choices"]
    assert by_id["stop_reason"] == end[0] == by_id["token_ids"][-1]
    assert by_id["prompt_token_ids"] == prompts[0]

    text = checker.judge.writer.tokenizer.decode(prompts[0])
    assert complete(served, text, temperature=0).json()["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize("more", [{}, {"stop": "|"}, {"temperature": 1, "seed": 3, "n": 2}])
def test_a_streamed_completion_adds_up_to_the_whole(served, prompts, more):
    more = {"temperature": 0, **more}
    whole = complete(served, prompts[0], **more).json()
    parts = events(complete(served, prompts[0], stream=True, **more).text)
    assert parts.pop() == ("", "[DONE]") and len(parts) > 1
    texts = ["" for _ in whole["choices"]]
    for _, data in parts:
        (choice,) = json.loads(data)["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_a_seed_gives_the_same_whatever_it_is_batched_with(served, prompts):
    how = {"temperature": 1.0, "seed": 5, "n": 3}
    alone = complete(served, prompts[0], **how).json()["choices"]
    with ThreadPoolExecutor(12) as pool:
        asked = [how, *({**how, "seed": seed} for seed in range(6)), how, {**how, "top_p": 0.9}]
        found = list(pool.map(lambda x: complete(served, prompts[0], **x).json(), asked))
    assert [found[i]["choices"] for i in (0, 6, 7)] == [alone] * 3
    assert found[1]["choices"] != alone


def test_ways_of_drawing_are_bounded(served, prompts, monkeypatch):
    """Each is a program that is compiled."""
    monkeypatch.setattr(worker, "MAX_WAYS", len(served.worker._ways))
    answer = served.post("/v1/completions", {"prompt": prompts[0], "top_k": 17})
    assert answer.status_code == 400 and "has compiled" in message(answer)
    complete(served, prompts[0], temperature=0)


def test_a_judge_that_writes_nothing_is_refused_completions(checker, monkeypatch):
    monkeypatch.setattr(worker, "Writer", int)
    with serving(checker) as served:
        answer = served.post("/v1/completions", {"prompt": "start"})
    assert answer.status_code == 400 and "writes no text: ask for /check" in message(answer)


def test_models_and_health(served, checker):
    (model,) = served.client.get("/v1/models").json()["data"]
    assert model["id"] == checker.judge.judge_id
    assert served.client.get("/health").json() == {"status": "ok"}


# --- hostile requests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "EOF while parsing"),
        (b"{", 400, "EOF while parsing"),
        (b"[]", 400, "Input should be"),
        (b"[" * 100_000, 400, "recursion limit"),
        (b'{"question": "\xff", "steps": ["y"]}', 400, "Invalid JSON"),
        (b'{"question": "\\ud800", "steps": ["y"]}', 400, "Invalid JSON"),
        ({"steps": STEPS}, 400, "question: Field required"),
        ({"question": QUESTION}, 400, "either 'steps' or 'solution', found neither"),
        ({**ASKED, "solution": "x"}, 400, "found both"),
        ({"question": QUESTION, "steps": "x"}, 400, "steps: Input should be a valid array"),
        ({"question": QUESTION, "steps": [1]}, 400, "steps.0: Input should be a valid string"),
        ({"question": QUESTION, "steps": []}, 400, "at least one chunk, found none"),
        ({"question": QUESTION, "steps": ["a", " "]}, 400, "found none in chunk 1"),
        ({"question": " ", "steps": ["a"]}, 400, "expected a problem"),
        ({"question": QUESTION, "solution": "<chunk> a"}, 400, "found unbalanced tags"),
        ({**ASKED, "stream": 1}, 400, "stream: Input should be a valid boolean"),
        ({**ASKED, "votes": 4}, 400, "votes: Extra inputs are not permitted"),
        ({"question": QUESTION, "steps": ["5 " * 200]}, 400, "exceeds the context of 192"),
        ({"question": QUESTION, "steps": ["5 " * 200], "stream": True}, 400, "the context of 192"),
        ({"question": QUESTION, "steps": ["5"] * 5000}, 400, "exceeds the context of 192"),
        ({"question": "5" * 2**19, "steps": ["5"]}, 413, "at most 524288 bytes"),
    ],
)
def test_what_cannot_be_checked_is_refused(served, body, status, says):
    answer = served.post(body=body)
    assert answer.status_code == status and says in message(answer)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": ""}, 400, "expected a prompt of at least one token"),
        ({"prompt": [1.5]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "expected token ids of the judge's tokenizer"),
        ({"prompt": [2**70]}, 400, "expected token ids of the judge's tokenizer"),
        ({"prompt": [3] * 180}, 400, "exceeds the context of 192"),
        ({"prompt": [3], "max_tokens": 0}, 400, "max_tokens: Input should be greater"),
        ({"prompt": [3], "max_tokens": 33}, 400, "writes at most 32"),
        ({"prompt": [3], "model": "gpt"}, 404, "expected the model 'arithmetic@"),
        ({"prompt": [3], "n": 33}, 400, "n: Input should be less"),
        ({"prompt": [3], "temperature": -1}, 400, "temperature: Input should be greater"),
        ({"prompt": [3], "temperature": 1e-9}, 400, "temperature: expected 0 or at least"),
        (b'{"prompt": [3], "temperature": NaN}', 400, "temperature"),
        (b'{"prompt": [3], "top_p": Infinity}', 400, "top_p"),
        ({"prompt": [3], "top_p": 0}, 400, "top_p: Input should be greater"),
        ({"prompt": [3], "top_k": True}, 400, "top_k: Input should be a valid integer"),
        ({"prompt": [3], "stop": [""]}, 400, "stop"),
        ({"prompt": [3], "stop": ["x"] * 5}, 400, "stop"),
        ({"prompt": [3], "stop": "é" * 33}, 400, "stop: expected at most 64 bytes"),
        ({"prompt": [3], "stop_token_ids": [99]}, 400, "expected token ids"),
        ({"prompt": [3], "seed": 2**63}, 400, "seed"),
        ({"prompt": [3], "logprobs": 5}, 400, "logprobs: Input should be less"),
        ({"prompt": [3], "echo": True}, 400, "echo: Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_completed_is_refused(served, body, status, says):
    answer = served.post("/v1/completions", body)
    assert answer.status_code == status and says in message(answer)


def test_other_paths_and_methods(served):
    answer = served.client.get("/../../etc/passwd?x=y")
    assert answer.status_code == 404 and message(answer) == "Not Found"
    assert served.client.get("/check").status_code == 405


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
    ],
)
def test_pages_of_other_sites_may_not_ask(served, headers, status):
    answer = served.client.get("/health", headers=headers)
    assert answer.status_code == status
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_key(checker, capfd):
    with serving(checker, access=Access(None, "s3cret")) as served:
        for sent in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            answer = served.client.get("/v1/models", headers=sent)
            assert answer.status_code == 401 and "expected the server's key" in message(answer)
        right = {"Authorization": "Bearer s3cret"}
        assert served.client.get("/v1/models", headers=right).status_code == 200
        assert served.client.get("/health", headers={"Host": "any"}).status_code == 200
        assert served.client.get("/").status_code == 200
        served.post(body={"question": "start 99", "steps": ["7777"]}, headers=right)
        served.post(body=b'{"question": 5151}', headers=right)
        served.client.get("/9292?q=6161", headers=right)
    said = "".join(capfd.readouterr())
    assert "POST /check 200" in said and "GET another path 404" in said
    assert not re.search("s3cret|start 99|7777|5151|9292|6161", said)


def test_the_key_is_a_word_of_the_environment(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    assert read_key() is None
    monkeypatch.setenv(KEY, "word")
    assert read_key() == "word"
    for wrong in ("", "two words", "wörd", "line\n"):
        monkeypatch.setenv(KEY, wrong)
        with pytest.raises(UserError, match="expected a word of printable ASCII"):
            read_key()


def test_a_failure_of_the_judge_takes_no_other_down(checker, monkeypatch, capfd):
    check = checker.check

    def fails(solutions, reader=None):
        if any("9 9" in solution.question for solution in solutions):
            raise RuntimeError(solutions[0].question)
        return check(solutions, reader)

    monkeypatch.setattr(checker, "check", fails)
    held = Held(monkeypatch, checker)
    with serving(checker) as served, ThreadPoolExecutor(4) as pool:
        first = pool.submit(served.post)
        held.began.wait(60)
        bad = pool.submit(served.post, body={**ASKED, "question": "9 9"})
        good = pool.submit(served.post, body={**ASKED, "question": "start 2 ?"})
        while len(served.worker._waiting) < 2:
            time.sleep(0.01)
        held.go.set()
        answer = bad.result()
        assert answer.status_code == 500 and "the judge failed" in message(answer)
        assert first.result().status_code == good.result().status_code == 200
    said = "".join(capfd.readouterr())
    assert "serve: RuntimeError" in said and "9 9" not in said


def test_a_failure_of_the_server_is_said_without_what_was_sent(served, monkeypatch, capfd):
    def fails(content, *_):
        raise RuntimeError(content)

    capfd.readouterr()
    monkeypatch.setattr(http, "read_body", lambda _, content: fails(content))
    answer = served.post(body=b"secret")
    assert answer.status_code == 500 and "the server failed" in message(answer)
    said = ""
    while "/check 500" not in said:  # the answer is sent before its line
        said += "".join(capfd.readouterr())
        time.sleep(0.01)
    assert "serve: RuntimeError" in said and "secret" not in said


# --- the queue ------------------------------------------------------------------------------------


def test_a_full_queue_and_requests_that_are_given_up(held, checker):
    with serving(checker, places=2, timeout=1.0) as served, ThreadPoolExecutor(8) as pool:
        first = pool.submit(served.post)
        assert held.began.wait(60)
        late = [pool.submit(served.post, body={**ASKED, "question": f"late {i}"}) for i in "ab"]
        while len(served.worker._waiting) < 2:
            time.sleep(0.01)
        full = served.post()
        assert full.status_code == 429 and full.headers["retry-after"] == "1"
        assert message(full) == "2 requests wait already: try again later"
        # They wait no longer than a second, and then hold no place.
        assert [x.result().status_code for x in [first, *late]] == [504] * 3
        assert not served.worker._waiting

        # A client that goes away holds none either.
        with socket.create_connection(served.address) as gone:
            body = json.dumps({**ASKED, "question": "gone"}).encode()
            gone.sendall(
                b"POST /check HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            )
            while not served.worker._waiting:
                time.sleep(0.01)
        while served.worker._waiting:
            time.sleep(0.01)
        held.go.set()
    assert held.asked == [QUESTION], "what was given up is not judged"


def test_an_idle_client_holds_no_place(checker, monkeypatch):
    monkeypatch.setattr(http, "CLIENT_SECONDS", 0.5)
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 5)
    header = b"POST /check HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
    with serving(checker) as served:
        beginnings = (b"", b"POST /che", header, header + b"\r\n{")
        idle = [socket.create_connection(served.address) for _ in beginnings]
        for connection, beginning in zip(idle, beginnings, strict=True):
            connection.sendall(beginning)
        found = []
        for connection in idle:
            connection.settimeout(60)
            found.append(b"".join(iter(lambda c=connection: c.recv(2**16), b"")))
            connection.close()
        assert found[:3] == [b""] * 3 and b" 408 " in found[3].split(b"\r\n")[0]
        assert b"no whole body in 0.5 seconds" in found[3]
        assert served.post().status_code == 200

        # Nor does one that does not read.
        with socket.create_connection(served.address) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
            while len(served.server.server_state.connections) > 1:
                time.sleep(0.05)


def test_a_stop_lets_accepted_requests_end(checker, held):
    """What a signal begins; that the process ends with 0, see below."""
    served = Served(checker)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(served.post)
        assert held.began.wait(60)
        waits = pool.submit(served.post, body={**ASKED, "question": "start 2 ?", "stream": True})
        while not served.worker._waiting:
            time.sleep(0.01)
        ending = pool.submit(served.end)
        while not served.worker.is_closed:
            time.sleep(0.01)
        with httpx2.Client(base_url=served.url) as client:
            new = client.post("/check", json=ASKED)
            assert new.status_code == 503 and "stopping" in message(new)
            assert client.get("/health").status_code == 503
        held.go.set()
        assert first.result().status_code == 200
        assert events(waits.result().text)[-1][0] == "result"
        ending.result()


@pytest.mark.slow
def test_sigterm_drains_the_command():
    command = [sys.executable, "-m", "stepwiser_jax", "serve", "--port", "0"]
    body = {"question": QUESTION, "steps": STEPS}
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        ThreadPoolExecutor(8) as pool,
    ):
        assert process.stderr is not None
        url = next(found[0] for x in process.stderr if (found := re.search("http://[^/]+", x)))
        with httpx2.Client(base_url=url, timeout=300) as client:
            asked = [pool.submit(client.post, "/check", json=body) for _ in range(8)]
            # The connections are taken in turn: when this one is answered, so are the others read.
            time.sleep(1)
            assert client.get("/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert {x.result().status_code for x in asked} == {200}
        assert process.wait(60) == 0


def test_the_first_client_waits_for_no_compilation():
    checker = Checker.load()
    warm_up(checker)
    compiled = set(checker.judge.compiled_shapes)
    assert compiled
    with serving(checker) as served:
        assert served.post().status_code == 200
    assert set(checker.judge.compiled_shapes) == compiled


# --- the page -------------------------------------------------------------------------------------


def test_the_page_allows_its_own_scripts_alone(served):
    answer = served.client.get("/")
    policy = answer.headers["content-security-policy"]
    assert policy == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'" and directives["connect-src"] == "'self'"
    assert "unsafe" not in directives["script-src"] + directives["style-src"]
    for text, directive in ((TEMML, "script-src"), (SCRIPT, "script-src"), (STYLE, "style-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in directives[directive] and f">{text}<" in answer.text
    markup = answer.text.replace(SCRIPT, "").replace(TEMML, "").replace(STYLE, "")
    assert not re.search(r"\son\w+\s*=|\sstyle=|javascript:|https?:", markup)
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in SCRIPT


def test_nothing_ends_the_page_s_data():
    text = page_of("<i>", needs_key=True, example={"question": "</script><b>", "solution": "x"})
    assert "<i>" not in text and text.count("<b>") == 0 and text.count("</script>") == 3


# --- parts ----------------------------------------------------------------------------------------


def test_rounds_have_no_name_twice():
    assert rounds("abacab", str) == [["a", "b", "c"], ["a", "b"], ["a"]]
    assert rounds([], str) == []


def test_a_text_grows_by_whole_characters(bpe_tokenizer):
    text = "wörter and 漢字, </chunk>"
    ids, growing = np.array(bpe_tokenizer.encode(text)), GrowingText(bpe_tokenizer)
    parts = [growing.more(ids[:n]) for n in range(1, len(ids) + 1)]
    assert "".join(parts) == text and "\ufffd" not in "".join(parts)
    held = GrowingText(bpe_tokenizer, held=5)
    assert "".join(held.more(ids[:n]) for n in range(1, len(ids) + 1)) == text[:-5]


def test_what_this_machine_alone_reaches():
    with listen("127.0.0.1", 0) as inside, listen("0.0.0.0", 0) as outside:
        assert is_loopback(inside) and not is_loopback(outside)
