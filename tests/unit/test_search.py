"""Search with planted policies and judges, on the embedded task, whose truth is exact."""

import dataclasses
import itertools
import re
import zlib
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import get_args

import jax
import numpy as np
import pytest
from flax import nnx
from sampled import Reference

from stepwiser_jax.config import Beams, StepwiserJudge
from stepwiser_jax.config_files import load_config
from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.params import Completion, SamplingParams, StopReason
from stepwiser_jax.inference.shapes import Shapes
from stepwiser_jax.judges.base import ChunkJudgment, Solution
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.model.flops import Spent
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.records import SearchResult, Verdict
from stepwiser_jax.search import report
from stepwiser_jax.search.chunk_search import Policy, append_chunk, search_chunks
from stepwiser_jax.search.methods import beam_search, chunk_reset, dvts
from stepwiser_jax.search.results import Found, check_answers, found_by_search, sample_solutions
from stepwiser_jax.search.state import Beam, Chunk, Hypothesis, SearchState
from stepwiser_jax.search.voting import AGGREGATES, best, in_first_words, vote
from stepwiser_jax.stages import search
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.tasks.mathematics import extract_answer
from stepwiser_jax.tasks.verifier import Verifier
from stepwiser_jax.text.chunks import CHUNK_CLOSE, chunk_ends, chunk_texts
from tiny import tiny_config

ROOM, CHUNK, JUDGE_TOKENS = 112, 24, 3
PROBLEMS = arithmetic.generate_problems(12, 0, "dev")


def rng_of(*parts):
    return np.random.default_rng(zlib.crc32(" ".join(map(str, parts)).encode()))


def completion_of(ids, reason, row_id="row"):
    """FLOPs are as many as tokens."""
    spent = Spent(len(ids), 0, len(ids))
    return Completion(row_id, np.array(ids), np.zeros(len(ids)), reason, spent=spent)


class Rows:
    """In place of a sampler: rows are lists of ids; `write(row id, ids)` says what comes next."""

    def __init__(self, write, rows):
        self.write, self.shapes, self.most = write, Shapes((rows,), (400,), 400), 0

    def prefill(self, prompts, min_tokens):
        return [list(prompt) for prompt in prompts]

    def branch(self, state, source_B):
        assert len(source_B) <= self.shapes.max_rows
        self.most = max(self.most, len(source_B))
        return [state[s] for s in source_B]

    def rewind(self, state, num_tokens_B):
        return [ids[:n] for ids, n in zip(state, num_tokens_B, strict=True)]

    def decode(self, state, params, *, key, row_ids, greedy_B):
        self.greedy = greedy_B
        completions = []
        for b, row_id in enumerate(row_ids):
            ids, reason = self.write(row_id, state[b])
            completions.append(completion_of(ids, reason, row_id))
            state[b] = state[b] + ids
        return completions, state


@pytest.fixture
def solver(word_tokenizer):
    """Writes a wrong result in two of five chunks, answers too early in one of ten, then ends."""

    def write(row_id, ids):
        question, _, solution = word_tokenizer.decode(ids[1:]).partition(" ?")
        value, operations = arithmetic.parse_question(question + " ?")
        state = arithmetic.State(operations, value)
        for chunk in re.findall(r"<chunk>.*?</chunk>", solution):
            state.advance(chunk)
        if "boxed" in solution:
            return [word_tokenizer.eos_ids[0]], StopReason.STOP_ID
        rng = rng_of(row_id, len(ids))
        if state.done == len(operations) or rng.random() < 0.1:
            text = arithmetic.answer_text(state.value)
        else:
            lines = list(arithmetic.exact_lines(state.value, operations[state.done]))
            if rng.random() < 0.4:
                last = lines[-1]
                lines[-1] = arithmetic.Line(last.left, last.op, last.right, (last.result + 1) % 10)
            text = arithmetic.chunk_text(lines)
        return word_tokenizer.encode(text), StopReason.STOP_STRING

    return write


def policy_of(tokenizer, sampler):
    params = SamplingParams(CHUNK, stop_ids=tokenizer.eos_ids, stop_strings=(CHUNK_CLOSE,))
    engine = SimpleNamespace(spent_on=partial(Spent.on, tiny_config()))
    loaded = Loaded(None, tokenizer, "fake")
    return Policy(loaded, engine, sampler, "bare", params, jax.random.key(3))


class Planted:
    """A judge whose P(+) of the last chunk is what `score(question, chunks)` says."""

    def __init__(self, score):
        self.score = score

    def __call__(self, solutions):
        found = []
        for solution in solutions:
            assert solution.start == len(solution.chunks) - 1
            p = self.score(solution.question, solution.chunks)
            verdict = Verdict.POSITIVE if p >= 0.5 else Verdict.NEGATIVE
            found.append([ChunkJudgment("", verdict, p, JUDGE_TOKENS, 7, 0.5)])
        return found


def oracle(question, chunks):
    return float(arithmetic.chunk_truth(question, chunks)[-1])


def noisy(question, chunks):
    """Leans to the truth; equal for equal solutions, and coarse, so that there are ties."""
    noise = rng_of(question, *chunks).random()
    return round(0.6 * noise + 0.4 * oracle(question, chunks), 1)


def accepts(question, chunks):
    return 1.0


def solve(tokenizer, write, judge, method, *, beams=1, rows=32, budget=None, aggregate="last"):
    engine = Rows(write, rows)
    trees = search_chunks(
        policy_of(tokenizer, engine),
        Planted(judge),
        PROBLEMS,
        method,
        num_beams=beams,
        aggregate=aggregate,
        max_new_tokens=ROOM,
        token_budget=budget,
    )
    assert [tree.problem for tree in trees] == PROBLEMS
    assert engine.most == min(rows // beams, len(PROBLEMS)) * beams, "rows are idle"
    return trees


def solutions_of(trees):
    return [[path.ids for path in tree.solutions] for tree in trees]


def accuracy(tokenizer, trees):
    policy = policy_of(tokenizer, None)
    answers = [found.answer for found in found_by_search(policy, "m", trees, Verifier())]
    return np.mean([a == tree.problem.answer for a, tree in zip(answers, trees, strict=True)])


# --- methods ------------------------------------------------------------------------------------


def test_a_judge_that_accepts_all_discards_nothing_and_one_beam_is_one_row(word_tokenizer, solver):
    plain = solve(word_tokenizer, solver, accepts, chunk_reset(5))
    for tree in plain:
        (path,) = tree.solutions
        assert tree.accepted_tokens == tree.policy_tokens == len(path.ids)
        assert tree.judge_tokens == JUDGE_TOKENS * len(path.nonempty_chunks)
    for method in (beam_search(1, 1), dvts(1, 1)):
        alone = solve(word_tokenizer, solver, accepts, method)
        assert solutions_of(alone) == solutions_of(plain)
        assert [t.judge_tokens for t in alone] == [t.judge_tokens for t in plain]


def test_a_judge_that_knows_the_truth_never_loses_to_one_that_accepts_all(word_tokenizer, solver):
    plain = solve(word_tokenizer, solver, accepts, chunk_reset(5))
    steered = solve(word_tokenizer, solver, oracle, chunk_reset(5))
    for before, after in zip(plain, steered, strict=True):
        texts = before.solutions[0].texts(word_tokenizer)
        if arithmetic.first_error(before.problem.question, texts) == -1:
            assert solutions_of([after]) == solutions_of([before])
    assert accuracy(word_tokenizer, plain) < 0.5 < accuracy(word_tokenizer, steered)
    for method in (beam_search(8, 4), dvts(8, 4)):
        found = solve(word_tokenizer, solver, oracle, method, beams=8, aggregate="product")
        assert accuracy(word_tokenizer, found) > 0.8
        for tree in found:
            if any(path.score == 1 for path in tree.solutions):
                assert accuracy(word_tokenizer, [tree]) == 1


def test_the_last_attempt_is_kept(word_tokenizer, solver):
    def rejects(question, chunks):
        return 0.0

    for attempts in (1, 3):
        for tree in solve(word_tokenizer, solver, rejects, chunk_reset(attempts)):
            (path,) = tree.solutions
            assert tree.judge_tokens == JUDGE_TOKENS * attempts * len(path.nonempty_chunks)
            assert (tree.policy_tokens > tree.accepted_tokens) == (attempts > 1)
            assert all(judgment.verdict is Verdict.NEGATIVE for judgment in path.judgments)


def test_a_policy_that_does_not_end_is_ended_while_a_chunk_fits(word_tokenizer):
    """All chunks are of one length, at which one more would be over."""
    text = word_tokenizer.encode("1 + " * 5 + CHUNK_CLOSE)
    for method, beams in ((chunk_reset(2), 1), (beam_search(4, 2), 4), (dvts(4, 2), 4)):
        trees = solve(
            word_tokenizer,
            lambda row_id, ids: (text, StopReason.STOP_STRING),
            lambda question, chunks: float(len(chunks) % 2),
            method,
            beams=beams,
        )
        for path in [path for tree in trees for path in tree.solutions]:
            assert ROOM - CHUNK < len(path.ids) <= ROOM - CHUNK + len(text)


@pytest.mark.parametrize("patterns", [(CHUNK_CLOSE,), ("\n\n",), (CHUNK_CLOSE, ";")])
def test_a_judge_sees_the_chunks_of_chunk_ends(bpe_tokenizer, patterns):
    """Random solutions, written chunk by chunk: an answer behind the last tag joins a chunk, and is
    judged nowhere, but solutions that differ by it stay two."""
    policy = policy_of(bpe_tokenizer, None)
    policy.params = SamplingParams(99, stop_strings=patterns)
    words = ["<chunk> a; b </chunk>", " c; ", "\n\n", "\\boxed{4}.", "<chunk> d", " </chunk>"]
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        ids = bpe_tokenizer.encode("<chunk> x " + "".join(rng.choice(words, 4)))
        path, start = Hypothesis("last"), 0
        ends = policy.chunk_matcher.ends(ids)
        for end in [*ends, *([len(ids)] if len(ids) not in ends else [])]:
            reason = StopReason.STOP_ID if end == len(ids) else StopReason.STOP_STRING
            path = append_chunk(policy, path, completion_of(ids[start:end], reason), 999)
            start = end
        ends = chunk_ends(ids, policy.chunk_matcher, bpe_tokenizer)
        expected = chunk_texts(bpe_tokenizer, ids, ends)
        assert path.texts(bpe_tokenizer) == expected
        assert sum(not chunk.joins_another for chunk in path.chunks) == len(expected)
        tree = SearchState(PROBLEMS[0], [], [])
        last = path.chunks[-1]
        other = dataclasses.replace(path, chunks=(*path.chunks[:-1], dataclasses.replace(last)))
        tree.collect_finished([Beam(path, 0, 0), Beam(other, 1, 1)])
        assert len(tree.solutions) == 1 + last.has_text
        seen.add((last.has_text, last.is_tail))
    assert (True, True) in seen or patterns == ("\n\n",)
    assert (True, False) in seen


# --- oracles: one problem at a time, on lists ---------------------------------------------------


def grow(write, prompt, tokenizer, judge, problem, parents):
    """(ids, chunk texts, score, is over, names of its chunks) of every parent with one more chunk;
    the score of one that adds no text is its parent's."""
    grown = []
    for k, (ids, texts, score, _, names) in enumerate(parents):
        row_id = f"search/{problem.problem_id}/c{len(texts)}/a{k}"
        new, reason = write(row_id, prompt + ids)
        over = reason == StopReason.STOP_ID
        if not over:
            texts, names = [*texts, tokenizer.decode(new)], [*names, object()]
            score = judge(problem.question, texts)
        ids = ids + new
        grown.append((ids, texts, score, over or len(ids) + CHUNK > ROOM, names))
    return grown


def add(found, grown):
    """Solutions of copies that end together are one."""
    for row in grown:
        if row[3] and all(row[4] != other[4] for other in found):
            found.append(row)


def slow_beams(write, prompt, tokenizer, judge, problem, beams, width):
    rows, found = [([], [], 0.0, False, [])] * beams, []
    while rows:
        grown = grow(write, prompt, tokenizer, judge, problem, rows)
        add(found, grown)
        alive = [row for row in grown if not row[3]]
        order = sorted(range(len(alive)), key=lambda i: (-alive[i][2], i))
        kept = [alive[i] for i in order[: beams // width]] if len(found) < beams else []
        rows = [row for _ in range(width) for row in kept]
    return [ids for ids, *_ in found]


def slow_subtrees(write, prompt, tokenizer, judge, problem, beams, width):
    subtrees = beams // width
    rows, found = {k: ([], [], 0.0, False, []) for k in range(beams)}, []
    while rows:
        grown = {}
        for k, row in rows.items():  # named by its place among all
            (grown[k],) = grow(
                lambda row_id, ids, k=k: write(row_id.replace("/a0", f"/a{k}"), ids),
                prompt, tokenizer, judge, problem, [row],
            )  # fmt: skip
        rows = {}
        for tree in range(subtrees):
            members = [grown[k] for k in range(tree, beams, subtrees) if k in grown]
            leader = max(members, key=lambda row: row[2], default=None)
            if leader is not None and leader[3]:
                add(found, members)
            elif leader is not None:
                rows |= {tree + copy * subtrees: leader for copy in range(width)}
        rows = dict(sorted(rows.items()))
    return [ids for ids, *_ in found]


@pytest.mark.parametrize(
    ("beams", "width", "aggregate"),
    [(4, 2, "last"), (8, 4, "product"), (6, 1, "min"), (2, 2, "mean")],
)
@pytest.mark.parametrize(
    ("method", "slow"), [(beam_search, slow_beams), (dvts, slow_subtrees)], ids=["beam", "dvts"]
)
def test_beams_are_those_of_one_problem_at_a_time(
    word_tokenizer, solver, method, slow, beams, width, aggregate
):
    def score(question, texts):
        scores = [noisy(question, texts[:end]) for end in range(1, len(texts) + 1)]
        return AGGREGATES[aggregate](scores)

    how = {"beams": beams, "rows": 20, "aggregate": aggregate}
    trees = solve(word_tokenizer, solver, noisy, method(beams, width), **how)
    for tree, found in zip(trees, solutions_of(trees), strict=True):
        arguments = (solver, tree.prompt_ids, word_tokenizer, score, tree.problem, beams, width)
        assert found == slow(*arguments)
        assert tree.accepted_tokens <= sum(map(len, found))
        assert tree.accepted_tokens <= tree.policy_tokens
    assert width == beams or max(len(tree.solutions) for tree in trees) > 1


def row(score, *, over, attempt):
    chunk = Chunk([1], True, judgment=ChunkJudgment("", Verdict.POSITIVE, score, 1))
    return Beam(Hypothesis("last", (chunk,), over), attempt, source=attempt)


def test_when_beams_end():
    """A beam search with enough solutions, whatever goes on; a subtree with its best row alone."""
    rows = [
        row(0.2, over=True, attempt=0),
        row(0.9, over=False, attempt=1),
        row(0.3, over=True, attempt=2),
    ]
    for beams, going_on in ((4, 2), (2, 0)):
        tree = SearchState(PROBLEMS[0], [1], [])
        assert len(beam_search(beams, 2)(tree, rows)) == going_on
        assert len(tree.solutions) == 2
    tree = SearchState(PROBLEMS[0], [1], [])
    assert [(r.source, r.attempt) for r in dvts(3, 3)(tree, rows)] == [(1, 0), (1, 1), (1, 2)]
    assert not tree.solutions
    assert dvts(3, 3)(tree, [*rows[:2], row(0.9, over=True, attempt=2)])[0].source == 1
    assert dvts(3, 3)(tree, [*rows[:2], row(1.0, over=True, attempt=2)]) == []
    assert [path.score for path in tree.solutions] == [0.2, 1.0]


def test_rows_of_equal_scores_stay_different(word_tokenizer, solver):
    """Of two rows that are kept, copies take turns, so that the next two are not of one parent."""
    trees = solve(word_tokenizer, solver, accepts, beam_search(8, 4), beams=8)
    first = [{path.chunks[0] for path in tree.solutions} for tree in trees]
    assert max(map(len, first)) == 2, "what two rows began"
    for tree in trees:
        written = sum(len(path.ids) for path in tree.solutions)
        assert (tree.accepted_tokens < written) == (len(tree.solutions) > len(first[0]))


@pytest.mark.parametrize(
    ("method", "beams"), [(chunk_reset(3), 1), (beam_search(4, 2), 4)], ids=["reset", "beam"]
)
def test_a_cache_that_goes_back_and_branches_is_one_that_is_read_anew(
    word_tokenizer, method, beams
):
    """With a model: what a row writes is what a fresh row with its name and its tokens writes."""
    vocabulary = len(word_tokenizer.token_bytes())
    model = Transformer(tiny_config(vocab_size=vocabulary), rngs=nnx.Rngs(0))
    fresh = Reference(model, word_tokenizer, rows=(1,), buckets=(96,))

    def write(row_id, ids):
        (out,) = fresh.generate([ids], params, key=jax.random.key(3), row_ids=[row_id])
        return out.tokens.tolist(), out.stop_reason

    def judge(question, chunks):
        return round(rng_of(*chunks).random(), 1)

    sampler = Reference(model, word_tokenizer, rows=(4, 8), buckets=(96,))
    policies = [policy_of(word_tokenizer, s) for s in (sampler, Rows(write, 8))]
    params = SamplingParams(8, stop_ids=word_tokenizer.eos_ids, stop_strings=(CHUNK_CLOSE,))
    found = []
    for policy in policies:
        policy.params = params
        trees = search_chunks(
            policy, Planted(judge), PROBLEMS[:3], method, num_beams=beams, max_new_tokens=40
        )
        found.append(solutions_of(trees))
        assert sum(tree.policy_tokens - tree.accepted_tokens for tree in trees) > 0
    assert found[0] == found[1]
    assert len(sampler.engine.compiled_shapes) <= 1 + 3 + 2, "prefill, branches, decodes"


# --- the first attempt --------------------------------------------------------------------------


def test_a_greedy_first_attempt_that_is_accepted_is_greedy_decoding(word_tokenizer, monkeypatch):
    """With a model: the same tokens, read and written once. A second attempt is sampled."""
    vocabulary = len(word_tokenizer.token_bytes())
    model = Transformer(tiny_config(vocab_size=vocabulary), rngs=nnx.Rngs(0))
    sampler = Reference(model, word_tokenizer, rows=(4,), buckets=(96,))
    policy = policy_of(word_tokenizer, sampler)
    policy.params = SamplingParams(8, stop_ids=word_tokenizer.eos_ids, stop_strings=(CHUNK_CLOSE,))

    def found(score, max_attempts, first_attempt):
        return search_chunks(
            policy, Planted(score), PROBLEMS[:3], chunk_reset(max_attempts),
            max_new_tokens=40, first_attempt=first_attempt,
        )  # fmt: skip

    trees = found(accepts, 5, "greedy")
    params = SamplingParams(40, temperature=0.0, stop_ids=word_tokenizer.eos_ids)
    row_ids = [problem.problem_id for problem in PROBLEMS[:3]]
    prompts = [policy.prompt_ids(problem) for problem in PROBLEMS[:3]]
    greedy = sampler.generate(prompts, params, key=policy.key, row_ids=row_ids)
    for tree, prompt, completion in zip(trees, prompts, greedy, strict=True):
        (ids,) = solutions_of([tree])[0]
        whole = completion.tokens.tolist()
        assert ids == whole[: len(ids)] and (len(ids) > 40 - 8 or ids == whole)
        alone = Spent.on(tiny_config(vocab_size=vocabulary), read=len(prompt), generated=len(ids))
        assert (tree.policy.read, tree.policy.generated) == (len(prompt), len(ids))
        assert tree.policy.flops == alone.flops
    asked, decode = {}, sampler.decode

    def seen(*arguments, row_ids, greedy_B, **how):
        asked.update(zip(row_ids, greedy_B or [None] * len(row_ids), strict=True))
        return decode(*arguments, row_ids=row_ids, greedy_B=greedy_B, **how)

    monkeypatch.setattr(sampler, "decode", seen)
    again = found(lambda question, chunks: 0.0, 2, "greedy")
    assert all(is_greedy == row_id.endswith("/a0") for row_id, is_greedy in asked.items())
    assert set(asked.values()) == {True, False} and solutions_of(again) != solutions_of(trees)
    asked.clear()
    found(lambda question, chunks: 0.0, 2, "sampled")
    assert set(asked.values()) == {None}


def test_a_retry_that_writes_the_same_again_is_refused(request):
    file = request.config.rootpath / "configs" / "smoke_search.yaml"
    for sets in ((), ("first_attempt=greedy",)):
        with pytest.raises(UserError, match="again word for word"):
            load_config("search", file, ("sampling.temperature=0", "max_attempts=2", *sets))
    greedy = ("sampling.temperature=0", "max_attempts=1", "beam=null", "dvts=null")
    load_config("search", file, greedy)
    for name in ("beam", "dvts"):
        with pytest.raises(UserError, match=f"with {name}.beams above 1.*again word for word"):
            load_config("search", file, (*greedy, f"{name}={{beams: 4, width: 2}}"))
        load_config("search", file, (*greedy, f"{name}={{beams: 1, width: 1}}"))


# --- what is read -------------------------------------------------------------------------------


def test_a_search_pays_for_its_prompt_once_and_for_every_judgment(word_tokenizer, solver):
    for method, beams in ((chunk_reset(5), 1), (beam_search(4, 2), 4)):
        for tree in solve(word_tokenizer, solver, noisy, method, beams=beams):
            assert tree.policy.read == len(tree.prompt_ids)
            prompt = Spent.on(tiny_config(), read=len(tree.prompt_ids))
            assert tree.policy == prompt + Spent(tree.policy_tokens, 0, tree.policy_tokens)
            judgments = tree.judge_tokens // JUDGE_TOKENS
            assert (tree.judge.read, tree.judge.flops) == (7 * judgments, 0.5 * judgments)


def test_votes_read_their_problem_once_and_plain_sampling_too():
    samples = [
        dataclasses.replace(
            result(answer, answer == "1", 10, [0.5], 3), policy_read_tokens=20,
            policy_flops=30.0, prompt_flops=20.0, scoring_read_tokens=7, scoring_flops=5.0,
        )
        for answer in ("1", "2", "2")
    ]  # fmt: skip
    vote = report.by_majority(None, samples)
    assert (vote.policy_read_tokens, vote.judge_read_tokens, vote.flops) == (20, 0, 20 + 3 * 10)
    for judged in (report.by_best(None, samples, "min"), report.by_weight(None, samples, "min")):
        assert (judged.policy_read_tokens, judged.judge_read_tokens) == (20, 21)
        assert judged.flops == 20 + 3 * 10 + 3 * 5


# --- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "beams"),
    [(chunk_reset(5), 1), (beam_search(4, 2), 4), (dvts(4, 2), 4)],
    ids=["reset", "beam", "dvts"],
)
def test_a_larger_budget_judges_and_discards_no_less(word_tokenizer, solver, method, beams):
    budgets = [1, 20, 60, 120, 240, 10**6, None]
    runs = [solve(word_tokenizer, solver, noisy, method, beams=beams, budget=b) for b in budgets]
    assert solutions_of(runs[-1]) == solutions_of(runs[-2])
    for budget, trees in zip(budgets, runs, strict=True):
        for tree in trees:
            assert tree.solutions, "there always is one"
            step = beams * (CHUNK + JUDGE_TOKENS)
            if budget:
                assert tree.policy_tokens + tree.judge_tokens <= budget + step + ROOM
    for less, more in itertools.pairwise(runs):
        for a, b in zip(less, more, strict=True):
            assert a.judge_tokens <= b.judge_tokens
            if beams == 1:
                assert a.policy_tokens - a.accepted_tokens <= b.policy_tokens - b.accepted_tokens
    assert all(tree.judge_tokens == JUDGE_TOKENS * beams for tree in runs[0]), "one step"
    assert all(len(tree.solutions) == 1 for tree in runs[0])


def result(answer, is_correct, tokens=10, scores=(), scoring=0, method="m"):
    return SearchResult(
        "s", "p", method, answer, is_correct, "", tokens, 0, 0, 0, tuple(scores), scoring
    )


def test_samples_that_a_budget_pays_for():
    samples = [result(str(k), False, tokens=10 * (k + 1)) for k in range(4)]
    costs = [sample.policy_tokens for sample in samples]
    used = {b: len(report.affordable(b, samples, costs)) for b in (1, 10, 29, 30, 99, 100, None)}
    assert used == {1: 1, 10: 1, 29: 1, 30: 2, 99: 3, 100: 4, None: 4}


# --- votes and best-of-N ------------------------------------------------------------------------


def test_votes_and_the_best_of_random_samples():
    """Against a count by hand, over samples with ties and without answers."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 8))
        answers = [str(a) if a else "" for a in rng.integers(0, 4, n)]
        weights = (rng.integers(0, 5, n) / 4).tolist()
        sums = {a: sum(w for b, w in zip(answers, weights, strict=True) if b == a)
                for a in answers if a}  # fmt: skip
        voted = vote(answers, weights)
        assert voted == next((a for a in sums if sums[a] == max(sums.values())), "")
        counts = Counter(a for a in answers if a)
        assert vote(answers) == vote(answers, [0.25] * n)
        assert counts[vote(answers)] == max(counts.values(), default=0)
        assert best(weights) == weights.index(max(weights))
    scores = [0.5, 0.25, 0.75]
    found = {name: aggregate(scores) for name, aggregate in AGGREGATES.items()}
    assert found == {"min": 0.25, "mean": 0.5, "last": 0.75, "product": 0.5 * 0.25 * 0.75}


def test_best_of_one_is_the_first_sample_and_costs_its_judgment():
    samples = [result("1", False, 10, [0.1, 0.9], 6), result("2", True, 20, [0.4, 0.4], 7)]
    for name in AGGREGATES:
        first = report.by_best(None, samples[:1], name)
        assert (first.right, first.policy_tokens, first.judge_tokens) == (0.0, 10, 6)
        assert first.rejected_tokens == 0
    right = {name: report.by_best(None, samples, name).right for name in AGGREGATES}
    assert right == {"min": 1.0, "mean": 0.0, "last": 0.0, "product": 1.0}
    both = report.by_best(None, samples, "min")
    assert (both.policy_tokens, both.judge_tokens, both.rejected_tokens) == (30, 13, 10)
    voted = report.by_weight(None, samples, "mean")
    assert (voted.right, voted.judge_tokens, voted.rejected_tokens) == (0.0, 13, 0)
    assert report.by_weight(42, samples, "min").samples == 1, "30 + 13 tokens are too many"
    assert report.by_weight(43, samples, "min").samples == 2
    plain = report.by_majority(30, samples)
    assert (plain.judge_tokens, plain.samples) == (0, 2), "votes alone are not judged"


def test_answers_that_mean_the_same_vote_together():
    """Half of the votes are for one half, in four forms; the string "3" is the most frequent."""
    half, other = PROBLEMS[0], PROBLEMS[1]
    answers = ["\\frac{1}{2}", "3", "0.5", "", "$\\frac12$", "3", "1/2"]
    thirds = ["1/3", "\\frac{1}{2}", "\\frac13", "1/2"]
    with Verifier(workers=2) as verifier:
        words = in_first_words([half] * 7 + [other], [*answers, "1/2"], verifier)
        pairs = in_first_words([half] * 4, thirds, verifier)
        again = in_first_words([half] * 7, words[:7], verifier)
    one = "\\frac{1}{2}"
    assert words == [one, "3", one, "", one, "3", one, "1/2"], "problems do not share answers"
    assert again == words[:7]
    assert pairs == [thirds[0], thirds[1], thirds[0], thirds[1]]
    assert vote(answers) == "3" and vote(words[:7]) == one
    found = [
        Found(half, f"sample{k}", answer, f"\\boxed{{{answer}}}", 10, Spent(10))
        for k, answer in enumerate(answers)
    ]
    with Verifier(workers=2) as verifier:
        samples = check_answers(
            [
                dataclasses.replace(x, problem=dataclasses.replace(half, answer="0.50"))
                for x in found
            ],
            verifier,
        )
    assert [sample.is_correct for sample in samples] == [bool(a) and a != "3" for a in answers]
    assert report.by_majority(None, samples).right == 1.0


class Meanings:
    """In place of a verifier: answers mean the same if they begin alike; `slow` ones take too long.
    Keeps what is asked."""

    compares_meanings = True

    def __init__(self, slow=()):
        self.slow, self.asked = set(slow), []

    def same(self, answers, references):
        pairs = list(zip(answers, references, strict=True))
        self.asked += pairs
        return [None if self.slow & set(pair) else pair[0][0] == pair[1][0] for pair in pairs]


def test_an_answer_is_compared_with_the_first_of_each_meaning_alone():
    a, b = PROBLEMS[:2]
    verifier = Meanings()
    words = in_first_words([a, a, b, a, a, a], ["x1", "y1", "y2", "x2", "x1", "y2"], verifier)
    assert words == ["x1", "y1", "y2", "x1", "x1", "y1"]
    assert verifier.asked == [
        *[("y1", "x1"), ("x2", "x1"), ("x1", "x2")],  # the reverse after an acceptance only
        *[("y2", "x1"), ("y2", "y1"), ("y1", "y2")],
    ]


@pytest.mark.parametrize("place", [0, 1, 4])
def test_an_answer_that_takes_too_long_costs_one_deadline(place):
    """Wherever it comes, and though it might be compared with all others."""
    answers = ["u1", "v1", "w1", "v2", "w2", "u2"]
    answers.insert(place, "slow")
    verifier = Meanings(slow=["slow"])
    words = dict(zip(answers, in_first_words([PROBLEMS[0]] * 7, answers, verifier), strict=True))
    assert sum("slow" in pair for pair in verifier.asked) == 1
    assert words["slow"] == "slow" and words["v2"] == "v1" and words["w2"] == "w1"


def test_what_votes_ask_is_not_among_the_time_outs_of_solutions():
    answers = ["\\frac12", "7^{9^{9^{9}}}", "1/3", "3^{9^{9^{9}}}"]
    with Verifier(timeout_seconds=0.5) as verifier:
        assert verifier.same(answers[1:2], answers[:1]) == [None]
        assert in_first_words([PROBLEMS[0]] * 4, answers, verifier) == answers
        assert verifier.timeouts == verifier.failures == 0


def test_a_verifier_of_ones_own_joins_equal_texts_only():
    """It may accept many answers, whatever the reference is: their votes are not one."""
    with Verifier("stand_in_verifiers:is_seven") as verifier:
        words = in_first_words([PROBLEMS[0]] * 4, ["8", "7", "7.0", "7"], verifier)
    assert words == ["8", "7", "7.0", "7"]


def test_majority_ignores_samples_without_an_answer():
    none, right, wrong = result("", False), result("3", True), result("4", False)
    rows = [[none, none, right], [wrong, right, right], [wrong, right, none], [none, none, none]]
    voted = [report.by_majority(None, samples) for samples in rows]
    assert [solved.right for solved in voted] == [1, 1, 0, 0]
    assert {solved.policy_tokens for solved in voted} == {30}


def test_the_answer_of_beams_is_that_of_the_largest_sum_of_scores(word_tokenizer, solver):
    trees = solve(word_tokenizer, solver, noisy, dvts(8, 2), beams=8)
    policy = policy_of(word_tokenizer, None)
    results = found_by_search(policy, "dvts", trees, Verifier())
    for tree, found in zip(trees, results, strict=True):
        texts = [word_tokenizer.decode(path.ids) for path in tree.solutions]
        sums = Counter()
        for text, path in zip(texts, tree.solutions, strict=True):
            sums[extract_answer(text)] += path.score
        assert sums[found.answer] == max(sums.values())
        assert extract_answer(found.completion) == found.answer
        assert found.accepted_tokens + found.rejected_tokens == tree.policy_tokens
        assert found.rejected_tokens > 0
        assert len(found.chunk_scores) == found.completion.count(CHUNK_CLOSE)
    assert max(len(tree.solutions) for tree in trees) > 1


def test_the_record_of_chunk_reset_holds_every_attempt(word_tokenizer, solver):
    trees = solve(word_tokenizer, solver, noisy, chunk_reset(5))
    results = found_by_search(policy_of(word_tokenizer, None), "chunk_reset", trees, Verifier())
    assert any(not attempt.is_kept for found in results for attempt in found.attempts)
    for tree, found in zip(trees, results, strict=True):
        kept = [attempt for attempt in found.attempts if attempt.is_kept]
        assert " ".join(attempt.text for attempt in kept) == found.completion
        assert [attempt.num_before for attempt in kept] == list(range(len(kept)))
        judged = [attempt for attempt in found.attempts if attempt.verdict is not None]
        assert len(judged) * JUDGE_TOKENS == tree.judge_tokens
        assert found.chunk_scores == tuple(x.p_positive for x in judged if x.is_kept)
        for attempt in found.attempts:
            if not attempt.is_kept:
                assert attempt.verdict is Verdict.NEGATIVE and attempt.attempt < 4
    beams = solve(word_tokenizer, solver, noisy, beam_search(4, 2), beams=4)
    of_beams = found_by_search(policy_of(word_tokenizer, None), "beam", beams, Verifier())
    assert all(found.attempts == () for found in of_beams)


def test_summary_compares_methods_on_all_problems(request, monkeypatch):
    file = request.config.rootpath / "configs" / "smoke_search.yaml"
    config = load_config("search", file, ("majority=[2]", "best_of=[1, 2]", "dvts=null"))
    assert search.search_ids(config, PROBLEMS[:1]) == [
        f"{PROBLEMS[0].problem_id}/{name}"
        for name in ("greedy", "chunk_reset", "beam", "sample0", "sample1")
    ]

    def problem(name, *right):
        return [
            SearchResult(
                f"{name}/{method}", name, method, str(is_right), is_right, "",
                10, 5 * steered, 7 * steered, 0, (0.5 + i / 10,), 3,
            )
            for i, (method, is_right, steered) in enumerate(
                zip(
                    ("greedy", "chunk_reset", "beam", "sample0", "sample1"),
                    right,
                    (0, 1, 1, 0, 0),
                    strict=True,
                )
            )
        ]  # fmt: skip

    results = problem("a2", True, True, False, False, True)
    results += problem("a10", False, True, True, False, True)
    summary = report.summarize(config, results)
    accuracies = {name: summary[name]["accuracy"] for name in ("greedy", "chunk_reset", "beam")}
    assert accuracies == {"greedy": 0.5, "chunk_reset": 1.0, "beam": 0.5}
    assert summary["plain"]["accuracy"] == 0.5
    assert summary["majority"]["2"]["accuracy"] == 0.0, "the first of equals"
    assert summary["chunk_reset"]["rejected_tokens"] == 5
    assert summary["chunk_reset"]["policy_tokens"] == 15
    for aggregate in AGGREGATES:
        assert summary["best_of"][aggregate]["1"]["accuracy"] == 0.0
        assert summary["best_of"][aggregate]["2"]["accuracy"] == 1.0
        assert summary["best_of"][aggregate]["2"]["judge_tokens"] == 6
        assert summary["weighted_majority"][aggregate]["2"]["rejected_tokens"] == 0
    assert summary["majority"]["2"]["judge_tokens"] == 0
    for flops, at_most, above in ((9, None, 1), (10, 1, 2), (29, 1, 2), (30, 2, None)):
        costing = [
            dataclasses.replace(x, policy_flops=10.0 + 10 * (x.method == "sample1"))
            if x.method.startswith("sample") else dataclasses.replace(x, judge_flops=float(flops))
            for x in results
        ]  # fmt: skip
        found = report.summarize(config, costing)["majority_at_equal_flops"]
        assert [row and row["samples"] for row in found.values()] == [at_most, above]
        assert list(found) == ["at_most", "next"]
        assert [row["flops"] for row in found.values() if row] == [
            10 * k * (k + 1) / 2 for k in (at_most, above) if k
        ]
    monkeypatch.setattr(report, "accuracy", lambda right, seed: {"accuracy_interval": right})
    backwards = report.summarize(config, results[::-1])
    assert backwards["greedy"]["accuracy_interval"] == [1, 0], "in id order, whoever wrote which"


def test_every_aggregate_has_its_setting():
    assert get_args(Beams.model_fields["aggregate"].annotation) == tuple(AGGREGATES)


# --- opinions -----------------------------------------------------------------------------------


def test_votes_make_one_opinion():
    kinds = (Verdict.POSITIVE, Verdict.NEGATIVE, Verdict.UNPARSED, Verdict.POSITIVE)
    votes = [ChunkJudgment(kind.value, kind, float(kind is Verdict.POSITIVE), 4) for kind in kinds]
    opinion = ChunkJudgment.of_votes(votes)
    assert (opinion.verdict, opinion.p_positive, opinion.num_tokens) == (Verdict.POSITIVE, 0.5, 16)
    assert ChunkJudgment.of_votes(votes[:2]).verdict is Verdict.NEGATIVE


def test_a_judge_reads_problem_and_history_once():
    """All chunks at once as in `evaluate`, and one after another as in a search: the same judgments
    as from whole prompts. What each counts is the same too, also if the engine reads all anew. A
    search that begins reads its problem, whoever has judged it before."""
    settings = {"path": "arithmetic", "prompt_style": "bare", "sampling": {"max_new_tokens": 6}}
    engine = {"rows": [4, 16], "buckets": [192]}
    judge = load_judge(
        StepwiserJudge.model_validate(settings | {"engine": engine}), mesh=make_mesh(), seed=0
    )
    solutions = []
    for problem in PROBLEMS[:3]:
        value, operations = arithmetic.parse_question(problem.question)
        lines = [list(arithmetic.exact_lines(value, operation)) for operation in operations]
        chunks = [arithmetic.chunk_text(of_chunk) for of_chunk in lines]
        solutions.append(Solution(problem.problem_id, problem.question, chunks, separator=""))

    def spent(found):
        return [[j.spent for j in of_one] for of_one in found]

    prompts = [[judge.prompt_ids(x, j) for j in range(len(x.chunks))] for x in solutions]
    once = [len(of_one[-1]) + len(of_one) - 1 for of_one in prompts]
    together = judge(solutions)
    assert [sum(s.read for s in of_one) for of_one in spent(together)] == once
    assert [of_one[0].read for of_one in spent(together)] == [len(p[0]) for p in prompts]
    assert min(map(len, prompts)) > 1
    assert judge.writer.engine.usage.spent.read == sum(once)
    texts = [[j.completion for j in of_one] for of_one in together]
    for _ in range(2):
        steps = [[] for _ in solutions]
        for j in range(max(map(len, prompts))):
            asked = [p for p in range(3) if j < len(prompts[p])]
            parts = [
                dataclasses.replace(x, chunks=x.chunks[: j + 1], start=j)
                for x in (solutions[p] for p in asked)
            ]
            for p, found in zip(asked, judge(parts), strict=True):
                steps[p] += found
        assert spent(steps) == spent(together)
        assert [[j.completion for j in of_one] for of_one in steps] == texts
    alone = [[judge([dataclasses.replace(x, chunks=x.chunks[: j + 1], start=j)])[0][0]
              for j in reversed(range(len(x.chunks)))] for x in solutions]  # fmt: skip
    assert [[j.completion for j in of_one[::-1]] for of_one in alone] == texts
    assert [of_one[::-1] for of_one in spent(alone)] == spent(together)


def test_another_chunk_in_the_same_place_reads_no_history():
    settings = {"path": "arithmetic", "prompt_style": "bare", "sampling": {"max_new_tokens": 2}}
    engine = {"rows": [2], "buckets": [192]}
    judge = load_judge(
        StepwiserJudge.model_validate(settings | {"engine": engine}), mesh=make_mesh(), seed=0
    )
    chunk, question = "<chunk> 4 * 7 = 8 </chunk>", "start 4 ; * 7 * 7 ?"
    for start, known in ((0, f"<bos> {question}"), (1, f"<bos> {question} {chunk}")):
        solution = Solution("s", question, [chunk] * 2, start, separator="")
        (first, *_), (other, *_) = judge(
            [solution, dataclasses.replace(solution, solution_id="t", is_begun=True)]
        )
        prompt = judge.prompt_ids(solution, start)
        assert other.read_tokens == len(prompt) - len(known.split())
        assert first.read_tokens == (len(chunk.split()) + 1 if start else len(prompt))


@pytest.mark.parametrize(
    ("method", "beams"), [(chunk_reset(3), 1), (beam_search(4, 2), 4)], ids=["reset", "beam"]
)
def test_the_first_chunk_in_a_place_pays_for_the_history(word_tokenizer, solver, method, beams):
    """Before every other attempt or beam with the same chunks before it."""
    judge, asked = Planted(noisy), []

    def recording(solutions):
        asked.extend(solutions)
        return judge(solutions)

    policy = policy_of(word_tokenizer, Rows(solver, 32))
    how = {"num_beams": beams, "max_new_tokens": ROOM}
    search_chunks(policy, recording, PROBLEMS, method, **how)
    begun = Counter(x.is_begun for x in asked)
    if beams == 1:
        assert all(x.is_begun != x.solution_id.endswith("/a0") for x in asked)
    for place in {(x.question, x.start) for x in asked}:
        in_place = [x for x in asked if (x.question, x.start) == place]
        histories = {tuple(x.chunks[:-1]) for x in in_place}
        assert len(histories) <= sum(not x.is_begun for x in in_place) <= max(1, beams // 2)
        assert not in_place[0].is_begun
    assert begun[True] and begun[False]


def test_the_first_sample_pays_for_the_reading_of_its_problem(word_tokenizer):
    asked = []

    def judge(solutions):
        asked.extend(solutions)
        return [[ChunkJudgment("", Verdict.POSITIVE, 0.5, 3) for _ in x.chunks] for x in solutions]

    def generate(prompts, params, *, key, row_ids, group_size):
        ids = word_tokenizer.encode("<chunk> 4 * 7 = 8 </chunk>")
        return [completion_of(ids, StopReason.STOP_ID, row_id) for row_id in row_ids]

    policy = policy_of(word_tokenizer, None)
    policy.engine.generate = generate
    names = ["sample0", "sample1", "sample2"]
    found = sample_solutions(policy, judge, PROBLEMS[:2], policy.params, names, 2)
    assert [(x.problem.problem_id, x.method) for x in found] == [
        (problem.problem_id, name) for problem in PROBLEMS[:2] for name in names
    ]
    assert [x.is_begun for x in asked] == [False, True] * 2
    assert [x.scoring.generated for x in found] == [3, 3, 0] * 2
