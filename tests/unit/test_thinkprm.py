"""ThinkPRM: chains made are read back, the filter, rounds of thought, the forced question."""

import dataclasses
import itertools
import random
import re

import numpy as np
import pytest
from pydantic import ValidationError

from stepwiser_jax.config import Sampling, ThinkPrmJudge
from stepwiser_jax.data.rationales import RationaleOutcome
from stepwiser_jax.distributed.loading import Loaded, load_for_decoding, load_model
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import Completion, StopReason
from stepwiser_jax.judges.base import Solution
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.judges.thinkprm import (
    FORMS,
    Chain,
    ThinkPrmVerifier,
    answer_ids,
    chain_outcome,
    clean_chain,
    cut_chain,
    form_of,
    step_verdicts,
    to_verify,
    verdicts_of,
    verify_prompt,
)
from stepwiser_jax.judges.writer import Writer
from stepwiser_jax.model.flops import Spent
from stepwiser_jax.records import ClassifierExample, Verdict
from stepwiser_jax.text.tokenizer import load_tokenizer

P, N, U = Verdict.POSITIVE, Verdict.NEGATIVE, Verdict.UNPARSED
INSTRUCT, BARE = FORMS["instruct"], FORMS["bare"]
CRITIQUES = {
    "instruct": (
        "Step 1 gave 4, so this is \\boxed{42}.",
        "Wait.\n\nIt follows from Step 2: and from what stands above.",
        "",
    ),
    "bare": ("4 * 7 = 8 8 same ; 8 + 5 = 3 3 same |", "looks fine", "? diff |"),
}


def made_chains(style, count=100):
    """(chain, its verdicts) with all sorts of critiques."""
    rng = random.Random(0)
    for _ in range(count):
        verdicts = [rng.choice([P, N]) for _ in range(rng.randint(1, 6))]
        critiques = [rng.choice(CRITIQUES[style]) for _ in verdicts]
        yield FORMS[style].chain(critiques, verdicts), verdicts


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", FORMS)
def test_what_is_made_is_read_back(style):
    form = FORMS[style]
    for chain, verdicts in made_chains(style):
        assert [v.verdict for v in step_verdicts(chain, form)] == verdicts
        assert [v.step for v in step_verdicts(chain, form)] == list(range(len(verdicts)))
        assert "".join(v.text for v in step_verdicts(chain, form)) == chain
        assert clean_chain(chain, form) == chain
        assert cut_chain(chain, form, len(verdicts)) == chain.strip()
        whole = form.whole(chain, is_correct=N not in verdicts)
        after = whole.removeprefix(form.opening)
        assert cut_chain(after, form, len(verdicts)) == chain.strip()
        assert whole.endswith(form.answers[N in verdicts])


@pytest.mark.parametrize("style", FORMS)
def test_a_chain_cut_anywhere_says_no_more_than_it_said(style):
    form = FORMS[style]
    for chain, verdicts in made_chains(style, 10):
        counts = []
        for end in range(len(chain) + 1):
            found = [v.verdict for v in step_verdicts(chain[:end], form)]
            assert found == verdicts[: len(found)]
            counts.append(len(found))
        assert counts == sorted(counts) and counts[-1] == len(verdicts)


@pytest.mark.parametrize(
    ("rest", "verdicts"),
    [
        (" No, it is \\boxed{incor", [P, U]),
        (" No, it is \\boxed", [P, U]),
        ("\nStep 3: \\boxed{corr", [P, P]),
        ("\nStep 1: again, it is \\boxed{", [U, P]),
        (" It is \\boxed{\\frac{1}{\\sqrt{2}}}.", [P, P]),
        (" It is \\boxed{4, no: \\boxed{correct}", [P, P]),
    ],
)
def test_an_unfinished_last_box_takes_back_what_was_said_of_its_step(rest, verdicts):
    chain = INSTRUCT.chain("ab", [P, P])
    assert verdicts_of([chain + rest], INSTRUCT, 2) == verdicts
    kept = chain_outcome(chain + rest, True, (True, True), 2, INSTRUCT) is RationaleOutcome.KEPT
    assert kept == (verdicts == [P, P] and "no:" not in rest)
    # the next round of thought may say it after all
    assert verdicts_of([chain + rest, chain], INSTRUCT, 2) == [P, P]


@pytest.mark.parametrize("style", FORMS)
def test_other_spellings_are_read_alike_and_made_alike(style):
    form = FORMS[style]
    for chain, verdicts in made_chains(style, 20):
        other = re.sub(r"\\boxed{ ?([a-zA-Z]+) ?}", r"\\boxed {\\textbf{ **\1**. }}", chain)
        other = other.replace("correct", "Correct")
        if form.numbered:
            other = other.replace("\nStep", "\n\n### **Step")
        assert [v.verdict for v in step_verdicts(other, form)] == verdicts
        again = clean_chain(other + "\nSo much for that.", form)
        assert [v.verdict for v in step_verdicts(again, form)] == verdicts
        assert again.count("\\boxed{") == chain.count("\\boxed{") and "text" not in again
        assert other != chain
        assert again.endswith(form.boxed(verdicts[-1]))
        assert clean_chain(again, form) == again


def test_a_chain_ends_before_the_question_and_before_steps_that_are_not_there():
    chain = INSTRUCT.chain(["a"] * 3, [P] * 3)
    for rest in ("\n</think>\nno", "\nIs the solution correct? No", "\nStep 4: \\boxed{incorrect}"):
        assert cut_chain(chain + rest, INSTRUCT, 3) == chain
    assert cut_chain(chain, INSTRUCT, 2) == INSTRUCT.chain(["a"] * 2, [P] * 2)
    assert cut_chain(chain + " Step 7: no heading", INSTRUCT, 3).endswith("no heading")
    assert cut_chain("looks fine \\boxed{ Positive } <judge>", BARE, 9).endswith("}")


def test_the_last_word_about_a_step_counts():
    first = INSTRUCT.chain("abc", [P, N, P])
    assert verdicts_of([first], INSTRUCT, 4) == [P, N, P, N]
    again = INSTRUCT.chain("ab", [P, P])
    assert verdicts_of([first, again], INSTRUCT, 4) == [P, P, P, U]
    changed = "Step 1: \\boxed{correct}, no: \\boxed{incorrect}\nStep 3: \\boxed{correct}"
    assert verdicts_of([changed], INSTRUCT, 3) == [N, N, P]
    missing = "Step 1: \\boxed{correct}\nStep 3: \\boxed{incorrect}"
    assert verdicts_of([missing], INSTRUCT, 4) == [P, U, N, N]
    assert verdicts_of(["It is \\boxed{4}."], INSTRUCT, 2) == [U, U]
    assert verdicts_of(["All is \\boxed{correct}."], INSTRUCT, 2) == [U, U]
    assert verdicts_of([BARE.chain("ab", [P, N])], BARE, 3) == [P, N, N]


def test_the_prompt_numbers_steps_anew():
    prompt = verify_prompt("1 + 1?", ["<chunk> Step 1: Add.</chunk>", "It is 2."], "instruct")
    assert "[Math Problem]\n\n1 + 1?\n\n[Solution]\n\nStep 1: Add.\nStep 2: It is 2.\n\n" in prompt
    assert verify_prompt("q ?", ["a", "b"], "bare") == "q ? a b <judge>"


# --- the filter ---------------------------------------------------------------------------------


def slow_kept(said, labels, num_steps):
    """As the paper's code has it: a count of decisions, then one after another."""
    if len(said) != len(labels) and len(said) != num_steps:
        return False
    return all(a == b for a, b in zip(said, labels, strict=False))


@pytest.mark.parametrize("style", FORMS)
def test_the_filter_against_brute_force(style):
    form, kept = FORMS[style], 0
    for num_steps in (1, 2, 3):
        all_labels = [(True,) * num_steps]
        all_labels += [(True,) * k + (False,) for k in range(num_steps)]
        for labels, count in itertools.product(all_labels, range(num_steps + 2)):
            for said in itertools.product([True, False], repeat=count):
                chain = form.chain(["so"] * count, [P if good else N for good in said])
                expected = slow_kept(said, labels, num_steps)
                for finished in (True, False):
                    found = chain_outcome(chain, finished, labels, num_steps, form)
                    assert (found is RationaleOutcome.KEPT) == expected, (labels, said)
                    agrees = slow_kept(said[: len(labels)], labels[:count], min(count, num_steps))
                    if not expected and agrees:
                        short = (
                            RationaleOutcome.UNPARSED if finished else RationaleOutcome.UNFINISHED
                        )
                        assert found is short
                    elif not expected:
                        assert found is RationaleOutcome.DISAGREES
                    kept += expected
    assert kept > 20


@pytest.mark.parametrize(
    "chain",
    [
        "Step 1: \\boxed{correct}\nStep 3: \\boxed{correct}",
        "Step 2: \\boxed{correct}\nStep 1: \\boxed{correct}",
        "Step 1: \\boxed{correct}, \\boxed{correct}",
        "Step 1: \\boxed{correct}\nStep 1: \\boxed{correct}\nStep 2: \\boxed{correct}",
        "Both are right.",
        "All is \\boxed{correct}.\nStep 2: \\boxed{correct}",
    ],
)
def test_chains_out_of_order_are_not_kept(chain):
    assert chain_outcome(chain, True, (True, True), 2, INSTRUCT) is RationaleOutcome.UNPARSED


def example(labelled, is_positive):
    q = tuple(map(float, is_positive))
    return ClassifierExample("s", "p", "1?", ("a", "b", "c", "d"), labelled, is_positive, q)


@pytest.mark.parametrize(
    ("labelled", "is_positive", "num_chunks", "labels"),
    [
        ((0, 1, 2, 3), (True,) * 4, 4, (True,) * 4),
        ((0, 1), (True, True), 2, (True, True)),  # nobody judged the rest
        ((0, 1), (True, False), 4, (True, False)),  # the rest follows an error
        ((2,), (False,), 4, (True, True, False)),  # a branch: shared steps are right
        ((0, 1, 2), (False, True, False), 4, (False,)),
    ],
)
def test_what_is_verified_of_a_labelled_solution(labelled, is_positive, num_chunks, labels):
    chunks, found = to_verify(example(labelled, is_positive))
    assert (chunks, found) == (("a", "b", "c", "d")[:num_chunks], labels)


# --- the judge ----------------------------------------------------------------------------------


class Scripted:
    """An engine that says one text after another, and has seen what it was asked."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts = tokenizer, iter(texts)
        self.generated, self.asked, self.compiled_shapes = [], [], {}

    def generate(self, prompts, params, *, key, row_ids, group_size, cache):
        completions = []
        for b, row_id in enumerate(row_ids):
            prompt = self.tokenizer.decode(prompts[b // group_size])
            self.generated.append((row_id, prompt, params))
            text = next(self.texts)
            ids = self.tokenizer.encode(text.removesuffix(" <eos>"))[: params.max_new_tokens]
            ids += self.tokenizer.eos_ids if text.endswith(" <eos>") else ()
            logprobs = np.zeros(len(ids))
            completions.append(Completion(row_id, np.array(ids), logprobs, StopReason.LENGTH))
        return completions

    def spent_on(self, *, before=0, read=0, generated=0):
        return Spent(generated, read, 0.25)

    def log_odds(self, prompts, pair):
        self.asked += [self.tokenizer.decode(prompt) for prompt in prompts]
        return np.arange(len(prompts), dtype=np.float32)


@pytest.fixture
def loaded():
    mesh = make_mesh()
    return load_for_decoding("arithmetic", weights="model", mesh=mesh, seed=1)


def make_judge(loaded, engine, **settings):
    settings = {"max_new_tokens": 24, "rounds": 1, "votes": 0, "temperature": 1.0} | settings
    rounds, votes = settings.pop("rounds"), settings.pop("votes")
    writer = Writer(loaded, engine, Sampling(**settings), "bare", seed=0, name="t", votes=votes)
    return ThinkPrmVerifier(writer, rounds=rounds)


SOLUTIONS = [
    Solution("a", "start 4 ; * 7 + 5 ?", ["<chunk> 4 * 7 = 8 </chunk>", "<chunk> 5 </chunk>"]),
    Solution("b", "start 1 ; * 2 + 3 ?", ["<chunk> 1 * 2 = 2 </chunk>"]),
]
PROMPTS = [
    "<bos> start 4 ; * 7 + 5 ? <chunk> 4 * 7 = 8 </chunk> <chunk> 5 </chunk> <judge>",
    "<bos> start 1 ; * 2 + 3 ? <chunk> 1 * 2 = 2 </chunk> <judge>",
]


def test_rounds_of_thought_go_on_from_one_another(loaded):
    good, bad = "looks fine \\boxed{ Positive }", "? diff | \\boxed{ Negative }"
    texts = [f"{good} {good} <judge> 7 <eos>", f"{good} <eos>"]  # round 0 of a, b
    texts += [f"{good} {bad} <judge>", "same", f"4 {good}", bad]
    engine = Scripted(loaded.tokenizer, texts)
    (a,), (b,) = make_judge(loaded, engine, rounds=3).sample(SOLUTIONS, ("/v",), temperature=0.0)
    assert [row_id for row_id, _, _ in engine.generated] == [
        *("t/a/v", "t/b/v"),
        *("t/a/v/round1", "t/b/v/round1"),
        *("t/a/v/round2", "t/b/v/round2"),
    ]
    assert {params.stop_strings for _, _, params in engine.generated} == {("<judge>",)}
    thought = [f"{good} {good} fix {good} {bad} fix 4 {good}", f"{good} fix same fix {bad}"]
    assert [prompt for _, prompt, _ in engine.generated] == [
        PROMPTS[0],
        PROMPTS[1],
        f"{PROMPTS[0]} {good} {good} fix",
        f"{PROMPTS[1]} {good} fix",
        f"{PROMPTS[0]} {good} {good} fix {good} {bad} fix",
        f"{PROMPTS[1]} {good} fix same fix",
    ]
    assert engine.asked == [f"{PROMPTS[i]} {thought[i]} <judge>" for i in (0, 1)]
    assert [o.verdict for o in a.chunks] == [P, N]
    assert [o.verdict for o in b.chunks] == [N]
    assert [o.p_positive for o in a.chunks + b.chunks] == [1.0, 0.0, 0.0]
    assert (a.whole.p_positive, b.whole.p_positive) == (0.5, pytest.approx(0.7310586))
    assert a.whole.completion == f"{thought[0]} <judge> Positive"
    assert a.whole.num_tokens == sum(len(texts[i].split()) for i in (0, 2, 4))
    fed = [prompt for row_id, prompt, _ in engine.generated if "/a/" in row_id][-1:]
    fed += engine.asked[:1]
    assert a.whole.read_tokens == sum(len(prompt.split()) for prompt in fed), (
        "rounds read what is new"
    )
    assert a.whole.flops == (3 * 2 + 1) * 0.25


def test_draws_of_a_solution_are_kept_apart_and_in_place(loaded):
    texts = [f"{i} \\boxed{{ Positive }}" for i in range(6)]
    engine = Scripted(loaded.tokenizer, texts)
    found = make_judge(loaded, engine).sample(SOLUTIONS, ("/0", "/1", "/2"), temperature=1.0)
    assert [row_id for row_id, _, _ in engine.generated] == [
        f"t/{s}/{k}" for s in "ab" for k in range(3)
    ]
    said = [[v.whole.completion.split()[0] for v in of_solution] for of_solution in found]
    assert said == [["0", "1", "2"], ["3", "4", "5"]]
    assert [o.verdict for o in found[0][0].chunks] == [P, U]


def test_a_process_reward_is_the_score_of_every_prefix(loaded):
    engine = Scripted(loaded.tokenizer, ["looks fine \\boxed{ Negative }"] * 3)
    found = make_judge(loaded, engine)(
        [SOLUTIONS[0], dataclasses.replace(SOLUTIONS[0], solution_id="c", start=1)]
    )
    assert [len(opinions) for opinions in found] == [2, 1]
    assert [row_id for row_id, _, _ in engine.generated] == ["t/a/0", "t/a/1", "t/c/1"]
    assert "<chunk> 5" not in engine.generated[0][1] and "<chunk> 5" in engine.generated[1][1]
    p = [opinion.p_positive for opinions in found for opinion in opinions]
    np.testing.assert_allclose(p, 1 / (1 + np.exp([0, -1, -2])), rtol=1e-6)


def test_prefixes_of_a_solution_read_what_they_share_once(loaded, monkeypatch):
    """The first is read whole, of the others the last chunk and word, whichever are read together.
    The score reads prompt and chain."""
    chunk = "<chunk> 4 * 7 = 8 </chunk>"
    whole = Solution("a", "start 4 ; * 7 * 7 * 7 * 7 ?", [chunk] * 4)
    begun = dataclasses.replace(whole, chunks=[chunk] * 3)
    engines = [Engine(loaded.model, loaded.tokenizer, rows=[4], buckets=[128]) for _ in range(2)]
    judge, alone = (make_judge(loaded, engine, max_new_tokens=8) for engine in engines)
    scored, log_odds = [], engines[0].log_odds

    def scoring(prompts, pair):
        scored.extend(map(len, prompts))
        return log_odds(prompts, pair)

    monkeypatch.setattr(engines[0], "log_odds", scoring)
    (first,) = judge([begun])
    (second,) = judge([dataclasses.replace(whole, start=3)])
    read = [x.read_tokens - n for x, n in zip(first + second, scored, strict=True)]
    shortest = dataclasses.replace(whole, chunks=[chunk])
    assert read == [len(judge.prompt_ids(shortest)), *[len(chunk.split()) + 1] * 3]
    assert engines[0].usage.spent.read == sum(x.read_tokens for x in first + second)
    for start, found in enumerate(first + second):
        ((expected,),) = alone(
            [dataclasses.replace(whole, chunks=[chunk] * (start + 1), start=start)]
        )
        assert (found.completion, found.verdict) == (expected.completion, expected.verdict)
        assert found.spent == expected.spent
        assert found.p_positive == pytest.approx(expected.p_positive, abs=1e-5)
        alone.writer.cache.by_length.clear()
    (again,) = judge([begun])
    assert again == first, "a block that begins has nothing of the one before"


def test_votes_on_a_prefix_are_averaged(loaded):
    engine = Scripted(loaded.tokenizer, ["looks fine \\boxed{ Positive }"] * 6)
    judge = make_judge(loaded, engine, votes=3, temperature=0.7, top_k=9)
    (opinions,) = judge(SOLUTIONS[:1])
    assert [row_id for row_id, _, _ in engine.generated] == [
        f"t/a/{j}/vote{k}" for j in range(2) for k in range(3)
    ]
    assert {(p.temperature, p.top_k) for _, _, p in engine.generated} == {(0.7, 9)}
    p = 1 / (1 + np.exp(-np.arange(6.0)))
    np.testing.assert_allclose([o.p_positive for o in opinions], p.reshape(2, 3).mean(1), rtol=1e-6)


def test_search_and_selection_may_ask_it():
    settings = {
        "path": "arithmetic",
        "prompt_style": "bare",
        "kind": "thinkprm",
        "rounds": 2,
        "sampling": {"max_new_tokens": 8},
        "votes": 2,
        "engine": {"rows": [8], "buckets": [128]},
    }
    judge = load_judge(ThinkPrmJudge.model_validate(settings), mesh=make_mesh(), seed=0)
    assert isinstance(judge, ThinkPrmVerifier) and (judge.rounds, judge.writer.votes) == (2, 2)
    judge.check_room("a", SOLUTIONS[0].question, 20)
    judge.check_lengths(SOLUTIONS)
    found = judge([dataclasses.replace(SOLUTIONS[0], start=1), SOLUTIONS[1]])
    assert [len(opinions) for opinions in found] == [1, 1] and judge.compiled_shapes
    assert all(0 < opinion.p_positive < 1 for (opinion,) in found)
    with pytest.raises(ValidationError, match="prompt_style"):
        ThinkPrmJudge.model_validate(settings | {"prompt_style": "verdict"})


def test_the_forced_question_against_the_full_forward(loaded):
    """P(yes) by hand: the text with the answer, one pass, a softmax over two tokens."""
    engine = Engine(loaded.model, loaded.tokenizer, rows=(4,), buckets=(96, 128))
    judge = make_judge(loaded, engine, rounds=2)
    judge.check_lengths(SOLUTIONS)
    model, encode = (
        load_model("arithmetic", mesh=make_mesh(), seed=1).model,
        loaded.tokenizer.encode,
    )
    for prompt, (found,) in zip(
        PROMPTS, judge.sample(SOLUTIONS, ("",), temperature=1.0), strict=True
    ):
        text = f"{prompt} {found.whole.completion}".removeprefix("<bos> ")
        ids = [loaded.tokenizer.bos_id, *encode(text)]
        answers = [encode("Positive")[0], encode("Negative")[0]]
        assert ids[-1] == answers[found.whole.p_positive < 0.5]
        assert ids[-2] == encode("<judge>")[0] and encode("fix")[0] in ids
        logits = np.asarray(model(np.array([ids[:-1]])))[0, -1][answers]
        expected = np.exp(logits[0]) / np.exp(logits).sum()
        assert found.whole.p_positive == pytest.approx(expected, abs=1e-5)
        assert expected != pytest.approx(0.5, abs=1e-3)


def test_no_text_exceeds_the_room_that_was_checked(loaded):
    """A sampled text that grows when it is written again is cut before the question."""
    engine = Scripted(loaded.tokenizer, ["1"])
    judge = make_judge(loaded, engine, max_new_tokens=4)
    thought = " ".join("123456789")
    judge._judge_solutions([Chain("r", judge.prompt_ids(SOLUTIONS[1]), [], 1, [thought], thought)])
    (asked,) = engine.asked
    assert asked == f"{PROMPTS[1]} 1 2 3 4 5 <judge>"
    real = Engine(loaded.model, loaded.tokenizer, rows=(4,), buckets=(96,))
    length = len(loaded.tokenizer.encode(asked))
    assert length <= len(judge.prompt_ids(SOLUTIONS[1])) + judge._room(1)
    with pytest.raises(UserError, match=r"a: prompt of 20 tokens .* exceeds the context of 96"):
        make_judge(loaded, real, max_new_tokens=80).check_lengths(SOLUTIONS[:1])
    make_judge(loaded, real).check_room("p", "start 4 ; * 7 + 5 ?", 40)
    with pytest.raises(UserError, match="the judge of p, with a solution of 60 tokens: prompt"):
        make_judge(loaded, real).check_room("p", "start 4 ; * 7 + 5 ?", 60)


def test_answers_are_one_token_each(word_tokenizer, bpe_tokenizer):
    yes, no = answer_ids(word_tokenizer, BARE)
    assert (word_tokenizer.decode([yes]), word_tokenizer.decode([no])) == ("Positive", "Negative")
    with pytest.raises(UserError, match="expected a vocabulary that has both"):
        answer_ids(word_tokenizer, INSTRUCT)


def test_released_checkpoints_can_be_asked_their_own_way(bpe_directory, tmp_path):
    """The question without </think>, yes and no in lower case, no numbers before the steps."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(bpe_directory)
    theirs.add_tokens(["yes", "no", "Yes", "No"])
    theirs.save_pretrained(tmp_path)
    prompts = {
        "thinkprm_verify": "Verify.\n{question}\n{steps}",
        "thinkprm_step": "{step}",
        "thinkprm_opening": "\nStep by step:",
        "thinkprm_question": "\nIs it correct, after all? ",
        "thinkprm_yes": "yes",
        "thinkprm_no": "no",
        "thinkprm_round_2": "\nHm.\n",
    }
    tokenizer = load_tokenizer(str(tmp_path), prompts=prompts)
    texts = ["\nStep 1: Fine. The step is \\boxed{correct}\n</think>", "So it is."]
    engine = Scripted(tokenizer, texts)
    pairs = []
    engine.log_odds = lambda asked, pair: pairs.append((asked, pair)) or np.array([1.0])
    loaded = Loaded(None, tokenizer, "fake")
    writer = Writer(loaded, engine, Sampling(max_new_tokens=99), "instruct", seed=0, name="t")
    judge = ThinkPrmVerifier(writer, rounds=2)
    solution = Solution("a", "What?", ["<chunk>Step 1: It is 4.</chunk>", "So 4."])
    ((found,),) = judge.sample([solution], [""], temperature=0.0)
    asked = (
        "<|im_start|>user\nVerify.\nWhat?\nIt is 4.\nSo 4.<|im_end|>\n<|im_start|>assistant\n"
        "\nStep by step:"
    )
    chain = "Step 1: Fine. The step is \\boxed{correct}\nHm.\nSo it is."
    (((ids,), pair),) = pairs
    assert tokenizer.decode(ids) == f"{asked}{chain}\nIs it correct, after all? "
    assert pair == tuple(tokenizer._hf.convert_tokens_to_ids(["yes", "no"]))
    assert [prompt for _, prompt, _ in engine.generated] == [
        asked,
        f"{asked}{chain.removesuffix('So it is.')}",
    ]
    stops = {params.stop_strings for _, _, params in engine.generated}
    assert stops == {("Is it correct, after all?", "</think>")}
    assert found.whole.completion.endswith("So it is.\nIs it correct, after all? yes")
    silent = load_tokenizer(str(tmp_path), prompts={"thinkprm_question": " "})
    with pytest.raises(UserError, match="expected a question in the prompt thinkprm_question"):
        form_of("instruct", silent.prompts)
