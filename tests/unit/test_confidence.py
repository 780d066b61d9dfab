"""How sure a judge is: where a verdict is written, P(Positive) there, and what is made of it."""

import jax
import numpy as np
import pytest
from flax import nnx

from stepwiser_jax.commands.reproduce.items import value_of
from stepwiser_jax.config import Evaluate, Sampling
from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.auc import CHANCE, auc, scores_by_truth, step_auc
from stepwiser_jax.evaluation.judgments import rules_of, score_judgments, threshold_of
from stepwiser_jax.evaluation.prmbench import score_prmbench
from stepwiser_jax.evaluation.processbench import best_threshold, processbench_f1, score_by_subset
from stepwiser_jax.evaluation.statistics import observed
from stepwiser_jax.evaluation.verdicts import first_predicted_error, verdict_at
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import Completion, StopReason
from stepwiser_jax.inference.shapes import Usage
from stepwiser_jax.judges.base import ChunkJudgment, Solution
from stepwiser_jax.judges.stepwiser import ChunkJudge
from stepwiser_jax.judges.validation import judgment_metrics
from stepwiser_jax.judges.writer import Writer
from stepwiser_jax.model.flops import NOTHING
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.records import Judgment, PrmBenchItem, ProcessBenchItem, Verdict
from stepwiser_jax.search.methods import chunk_reset
from stepwiser_jax.search.state import Beam, Chunk, Hypothesis, SearchState
from stepwiser_jax.stages import evaluate
from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.text.prompts import parse_verdict
from stepwiser_jax.text.tokenizer import load_tokenizer
from stepwiser_jax.text.verdict_tokens import VerdictTokens
from tiny import tiny_config

P, N, U = Verdict.POSITIVE, Verdict.NEGATIVE, Verdict.UNPARSED


# --- where the verdict is written ---------------------------------------------------------------


def byte_level(directory, pieces):
    """A byte-level BPE like Qwen's, whose words may begin with a bracket, and whose longest tokens
    are these pieces."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [
        (piece[:end], piece[end])
        for end in range(1, max(map(len, pieces)))
        for piece in pieces
        if end < len(piece)
    ]
    merges = list(dict.fromkeys(merges))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges), "<eos>"])}
    backend = Tokenizer(models.BPE(ids, merges))
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.save_pretrained(directory)
    return load_tokenizer(str(directory))


@pytest.mark.parametrize(
    ("pieces", "style", "positive", "negative"),
    [
        ((r"\boxed", "Positive", "Negative"), "instruct", ["Positive"], ["Negative"]),
        ((r"\boxed", "{Pos", "itive", "{N", "egative"), "verdict", ["{Pos"], ["{N"]),
        ((r"\boxed", "Positive", "{Neg", "ative"), "instruct", ["{", "Positive"], ["{Neg"]),
        (("aa",), "instruct", ["P"], ["N"]),
        ((r"\boxed", "{Pos", " Positive", " Negative"), "bare", [" Positive"], [" Negative"]),
    ],
    ids=["word", "brace and letter", "brace before one", "letters", "with spaces"],
)
def test_a_verdict_begins_where_the_boxes_first_differ(tmp_path, pieces, style, positive, negative):
    tokenizer = byte_level(tmp_path, [piece.replace(" ", "Ġ") for piece in pieces])
    tokens = VerdictTokens.of(tokenizer, style)
    assert [tokenizer.decode([i]) for i in tokens.positive] == positive
    assert [tokenizer.decode([i]) for i in tokens.negative] == negative
    space = " " if style == "bare" else ""
    for word, verdict, begin in (("Positive", P, positive), ("Negative", N, negative)):
        box = rf"\boxed{{{space}{word}{space}}}"
        other = rf"\boxed{{{space}{'Negative' if verdict is P else 'Positive'}{space}}}"
        for text in (box, f"Positive? {other} No. Judgment: {box}", f"{box}, not {word} or $x_é$."):
            ids = [*tokenizer.encode(text), *tokenizer.eos_ids]
            assert parse_verdict(text) is verdict
            place = tokens.place(ids, verdict)
            assert tokenizer.decode(ids[place : place + len(begin)]) == "".join(begin)
            before = text.rindex(box) + box.index("".join(begin))
            assert tokenizer.decode(ids[:place]) == text[:before], "in the last box"
    for text in (r"\boxed{positive}", r"Positive \boxed{\bf nEgative} Negative"):
        ids = tokenizer.encode(text)
        assert tokens.place(ids, parse_verdict(text)) is None, "other tokens"
    for text in ("Positive", r"\boxed{Positive} or \boxed{3}", rf"{box} \boxed{{{word}"):
        assert not parse_verdict(text).is_given
        assert tokens.place(tokenizer.encode(text), parse_verdict(text)) is None, "no verdict"


def test_decoration_around_the_word_does_not_matter(tmp_path):
    tokenizer = byte_level(tmp_path, [r"\boxed", "Positive", "Negative"])
    tokens = VerdictTokens.of(tokenizer, "instruct")
    ids = tokenizer.encode(r"\boxed{\text{Negative}}")
    assert ids[tokens.place(ids, N)] == tokens.pair[1]


def test_a_vocabulary_that_cannot_spell_the_verdicts_is_refused(word_tokenizer):
    tokens = VerdictTokens.of(word_tokenizer, "bare")
    assert word_tokenizer.decode(tokens.pair) == "Positive Negative"
    with pytest.raises(UserError, match="expected a vocabulary that spells both, found"):
        VerdictTokens.of(word_tokenizer, "instruct")


# --- P(Positive) --------------------------------------------------------------------------------

SOLUTIONS = [
    Solution("a", "start 4 ; * 7 + 5 ?", ["<chunk> 4 * 7 = 8 </chunk>", "<chunk> 5 </chunk>"]),
    Solution("b", "start 1 ; * 2 + 3 ?", ["<chunk> 1 * 2 = 2 </chunk>"]),
]


def make_judge(tokenizer, model, engine, *, votes=0, threshold=None, **sampling):
    sampling = Sampling(**({"max_new_tokens": 32, "temperature": 0.5, "top_k": 8} | sampling))
    loaded = Loaded(model, tokenizer, "judge")
    writer = Writer(loaded, engine, sampling, "bare", seed=0, name="t", votes=votes)
    return ChunkJudge(writer, threshold=threshold)


def test_p_positive_is_that_of_the_verdicts_tokens_teacher_forced(tmp_path, monkeypatch):
    """Of judgments sampled at another temperature: the whole network reads prompt and judgment at
    once, and says how likely the word after the last box was against the other word. The model
    knows few words but those of verdicts."""
    words = "\\boxed{ Positive Negative }".split()
    monkeypatch.setattr(arithmetic, "VOCABULARY", ["<unk>", "<pad>", "<bos>", "<eos>", *words])
    arithmetic.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    box, positive, negative, end = words = tokenizer.encode(" ".join(words))
    model = Transformer(tiny_config(vocab_size=tokenizer.vocab_size), rngs=nnx.Rngs(0))
    head_VD = np.array(model.head[...])
    head_VD *= np.where(np.isin(np.arange(len(head_VD)), words), 1, 0)[:, None]
    model.head[...] = jax.numpy.asarray(head_VD)
    engine = Engine(model, tokenizer, rows=[128], buckets=[64, 128])
    judge = make_judge(tokenizer, model, engine)
    rows, generate = [], engine.generate

    def generating(prompts, *args, group_size, **settings):
        found = generate(prompts, *args, group_size=group_size, **settings)
        rows.extend(zip([p for p in prompts for _ in range(group_size)], found, strict=True))
        return found

    monkeypatch.setattr(engine, "generate", generating)
    judged = judge.sample(SOLUTIONS, [f"/{k}" for k in range(800)], temperature=1.5)
    judgments = [
        x
        for found in judged
        for of_chunk in zip(*(y.chunks for y in found), strict=True)
        for x in of_chunk
    ]
    read, seen = jax.jit(type(model).__call__), []
    for judgment, (prompt, completion) in zip(judgments, rows, strict=True):
        if not judgment.verdict.is_given:
            assert judgment.p_positive == 0.5
            continue
        ids = [*prompt, *completion.tokens.tolist()]
        place = len(ids) - ids[::-1].index(box)
        assert ids[place : place + 2] in ([positive, end], [negative, end])
        row_1T = np.array([ids + [0] * (96 - len(ids))])
        logits_V = np.asarray(read(model, row_1T))[0, place - 1].astype(float)
        p = 1 / (1 + np.exp(logits_V[negative] - logits_V[positive]))
        assert judgment.p_positive == pytest.approx(p, abs=1e-4)
        seen.append((judgment.verdict, round(p, 3)))
    assert len(seen) > 10 and {verdict for verdict, _ in seen} == {P, N}
    assert len(set(seen)) > 5, "they are no mere 1 and 0"
    assert judge.measured(1)["verdicts_in_other_tokens"] == 0


class Scripted:
    """An engine that says texts, with these log-odds at all tokens of each."""

    def __init__(self, tokenizer, said):
        self.tokenizer, self.said = tokenizer, iter(said)
        self.usage, self.compiled_shapes, self.compared = Usage(), {}, set()

    def generate(self, prompts, params, *, key, row_ids, group_size, cache):
        self.compared.add(params.compared)
        completions = []
        for row_id in row_ids:
            text, log_odds = next(self.said)
            ids = np.array(self.tokenizer.encode(text))
            log_odds = np.full(len(ids), log_odds, np.float32)
            zeros = np.zeros(len(ids), np.float32)
            completions.append(Completion(row_id, ids, zeros, StopReason.STOP_ID, log_odds))
        return completions

    def spent_on(self, **tokens):
        return NOTHING


GOOD, BAD = "looks fine | \\boxed{ Positive }", "5 diff | \\boxed{ Negative }"
THREE = np.log(3)


def said(tokenizer, *texts, **settings):
    """Returns what a judge says of the first chunk, from these texts with their log-odds."""
    engine = Scripted(tokenizer, texts)
    judge = make_judge(tokenizer, None, engine, **settings)
    ((found,),) = judge([SOLUTIONS[1]])
    assert engine.compared == {tuple(tokenizer.encode("Positive Negative"))}
    return found, judge


def test_the_score_is_p_positive_and_with_votes_the_mean(word_tokenizer):
    found, _ = said(word_tokenizer, (GOOD, THREE))
    assert (found.verdict, found.p_positive) == (P, pytest.approx(0.75))
    found, _ = said(word_tokenizer, (BAD, -THREE))
    assert (found.verdict, found.p_positive) == (N, pytest.approx(0.25))
    votes = [(GOOD, THREE), (BAD, -THREE), (GOOD, 0.0)]
    found, _ = said(word_tokenizer, *votes, votes=3)
    assert (found.verdict, found.p_positive) == (P, pytest.approx(0.5))


def test_verdicts_without_a_known_probability_are_certain_and_counted(word_tokenizer):
    decorated = "\\boxed{ 4 } \\boxed{ Negative Positive }"  # no verdict
    for text, verdict, p in (("looks fine", U, 0.5), (decorated, Verdict.OTHER, 0.5)):
        found, judge = said(word_tokenizer, (text, THREE))
        assert (found.verdict, found.p_positive) == (verdict, p)
        assert judge.measured(1)["verdicts_in_other_tokens"] == 0
    for word, verdict, p in (("Positive", P, 1.0), ("Negative", N, 0.0)):
        engine = Scripted(word_tokenizer, [(f"\\boxed{{ {word} }}", 0.1)])
        judge = make_judge(word_tokenizer, None, engine)
        pair = word_tokenizer.encode("same diff")  # stands for the usual spelling
        judge.verdict_tokens = VerdictTokens(
            (pair[0],), (pair[1],), judge.verdict_tokens.token_bytes
        )
        ((found,),) = judge([SOLUTIONS[1]])
        assert (found.verdict, found.p_positive) == (verdict, p)
        assert judge.measured(1)["verdicts_in_other_tokens"] == 1


@pytest.mark.parametrize(
    ("threshold", "text", "log_odds", "verdict"),
    [
        (None, GOOD, -THREE, P),
        (0.2, BAD, -THREE, P),
        (0.3, BAD, -THREE, N),
        (0.7, GOOD, THREE, P),
        (0.8, GOOD, THREE, N),
        (0.8, "looks fine", THREE, U),
    ],
)
def test_a_threshold_decides_in_place_of_the_written_verdict(
    word_tokenizer, threshold, text, log_odds, verdict
):
    """Also in chunk-reset, which takes back a chunk that is judged Negative. Records of `evaluate`
    keep what is written."""
    found, judge = said(word_tokenizer, (text, log_odds), threshold=threshold)
    assert found.verdict is verdict
    chunk = Chunk([1], True, judgment=found)
    beam = Beam(Hypothesis("last", (chunk,)), 0, 0)
    (after,) = chunk_reset(5)(SearchState(None, [0], [beam]), [beam])
    assert (after.attempt == 1) == (verdict is N)
    judge.writer.engine.said = iter([(text, log_odds)])
    (((written,),),) = [[x.chunks for x in y] for y in judge.sample([SOLUTIONS[1]], [""])]
    assert written.verdict is parse_verdict(text)


def test_the_mean_of_votes_meets_the_threshold(word_tokenizer):
    votes = [(GOOD, THREE), (BAD, -THREE), (GOOD, THREE)]
    for threshold, verdict in ((0.55, P), (0.6, N)):
        found, _ = said(word_tokenizer, *votes, votes=3, threshold=threshold)
        assert (found.verdict, found.p_positive) == (verdict, pytest.approx(1.75 / 3))


# --- AUC and thresholds -------------------------------------------------------------------------


def pairs_won(right, wrong):
    return np.mean([(w < r) + (w == r) / 2 for w in wrong for r in right])


def test_auc_counts_pairs():
    """Each step as often as a resample has it."""
    rng = np.random.default_rng(0)
    is_right = rng.random(60) < 0.4
    scores = rng.integers(0, 8, 60) / 8  # with ties
    assert auc(scores, is_right) == pairs_won(scores[is_right], scores[~is_right])
    times = rng.integers(0, 3, (4, 60))
    found = auc(scores, is_right, times)
    assert found.shape == (4,)
    for value, of_step in zip(found, times, strict=True):
        drawn, drawn_is_right = (np.repeat(x, of_step) for x in (scores, is_right))
        assert value == pairs_won(drawn[drawn_is_right], drawn[~drawn_is_right])


def test_auc_without_steps_of_both_kinds_is_chance():
    for is_right in ([], [True, True], [False]):
        assert auc([0.3] * len(is_right), is_right) == CHANCE
    assert auc([0.1, 0.9], [False, True], [[1, 1], [1, 0], [0, 2]]).tolist() == [1, CHANCE, CHANCE]
    assert np.isnan(auc([0.1, np.nan], [False, True])), "a model that broke is not the best one"


def test_one_auc_everywhere():
    """Of a benchmark, of a judge in training, and of the comparison."""
    items, p_positive = planted(np.random.default_rng(1), 50)
    expected = observed(step_auc(scores_by_truth(items, p_positive), np.zeros(50)), 50)
    assert expected == slow_auc(items, p_positive)
    steps = [
        (p, item.is_right(step))
        for item, of_item in zip(items, p_positive, strict=True)
        for step, p in enumerate(of_item)
        if item.is_right(step) or step == item.first_error
    ]
    judgments = [ChunkJudgment("", P, p, 1) for p, _ in steps]
    labels = [is_right for _, is_right in steps]
    assert judgment_metrics(labels, judgments, [None] * len(steps))["auc"] == expected
    assert value_of("auc/row", scores_by_truth(items, p_positive)) == expected


def slow_auc(items, p_positive):
    """Every first error against every right step."""
    errors, right = [], []
    for item, of_item in zip(items, p_positive, strict=True):
        for step, p in enumerate(of_item):
            if step == item.first_error:
                errors.append(p)
            elif item.first_error == -1 or step < item.first_error:
                right.append(p)
    return pairs_won(right, errors)


def planted(rng, count):
    """Solutions of two subsets, with probabilities that are lower at first errors, some equal."""
    items, p_positive = [], []
    for i in range(count):
        error = int(rng.integers(-1, 4))
        steps = ("s",) * 4
        items.append(ProcessBenchItem(f"{i}", "ab"[i % 2], "q", steps, error, error == -1))
        p = rng.integers(0, 8, 4) / 8
        p_positive.append([float(x) / 2 if j == error else float(x) for j, x in enumerate(p)])
    return items, p_positive


def test_auc_against_counting_pairs():
    items, p_positive = planted(np.random.default_rng(0), 60)
    verdicts = [[verdict_at(0.5, p) for p in of_item] for of_item in p_positive]
    scores = score_by_subset(items, verdicts, p_positive, seed=0)
    of_subsets = []
    for subset in "ab":
        rows = [i for i, item in enumerate(items) if item.subset == subset]
        expected = slow_auc([items[i] for i in rows], [p_positive[i] for i in rows])
        found = scores["subsets"][subset]
        assert found["auc"] == pytest.approx(expected)
        assert 0.5 < found["auc_interval"][0] < found["auc"] < found["auc_interval"][1] < 1
        of_subsets.append(expected)
    assert scores["average"]["auc"] == pytest.approx(np.mean(of_subsets))
    rows = np.array([3, 3, 3, *range(20)])
    drawn = [items[i] for i in rows], [p_positive[i] for i in rows]
    statistic = step_auc(scores_by_truth(items, p_positive), np.zeros(60))
    (resampled,) = statistic(np.bincount(rows, minlength=60)[None])
    assert resampled == pytest.approx(slow_auc(*drawn)), "a resample counts an item several times"
    no_right_step = ProcessBenchItem("0", "a", "q", ("s",), 0, False)
    (alone,) = scores_by_truth([no_right_step], [[0.2]])
    assert alone == ([], [0.2])
    assert observed(step_auc([alone, ([], [])], np.arange(2)), 2) == CHANCE


def test_prmbench_has_the_auc_of_all_its_steps():
    items = [
        PrmBenchItem("a", "circular", "q", ("s",) * 3, (0, 2)),
        PrmBenchItem("b", "redundency", "q", ("s",) * 2, (1,)),
        PrmBenchItem("c", "correct", "q", ("s",), ()),
    ]
    p_positive = [[0.2, 0.9, 0.8], [0.7, 0.3], [0.0]]
    verdicts = [[verdict_at(0.5, p) for p in of_item] for of_item in p_positive]
    found = score_prmbench(items, verdicts, p_positive, seed=0)["total"]
    # Right steps have 0.9 and 0.7, wrong ones 0.2, 0.8 and 0.3; originals count in no total.
    assert found["auc"] == pytest.approx(5 / 6)
    assert "auc" not in score_prmbench(items, verdicts, seed=0)["total"]


JUDGE = {"path": "arithmetic", "sampling": {"max_new_tokens": 8}, "engine": {"buckets": [64]}}


def evaluated(judge, items, p_positive, verdict_of, **settings):
    config = Evaluate(judge=judge, benchmark={"source": "x"}, **settings)
    judgments = {
        f"{item.item_id}/{step}": Judgment(f"{item.item_id}/{step}", "j", "", verdict_of(p), p, 0)
        for item, of_item in zip(items, p_positive, strict=True)
        for step, p in enumerate(of_item)
    }
    return evaluate.summarize(config, items, judgments)


def test_a_judge_that_writes_is_scored_by_its_verdicts_and_by_thresholds():
    """It writes Positive from 0.3 on. The best threshold of subset a is used for both subsets."""
    items, p_positive = planted(np.random.default_rng(1), 80)
    summary = evaluated(
        JUDGE, items, p_positive, lambda p: verdict_at(0.3, p), threshold_subset="a"
    )
    of_a = [i for i, item in enumerate(items) if item.subset == "a"]
    chosen = best_threshold([p_positive[i] for i in of_a], [items[i].first_error for i in of_a])
    assert (summary["threshold"], summary["threshold_chosen_on"]) == (chosen, "a")
    for name, threshold in (("greedy", 0.3), ("_at_half", 0.5), ("_at_threshold", chosen)):
        found = summary[name if name == "greedy" else f"greedy{name}"]
        for subset in "ab":
            rows = [i for i, item in enumerate(items) if item.subset == subset]
            predictions = [
                first_predicted_error([verdict_at(threshold, p) for p in p_positive[i]])
                for i in rows
            ]
            f1 = processbench_f1(predictions, [items[i].first_error for i in rows])["f1"]
            assert found["subsets"][subset]["official"]["f1"] == pytest.approx(f1), name
    assert "auc" in summary["greedy"]["average"]
    given = evaluated(JUDGE | {"threshold": 0.7}, items, p_positive, lambda p: P)
    assert given["threshold"] == 0.7 and given["greedy_at_threshold"] != given["greedy_at_half"]
    plain = evaluated(JUDGE, items, p_positive, lambda p: P)
    assert "threshold" not in plain and "greedy_at_threshold" not in plain


@pytest.mark.parametrize("kind", ["classifier", "genprm", "thinkprm", "stepwiser"])
def test_every_kind_of_judge_has_an_auc(kind):
    items, p_positive = planted(np.random.default_rng(2), 12)
    judge = {"kind": kind, **JUDGE} | ({"code_rounds": 0} if kind == "genprm" else {})
    if kind == "classifier":
        judge = {"kind": kind, "path": "arithmetic", "max_length": 64}
    summary = evaluated_steps(judge, items, p_positive)
    assert summary["greedy"]["average"]["auc"] == pytest.approx(
        np.mean(
            [
                slow_auc(
                    *zip(
                        *[x for x in zip(items, p_positive, strict=True) if x[0].subset == s],
                        strict=True,
                    )
                )
                for s in "ab"
            ]
        )
    )
    assert ("greedy_at_half" in summary) == (kind == "stepwiser")


def evaluated_steps(judge, items, p_positive):
    """Scores the steps alone: ThinkPRM's judge has a judgment of the whole solution besides."""
    config = Evaluate(judge=judge, benchmark={"source": "x"})
    judgments = {
        f"{item.item_id}/{step}": Judgment(f"{item.item_id}/{step}", "j", "", P, p, 0)
        for item, of_item in zip(items, p_positive, strict=True)
        for step, p in enumerate(of_item)
    }
    rules = rules_of(config, threshold_of(config, items, judgments))
    return score_judgments(items, judgments, rules, votes=0, seed=0)
