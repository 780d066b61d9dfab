"""Sampling on an OpenAI-compatible server that runs in an environment of its own, such as vLLM's.

    prompt ids -> POST {url}/completions, one request a row -> token ids and their log-probs

Ids go in and come back, and no text: a server that returns none is refused, since text that is
tokenised anew may be other ids. vLLM has both from 0.10.2 on (`return_token_ids`). Its log-probs
are of the distribution sampled from only with `--logprobs-mode processed_logprobs`, or at
temperature 1 without truncation; noise is the server's, with a seed for each row.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from stepwiser_jax.algo.sampling import row_hash
from stepwiser_jax.records import UserError
from stepwiser_jax.runtime.progress import rows_done
from stepwiser_jax.runtime.sampling import SampleOutput, SamplingParams, StopReason

BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses of a server that may answer later."""

FIRST_PAUSE_SECONDS = 1.0
"""Before the first retry; every further pause is twice as long."""


class RemoteEngine:
    """`generate` as `Engine`'s, by the model called `model` of the server at `url`, such as
    `http://localhost:8000/v1`. A request that finds nobody, no time or a busy server is sent again,
    `retries` times."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrent_requests: int = 64,
        timeout_seconds: float = 600.0,
        retries: int = 5,
    ):
        self.url, self.model = url.rstrip("/") + "/completions", model
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

        Raises UserError where the server cannot be reached, refuses, or returns no token ids or no
        log-probs.
        """
        output = SampleOutput.empty(len(prompts_P) * group_size, row_ids, params.max_new_tokens)
        of_run = int(jax.random.bits(key))

        def sample(b: int) -> None:
            prompt = list(prompts_P[b // group_size])
            body = self._body(prompt, params, seed=(of_run ^ row_hash(row_ids[b])) & 0x7FFFFFFF)
            ids, logprobs, reason = self._read(self._post(body), prompt, params)
            output.tokens_BC[b, : len(ids)] = ids
            output.logprobs_BC[b, : len(ids)] = logprobs
            output.length_B[b], output.stop_reason_B[b] = len(ids), reason

        with ThreadPoolExecutor(self.concurrent_requests) as pool:
            try:
                for b, _ in enumerate(pool.map(sample, range(len(row_ids)))):
                    rows_done(b + 1, len(row_ids), int(output.length_B[b]))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # nobody wants the rest
                raise
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

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        pause, reason = FIRST_PAUSE_SECONDS, ""
        for attempt in range(1 + self.retries):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.read().decode(errors='replace')[:300]}"
                if error.code not in BUSY:
                    raise UserError(f"the server at {self.url} refuses: {reason}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or repr(error)  # nobody there, no time, half an answer
        raise UserError(
            f"the server at {self.url} gave no answer in {1 + self.retries} attempts ({reason}): "
            "start it, or correct server.url; what is written so far is kept"
        )

    def _read(
        self, answer: dict[str, Any], prompt: list[int], params: SamplingParams
    ) -> tuple[list[int], np.ndarray, StopReason]:
        choice = next(iter(answer.get("choices", [])), {})
        ids = choice.get("token_ids")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if ids is None or logprobs is None:
            missing = "token_ids" if ids is None else "logprobs.token_logprobs"
            raise UserError(
                f"the server at {self.url} returns no {missing}: expected token ids and their "
                f"log-probs, as vLLM 0.10.2 and later return them, found {str(answer)[:200]}"
            )
        if len(ids) != len(logprobs) or not 0 < len(ids) <= params.max_new_tokens:
            raise UserError(
                f"the server at {self.url} returned {len(ids)} token ids and {len(logprobs)} "
                f"log-probs: expected as many of each, from 1 to {params.max_new_tokens}"
            )
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise UserError(
                f"the server at {self.url} read another prompt than it was sent: it adds tokens of "
                "its own, switch that off"
            )
        if ids[-1] in params.stop_ids:
            reason = StopReason.STOP_ID
        elif choice.get("finish_reason") == "length":
            reason = StopReason.LENGTH
        elif params.stop_strings:
            reason = StopReason.STOP_STRING
        else:
            raise UserError(
                f"the server at {self.url} stopped ({choice.get('finish_reason')}) without one of "
                f"the end tokens {list(params.stop_ids)}: expected the ids of the model's own end"
            )
        return ids, np.asarray(logprobs, np.float32), reason
