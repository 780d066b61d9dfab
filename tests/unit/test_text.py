"""Tokenizers, prompts, verdicts and answers."""

import os
import signal
import time

import pytest

from stepwiser_jax.records import UserError, Verdict
from stepwiser_jax.text import answers
from stepwiser_jax.text.answers import AnswerVerifier, extract_answer, is_equivalent, is_verifiable
from stepwiser_jax.text.prompts import (
    encode_judge_prompt,
    encode_solve_prompt,
    is_bare_verdict,
    parse_verdict,
    render_judge_prompt,
)
from stepwiser_jax.text.tokenizer import completion_text, load_tokenizer

TEXTS = ["a step of thought", "naïve → 3²\n\n</chunk>\n", "  two  spaces ", "<chunk>x</chunk>"]


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_spell_the_text(bpe_tokenizer, text):
    ids = bpe_tokenizer.encode(text)
    assert bpe_tokenizer.decode(ids) == text
    spelled = bpe_tokenizer.token_bytes()
    assert b"".join(spelled[i] for i in ids).decode() == text


def test_word_level_bytes_have_one_leading_space(word_tokenizer):
    text = "start 4 ; * 7 + 5 ?"
    ids = word_tokenizer.encode(text)
    assert word_tokenizer.decode(ids) == text
    spelled = word_tokenizer.token_bytes()
    assert b"".join(spelled[i] for i in ids).decode() == " " + text


def test_sentencepiece_style_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "\u2581a", "b", "<0x0A>", "\u2581"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    spelled = load_tokenizer(str(tmp_path)).token_bytes()
    assert spelled[2:] == [b" a", b"b", b"\n", b" "]


def test_saved_tokenizer_is_the_same(bpe_tokenizer, tmp_path):
    bpe_tokenizer.save(str(tmp_path))
    again = load_tokenizer(str(tmp_path))
    assert again.encode(TEXTS[1]) == bpe_tokenizer.encode(TEXTS[1])
    assert again.eos_ids == bpe_tokenizer.eos_ids


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected a tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_instruct_prompts_go_through_the_chat_template(bpe_tokenizer):
    ids = encode_judge_prompt(
        bpe_tokenizer, "What is 1+1?", "", "<chunk>It is 3.</chunk>", "instruct"
    )
    text = bpe_tokenizer.decode(ids)
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith("<|im_start|>assistant\n")
    assert "New Reasoning Chunk: It is 3." in text
    assert "<chunk>" not in text
    solve = bpe_tokenizer.decode(encode_solve_prompt(bpe_tokenizer, "What is 1+1?", "instruct"))
    assert "Problem: What is 1+1?" in solve
    assert "\\boxed{}" in solve


def test_judge_prompt_has_the_papers_fields_in_order():
    (message,) = render_judge_prompt("Q", "H", "C")
    labels = [
        "Mathematical Problem: Q",
        "Historical Reasoning Path: H",
        "New Reasoning Chunk: C",
        "Analysis:",
        "Final Judgment:",
        "\\boxed{Positive}",
    ]
    places = [message["content"].index(label) for label in labels]
    assert places == sorted(places)


def test_verdict_prompt_has_the_same_fields_and_asks_for_no_analysis(bpe_tokenizer):
    def read(style):
        ids = encode_judge_prompt(bpe_tokenizer, "Q", "H", "<chunk>C</chunk>", style)
        return bpe_tokenizer.decode(ids)

    instruct, verdict = read("instruct"), read("verdict")
    fields = slice(instruct.index("Mathematical Problem"), instruct.index("Output format"))
    assert instruct[fields] in verdict and "Chunk: C\n" in instruct[fields]
    assert "Analysis:" in instruct and "step by step" in instruct
    assert "Analysis:" not in verdict and "step by step" not in verdict
    assert "Nothing but the judgment" in verdict
    assert "\\boxed{Positive} or \\boxed{Negative}" in verdict


def test_bare_prompts_are_the_text_behind_the_start_token(word_tokenizer):
    ids = encode_judge_prompt(word_tokenizer, "start 4 ?", "", "<chunk> fix </chunk>", "bare")
    assert word_tokenizer.decode(ids) == "<bos> start 4 ? <chunk> fix </chunk> <judge>"


def test_a_model_without_tags_is_not_asked_for_them(bpe_tokenizer):
    ids = encode_solve_prompt(bpe_tokenizer, "What is 1+1?", "instruct", tags=False)
    text = bpe_tokenizer.decode(ids)
    assert "What is 1+1?" in text and "\\boxed{}" in text and "chunk" not in text


def test_instruct_needs_a_chat_template(word_tokenizer):
    with pytest.raises(UserError, match="prompt_style to 'bare'"):
        encode_solve_prompt(word_tokenizer, "start 4 ?", "instruct")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Analysis: ... Final Judgment: \\boxed{Positive}", Verdict.POSITIVE),
        ("\\boxed{ Negative }", Verdict.NEGATIVE),
        ("\\boxed{\\text{Negative}}", Verdict.NEGATIVE),
        ("**\\boxed{**Positive**}**", Verdict.POSITIVE),
        ("first \\boxed{Positive}, no: \\boxed{Negative}.", Verdict.NEGATIVE),
        ("\\boxed{Positive} so the value is \\boxed{3}", Verdict.UNPARSED),
        ("Positive", Verdict.UNPARSED),
        ("\\boxed{Positive or Negative}", Verdict.UNPARSED),
        ("\\boxed{Positive", Verdict.UNPARSED),
        ("", Verdict.UNPARSED),
    ],
)
def test_parse_verdict(text, verdict):
    assert parse_verdict(text) is verdict


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("\\boxed{Positive}", True),
        (" \\boxed{ Negative }\n", True),
        ("\\boxed{\\text{Negative}}", True),
        ("Positive", False),
        ("Final Judgment: \\boxed{Positive}", False),
        ("\\boxed{Positive}.", False),
        ("\\boxed{Positive} \\boxed{Positive}", False),
        ("\\boxed{3}", False),
        ("\\boxed{Positive", False),
        ("", False),
    ],
)
def test_a_bare_verdict_is_one_box_and_nothing_else(text, bare):
    assert is_bare_verdict(text) is bare


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}} .", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{ 2 }", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("work\n#### 1,234", "1,234"),
        ("The answer is 5. So, the answer is: $1,250.50.", "1,250.50"),
        ("the answer is \\boxed{3}, no: the answer is 4", "3"),
        ("the answer is not known", None),
        ("nothing", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("1,234", "1234", True),
        ("$5.0$", "5", True),
        ("-3", "3", False),
        ("5", "15", False),
        (None, "3", False),
        ("\\frac{1}{2}", "0.5", True),
        ("x+1", "1+x", True),
        ("\\sqrt{2}", "2", False),
    ],
)
def test_is_equivalent(answer, reference, equal):
    assert is_equivalent(answer, reference) is equal


def test_a_number_too_long_for_python_is_no_reference():
    assert not is_equivalent("1", "9" * 4301)


def test_is_verifiable():
    assert is_verifiable("42")
    assert is_verifiable("\\frac{3}{4}")
    assert not is_verifiable("")
    assert not is_verifiable("9" * 2000)


def test_verifier_uses_workers_for_what_is_hard_only():
    with AnswerVerifier(workers=1) as verifier:
        assert verifier.verify([("3", "3"), ("4", "3"), (None, "3")]) == [True, False, False]
        assert not verifier._workers
        assert verifier.verify([("\\frac{2}{4}", "\\frac12")]) == [True]
        assert len(verifier._workers) == 1


def test_a_worker_that_hangs_is_killed_and_counted(monkeypatch):
    monkeypatch.setattr(AnswerVerifier, "START_SECONDS", 0.2)
    hang = "9^{9^{9^{9}}}"
    with AnswerVerifier(workers=1, timeout_seconds=0.2) as verifier:
        start = time.monotonic()
        assert verifier.verify([(hang, "\\frac12")]) == [False]
        assert time.monotonic() - start < 10
        assert verifier.timeouts == 1
        monkeypatch.setattr(AnswerVerifier, "START_SECONDS", 60.0)
        assert verifier.verify([("\\frac{2}{4}", "\\frac12")]) == [True]


def test_a_worker_that_was_killed_is_replaced_and_asked_again():
    with AnswerVerifier(workers=1) as verifier:
        assert verifier.verify([("\\frac{2}{4}", "\\frac12")]) == [True]
        verifier._workers[0].process.kill()
        verifier._workers[0].process.join()
        assert verifier.verify([("\\frac{3}{6}", "\\frac12")]) == [True]
        assert verifier.failures == 0


def test_ctrl_c_does_not_reach_the_workers():
    with AnswerVerifier(workers=1) as verifier:
        assert verifier.verify([("\\frac{2}{4}", "\\frac12")]) == [True]
        process = verifier._workers[0].process
        os.kill(process.pid, signal.SIGINT)
        assert verifier.verify([("\\frac{3}{6}", "\\frac12")]) == [True]
        assert verifier._workers[0].process is process


def test_an_answer_that_kills_workers_counts_as_a_failure(monkeypatch):
    def dies(self, timeout_seconds):
        raise EOFError

    with AnswerVerifier(workers=1) as verifier:
        monkeypatch.setattr(answers._Worker, "answer", dies)
        assert verifier.verify([("\\frac{3}{6}", "\\frac12")]) == [False]
        assert verifier.failures == 1


def test_workers_import_no_jax():
    import subprocess
    import sys

    code = "import stepwiser_jax.text.answers, sys; print('jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    assert answers.TASKS_PER_WORKER > 0


def test_an_answer_does_not_hold_the_end_token(bpe_tokenizer):
    ids = [*bpe_tokenizer.encode("so\n#### 18"), bpe_tokenizer.eos_ids[0]]
    assert extract_answer(completion_text(bpe_tokenizer, ids)) == "18"
    assert extract_answer(bpe_tokenizer.decode(ids)) != "18"
