"""Chunks are spans of token ids: the automaton, the partition, and tags that share tokens."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwiser_jax.errors import UserError
from stepwiser_jax.text.chunks import (
    BLANK_LINE,
    CHUNK_CLOSE,
    TokenMatcher,
    check_tags,
    chunk_ends,
    chunk_texts,
    strip_tags,
)


def slow_ends(token_bytes, ids, patterns):
    """Spell token after token; a token that completes any pattern ends a span."""
    ends, text = [], b""
    for position, token in enumerate(ids, 1):
        text += token_bytes[token]
        if any(pattern.encode() in text for pattern in patterns):
            ends.append(position)
            text = b""
    return ends


TOKENS = [b"a", b"b", b"ab", b"ba", b"aa", b"abab", b"c", b"", b"aab"]


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, len(TOKENS) - 1), max_size=15),
)
def test_matcher_agrees_with_spelling_it_out(patterns, ids):
    matcher = TokenMatcher.build(TOKENS, patterns)
    assert matcher.ends(ids) == slow_ends(TOKENS, ids, patterns)


PIECES = [
    "<chunk>",
    "</chunk>",
    "</",
    "chunk",
    ">",
    " >\n",
    "\n\n",
    "a step",
    "the answer is 3.",
    " ",
]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_chunks_are_a_partition_and_none_is_empty(bpe_tokenizer, pieces, by_tags, with_end):
    text = "".join(pieces)
    ids = bpe_tokenizer.encode(text) + [bpe_tokenizer.eos_ids[0]] * with_end
    pattern = CHUNK_CLOSE if by_tags else BLANK_LINE
    matcher = TokenMatcher.build(bpe_tokenizer.token_bytes(), (pattern,))
    ends = chunk_ends(ids, matcher, bpe_tokenizer)
    assert ends[-1] == len(ids) and list(ends) == sorted(set(ends))
    texts = chunk_texts(bpe_tokenizer, ids, ends)
    assert "".join(texts) == text
    assert all(strip_tags(part).strip() for part in texts) or len(texts) == 1
    assert set(ends[:-1]) <= set(matcher.ends(ids)), "a chunk ends where its pattern does"


def test_a_tag_of_several_tokens_that_shares_its_last_one(bpe_tokenizer):
    text = "<chunk>a step</chunk>\n<chunk>of thought</chunk>\nthe answer is 3."
    ids = bpe_tokenizer.encode(text)
    spelled = bpe_tokenizer.token_bytes()
    matcher = TokenMatcher.build(spelled, (CHUNK_CLOSE,))
    ends = chunk_ends(ids, matcher, bpe_tokenizer)
    assert any(spelled[i] == b">\n" for i in ids), "the case shows nothing: no token is shared"
    assert len(bpe_tokenizer.encode(CHUNK_CLOSE)) > 1
    texts = chunk_texts(bpe_tokenizer, ids, ends)
    assert texts == ["<chunk>a step</chunk>\n", "<chunk>of thought</chunk>\nthe answer is 3."]
    assert "".join(texts) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<chunk>a</chunk><chunk>b</chunk>", ["<chunk>a</chunk>", "<chunk>b</chunk>"]),
        ("<chunk>a</chunk><chunk>cut off", ["<chunk>a</chunk>", "<chunk>cut off"]),
        ("<chunk>a</chunk> \\boxed{3}", ["<chunk>a</chunk> \\boxed{3}"]),
        ("no tags at all", ["no tags at all"]),
        ("<chunk></chunk><chunk>b</chunk>", ["<chunk></chunk><chunk>b</chunk>"]),
        ("<chunk>a</chunk>\n\n<chunk> </chunk>", ["<chunk>a</chunk>\n\n<chunk> </chunk>"]),
    ],
)
def test_what_is_a_chunk(bpe_tokenizer, text, expected):
    ids = bpe_tokenizer.encode(text)
    matcher = TokenMatcher.build(bpe_tokenizer.token_bytes(), (CHUNK_CLOSE,))
    for with_end in (ids, [*ids, bpe_tokenizer.eos_ids[0]]):
        ends = chunk_ends(with_end, matcher, bpe_tokenizer)
        assert ends[-1] == len(with_end)
        assert list(ends) == sorted(set(ends))
        assert chunk_texts(bpe_tokenizer, with_end, ends) == expected


def test_blank_lines_make_chunks_but_no_empty_ones(bpe_tokenizer):
    text = "a step\n\nof thought\n\n\n\n\n\nthe answer is 3.\n\n"
    ids = [*bpe_tokenizer.encode(text), bpe_tokenizer.eos_ids[0]]
    matcher = TokenMatcher.build(bpe_tokenizer.token_bytes(), (BLANK_LINE,))
    texts = chunk_texts(bpe_tokenizer, ids, chunk_ends(ids, matcher, bpe_tokenizer))
    assert [part.strip() for part in texts] == ["a step", "of thought", "the answer is 3."]
    assert "".join(texts) == text


def test_tags_are_taken_off():
    assert strip_tags("<chunk> a </chunk>b") == " a b"
    assert strip_tags("a > b <chunk") == "a > b <chunk"


def test_no_tag_is_left_where_others_were_taken_off():
    assert strip_tags("<chu</chunk>nk>a<</chunk>/chunk>") == "a"
    assert strip_tags("<chu" * 20000 + "nk>" * 20000) == "", "and it takes no seconds"


PARTS = st.sampled_from(["<chunk>", "</chunk>", "<", "/", "chunk", ">", "a", "<chu", "nk>"])


@given(st.lists(PARTS, max_size=12))
def test_tags_are_removed_until_there_are_none(parts):
    text = expected = "".join(parts)
    while expected != (shorter := re.sub("</?chunk>", "", expected)):
        expected = shorter
    assert strip_tags(text) == expected


def test_a_tokenizer_that_loses_the_tags_is_refused(tmp_path, word_tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from stepwiser_jax.text.tokenizer import load_tokenizer

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "one": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot round-trip"):
        check_tags(load_tokenizer(str(tmp_path)))
    check_tags(word_tokenizer)
