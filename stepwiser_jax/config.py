"""Every setting of every stage: typed, frozen, with its default here and nowhere else; and how a
YAML file becomes a config.

A config is a YAML file in the schema of its stage plus `--set a.b=c` overrides. Unknown keys are
refused and the closest real key is named. The resolved config is written to the run directory in
the same schema, so that `--config <run_dir>/config.yaml` repeats the run. Beside its settings a
file may name its `stage`; and in a path `RUNS/` is the directory that the run's own lies in, so
that runs that lie side by side find one another by name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stepwiser_jax.data.datasets import OnMalformed
from stepwiser_jax.errors import UserError
from stepwiser_jax.record_io import check_run_file, nothing_at
from stepwiser_jax.records import MAX_ROLLOUTS
from stepwiser_jax.text.chat import Argument
from stepwiser_jax.text.chunking import Splitter
from stepwiser_jax.text.prompts import JudgePromptStyle, PromptStyle


class OnResume(Enum):
    """A mark on a setting that may change when a run resumes; all others must stay the same."""

    FREE = "says where or how fast to compute, not what"
    LONGER = "says how much to do (null: everything), and may be raised"
    UNTIL_EXAMPLES = "selects the examples to write, and may change until some are written"


# --- settings that several stages share ---------------------------------------------------------

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
    own with these limits (`sandbox.runner`), in which earlier steps' code is run again.
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
    rows: Annotated[int, OnResume.FREE] = Field(8, ge=1)
    max_length: Annotated[int, OnResume.FREE] = Field(ge=2)


# --- stages -------------------------------------------------------------------------------------

Rollouts = Annotated[int, Field(gt=0, le=MAX_ROLLOUTS)]


class ComputeStage(Config):
    """What every stage has that runs a model. With several processes `mesh` is of all their devices
    where a stage trains, and of each process's own where it samples. `compilation_cache`: a
    directory that keeps compiled programs for the next process; several stages and runs may share
    it."""

    seed: Seed = 0
    mesh: Annotated[Mesh, OnResume.FREE] = Mesh()
    compilation_cache: Annotated[str | None, OnResume.FREE] = None

    @model_validator(mode="after")
    def _rows_fit_the_mesh(self) -> ComputeStage:
        name = "mesh" if getattr(self, "sampling_mesh", None) is None else "sampling_mesh"
        mesh = getattr(self, name)
        shards = mesh.data * mesh.fsdp
        for part, value in self:
            sizes: tuple[int, ...] = ()
            if isinstance(value, Engine):
                sizes = value.rows
            elif isinstance(value, GenerativeJudge | GenPrmJudge):
                part, sizes = f"{part}.engine", value.engine.rows
            elif isinstance(value, ClassifierJudge):
                sizes = (value.rows,)
            if any(rows % shards for rows in sizes):
                raise ValueError(
                    f"{part}.rows {list(sizes)} must be multiples of {name}.data x "
                    f"{name}.fsdp = {shards}"
                )
        return self

    def check_micro_batches(self, rows: int, name: str, micro_batches: int) -> None:
        """Raises ValueError unless `rows` (called `name`) can be cut into micro-batches, and each
        of those dealt out to the devices that rows are split over."""
        parts = self.mesh.data * self.mesh.fsdp * micro_batches
        if rows % parts:
            raise ValueError(
                f"rows per update ({rows} = {name}) must be a multiple of training.micro_batches "
                f"({micro_batches}) x mesh.data x mesh.fsdp = {parts}"
            )

    def check_length(self, name: str) -> None:
        """Raises ValueError unless the training is as long as `name` says, or `epochs`."""
        given = [key for key in (name, "epochs") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected either {name} or epochs, found {' and '.join(given) or 'neither'}: set "
                "one of them, and the other to null"
            )


class CheckedAnswers(Config):
    """`verifier` says whether a solution is right: `mathematics` (by the meaning of its final
    answer), `code` (by the problem's unit tests), or `module:function` (docs/extending.md). A
    solution that takes it longer than `answer_timeout_seconds` is wrong."""

    verifier: str = "mathematics"
    answer_timeout_seconds: float = Field(5.0, gt=0)


class SftData(Config):
    """`source`: SftExample or Dialogue records in a JSONL file or of a finished `rationalize` run;
    a finished `segment` or `select` run; or of the embedded task `arithmetic-policy` (its
    solutions), `arithmetic-untagged` (without chunks), `arithmetic-segmenter` (from those to
    these), `arithmetic-judge` (judgments), `arithmetic-verdicts` (without analysis),
    `arithmetic-genprm` (conversations) or `arithmetic-thinkprm` (chains); then `count` and `seed`
    say which demonstrations are generated."""

    source: str
    count: int | None = Field(None, ge=1)
    seed: Seed = 0


class Sft(ComputeStage):
    """Supervised fine-tuning: of the policy on chunked solutions (paper 3.1), or of the judge as
    its cold start.

    It takes `steps`, or `epochs`: every example is then learned that number of times, and the last
    batch is filled up with padding."""

    model: TrainedModel
    data: SftData
    prompt_style: PromptStyle = "instruct"
    steps: Annotated[int | None, OnResume.LONGER] = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    batch_size: int = Field(ge=1)
    max_length: int = Field(ge=2)
    packing: bool = True
    training: Training

    @model_validator(mode="after")
    def _consistent(self) -> Sft:
        self.check_length("steps")
        self.check_micro_batches(self.batch_size, "batch_size", self.training.micro_batches)
        return self


class Rollout(ComputeStage, CheckedAnswers):
    """Sample `group_size` chunked solutions of every problem (paper 4.1).

    `chunking`: what ends a chunk; the policy's closing tag, a blank line, or any string of a list,
    such as ["\\n"] for lines. It is asked for tags where they end a chunk."""

    policy: Model
    problems: Problems
    prompt_style: PromptStyle = "instruct"
    chunking: Chunking = "tags"
    group_size: int = Field(16, ge=1)
    sampling: Sampling
    engine: Engine
    problems_per_block: int = Field(64, ge=1)


class Server(Config):
    """An OpenAI-compatible server, such as vLLM's, that takes and returns token ids: see
    `inference.remote`. `model` is its name there, `tokenizer` that of the same model, a directory
    or hub id; `chat_template_args` as in `Model`."""

    url: Annotated[str, OnResume.FREE]
    model: str
    tokenizer: str
    chat_template_args: ChatTemplateArgs = Field(default_factory=dict)
    context: int = Field(ge=2)
    concurrent_requests: Annotated[int, OnResume.FREE] = Field(64, ge=1)
    timeout_seconds: Annotated[float, OnResume.FREE] = Field(600.0, gt=0)
    retries: Annotated[int, OnResume.FREE] = Field(5, ge=0)

    @field_validator("url")
    @classmethod
    def _is_of_http(cls, url: str) -> str:
        TypeAdapter(AnyHttpUrl).validate_python(url)
        return url


class ChunkSolutions(ComputeStage):
    """Cut the right solutions of a `rollout` run into chunks (paper 3.1): examples for `sft`.

    Who cuts them: a `teacher`, any model (then `engine` are its shapes), or one behind a `server`,
    which propose `num_segmentations` each; or a `splitter`, a rule of thumb, which needs neither
    `sampling` nor `engine`. `tokenizer` is that of the policy which wrote the solutions,
    `prompt_style` the teacher's. At most `max_per_problem` right solutions are cut.
    """

    rollouts: str
    tokenizer: str
    teacher: Model | None = None
    server: Server | None = None
    splitter: Splitter | None = None
    prompt_style: PromptStyle = "instruct"
    num_segmentations: int = Field(8, ge=1)
    max_per_problem: int = Field(4, ge=1)
    sampling: Sampling | None = None
    engine: Engine | None = None
    solutions_per_block: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _one_who_cuts(self) -> ChunkSolutions:
        given = [name for name in ("teacher", "server", "splitter") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"expected one of teacher, server and splitter, found {given}")
        wanted = {
            "teacher": ["sampling", "engine"],
            "server": ["sampling"],
            "splitter": [],
        }[given[0]]
        found = [name for name in ("sampling", "engine") if getattr(self, name)]
        if found != wanted:
            raise ValueError(
                f"a {given[0]} takes the settings {wanted}, found {found}: set others to null"
            )
        return self


class AdaptiveRollouts(LabelRule):
    """Stop sampling a prefix when the labels around it are known with `confidence`. 1: when they
    cannot change, so that they are those of `num_rollouts` rollouts. `label` then has to use the
    same rule."""

    confidence: float = Field(1.0, gt=0.5, le=1)


class Annotate(ComputeStage, CheckedAnswers):
    """Monte Carlo values of every prefix of every trajectory (paper 3.2, M = `num_rollouts`, or at
    most so many where they are `adaptive`).

    `rollouts_by_pass_rate`: pairs (bound, M), bounds ascending up to 1, in place of `num_rollouts`:
    M is that of the first bound that the problem's share of right trajectories is below (GenPRM:
    `[[0.1, 128], [0.9, 64], [1, 32]]`).

    `drop_uniform_problems`: leave out problems whose trajectories are all right or all wrong. Of
    those that are left `max_problems` are drawn, by `seed`; of each of them the first
    `max_trajectories_per_problem` are valued, and of all of those the first `limit`.
    """

    policy: Model
    rollouts: str
    num_rollouts: Rollouts = 16
    rollouts_by_pass_rate: tuple[tuple[float, Rollouts], ...] | None = Field(None, min_length=1)
    adaptive: AdaptiveRollouts | None = None
    drop_uniform_problems: bool = True
    max_problems: int | None = Field(None, ge=1)
    max_trajectories_per_problem: int | None = Field(None, ge=1)
    limit: int | None = Field(None, ge=1)
    sampling: Sampling
    engine: Engine
    trajectories_per_block: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Annotate:
        bounds = [bound for bound, _ in self.rollouts_by_pass_rate or [(1.0, 1)]]
        if bounds != sorted(set(bounds)) or bounds[0] <= 0 or bounds[-1] != 1:
            raise ValueError(
                f"rollouts_by_pass_rate: expected bounds above 0, ascending, the last of them 1, "
                f"found {bounds}"
            )
        return self

    @property
    def most_rollouts(self) -> int:
        """The largest M of any problem."""
        pairs = self.rollouts_by_pass_rate or [(1.0, self.num_rollouts)]
        return max(num_rollouts for _, num_rollouts in pairs)

    def rollouts_at(self, pass_rate: float) -> int:
        """M for a problem whose trajectories are right at this rate."""
        if self.rollouts_by_pass_rate is None:
            return self.num_rollouts
        fitting = [m for bound, m in self.rollouts_by_pass_rate if pass_rate < bound]
        return fitting[0] if fitting else self.rollouts_by_pass_rate[-1][1]


class Label(LabelRule):
    """Prefix values to chunk labels to judge examples (paper eqs 1-3, and 4.1 for the filters).

    `min_prefix_value`: chunks whose prefix was worth less give no judge example. With M rollouts a
    prefix worth v is followed by no right answer with probability (1 - v)^M though nothing is wrong
    with the chunk; 0 keeps them all, as the paper does.

    `chat_template_args` as in `Model`, for the lengths of prompts.
    """

    seed: Seed = 0
    annotations: str
    rollouts: str
    tokenizer: str
    chat_template_args: ChatTemplateArgs = Field(default_factory=dict)
    prompt_style: JudgePromptStyle = "instruct"
    min_prefix_value: float = Field(0.0, ge=0, lt=1)
    balance: bool = True
    min_prompt_tokens: int = Field(1, ge=0)
    max_prompt_tokens: int = Field(3096, ge=1)


class Grpo(Config):
    """Loss settings; the paper's where it states them (clip), verl's defaults elsewhere.

    `sampler_correction`: each token's loss is weighted by how much likelier the judge makes it than
    the sampler did, or makes its whole sequence, at most by `sampler_correction_cap`. `auto`: see
    `TrainJudge.correction`.
    """

    clip_eps_low: float = Field(0.2, ge=0)
    clip_eps_high: float = Field(0.28, ge=0)
    dual_clip: float | None = Field(3.0, gt=1)
    kl_coef: float = Field(0.0, ge=0)
    aggregation: Literal["token_mean", "sequence_mean", "dr_grpo"] = "token_mean"
    normalize: Literal["std", "none"] = "std"
    sampler_correction: Literal["auto", "none", "token", "sequence"] = "auto"
    sampler_correction_cap: float = Field(2.0, ge=1)
    drop_zero_variance: bool = True
    max_refills: int = Field(0, ge=0)


class TrainJudge(ComputeStage):
    """Train the judge by GRPO (paper 3.3).

    `examples`: a finished `label` run, a JSONL file of JudgeExample records, or solutions with
    labelled steps, a hub id or a local file, in a format of `data.step_formats` (ProcessBench,
    PRM800K, Math-Shepherd, ...), whose labels are then used. `on_malformed` and `exclude` as in
    `Problems`.

    One iteration draws `prompts_per_iteration` chunks, samples `group_size` judgments of each and
    makes `updates_per_iteration` optimizer steps on them. A group is its prompt once, then its
    completions; groups are packed into rows of the smallest of `row_lengths` that holds the
    longest. `max_refills`: how many more draws replace groups whose judgments all earned the same
    reward. There are `iterations`, or as many as draw every example `epochs` times, refills not
    counted; the last one may begin another epoch.

    `format_penalty`, for a judge that is to write its verdict and nothing else: any other judgment
    earns its negative, right or wrong. 0: off; 1 in the paper's ablation of the chain of thought
    (A.1).

    It samples on the devices of all processes, laid out as `sampling_mesh`, by default as `mesh`:
    `engine.rows` are in flight on all of them together.
    """

    model: TrainedModel
    examples: str
    on_malformed: OnMalformed = "stop"
    exclude: tuple[str, ...] = ()
    prompt_style: JudgePromptStyle = "instruct"
    iterations: Annotated[int | None, OnResume.LONGER] = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    prompts_per_iteration: int = Field(ge=1)
    group_size: int = Field(4, ge=2)
    updates_per_iteration: int = Field(1, ge=1)
    max_prompt_tokens: int = Field(3096, ge=1)
    format_penalty: float = Field(0.0, ge=0)
    row_lengths: Sizes
    sampling: Sampling
    sampling_mesh: Annotated[Mesh | None, OnResume.FREE] = None
    engine: Engine
    grpo: Grpo = Field(default_factory=lambda: Grpo.model_validate({}))
    training: Training

    @property
    def sampling_axes(self) -> dict[str, int] | None:
        return None if self.sampling_mesh is None else self.sampling_mesh.model_dump()

    @property
    def correction(self) -> Literal["none", "token", "sequence"]:
        """Of the gap between sampler and judge. Left to itself (`auto`) it is per token where the
        sampler's weights are int8, a different policy from the one that learns, and none where the
        two differ by rounding. Not per sequence: a product of that many ratios is mostly noise."""
        if self.grpo.sampler_correction == "auto":
            return "token" if self.engine.weights == "int8" else "none"
        return self.grpo.sampler_correction

    @model_validator(mode="after")
    def _consistent(self) -> TrainJudge:
        self.check_length("iterations")
        if self.prompts_per_iteration % self.updates_per_iteration:
            raise ValueError(
                f"prompts_per_iteration ({self.prompts_per_iteration}) must be a multiple of "
                f"updates_per_iteration ({self.updates_per_iteration})"
            )
        self.check_micro_batches(
            self.prompts_per_iteration // self.updates_per_iteration,
            "prompts_per_iteration / updates_per_iteration",
            self.training.micro_batches,
        )
        if self.format_penalty and self.prompt_style == "instruct":
            raise ValueError(
                "format_penalty punishes the analysis that prompt_style 'instruct' asks for: set "
                "prompt_style to 'verdict', or format_penalty to 0"
            )
        if self.sampling.top_k or self.sampling.top_p < 1 or self.sampling.temperature == 0:
            raise ValueError(
                "GRPO's importance ratio needs untruncated sampling: set sampling.top_k to 0, "
                "sampling.top_p to 1 and sampling.temperature above 0"
            )
        context = self.max_prompt_tokens + self.sampling.max_new_tokens
        if context > max(self.engine.buckets):
            raise ValueError(
                f"the largest of engine.buckets must hold max_prompt_tokens "
                f"({self.max_prompt_tokens}) + sampling.max_new_tokens "
                f"({self.sampling.max_new_tokens}) = {context}, found {list(self.engine.buckets)}"
            )
        longest = self.max_prompt_tokens + self.group_size * self.sampling.max_new_tokens
        if max(self.row_lengths) < longest:
            raise ValueError(
                f"the largest of row_lengths must hold a group: max_prompt_tokens "
                f"({self.max_prompt_tokens}) + group_size ({self.group_size}) x "
                f"sampling.max_new_tokens ({self.sampling.max_new_tokens}) = {longest}, found "
                f"{list(self.row_lengths)}"
            )
        return self


class GenPrmCritiques(GenPrm):
    """Critiques of whole solutions are written in one go, by any model, or `turn_by_turn`, by a
    judge of this form, whose verdicts are then those of its own P(right)."""

    turn_by_turn: bool = False


class ThinkPrmChains(ThinkPrm):
    """How chains for ThinkPRM's training are kept: those of at most `max_tokens`, question and
    answer included."""

    max_tokens: int = Field(4096, ge=1)


def check_form(config: RejectionSample | Evaluate) -> None:
    """Raises ValueError where it names two forms of judge, or a style that a form is not known
    in."""
    if config.thinkprm is not None:
        config.thinkprm.check_style(config.prompt_style)
    if config.genprm is not None and config.thinkprm is not None:
        raise ValueError(
            "expected one form of judge, found genprm and thinkprm: leave one of them out"
        )
    if config.genprm is not None:
        config.genprm.check_style(config.prompt_style)


class RejectionSample(ComputeStage):
    """Write judgments of labelled chunks and keep those that agree with the labels: examples for
    `sft` (paper A.1, RS-FT).

    `judge` writes `samples` judgments of every one of the first `limit` `examples`, which are read
    as `judge` reads them, with `on_malformed` and `exclude`. `balance`: as many of positive as of
    negative labels; of what is then left, `max_examples` are drawn. Both may still be changed where
    nothing was left.

    `thinkprm`: it verifies whole solutions, which are read as `classifier` reads them. `genprm`: it
    writes critiques of whole solutions, which are read as `classifier` reads them, and
    what is kept are conversations. `sampling.max_new_tokens` are of a critique, or of a turn.
    """

    judge: Model
    examples: str
    on_malformed: OnMalformed = "stop"
    exclude: tuple[str, ...] = ()
    limit: int | None = Field(None, ge=1)
    prompt_style: PromptStyle = "instruct"
    genprm: GenPrmCritiques | None = None
    thinkprm: ThinkPrmChains | None = None
    samples: int = Field(4, ge=1)
    balance: Annotated[bool, OnResume.UNTIL_EXAMPLES] = True
    max_examples: Annotated[int | None, OnResume.UNTIL_EXAMPLES] = Field(None, ge=1)
    sampling: Sampling
    engine: Engine
    examples_per_block: int = Field(64, ge=1)

    @property
    def of_solutions(self) -> bool:
        """Whether the examples are whole solutions, not chunks."""
        return self.genprm is not None or self.thinkprm is not None

    @model_validator(mode="after")
    def _consistent(self) -> RejectionSample:
        check_form(self)
        in_one_go = self.genprm is not None and not self.genprm.turn_by_turn
        if in_one_go and self.prompt_style == "bare":
            raise ValueError(
                "prompt_style bare knows no critique in one go: set genprm.turn_by_turn to true"
            )
        return self


class TrainClassifier(ComputeStage):
    """Train a discriminative process reward model: + or - after every chunk (paper 4.2's baseline).

    `examples`: a finished `label` run, a file of ClassifierExample records, or others' solutions
    with labelled steps, as `judge` reads them; `on_malformed` and `exclude` as in `Problems`.
    `labels`: `hard` ones are the label rule's, 1 or 0; `soft` ones the value with the chunk
    (Math-Shepherd). `head`: P(+) is of the vocabulary's two `signs`, or of a `scalar` score that
    takes the vocabulary's place. `batch_size` rows of `max_length` tokens, several solutions to a
    row. `steps` and `epochs` are those of `Sft`.
    """

    model: TrainedModel
    examples: str
    on_malformed: OnMalformed = "stop"
    exclude: tuple[str, ...] = ()
    labels: Literal["hard", "soft"] = "hard"
    head: Literal["signs", "scalar"] = "signs"
    prompt_style: PromptStyle = "instruct"
    steps: Annotated[int | None, OnResume.LONGER] = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    batch_size: int = Field(ge=1)
    max_length: int = Field(ge=2)
    training: Training

    @model_validator(mode="after")
    def _consistent(self) -> TrainClassifier:
        if self.head == "scalar" and self.model.lora is not None:
            raise ValueError("with model.lora only adapters are trained: set head to signs")
        self.check_length("steps")
        self.check_micro_batches(self.batch_size, "batch_size", self.training.micro_batches)
        return self


class Evaluate(ComputeStage):
    """ProcessBench: the first chunk judged Negative is the predicted error (paper 4.2). PRMBench: a
    chunk judged Negative is a predicted error.

    `items`: a file or hub id of ProcessBench or PRMBench, or a finished `rollout` run of the
    embedded task, whose exact truth is then used. `split` of ProcessBench is a subset, such as
    `gsm8k`, or a list of them, which are scored one by one and averaged. `limit` of the items, the
    same random ones every time. `votes` judgments per chunk are sampled for Maj@votes, with the
    settings that begin with `vote_`; 0: greedy only. `on_malformed` as in `Problems`. `genprm`: the
    judge is of its form; then Maj@votes is the mean of P(right), and `max_new_tokens` are those of
    a step, all its rounds of code together. `thinkprm`: the judge verifies whole solutions, `votes`
    are chains about one (parallel scaling), and on ProcessBench it is also scored on how well it
    tells right solutions from wrong ones.
    """

    judge: Model
    items: str
    split: str | tuple[str, ...] | None = None
    limit: Annotated[int | None, OnResume.LONGER] = Field(None, ge=1)
    on_malformed: OnMalformed = "stop"
    prompt_style: JudgePromptStyle = "instruct"
    genprm: GenPrmVerdicts | None = None
    thinkprm: ThinkPrmVerdicts | None = None
    max_new_tokens: int = Field(ge=1)
    votes: int = Field(0, ge=0)
    vote_temperature: float = Field(1.0, gt=0)
    vote_top_k: int = Field(0, ge=0)
    vote_top_p: float = Field(1.0, gt=0, le=1)
    unparsed_as: Literal["negative", "positive"] = "negative"
    engine: Engine
    items_per_block: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Evaluate:
        check_form(self)
        return self


class Classify(ComputeStage):
    """ProcessBench with a classifier: the first chunk whose P(+) is below a threshold is the
    predicted error. PRMBench: every such chunk is.

    `items` to `on_malformed` are those of `evaluate`. The threshold is given, or it is the one
    with the best official F1 on the items of `threshold_subset` (ProcessBench only), and is used
    for all. `rows` of `max_length` tokens are scored at once, several solutions to a row.
    """

    classifier: Model
    items: str
    split: str | tuple[str, ...] | None = None
    limit: Annotated[int | None, OnResume.LONGER] = Field(None, ge=1)
    on_malformed: OnMalformed = "stop"
    prompt_style: PromptStyle = "instruct"
    threshold: float | None = Field(None, gt=0, lt=1)
    threshold_subset: str | None = None
    rows: int = Field(8, ge=1)
    max_length: int = Field(ge=2)
    items_per_block: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Classify:
        if (self.threshold is None) == (self.threshold_subset is None):
            raise ValueError(
                "set either threshold, or threshold_subset: the subset of the items that it is "
                f"chosen on; found {self.threshold} and {self.threshold_subset}"
            )
        shards = self.mesh.data * self.mesh.fsdp
        if self.rows % shards:
            raise ValueError(
                f"rows ({self.rows}) must be a multiple of mesh.data x mesh.fsdp = {shards}"
            )
        return self


class JudgedStage(ComputeStage):
    """What asks for opinions of chunks: of a `judge` that reasons, or of a `classifier`."""

    judge: GenerativeJudge | None = None
    classifier: ClassifierJudge | None = None

    @model_validator(mode="after")
    def _one_judge_at_most(self) -> JudgedStage:
        if self.judge is not None and self.classifier is not None:
            raise ValueError("expected a judge or a classifier, found both: set one to null")
        return self


class Beams(Config):
    """`beams` rows a problem: after every chunk one of `width` goes on, as `width` copies. Rows are
    ranked, and solutions weighed, by the `aggregate` of their chunks' scores."""

    beams: int = Field(ge=1)
    width: int = Field(ge=1)
    aggregate: Literal["min", "mean", "last", "product"] = "last"

    @model_validator(mode="after")
    def _consistent(self) -> Beams:
        if self.beams % self.width:
            raise ValueError(f"beams ({self.beams}) must be a multiple of width ({self.width})")
        return self


class Search(JudgedStage, CheckedAnswers):
    """Ways to spend tokens on a problem, with a judge (paper 4.3) and without.

    Greedy decoding, plain sampling and chunk-reset search always; on top the `majority` vote of so
    many samples, the best and the weighted majority of so many (`best_of`: their chunks are then
    judged), `beam` search and `dvts`. `chunking` is that of `Rollout`; `max_chunk_tokens` bounds
    one chunk, `sampling.max_new_tokens` the whole solution, `token_budget` what policy and judge
    write for one problem (`stages.search` says what each method does then).
    """

    policy: Model
    problems: Problems
    prompt_style: PromptStyle = "instruct"
    chunking: Chunking = "tags"
    majority: tuple[PositiveInt, ...] = (2, 4, 8)
    best_of: tuple[PositiveInt, ...] = ()
    max_attempts: int = Field(5, ge=1)
    beam: Beams | None = None
    dvts: Beams | None = None
    token_budget: int | None = Field(None, ge=1)
    max_chunk_tokens: int = Field(ge=1)
    sampling: Sampling
    engine: Engine
    problems_per_block: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Search:
        if self.judge is None and self.classifier is None:
            raise ValueError("expected a judge or a classifier, found neither")
        if self.max_chunk_tokens > self.sampling.max_new_tokens:
            raise ValueError(
                f"max_chunk_tokens ({self.max_chunk_tokens}) must not exceed "
                f"sampling.max_new_tokens ({self.sampling.max_new_tokens})"
            )
        for name, method in (("beam", self.beam), ("dvts", self.dvts)):
            if method is not None and method.beams > max(self.engine.rows):
                raise ValueError(
                    f"the beams of a problem are extended at once: {name}.beams ({method.beams}) "
                    f"must not exceed the largest of engine.rows ({max(self.engine.rows)})"
                )
        return self


class SelectResponses(JudgedStage):
    """The best response of a `rollout` run to every problem, for `sft` (paper 4.3): the one with
    the highest mean score of its chunks, among right ones unless `only_correct` is false. Without a
    judge it is any of them. `tokenizer` is that of the policy which wrote the responses."""

    rollouts: str
    tokenizer: str
    only_correct: bool = True
    problems_per_block: int = Field(64, ge=1)


class GenPrmJudge(Model):
    """A judge of GenPRM's form, which writes `max_new_tokens` about a step at most, greedily."""

    prompt_style: PromptStyle = "instruct"
    max_new_tokens: int = Field(ge=1)
    genprm: GenPrmVerdicts = Field(default_factory=lambda: GenPrmVerdicts.model_validate({}))
    engine: Engine

    @model_validator(mode="after")
    def _consistent(self) -> GenPrmJudge:
        self.genprm.check_style(self.prompt_style)
        return self


class Refine(ComputeStage, CheckedAnswers):
    """A policy thinks again where a judge of GenPRM's form finds its first wrong step, up to
    `turns` times (arXiv 2504.00891).

    `chunking` is that of `Rollout`. `sampling.max_new_tokens` are of one solution; a conversation
    ends before its last turn where the largest of `engine.buckets` has no room for as many again.
    """

    policy: Model
    judge: GenPrmJudge
    problems: Problems
    prompt_style: PromptStyle = "instruct"
    chunking: Chunking = "tags"
    turns: int = Field(3, ge=1)
    sampling: Sampling
    engine: Engine
    problems_per_block: int = Field(32, ge=1)


STAGE_CONFIGS: dict[str, type[Config]] = {
    "sft": Sft,
    "rollout": Rollout,
    "chunk-solutions": ChunkSolutions,
    "annotate": Annotate,
    "label": Label,
    "train-judge": TrainJudge,
    "train-classifier": TrainClassifier,
    "rejection-sample": RejectionSample,
    "evaluate": Evaluate,
    "classify": Classify,
    "search": Search,
    "select-responses": SelectResponses,
    "refine": Refine,
}


# --- files ----------------------------------------------------------------------------------------

C = TypeVar("C", bound=Config)
RUNS = "RUNS/"


def load_config(
    stage: str,
    path: str | Path,
    overrides: tuple[str, ...] = (),
    run_dir: str | Path | None = None,
) -> Config:
    """Read a YAML file as the config of `stage`; `overrides` are `a.b=value`, value in YAML.
    `RUNS/` in the file's own values becomes the directory that `run_dir` lies in.

    Raises UserError for a missing or broken file, one that names another stage, an unknown key (the
    closest real one is named), a wrong type or an inconsistent combination; all problems in one
    message.
    """
    if stage not in STAGE_CONFIGS:
        raise UserError(f"expected a stage of {sorted(STAGE_CONFIGS)}, found {stage!r}")
    path = Path(path)
    try:
        found = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise UserError(f"expected a config file at {str(path)[:200]}: {error}") from None
    if not found:
        raise UserError(f"expected a config file, found {nothing_at(path)}")
    tree = read_settings(path)
    named = tree.pop("stage", stage)
    if named != stage:
        raise UserError(f"expected a config of {stage}, found one of {named} in {path}")
    if run_dir is not None:
        tree = beside(run_dir, tree)
    for override in overrides:
        _apply_override(tree, override)
    return validate(STAGE_CONFIGS[stage], tree, str(path))


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is a mistake: of two values one would be
    lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_NO_YAML = (ValueError, RecursionError, yaml.YAMLError)
"""What is raised for text that is no YAML, or holds more than can be read."""


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def beside(run_dir: str | Path, value: Any) -> Any:
    """Settings whose paths that begin with `RUNS/` are in the directory that `run_dir` lies in."""
    if isinstance(value, dict):
        return {key: beside(run_dir, part) for key, part in value.items()}
    if isinstance(value, list):
        return [beside(run_dir, part) for part in value]
    if isinstance(value, str) and value.startswith(RUNS):
        return str(Path(run_dir).parent / value.removeprefix(RUNS))
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError where it holds something else."""
    try:
        tree = _load_yaml(path.read_text(encoding="utf-8"))
    except _NO_YAML as error:
        raise UserError(f"{path} is not valid YAML in UTF-8: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def read_run_settings(run_dir: str | Path) -> dict[str, Any]:
    """The settings of a run. Raises UserError if its config.yaml is missing or damaged."""
    file = Path(run_dir) / "config.yaml"
    check_run_file(Path(run_dir), file.name)
    if not file.is_file():
        raise UserError(f"expected a run directory at {run_dir}, found no {file.name} in it")
    return read_settings(file)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"--set expects key=value such as sampling.temperature=0.7, found {override!r}"
        )
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"--set {key}: {parent} is a value, not a group of settings")
    try:
        node[last] = _load_yaml(value)
    except _NO_YAML as error:
        raise UserError(f"--set {key}: {value!r} is not valid YAML: {error}") from None


def validate(config_type: type[C], tree: dict[str, Any], where: str) -> C:
    """Build a config; raises UserError with every problem, each with its key and the fix."""
    try:
        return config_type.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(config_type, problem) for problem in error.errors()]
        raise UserError(f"{where}: " + "; ".join(lines)) from None


def completed(config_type: type[Config], tree: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the settings of a run as this version would write them: those that have come since
    the run began have their defaults.

    Raises UserError for settings that are none of this stage, or no longer.
    """
    try:
        return config_type.model_validate(tree).model_dump(mode="json")
    except ValidationError as error:
        problems = error.errors()
    unknown = [".".join(map(str, p["loc"])) for p in problems if p["type"] == "extra_forbidden"]
    others = [_explain(config_type, p) for p in problems if p["type"] != "extra_forbidden"]
    named = [f"the unknown settings {', '.join(unknown)}"] if unknown else []
    raise UserError(
        f"{where} was written by another stage or another version of stepwiser; here it has "
        f"{'; '.join([*named, *others])}. Go on with the version that wrote it, or name a new run "
        "directory"
    )


def _explain(config_type: type[Config], problem: Any) -> str:
    location = [part for part in problem["loc"] if isinstance(part, str)]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(config_type, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        return f"unknown key {key!r}; did you mean {close[0]!r}? (known: {', '.join(known)})"
    if problem["type"] == "missing":
        return f"{key!r} is required and not set"
    if problem["type"] == "model_type":
        found = f"{key} is a group of settings, found {problem['input']!r}"
        return f"{found}: set one of the group, such as {key}.path"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key or 'config'}: {message} (found {problem['input']!r})" if key else message


def _keys_at(config_type: type[Config], location: list[str]) -> list[str]:
    for part in location:
        annotation = config_type.model_fields[part].annotation
        (group,) = {*(get_args(annotation) or (annotation,))} - {NoneType}
        assert isinstance(group, type) and issubclass(group, Config)
        config_type = group
    return sorted(config_type.model_fields)


def dump_config(config: Config) -> str:
    """The config as YAML in the same schema, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_digest(config: Config) -> str:
    """First 16 hex digits of the sha256 of the resolved config."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def settings_marked(config: Config, mark: OnResume, prefix: str = "") -> list[str]:
    """Returns the dotted names of a config's settings that carry this mark."""
    names = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if mark in field.metadata:
            names.append(f"{prefix}{name}")
        elif isinstance(value, Config):
            names += settings_marked(value, mark, f"{prefix}{name}.")
    return names


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every setting in which two dumped configs differ."""
    differences = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            differences += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            differences.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return differences
