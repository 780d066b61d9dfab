"""Parts of stages that no whole run would show to be wrong."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepwiser_jax.config import Grpo, Label, Mesh
from stepwiser_jax.config_files import load_config
from stepwiser_jax.data.problems import keep_verifiable, load_items
from stepwiser_jax.distributed.fingerprints import param_hash
from stepwiser_jax.distributed.loading import load_model
from stepwiser_jax.distributed.mesh import make_mesh, shard_batch
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.model.packing import group_of
from stepwiser_jax.record_io import read_records
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import (
    ChunkLabel,
    ClassifierExample,
    JudgeExample,
    PrefixValue,
    Problem,
    Tokens,
    Trajectory,
)
from stepwiser_jax.rl.adaptive import LabelTable
from stepwiser_jax.rl.examples import label_values
from stepwiser_jax.rl.grpo import add_old_and_reference_logprobs, completion_logprobs
from stepwiser_jax.rl.labels import load_rule
from stepwiser_jax.rl.rollout_cache import RolloutCache
from stepwiser_jax.rl.rollouts import split_groups
from stepwiser_jax.rl.values import estimate_prefix_values
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.runs.signals import Interrupted, stop
from stepwiser_jax.stages import label as label_stage
from stepwiser_jax.stages import run_stage, train_judge
from stepwiser_jax.stages.annotate import (
    check_ids,
    check_lengths,
    rollouts_by_problem,
    select_trajectories,
)
from stepwiser_jax.stages.label import drop_undeserved, examples
from stepwiser_jax.stages.rollout import keep_fitting, prompt_ids
from stepwiser_jax.text.chunks import TokenMatcher, chunk_ends, chunk_texts, end_patterns
from tiny import rollout_group

PROMPT = (5, 9, 11)
PROBLEM = Problem("p", "q ?", "1", "s")


class Numbers:
    """A tokenizer whose text is the ids."""

    eos_ids = ()

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture
def config(request):
    return load_config("train-judge", request.config.rootpath / "configs" / "smoke_judge.yaml")


def test_a_stage_is_run_by_its_name(tmp_path, request):
    settings = {
        "policy": {"path": "arithmetic"},
        "problems": {"source": "arithmetic", "split": "test", "limit": 2},
        "prompt_style": "bare",
        "sampling": {"max_new_tokens": 8},
        "engine": {"rows": [2], "buckets": [64]},
    }
    with pytest.raises(UserError, match=r"expected a stage, one of .*rollout.*, found 'roll'"):
        run_stage("roll", settings, tmp_path)
    with pytest.raises(UserError, match=r"rollout: .*group_size"):
        run_stage("rollout", settings | {"group_size": 0}, tmp_path)
    summary = run_stage("rollout", settings | {"group_size": 1}, tmp_path / "run")
    assert summary["trajectories"] == 2 == len(read_records(tmp_path / "run", Trajectory))
    assert run_stage("rollout", settings | {"group_size": 1}, tmp_path / "run") == summary


def test_iterations_of_epochs(config):
    """Of 20 examples, 8 an iteration."""
    for epochs, iterations in ((1, 3), (2, 5), (4, 10)):
        changed = config.model_copy(update={"iterations": None, "epochs": epochs})
        assert train_judge.iterations_of(changed, 20) == iterations


def groups(count):
    return [
        rollout_group([3, 1 + i % 9], [[4, 5, 6 + g] for g in range(4)], rewards=[1, 0, 0, 1])
        for i in range(count)
    ]


def test_prefix_and_continuation_are_no_longer_than_a_solution(tiny_model):
    """Every completion that is verified has at most max_new_tokens, whatever its prefix."""
    trajectory = Trajectory(
        "p#0",
        "p",
        "policy",
        Tokens(PROMPT, range(20, 40), (-1.0,) * 20),
        (8, 16, 20),
        "length",
        False,
    )
    lengths = []

    def is_correct(solutions):
        assert all(problem is PROBLEM for problem, _ in solutions)
        lengths.extend(len(text.split()) for _, text in solutions)
        return [True for _ in solutions]

    values = estimate_prefix_values(
        Engine(tiny_model, rows=[8], buckets=[96]),
        Numbers(),
        [trajectory],
        {"p": PROBLEM},
        is_correct,
        num_rollouts=4,
        params=SamplingParams(20),
        key=jax.random.key(0),
    )
    assert lengths == [20] * 12
    assert [value.num_correct for value in values] == [4, 4, 4, 0], "the last is the outcome"


@pytest.mark.parametrize(
    ("completion_ids", "message"),
    [
        ((7,) * 21, "max_new_tokens = 20, found a trajectory of 21 tokens"),
        ((7,) * 3 + (64,), r"the policy's vocabulary \(the largest is 63\), found 64"),
    ],
)
def test_trajectories_that_cannot_be_annotated_are_named(tiny_model, completion_ids, message):
    engine, params = Engine(tiny_model, rows=[8], buckets=[96]), SamplingParams(20)

    def check(ids):
        ends = (1, len(ids))
        tokens = Tokens(PROMPT, ids, (-1.0,) * len(ids))
        trajectories = [Trajectory("p#0", "p", "policy", tokens, ends, "length", False)]
        check_lengths(trajectories, engine, params)
        check_ids(trajectories, engine)

    check((63,) * 20)
    with pytest.raises(UserError, match=message):
        check(completion_ids)


@pytest.mark.parametrize("rule", ["abs_q", "rel_effective", "rel_ratio", "relative_progress"])
def test_adaptive_rollouts_give_the_labels_of_all(tiny_model, rule):
    """Confidence 1: fewer rollouts, the same labels. Two trajectories share their bare problem."""
    rng = np.random.default_rng(0)
    trajectories = [
        Trajectory(
            f"p#{i}",
            "p",
            "policy",
            Tokens(PROMPT, rng.integers(0, 64, 16), (-1.0,) * 16),
            (4, 8, 12, 16),
            "length",
            bool(i),
        )
        for i in range(2)
    ]

    def label(adaptive):
        table = LabelTable(load_rule(rule), 12)
        values = estimate_prefix_values(
            Engine(tiny_model, rows=[16], buckets=[96]),
            Numbers(),
            trajectories,
            {"p": PROBLEM},
            lambda solutions: [int(text.split()[-1]) % 3 > 0 for _, text in solutions],
            num_rollouts=12,
            params=SamplingParams(20),
            key=jax.random.key(1),
            labels=table if adaptive else None,
        )
        labels = [
            table.likeliest(values[j + 1].counts, values[j].counts)
            for start in (0, 5)
            for j in range(start, start + 4)
        ]
        return labels, sum(value.num_rollouts for value in values)

    fixed, all_rollouts = label(False)
    adaptive, some_rollouts = label(True)
    assert adaptive == fixed
    assert some_rollouts < all_rollouts == 2 * 5 * 12


def outcomes(problem, right, count):
    """Trajectories of a problem, the first `right` of them right."""
    tokens = Tokens((1,), (2, 3), (0.0,) * 2)
    return [
        Trajectory(f"{problem}#{i}", problem, "", tokens, (1, 2), "", i < right)
        for i in range(count)
    ]


def test_problems_too_long_for_the_context_are_left_out_and_counted(request):
    file = request.config.rootpath / "configs" / "smoke_rollouts.yaml"
    config = load_config("rollout", file, ("policy.path=arithmetic",))
    room = max(config.engine.buckets) - config.sampling.max_new_tokens
    tokenizer = load_tokenizer_of("arithmetic")

    def problem(name, digits):
        return Problem(name, " ".join("1" * digits), "1", "s")

    frame = len(prompt_ids(config, tokenizer, problem("a", 3))) - 3
    fits, too_long = problem("fits", room - frame), problem("long", room - frame + 1)
    dropped = Counter()
    assert keep_fitting(config, [too_long, fits], dropped) == [fits]
    assert dropped == {"too_long": 1}
    with pytest.raises(UserError, match=rf"long: prompt of {room + 1} tokens .* exceeds"):
        keep_fitting(config, [too_long], Counter())


def test_rollouts_by_pass_rate(request):
    """GenPRM's K: of all sampled trajectories, whichever of them are annotated."""
    file = request.config.rootpath / "configs" / "smoke_values.yaml"
    by_rate = "num_rollouts=[[0.1, 128], [0.9, 64], [1, 32]]"
    config = load_config("annotate", file, (by_rate,))
    rates = {"a": 0, "b": 9, "c": 10, "d": 89, "e": 90, "f": 100}
    sampled = [t for problem, right in rates.items() for t in outcomes(problem, right, 100)]
    found = rollouts_by_problem(config, sampled)
    assert found == {"a": 128, "b": 128, "c": 64, "d": 64, "e": 32, "f": 32}
    assert config.most_rollouts == 128
    assert set(rollouts_by_problem(load_config("annotate", file), sampled).values()) == {4}


def labelled_run(tmp_path, request, chunking, completions):
    """What `drop_undeserved` and `examples` make of responses, all of whose chunks have a label:
    (trajectories, labels that are left, counts, chunks of each example)."""
    tokenizer = load_tokenizer_of("arithmetic")
    (tmp_path / "config.yaml").write_text(f"chunking: {chunking}\n")
    patterns = end_patterns(json.loads(chunking) if chunking.startswith("[") else chunking)
    matcher = TokenMatcher.build(tokenizer.token_bytes(), patterns)
    trajectories = {}
    for i, (text, stop_reason) in enumerate(completions):
        ids = tuple(tokenizer.encode(text))
        ends = chunk_ends(ids, matcher, tokenizer)
        trajectories[f"p#{i}"] = Trajectory(
            f"p#{i}", "p", "", Tokens(PROMPT, ids, (0.0,) * len(ids)), ends, stop_reason, False
        )
    labels = [
        ChunkLabel(t.trajectory_id, j, 0.0, 1.0, False, "abs_q")
        for t in trajectories.values()
        for j in range(len(t.chunk_ends))
    ]
    config = Label(values="", rollouts=str(tmp_path), tokenizer="arithmetic")
    kept, dropped = drop_undeserved(config, labels, trajectories, tokenizer)
    made = list(examples(kept, kept, trajectories, {"p": PROBLEM}, tokenizer))
    chunks = {solution.solution_id: solution.chunks for solution, _ in made}
    for solution, judged in made:
        ids = trajectories[solution.solution_id].completion_ids
        assert [e.chunk for e in judged] == [solution.chunks[j] for j in solution.labelled]
        assert tokenizer.decode(ids.tolist()).startswith(judged[-1].history)
    counts = {name: count for name, count in dropped.items() if count}
    return {label.record_id for label in kept}, counts, chunks


def test_untagged_and_cut_responses_get_no_label_that_they_do_not_deserve(tmp_path, request):
    kept, dropped, chunks = labelled_run(
        tmp_path,
        request,
        "tags",
        [
            ("<chunk> 4 </chunk> <chunk> 5 </chunk>", "stop_id"),
            ("4 * 7 = 8 ; \\boxed{ 8 }", "stop_id"),  # no tag
            ("<chunk> 4 * 7 = 8", "stop_id"),  # none closed
            ("<chunk> 4 </chunk> \\boxed{ 4 }", "stop_id"),
            ("<chunk> 4 </chunk> <chunk> 5 </chunk> <chunk> 6 *", "length"),
            ("<chunk> 4 </chunk> <chunk> 5 </chunk>", "length"),
            ("<chunk> 4 *", "length"),
        ],
    )
    assert kept == {"p#0/0", "p#0/1", "p#3/0", "p#4/0", "p#4/1", "p#5/0"}
    assert dropped == {"untagged": 3, "cut": 2}
    assert [len(chunks[name]) for name in ("p#0", "p#3", "p#4", "p#5")] == [2, 1, 2, 1]
    assert "6" not in "".join(chunks["p#4"]) and len(chunks) == 4


def test_a_floor_leaves_out_chunks_after_a_prefix_worth_0_too(tmp_path):
    """From their examples, not from the labels, whatever `dead_prefix` says."""
    tokenizer, question = load_tokenizer_of("arithmetic"), "start 4 ; * 7 + 5 ?"
    ids = tokenizer.encode(" ".join(["<chunk> 4 </chunk>"] * 5))
    tokens = Tokens(tokenizer.encode(question), ids, (0.0,) * len(ids))
    solution = Trajectory("p#0", "p", "", tokens, (3, 6, 9, 12, 15), "stop_id", True)
    rollouts = RunDirectory(tmp_path / "rollouts", "rollout", Mesh())
    rollouts.writer(Problem).append([Problem("p", question, "3", "s")])
    rollouts.writer(Trajectory).append([solution])
    rollouts.finish(dict)
    counts = [8, 8, 0, 0, 2, 16]
    values = [PrefixValue("p#0", j, 16, right, 16, "") for j, right in enumerate(counts)]
    write_records(tmp_path / "values.jsonl", values)

    def labelled(**settings):
        config = Label(
            values=str(tmp_path / "values.jsonl"),
            rollouts=str(tmp_path / "rollouts"),
            tokenizer="arithmetic",
            rule="abs_q",
            balance=False,
            prompt_style="bare",
            **settings,
        )
        run = tmp_path / "-".join(map(str, settings.values()))
        summary = label_stage.run(config, run)
        assert summary["labels"] == len(read_records(run, ChunkLabel))
        judged = {e.example_id: e.is_positive for e in read_records(run, JudgeExample)}
        (told,) = read_records(run, ClassifierExample)
        assert [f"p#0/{j}" for j in told.labelled] == list(judged)
        return summary["labels"], judged

    good, error = {"p#0/0": True}, {"p#0/1": False}
    dead, weak = {"p#0/2": False, "p#0/3": True}, {"p#0/4": True}
    assert labelled(dead_prefix="negative") == (5, good | error | dead | weak)
    assert labelled(dead_prefix="drop") == (3, good | error | weak)
    assert labelled(dead_prefix="negative", min_prefix_value=0.1) == (5, good | error | weak)
    assert labelled(dead_prefix="negative", min_prefix_value=0.2) == (5, good | error)
    assert labelled(dead_prefix="drop", min_prefix_value=0.2) == (3, good | error)


def test_examples_do_not_depend_on_what_is_decoded_together(tmp_path, monkeypatch):
    """Nor do their bytes, and a text is that of its ids alone."""
    tokenizer, question = load_tokenizer_of("arithmetic"), "start 4 ; * 7 + 5 ?"
    rng, words = np.random.default_rng(0), np.array(sorted(tokenizer.known_ids))
    rollouts = RunDirectory(tmp_path / "rollouts", "rollout", Mesh())
    rollouts.writer(Problem).append([Problem("p", question, "3", "s")])
    solutions, values = [], []
    for i in range(7):
        ends = tuple(np.cumsum(rng.integers(1, 5, i + 1)).tolist())
        ids = rng.choice(words, ends[-1])
        tokens = Tokens(tokenizer.encode(question), ids, np.zeros(len(ids)))
        reason = "length" if i % 3 == 2 else "stop_id"
        solutions.append(Trajectory(f"p#{i}", "p", "policy", tokens, ends, reason, True))
        rights = rng.integers(0, 5, len(ends) + 1).tolist()
        values += [PrefixValue(f"p#{i}", j, 4, x, 4, "") for j, x in enumerate(rights)]
    rollouts.writer(Trajectory).append(solutions)
    rollouts.finish(dict)
    write_records(tmp_path / "values.jsonl", values)
    settings = {"rollouts": tmp_path / "rollouts", "values": tmp_path / "values.jsonl"}
    config = Label(
        **{name: str(path) for name, path in settings.items()},
        tokenizer="arithmetic",
        prompt_style="bare",
    )

    def labelled(name, decoded):
        monkeypatch.setattr(label_stage, "DECODED", decoded)
        label_stage.run(config, tmp_path / name)
        return [file.read_bytes() for file in sorted(tmp_path.glob(f"{name}/records/*/*"))]

    together = labelled("together", 512)
    assert labelled("in_turn", 1) == together and all(together)
    monkeypatch.setattr(label_stage, "in_threads", map)
    assert labelled("without_threads", 3) == together
    of = {solution.trajectory_id: solution for solution in solutions}
    judged = read_records(tmp_path / "together", JudgeExample)
    for example in judged:
        solution = of[example.example_id.rpartition("/")[0]]
        texts = chunk_texts(tokenizer, solution.completion_ids, solution.chunk_ends)
        end = (0, *solution.chunk_ends)[example.position]
        (history,) = chunk_texts(tokenizer, solution.completion_ids[:end], [end])
        assert (example.chunk, example.history) == (texts[example.position], history)
    assert any(example.history for example in judged)


def test_what_is_made_in_threads_keeps_its_order_and_its_errors():
    def half(number):
        if number % 2:
            raise UserError(f"{number} is odd")
        return number // 2

    assert list(label_stage.in_threads(half, range(0, 20, 2))) == list(range(10))
    made = label_stage.in_threads(half, [0, 2, 4, 5, 7])
    assert [next(made) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="5 is odd"):
        next(made)


@pytest.mark.parametrize(
    ("chunking", "untagged"), [("blank_lines", 0), ('[";"]', 0), ('["</chunk>", ";"]', 1)]
)
def test_where_no_tags_are_expected_a_response_may_be_one_chunk(
    tmp_path, request, chunking, untagged
):
    completions = [("4 * 7 = 8", "stop_id"), ("4 ; 5 ;", "stop_id"), ("4 ; 5 ; 6", "length")]
    kept, dropped, _ = labelled_run(tmp_path, request, chunking, completions)
    assert dropped.get("untagged", 0) == untagged and dropped["cut"] == 1
    assert ("p#0/0" in kept) != untagged


def test_problems_to_annotate_are_drawn_by_the_seed_alone(request):
    """Of those that are solved sometimes, whatever others there are."""
    rates = {f"p{i}": (0, 4, 2)[i % 3] for i in range(30)}
    sampled = [t for problem, right in rates.items() for t in outcomes(problem, right, 4)]
    file = request.config.rootpath / "configs" / "smoke_values.yaml"

    def drawn(trajectories, *settings):
        settings = ("drop_uniform_problems=true", "max_problems=4", *settings)
        kept, dropped = select_trajectories(load_config("annotate", file, settings), trajectories)
        assert len(kept) == 16, "all trajectories of each"
        return list(dict.fromkeys(t.problem_id for t in kept)), dropped

    found, dropped = drawn(sampled)
    assert found == ["p2", "p5", "p23", "p29"]
    assert dropped == {"all_correct": 10, "all_wrong": 10, "not_drawn": 6}
    assert drawn([t for t in sampled if t.problem_id != "p8"])[0] == found
    assert drawn(sampled, "seed=1")[0] != found


def test_labels_of_trajectories_that_were_sampled_differently(request):
    """Each from its own M: what is 2 of 4 for one is 2 of 64 for another."""
    rule = load_rule("relative_progress")
    values = [
        PrefixValue(f"t{M}", j, M, right, M, "")
        for M in (4, 64)
        for j, right in enumerate([4, 2 * M // 4, M])
    ]
    labels = [
        label
        for M in (4, 64)
        for label in label_values(
            [v for v in values if v.max_rollouts == M], LabelTable(rule, M), ""
        )
        if label
    ]
    assert [(label.trajectory_id, label.is_positive) for label in labels] == [
        ("t4", False),
        ("t4", True),
        ("t64", True),
        ("t64", True),
    ]


def test_no_update_is_made_of_nothing(config):
    assert split_groups([], 2) == []
    assert [len(part) for part in split_groups(groups(1), 2)] == [1]
    parts = split_groups(groups(5), 2)
    advantages = np.zeros((5, 4))
    batches = [train_judge.pack(part, advantages, config) for part in parts]
    groups_of_rows = [np.max(group_of(b.segment_ids_BT), axis=1) for b in batches]
    assert [int(np.sum(counts)) for counts in groups_of_rows] == [3, 2]


def test_groups_with_signal_that_are_too_many_count_in_the_denominator(config):
    """Two draws of 29 groups with signal and 3 without. 32 are learned, and stand for all 58."""
    silent = [rollout_group([3, i], [[4, 5, 6]] * 4, rewards=[1] * 4) for i in range(6)]
    sampled = [*groups(29), *silent[:3], *groups(29), *silent[3:]]

    def shares(updates, sampled, **grpo):
        settings = Grpo(drop_zero_variance=True, max_resamples=1, **grpo)
        changes = {
            "prompts_per_iteration": 32,
            "updates_per_iteration": updates,
            "grpo": settings,
        }
        found = train_judge.groups_of_updates(sampled, config.model_copy(update=changes))
        assert sum(len(part) for part, _ in found) == min(32, sum(g.has_signal for g in sampled))
        return [share for _, share in found]

    for aggregation in ("token_mean", "sequence_mean"):
        assert shares(1, sampled, aggregation=aggregation) == [58 / 64]
        assert shares(2, sampled, aggregation=aggregation) == [29 / 32, 29 / 32]
        assert shares(1, sampled[:32], aggregation=aggregation) == [29 / 32]
    assert shares(2, sampled, denominator="kept") == [1, 1]
    assert shares(2, silent) == []


def by_length(example, text, tokens):
    """A reward with which some groups have a signal and some have none."""
    return 1.0 if example.chunk == "good" else float(len(tokens) % 2)


def test_an_update_without_groups_of_equal_reward_is_that_with_them_or_a_larger_one(
    request, tmp_path
):
    """Where they count in the denominator (as in verl), the gradient is that of all groups. Where
    they do not (DAPO), it is larger by their share of the tokens."""
    file = request.config.rootpath / "configs" / "smoke_judge.yaml"
    examples = [
        JudgeExample(f"{chunk}{n}", "p", f"start {n} ; * 7 + 5 ?", "", chunk, True)
        for n in range(4)
        for chunk in ("good", "bad")
    ]
    write_records(tmp_path / "examples.jsonl", examples)

    def gradient(**grpo):
        settings = {
            "model.path": "arithmetic",
            "examples.source": tmp_path / "examples.jsonl",
            "iterations": 1,
            "updates_per_iteration": 1,
            "validation": "null",
            "reward": f"{__name__}:by_length",
            "training.optimizer.weight_decay": 0,
            "training.micro_batches": 1,
            "grpo": json.dumps(grpo),
        }
        overrides = tuple(f"{name}={value}" for name, value in settings.items())
        run = tmp_path / "-".join(map(str, grpo.values()))
        train_judge.run(load_config("train-judge", file, overrides), run)
        (line,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return line["grad_norm"], line["groups_with_signal_share"]

    whole, _ = gradient(drop_zero_variance=False)
    sampled, share = gradient(drop_zero_variance=True, denominator="sampled")
    assert 0 < share < 1
    np.testing.assert_allclose(sampled, whole, rtol=1e-4)
    kept, _ = gradient(drop_zero_variance=True, denominator="kept")
    assert kept > 1.2 * whole


def test_sampling_that_is_stopped_goes_on_with_the_rows_that_are_missing(
    request, tmp_path, monkeypatch
):
    """After one burst; what it had finished is kept as it is, and the rest is what it would have
    been. Groups that are whole are not sampled again."""
    file = request.config.rootpath / "configs" / "smoke_judge.yaml"
    config = load_config("train-judge", file, ("engine.rows=[8]", "sampling.max_new_tokens=24"))
    loaded = load_model("arithmetic", mesh=make_mesh(), seed=0)
    prompts = [f"start {n} ; * 7 + 5 ?" for n in range(5)]
    examples = [JudgeExample(p, p, p, "", "<chunk> fix </chunk>", True) for p in prompts]

    def sampler(name):
        directory = RunDirectory(tmp_path / name, "train-judge", config)
        directory.create()
        cache = RolloutCache(directory.path / "rollout_cache")
        return train_judge.make_sampler(config, cache, loaded, make_mesh())

    def sample(sampler):
        with sampler.weights(loaded.model):
            return sampler.sample_groups(examples, 0, 0)

    whole, stopped = sample(sampler("whole")), sampler("stopped")
    with monkeypatch.context() as patch:
        patch.setattr(stop, "requested", True)
        with pytest.raises(Interrupted):
            sample(stopped)
    kept = stopped.cache.read(0, 0, param_hash(loaded.model))
    assert 0 < len(kept) < 5 * config.group_size
    for again in (sample(stopped), sample(sampler("stopped"))):
        for found, expected in zip(again, whole, strict=True):
            assert found.group_id == expected.group_id
            assert found.texts_G == expected.texts_G
            for g, (a, b) in enumerate(zip(found.logprobs_G, expected.logprobs_G, strict=True)):
                np.testing.assert_array_equal(found.completions_G[g], expected.completions_G[g])
                np.testing.assert_allclose(a, b, atol=1e-4)
                if f"{found.group_id}/{g}" in kept:
                    np.testing.assert_array_equal(a, kept[f"{found.group_id}/{g}"].logprobs)
    monkeypatch.setattr(Engine, "stream", None)
    assert [found.group_id for found in sample(sampler("stopped"))] == [
        f"judge/it0/draw0/{p}/{prompt}" for p, prompt in enumerate(prompts)
    ]


def test_lines_of_the_embedded_task_can_be_its_chunks(request, word_tokenizer):
    """`chunking` as a list: two lines a chunk, each ends at a semicolon or a closing tag."""
    config = load_config(
        "rollout",
        request.config.rootpath / "configs" / "smoke_rollouts.yaml",
        ('chunking=["</chunk>", ";"]',),
    )
    text = "<chunk> 4 * 7 = 8 ; 8 + 5 = 3 </chunk> <chunk> \\boxed{ 3 } </chunk>"
    ids = [*word_tokenizer.encode(text), word_tokenizer.eos_ids[0]]
    matcher = TokenMatcher.build(word_tokenizer.token_bytes(), end_patterns(config.chunking))
    texts = chunk_texts(word_tokenizer, ids, chunk_ends(ids, matcher, word_tokenizer))
    assert texts == ["<chunk> 4 * 7 = 8 ;", "8 + 5 = 3 </chunk>", "<chunk> \\boxed{ 3 } </chunk>"]


@pytest.mark.parametrize(
    ("chunking", "asked"),
    [("tags", True), ('["</chunk>", "\\n"]', True), ("blank_lines", False), ('["\\n"]', False)],
)
def test_a_policy_is_asked_for_tags_where_they_end_a_chunk(request, bpe_tokenizer, chunking, asked):
    file = request.config.rootpath / "configs" / "smoke_rollouts.yaml"
    config = load_config("rollout", file, (f"chunking={chunking}", "prompt_style=instruct"))
    ids = prompt_ids(config, bpe_tokenizer, Problem("p", "What is 1+1?", "2", "s"))
    assert ("<chunk>" in bpe_tokenizer.decode(ids)) == asked


def test_limited_items_are_random_ones_to_which_a_larger_limit_adds(tmp_path, word_tokenizer):
    rows = [
        {"id": f"gsm8k-{i}", "problem": "p", "steps": ["a"], "label": -1 if i >= 20 else 0}
        | {"final_answer_correct": i >= 20}
        for i in range(40)
    ]
    file = tmp_path / "gsm8k.json"
    file.write_text(json.dumps(rows))
    few, again, whole, half, more = (
        load_items(str(file), word_tokenizer, limit=limit) for limit in (10, 10, None, 20, 99)
    )
    assert few == again and len(few) == 10 and {item.first_error for item in few} == {-1, 0}
    assert half[:10] == few and more[:20] == half
    assert [item.item_id for item in whole] == [row["id"] for row in rows]
    assert sorted(map(whole.index, more)) == list(range(40))


def problems_with(*references):
    return [Problem(f"p{i}", "q", reference, "s") for i, reference in enumerate(references)]


def test_references_that_are_no_mathematics_are_counted_and_told_of(caplog):
    dropped = Counter()
    found = problems_with("5", "assert double(2) == 4", "x+1", "")
    kept = keep_verifiable(found, "mathematics", dropped)
    assert kept == [found[0], found[2]] and dropped == {"unverifiable": 2}
    assert "2 of 4 problems cannot be checked" in caplog.text and "such as p1: " in caplog.text
    assert "found 'assert double(2) == 4'" in caplog.text


def test_a_data_set_without_mathematics_is_refused():
    problems = problems_with("assert f(1) == 1", "assert f(2) == 4")
    with pytest.raises(UserError, match=r"2 of 2 problems .* such as p0: .*'assert f\(1\) == 1'"):
        keep_verifiable(problems, "mathematics", Counter())


def test_only_chunks_that_end_at_tags_have_a_known_truth(tmp_path, word_tokenizer):
    (tmp_path / "config.yaml").write_text('chunking: ["</chunk>", ";"]')
    with pytest.raises(UserError, match=r"chunking 'tags', found \['</chunk>', ';'\]"):
        load_items(str(tmp_path), word_tokenizer)


def test_logprobs_do_not_depend_on_micro_batches(config, tiny_model):
    batch = shard_batch(train_judge.pack(groups(3), np.zeros((3, 4)), config), make_mesh())
    whole = completion_logprobs(tiny_model, batch, 1.0, micro_batches=1)
    parts = completion_logprobs(tiny_model, batch, 1.0, micro_batches=2)
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    assert float(jnp.min(whole)) < -0.5
    added = add_old_and_reference_logprobs(batch, None, tiny_model, 1.0, micro_batches=2)
    assert added.old_logprobs_BT is None, "with one update they are the update's own"
    np.testing.assert_array_equal(added.reference_logprobs_BT, parts)
