"""A judge as the reward of a policy that another library trains: TRL in one process, verl by HTTP.

What the judge says of the chunks of a solution becomes one number, in one of three forms:

    min        the smallest P(Positive) of its chunks (PURE, arXiv 2504.15275)
    accepted   the share of its chunks before the first error
    right      1 if no chunk is rejected, else 0

Sums over chunks are left out: a policy learns to write more chunks, whatever is in them. A
completion without text, or longer than the judge's context, earns 0.

verl loads this file by its path, so it imports nothing but the standard library when it is loaded.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from stepwiser_jax.judges.check import Checker

Form = Literal["min", "accepted", "right"]

WAIT_SECONDS = 1.0
"""How long to wait before a full server is asked again, if it does not say."""


def reward_of(found: Mapping[str, Any], form: Form = "min") -> float:
    """Returns the reward of a solution, from 0 to 1.

    Args:
        found: What `stepwiser check --json`, `/check` of a server, or `CheckedSolution.to_fields`
            says of it.
        form: See above.
    """
    chunks, first_error = found["chunks"], found["first_error"]
    forms: dict[str, Callable[[], float]] = {
        "min": lambda: min(chunk["p_positive"] for chunk in chunks),
        "accepted": lambda: 1.0 if first_error == -1 else first_error / len(chunks),
        "right": lambda: float(first_error == -1),
    }
    if form not in forms:
        raise ValueError(f"expected a form of {', '.join(forms)}, found {form!r}")
    return forms[form]()


# --- TRL ----------------------------------------------------------------------------------------


def trl_reward(check: Checker, form: Form = "min") -> Callable[..., list[float]]:
    """Returns a reward function for TRL's `GRPOTrainer(reward_funcs=...)`.

    It judges all completions of a call together. The question is the column `question` of the data
    set, if it has one, else the prompt, of which the last message if it is a conversation.

    Args:
        check: The judge.
        form: See above.
    """

    def judge_reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        question: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float]:
        from stepwiser_jax.errors import UserError
        from stepwiser_jax.judges.base import Solution
        from stepwiser_jax.judges.check import without_tags
        from stepwiser_jax.text.chunking import cut

        questions = map(_text, prompts) if question is None else question
        rewards, asked = [0.0] * len(completions), []
        for i, (asking, completion) in enumerate(zip(questions, completions, strict=True)):
            try:
                solution = without_tags(Solution(f"{i}", asking, cut(_text(completion))))
                check.asked(solution)
            except UserError:  # no text, or no room for it
                continue
            asked.append((i, solution))
        if asked:
            found = check.check([solution for _, solution in asked])
            for (i, _), of_one in zip(asked, found, strict=True):
                rewards[i] = reward_of(of_one.to_fields(), form)
        return rewards

    return judge_reward


def _text(message: Any) -> str:
    """Returns a text, or what the last message of a conversation says."""
    return message if isinstance(message, str) else message[-1]["content"]


# --- verl ---------------------------------------------------------------------------------------


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str = "http://127.0.0.1:8000",
    form: Form = "min",
    timeout: float = 300.0,
) -> float:
    """Returns the reward of a solution for verl's `custom_reward_function`, from a running
    `stepwiser serve`.

    Args:
        data_source: Is not used.
        solution_str: The completion.
        ground_truth: Is not used.
        extra_info: Has the problem as `question`.
        url: The address of the server.
        form: See above.
        timeout: Seconds, waiting for a full server included.

    Raises:
        ValueError: `extra_info` has no question.
        RuntimeError: The server cannot be reached, is too busy, or fails.
    """
    question = (extra_info or {}).get("question")
    if not isinstance(question, str):
        raise ValueError(
            f"expected the problem in extra_info['question'] of the data ({data_source}), found "
            f"{question!r}"
        )
    if not solution_str.strip():
        return 0.0
    body = json.dumps({"question": question, "solution": solution_str}).encode()
    until = time.monotonic() + timeout
    while True:
        request = urllib.request.Request(
            f"{url.rstrip('/')}/check", body, {"Content-Type": "application/json"}
        )
        try:
            left = max(0.1, until - time.monotonic())
            with urllib.request.urlopen(request, timeout=left) as answer:
                return reward_of(json.load(answer), form)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if error.code in (400, 413):  # no text, or no room for it
                print(f"a solution earns 0: {said}", file=sys.stderr)
                return 0.0
            wait = float(error.headers.get("Retry-After") or WAIT_SECONDS)
            if error.code != 429 or time.monotonic() + wait > until:
                raise RuntimeError(f"the judge at {url} answers {error.code}: {said}") from None
            time.sleep(wait)
        except OSError as error:  # refused, or too slow
            raise RuntimeError(
                f"expected a judge at {url}, found none: {error}. Start one with `stepwiser serve "
                "RUN`, or set url in reward_kwargs"
            ) from None
