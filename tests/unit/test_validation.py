"""What a training measures on held-out examples, which model is the best, and what is exported."""

import functools
import json
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from stepwiser_jax import config as settings
from stepwiser_jax.commands.recipe import readable
from stepwiser_jax.config import DataSource
from stepwiser_jax.config_files import load_config
from stepwiser_jax.data.held_out import drop_problems_of, part_of
from stepwiser_jax.distributed.loading import load_model
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import Completion, SamplingParams
from stepwiser_jax.judges.base import ChunkJudgment
from stepwiser_jax.judges.validation import (
    check_classes,
    judgment_metrics,
    log_loss,
    measure_judge,
)
from stepwiser_jax.model.hf import load_hf
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import ClassifierExample, Dialogue, JudgeExample, SftExample, Verdict
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.runs.signals import Interrupted, stop
from stepwiser_jax.stages import train_classifier, train_judge
from stepwiser_jax.text.verdict_tokens import VerdictTokens
from stepwiser_jax.training.batches import Document, document_loader
from stepwiser_jax.training.checkpoint import Checkpointer
from stepwiser_jax.training.loop import TrainingRun, say_held_out
from stepwiser_jax.training.sft_loss import cross_entropy_loss, num_target_tokens
from stepwiser_jax.training.validation import Measurements, mean_loss, packed_batches
from tiny import logged, tiny_config

# --- what is measured ---------------------------------------------------------------------------


def judgment(verdict, p_positive=0.5):
    return ChunkJudgment("", verdict, p_positive, 1)


def test_judgments_are_counted_by_class_and_by_position():
    yes, no, nothing = Verdict.POSITIVE, Verdict.NEGATIVE, Verdict.UNPARSED
    labels = [True, True, True, True, False, False, False]
    found = [yes, yes, yes, nothing, no, yes, nothing]
    scores = [0.9, 0.6, 0.6, 0.5, 0.1, 0.6, 0.5]
    positions = [0, 0, 1, None, 1, 10, 42]
    judgments = [judgment(*pair) for pair in zip(found, scores, strict=True)]
    assert judgment_metrics(labels, judgments, positions) == {
        "accuracy": 4 / 7,
        "accuracy_positive": 3 / 4,
        "accuracy_negative": 1 / 3,
        "balanced_accuracy": (3 / 4 + 1 / 3) / 2,
        "auc": 9.5 / 12,
        "accuracy_at_0": 1.0,
        "accuracy_at_1": 1.0,
        "accuracy_from_10": 0.0,
    }


def test_a_class_that_no_chunk_has_is_left_out():
    found = judgment_metrics([False], [judgment(Verdict.NEGATIVE)], [None])
    assert found == {"accuracy": 1.0, "accuracy_negative": 1.0}


def test_log_loss_is_the_cross_entropy():
    targets, p = [1.0, 0.0, 0.25], [0.9, 0.2, 0.5]
    expected = np.mean([-np.log(0.9), -np.log(0.8), -np.log(0.5)])
    np.testing.assert_allclose(log_loss(targets, p), expected)
    assert 30 < log_loss([0.0], [1.0]) < 40


@pytest.mark.parametrize(
    ("example_id", "history", "position"),
    [
        ("p#0/0", "", 0),
        ("p#0/12", "x", 12),
        ("p#0/3", "", None),
        ("p#0/0", "x", None),
        ("gsm8k/000003", "x", None),
        ("mine", "", None),
    ],
)
def test_an_example_knows_its_position_by_its_id(example_id, history, position):
    assert JudgeExample(example_id, "p", "q", history, "c", True).position == position


def test_the_loss_is_that_of_each_token_however_documents_are_packed():
    model = Transformer(tiny_config("qwen2"), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    documents = []
    for length in (3, 9, 5, 8, 2, 7):
        learned = np.arange(length) > rng.integers(1, length)
        learned[-1] = True
        documents.append(Document(rng.integers(1, 64, length).astype(np.int32), learned))
    batches = packed_batches(documents, 2, 12)
    assert len(batches) > 1 and sum(b.target_mask_BT.sum() for b in batches) == sum(
        d.target_mask_T.sum() for d in documents
    )
    terms = []
    for document in documents:
        ids = document.tokens_T[None]
        logits = np.asarray(model(ids, np.arange(ids.shape[1])[None], np.ones_like(ids)))[0]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        terms += [-logprobs[t - 1, ids[0, t]] for t in np.flatnonzero(document.target_mask_T)]
    found = mean_loss(model, batches, cross_entropy_loss, make_mesh())
    np.testing.assert_allclose(found, np.mean(terms), rtol=1e-5)


def test_the_greedy_judgments_are_the_engines(request, tmp_path, monkeypatch):
    """They do not touch the cache, and a stop ends them."""
    file = request.config.rootpath / "configs" / "smoke_judge.yaml"
    config = load_config("train-judge", file, ("engine.rows=[8]", "sampling.max_new_tokens=12"))
    loaded = load_model("arithmetic", mesh=make_mesh(), seed=0)
    examples = [JudgeExample(f"p#{n}/0", "p", f"start {n} ?", "", "fix", True) for n in range(3)]
    directory = RunDirectory(tmp_path / "run", "train-judge", config)
    sampler = train_judge.make_sampler(config, directory, loaded, make_mesh())
    with sampler.weights(loaded.model):
        found = sampler.greedy(examples, compared=(5, 3))
        with monkeypatch.context() as patch:
            patch.setattr(stop, "requested", True)
            with pytest.raises(Interrupted):
                sampler.greedy(examples)
    params = SamplingParams(12, temperature=0, stop_ids=loaded.tokenizer.eos_ids, compared=(5, 3))
    prompts = [train_judge.prompt_ids(example, config, loaded) for example in examples]
    engine = Engine(loaded.model, loaded.tokenizer, rows=(8,), buckets=(224,))
    expected = engine.generate(prompts, params, key=jax.random.key(7), row_ids=["a", "b", "c"])
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.log_odds, b.log_odds, atol=1e-4)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_judge_is_measured_by_what_it_writes_and_how_sure_it_is():
    """All say Positive, or nothing, and AUC still tells them apart."""
    tokenizer = load_tokenizer_of("arithmetic")
    verdict_tokens = VerdictTokens.of(tokenizer, "bare")
    log_odds = {"a": 3.0, "b": 2.0, "c": 1.0, "d": None}
    labels = {"a": True, "b": False, "c": False, "d": True}

    def write(examples, compared):
        assert compared == verdict_tokens.pair
        found = []
        for example in examples:
            of_it = log_odds[example.question]
            text = "same | " + ("" if of_it is None else "\\boxed{ Positive }")
            tokens = np.array([*tokenizer.encode(text), *tokenizer.eos_ids[:1]], np.int32)
            all_odds = np.where(tokens == compared[0], of_it or 0.0, -9.0).astype(np.float32)
            found.append(Completion(example.record_id, tokens, tokens, 1, all_odds))
        return found

    sampler = SimpleNamespace(tokenizer=tokenizer, greedy=write, weights=nullcontext)
    held_out = [JudgeExample(f"{q}/0", q, q, "", "c", right) for q, right in labels.items()]
    found = measure_judge(sampler, verdict_tokens, held_out, "the policy")
    assert found["auc"] == 2 / 4, "a is above b and c; d, without a verdict, has 1/2"
    assert (found["accuracy_positive"], found["accuracy_negative"]) == (1 / 2, 0)
    assert (found["unparsed_rate"], found["accuracy_at_0"]) == (1 / 4, 1 / 4)
    lengths = [len(done.tokens) for done in write(held_out, verdict_tokens.pair)]
    assert found["response_tokens"] == np.mean(lengths)
    log_odds |= {"b": -2.0, "c": -1.0}
    assert measure_judge(sampler, verdict_tokens, held_out, "the policy")["auc"] == 1.0


# --- which examples -----------------------------------------------------------------------------


def judge_example(problem, chunk=0, positive=True):
    history = "x" if chunk else ""
    return JudgeExample(
        f"{problem}#0/{chunk}", problem, f"What is {problem}?", history, "c", positive
    )


def test_a_part_is_shuffled_then_limited():
    examples = [judge_example(f"p{i}") for i in range(20)]
    assert part_of(examples, DataSource(source="x", limit=3)) == examples[:3]
    shuffled = [part_of(examples, DataSource(source="x", shuffle=True, seed=s)) for s in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2] != examples
    assert {x.example_id for x in shuffled[2]} == {x.example_id for x in examples}
    few = part_of(examples, DataSource(source="x", shuffle=True, limit=5))
    assert few == shuffled[0][:5]


def test_a_shuffled_part_has_whole_problems():
    """A limit takes no more problems than it needs, so the others are left to learn."""
    examples = [judge_example(f"p{i}", j) for j in range(3) for i in range(330)]
    data = DataSource(source="x", shuffle=True, limit=256)
    held_out = part_of(examples, data)
    problems = {x.problem_id for x in held_out}
    assert len(held_out) == 3 * len(problems) == 258
    assert len(drop_problems_of(held_out, examples, Counter())) == 990 - 258
    assert part_of(examples, data) == held_out
    assert part_of(examples, data.model_copy(update={"seed": 1})) != held_out
    least = part_of(examples, data.model_copy(update={"limit": 1}))
    assert least == held_out[:3], "one problem, its chunks in their order"
    assert [x.example_id for x in least] == sorted(x.example_id for x in least)


def test_demonstrations_of_one_problem_are_drawn_together():
    """By its id or their prompt, as they are left out."""
    texts = [("a", "x"), ("b", "y"), ("b", "z"), ("c", "y"), ("d", "w")]
    examples = [SftExample(f"{i}", *names, "s") for i, names in enumerate(texts)]
    for seed in range(8):
        drawn = part_of(examples, DataSource(source="x", shuffle=True, limit=2, seed=seed))
        ids = {x.example_id for x in drawn}
        assert ids == {"0", "4"} or ids - {"0", "4"} == {"1", "2", "3"}, seed


def test_what_validation_costs_is_said_before_the_training(capsys):
    say_held_out("sft", 0, 0)
    say_held_out("sft", 258, 260)
    line = " ".join(capsys.readouterr().err.split())
    assert line.endswith(
        "sft: 258 examples validate; 260 examples of their problems are left out of the training"
    )
    assert line.count("sft:") == 1


def test_problems_that_validate_are_not_learned():
    """Another chunk of the same problem goes too, and so does the same text under another id."""
    examples = [judge_example("p1"), judge_example("p1", 1), judge_example("p2")]
    again = JudgeExample("other/0", "other", "What\nis p1 ?", "", "d", False)
    dropped = Counter()
    assert drop_problems_of(examples[:1], [*examples, again], dropped) == examples[2:]
    assert dropped == {"validation": 3}
    assert drop_problems_of([], examples, dropped) == examples
    with pytest.raises(UserError, match=r"none of 2 .* left to learn: validation\.examples"):
        drop_problems_of(examples, examples[:2], dropped)


def test_demonstrations_of_a_problem_go_by_its_id_or_their_prompt():
    def demonstration(problem, prompt):
        return SftExample(f"{problem}/{prompt}", problem, prompt, "y")

    held_out = [demonstration("a", "x y")]
    learned = [demonstration("b", "xy "), demonstration("a", "z"), demonstration("c", "z")]
    assert drop_problems_of(held_out, learned, Counter()) == learned[2:]
    talk = Dialogue("d", "d", ("system", "user", "assistant"), ("s", "x y", "z"))
    assert drop_problems_of([talk], [*learned, talk], Counter()) == learned[1:]


def test_train_judge_leaves_out_what_it_validates_with(tmp_path, request):
    examples = [judge_example(f"p{i}", j, j > 0) for i in range(6) for j in range(3)]
    source, same = tmp_path / "examples.jsonl", tmp_path / "same.jsonl"
    write_records(source, examples)
    write_records(same, examples)
    config = load_config(
        "train-judge",
        request.config.rootpath / "configs" / "smoke_judge.yaml",
        (
            f"examples={{source: {source}}}",
            f"validation={{examples: {{source: {same}, shuffle: true, limit: 4}}, every: 2}}",
        ),
    )
    loaded = SimpleNamespace(tokenizer=load_tokenizer_of("arithmetic"))
    held_out, left_out = train_judge.load_held_out(config, loaded)
    assert len(held_out) == 6 and left_out == {"too_long": 0}, "whole problems"
    learned, dropped = train_judge.load_examples(config, loaded, held_out)
    problems = {x.problem_id for x in held_out}
    assert len(problems) == 2 and not problems & {x.problem_id for x in learned}
    assert dropped == {"validation": 6, "too_long": 0} and len(learned) == 12
    short = config.model_copy(update={"max_prompt_tokens": 1})
    with pytest.raises(UserError, match=f"{same} is left: 18 were read, and all 6 that were"):
        train_judge.load_held_out(short, loaded)


def test_the_classifier_leaves_out_what_it_validates_with(tmp_path, request):
    solutions = [
        ClassifierExample(f"s{i}", f"p{i}", f"q{i % 3}", ("a", "b"), (0, 1), (True, False), (1, 0))
        for i in range(6)
    ]
    write_records(tmp_path / "solutions.jsonl", solutions)
    source = tmp_path / "solutions.jsonl"
    config = load_config(
        "train-classifier",
        request.config.rootpath / "configs" / "smoke_classifier.yaml",
        (
            f"examples={{source: {source}}}",
            f"validation={{examples: {{source: {source}, limit: 1}}, every: 2}}",
        ),
    )
    held_out, _ = train_classifier.load_held_out(config)
    learned, dropped = train_classifier.load_examples(config, held_out)
    assert held_out == solutions[:1] and dropped == {"validation": 2}
    assert learned == [solutions[i] for i in (1, 2, 4, 5)]


def test_the_best_judge_needs_both_classes():
    check_classes([True, False], "x")
    with pytest.raises(UserError, match=r"both classes in x, found 0 Positive and 2 Negative"):
        check_classes([False, False], "x")


def test_settings_are_checked_and_chained(request):
    file = request.config.rootpath / "configs" / "smoke_judge.yaml"
    with pytest.raises(UserError, match=r"validation\.examples takes source, on_malformed, "):
        load_config(
            "train-judge", file, ("validation={examples: {source: x, split: y}, every: 1}",)
        )
    tree = {"stage": "train-judge"}
    assert readable(tree, "validation.examples.source") == ("label",)
    assert "rejection-sample" in readable({"stage": "sft"}, "validation.examples.source")


# --- the best model -----------------------------------------------------------------------------


def measurements(values, *, criterion="auc", export="best", every=2, last=8):
    """Measures what the list says, or raises it."""
    source, left = DataSource(source="x"), iter(values)

    def measure(model):
        value = next(left)
        if isinstance(value, BaseException):
            raise value
        return {criterion: value}

    chosen = settings.Validation(examples=source, every=every, export=export)
    return Measurements(chosen, last, measure, criterion, {"examples": 3})


@pytest.mark.parametrize(
    ("criterion", "values", "best"),
    [
        ("auc", [0.5, 0.7, 0.7, 0.6], 2),
        ("loss", [3.0, 2.0, 2.5, 2.0], 2),
        ("auc", [float("nan"), 0.1, float("nan"), 0.1], 2),
        ("auc", [float("nan")] * 4, None),
    ],
)
def test_the_best_is_the_earliest_of_the_best(criterion, values, best):
    found = measurements(values, criterion=criterion, last=5)
    due = [i for i in range(6) if found.is_due(i)]
    assert due == [0, 2, 4, 5], "before the first, every second, and after the last"
    for iteration in due:
        assert found.metrics_of(None, iteration).keys() == {f"validation/{criterion}"}
        assert not found.is_due(iteration), "once is enough"
    assert found.best_iteration == best
    assert found.exported_at(5) == (5 if best is None else best)
    assert measurements([], export="last").exported_at(5) == 5


STEPS = 8
VALUES = (0.5, 0.8, 0.6, 0.7, 0.6)
"""After 0, 2, 4, 6 and 8 steps: the best is that of step 2."""


def start(directory, request, *, values=VALUES, export="best"):
    """A training of the tiny model whose measurements are given."""
    config = load_config(
        "sft",
        request.config.rootpath / "configs" / "smoke_policy.yaml",
        ("training.checkpoint_every=3", f"steps={STEPS}"),
    )
    mesh = make_mesh()
    loaded = load_model("arithmetic", mesh=mesh, seed=0)
    rng = np.random.default_rng(0)
    documents = [
        Document(rng.integers(1, 20, 6).astype(np.int32), np.arange(6) > 0) for _ in range(8)
    ]
    of_iteration = dict(zip(range(0, STEPS + 1, 2), values, strict=True))
    chosen = settings.Validation(examples=DataSource(source="x"), every=2, export=export)
    run = None

    def measure(model):
        value = of_iteration[run.iteration]
        if isinstance(value, list):  # what happens at each call
            value = value.pop(0) if len(value) > 1 else value[0]
        if isinstance(value, BaseException):
            raise value
        return {"auc": value}

    found = Measurements(chosen, STEPS, measure, "auc", {"examples": 3})
    run = TrainingRun(
        RunDirectory(directory, "sft", config),
        loaded,
        mesh,
        config.training,
        total_updates=STEPS,
        loader=document_loader(documents, batch_size=2, max_length=8, seed=0),
        loss_fn=functools.partial(cross_entropy_loss, remat=False),
        normalizer_fn=num_target_tokens,
        validation=found,
    )
    return run


def finish(run):
    run.fit(STEPS)
    return run.finish({})


def exported(directory):
    return (directory / "model" / "model.safetensors").read_bytes()


def checkpoints(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, request):
    directory = tmp_path_factory.mktemp("undisturbed") / "whole"
    return directory, finish(start(directory, request))


def test_the_best_model_is_kept_and_exported(undisturbed, request, tmp_path):
    directory, summary = undisturbed
    assert summary["validation"] == {
        "examples": 3,
        "best_iteration": 2,
        "best_auc": 0.8,
        "exported_iteration": 2,
    }
    assert checkpoints(directory) == [2, 6, 8], "the last two, and the best"
    lines = [json.loads(line) for line in logged(directory)]
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    measured = {x["step"]: x["validation/auc"] for x in lines if "validation/auc" in x}
    assert measured == dict(zip(range(0, 9, 2), VALUES, strict=True))
    assert "loss" not in lines[0] and all("loss" in line for line in lines[1:])
    last = start(tmp_path / "last", request, export="last")
    assert finish(last)["validation"]["exported_iteration"] == STEPS
    assert checkpoints(tmp_path / "last") == [2, 6, 8]
    assert exported(tmp_path / "last") != exported(directory)
    of_step_2 = Checkpointer(directory / "checkpoints").restore_model(last.state.model, 2)
    found = load_hf(str(directory / "model"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(of_step_2), strict=True):
        np.testing.assert_array_equal(a, b)


class Killed(BaseException):
    """The process is gone: nothing is saved."""


ENDS = {
    "measurements": [(0, Killed), (0, Interrupted), (2, Killed), (4, Interrupted), (8, Killed)],
    "stops": [(2, Interrupted), (2, Interrupted), (8, Interrupted)],
    "updates": [(1, None), (2, None), (5, None), (7, None)],
}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_a_run_that_ends_early_leaves_the_same_bytes(
    undisturbed, tmp_path, request, monkeypatch, ends
):
    """In the measurement after so many steps, by a kill or a stop, or killed in the update after
    them."""
    directory, summary = undisturbed
    for at, error in ends:
        values = [[error(), x] if error and 2 * i == at else x for i, x in enumerate(VALUES)]
        run = start(tmp_path / "cut", request, values=values)
        right = run.update

        def update(batch, run=run, right=right, last=None if error else at):
            if run.iteration == last:
                raise Killed
            return right(batch)

        monkeypatch.setattr(run, "update", update)
        with pytest.raises(error or Killed):
            run.fit(STEPS)
        run._checkpointer.close()
    again = start(tmp_path / "cut", request)
    assert finish(again)["validation"] == summary["validation"]
    assert logged(tmp_path / "cut") == logged(directory)
    assert exported(tmp_path / "cut") == exported(directory)
    assert 2 in checkpoints(tmp_path / "cut")


def test_without_validation_nothing_is_new(request, tmp_path):
    """The state beside the arrays, and the first line of the metrics."""
    run = start(tmp_path / "run", request)
    run._validation = None
    run.fit(STEPS)
    run.finish({})
    lines = [json.loads(line) for line in logged(tmp_path / "run")]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not any("validation/auc" in line for line in lines)
    assert checkpoints(tmp_path / "run") == [6, 8]
    _, host_state = Checkpointer(tmp_path / "run" / "checkpoints").restore(run.state)
    assert host_state.keys() == {"loader"}
