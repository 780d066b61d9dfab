"""ThinkPRM's judge: a chain of thought about a whole solution, then the probability that it is
right (`judges.thinkprm_form` has the words).

    Solution -> prompt, opening -> sampled thought -> (trigger -> sampled thought) x (rounds - 1)
             -> forced question -> P(yes) / (P(yes) + P(no))

A chain gives a verdict on every step, and the score of the solution. As a process reward, of search
and selection, the score of every prefix is asked for (`ThinkPrmJudge.__call__`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import jax

from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams, probabilities
from stepwiser_jax.judges.stepwiser import ChunkJudgment, Solution
from stepwiser_jax.judges.thinkprm_form import (
    FORMS,
    Form,
    cut_chain,
    step_verdicts,
    verdicts_of,
    verify_prompt,
)
from stepwiser_jax.records import Verdict
from stepwiser_jax.text.prompts import PromptStyle, encode_message
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text


@dataclasses.dataclass(frozen=True)
class Verification:
    """One chain about a solution: `solution` is the opinion of all of it, its completion the whole
    text with the likelier answer; `steps` are those of its chunks, from the same text."""

    solution: ChunkJudgment
    steps: list[ChunkJudgment]


class ThinkPrmJudge:
    """Random draws are named `<name>/<solution>...`, so that judges of different stages draw
    differently."""

    def __init__(
        self,
        loaded: Loaded,
        engine: Engine,
        *,
        name: str,
        prompt_style: PromptStyle,
        max_new_tokens: int,
        rounds: int,
        key: jax.Array,
        votes: int = 0,
        vote_temperature: float = 1.0,
    ):
        """Raises UserError where the two answers are not one token each."""
        self.loaded, self.engine, self.name, self.key = loaded, engine, name, key
        self.prompt_style: PromptStyle = prompt_style
        self.max_new_tokens, self.rounds = max_new_tokens, rounds
        self.votes, self.vote_temperature = votes, vote_temperature
        self.form = FORMS[prompt_style]
        self.answer_ids = answer_ids(loaded.tokenizer, self.form)

    def prompt_ids(self, solution: Solution) -> list[int]:
        text = verify_prompt(solution.question, solution.chunks, self.prompt_style)
        tokenizer, opening = self.loaded.tokenizer, self.form.opening
        return encode_message(tokenizer, text, self.prompt_style, answer=opening)

    @property
    def compiled_shapes(self) -> Counter[str]:
        return self.engine.compiled_shapes

    def check_room(self, problem_id: str, question: str, num_tokens: int) -> None:
        """Raises UserError where the context might not hold a verification of so many tokens; the
        headings of their steps are not counted."""
        empty = self.prompt_ids(Solution(problem_id, question, [""]))
        name = f"the judge of {problem_id}, with a solution of {num_tokens} tokens"
        self.engine.check_length(len(empty), num_tokens + self._room(self.rounds), name)

    def check_lengths(self, solutions: Sequence[Solution]) -> None:
        """Raises UserError where the context does not hold a verification."""
        for solution in solutions:
            self.engine.check_length(
                len(self.prompt_ids(solution)), self._room(self.rounds), solution.solution_id
            )

    def __call__(self, solutions: Sequence[Solution]) -> list[list[ChunkJudgment]]:
        """Of every chunk, the greedy verification of the prefix that ends with it, or what its
        `votes` say together."""
        prefixes = [
            dataclasses.replace(x, solution_id=f"{x.solution_id}/{j}", chunks=x.chunks[: j + 1])
            for x in solutions
            for j in range(x.start, len(x.chunks))
        ]
        suffixes = [f"/vote{k}" for k in range(self.votes)] or [""]
        temperature = self.vote_temperature if self.votes else 0.0
        found = iter(self.sample(prefixes, temperature, suffixes))
        return [
            [
                ChunkJudgment.of_votes([vote.solution for vote in next(found)])
                for _ in x.chunks[x.start :]
            ]
            for x in solutions
        ]

    def sample(
        self,
        solutions: Sequence[Solution],
        temperature: float,
        suffixes: Sequence[str],
        *,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[list[Verification]]:
        """Of every solution, for each of `suffixes`, which tell its draws apart: one chain."""
        rows = [(s, suffix) for s in range(len(solutions)) for suffix in suffixes]
        prompts = [self.prompt_ids(solution) for solution in solutions]
        thought: list[list[str]] = [[] for _ in rows]
        num_tokens = [0] * len(rows)
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.loaded.tokenizer.eos_ids,
            stop_strings=self.form.stops,
        )
        for r in range(self.rounds):
            begun = [
                prompts[s] + self._encode(self.form.opening + self._joined(thought[b], r), r)
                for b, (s, _) in enumerate(rows)
            ]
            row_ids = [
                f"{self.name}/{solutions[s].solution_id}{suffix}" + (f"/round{r}" if r else "")
                for s, suffix in rows
            ]
            group_size = 1 if r else len(suffixes)  # in the first round they begin alike
            completions = self.engine.generate(
                begun[::group_size], params, key=self.key, row_ids=row_ids, group_size=group_size
            )
            for b, (s, _) in enumerate(rows):
                ids = completions[b].tokens.tolist()
                text = completion_text(self.loaded.tokenizer, ids)
                thought[b].append(cut_chain(text, self.form, len(solutions[s].chunks)))
                num_tokens[b] += len(ids)
        chains = [self._joined(texts, self.rounds - 1) for texts in thought]
        p_correct = self._p_correct([prompts[s] for s, _ in rows], chains)
        verified = [
            Verification(
                self._opinion_of_solution(chain, p, tokens),
                self._opinions_of_steps(texts, len(solutions[s].chunks)),
            )
            for (s, _), texts, chain, p, tokens in zip(
                rows, thought, chains, p_correct, num_tokens, strict=True
            )
        ]
        K = len(suffixes)
        return [verified[s * K : (s + 1) * K] for s in range(len(solutions))]

    # --- the text, and room for it --------------------------------------------------------------

    def _joined(self, thought: Sequence[str], num_triggers: int) -> str:
        """Rounds of thought, each but perhaps the last with the trigger of the next."""
        triggers = (*self.form.triggers[:num_triggers], "")
        return "".join(text + trigger for text, trigger in zip(thought, triggers, strict=False))

    def _encode(self, text: str, rounds: int, tail: int = 0) -> list[int]:
        """Text of the verifier's with so many rounds in it. What was sampled, read and written
        again, is hardly ever longer than it was; where it is, what exceeds the room is cut out
        before the last `tail` tokens."""
        ids = self.loaded.tokenizer.encode(text)
        over = max(0, len(ids) - self._room(rounds))
        return ids[: len(ids) - tail - over] + ids[len(ids) - tail :]

    def _room(self, rounds: int) -> int:
        """Tokens of a verification with so many rounds, at most."""
        tokenizer, form = self.loaded.tokenizer, self.form
        triggers = sum(len(tokenizer.encode(trigger)) for trigger in form.triggers[:rounds])
        given = len(tokenizer.encode(form.whole("", True))) + triggers
        return given + rounds * self.max_new_tokens

    # --- what it says ---------------------------------------------------------------------------

    def _p_correct(self, prompts: Sequence[list[int]], chains: Sequence[str]) -> list[float]:
        tail = len(self.loaded.tokenizer.encode(self.form.question + self.form.answers[0]))
        asked = [
            prompt + self._encode(self.form.whole(chain, True), self.rounds, tail)[:-1]
            for prompt, chain in zip(prompts, chains, strict=True)
        ]
        return probabilities(self.engine.log_odds(asked, self.answer_ids))

    def _opinion_of_solution(self, chain: str, p_correct: float, num_tokens: int) -> ChunkJudgment:
        is_correct = p_correct >= 0.5
        verdict = Verdict.POSITIVE if is_correct else Verdict.NEGATIVE
        return ChunkJudgment(self.form.whole(chain, is_correct), verdict, p_correct, num_tokens)

    def _opinions_of_steps(self, thought: Sequence[str], num_steps: int) -> list[ChunkJudgment]:
        written = {v.step: v.text for text in thought for v in step_verdicts(text, self.form)}
        opinions = []
        for step, verdict in enumerate(verdicts_of(thought, self.form, num_steps)):
            text = written.get(step, "")
            num_tokens = len(self.loaded.tokenizer.encode(text))
            p_positive = float(verdict is Verdict.POSITIVE)
            opinions.append(ChunkJudgment(text, verdict, p_positive, num_tokens))
        return opinions


def answer_ids(tokenizer: Tokenizer, form: Form) -> tuple[int, int]:
    """The tokens of yes and no after the question. Raises UserError unless the two differ in their
    last token alone."""
    yes, no = (tokenizer.encode(form.whole("", is_correct)) for is_correct in (True, False))
    if yes[:-1] != no[:-1] or yes[-1] == no[-1]:
        raise UserError(
            f"a verification ends with one token, {form.answers[0]!r} or {form.answers[1]!r}: "
            f"expected a vocabulary that has both, found them encoded as {yes} and {no}, behind "
            "the question. Use another model"
        )
    return yes[-1], no[-1]
