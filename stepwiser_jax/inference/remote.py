"""Samples on an OpenAI-compatible server that runs in its own environment, such as vLLM's.

    token ids of a prompt -> POST {url}/completions, a request for each row -> token ids, log-probs

The server must return token ids (vLLM 0.10.2 and later do, `return_token_ids`): text that is
tokenized again may give other ids. Its log-probs are those of the distribution sampled from only
with `--logprobs-mode processed_logprobs`, or at temperature 1 without truncation. The server draws
the noise, from a seed for each row.

The server is not trusted: its answers are checked for types, values, time and size, and redirects
are not followed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import httpx2
import jax
import numpy as np
from pydantic import BaseModel, Field, ValidationError

from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.params import Completion, SamplingParams, StopReason, check_row_ids
from stepwiser_jax.inference.token_sampler import row_hash
from stepwiser_jax.runs.progress import rows_done

BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which a request is sent again."""

FIRST_PAUSE_SECONDS = 1.0
"""The pause before the first retry; each further pause is twice as long."""

BYTES, BYTES_PER_TOKEN = 2**20, 2**10
"""The largest answer: in all, plus for each token of prompt and completion. An answer may hold a
token four times (text, token, alternatives, id)."""

ERROR_BYTES = 300
"""How much is read of an answer that is an error."""


class _Logprobs(BaseModel, strict=True):
    token_logprobs: list[Annotated[float, Field(le=1e-3, allow_inf_nan=False)]]  # 0, but rounded


class _Choice(BaseModel, strict=True):
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = None


class _Answer(BaseModel, strict=True):
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]


class _Retry(Exception):
    """A failure after which the request is sent again."""


class RemoteEngine:
    """Generates completions on a server, with the interface of `Engine.generate`.

    Args:
        url: The API's address, such as `http://localhost:8000/v1`.
        model: The model's name on the server.
        vocab_size: The number of token ids of the model's tokenizer.
        concurrent_requests: How many requests are under way at once.
        timeout_seconds: The longest time until an answer is complete.
        retries: How often a request is sent again if the server cannot be reached, is busy, or
            gives no complete answer.
    """

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
    ) -> list[Completion]:
        """Returns what `Engine.generate` does. `key` and the row id give the seed of a request.

        Raises:
            UserError: The server cannot be reached, refuses, or gives an answer that is not usable.
        """
        check_row_ids(row_ids, len(prompts_P) * group_size)
        prompts_B = [list(prompt) for prompt in prompts_P for _ in range(group_size)]
        key_bits, counter = int(jax.random.bits(key)), itertools.count(1)

        async def sample(row_id: str, prompt: list[int]) -> Completion:
            seed = (key_bits ^ row_hash(row_id)) & 0x7FFFFFFF
            async with free:
                choice = await self._request(client, self._body(prompt, params, seed))
            reason = self._check(choice, prompt, params)
            rows_done(next(counter), len(row_ids), len(choice.token_ids))
            tokens = np.array(choice.token_ids, np.int32)
            logprobs = np.array(choice.logprobs.token_logprobs, np.float32)
            return Completion(row_id, tokens, logprobs, reason)

        async def sample_all() -> list[Completion]:
            async with client:
                return await asyncio.gather(*map(sample, row_ids, prompts_B))

        free = asyncio.Semaphore(self.concurrent_requests)
        # No timeout of httpx: it is for each read, and a server may send a byte now and then.
        client = httpx2.AsyncClient(timeout=None, limits=httpx2.Limits())
        return asyncio.run(sample_all())

    def _body(self, prompt: list[int], params: SamplingParams, seed: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,  # 0 means all, as here
            "stop": list(params.stop_strings),
            "stop_token_ids": list(params.stop_ids),
            "include_stop_str_in_output": True,
            "seed": seed,
            "logprobs": 1,
            "return_token_ids": True,
        }

    async def _request(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> _Choice:
        """Sends a request until it is answered. Raises UserError if it never is."""
        reason: object = ""
        for attempt in range(1 + self.retries):
            if attempt:
                await asyncio.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                async with asyncio.timeout(self.timeout_seconds):
                    return self._parse(await self._post(client, body))
            except TimeoutError:
                reason = f"not the whole of one in {self.timeout_seconds:g} seconds"
            except (_Retry, httpx2.HTTPError) as error:
                reason = str(error) or repr(error)
        raise UserError(
            f"the server at {self.url} gave no answer in {1 + self.retries} attempts ({reason}): "
            "start it, or correct server.url; what is written so far is kept"
        )

    async def _post(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> bytes:
        """Returns the answer's content. Raises _Retry if the server is busy, and UserError if it
        refuses or sends more than an answer can have."""
        limit = BYTES + BYTES_PER_TOKEN * (len(body["prompt"]) + body["max_tokens"])
        content = bytearray()
        async with client.stream("POST", self.url, json=body) as response:
            async for part in response.aiter_bytes():
                content += part
                if not response.is_success and len(content) >= ERROR_BYTES:
                    break
                if len(content) > limit:
                    raise self._unusable(f"more than {limit} bytes")
        if response.is_success:
            return bytes(content)
        found = f"{response.status_code} {content[:ERROR_BYTES].decode(errors='replace')}"
        if response.status_code in BUSY:
            raise _Retry(found)
        if response.has_redirect_location:
            found = f"{response.status_code} to {response.headers['location']}"
        raise UserError(f"the server at {self.url} refuses: {found}")

    def _parse(self, content: bytes) -> _Choice:
        """Raises _Retry if the content is not JSON, and UserError if it is not an answer."""
        try:
            return _Answer.model_validate_json(content).choices[0]
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            if first["type"] == "json_invalid":
                raise _Retry(reason) from None
            found = content[:200].decode(errors="replace")
            raise self._unusable(f"{reason}, found {found}") from None

    def _unusable(self, reason: str) -> UserError:
        return UserError(
            f"the server at {self.url} gave an answer that cannot be used ({reason}): expected "
            "token ids of its tokenizer and their log-probs, as vLLM 0.10.2 and later return them"
        )

    def _check(self, choice: _Choice, prompt: list[int], params: SamplingParams) -> StopReason:
        """Returns why the completion ended. Raises UserError if it cannot have been sampled so."""
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
                f"the server at {self.url} read another prompt than it was sent: it adds tokens to "
                "the prompt, switch that off"
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
