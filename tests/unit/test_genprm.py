"""GenPRM: the form of its conversations, which critiques are kept, and code that is run on the
way."""

import dataclasses
import random
import tempfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from landlock import needs_landlock
from stepwiser_jax.config import DataSource, Sampling
from stepwiser_jax.config_files import load_config
from stepwiser_jax.data.demonstrations import encode_demonstration, load_demonstrations
from stepwiser_jax.data.rationales import RationaleOutcome
from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import Completion, StopReason
from stepwiser_jax.judges.base import ChunkJudgment, Solution
from stepwiser_jax.judges.genprm.form import (
    BARE,
    CODE_OUTPUT,
    FORMS,
    INSTRUCT,
    SYNTHESIS_OPENING,
    agrees,
    analysis_of,
    code_to_run,
    conversation,
    critique_outcome,
    form_of,
    join_turns,
    output_text,
    parse_critique,
    parse_turns,
    rethink_prompt,
    split_outputs,
    with_memory,
)
from stepwiser_jax.judges.genprm.judge import GenPrmCritic, Synthesizer, verdict_ids
from stepwiser_jax.judges.writer import Writer
from stepwiser_jax.model.flops import Spent
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.records import ClassifierExample, Dialogue, Problem, SftExample, Verdict
from stepwiser_jax.sandbox.runner import Sandbox
from stepwiser_jax.search.refinement import Refiner
from stepwiser_jax.stages import rejection_sample
from stepwiser_jax.stages.refine import summarize
from stepwiser_jax.tasks.mathematics import extract_answer
from stepwiser_jax.text.dialogues import encode_dialogue
from stepwiser_jax.text.templates import OURS
from stepwiser_jax.text.tokenizer import load_tokenizer
from tiny import tiny_config


def example(num_chunks, labels):
    """`labels`: one for every chunk, None where there is none."""
    labelled = tuple(t for t, label in enumerate(labels) if label is not None)
    positive = tuple(labels[t] for t in labelled)
    chunks = tuple(f"Step {t} of it." for t in range(num_chunks))
    return ClassifierExample(
        "s", "p", "How many?", chunks, labelled, positive, tuple(map(float, positive))
    )


# --- critiques ----------------------------------------------------------------------------------


def verification(rng):
    """What stands in <verify>: code with and without output, and text."""
    parts = []
    for _ in range(rng.randrange(3)):
        parts.append(f"```python\nprint({rng.randrange(99)})\n```\n{CODE_OUTPUT}")
        parts.append(output_text(rng.choice(["42", "", "two\nlines", "a ``` fence", "`` \\d"])))
        parts.append(rng.choice(["So it is.\n", "\nNo:\n\nthink again.\n"]))
    return "".join(parts)


def written_in_one_go(sections, boxed):
    text = "".join(
        f"### Paragraph {t}\n<analyze>\n{analysis}\n</analyze>\n"
        + (f"<verify>\n{check}</verify>\n\n" if check else "\n")
        for t, (analysis, check) in enumerate(sections, 1)
    )
    assert text.startswith(SYNTHESIS_OPENING)
    return f"{text}The first wrong one: \\boxed{{{boxed}}}."


def undone(dialogue):
    """(analysis, verification, verdict) of every assistant's turn, by other means."""
    text = "".join(
        f"|{role}|{text}" if role in ("system", "user") else text
        for role, text in zip(dialogue.roles, dialogue.texts, strict=True)
    )
    found = []
    for turn in text.split("|user|")[1:]:
        _, _, rest = turn.partition("step by step: ")
        analysis, _, rest = rest.partition("</analyze>\n")
        check, _, judged = rest.rpartition("<output>\n")
        check = check.removeprefix("<verify>\nLet's use python code to find any potential error:\n")
        found.append((analysis, check.removesuffix("</verify>\n"), judged))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_a_critique_in_one_go_becomes_the_conversation_that_says_the_same(seed):
    rng = random.Random(seed)
    num_chunks = rng.randrange(1, 6)
    wrong = rng.choice([-1, *range(num_chunks)])
    count = num_chunks if wrong == -1 else rng.randrange(wrong + 1, num_chunks + 1)
    sections = [(f"It says {rng.random()}.\nRight?", verification(rng)) for _ in range(count)]
    text = written_in_one_go(sections, -1 if wrong == -1 else wrong + 1)
    critique = parse_critique(text, num_chunks)
    assert critique is not None and critique.first_wrong == wrong
    of = example(num_chunks, [True] * num_chunks)
    roles, texts = conversation(of.question, of.chunks, critique.turns, INSTRUCT)
    dialogue = Dialogue("d", "p", roles, texts)
    kept = sections if wrong == -1 else sections[: wrong + 1]
    words = ["No" if t == wrong else "Yes" for t in range(len(kept))]
    verdicts = [f"**Judgement**: $\\boxed{{{word}}}$\n</output>\n" for word in words]
    assert undone(dialogue) == [(*s, v) for s, v in zip(kept, verdicts, strict=True)]
    asked = [x for r, x in zip(dialogue.roles, dialogue.texts, strict=True) if r == "user"]
    assert asked == [f"How many?\n{of.chunks[0]}", *of.chunks[1:]][: len(kept)]
    printed = [x for r, x in zip(dialogue.roles, dialogue.texts, strict=True) if r == "output"]
    assert len(printed) == sum(check.count(CODE_OUTPUT) for _, check in kept)


@pytest.mark.parametrize(
    ("text", "num_chunks"),
    [
        ("", 1),
        ("All is right: \\boxed{-1}", 1),
        (written_in_one_go([("fine", "")], "-1"), 2),  # silent about the second
        (written_in_one_go([("fine", "")], "2"), 2),
        (written_in_one_go([("fine", "")], "0"), 1),  # counted from 1
        (written_in_one_go([("fine", "")], "-2"), 1),
        (written_in_one_go([("fine", "")], "-1") + " No, it is \\boxed{", 1),
        (written_in_one_go([("fine", "")], "-1") + " No, it is \\boxed{none}", 1),
        (written_in_one_go([("fine", "")] * 3, "3"), 2),
        (written_in_one_go([("fine", "")], "-1").replace("</analyze>", ""), 1),
        (written_in_one_go([("is it \\boxed{-1}?", "")], "-1").replace("one: \\boxed", ""), 1),
        (written_in_one_go([("fine", "")] * 2, "-1").replace("Paragraph 2", "Paragraph 3"), 2),
        # said of the first, and in none of its tags
        (written_in_one_go([("a", "b")] * 2, "-1").replace("</verify>", "</verify>\nBut!", 1), 2),
        (written_in_one_go([("a", "")] * 2, "-1").replace("</analyze>", "</analyze> But!", 1), 2),
        (written_in_one_go([("a", "b")] * 2, "-1").replace("<verify>", "But!\n<verify>", 1), 2),
        (written_in_one_go([("a", "")] * 2, "-1").replace("2\n", "2\nBut!\n", 1), 2),
    ],
)
def test_a_critique_of_another_form_is_none(text, num_chunks):
    assert parse_critique(text, num_chunks) is None


def test_a_thought_may_be_repeated_in_the_answer():
    text = written_in_one_go([("fine", "check"), ("no", "")], "2")
    told, _, conclusion = text.rpartition("The first")
    expected = parse_critique(text, 2)
    assert expected is not None and expected.first_wrong == 1
    for answer in (f"The first{conclusion}", text, f"In short:\n{text}"):
        assert parse_critique(f"{told}</think>\n{answer}", 2) == expected
        assert parse_critique(f"{text}</think>\n{answer}", 2) == expected


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_turns_are_parsed_up_to_the_first_wrong_one(form):
    def turn(word):
        return f"some\n\n{form.gap}{form.stop}{form.lead}{word}"

    right, wrong, cut = turn(form.verdict(True)), turn(form.verdict(False)), turn("")
    for verdicts in product([right, wrong, cut], repeat=3):
        critique = parse_turns(join_turns(verdicts), form, 3)
        decisive = next((v for v in verdicts if v != right), right)
        if decisive == cut:
            assert critique is None
            continue
        assert critique is not None
        covered = verdicts.index(wrong) + 1 if decisive == wrong else 3
        assert critique.turns == verdicts[:covered]
        assert critique.first_wrong == (covered - 1 if decisive == wrong else -1)
    assert parse_turns(right, form, 2) is None


def test_without_code_none_is_promised_and_no_output_believed(request):
    config = request.config.rootpath / "configs" / "smoke_genprm_rationales.yaml"
    one, check = example(1, [True]), f"```python\nprint(1)\n```\n{CODE_OUTPUT}{output_text('1')}"
    told, plain = (written_in_one_go([("fine", part)], "-1") for part in (check, ""))
    for code_is_run in (True, False):
        sets = ("judge.prompt_style=instruct", "judge.turn_by_turn=false")
        sets += (f"judge.code_rounds={3 * code_is_run}",)
        settings = load_config("rejection-sample", config, sets).judge
        asked = rejection_sample.critiques(settings, OURS).prompt(one)
        assert (CODE_OUTPUT in asked, "<verify>" in asked) == (code_is_run, code_is_run)
        assert "</analyze>\n" in asked and "\n\nAt the end" in asked
        assert (
            rejection_sample.critique_of(settings, one, told, INSTRUCT) is not None
        ) is code_is_run
        assert rejection_sample.critique_of(settings, one, plain, INSTRUCT) is not None


def test_consensus_against_an_oracle():
    """A verdict says of every step whether it is right, up to the first wrong one; a label must say
    the same, and there must be one of the wrong step."""
    for labels in product([True, False, None], repeat=4):
        if labels == (None,) * 4:
            continue
        for first_wrong in range(-1, 4):
            says = [True] * (4 if first_wrong == -1 else first_wrong)
            says += [] if first_wrong == -1 else [False]
            expected = first_wrong == -1 or labels[first_wrong] is not None
            for said, label in zip(says, labels, strict=False):
                expected = expected and label in (None, said)
            of = example(4, labels)
            assert agrees(first_wrong, of) is expected, (labels, first_wrong)
    text = written_in_one_go([("fine", "")] * 2, "2")
    critique, of = parse_critique(text, 2), example(2, [True, False])
    assert critique_outcome(critique, True, of) is RationaleOutcome.KEPT
    assert critique_outcome(critique, False, of) is RationaleOutcome.UNFINISHED
    assert critique_outcome(None, True, of) is RationaleOutcome.UNPARSED
    assert critique_outcome(critique, True, example(2, [True, True])) is RationaleOutcome.DISAGREES


# --- conversations ------------------------------------------------------------------------------

SAID = [
    ("system", "You are a teacher."),
    ("user", "How many?\nStep 1."),
    ("assistant", "<analyze>\nLet's see: 2</analyze>\n[Code Output]"),
    ("output", "\n\n```\n2\n```\n"),
    ("assistant", " Right.\n</output>\n"),
    ("user", "Step 2."),
    ("assistant", "Wrong.\n"),
]


@pytest.mark.parametrize("style", ["instruct", "bare"])
def test_what_the_assistant_says_is_learned_and_nothing_else(bpe_tokenizer, style):
    roles, texts = zip(*SAID, strict=True)
    ids, learned = encode_demonstration(Dialogue("d", "p", roles, texts), bpe_tokenizer, style)
    end = bpe_tokenizer.decode(bpe_tokenizer.eos_ids)
    told = bpe_tokenizer.decode([i for i, x in zip(ids, learned, strict=True) if x])
    assert told == f"{texts[2]}{texts[4]}{end}{texts[6]}{end}"
    whole = bpe_tokenizer.decode(ids)
    assert "\n\n```\n2\n```\n Right." in whole
    if style == "instruct":
        messages = [
            {"role": "system", "content": texts[0]},
            {"role": "user", "content": texts[1]},
            {"role": "assistant", "content": "".join(texts[2:5])},
            {"role": "user", "content": texts[5]},
        ]
        assert whole == bpe_tokenizer.decode(bpe_tokenizer.render_chat(messages)) + texts[6] + end
    for n in range(2, len(SAID)):
        if roles[n] != "user" or style == "bare":
            start, _ = encode_dialogue(bpe_tokenizer, roles[:n], texts[:n], style)
            assert ids[: len(start)] == start, "inference reads what was learned"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ((), "found \\[\\]"),
        (("assistant",), "found \\['assistant'\\]"),
        (("user", "tool", "assistant"), "'tool'"),
        (("user", "assistant", "user"), "d: expected a conversation that ends with the assistant"),
    ],
)
def test_no_conversation(bpe_tokenizer, roles, message):
    with pytest.raises(UserError, match=message):
        encode_demonstration(Dialogue("d", "p", roles, roles), bpe_tokenizer, "bare")


@pytest.mark.parametrize("texts", [("asked",), ("asked", "said", "more")])
def test_a_text_too_many_or_too_few(bpe_tokenizer, texts):
    with pytest.raises(UserError, match=f"d: expected a text of .* found {len(texts)} texts of 2"):
        encode_demonstration(
            Dialogue("d", "p", ("user", "assistant"), texts), bpe_tokenizer, "instruct"
        )


def with_tokens(directory, tokens, template=None):
    """The tokenizer of a directory with more tokens, which are not special, and a template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(tokens)
    tokenizer.chat_template = template or tokenizer.chat_template
    with tempfile.TemporaryDirectory() as changed:
        tokenizer.save_pretrained(changed)
        return load_tokenizer(changed)


@pytest.fixture
def thinking_tokenizer(bpe_directory):
    """With a template as DeepSeek-R1's distilled models have it: it begins a thought for the
    assistant, and forgets those of earlier turns."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    return with_tokens(bpe_directory, ["<think>", "</think>"], template)


def test_a_thought_that_the_template_begins_is_no_part_of_a_conversation(
    thinking_tokenizer, bpe_tokenizer
):
    roles, texts = zip(*SAID, strict=True)
    for n in (2, len(SAID)):
        ids, learned = encode_dialogue(thinking_tokenizer, roles[:n], texts[:n], "instruct")
        expected = encode_dialogue(bpe_tokenizer, roles[:n], texts[:n], "instruct")
        assert (ids, learned) == expected


def test_a_thought_is_begun_once(thinking_tokenizer):
    """By the template where the answer does not, else by the answer, which learns to."""

    def rendered(answer):
        ids, learned = encode_demonstration(
            SftExample("e", "p", "How?", answer), thinking_tokenizer, "instruct"
        )
        told = [i for i, x in zip(ids, learned, strict=True) if x]
        return thinking_tokenizer.decode(ids), thinking_tokenizer.decode(told)

    whole, told = rendered("<think>\nWell.\n</think>\nSo.")
    assert whole.endswith("How?<|im_end|>\n<|im_start|>assistant\n" + told)
    assert told == "<think>\nWell.\n</think>\nSo.<|im_end|>"
    whole, told = rendered("So.")
    assert whole.endswith("<|im_start|>assistant\n<think>\nSo.<|im_end|>")


@pytest.mark.parametrize("style", ["instruct", "bare"])
def test_demonstrations_are_of_the_style_in_which_they_are_learned(style):
    (dialogue,) = load_demonstrations(DataSource(source="arithmetic-genprm", limit=1), style)
    assert dialogue.texts[-1].endswith(FORMS[style].ending)
    assert (INSTRUCT.system in dialogue.texts) == (style == "instruct")


def test_a_template_that_forgets_is_refused(bpe_tokenizer, monkeypatch):
    hf = bpe_tokenizer._hf
    monkeypatch.setattr(
        hf,
        "chat_template",
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}|{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}",
    )
    roles, texts = zip(*SAID[1:], strict=True)
    with pytest.raises(UserError, match="does not keep the beginning of a conversation"):
        encode_dialogue(bpe_tokenizer, roles, texts, "instruct")


def test_verdicts_are_one_token_each(word_tokenizer, bpe_tokenizer):
    yes, no = verdict_ids(word_tokenizer, BARE)
    assert word_tokenizer.decode([yes, no]).split() == ["Positive", "Negative"]
    with pytest.raises(UserError, match="a verdict is one token, Yes or No"):
        verdict_ids(bpe_tokenizer, INSTRUCT)


@pytest.fixture
def yes_no_tokenizer(bpe_directory):
    return with_tokens(bpe_directory, ["Yes", "No"])


def test_p_right_against_the_full_forward(yes_no_tokenizer):
    """By hand: the conversation up to the verdict's word, one pass, a softmax over Yes and No."""
    words = yes_no_tokenizer._hf.convert_tokens_to_ids(["Yes", "No"])
    assert verdict_ids(yes_no_tokenizer, INSTRUCT) == tuple(words)
    config = tiny_config(vocab_size=yes_no_tokenizer.vocab_size, max_length=1024)
    model = Transformer(config, rngs=nnx.Rngs(0))
    writer = Writer(
        Loaded(None, yes_no_tokenizer, "fake"),
        Engine(model, yes_no_tokenizer, rows=(2,), buckets=(512,)),
        Sampling(max_new_tokens=8),
        "instruct",
        seed=0,
        name="judge",
    )
    judge = GenPrmCritic(writer, code_rounds=0)
    question = "How many?"
    solutions = [Solution("s", question, ["It is 42."]), Solution("t", question, ["Or 43!"])]
    for solution, (opinion,) in zip(solutions, judge(solutions), strict=True):
        turn = opinion.completion.removesuffix(INSTRUCT.ending)
        word = words[opinion.p_positive < 0.5]
        assert turn.endswith(INSTRUCT.lead + ("Yes", "No")[opinion.p_positive < 0.5])
        asked = INSTRUCT.user_turn(question, solution.chunks, 0)
        ids, _ = encode_dialogue(
            yes_no_tokenizer,
            ["system", "user", "assistant"],
            [INSTRUCT.system, asked, turn],
            "instruct",
        )
        assert ids[-1] == word
        logits = np.asarray(model(np.array([ids[:-1]])))[0, -1][words]
        expected = np.exp(logits[0]) / np.exp(logits).sum()
        assert opinion.p_positive == pytest.approx(expected, abs=1e-5)
        assert expected != pytest.approx(0.5, abs=1e-3)


# --- code ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox()


@needs_landlock
def test_code_finds_what_earlier_blocks_left_and_nothing_of_what_they_printed(sandbox):
    earlier = ["x = 20\nprint('unseen')", "y = 1\nraise ValueError\ny = 2", "not python", "exit()"]
    runs = sandbox.run(
        [with_memory(earlier, "print(x + y)"), "print(x)", with_memory(earlier, "1 / 0")]
    )
    assert [run.output for run in runs] == [
        "21",
        "Code execute Error: NameError: name 'x' is not defined",
        "Code execute Error: ZeroDivisionError: division by zero",
    ]


def test_the_last_block_is_run():
    assert code_to_run("```python\na\n```\nthen\n```python\nb\nc\n```\nso") == "b\nc\n"
    assert code_to_run("```\na\n```") is None
    said = split_outputs(f"a{CODE_OUTPUT}{output_text('x ``` y')}b{CODE_OUTPUT}{output_text('')}")
    assert [role for role, _ in said] == ["assistant", "output"] * 2
    assert said[1][1] == "\n\n```\nx ''' y\n```\n"


class ScriptedEngine:
    """Says what `script` has for a row, cut after the first stop string and one character behind
    it, as a token may hold it; all verdicts are Yes with odds of 3 to 1."""

    def __init__(self, tokenizer, script, max_length=4000):
        self.tokenizer, self.script = tokenizer, script
        self.shapes = SimpleNamespace(max_length=max_length)
        self.prompts, self.asked, self.compiled_shapes = {}, [], {}
        self.lengths = {}

    def stream(self, trunks, params, *, key):
        for trunk in trunks:
            for fork in trunk.samples:
                assert fork.num_tokens == len(trunk.ids)
                assert fork.num_tokens + fork.max_new_tokens <= self.shapes.max_length
                self.prompts[fork.row_id] = self.tokenizer.decode(trunk.ids)
                self.lengths[fork.row_id] = len(trunk.ids)
                text, reason = self.script(fork.row_id), StopReason.STOP_ID
                ends = [text.index(s) + len(s) for s in params.stop_strings if s in text]
                if ends:
                    text, reason = text[: min(ends) + 1], StopReason.STOP_STRING
                ids = self.tokenizer.encode(text)
                if len(ids) > fork.max_new_tokens:
                    ids, reason = ids[: fork.max_new_tokens], StopReason.LENGTH
                spent = Spent(len(ids), len(trunk.ids), 1.0)
                yield [
                    Completion(fork.row_id, np.array(ids), np.zeros(len(ids)), reason, spent=spent)
                ]

    def spent_on(self, *, read):
        return Spent(0, read, 0.25)

    def log_odds(self, prompts, pair):
        self.asked += [self.tokenizer.decode(prompt) for prompt in prompts]
        self.lengths |= {f"verdict {i}": len(prompt) for i, prompt in enumerate(prompts)}
        return np.full((len(prompts),), np.log(3.0), np.float32)

    def check_length(self, *arguments):
        pass


def code(block):
    return f"```python\n{block}\n```\n{CODE_OUTPUT}"


def judge_of(
    bpe_tokenizer, monkeypatch, script, *, max_length=4000, max_new_tokens=999, code_rounds=3
):
    monkeypatch.setattr(
        "stepwiser_jax.judges.genprm.judge.verdict_ids", lambda tokenizer, form: (1, 2)
    )
    engine = ScriptedEngine(bpe_tokenizer, script, max_length)
    writer = writer_of(bpe_tokenizer, engine, "judge", max_new_tokens)
    return GenPrmCritic(writer, code_rounds=code_rounds)


def writer_of(tokenizer, engine, name, max_new_tokens):
    loaded, sampling = Loaded(None, tokenizer, "fake"), Sampling(max_new_tokens=max_new_tokens)
    return Writer(loaded, engine, sampling, "instruct", seed=0, name=name)


SOLUTION = Solution("s", "How many?", ["It is 42.", "And one more: 43."])


@needs_landlock
def test_code_is_run_fed_back_and_remembered(bpe_tokenizer, monkeypatch):
    says = {
        "judge/s/0/0": f" let me see.</analyze>\n<verify>\n{code('x = 6 * 7; print(x)')}\n41",
        "judge/s/0/1": " It is.</verify>\n<output>\nNo",
        "judge/s/1/0": f" one more.</analyze>\n<verify>\n{code('print(x + 1)')}",
        "judge/s/1/1": f" And now:\n{code('y = 1; raise ValueError(x)')}",
        "judge/s/1/2": f" Once more:\n{code('print(y)')}",
        "judge/s/1/3": " Good.",
    }
    judge = judge_of(bpe_tokenizer, monkeypatch, says.__getitem__)
    ((first, second),) = judge([SOLUTION])
    assert first.completion == (
        "<analyze>\nLet's analyze the Paragraph 1 step by step: let me see.</analyze>\n<verify>\n"
        "```python\nx = 6 * 7; print(x)\n```\n[Code Output]\n\n```\n42\n```\n It is.</verify>\n"
        "<output>\n**Judgement**: $\\boxed{Yes}$\n</output>\n"
    )
    printed = [text for role, text in split_outputs(second.completion) if role == "output"]
    assert printed == [*map(output_text, ["43", "Code execute Error: ValueError: 42", "1"])]
    assert second.completion.endswith(
        " Good.</verify>\n<output>\n**Judgement**: $\\boxed{Yes}$\n</output>\n"
    ), "what is open is closed"
    assert judge.turns.measured == {"code_runs": 4, "code_failures": {"error": 1}}
    assert (first.verdict, first.p_positive) == (Verdict.POSITIVE, pytest.approx(0.75))
    assert first.completion in judge.writer.engine.prompts["judge/s/1/0"], (
        "its own rationale is history"
    )
    assert all(prompt.endswith("$\\boxed{") for prompt in judge.writer.engine.asked)
    sampled = [says["judge/s/0/0"][:-2], says["judge/s/0/1"][:-2]]
    assert first.num_tokens == sum(len(bpe_tokenizer.encode(text)) for text in sampled)
    lengths = judge.writer.engine.lengths
    fed = ("judge/s/1/0", "judge/s/1/1", "judge/s/1/2", "judge/s/1/3", "verdict 0")
    assert second.read_tokens == sum(lengths[name] for name in fed), "of the last turn"
    assert (first.flops, second.flops) == (2 + 0.25, 4 + 0.25)


REFERENCE = {
    "genprm_system": "Criticise.",
    "genprm_opening": "<analyze>\nParagraph {number}: ",
    "genprm_after_analysis": "\n<verify>\nWith code:\n```python\n",
    "genprm_run_code": "\n```\n",
}
"""The way of the paper's released code, in other words."""


@needs_landlock
def test_a_block_of_code_can_be_forced(bpe_directory, monkeypatch):
    """By hand: the analysis up to its tag, the given text, the block up to its fence, its output,
    and so on; a turn without the tag is given nothing. The rows are told apart."""
    tokenizer = load_tokenizer(bpe_directory, prompts=REFERENCE)
    says = {
        "judge/s/0/analysis": "it is 42.</analyze>\nno more",
        "judge/s/0/0": "x = 6 * 7\nprint(x)\n```\nno more",
        "judge/s/0/1": "Again:\n```python\nprint(x + 1)\n```\n",
        "judge/s/0/2": "It is.</verify>\n<output>\nNo",
        "judge/s/1/analysis": "one more.",
    }
    judge = judge_of(tokenizer, monkeypatch, says.__getitem__)
    ((first, second),) = judge([SOLUTION])
    assert first.completion == (
        "<analyze>\nParagraph 1: it is 42.</analyze>\n<verify>\nWith code:\n"
        "```python\nx = 6 * 7\nprint(x)\n```\n[Code Output]\n\n```\n42\n```\n"
        "Again:\n```python\nprint(x + 1)\n```\n[Code Output]\n\n```\n43\n```\n"
        "It is.</verify>\n<output>\n**Judgement**: $\\boxed{Yes}$\n</output>\n"
    )
    assert second.completion.startswith("<analyze>\nParagraph 2: one more.</analyze>\n<output>")
    prompts = judge.writer.engine.prompts
    assert set(prompts) == set(says)
    assert prompts["judge/s/0/analysis"] == (
        "<|im_start|>system\nCriticise.<|im_end|>\n"
        "<|im_start|>user\nHow many?\nIt is 42.<|im_end|>\n"
        "<|im_start|>assistant\n<analyze>\nParagraph 1: "
    )
    sampled = ["it is 42.</analyze>", "x = 6 * 7\nprint(x)\n```\n", says["judge/s/0/1"]]
    sampled.append(says["judge/s/0/2"][:-2])
    assert [code_to_run(first.completion), judge.turns.code_runs] == ["print(x + 1)\n", 2]
    least = sum(len(tokenizer.encode(text)) for text in sampled)
    assert least <= first.num_tokens <= least + 3, "what is given is not counted"


def test_a_verdict_can_be_asked_for_after_the_analysis(bpe_directory, monkeypatch):
    prompts = REFERENCE | {"genprm_after_analysis": "\n<output>"}
    tokenizer = load_tokenizer(bpe_directory, prompts=prompts)
    judge = judge_of(tokenizer, monkeypatch, lambda row: "fine.</analyze>\n", code_rounds=0)
    ((first, _),) = judge([SOLUTION])
    assert first.completion == (
        "<analyze>\nParagraph 1: fine.</analyze>\n<output>\n"
        "**Judgement**: $\\boxed{Yes}$\n</output>\n"
    )
    assert set(judge.writer.engine.prompts) == {"judge/s/0/analysis", "judge/s/1/analysis"}


def test_a_critique_becomes_turns_with_these_prompts(bpe_directory):
    """So that training and judging begin a turn alike."""
    form = form_of("instruct", load_tokenizer(bpe_directory, prompts=REFERENCE).prompts)
    critique = parse_critique(written_in_one_go([("fine", ""), ("bad", "")], "2"), 2, form)
    roles, texts = conversation("How many?", ["It is 42.", "Or 43."], critique.turns, form)
    assert (roles[0], texts[0]) == ("system", "Criticise.")
    assert texts[2].startswith("<analyze>\nParagraph 1: fine</analyze>")
    assert texts[4].startswith("<analyze>\nParagraph 2: bad</analyze>")
    assert analysis_of(texts[4], 1, form) == "bad"


@needs_landlock
def test_code_is_run_no_more_often_than_it_may(bpe_tokenizer, monkeypatch):
    judge = judge_of(bpe_tokenizer, monkeypatch, lambda _: code("print(1)"), code_rounds=2)
    ((first, _),) = judge([SOLUTION])
    assert first.completion.count(CODE_OUTPUT) == 3 and first.completion.count("```\n1\n```") == 2
    assert first.verdict is Verdict.POSITIVE
    assert judge.turns.code_runs == 4


@needs_landlock
def test_paths_keep_their_own_rationales_and_one_may_ask_for_code(bpe_tokenizer, monkeypatch):
    def says(row):
        _, _, step, number, path = row.split("/")
        if (step, number, path) == ("0", "0", "a"):
            return f" {code('print(11)')}"
        return f" said by {path} of {step}.</analyze>\n<output>"

    judge = judge_of(bpe_tokenizer, monkeypatch, says)
    late = Solution("t", "Which?", ["One.", "Two.", "Three."], start=2)
    found = judge.sample([SOLUTION, late], ["/a", "/b"], temperature=0.6)
    assert [[len(path.chunks) for path in paths] for paths in found] == [[2, 2], [1, 1]]
    prompts = judge.writer.engine.prompts
    assert "said by b of 0" in prompts["judge/s/1/0/b"]
    assert "said by a" not in prompts["judge/s/1/0/b"]
    assert "```\n11\n```" in prompts["judge/s/0/1/a"] and "judge/s/0/1/b" not in prompts
    assert "said by a of 1" in prompts["judge/t/2/0/a"]


@needs_landlock
def test_a_conversation_that_outgrows_the_context_has_no_verdict(bpe_tokenizer, monkeypatch):
    """And what fits beside it is judged; a turn that is cut is closed and judged."""
    long = Solution("long", "How many?", ["One.", "x" * 3000, "Three."])
    says = lambda row: " fine " * 40  # noqa: E731
    judge = judge_of(bpe_tokenizer, monkeypatch, says, max_length=1500, max_new_tokens=100)
    judge.check_lengths([SOLUTION, long])
    (two, three) = judge([SOLUTION, long])
    assert [opinion.p_positive for opinion in two] == [pytest.approx(0.75)] * 2
    assert [opinion.num_tokens for opinion in two] == [100, 100]
    assert "</analyze>\n<output>" in two[0].completion
    assert [opinion.p_positive for opinion in three] == [pytest.approx(0.75), 0.5, 0.5]
    assert [opinion.verdict for opinion in three[1:]] == [Verdict.UNPARSED] * 2
    prompt = bpe_tokenizer._encode(judge.writer.engine.prompts["judge/s/0/0"])
    full = len(prompt) + judge.reserve + 5
    judge = judge_of(bpe_tokenizer, monkeypatch, says, max_length=full, max_new_tokens=100)
    ((first, second),) = judge([SOLUTION])
    assert (first.p_positive, first.num_tokens) == (pytest.approx(0.75), 5), "room for a verdict"
    assert second.p_positive == 0.5
    judge = judge_of(bpe_tokenizer, monkeypatch, says, max_length=1500)
    with pytest.raises(UserError, match="no solution's first step fits the context of 1500"):
        judge.check_lengths([Solution("longer", "x" * 3000, ["One."])])


@needs_landlock
@pytest.mark.parametrize(
    ("says", "finished"),
    [
        (" fine.</analyze>\n<output>", True),
        (" fine.</analyze>", True),  # an end token: tags are closed for it, nothing is cut off
        (" fine" * 200, False),
        (code("print(1)"), False),  # once more than it may
    ],
)
def test_a_critique_is_finished_whose_turns_came_to_their_end(
    bpe_tokenizer, monkeypatch, says, finished
):
    """And it ends with the first wrong paragraph: nothing is written behind that."""

    def script(row):
        return says if row.split("/")[2] == "1" else " so.</analyze>\n<output>"

    judge = judge_of(bpe_tokenizer, monkeypatch, script, max_new_tokens=300, code_rounds=1)
    monkeypatch.setattr(judge.writer.engine, "log_odds", second_is_wrong(bpe_tokenizer))
    three = Solution("s", "How many?", ["One.", "Two.", "Three."])
    (((text, came_to_its_end),),) = judge.critiques([three], ["/k"])
    assert came_to_its_end is finished
    critique = parse_turns(text, INSTRUCT, 3)
    assert critique is not None and critique.first_wrong == 1
    assert {row.split("/")[2] for row in judge.writer.engine.prompts} == {"0", "1"}


def second_is_wrong(tokenizer):
    def log_odds(prompts, pair):
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        odds = [-2.0 if "Paragraph 2" in text and "3 step" not in text else 2.0 for text in texts]
        return np.array(odds, np.float32)

    return log_odds


@needs_landlock
def test_a_turn_is_finished_whose_last_allowed_token_completes_it(bpe_tokenizer, monkeypatch):
    says = " fine.</analyze>\n<output>"
    length = len(bpe_tokenizer.encode(says))
    for allowed in (length - 1, length):
        judge = judge_of(bpe_tokenizer, monkeypatch, lambda _: says, max_new_tokens=allowed)
        (((_, finished),),) = judge.critiques([SOLUTION], [""])
        assert finished is (allowed == length)


@needs_landlock
def test_a_turn_that_the_context_cuts_is_not_finished(bpe_tokenizer, monkeypatch):
    says = lambda row: " fine " * 40  # noqa: E731
    judge = judge_of(bpe_tokenizer, monkeypatch, says, max_new_tokens=9999)
    one = Solution("s", "How many?", ["It is 42."])
    judge([one])
    prompt = bpe_tokenizer._encode(judge.writer.engine.prompts["judge/s/0/0"])
    full = len(prompt) + judge.reserve + 20
    judge = judge_of(bpe_tokenizer, monkeypatch, says, max_length=full, max_new_tokens=9999)
    (((text, finished),),) = judge.critiques([one], [""])
    assert parse_turns(text, INSTRUCT, 1) is not None and not finished


@needs_landlock
def test_a_teacher_writes_on_behind_its_code(bpe_tokenizer):
    says = {
        "t/s/0/k": f"fine\n</analyze>\n<verify>\n{code('z = 5')}",
        "t/s/1/k": f"</verify>\n### Paragraph 2\n<analyze>\nno\n</analyze>\n<verify>\n"
        f"{code('print(z)')}",
        "t/s/2/k": "</verify>\nSo \\boxed{2}",
    }
    engine = ScriptedEngine(bpe_tokenizer, says.__getitem__)
    teacher = Synthesizer(writer_of(bpe_tokenizer, engine, "t", 500), code_rounds=1)
    (((text, finished),),) = teacher.critiques([SOLUTION], ["/k"])
    assert (
        finished and "<paragraph_2>\nAnd one more: 43.\n</paragraph_2>" in engine.prompts["t/s/0/k"]
    )
    critique = parse_critique(text, 2)
    assert critique is not None and critique.first_wrong == 1
    assert output_text("5") in critique.turns[1]


# --- thinking again -----------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["instruct", "bare"])
def test_the_analysis_is_what_stands_before_code_and_verdict(style):
    said = "Because 2 + 2: it is 5."
    turn = {
        "instruct": f"<analyze>\nLet's analyze the Paragraph 3 step by step: {said}</analyze>\n"
        f"<verify>\n{code('print(1)')}</verify>\n<output>\n**Judgement**: $\\boxed{{No}}$",
        "bare": f"{said} \\boxed{{ Negative }}",
    }[style]
    assert analysis_of(turn, 2, FORMS[style]) == said
    assert f"Step.\n\nThe reviewer says: {said}" in rethink_prompt("<chunk>Step.", said, "instruct")


VERIFIER = SimpleNamespace(
    verify=lambda completions, problems: [
        extract_answer(text) == problem.answer
        for text, problem in zip(completions, problems, strict=True)
    ],
    compares_meanings=False,
)


def refine_config(turns):
    file = Path(__file__).parents[2] / "configs" / "smoke_genprm_refine.yaml"
    sets = ("prompt_style=instruct", "chunking=blank_lines", f"turns={turns}")
    sets += ("sampling.max_new_tokens=200", "judge.prompt_style=instruct")
    return load_config("refine", file, sets)


class Critic:
    """A chunk that begins with Not is wrong; of one that begins with Hm it has no verdict."""

    form = dataclasses.replace(INSTRUCT, opening="It:")

    def __init__(self):
        self.judged = []

    def __call__(self, solutions):
        self.judged.append([solution.solution_id for solution in solutions])
        return [[self.opinion(chunk.strip()) for chunk in s.chunks] for s in solutions]

    def opinion(self, chunk):
        verdict, p = Verdict.POSITIVE, 0.8
        if chunk.startswith("Not"):
            verdict, p = Verdict.NEGATIVE, 0.2
        elif chunk.startswith("Hm"):
            verdict, p = Verdict.UNPARSED, 0.5
        return ChunkJudgment(f"It: {chunk}?</analyze>", verdict, p, 10, 100, 0.5)


def test_a_policy_thinks_again_until_nothing_is_wrong(bpe_tokenizer):
    """Right at once; right after one critique; never, and out of room at last."""
    config = refine_config(turns=3)
    right, wrong = "All well.\n\nSo \\boxed{4}.", "Well.\n\nNot well.\n\nSo \\boxed{5}."
    says = {"refine/a/policy0/0": right, "refine/b/policy0/0": wrong, "refine/b/policy1/0": right}
    engine = ScriptedEngine(bpe_tokenizer, lambda row: says.get(row, "Not well." + "?" * 90), 900)
    judge = Critic()
    problems = [Problem(name, f"What is {name}?", "4", "") for name in "abc"]
    refiner = Refiner(config, writer_of(bpe_tokenizer, engine, "refine", 200), judge)
    results = refiner(problems, VERIFIER)
    assert [r.search_id for r in results] == [f"{p}/turn{t}" for t in range(4) for p in "abc"]
    assert [r.is_correct for r in results] == [True, False, False] + [True, True, False] * 3
    assert judge.judged == [["a/turn0", "b/turn0", "c/turn0"], ["b/turn1", "c/turn1"], []]
    asked = engine.prompts["refine/b/policy1/0"]
    assert wrong in asked and "Not well.\n\nThe reviewer says: Not well.?" in asked
    assert "refine/a/policy1/0" not in engine.prompts
    of_b = [r for r in results if r.problem_id == "b"]
    assert [(r.accepted_tokens, r.rejected_tokens) for r in of_b][1:] == [
        (of_b[1].accepted_tokens, of_b[0].accepted_tokens)
    ] * 3
    assert [r.judge_tokens for r in of_b] == [0, 30, 50, 50]
    assert [r.judge_read_tokens for r in of_b] == [0, 300, 500, 500]
    fed = [engine.lengths[f"refine/b/policy{t}/0"] for t in (0, 1)]
    assert [r.policy_read_tokens for r in of_b] == [fed[0], *[sum(fed)] * 3]
    assert [r.policy_flops for r in of_b] == [1, 2, 2, 2]
    summary = summarize(config, results)
    assert summary["turn0"]["flops"] == 1
    assert [summary[f"turn{t}"]["accuracy"] for t in range(4)] == [1 / 3, 2 / 3, 2 / 3, 2 / 3]
    assert [summary[f"turn{t}"]["rethought"] for t in range(4)] == [0, 2, 0, 0]


def test_a_solution_is_replaced_where_a_whole_one_has_room(bpe_tokenizer):
    """Right first, and criticised: with one token less it stays, and nothing is spent on more."""
    first, second = "Hm.\n\nNot bad.\n\nSo \\boxed{4}.", "Well, " * 300
    says = {"refine/a/policy0/0": first, "refine/a/policy1/0": second}

    def refined(context):
        engine = ScriptedEngine(bpe_tokenizer, says.__getitem__, context)
        policy = writer_of(bpe_tokenizer, engine, "refine", 200)
        refiner = Refiner(refine_config(turns=1), policy, Critic())
        before, after = refiner([Problem("a", "What?", "4", "")], VERIFIER)
        assert before.completion == first and before.is_correct
        assert refiner.steps_without_verdict == 1
        return after, engine.prompts.get("refine/a/policy1/0")

    much, asked = refined(4000)
    needed = len(bpe_tokenizer._encode(asked)) + 200
    (enough, _), (little, _) = refined(needed), refined(needed - 1)
    assert much == enough and much.accepted_tokens == 200 and not much.is_correct
    assert (little.completion, little.is_correct, little.rejected_tokens) == (first, True, 0)


def test_a_problem_that_the_judge_has_no_room_for_is_refused(bpe_tokenizer, monkeypatch):
    judge = judge_of(bpe_tokenizer, monkeypatch, lambda row: "", max_length=1500)
    engine = ScriptedEngine(bpe_tokenizer, lambda row: "", 9000)
    policy = writer_of(bpe_tokenizer, engine, "refine", 200)
    refiner = Refiner(refine_config(turns=1), policy, judge)
    refiner.check_lengths([Problem("a", "What?", "4", "")])
    with pytest.raises(UserError, match="no solution's first step fits the context of 1500"):
        refiner.check_lengths([Problem("a", "What? " * 500, "4", "")])
