"""Tokenizers, prompts and verdicts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import Verdict
from stepwiser_jax.tasks.mathematics import extract_answer
from stepwiser_jax.text.prompts import (
    encode_judge_prompt,
    encode_solve_prompt,
    is_bare_verdict,
    parse_verdict,
    render_judge_prompt,
)
from stepwiser_jax.text.tokenizer import completion_text, completion_texts, load_tokenizer

TEXTS = ["a step of thought", "naïve → 3²\n\n</chunk>\n", "  two  spaces ", "<chunk>x</chunk>"]


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_spell_the_text(bpe_tokenizer, text):
    ids = bpe_tokenizer.encode(text)
    assert bpe_tokenizer.decode(ids) == text
    spelled = bpe_tokenizer.token_bytes()
    assert b"".join(spelled[i] for i in ids).decode() == text


def test_a_text_of_a_batch_is_that_of_its_ids_alone(bpe_tokenizer):
    """Special tokens are kept, end tokens of completions are not; half a character is replaced."""
    texts = [bpe_tokenizer.encode(text) for text in TEXTS]
    end, *_ = bpe_tokenizer.eos_ids
    batch = [*texts, [], [*texts[0], end], *([i] for i in texts[1])]
    alone = [bpe_tokenizer.decode(ids) for ids in batch]
    assert bpe_tokenizer.decode_batch(batch) == alone
    assert alone[: len(TEXTS)] == TEXTS and alone[len(TEXTS) + 1] != TEXTS[0]
    assert "\ufffd" in "".join(alone)
    assert completion_texts(bpe_tokenizer, map(np.array, batch)) == [
        completion_text(bpe_tokenizer, ids) for ids in batch
    ]
    assert completion_texts(bpe_tokenizer, [[*texts[0], end]]) == TEXTS[:1]


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
        ("\\boxed{\\mathrm{Positive}}", Verdict.POSITIVE),
        ("$\\boxed{\\textbf{ Negative. }}$", Verdict.NEGATIVE),
        ("\\boxed{\\text{\\textbf{\\mathbf{Positive}}}}", Verdict.POSITIVE),
        ("\\boxed{{\\bf __Negative__}}", Verdict.NEGATIVE),
        ("first \\boxed{Positive}, no: \\boxed{Negative}.", Verdict.NEGATIVE),
        ("\\boxed{Positive}? The chunk has \\boxed{\\frac{1}{\\sqrt{2}}}.", Verdict.OTHER),
        ("\\boxed{Positive} so the value is \\boxed{3}", Verdict.OTHER),
        ("\\boxed{Positive or Negative}", Verdict.OTHER),
        ("\\boxed{\\neg Positive}", Verdict.OTHER),
        ("\\boxed{}", Verdict.OTHER),
        ("Positive", Verdict.UNPARSED),
        ("\\boxed{Positive", Verdict.UNPARSED),
        ("\\boxed{Positive}, no, \\boxed{Nega", Verdict.UNPARSED),
        ("\\boxed{Positive}, no, \\boxed{\\text{Negative}", Verdict.UNPARSED),
        ("\\boxed{Positive}, that is \\boxed", Verdict.UNPARSED),
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


def test_an_answer_does_not_hold_the_end_token(bpe_tokenizer):
    ids = [*bpe_tokenizer.encode("so\n#### 18"), bpe_tokenizer.eos_ids[0]]
    assert extract_answer(completion_text(bpe_tokenizer, ids)) == "18"
    assert extract_answer(bpe_tokenizer.decode(ids)) != "18"


PARTS = st.sampled_from(
    [
        "\\boxed{Positive}",
        "\\boxed{",
        "}",
        "{",
        "Negative",
        "\\text{ ",
        "**",
        " ",
        "\\boxed{ Negative }",
    ]
)


@given(st.lists(PARTS, max_size=8).map("".join), st.sampled_from(["Positive", "Negative"]))
def test_the_last_finished_box_decides(before, verdict):
    for box in (verdict, f"\\text{{{verdict}}}", f" **{verdict.upper()}.** "):
        assert parse_verdict(f"{before}\\boxed{{{box}}} so.").value == verdict
    assert parse_verdict(f"{before}\\boxed{{{verdict}") is Verdict.UNPARSED
    assert parse_verdict(f"{before}\\boxed{{{verdict} or not}}") is Verdict.OTHER
