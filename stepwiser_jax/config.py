"""The settings of every stage, each with its type, default and meaning.

The text below a field is its documentation: docs/settings.md is made from it.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stepwiser_jax.data.rows import OnMalformed
from stepwiser_jax.records import MAX_ROLLOUTS
from stepwiser_jax.rl.labels import DeadPrefix, load_rule
from stepwiser_jax.text.chat import Argument
from stepwiser_jax.text.chunking import Splitter
from stepwiser_jax.text.prompts import JudgePromptStyle, PromptStyle
from stepwiser_jax.text.templates import read_prompts


class OnResume(Enum):
    """A mark on a setting that may change when a run resumes; all others must stay the same."""

    FREE = "says where or how fast to compute, not what"
    LONGER = "says how much to do (null: everything), and may be raised"
    UNTIL_EXAMPLES = "selects the examples to write, and may change until some are written"


# --- types --------------------------------------------------------------------------------------

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rollouts = Annotated[int, Field(gt=0, le=MAX_ROLLOUTS)]


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


def _kind_of(value: Any) -> Any:
    """Returns the `kind` of a judge; a judge that names none is StepWiser's, and `module:function`
    is the user's own."""
    kind = value.get("kind", "stepwiser") if isinstance(value, dict) else getattr(value, "kind", "")
    return "own" if isinstance(kind, str) and ":" in kind else kind


class Config(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("expected no true or false")
        return value


# --- models and how they are sampled ------------------------------------------------------------


class Mesh(Config):
    """The axes of the device mesh. The product of their sizes is the number of devices used."""

    data: PositiveInt = 1
    """Copies of the model, each of which takes its part of the batch."""
    fsdp: PositiveInt = 1
    """Devices that share the weights of one copy, and its part of the batch."""
    tensor: PositiveInt = 1
    """Devices that share each matrix of the model."""

    def check_rows(self, name: str, sizes: Sizes, mesh_name: str = "mesh") -> None:
        """Raises ValueError unless rows (called `name`) can be dealt out to the devices."""
        shards = self.data * self.fsdp
        if any(rows % shards for rows in sizes):
            raise ValueError(
                f"{name} {list(sizes)} must be multiples of {mesh_name}.data x {mesh_name}.fsdp = "
                f"{shards}"
            )


class Asked(Config):
    """How a model is asked. A trained model keeps it."""

    chat_template_args: dict[str, Argument] = Field(default_factory=dict)
    """Arguments of the chat template, the same in every prompt, such as `{enable_thinking: false}`
    for Qwen3. A trained model keeps them: a stage that names its run leaves them out."""
    prompts: Annotated[dict[str, str], BeforeValidator(read_prompts)] = Field(default_factory=dict)
    """A file of yours with prompts in place of ours (`stepwiser_jax/text/prompts.yaml`), see
    docs/models.md. The run keeps its content. A trained model keeps all its prompts, ours too: a
    stage that names its run leaves them out."""

    @property
    def asked(self) -> dict[str, Any]:
        """Returns these settings as arguments of `text.tokenizer.load_tokenizer`."""
        return {"chat_template_args": self.chat_template_args, "prompts": self.prompts}


class Model(Asked):
    """A model with its tokenizer."""

    path: str
    """A Hugging Face directory or hub id; the run directory of a finished stage that trains; or
    `arithmetic`, the tiny model of the embedded task with fresh weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type to compute in, and to store weights in that are not trained. Weights that are
    trained are always float32: bfloat16 would round an update of 1e-6 away."""

    @property
    def load_args(self) -> dict[str, Any]:
        """Returns these settings as arguments of `distributed.loading`."""
        return {
            "path": self.path,
            "param_dtype": self.dtype,
            "compute_dtype": self.dtype,
            **self.asked,
        }


LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The matrices of each block that get an adapter."""


class Lora(Config):
    """Low-rank adapters of all matrices of the blocks, in float32. Nothing else is trained then."""

    rank: int = Field(16, ge=1)
    """The rank of each adapter."""
    alpha: float = Field(32.0, gt=0)
    """Scales what an adapter adds, by `alpha / rank`."""


class TrainedModel(Model):
    """A model to train."""

    lora: Lora | None = None
    """Train low-rank adapters instead of all weights; `{}` takes their defaults. The exported model
    has the adapters merged."""

    @property
    def load_args(self) -> dict[str, Any]:
        if self.lora is None:
            return super().load_args | {"param_dtype": "float32", "lora": None}
        return super().load_args | {"lora": self.lora.model_dump() | {"targets": LORA_TARGETS}}


class Sampling(Config):
    """How tokens are drawn."""

    temperature: float = Field(1.0, ge=0)
    """0 always takes the likeliest token."""
    top_k: int = Field(0, ge=0)
    """Draw from the `top_k` likeliest tokens; 0 draws from all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability; 1 draws from all."""
    max_new_tokens: int = Field(ge=1)
    """The most tokens of one completion."""

    @property
    def drawing(self) -> dict[str, Any]:
        """The settings without `max_new_tokens`."""
        return self.model_dump(exclude={"max_new_tokens"})


class EngineShapes(Config):
    """The shapes that sampling is compiled for."""

    rows: Sizes = (64,)
    """Completions in flight at a time. The smallest number that holds the work is used."""
    buckets: Sizes
    """Lengths that prompts are padded to, in tokens. The largest is the context: it must hold the
    prompt and its completion."""
    weights: Literal["model", "int8"] = "model"
    """`int8` stores the matrices of the blocks as 8-bit integers: faster on accelerators, and
    sampled from a slightly different distribution."""


class Drawn(Config):
    """What every part that draws tokens needs."""

    sampling: Sampling
    """How tokens are drawn."""


class Sampled(Drawn):
    """What every part that samples from a model on this machine needs."""

    engine: EngineShapes
    """The shapes that sampling is compiled for."""


def _bare_has_no_words(config: Any) -> Any:
    """Raises ValueError for prompts that the style `bare` does not use."""
    groups = (config, *(part for _, part in config if not hasattr(part, "prompt_style")))
    if config.prompt_style == "bare" and any(getattr(group, "prompts", None) for group in groups):
        raise ValueError("prompt_style bare has no words to replace: leave prompts out")
    return config


class Prompted(Config):
    """What every part that asks a model needs."""

    _prompts_are_used = model_validator(mode="after")(_bare_has_no_words)

    prompt_style: PromptStyle = "instruct"
    """`instruct` asks in words, through the chat template. `bare` is the form of the embedded
    task."""


class JudgePrompted(Config):
    """What every part that asks a judge for one chunk needs."""

    _prompts_are_used = model_validator(mode="after")(_bare_has_no_words)

    prompt_style: JudgePromptStyle = "instruct"
    """`instruct` asks in words, through the chat template. `verdict` asks for the verdict without
    an analysis. `bare` is the form of the embedded task."""


class BoundedJudgePrompts(JudgePrompted):
    """What every stage needs that writes prompts for a judge of chunks."""

    max_prompt_tokens: int = Field(3096, ge=1)
    """Examples with a longer prompt for the judge are left out."""


# --- judges -------------------------------------------------------------------------------------


class StepwiserTeacher(Sampled, JudgePrompted, Model):
    """A model that reasons about one chunk, then writes its verdict (StepWiser)."""

    kind: Literal["stepwiser"] = "stepwiser"
    """The kind of judge."""


class GenPrm(Sampled, Prompted, Model):
    """GenPRM (arXiv 2504.00891): a conversation with one turn for every step.
    `sampling.max_new_tokens` bounds a turn."""

    kind: Literal["genprm"] = "genprm"
    """The kind of judge."""
    code_rounds: int = Field(3, ge=0)
    """How often in a turn the judge may have Python code run, in a sandbox; 0 for no code."""

    @model_validator(mode="after")
    def _bare_has_no_code(self) -> GenPrm:
        if self.code_rounds and self.prompt_style == "bare":
            raise ValueError("prompt_style bare has no code in it: set code_rounds to 0")
        return self


class ThinkPrm(Sampled, Prompted, Model):
    """ThinkPRM (arXiv 2504.16828): one chain of thought about a whole solution, then P(yes)."""

    kind: Literal["thinkprm"] = "thinkprm"
    """The kind of judge."""


class Votes(Config):
    """How often a judge is asked."""

    votes: int = Field(0, ge=0)
    """Sample this number of judgments, as `sampling` says, and let the majority decide (GenPRM and
    ThinkPRM: the mean probability). 0 takes one greedy judgment. `evaluate` scores both."""


class Threshold(Config):
    """When a probability is a verdict."""

    threshold: Share | None = None
    """A chunk is wrong if the probability that it is right is below this; by default 0.5."""


class StepwiserJudge(Votes, StepwiserTeacher):
    """StepWiser's judge. The score of a chunk is P(Positive) where the verdict is written; with
    votes it is the mean of theirs."""

    threshold: Share | None = None
    """A chunk is wrong if P(Positive) is below this; null lets the written verdict decide, or the
    majority of votes."""


class GenPrmJudge(Threshold, Votes, GenPrm):
    """GenPRM's judge. The score of a step is P(right)."""


class ThinkPrmJudge(Votes, ThinkPrm):
    """ThinkPRM's judge. `search` and `select-responses` have it verify the prefix that ends with a
    chunk; the score of the chunk is then P(yes)."""

    rounds: int = Field(1, ge=1, le=4)
    """Rounds of thought, one after another (sequential scaling), each of at most
    `sampling.max_new_tokens`."""


class ClassifierJudge(Threshold, Prompted, Model):
    """A classifier trained by `train-classifier`, which reads all chunks of a solution in one pass.
    The score of a chunk is P(+)."""

    kind: Literal["classifier"] = "classifier"
    """The kind of judge."""
    rows: Annotated[int, OnResume.FREE] = Field(8, ge=1)
    """Rows that are read at a time, each with several solutions."""
    max_length: Annotated[int, OnResume.FREE] = Field(ge=2)
    """Tokens of a row. It must hold the longest solution with the prompts of its chunks."""


class OwnArguments(Config):
    """What something of your own is given."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Settings for your own function or class."""


class OwnJudge(OwnArguments, Model):
    """A judge of your own: `kind` is called with these settings, `mesh`, `seed` and `name`, and
    returns a `stepwiser_jax.judges.base.Judge`. See docs/extending.md."""

    kind: str
    """The function or class, `module:name`."""


class GenPrmTeacher(GenPrm):
    """A model that writes critiques of whole solutions, for GenPRM's training."""

    turn_by_turn: bool = False
    """Write a critique as GenPRM does, a turn for every step. By default a critique is written in
    one go, which any model can do."""

    @model_validator(mode="after")
    def _style_has_a_critique(self) -> GenPrmTeacher:
        if self.prompt_style == "bare" and not self.turn_by_turn:
            raise ValueError(
                "prompt_style bare knows no critique in one go: set turn_by_turn to true"
            )
        return self


class ThinkPrmTeacher(ThinkPrm):
    """A model that writes chains about whole solutions, for ThinkPRM's training."""

    max_tokens: int = Field(4096, ge=1)
    """Longer chains are not kept; question and answer count."""


ChunkJudge = Annotated[
    Annotated[StepwiserJudge, Tag("stepwiser")]
    | Annotated[ThinkPrmJudge, Tag("thinkprm")]
    | Annotated[ClassifierJudge, Tag("classifier")]
    | Annotated[OwnJudge, Tag("own")],
    Discriminator(_kind_of),
]
"""A judge that can be asked about the last chunk of an unfinished solution. GenPRM's cannot: it
would write its whole conversation anew for every chunk."""

Judge = Annotated[
    Annotated[StepwiserJudge, Tag("stepwiser")]
    | Annotated[GenPrmJudge, Tag("genprm")]
    | Annotated[ThinkPrmJudge, Tag("thinkprm")]
    | Annotated[ClassifierJudge, Tag("classifier")]
    | Annotated[OwnJudge, Tag("own")],
    Discriminator(_kind_of),
]

Teacher = Annotated[
    Annotated[StepwiserTeacher, Tag("stepwiser")]
    | Annotated[GenPrmTeacher, Tag("genprm")]
    | Annotated[ThinkPrmTeacher, Tag("thinkprm")],
    Discriminator(_kind_of),
]

# --- data ---------------------------------------------------------------------------------------


class DataSource(Config):
    """Data, and which rows of it are used. Rows are taken in this order: they are shuffled; rows
    that cannot be read are left out; excluded problems are left out; `limit` of the rest are used.
    """

    source: str
    """What to read. The stage says what it may be: a file, a hub id, a run directory, the name of a
    generator of the embedded task, or a function of your own as `module:function`."""
    split: str | tuple[str, ...] | None = None
    """The split of a hub data set, or the subset of ProcessBench, such as `gsm8k`; only there it
    may be a list. The embedded task has the splits `rollout`, `dev` and `test`."""
    subset: str | None = None
    """The configuration of a hub data set, such as `main`."""
    shuffle: bool = False
    """Take the rows in an order that `seed` decides, the same on every machine."""
    limit: int | None = Field(None, ge=1)
    """Use at most this number of rows; null uses all. A generator makes this number."""
    on_malformed: OnMalformed = "stop"
    """What to do with a row that cannot be read: `stop`, or `skip` it and count it."""
    exclude: tuple[str, ...] = ()
    """Leave out the problems of these evaluation sets: local files, hub ids (all their splits), or
    finished `rollout` runs."""
    seed: Seed = 0
    """Decides the order of shuffled rows, and what a generator makes."""

    @property
    def one_split(self) -> str | None:
        """Returns the split, which must not be a list."""
        assert not isinstance(self.split, tuple)
        return self.split

    def check_unused(self, name: str, used: tuple[str, ...]) -> None:
        """Raises ValueError for settings of `name` that the stage does not use."""
        defaults = type(self).model_fields
        unused = [k for k, value in self if k not in used and value != defaults[k].default]
        if unused:
            raise ValueError(
                f"{name} takes {', '.join(used)} here, found {', '.join(unused)}: leave them out"
            )


# --- stages -------------------------------------------------------------------------------------


class Stage(Config):
    """What every stage has."""

    seed: Seed = 0
    """Decides everything random. The same seed gives the same records."""


class ComputeStage(Stage):
    """What every stage has that runs a model."""

    mesh: Annotated[Mesh, OnResume.FREE] = Mesh()
    """The devices. When there are several processes, a stage that trains lays out the devices of
    all of them, and a stage that samples those of each process."""
    compilation_cache: Annotated[str | None, OnResume.FREE] = None
    """A directory that keeps compiled programs for later runs; runs may share it."""


class SamplingStage(ComputeStage):
    """What every stage has that samples block after block."""

    block_size: int = Field(64, ge=1)
    """Inputs (problems, trajectories, items, ...) of a block. A block is sampled at once, then
    written; a stopped run loses at most the block it is in."""

    @model_validator(mode="after")
    def _rows_fit(self) -> SamplingStage:
        for name, part in (("", self), *((f"{name}.", part) for name, part in self)):
            if isinstance(part, Sampled):
                self.mesh.check_rows(f"{name}engine.rows", part.engine.rows)
            elif isinstance(part, ClassifierJudge):
                self.mesh.check_rows(f"{name}rows", (part.rows,))
        return self


class PolicyStage(SamplingStage, Sampled):
    """What every stage has that samples from a policy."""

    policy: Model
    """The model that solves problems."""
    verifier: str = "mathematics"
    """What says whether a solution is right: `mathematics` (the meaning of its final answer),
    `code` (the unit tests of the problem), or a function of your own as `module:function`."""


class SolvingStage(PolicyStage, Prompted):
    """What every stage has that solves problems."""

    problems: DataSource
    """A file, a hub id, a finished `rollout` run (its problems), or `arithmetic` or
    `arithmetic-mod-7`, for which `split` and `limit` are required. Duplicates, and problems whose
    answers cannot be verified, are left out after the limit."""
    chunking: Chunking = "tags"
    """What ends a chunk: `tags`, which the prompt then asks for; `blank_lines`; or a list of
    strings, such as ["\\n"]."""

    @model_validator(mode="after")
    def _problems_are_consistent(self) -> SolvingStage:
        problems = self.problems
        is_generated = problems.source in ("arithmetic", "arithmetic-mod-7")
        if is_generated and (problems.shuffle or problems.exclude):
            raise ValueError(
                f"shuffle and exclude are for data sets, and {problems.source} generates its "
                "problems at random, each split apart: leave them out"
            )
        if isinstance(problems.split, tuple):
            raise ValueError(f"problems.split: expected one split, found {list(problems.split)}")
        return self


class Rollout(SolvingStage):
    """Sample chunked solutions of every problem (paper 4.1)."""

    group_size: int = Field(16, ge=1)
    """Solutions of each problem."""


class FromRollouts(Config):
    """What every stage has that reads a `rollout` run."""

    rollouts: str
    """A finished `rollout` run."""


class FromSolutions(FromRollouts):
    """What every stage has that reads the text of the solutions of a `rollout` run."""

    tokenizer: str
    """The model whose tokenizer wrote the solutions: the policy of that run."""


class TeacherModel(Sampled, Prompted, Model):
    """A model that proposes how to cut a solution."""

    kind: Literal["model"] = "model"
    """The kind of teacher."""


class TeacherServer(Drawn, Asked, Prompted):
    """A model on an OpenAI-compatible server, such as vLLM's, that takes and returns token ids."""

    kind: Literal["server"] = "server"
    """The kind of teacher."""
    url: Annotated[str, OnResume.FREE]
    """The address of the server's API, such as `http://localhost:8000/v1`."""
    model: str
    """The name of the model on the server."""
    tokenizer: str
    """A directory or hub id with the tokenizer of that model."""
    context: int = Field(ge=2)
    """The context of the model, in tokens."""

    @field_validator("url")
    @classmethod
    def _is_of_http(cls, url: str) -> str:
        TypeAdapter(AnyHttpUrl).validate_python(url)
        return url


class TeacherRule(Config):
    """A rule that cuts a solution by its punctuation."""

    kind: Literal["rule"] = "rule"
    """The kind of teacher."""
    splitter: Splitter
    """Where to cut."""


def _teacher_kind_of(value: Any) -> Any:
    return value.get("kind", "model") if isinstance(value, dict) else getattr(value, "kind", "")


class ChunkSolutions(SamplingStage, FromSolutions):
    """Cut the right solutions of a `rollout` run into chunks (paper 3.1): examples for `sft`."""

    teacher: Annotated[
        Annotated[TeacherModel, Tag("model")]
        | Annotated[TeacherServer, Tag("server")]
        | Annotated[TeacherRule, Tag("rule")],
        Discriminator(_teacher_kind_of),
    ]
    """Who cuts: a model (kind `model`), a model on a server (`server`), or a rule (`rule`)."""
    num_segmentations: int = Field(8, ge=1)
    """Proposals of the teacher for each solution; the majority of them is kept."""
    max_per_problem: int = Field(4, ge=1)
    """The most right solutions of a problem that are cut."""


class LabelRule(Config):
    """How the value before a chunk (v) and after it (q) become a label."""

    rule: str = "rel_effective"
    """`abs_q`, `rel_effective` or `rel_ratio` (paper eqs 1-3), `relative_progress` (GenPRM), or a
    function of your own as `module:function`."""
    rule_args: dict[str, float] = Field(default_factory=dict)
    """Arguments of the rule, such as `{alpha: 0.8}`; what is not given has the rule's default."""
    dead_prefix: DeadPrefix = "negative"
    """What becomes of a chunk after a prefix worth 0. `negative`, the paper's way: the rule labels
    it, Negative if it too is worth 0, else Positive. `drop`, ours: it gets no label."""

    @model_validator(mode="after")
    def _rule_is_there(self) -> LabelRule:
        load_rule(self.rule, self.rule_args)
        return self


class AdaptiveRollouts(LabelRule):
    """Stop sampling a prefix once the labels around it are known. `label` must then use the same
    rule with the same arguments, the same `dead_prefix` and no `min_prefix_value`, and a classifier
    learns no soft labels: the labels are known, but the values are not."""

    confidence: float = Field(1.0, gt=0.5, le=1)
    """How sure a label must be. With 1 it can no longer change: labels are then those of
    `num_rollouts` rollouts."""


def _bounds_ascend(pairs: tuple[tuple[float, int], ...]) -> tuple[tuple[float, int], ...]:
    bounds = [bound for bound, _ in pairs]
    if not bounds or bounds != sorted(set(bounds)) or bounds[0] <= 0 or bounds[-1] != 1:
        raise ValueError(
            f"expected pairs (bound, rollouts) with bounds above 0, ascending, the last of them 1, "
            f"found bounds {bounds}"
        )
    return pairs


NumRollouts = Annotated[
    Annotated[Rollouts, Tag("number")]
    | Annotated[tuple[tuple[float, Rollouts], ...], AfterValidator(_bounds_ascend), Tag("pairs")],
    Discriminator(lambda value: "pairs" if isinstance(value, list | tuple) else "number"),
]


class Annotate(PolicyStage, FromRollouts):
    """Estimate the value of every prefix by Monte Carlo rollouts (paper 3.2)."""

    num_rollouts: NumRollouts = 16
    """Rollouts of each prefix (M), or the most of them if they are `adaptive`. A list of pairs
    (bound, M) makes M depend on the problem's share of right trajectories: M is that of the first
    bound above it (GenPRM: `[[0.1, 128], [0.9, 64], [1, 32]]`)."""
    adaptive: AdaptiveRollouts | None = None
    """Stop early when the labels are known; null never does."""
    drop_uniform_problems: bool = True
    """Leave out problems whose trajectories are all right or all wrong."""
    max_problems: int | None = Field(None, ge=1)
    """Draw this number of the problems that are left."""
    max_trajectories_per_problem: int | None = Field(None, ge=1)
    """Use the first trajectories of each problem only."""
    limit: int | None = Field(None, ge=1)
    """Use the first trajectories of all problems only."""

    @property
    def rollouts_by_pass_rate(self) -> tuple[tuple[float, int], ...]:
        """`num_rollouts` as pairs (bound, M)."""
        pairs = self.num_rollouts
        return ((1.0, pairs),) if isinstance(pairs, int) else pairs

    @property
    def most_rollouts(self) -> int:
        """The largest M of any problem."""
        return max(num_rollouts for _, num_rollouts in self.rollouts_by_pass_rate)

    def rollouts_at(self, pass_rate: float) -> int:
        """Returns M for a problem whose trajectories are right at this rate."""
        pairs = self.rollouts_by_pass_rate
        return next((m for bound, m in pairs if pass_rate < bound), pairs[-1][1])


class Label(Stage, FromSolutions, Asked, BoundedJudgePrompts, LabelRule):
    """Turn prefix values into chunk labels and judge examples (paper eqs 1-3; filters of 4.1)."""

    values: str
    """A finished `annotate` run of these rollouts."""
    min_prefix_value: float = Field(0.0, ge=0, lt=1)
    """Labelled chunks whose prefix was worth less give no example; 0 leaves none out, as the paper
    has it. Any number above 0 also leaves out chunks after a prefix worth 0, whatever `dead_prefix`
    says. With M rollouts a prefix worth v fails M times by chance with probability (1 - v)^M. Above
    0 the values must be of all M rollouts: `adaptive` ones stop when labels are known, and chance
    in the first few would decide which examples are kept."""
    balance: bool = True
    """Keep as many examples with positive labels as with negative ones."""


# --- stages that train --------------------------------------------------------------------------


class Optimizer(Config):
    """AdamW with gradients clipped to norm 1, and its learning rate. Defaults are verl's."""

    learning_rate: float = Field(gt=0)
    """The peak of the learning rate."""
    schedule: Literal["cosine", "constant"] = "constant"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Updates in which the learning rate rises linearly to its peak."""
    end_fraction: float = Field(0.0, ge=0, le=1)
    """The share of the peak at which `cosine` ends."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of matrices. Norms and biases do not decay; in verl they do."""
    b2: float = Field(0.999, ge=0, lt=1)
    """The decay of the second moment; that of the first is 0.9."""


class Training(Config):
    """How a model is trained, beside its data and its loss."""

    optimizer: Optimizer
    """The optimizer."""
    micro_batches: int = Field(1, ge=1)
    """Cut each batch into this number of parts and add their gradients up, to save memory."""
    remat: bool = False
    """Compute activations again in the backward pass, to save memory."""
    checkpoint_every: int = Field(100, ge=1)
    """Updates (iterations of `train-judge`) between checkpoints. The last two are kept, and the
    best one if there is a `validation`."""


class FromExamples(Config):
    """What every stage has that reads examples."""

    used: ClassVar = ("source", "on_malformed", "exclude")
    """What the stage uses of `examples`."""

    examples: DataSource
    """`sft`: an `SftExample` or `Dialogue` file, a finished run of `rejection-sample`,
    `chunk-solutions` or `select-responses`, or a generator of the embedded task
    (`arithmetic-policy`, `-untagged`, `-segmenter`, `-judge`, `-verdicts`, `-genprm`, `-thinkprm`;
    or `arithmetic-mod-7-policy` and so on).
    Other stages: a finished `label` run, a `JudgeExample` or `ClassifierExample` file, or solutions
    with labelled steps in a known format (ProcessBench, PRM800K, Math-Shepherd, ...)."""

    @model_validator(mode="after")
    def _examples_are_consistent(self) -> FromExamples:
        self.examples.check_unused("examples", self.used)
        return self


class Validation(Config):
    """How good the model is while it trains, on examples that it does not learn."""

    examples: DataSource
    """The held-out examples: of the kinds that `examples` of the stage may be. Their problems are
    left out of the training, so they may be a part of the same data:
    `{source: RUNS/labels, shuffle: true, limit: 512}`. With `shuffle` whole problems are drawn,
    until they have at least `limit` examples, since nothing of them is learned."""
    every: int = Field(ge=1)
    """Updates (iterations of `train-judge`) between two measurements. There is also one before the
    first update and one after the last."""
    export: Literal["last", "best"] = "last"
    """Export the model after the last update, or the one that did best: the lowest loss of `sft`,
    the highest AUC of a judge or a classifier. The earliest of equal ones is the best."""


class TrainingStage(ComputeStage, FromExamples):
    """What every stage has that trains."""

    model: TrainedModel
    """The model to begin with."""
    training: Training
    """How it is trained."""
    validation: Validation | None = None
    """Measure the model on held-out examples while it trains; null does not."""
    epochs: int | None = Field(None, ge=1)
    """Learn every example this number of times, in place of `steps` or `iterations`."""

    @model_validator(mode="after")
    def _validation_is_consistent(self) -> TrainingStage:
        if self.validation is not None:
            used = tuple(dict.fromkeys((*self.used, "shuffle", "limit", "seed")))
            self.validation.examples.check_unused("validation.examples", used)
        return self

    def check_micro_batches(self, rows: int, name: str) -> None:
        """Raises ValueError unless `rows` (called `name`) can be cut into micro-batches, and each
        of them dealt out to the devices."""
        micro_batches = self.training.micro_batches
        parts = self.mesh.data * self.mesh.fsdp * micro_batches
        if rows % parts:
            raise ValueError(
                f"rows per update ({rows} = {name}) must be a multiple of training.micro_batches "
                f"({micro_batches}) x mesh.data x mesh.fsdp = {parts}"
            )

    def check_length(self, name: str, length: int | None) -> None:
        """Raises ValueError unless either `length` (called `name`) or `epochs` is given."""
        given = [
            key for key, value in ((name, length), ("epochs", self.epochs)) if value is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"expected either {name} or epochs, found {' and '.join(given) or 'neither'}: set "
                "one of them, and the other to null"
            )


class SupervisedStage(TrainingStage, Prompted):
    """What every stage has that learns given targets."""

    steps: Annotated[int | None, OnResume.LONGER] = Field(None, ge=1)
    """Optimizer updates."""
    batch_size: int = Field(ge=1)
    """Rows of an update, each with several examples."""
    max_length: int = Field(ge=2)
    """Tokens of a row. Longer examples are left out."""

    @model_validator(mode="after")
    def _rows_and_length(self) -> SupervisedStage:
        self.check_length("steps", self.steps)
        self.check_micro_batches(self.batch_size, "batch_size")
        return self


class Sft(SupervisedStage):
    """Fine-tune a model: a policy on chunked solutions (paper 3.1), or a judge on judgments."""

    used = ("source", "limit", "seed")


class TrainClassifier(SupervisedStage):
    """Train a discriminative process reward model: + or - after every chunk (paper 4.2)."""

    labels: Literal["hard", "soft"] = "hard"
    """`hard` learns the labels, `soft` the value after the chunk (Math-Shepherd). That must be of
    all M rollouts: `adaptive` ones stop when the label is known, with a value that is not."""
    head: Literal["signs", "scalar"] = "signs"
    """`signs` reads P(+) from two tokens of the vocabulary; `scalar` from a new output."""

    @model_validator(mode="after")
    def _adapters_have_no_new_output(self) -> TrainClassifier:
        if self.head == "scalar" and self.model.lora is not None:
            raise ValueError("with model.lora only adapters are trained: set head to signs")
        return self


class Grpo(Config):
    """The loss of GRPO: the paper's settings where it states them, verl's defaults elsewhere."""

    clip_eps_low: float = Field(0.2, ge=0)
    """The importance ratio is clipped at 1 minus this."""
    clip_eps_high: float = Field(0.28, ge=0)
    """The importance ratio is clipped at 1 plus this (DAPO's clip-higher)."""
    kl_coef: float = Field(0.0, ge=0)
    """The weight of the KL divergence from the model that training began with."""
    sampler_correction: Literal["auto", "none", "token", "sequence"] = "auto"
    """Weight each token's loss by how much likelier the judge makes the token, or its sequence,
    than the sampler did. `auto`: `token` with `engine.weights: int8`, else `none`."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """What the loss is a mean over: tokens, or judgments, each with the mean of its tokens."""
    drop_zero_variance: bool = False
    """Leave out groups without signal, whose judgments all have the same reward. Their advantages
    are 0, so they add nothing to the loss but the KL term; without them an update is cheaper."""
    denominator: Literal["sampled", "kept"] = "sampled"
    """What divides the sum over groups if some are left out: the tokens (or judgments) of all of
    them, as in verl, where none is left out; or of those that are kept (DAPO), which makes updates
    larger. If further draws give more groups than are learned, those that are learned stand for
    all that were kept. The KL term is always a mean over those that are learned."""
    max_resamples: int = Field(0, ge=0)
    """At most this number of times an iteration, sample new groups in place of those that were left
    out (DAPO's dynamic sampling)."""

    @property
    def counts_left_out(self) -> bool:
        """Whether groups are left out that count in the denominator."""
        return self.drop_zero_variance and self.denominator == "sampled"

    @model_validator(mode="after")
    def _replaces_what_is_left_out(self) -> Grpo:
        if self.max_resamples and not self.drop_zero_variance:
            raise ValueError(
                f"max_resamples ({self.max_resamples}) replaces groups that are left out: set "
                "drop_zero_variance to true, or max_resamples to 0"
            )
        return self


class TrainJudge(TrainingStage, Sampled, BoundedJudgePrompts):
    """Train a judge by GRPO to reason about a chunk before its verdict (paper 3.3)."""

    iterations: Annotated[int | None, OnResume.LONGER] = Field(None, ge=1)
    """Iterations: each samples judgments and makes updates on them."""
    prompts_per_iteration: int = Field(ge=1)
    """Chunks that are judged in an iteration."""
    group_size: int = Field(4, ge=2)
    """Judgments of each chunk."""
    updates_per_iteration: int = Field(1, ge=1)
    """Optimizer updates of an iteration, each on its part of the chunks."""
    reward: str = "verdict"
    """What a judgment earns: a name of `rl.rewards`, or `module:function` of your own. `verdict` is
    1 if the verdict is the label, else 0."""
    reward_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reward. For a judge that is to write its verdict and nothing else,
    `verdict` takes `format_penalty`: any other judgment earns the negative of it. It is 1 in the
    paper's ablation of reasoning (A.1)."""
    row_lengths: Sizes
    """Lengths of packed rows, in tokens. The smallest that holds the longest group is used; a group
    is its prompt once, then its completions."""
    sampling_mesh: Annotated[Mesh | None, OnResume.FREE] = None
    """How all devices are laid out for sampling; null lays them out as `mesh`."""
    grpo: Grpo = Field(default_factory=lambda: Grpo.model_validate({}))
    """The loss."""

    @property
    def wants_bare_verdict(self) -> bool:
        """Whether a judgment earns less if it holds more than its verdict."""
        return self.reward == "verdict" and bool(self.reward_args.get("format_penalty"))

    @property
    def sampling_axes(self) -> dict[str, int] | None:
        """The axes of `sampling_mesh`."""
        return None if self.sampling_mesh is None else self.sampling_mesh.model_dump()

    @property
    def correction(self) -> Literal["none", "token", "sequence"]:
        """`grpo.sampler_correction`, with `auto` resolved.

        With int8 weights the sampler's policy is not the one that learns; otherwise the two differ
        by rounding only. `auto` never takes `sequence`: a product of many ratios is mostly noise.
        """
        if self.grpo.sampler_correction == "auto":
            return "token" if self.engine.weights == "int8" else "none"
        return self.grpo.sampler_correction

    @model_validator(mode="after")
    def _sampling_is_consistent(self) -> TrainJudge:
        name = "mesh" if self.sampling_mesh is None else "sampling_mesh"
        mesh = self.sampling_mesh or self.mesh
        mesh.check_rows("engine.rows", self.engine.rows, name)
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

    @model_validator(mode="after")
    def _updates_are_consistent(self) -> TrainJudge:
        self.check_length("iterations", self.iterations)
        if self.prompts_per_iteration % self.updates_per_iteration:
            raise ValueError(
                f"prompts_per_iteration ({self.prompts_per_iteration}) must be a multiple of "
                f"updates_per_iteration ({self.updates_per_iteration})"
            )
        self.check_micro_batches(
            self.prompts_per_iteration // self.updates_per_iteration,
            "prompts_per_iteration / updates_per_iteration",
        )
        if self.wants_bare_verdict and self.prompt_style == "instruct":
            raise ValueError(
                "format_penalty punishes the analysis that prompt_style 'instruct' asks for: set "
                "prompt_style to 'verdict', or leave format_penalty out of reward_args"
            )
        return self


# --- stages that use judges ---------------------------------------------------------------------


class RejectionSample(SamplingStage, FromExamples):
    """Sample judgments of labelled chunks, or solutions, and keep those that agree with the labels:
    examples for `sft` (paper A.1, RS-FT)."""

    used = ("source", "limit", "on_malformed", "exclude")

    judge: Teacher
    """Who writes: `stepwiser` judges chunks, `genprm` and `thinkprm` whole solutions."""
    samples: int = Field(4, ge=1)
    """Judgments of each example."""
    balance: Annotated[bool, OnResume.UNTIL_EXAMPLES] = True
    """Keep as many judgments of positive labels as of negative ones. It may still be changed if
    none was left."""
    max_examples: Annotated[int | None, OnResume.UNTIL_EXAMPLES] = Field(None, ge=1)
    """Draw this number of the judgments that are left. It may still be changed if none was left."""

    @property
    def of_solutions(self) -> bool:
        """Whether the examples are whole solutions, not chunks."""
        return not isinstance(self.judge, StepwiserTeacher)

    @model_validator(mode="after")
    def _judge_reasons(self) -> RejectionSample:
        if self.judge.prompt_style == "verdict":
            raise ValueError("judge.prompt_style: a verdict alone is no example: instruct or bare")
        return self


class Benchmark(DataSource):
    """A benchmark for judges, and which items of it are used."""

    limit: Annotated[int | None, OnResume.LONGER] = Field(None, ge=1)
    """Use this number of items, the same random ones every time; null uses all."""


class Evaluate(SamplingStage):
    """Score a judge on ProcessBench (the first chunk judged wrong is the predicted error, paper
    4.2) or PRMBench (every chunk judged wrong is)."""

    judge: Judge
    """The judge: `stepwiser`, `classifier`, `genprm` or `thinkprm`."""
    benchmark: Benchmark
    """A file or hub id of ProcessBench or PRMBench, or a finished `rollout` run of the embedded
    task, whose truth is known. `split` is one of ProcessBench's subsets or a list of them."""
    threshold_subset: str | None = None
    """Choose the threshold with the best F1 on this subset of ProcessBench and use it for all, in
    place of `judge.threshold`. Not for `thinkprm`, which has no probabilities of steps."""

    @model_validator(mode="after")
    def _consistent(self) -> Evaluate:
        self.benchmark.check_unused("benchmark", ("source", "split", "limit", "on_malformed"))
        if self.threshold_subset is None:
            return self
        if isinstance(self.judge, ThinkPrmJudge):
            raise ValueError(
                "threshold_subset is for a judge that gives steps a probability, found one of kind "
                "thinkprm: set it to null"
            )
        threshold = None if isinstance(self.judge, OwnJudge) else self.judge.threshold
        if threshold is not None:
            raise ValueError(
                "set either judge.threshold, or threshold_subset: the subset that it is chosen on; "
                f"found {threshold} and {self.threshold_subset!r}"
            )
        return self


class Ranked(Config):
    """How solutions of a problem are ranked."""

    aggregate: Literal["min", "mean", "last", "product"] = "last"
    """How the scores of its chunks become the score of a solution."""


class Beams(Ranked):
    """A search over several unfinished solutions of a problem."""

    beams: int = Field(ge=1)
    """Unfinished solutions of a problem at a time."""
    width: int = Field(ge=1)
    """After every chunk one in `width` solutions goes on, as `width` copies."""

    @model_validator(mode="after")
    def _consistent(self) -> Beams:
        if self.beams % self.width:
            raise ValueError(f"beams ({self.beams}) must be a multiple of width ({self.width})")
        return self


class OwnMethod(OwnArguments, Ranked):
    """A search method of your own."""

    method: str
    """The function, `module:name`, a `stepwiser_jax.search.methods.Method`."""
    beams: int = Field(1, ge=1)
    """Unfinished solutions of a problem that it begins with."""


FirstAttempt = Literal["sampled", "greedy"]
"""How chunk-reset search writes a chunk before any is rejected."""


class Search(SolvingStage):
    """Compare ways to spend tokens on a problem, with a judge (paper 4.3) and without. Greedy
    decoding, plain sampling and chunk-reset search are always among them."""

    judge: ChunkJudge
    """The judge: `stepwiser`, `classifier` or `thinkprm`."""
    majority: tuple[PositiveInt, ...] = (2, 4, 8)
    """Numbers of samples that vote."""
    best_of: tuple[PositiveInt, ...] = ()
    """Numbers of samples whose chunks are judged: the best one, and their weighted vote."""
    max_attempts: int = Field(5, ge=1)
    """How often chunk-reset search writes a chunk that is rejected; the last attempt is kept."""
    first_attempt: FirstAttempt = "sampled"
    """`greedy`: chunk-reset search takes the likeliest tokens first, and samples a chunk only after
    a rejection. This is ours; the paper samples every attempt."""
    beam: Beams | None = None
    """Beam search; null leaves it out."""
    dvts: Beams | None = None
    """Diverse verifier tree search; null leaves it out."""
    own: dict[str, OwnMethod] = Field(default_factory=dict)
    """Search methods of your own, by name. See docs/extending.md."""
    token_budget: int | None = Field(None, ge=1)
    """Tokens that policy and judge may write for a problem together; null for no limit."""
    max_chunk_tokens: int = Field(ge=1)
    """The most tokens of one chunk; `sampling.max_new_tokens` bounds the whole solution."""

    @model_validator(mode="after")
    def _consistent(self) -> Search:
        if self.max_chunk_tokens > self.sampling.max_new_tokens:
            raise ValueError(
                f"max_chunk_tokens ({self.max_chunk_tokens}) must not exceed "
                f"sampling.max_new_tokens ({self.sampling.max_new_tokens})"
            )
        if self.sampling.temperature == 0 and self.max_attempts > 1:
            raise ValueError(
                "expected sampling.temperature above 0 with max_attempts above 1, found 0 and "
                f"{self.max_attempts}: a rejected chunk would be written again word for word. Set "
                "max_attempts to 1, or raise the temperature and set first_attempt to greedy"
            )
        searches = {"beam": self.beam, "dvts": self.dvts}
        for name, method in searches.items():
            if method is not None and self.sampling.temperature == 0 and method.beams > 1:
                raise ValueError(
                    f"expected sampling.temperature above 0 with {name}.beams above 1, found 0 and "
                    f"{method.beams}: every beam of a problem would be written again word for "
                    f"word. Set {name}.beams to 1, leave {name} out, or raise the temperature"
                )
        for name, method in (*searches.items(), *self.own.items()):
            if method is not None and method.beams > max(self.engine.rows):
                raise ValueError(
                    f"the beams of a problem are extended at once: {name}.beams ({method.beams}) "
                    f"must not exceed the largest of engine.rows ({max(self.engine.rows)})"
                )
        return self


class SelectResponses(SamplingStage, FromSolutions):
    """Choose the best response of a `rollout` run to every problem, for `sft` (paper 4.3): the one
    with the highest mean score of its chunks."""

    judge: ChunkJudge | None = None
    """The judge: `stepwiser`, `classifier` or `thinkprm`; null chooses at random."""
    only_correct: bool = True
    """Choose among responses with the right answer only."""


class Refine(SolvingStage):
    """Let a policy think again where GenPRM's judge finds its first wrong step."""

    judge: GenPrmJudge
    """The judge, of kind `genprm`. It writes greedily."""
    turns: int = Field(3, ge=1)
    """How often the policy thinks again, at most."""

    @model_validator(mode="after")
    def _judge_writes_greedily(self) -> Refine:
        if self.judge.votes:
            raise ValueError("judge.votes: refine takes the greedy judgment: set votes to 0")
        return self


STAGE_CONFIGS: dict[str, type[Stage]] = {
    "sft": Sft,
    "rollout": Rollout,
    "chunk-solutions": ChunkSolutions,
    "annotate": Annotate,
    "label": Label,
    "train-judge": TrainJudge,
    "train-classifier": TrainClassifier,
    "rejection-sample": RejectionSample,
    "evaluate": Evaluate,
    "search": Search,
    "select-responses": SelectResponses,
    "refine": Refine,
}
