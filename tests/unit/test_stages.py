"""Parts of stages that no whole run would show to be wrong."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepwiser_jax.algo.adaptive import LabelTable
from stepwiser_jax.config import AdaptiveRollouts, Label
from stepwiser_jax.records import (
    JudgeExample,
    PrefixValue,
    Problem,
    Trajectory,
    UserError,
    Verdict,
)
from stepwiser_jax.runtime.engine import Engine
from stepwiser_jax.runtime.loading import load_model
from stepwiser_jax.runtime.mesh import make_mesh, shard_batch
from stepwiser_jax.runtime.problems import load_items
from stepwiser_jax.runtime.sampling import SampleOutput, SamplingParams
from stepwiser_jax.segments import group_of
from stepwiser_jax.settings import load_config
from stepwiser_jax.stages import judge, rollout
from stepwiser_jax.stages.annotate import (
    check_trajectories,
    estimate_prefix_values,
    rollouts_by_problem,
)
from stepwiser_jax.stages.label import label_trajectories
from stepwiser_jax.text.chunks import TokenMatcher, chunk_ends, chunk_texts, end_patterns

PROMPT = (5, 9, 11)


@pytest.fixture
def config(request):
    return load_config("judge", request.config.rootpath / "configs" / "smoke_judge.yaml")


def groups(count):
    return [
        judge.Judged(
            f"g{i}",
            (3, 1 + i % 9),
            tuple((4, 5, 6 + g) for g in range(4)),
            ((-1.0, -2.0, -3.0),) * 4,
            (Verdict.POSITIVE,) * 4,
            (1.0, 0.0, 0.0, 1.0),
        )
        for i in range(count)
    ]


def test_prefix_and_continuation_are_no_longer_than_a_solution(tiny_model):
    """Every completion that is verified has at most max_new_tokens, whatever its prefix."""
    trajectory = Trajectory(
        "p#0",
        "p",
        "policy",
        PROMPT,
        tuple(range(20, 40)),
        (-1.0,) * 20,
        (8, 16, 20),
        "length",
        False,
    )
    lengths = []

    def is_correct(rows):
        lengths.extend(len(ids) for _, ids in rows)
        return [len(ids) % 2 == 0 for _, ids in rows]

    values = estimate_prefix_values(
        Engine(tiny_model, rows=[8], buckets=[96]),
        [trajectory],
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
        ((7,) * 3 + (64,), "below the policy's vocab_size 64, found 64"),
    ],
)
def test_trajectories_that_cannot_be_annotated_are_named(tiny_model, completion_ids, message):
    engine, params = Engine(tiny_model, rows=[8], buckets=[96]), SamplingParams(20)

    def check(ids):
        ends = (1, len(ids))
        logprobs = (-1.0,) * len(ids)
        check_trajectories(
            [Trajectory("p#0", "p", "policy", PROMPT, ids, logprobs, ends, "length", False)],
            engine,
            params,
        )

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
            PROMPT,
            tuple(rng.integers(0, 64, 16).tolist()),
            (-1.0,) * 16,
            (4, 8, 12, 16),
            "length",
            bool(i),
        )
        for i in range(2)
    ]

    def label(adaptive):
        values = estimate_prefix_values(
            Engine(tiny_model, rows=[16], buckets=[96]),
            trajectories,
            lambda rows: [ids[-1] % 3 > 0 for _, ids in rows],
            num_rollouts=12,
            params=SamplingParams(20),
            key=jax.random.key(1),
            adaptive=adaptive,
        )
        used = AdaptiveRollouts(rule=rule)
        table = LabelTable(rule, 12, **used.parameters)
        labels = [
            table.likeliest(values[j + 1].counts, values[j].counts)
            for start in (0, 5)
            for j in range(start, start + 4)
        ]
        return labels, sum(value.num_rollouts for value in values)

    fixed, all_rollouts = label(None)
    adaptive, some_rollouts = label(AdaptiveRollouts(rule=rule))
    assert adaptive == fixed
    assert some_rollouts < all_rollouts == 2 * 5 * 12


def outcomes(problem, right, count):
    """Trajectories of a problem, the first `right` of them right."""
    return [
        Trajectory(f"{problem}#{i}", problem, "", (1,), (2, 3), (0.0,) * 2, (1, 2), "", i < right)
        for i in range(count)
    ]


def test_rollouts_by_pass_rate(request):
    """GenPRM's K: of all sampled trajectories, whichever of them are annotated."""
    file = request.config.rootpath / "configs" / "smoke_values.yaml"
    by_rate = "rollouts_by_pass_rate=[[0.1, 128], [0.9, 64], [1, 32]]"
    config = load_config("annotate", file, (by_rate,))
    rates = {"a": 0, "b": 9, "c": 10, "d": 89, "e": 90, "f": 100}
    sampled = [t for problem, right in rates.items() for t in outcomes(problem, right, 100)]
    found = rollouts_by_problem(config, sampled)
    assert found == {"a": 128, "b": 128, "c": 64, "d": 64, "e": 32, "f": 32}
    assert config.most_rollouts == 128
    assert set(rollouts_by_problem(load_config("annotate", file), sampled).values()) == {4}


def test_labels_of_trajectories_that_were_sampled_differently(request):
    """Each from its own M: what is 2 of 4 for one is 2 of 64 for another."""
    config = Label(annotations="", rollouts="", tokenizer="", rule="relative_progress")
    values = [
        PrefixValue(f"t{M}", j, M, right, M, "")
        for M in (4, 64)
        for j, right in enumerate([4, 2 * M // 4, M])
    ]
    labels, _ = label_trajectories(config, values)
    assert [(label.trajectory_id, label.is_positive) for label in labels] == [
        ("t4", False),
        ("t4", True),
        ("t64", True),
        ("t64", True),
    ]


def test_no_update_is_made_of_nothing(config, tiny_model):
    mesh = make_mesh()
    assert judge.prepare_batches([], config, mesh, tiny_model, tiny_model) == []
    assert len(judge.prepare_batches(groups(1), config, mesh, tiny_model, tiny_model)) == 1
    batches = judge.prepare_batches(groups(5), config, mesh, tiny_model, tiny_model)
    groups_of_rows = [np.max(group_of(b.segment_ids_BT), axis=1) for b in batches]
    assert [int(np.sum(counts)) for counts in groups_of_rows] == [3, 2]


@pytest.mark.parametrize(
    ("penalty", "rewards", "share"),
    [("0", (1.0, 0.0, 1.0, 0.0), None), ("0.5", (1.0, 0.0, -0.5, -0.5), 0.5)],
)
def test_a_judgment_that_is_more_than_a_verdict_is_penalized(request, penalty, rewards, share):
    """Of four judgments of a right chunk, the last two have an analysis."""
    file = request.config.rootpath / "configs" / "smoke_judge.yaml"
    config = load_config("judge", file, (f"format_penalty={penalty}",))
    loaded = load_model("arithmetic", mesh=make_mesh(), seed=0)
    texts = [f"\\boxed{{ {verdict} }}" for verdict in ("Positive", "Negative")]
    texts += [f"looks fine {text}" for text in texts]

    class Scripted:
        def generate(self, prompts_P, params, *, key, row_ids, group_size):
            output = SampleOutput.empty(len(row_ids), row_ids, params.max_new_tokens)
            for b, text in enumerate(texts):
                ids = [*loaded.tokenizer.encode(text), loaded.tokenizer.eos_ids[0]]
                output.tokens_BC[b, : len(ids)], output.length_B[b] = ids, len(ids)
            return output

    collect = judge.GroupCollector(config, loaded, make_mesh())
    example = JudgeExample("e", "p", "start 4 ; * 7 + 5 ?", "", "<chunk> fix </chunk>", True)
    groups = collect.sample(Scripted(), [example], ["g"])
    assert groups[0].rewards_G == rewards
    metrics = judge.rollout_metrics(groups, 1, bool(config.format_penalty))
    assert metrics.get("in_format_share") == share
    assert metrics["unparsed_rate"] == 0


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
    sampler = SimpleNamespace(config=config, loaded=SimpleNamespace(tokenizer=bpe_tokenizer))
    ids = rollout.BlockSampler.prompt_ids(sampler, Problem("p", "What is 1+1?", "2", "s"))
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


def test_only_chunks_that_end_at_tags_have_a_known_truth(tmp_path, word_tokenizer):
    (tmp_path / "config.yaml").write_text('chunking: ["</chunk>", ";"]')
    with pytest.raises(UserError, match=r"chunking 'tags', found \['</chunk>', ';'\]"):
        load_items(str(tmp_path), word_tokenizer)


def test_scores_do_not_depend_on_micro_batches(config, tiny_model):
    batch = shard_batch(judge.assemble(groups(3), config), make_mesh())
    whole = judge.score(tiny_model, batch, 1.0, micro_batches=1)
    parts = judge.score(tiny_model, batch, 1.0, micro_batches=2)
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    assert float(jnp.min(whole)) < -0.5
