"""Ways to spend tokens on a problem, with a judge (StepWiser 4.3) and without, side by side.

    greedy, plain samples                    no judge
    majority of k                            votes of the first k samples
    best of k, weighted majority of k        the first k samples, their chunks judged
    chunk-reset, beam search, DVTS           the judge steers the policy (`search.methods`)

Every sample is judged once for all methods. Best of k takes the sample with the highest min, mean,
last or product of its chunks' scores, the first of equals. The weighted majority sums that score
over the samples with the same answer. Answers are the same if they mean the same to `mathematics`,
in whatever words; with another verifier, if their texts are equal. Beam search and DVTS answer by
the weighted majority of the solutions that they find, weighed by the aggregate that ranked them.

Where the paper is silent:

1. After `max_attempts` rejections the last attempt is kept, and counted as a forced chunk.
2. A judgment without a verdict accepts the chunk: it is no reason to spend more tokens.
3. Cost counts the tokens that policy and judge generate, those that they read, and the FLOPs of
   both. What is in a cache is not read again: samples of a problem share the reading of its
   prompt, and a chunk that is taken back leaves the rest of its row. StepWiser's judge and
   ThinkPRM's read problem and history once, for the first of the samples, beams or attempts that
   share them; the others read a prompt for every chunk. A classifier's judgment is one token.
   Tokens are rejected if they are in no solution that is chosen or votes: a chunk that was taken
   back, a beam that was pruned, all samples except the best of k.

`majority_at_equal_flops` compares votes and chunk-reset at equal FLOPs: it has the largest majority
that takes at most as many as chunk-reset does in the mean, and the next larger one. It is made of
the samples that are there: if there is no next one, ask for more.

With a `token_budget` B for what policy and judge write about a problem:

    majority, best of k, weighted majority   the first samples that fit B, judgments included if
                                             they are used; at least one, at most k
    chunk-reset, beam search, DVTS           judge and branch until B is spent, and finish

Among samples only the first may exceed B. A steered method may exceed it by one step and the rest
of one solution, so compare the tokens in `summary.json`, not B. If the `samples` of a row is k, B
did not limit it: ask for more samples to compare equal budgets.

Leaves out, and counts, problems whose reference answer cannot be verified. Reads `problems`,
`policy` and `judge`. Writes search results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from stepwiser_jax import plugins
from stepwiser_jax.config import Search
from stepwiser_jax.data.problems import read_verifiable
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.inference.chunk_sampler import ChunkSampler
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.judges.base import Judge
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.records import Problem, SearchResult
from stepwiser_jax.runs.blocks import Session, Work, run_blocks
from stepwiser_jax.search.chunk_search import Policy, search_chunks
from stepwiser_jax.search.methods import Method, beam_search, chunk_reset, dvts
from stepwiser_jax.search.report import sample_names, search_names, summarize
from stepwiser_jax.search.results import Found, check_answers, found_by_search, sample_solutions
from stepwiser_jax.tasks.verifier import Verifier
from stepwiser_jax.text.chunks import CHUNK_CLOSE, check_tags, end_patterns


def run(config: Search, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Searches for solutions of every problem, block after block."""

    def prepare() -> Work[Problem, SearchResult]:
        problems, counts = read_verifiable(config)
        return Work(
            items=problems,
            record_type=SearchResult,
            ids_of=lambda block: search_ids(config, block),
            begin=lambda session: begin(config, session, problems),
            summarize=lambda results: summarize(config, results) | counts,
            unit="solution",
        )

    return run_blocks("search", config, run_dir, shard, prepare)


def begin(
    config: Search, session: Session, problems: Sequence[Problem]
) -> Callable[[Sequence[Problem]], list[SearchResult]]:
    """Returns the function that searches for solutions of a block. Raises UserError for a problem
    that is too long."""
    verifier = session.verifier(config.verifier)
    policy = load_policy(config, session)
    judge = load_judge(config.judge, mesh=session.mesh, seed=config.seed)
    session.compiled["judge"] = judge.compiled_shapes
    check_lengths(config, policy, judge, problems)
    methods = load_methods(config)
    return lambda block: check_answers(
        search_block(config, policy, judge, methods, verifier, block), verifier
    )


def check_lengths(
    config: Search, policy: Policy, judge: Judge, problems: Sequence[Problem]
) -> None:
    """Raises UserError if a solution may not fit the context of the policy, or of the judge."""
    room = config.sampling.max_new_tokens
    for problem in problems:
        ids = policy.prompt_ids(problem)
        policy.engine.check_length(len(ids), room, problem.problem_id)
        judge.check_room(problem.problem_id, problem.question, room)


def load_policy(config: Search, session: Session) -> Policy:
    """Returns the policy, which writes one chunk at a time."""
    loaded, engine = session.load(config.policy, config.engine)
    stop_strings = end_patterns(config.chunking)
    if CHUNK_CLOSE in stop_strings:
        check_tags(loaded.tokenizer)
    chunk_sampling = config.sampling.model_copy(update={"max_new_tokens": config.max_chunk_tokens})
    params = SamplingParams(
        **chunk_sampling.model_dump(), stop_ids=loaded.tokenizer.eos_ids, stop_strings=stop_strings
    )
    key = jax.random.key(config.seed)
    return Policy(loaded, engine, ChunkSampler(engine), config.prompt_style, params, key)


def load_methods(config: Search) -> dict[str, tuple[Method, int, str]]:
    """Returns the methods that the judge steers, each with its beams and their ranking."""
    methods = {"chunk_reset": (chunk_reset(config.max_attempts), 1, "last")}
    for name, make, beams in (("beam", beam_search, config.beam), ("dvts", dvts, config.dvts)):
        if beams is not None:
            method = make(beams.beams, beams.width)
            methods[name] = (method, beams.beams, beams.aggregate)
    for name, own in config.own.items():
        method = plugins.load(own.method, "a search method", arguments=own.args)
        methods[name] = (method, own.beams, own.aggregate)
    return methods


def search_ids(config: Search, block: Sequence[Problem]) -> list[str]:
    names = ["greedy", *search_names(config), *sample_names(config)]
    return [f"{problem.problem_id}/{name}" for problem in block for name in names]


def search_block(
    config: Search,
    policy: Policy,
    judge: Judge,
    methods: dict[str, tuple[Method, int, str]],
    verifier: Verifier,
    block: Sequence[Problem],
) -> list[Found]:
    """Returns what every method finds on every problem of the block."""
    found = []
    for name, (method, beams, aggregate) in methods.items():
        states = search_chunks(
            policy,
            judge,
            block,
            method,
            num_beams=beams,
            aggregate=aggregate,
            max_new_tokens=config.sampling.max_new_tokens,
            token_budget=config.token_budget,
            first_attempt=config.first_attempt if name == "chunk_reset" else "sampled",
        )
        found += found_by_search(policy, name, states, verifier)
    eos_ids = policy.loaded.tokenizer.eos_ids
    params = SamplingParams(**config.sampling.model_dump(), stop_ids=eos_ids)
    greedy = replace(params, temperature=0.0)
    found += sample_solutions(policy, judge, block, greedy, ["greedy"], 0)
    num_judged = max(config.best_of, default=0)
    return found + sample_solutions(policy, judge, block, params, sample_names(config), num_judged)
