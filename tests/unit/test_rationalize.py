"""Offline judgments to learn from: which are kept."""

import numpy as np
import pytest

from stepwiser_jax.config_files import load_config
from stepwiser_jax.data.rationales import RationaleOutcome, judgment_outcome
from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.params import Completion, StopReason
from stepwiser_jax.judges.writer import Writer
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import ClassifierExample, JudgeExample, Rationale, SftExample
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.stages.rejection_sample import (
    choose,
    load_examples,
    rationales_of,
    summarize,
    task_of,
    to_learn,
    write_texts,
)
from stepwiser_jax.text.templates import OURS


@pytest.mark.parametrize(
    ("text", "finished", "is_positive", "outcome"),
    [
        (r"2 + 2 = 4. \boxed{Positive}", True, True, RationaleOutcome.KEPT),
        (r"2 + 2 = 5. \boxed{Negative}", True, False, RationaleOutcome.KEPT),
        (r"2 + 2 = 4. \boxed{Positive}", True, False, RationaleOutcome.DISAGREES),
        (r"2 + 2 = 5. \boxed{Negative}", True, True, RationaleOutcome.DISAGREES),
        ("It is right.", True, True, RationaleOutcome.UNPARSED),
        (r"\boxed{Positive}, or \boxed{Pos", True, True, RationaleOutcome.UNPARSED),
        (r"\boxed{Positive}, since it is \boxed{4}", True, True, RationaleOutcome.OTHER_BOX),
        (r"2 + 2 = 4. \boxed{Positive}", False, True, RationaleOutcome.UNFINISHED),
    ],
)
def test_a_judgment_is_kept_whose_verdict_is_the_label(text, finished, is_positive, outcome):
    assert judgment_outcome(text, finished, is_positive) is outcome


def rationales(*counts):
    """(label, outcome, how many)."""
    return [
        Rationale(f"{label}-{outcome}/{i}", "p", "asked", f"said {i}", label, outcome)
        for label, outcome, count in sorted(counts)
        for i in range(count)
    ]


def config(request, *sets):
    file = request.config.rootpath / "configs" / "smoke_rationales.yaml"
    return load_config("rejection-sample", file, sets)


def chosen_of(settings, written):
    return to_learn(settings, [], choose(settings, written), OURS)


def test_what_is_learned_is_kept_and_balanced(request):
    written = rationales((True, "kept", 7), (False, "kept", 3), (False, "disagrees", 5))
    everything = choose(config(request), written)
    assert everything == [rationale for rationale in written if rationale.outcome == "kept"]
    learned = to_learn(config(request), [], everything, OURS)
    assert [e.example_id for e in learned] == [r.rationale_id for r in everything]
    assert [e.completion for e in learned] == [r.completion for r in everything]
    assert {(e.prompt, e.problem_id) for e in learned} == {("asked", "p")}
    chosen = choose(config(request, "balance=true"), written)
    of_class = [rationale.is_positive for rationale in chosen]
    assert (sum(of_class), len(of_class)) == (3, 6)
    assert choose(config(request, "balance=true"), written) == chosen
    assert summarize(written)["rationales"] == {
        "kept": 10,
        "unfinished": 0,
        "unparsed": 0,
        "other_box": 0,
        "disagrees": 5,
        "too_long": 0,
        "repeated": 0,
    }
    assert summarize(written)["kept_positive_share"] == 0.7


def test_the_limit_counts_what_exclusions_leave(request, tmp_path):
    examples = [JudgeExample(f"{q}/0", q, q, "", "so 3", True) for q in "abcd"]
    write_records(tmp_path / "examples.jsonl", examples)
    (tmp_path / "held_out.json").write_text('[{"problem": "a"}, {"problem": "c"}]')
    exclude = f"examples.exclude=[{tmp_path / 'held_out.json'}]"
    source = f"examples.source={tmp_path / 'examples.jsonl'}"
    settings = config(request, source, exclude, "examples.limit=2")
    left, dropped = load_examples(settings)
    assert [e.question for e in left] == ["b", "d"]
    assert dropped == {"excluded": 2}


def test_nothing_to_learn_is_refused(request):
    written = rationales((True, "kept", 7), (False, "disagrees", 5))
    assert len(chosen_of(config(request), written)) == 7
    with pytest.raises(UserError, match="kept were 7 of positive and 0 of negative labels"):
        chosen_of(config(request, "balance=true"), written)


def test_where_nothing_was_chosen_yet_the_choice_may_change(request, tmp_path):
    """Of the run directory that the error leaves behind."""
    directory = RunDirectory(tmp_path / "run", "rejection-sample", config(request, "balance=true"))
    directory.writer(Rationale).append(rationales((True, "kept", 7)))
    directory.writer(SftExample).append([])
    RunDirectory(tmp_path / "run", "rejection-sample", config(request, "max_examples=3"))
    with pytest.raises(UserError, match="another config, which differs in samples: 4 -> 5"):
        RunDirectory(tmp_path / "run", "rejection-sample", config(request, "samples=5"))
    directory.writer(SftExample).append([SftExample("a", "p", "asked", "said")])
    RunDirectory(tmp_path / "run", "rejection-sample", config(request, "balance=true"))
    with pytest.raises(UserError, match="differs in balance: True -> False"):
        RunDirectory(tmp_path / "run", "rejection-sample", config(request))


def test_of_what_is_kept_so_many_are_drawn(request):
    written = rationales((True, "kept", 40), (False, "kept", 30))
    settings = config(request, "balance=true", "max_examples=20")
    chosen = chosen_of(settings, written)
    order = [r.rationale_id for r in written]
    places = [order.index(e.example_id) for e in chosen]
    assert len(places) == 20 and places == sorted(set(places))
    assert 0 < sum(e.example_id.startswith("True") for e in chosen) < 20
    assert chosen_of(settings, written) == chosen
    assert len(chosen_of(config(request, "max_examples=100"), written)) == 70
    for shuffled in (written[::-1], written[1::2] + written[::2]):
        assert chosen_of(settings, shuffled) == chosen, "it depends on who wrote which part"


# --- verification chains ------------------------------------------------------------------------


class Scripted:
    """An engine that writes these texts, and a tokenizer of characters, with which it does."""

    eos_ids, bos_id, prompts = (0,), None, OURS

    def __init__(self, texts):
        self.texts = texts

    def encode(self, text):
        return [ord(char) for char in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def render_chat(self, messages):
        return self.encode(messages[0]["content"])

    def generate(self, prompts, params, *, key, row_ids, group_size, cache):
        self.prompts, self.params = [self.decode(ids) for ids in prompts], params
        completions = []
        for b, text in enumerate(self.texts):
            ids = self.encode(text)
            logprobs = np.zeros(len(ids))
            completions.append(Completion(row_ids[b], np.array(ids), logprobs, StopReason.STOP_ID))
        return completions


def test_chains_are_cut_filtered_and_learned_with_the_answer(request):
    settings = load_config(
        "rejection-sample",
        request.config.rootpath / "configs" / "smoke_thinkprm_chains.yaml",
        (
            "judge.prompt_style=instruct",
            "samples=4",
            "judge.max_tokens=200",
            "judge.sampling.max_new_tokens=300",
        ),
    )
    first, second = "Step 1: a. The step is ", "\nStep 2: b. The step is "
    good, bad = "\\boxed{correct}", "\\boxed{incorrect}"
    wrong = [
        first + "\\boxed{\\text{correct}}" + second + bad + ".\n</think>",
        first + good + second + bad + "\nStep 3: \\boxed{correct}",  # there is no step 3
        first + bad,
        "Step 1: " + "a" * 199 + good + second + bad,
    ]
    right = [first + good + second + good + " So all is well.", first + good, "", "Yes"]
    scripted = Scripted(wrong + right)
    block = [
        ClassifierExample("w", "p", "1?", ("x", "y"), (0, 1), (True, False), (1.0, 0.0)),
        ClassifierExample("r", "p", "1?", ("x", "y", "z"), (0, 1), (True, True), (1.0, 1.0)),
    ]
    judge, loaded = settings.judge, Loaded(None, scripted, "fake")
    writer = Writer(loaded, scripted, judge.sampling, "instruct", seed=0, name="rationalize")
    task = task_of(judge, scripted)
    texts = write_texts(writer, task, block, [f"/{k}" for k in range(4)])
    written = rationales_of(task, block, texts)
    opening = "<think>\nLet's verify step by step:\n"
    assert all(prompt.endswith(opening) for prompt in scripted.prompts)
    assert "Step 2: y\n" in scripted.prompts[1] and "Step 3" not in scripted.prompts[1]
    assert scripted.params.stop_strings == ("Is the solution correct?", "</think>")
    assert [r.outcome for r in written] == [
        *("kept", "repeated", "disagrees", "too_long"),
        *("kept", "unparsed", "unparsed", "unparsed"),
    ]
    assert [r.is_positive for r in written] == [False] * 4 + [True] * 4
    assert written[0].completion == first + good + second + bad
    assert written[2].completion == wrong[2]
    learned = [(e.example_id, e.completion) for e in chosen_of(settings, written)]
    end = "\n</think>\nIs the solution correct? "
    assert learned == [
        ("r/0", f"{opening}{first}{good}{second}{good}{end}Yes"),
        ("w/0", f"{opening}{first}{good}{second}{bad}{end}No"),
    ]
