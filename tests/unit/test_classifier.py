"""The discriminative process reward model: its conversations, its loss, its scores."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from stepwiser_jax.config import ClassifierJudge, DataSource, Validation
from stepwiser_jax.config_files import load_config
from stepwiser_jax.data.datasets import load_classifier_examples
from stepwiser_jax.distributed.loading import Loaded, load_model, with_new_score
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.processbench import best_threshold, processbench_f1
from stepwiser_jax.evaluation.verdicts import first_predicted_error, verdict_at
from stepwiser_jax.judges.base import Solution
from stepwiser_jax.judges.classifier import (
    Classifier,
    classifier_loss,
    encode_solution,
    sign_ids,
)
from stepwiser_jax.model.config import ARCHITECTURES, ModelConfig
from stepwiser_jax.model.hf import save_hf, tensors_by_name
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import ClassifierExample, ProcessBenchItem
from stepwiser_jax.stages import train_classifier
from stepwiser_jax.text.tokenizer import unknown_ids
from stepwiser_jax.training.batches import (
    Document,
    document_loader,
    first_fit,
    fitting_documents,
    pack_documents,
)
from stepwiser_jax.training.step import accumulate
from tiny import tiny_config

QUESTION = "start 4 ; * 7 + 5 ?"
CHUNKS = ("<chunk> 4 * 7 = 8 ; 8 + 5 = 3 </chunk>", "<chunk> fix ; 8 - 5 = 3 </chunk>", "3 + 4 = 7")
SOLUTION = ClassifierExample(
    "p#0", "p", QUESTION, (*CHUNKS, "= 7"), (0, 2), (False, True), (0.25, 0.75)
)


@pytest.fixture
def config(request):
    return load_config(
        "train-classifier", request.config.rootpath / "configs" / "smoke_classifier.yaml"
    )


# --- conversations ------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["bare", "instruct"])
def test_answers_stand_behind_their_chunks(word_tokenizer, bpe_tokenizer, style):
    tokenizer = word_tokenizer if style == "bare" else bpe_tokenizer
    signs = (True, False, True)
    ids, places = encode_solution(tokenizer, QUESTION, CHUNKS, style, signs)
    plus, minus = sign_ids(tokenizer)
    assert [ids[place] for place in places] == [plus, minus, plus]
    assert places[-1] == len(ids) - 1
    texts = [
        tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise([0, *(p + 1 for p in places)])
    ]
    if style == "bare":
        assert texts[0] == f"<bos> {QUESTION} {CHUNKS[0]} <judge> +"
        assert texts[1:] == [f"{CHUNKS[1]} <judge> -", f"{CHUNKS[2]} <judge> +"]
    else:
        user, answer = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
        assert texts == [
            f"{user}{QUESTION}\n\n4 * 7 = 8 ; 8 + 5 = 3{answer}+",
            f"<|im_end|>\n{user}fix ; 8 - 5 = 3{answer}-",
            f"<|im_end|>\n{user}3 + 4 = 7{answer}+",
        ]
    for j in range(1, 4):
        shorter, some = encode_solution(tokenizer, QUESTION, CHUNKS[:j], style, signs[:j])
        assert (shorter, some) == (ids[: len(shorter)], places[:j])


class Changed:
    """A tokenizer that differs from another in what is given."""

    def __init__(self, tokenizer, **changes):
        self.tokenizer, self.changes = tokenizer, changes

    def __getattr__(self, name):
        return self.changes.get(name) or getattr(self.tokenizer, name)


def test_vocabularies_without_the_signs_are_refused(word_tokenizer):
    unknown = Changed(word_tokenizer, encode=lambda text: word_tokenizer.encode("?!"))
    split = Changed(word_tokenizer, encode=lambda text: word_tokenizer.encode("+ -"))
    for tokenizer in (unknown, split):
        with pytest.raises(UserError, match=r"found '\+' encoded as"):
            encode_solution(tokenizer, QUESTION, CHUNKS, "bare")


def test_a_template_that_rewrites_what_was_said_is_refused(bpe_tokenizer):
    def last_message_only(messages):
        return bpe_tokenizer.render_chat(messages[-1:])

    forgetful = Changed(bpe_tokenizer, render_chat=last_message_only)
    assert encode_solution(forgetful, QUESTION, CHUNKS[:1], "instruct")
    with pytest.raises(UserError, match="does not keep the beginning"):
        encode_solution(forgetful, QUESTION, CHUNKS, "instruct")


def test_hard_labels_are_answers_and_others_are_not(word_tokenizer, config):
    plus, minus = sign_ids(word_tokenizer)
    for labels, answers, targets in (
        ("hard", [minus, plus, plus], [0.0, 1.0]),
        ("soft", [plus, plus, plus], [0.25, 0.75]),
        ("scalar", [plus, plus, plus], [0.0, 1.0]),
    ):
        change = {"head": "scalar"} if labels == "scalar" else {"labels": labels}
        changed = config.model_copy(update=change)
        document = train_classifier.make_document(SOLUTION, word_tokenizer, changed)
        ids = document.tokens_T.tolist()
        whole, places_J = encode_solution(word_tokenizer, QUESTION, CHUNKS, "bare")
        assert len(ids) == len(whole), "what is behind the last label teaches nothing"
        assert [ids[place] for place in places_J] == answers
        assert np.flatnonzero(document.target_mask_T).tolist() == [places_J[0], places_J[2]]
        assert document.targets_T[document.target_mask_T].tolist() == targets


# --- data ---------------------------------------------------------------------------------------


def item(index, first_error, steps=("a", "b", "c")):
    return ProcessBenchItem(f"gsm8k-{index}", "gsm8k", "q", steps, first_error, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"labelled": (0, 4)},
        {"labelled": (2, 0)},
        {"labelled": (0, 0)},
        {"labelled": (0,)},
        {"labelled": (), "is_positive": (), "q": ()},
        {"q": (0.5, 1.5)},
    ],
)
def test_labels_that_are_not_of_the_chunks_are_refused(tmp_path, changes):
    file = tmp_path / "solutions.jsonl"
    write_records(file, [SOLUTION])
    assert load_classifier_examples(str(file)) == [SOLUTION]
    file.write_text(json.dumps(dataclasses.asdict(SOLUTION) | changes))
    with pytest.raises(UserError, match=r"solutions.jsonl, line 1: .*expected .*found .*p#0"):
        load_classifier_examples(str(file))


def documents(count, max_length=24):
    rng = np.random.default_rng(0)

    def make():
        size = int(rng.integers(4, 30))
        places = sorted(rng.choice(np.arange(1, size), 2, replace=False).tolist())
        mask, targets = np.zeros(size, bool), np.zeros(size, np.float32)
        tokens = rng.integers(0, 64, size).astype(np.int32)
        mask[places], targets[places] = True, rng.uniform(0, 1, 2)
        return Document(tokens, mask, targets)

    return fitting_documents([make() for _ in range(count)], max_length)


def test_packed_rows_hold_every_solution_as_it_was():
    kept, too_long = documents(40)
    assert 0 < too_long < 20 and len(kept) + too_long == 40
    loader = document_loader(kept, batch_size=4, max_length=64, seed=0)
    expected = {
        tuple(tuple(part.tolist()) for part in (d.tokens_T, d.target_mask_T, d.targets_T))
        for d in kept
    }
    found = set()
    for _ in range(8):
        batch = next(loader)
        assert batch.tokens_BT.shape == (4, 64)
        for row in range(4):
            for segment in range(1, batch.segment_ids_BT[row].max() + 1):
                here = batch.segment_ids_BT[row] == segment
                size = here.sum()
                np.testing.assert_array_equal(batch.positions_BT[row, here], np.arange(size))
                parts = (batch.tokens_BT, batch.target_mask_BT, batch.targets_BT)
                found.add(tuple(tuple(part[row, here].tolist()) for part in parts))
        padding = batch.segment_ids_BT == 0
        assert not batch.target_mask_BT[padding].any()
    assert found == expected


def test_first_fit_loses_nothing_and_fills_rows():
    lengths = np.random.default_rng(0).integers(1, 20, 50).tolist()
    (rows,) = first_fit(range(50), lengths.__getitem__, 20, 50)
    assert sorted(i for row in rows for i in row) == list(range(50))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert max(sums) <= 20
    for a, b in itertools.combinations(range(len(rows)), 2):
        assert sums[a] + lengths[rows[b][0]] > 20, "it had room in an earlier row"
    with pytest.raises(ValueError, match="an item of 20 tokens"):
        next(first_fit([20], int, 19, 1))


def test_first_fit_yields_full_blocks():
    assert list(first_fit([3, 4, 2, 3, 5, 1], int, 5, 2)) == [[[3, 2], [4]], [[3, 1], [5]]]


# --- loss ---------------------------------------------------------------------------------------

SIGNS = (17, 42)


def batch_of(kept):
    loader = document_loader(kept, batch_size=4, max_length=48, seed=0)
    return jax.tree.map(jnp.asarray, next(loader))


def mean_loss(model, batch, normalizer=None, remat=False):
    if normalizer is None:
        normalizer = jnp.sum(batch.target_mask_BT)
    return classifier_loss(model, batch, normalizer, signs=SIGNS, remat=remat)


def test_loss_is_that_of_a_softmax_over_two_tokens(tiny_model):
    """The oracle: all logits, one answer at a time."""
    batch = batch_of(documents(30)[0])
    logits = np.asarray(
        tiny_model(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT), np.float64
    )
    losses, right = [], []
    for row, t in zip(*np.nonzero(batch.target_mask_BT), strict=True):
        pair = logits[row, t - 1, list(SIGNS)]
        plus, minus = np.exp(pair) / np.exp(pair).sum()
        target = float(batch.targets_BT[row, t])
        losses.append(-target * np.log(plus) - (1 - target) * np.log(minus))
        right.append((plus > 0.5) == (target > 0.5))
    loss, metrics = mean_loss(tiny_model, batch)
    assert len(losses) > 8
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)


def test_gradients_add_up_over_micro_batches_and_stay_in_float32():
    batch = batch_of(documents(30)[0])
    model = Transformer(tiny_config(), rngs=nnx.Rngs(0), compute_dtype=jnp.bfloat16)

    def gradients(micro_batches, remat, model=model):
        grads, _ = accumulate(
            lambda model, rows, count: mean_loss(model, rows, count, remat),
            lambda batch: jnp.sum(batch.target_mask_BT),
            model,
            batch,
            micro_batches,
        )
        return jax.tree.leaves(grads)

    whole = gradients(1, False)
    assert all(grad.dtype == jnp.float32 for grad in whole)
    assert all(float(jnp.max(jnp.abs(grad))) > 0 for grad in whole)
    exact = Transformer(tiny_config(), rngs=nnx.Rngs(0))
    for a, b in zip(gradients(1, False, exact), gradients(2, True, exact), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("place", ["examples", "validation"])
def test_values_that_stopped_early_are_no_soft_labels(tmp_path, config, place):
    """Their labels are known, and can be learned."""
    for name, settings in {
        "adaptive": {"adaptive": {"rule": "abs_q"}},
        "all": {"adaptive": None},
        "early": {"values": str(tmp_path / "adaptive")},
        "whole": {"values": str(tmp_path / "all")},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(settings))

    def check(run, labels):
        data = DataSource(source=str(tmp_path / run))
        other = DataSource(source=str(tmp_path / "whole"))
        examples, held_out = (data, other) if place == "examples" else (other, data)
        validation = Validation(examples=held_out, every=1)
        changes = {"examples": examples, "validation": validation, "labels": labels}
        train_classifier.check_values(config.model_copy(update=changes))

    check("early", "hard")
    check("whole", "soft")
    with pytest.raises(UserError, match=r"adaptive, whose labels are in .*early.*not the values"):
        check("early", "soft")


def test_no_gradient_where_the_score_is_the_soft_label(tiny_model):
    kept, _ = documents(30)
    batch = batch_of(kept)

    def scores(model):
        logits = model(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        pair = jnp.roll(logits[:, :, list(SIGNS)], 1, axis=1)
        return jax.nn.softmax(pair, axis=-1)[:, :, 0]

    learned = dataclasses.replace(batch, targets_BT=scores(tiny_model))

    def slope(batch):
        grads = jax.grad(lambda model: mean_loss(model, batch)[0])(tiny_model)
        return max(float(jnp.max(jnp.abs(grad))) for grad in jax.tree.leaves(grads))

    assert slope(learned) < 1e-5 < 1e-2 < slope(batch)


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("family", "scalar"), [("llama", False), ("qwen3", False), ("llama", True), ("qwen2", True)]
)
def test_one_packed_pass_gives_the_scores_of_step_by_step_passes(
    word_tokenizer, family, scalar, sizes
):
    """The oracle sees a solution up to one chunk, alone in its row, and computes all logits."""
    model = Transformer(tiny_config(family, classifier=scalar), rngs=nnx.Rngs(0))
    if scalar:
        model.score.bias[...] = jnp.array([0.5, -0.25])
    scorer = Classifier(
        Loaded(model, word_tokenizer, "tiny"),
        make_mesh(*sizes),
        ClassifierJudge(kind="classifier", path="tiny", rows=4, max_length=96, prompt_style="bare"),
    )
    rng = np.random.default_rng(0)
    solutions = [
        [" ".join(rng.choice(list("0123456789+-*=;"), rng.integers(1, 9))) for _ in range(steps)]
        for steps in rng.integers(1, 6, 24)
    ]
    asked = [Solution("s", QUESTION, chunks) for chunks in solutions]
    encoded = [encode_solution(word_tokenizer, QUESTION, chunks, "bare") for chunks in solutions]
    lengths = [len(ids) for ids, _ in encoded]
    (packed,) = first_fit(range(len(lengths)), lengths.__getitem__, 96, len(lengths))
    assert len(packed) > 4 > 1 < max(map(len, packed)), "several batches, and rows of several"
    plus, minus = sign_ids(word_tokenizer)
    hidden = jax.jit(lambda model, tokens_BT: model.hidden(tokens_BT))
    judged = scorer(asked)
    read = [sum(opinion.read_tokens for opinion in found) for found in judged]
    assert read == [length - 1 for length in lengths], "all but the last answer, and no padding"
    assert scorer.measured(2)["flops_per_judgment"] == sum(o.flops for x in judged for o in x) / 2
    scores = [[opinion.p_positive for opinion in found] for found in judged]
    for found, chunks in zip(scores, solutions, strict=True):
        assert len(found) == len(chunks)
        for j, p_positive in enumerate(found):
            ids, places = encode_solution(word_tokenizer, QUESTION, chunks[: j + 1], "bare")
            padded = np.pad(ids[: places[-1]], (0, 96 - places[-1]))  # what is behind is not seen
            hidden_D = hidden(model, padded[None])[0, places[-1] - 1]
            if scalar:
                wrong, right = model.score.weight[...] @ hidden_D
                logits = jnp.array([right - 0.25, wrong + 0.5])
            else:
                logits = model.logits(hidden_D)[jnp.array([plus, minus])]
            pair = jax.nn.softmax(logits)
            assert p_positive == pytest.approx(float(pair[0]), abs=1e-5)
    spread = np.concatenate(scores)
    assert spread.std() > 0.01, "all scores are alike: nothing was compared"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_scalar_head_is_a_token_classifier_on_disk(word_tokenizer, family, tmp_path):
    """And takes the output matrix's place; what samples or learns tokens refuses it."""
    mesh = make_mesh(1, 2, 2)
    base = Transformer(tiny_config(family), rngs=nnx.Rngs(0))
    before = set(tensors_by_name(base))
    model = with_new_score(base, mesh, seed=0)
    assert set(tensors_by_name(base)) == before, "the language model is what it was"
    assert set(tensors_by_name(model)) == before - {"lm_head.weight"} | {
        "score.weight",
        "score.bias",
    }
    assert float(model.score.weight[...].std()) > 0 == float(jnp.abs(model.score.bias[...]).max())
    save_hf(model, word_tokenizer, str(tmp_path))
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == [
        ARCHITECTURES[family].replace("ForCausalLM", "ForTokenClassification")
    ]
    again = load_model(str(tmp_path), mesh=mesh, classifier=True).model
    assert again.config == dataclasses.replace(
        model.config, unknown_ids=unknown_ids(word_tokenizer, model.config.vocab_size)
    )
    assert again.config.classifier
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="expected a language model"):
        load_model(str(tmp_path), mesh=mesh)
    with pytest.raises(UserError, match="expected 2 classes in id2label, found 3"):
        ModelConfig.from_hf(fields | {"id2label": {"0": "a", "1": "b", "2": "c"}})


def test_adapters_have_no_scalar_head(request):
    file = request.config.rootpath / "configs" / "smoke_classifier.yaml"
    with pytest.raises(UserError, match="set head to signs"):
        load_config("train-classifier", file, ("head=scalar", "model.lora={}"))


def test_a_solution_longer_than_a_row_is_named(word_tokenizer, tiny_model):
    loaded = Loaded(tiny_model, word_tokenizer, "tiny")
    settings = {"kind": "classifier", "path": "tiny", "rows": 1, "max_length": 40}
    config = ClassifierJudge.model_validate({**settings, "prompt_style": "bare"})
    scorer = Classifier(loaded, make_mesh(), config)
    with pytest.raises(UserError, match="gsm8k-7 has 42 tokens: max_length must be at least that"):
        scorer.check_lengths([Solution("gsm8k-7", QUESTION, CHUNKS)])


def test_packed_batches_are_the_documents_behind_one_another():
    documents = [
        [Document(np.array(ids), np.zeros(len(ids), bool)) for ids in row]
        for row in ([[5, 6], [7]], [[8, 9, 3, 4]])
    ]
    batch = pack_documents(documents, 3, 4)
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 0], [8, 9, 3, 4], [0, 0, 0, 0]]
    assert batch.segment_ids_BT.tolist() == [[1, 1, 2, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3], [0, 0, 0, 0]]


# --- thresholds ---------------------------------------------------------------------------------


def f1_at(threshold, p_positive, labels):
    predictions = [
        first_predicted_error([verdict_at(threshold, p) for p in row]) for row in p_positive
    ]
    return processbench_f1(predictions, labels)["f1"]


@pytest.mark.parametrize("seed", range(8))
def test_no_threshold_is_better_than_the_best(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 3, 20).tolist()
    # Coarse, so that many scores are equal; the right step is lower than most.
    p_positive = [
        [round(float(rng.beta(1 if j == label else 3, 2)), 1) for j in range(rng.integers(3, 6))]
        for label in labels
    ]
    found = best_threshold(p_positive, labels)
    every = {x: f1_at(x, p_positive, labels) for x in np.linspace(0, 1, 401)}
    best = max(every.values())
    assert f1_at(found, p_positive, labels) == pytest.approx(best)
    distance = min(abs(x - 0.5) for x, f1 in every.items() if f1 == best)
    assert abs(found - 0.5) <= distance + 0.051, "of equals the one nearest to a half"


def test_threshold_of_nothing_to_choose_from():
    assert best_threshold([[0.9, 0.8]], [-1]) == 0.5
    assert best_threshold([[0.7, 0.6], [0.9, 0.9]], [1, -1]) == pytest.approx(0.65)


def test_threshold_is_given_or_chosen(request):
    file = request.config.rootpath / "configs" / "smoke_evaluate_classifier.yaml"
    with pytest.raises(UserError, match=r"set either judge\.threshold, or threshold_subset"):
        load_config("evaluate", file, ("judge.threshold=0.3",))
    with pytest.raises(UserError, match=r"judge\.rows \[4\] must be multiples"):
        load_config("evaluate", file, ("mesh.data=8",))


def test_loss_of_answers_alone(tiny_model):
    """Tokens that are no answers, targets of theirs, and padding change nothing."""
    batch = batch_of(documents(30)[0])
    elsewhere = jnp.where(batch.target_mask_BT, batch.targets_BT, 7.0)
    tokens = jnp.where(batch.segment_ids_BT == 0, 9, batch.tokens_BT)
    changed = dataclasses.replace(batch, tokens_BT=tokens, targets_BT=elsewhere)
    same = mean_loss(tiny_model, changed)
    np.testing.assert_allclose(same[0], mean_loss(tiny_model, batch)[0], rtol=1e-6)
