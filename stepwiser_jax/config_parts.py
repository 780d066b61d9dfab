"""Groups of settings that several stages share, with their defaults: parts of the configs in
`config.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stepwiser_jax.text.chat import Argument
from stepwiser_jax.text.datasets import OnMalformed
from stepwiser_jax.text.prompts import JudgePromptStyle, PromptStyle

Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError("sizes must be positive and ascending")
    return sizes


Sizes = Annotated[tuple[int, ...], AfterValidator(_ascending)]


def _named_or_listed(chunking: Any) -> Any:
    if isinstance(chunking, str) and chunking not in ("tags", "blank_lines"):
        raise ValueError("expected 'tags', 'blank_lines', or a list of strings that end a chunk")
    return chunking


Strings = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
Chunking = Annotated[Literal["tags", "blank_lines"] | Strings, BeforeValidator(_named_or_listed)]


ChatTemplateArgs = dict[str, Argument]


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("expected no true or false")
        return value


class Mesh(Config):
    """Sizes of the device mesh's axes; their product is the number of devices used."""

    data: PositiveInt = 1
    fsdp: PositiveInt = 1
    tensor: PositiveInt = 1


class Model(Config):
    """Where the weights come from: a Hugging Face directory or hub id, the run directory of a
    finished stage that trains, or `arithmetic`: the embedded task's tiny model, fresh.
    `chat_template_args`: what its chat template is told in every prompt, such as
    `{enable_thinking: false}` for Qwen3. The trained model keeps them: stages that name its run
    leave them out, or repeat them."""

    path: str
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    chat_template_args: ChatTemplateArgs = Field(default_factory=dict)


class Lora(Config):
    """Low-rank adapters, in float32, of the blocks' matrices named in `targets`; `alpha / rank`
    scales what they add. They alone are trained then."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = Field(
        ("q", "k", "v", "o", "gate", "up", "down"), min_length=1
    )


class TrainedModel(Model):
    """Weights that are trained are float32: in bfloat16 an update of 1e-6 is rounded away. With
    `lora` (`{}`: its defaults) the model's own are not, and may be bfloat16; what is exported, with
    the adapters merged, has their type."""

    lora: Lora | None = None

    @model_validator(mode="after")
    def _master_weights(self) -> TrainedModel:
        if self.lora is None and self.param_dtype != "float32":
            raise ValueError(
                f"param_dtype must be float32 where all weights are trained, found "
                f"{self.param_dtype}: leave it out, or set lora"
            )
        return self


class Problems(Config):
    """`source`: a hub id, a local jsonl/json/parquet file, a finished `rollout` run (its problems),
    or `arithmetic` (then `limit`, `split` and `seed` say which problems are generated). `subset` is
    a hub data set's configuration, such as `main`.

    Rows are taken in this order, here and wherever these settings stand:

    1. `shuffle`: in an order that `seed` decides, the same on every machine; else as they stand.
    2. `on_malformed`: a row that cannot be read stops the stage, or is counted and left out.
    3. `exclude`: problems of these evaluation sets are left out (local files, finished `rollout`
       runs, or hub data sets of one configuration, with all their splits).
    4. `limit`: at most this number of what is left is used. Duplicates, and answers that cannot be
       verified, leave the stage with fewer."""

    source: str
    split: str | None = None
    subset: str | None = None
    shuffle: bool = False
    limit: int | None = Field(None, ge=1)
    on_malformed: OnMalformed = "stop"
    exclude: tuple[str, ...] = ()
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> Problems:
        if self.source == "arithmetic" and (self.shuffle or self.exclude):
            raise ValueError(
                "shuffle and exclude are of data sets, and arithmetic generates its problems at "
                "random, each split apart: leave them out"
            )
        return self


class Sampling(Config):
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch truncation off."""

    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(ge=1)


class Engine(Config):
    """Compiled shapes: `rows` in flight (the smallest number that holds the work is used), and
    `buckets`, the lengths of stored prompts; the largest is the context, completion included.
    `weights`: `int8` stores the blocks' matrices as 8-bit integers and samples from a slightly
    different distribution; made for accelerators, slower than bfloat16 on a CPU."""

    rows: Sizes = (64,)
    buckets: Sizes
    weights: Literal["model", "int8"] = "model"


class Optimizer(Config):
    """AdamW. `warmup_steps` rise linearly, then `schedule` falls to `end_fraction` of the peak."""

    learning_rate: float = Field(gt=0)
    schedule: Literal["cosine", "constant"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    end_fraction: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.95, ge=0, lt=1)


class Training(Config):
    """What every training stage has beside its data and its loss."""

    optimizer: Optimizer
    micro_batches: int = Field(1, ge=1)
    remat: bool = False
    checkpoint_every: int = Field(100, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    max_skipped_in_a_row: int = Field(5, ge=1)


class LabelRule(Config):
    """A rule (paper eqs 1-3, GenPRM's relative progress) with the parameters of all of them."""

    rule: Literal["abs_q", "rel_effective", "rel_ratio", "relative_progress"] = "rel_effective"
    alpha: float = Field(0.8, gt=0)
    best_of: int = Field(4, ge=1)
    gamma: float = Field(0.7, gt=0)
    epsilon: float = Field(0.8, gt=0)

    @property
    def parameters(self) -> dict[str, float]:
        """The settings that the rule takes."""
        return {
            "abs_q": {},
            "rel_effective": {"alpha": self.alpha, "n": self.best_of},
            "rel_ratio": {"gamma": self.gamma},
            "relative_progress": {"epsilon": self.epsilon},
        }[self.rule]


class GenPrm(Config):
    """A judge in GenPRM's form (arXiv 2504.00891): a turn of a conversation for every step.

    `code`: it may have Python code run, at most `max_code_rounds` times a step, in a process of its
    own with these limits (`runtime.sandbox`), in which earlier steps' code is run again.
    """

    code: bool = True
    max_code_rounds: int = Field(3, ge=1)
    code_seconds: float = Field(5.0, gt=0)
    code_memory_bytes: int = Field(2**30, ge=2**26)
    code_output_bytes: int = Field(2048, ge=1)

    def check_style(self, prompt_style: JudgePromptStyle) -> None:
        """Raises ValueError for a style that the form is not known in, or that has no code."""
        if prompt_style == "verdict":
            raise ValueError("prompt_style verdict is StepWiser's: with genprm, instruct or bare")
        if self.code and prompt_style == "bare":
            raise ValueError("prompt_style bare has no code in it: set genprm.code to false")


class GenPrmVerdicts(GenPrm):
    """A step whose P(right) is below `threshold` is wrong."""

    threshold: float = Field(0.5, gt=0, lt=1)


class ThinkPrm(Config):
    """A judge in ThinkPRM's form (arXiv 2504.16828): one chain about a whole solution, then
    P(yes)."""

    def check_style(self, prompt_style: JudgePromptStyle) -> None:
        """Raises ValueError for a style that the form is not known in."""
        if prompt_style == "verdict":
            raise ValueError("prompt_style verdict is StepWiser's: with thinkprm, instruct or bare")


class ThinkPrmVerdicts(ThinkPrm):
    """Its thought has `rounds`, one after another (sequential scaling), each of at most
    `max_new_tokens`."""

    rounds: int = Field(1, ge=1, le=4)


class GenerativeJudge(Model):
    """A judge that reasons about a chunk before its verdict. A chunk's score is 1 where the verdict
    is Positive, else 0; with `votes` it is the share of so many judgments that say Positive,
    sampled at `vote_temperature`, and the verdict is the majority's.

    `thinkprm`: it verifies the prefix that ends with the chunk, whose score is then P(yes), or the
    mean of `votes` chains (parallel scaling). A judge of GenPRM's form would write its whole
    conversation anew for every chunk: it judges in `evaluate` and `refine` only."""

    prompt_style: JudgePromptStyle = "instruct"
    thinkprm: ThinkPrmVerdicts | None = None
    max_new_tokens: int = Field(ge=1)
    votes: int = Field(0, ge=0)
    vote_temperature: float = Field(1.0, gt=0)
    engine: Engine

    @model_validator(mode="after")
    def _consistent(self) -> GenerativeJudge:
        if self.thinkprm is not None:
            self.thinkprm.check_style(self.prompt_style)
        return self


class ClassifierJudge(Model):
    """A classifier as a judge: a chunk's score is P(+), and its verdict is Negative where that is
    below `threshold`. `rows` of `max_length` tokens are scored at once; a row must hold the longest
    solution with what its prompt puts around every chunk."""

    prompt_style: PromptStyle = "instruct"
    threshold: float = Field(0.5, gt=0, lt=1)
    rows: int = Field(8, ge=1)
    max_length: int = Field(ge=2)
