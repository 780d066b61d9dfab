"""Sampling on an OpenAI-compatible server that runs in an environment of its own, such as vLLM's.

    prompt ids -> POST {url}/completions, one request a row -> token ids and their log-probs

Ids go in and come back, and no text: a server that returns none is refused, since text that is
tokenised anew may be other ids. vLLM has both from 0.10.2 on (`return_token_ids`). Its log-probs
are of the distribution sampled from only with `--logprobs-mode processed_logprobs`, or at
temperature 1 without truncation; noise is the server's, with a seed for each row.

A server is not trusted: an answer has the types of `_Answer`, ids that the tokenizer knows and
log-probs that can be; a time it must be there by, and a size it may have. No redirect is followed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import httpx2
import jax
from pydantic import BaseModel, Field, ValidationError

from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.params import SampleOutput, SamplingParams, StopReason
from stepwiser_jax.inference.token_sampler import row_hash
from stepwiser_jax.runs.progress import rows_done

BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses of a server that may answer later."""

FIRST_PAUSE_SECONDS = 1.0
"""Before the first retry; every further pause is twice as long."""

BYTES, BYTES_PER_TOKEN = 2**20, 2**10
"""Of an answer, at most: in all, and more for each token of the prompt and of the completion, which
may be told four times (text, token, alternatives, id)."""

ERROR_BYTES = 300
"""Of what a server says when it refuses, the part that is read."""


class _Logprobs(BaseModel, strict=True):
    token_logprobs: list[Annotated[float, Field(le=1e-3, allow_inf_nan=False)]]  # 0, but rounded


class _Choice(BaseModel, strict=True):
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = None


class _Answer(BaseModel, strict=True):
    """What is read of an answer. JSON has more types than these, and more depth."""

    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]


class RemoteEngine:
    """`generate` as `Engine`'s, by the model called `model` of the server at `url`, such as
    `http://localhost:8000/v1`; its tokenizer has `vocab_size` ids. A request that finds nobody, no
    whole answer in `timeout_seconds` or a busy server is sent again, `retries` times."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        vocab_size: int,
        concurrent_requests: int = 64,
        timeout_seconds: float = 600.0,
        retries: int = 5,
    ):
        self.url, self.model, self.vocab_size = url.rstrip("/") + "/completions", model, vocab_size
        self.concurrent_requests, self.retries = concurrent_requests, retries
        self.timeout_seconds = timeout_seconds

    def generate(
        self,
        prompts_P: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        key: jax.Array,
        row_ids: Sequence[str],
        group_size: int = 1,
    ) -> SampleOutput:
        """`group_size` completions of every prompt; row b = p * group_size + g. `key` and the id of
        a row give the seed of its request.

        Raises UserError where the server cannot be reached, refuses, or gives an answer that cannot
        be used.
        """
        output = SampleOutput.empty(len(prompts_P) * group_size, row_ids, params.max_new_tokens)
        of_run, done = int(jax.random.bits(key)), itertools.count(1)

        async def sample(b: int) -> None:
            prompt = list(prompts_P[b // group_size])
            body = self._body(prompt, params, seed=(of_run ^ row_hash(row_ids[b])) & 0x7FFFFFFF)
            async with free:
                choice = await self._post(client, body)
            output.stop_reason_B[b] = self._checked(choice, prompt, params)
            ids = choice.token_ids
            output.tokens_BC[b, : len(ids)], output.length_B[b] = ids, len(ids)
            output.logprobs_BC[b, : len(ids)] = choice.logprobs.token_logprobs
            rows_done(next(done), len(row_ids), len(ids))

        async def sample_all() -> None:
            async with client:
                await asyncio.gather(*map(sample, range(len(row_ids))))

        free = asyncio.Semaphore(self.concurrent_requests)
        # The deadline is of the whole answer: a time-out of each read would wait for ever for a
        # server that sends a byte now and then.
        client = httpx2.AsyncClient(timeout=None, limits=httpx2.Limits())
        asyncio.run(sample_all())
        return output

    def _body(self, prompt: list[int], params: SamplingParams, *, seed: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,  # 0: all, as here
            "stop": list(params.stop_strings),
            "stop_token_ids": list(params.stop_ids),
            "include_stop_str_in_output": True,
            "seed": seed,
            "logprobs": 1,
            "return_token_ids": True,
        }

    async def _post(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> _Choice:
        pause, found = FIRST_PAUSE_SECONDS, ""
        for attempt in range(1 + self.retries):
            if attempt:
                await asyncio.sleep(pause)
                pause *= 2
            found = await self._attempt(client, body)
            if isinstance(found, _Choice):
                return found
        raise UserError(
            f"the server at {self.url} gave no answer in {1 + self.retries} attempts ({found}): "
            "start it, or correct server.url; what is written so far is kept"
        )

    async def _attempt(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> _Choice | str:
        """The answer, or why to ask again. Raises UserError where that would not help."""
        try:
            async with asyncio.timeout(self.timeout_seconds):
                status, content = await self._answer(client, body)
        except TimeoutError:
            return f"not the whole of one in {self.timeout_seconds:g} seconds"
        except httpx2.HTTPError as error:  # nobody there, or half an answer
            return str(error) or repr(error)
        if status in BUSY:
            return f"{status} {content.decode(errors='replace')}"
        if not httpx2.codes.is_success(status):
            refusal = f"{status} {content.decode(errors='replace')}"
            raise UserError(f"the server at {self.url} refuses: {refusal}")
        try:
            return _Answer.model_validate_json(content).choices[0]
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            if first["type"] == "json_invalid":
                return reason
            found = content[:200].decode(errors="replace")
            raise self._unusable(f"{reason}, found {found}") from None

    async def _answer(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[int, bytes]:
        """Status and content. Raises UserError for more than an answer can have."""
        most = BYTES + BYTES_PER_TOKEN * (len(body["prompt"]) + body["max_tokens"])
        content = bytearray()
        async with client.stream("POST", self.url, json=body) as response:
            async for piece in response.aiter_bytes():
                content += piece
                if not response.is_success and len(content) >= ERROR_BYTES:
                    break
                if len(content) > most:
                    raise self._unusable(f"more than {most} bytes")
        if response.is_success:
            return response.status_code, bytes(content)
        moved = f"to {response.headers['location']} " if response.has_redirect_location else ""
        return response.status_code, moved.encode() + content[:ERROR_BYTES]

    def _unusable(self, reason: str) -> UserError:
        return UserError(
            f"the server at {self.url} gave an answer that cannot be used ({reason}): expected "
            "token ids of its tokenizer and their log-probs, as vLLM 0.10.2 and later return them"
        )

    def _checked(self, choice: _Choice, prompt: list[int], params: SamplingParams) -> StopReason:
        """Why the completion ends. Raises UserError for one that no sampler could have drawn."""
        ids, logprobs = choice.token_ids, choice.logprobs.token_logprobs
        if len(ids) != len(logprobs) or not 0 < len(ids) <= params.max_new_tokens:
            raise self._unusable(
                f"{len(ids)} token ids and {len(logprobs)} log-probs, expected as many of each, "
                f"from 1 to {params.max_new_tokens}"
            )
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise self._unusable(
                f"token ids from {min(ids)} to {max(ids)}, server.tokenizer has those below "
                f"{self.vocab_size}"
            )
        if set(ids[:-1]) & set(params.stop_ids):
            raise self._unusable(f"one of the end tokens {list(params.stop_ids)} before the end")
        if choice.prompt_token_ids not in (None, prompt):
            raise UserError(
                f"the server at {self.url} read another prompt than it was sent: it adds tokens of "
                "its own, switch that off"
            )
        if ids[-1] in params.stop_ids:
            return StopReason.STOP_ID
        if choice.finish_reason == "length":
            return StopReason.LENGTH
        if params.stop_strings:
            return StopReason.STOP_STRING
        raise UserError(
            f"the server at {self.url} stopped ({choice.finish_reason}) without one of the end "
            f"tokens {list(params.stop_ids)}: expected the ids of the model's own end"
        )
