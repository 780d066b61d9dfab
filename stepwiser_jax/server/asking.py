"""What clients may ask for: the bodies of requests, checked, and how one is refused.

JSON -> CheckBody or CompletionBody -> the solution to judge, or the prompt to continue
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.base import Solution
from stepwiser_jax.judges.check import without_tags
from stepwiser_jax.text.chunking import cut

MAX_STOP_BYTES = 64
"""The most bytes of all stop strings of a request. The automaton that finds them has a row of the
vocabulary's length for each."""

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""The type of an error by its status; others are an `invalid_request_error` or `server_error`."""


class Refused(Exception):
    """A request that gets no result: its HTTP status, and what its client is told."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}

    def to_fields(self) -> dict[str, Any]:
        """Returns the error in OpenAI's form."""
        kind = KINDS.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {"message": self.message, "type": kind, "param": None, "code": self.status}
        }


class Body(BaseModel):
    """The body of a request. Unknown fields and values of other types are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class CheckBody(Body):
    """A solution to judge, in `steps` or as a text that is cut as `stepwiser check` cuts it."""

    question: str
    steps: list[str] | None = None
    solution: str | None = None
    id: Annotated[str, Field(min_length=1, max_length=200)] = "solution"
    stream: bool = False

    def to_solution(self) -> Solution:
        """Returns the solution. Raises Refused if there is none, or a part is empty."""
        if (self.steps is None) == (self.solution is None):
            found = "neither" if self.steps is None else "both"
            raise Refused(400, f"expected either 'steps' or 'solution', found {found}")
        try:
            chunks = tuple(self.steps or ()) if self.solution is None else cut(self.solution)
            return without_tags(Solution(self.id, self.question, chunks))
        except UserError as error:
            raise Refused(400, str(error)) from None


StopString = Annotated[str, Field(min_length=1)]


class CompletionBody(Body):
    """A prompt to continue, in OpenAI's words and vLLM's. `top_k` 0 or -1 means all tokens."""

    model: str | None = None
    prompt: Annotated[list[int], Field(min_length=1)] | str
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**20)] = 0
    stop: Annotated[list[StopString], Field(max_length=4)] | StopString | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=32)] = 1
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    return_token_ids: bool = False
    include_stop_str_in_output: bool = False
    stream: bool = False
    user: str | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


SomeBody = TypeVar("SomeBody", bound=Body)


def read_body(kind: type[SomeBody], content: bytes) -> SomeBody:
    """Returns the body that a request's content is. Raises Refused if it is none. What was sent is
    not repeated, so that it gets into no log."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))[:100]
        raise Refused(400, f"{place}: {first['msg']}" if place else first["msg"]) from None
