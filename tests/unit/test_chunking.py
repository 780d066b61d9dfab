"""Cutting finished solutions into chunks."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwiser_jax.tasks import arithmetic
from stepwiser_jax.tasks import arithmetic_demonstrations as demonstrations
from stepwiser_jax.text.chunking import (
    ProposalOutcome,
    Splitter,
    join_tagged,
    majority_chunking,
    read_chunks,
    split_solution,
)

SOLUTION = "Let x = 3.\nThen  2x = 6.\n\nSo the answer is \\boxed{6}."


WORDS = st.text("ab.\\{}<>/3 ", min_size=1, max_size=8).map(str.strip).filter(bool)
GAPS = st.sampled_from(["", "\n", " \n\n"])


@given(st.lists(WORDS, min_size=1, max_size=6), st.sampled_from([" ", "\n", "\n\n  "]), GAPS)
def test_any_cut_at_white_space_is_kept_and_gives_the_text_back(parts, between, gap):
    solution = between.join(parts)
    text = gap + gap.join(f"<chunk>{gap}{part}{gap}</chunk>" for part in parts) + gap
    assert read_chunks(text, solution) == (ProposalOutcome.KEPT, tuple(parts))
    assert read_chunks(join_tagged(parts), solution) == (ProposalOutcome.KEPT, tuple(parts))


@given(st.text("ab. \n3Step1:#", max_size=30), st.sampled_from(get_args(Splitter)))
def test_rules_of_thumb_keep_all_but_white_space(solution, splitter):
    chunks = split_solution(solution, splitter)
    assert all(chunk and chunk == chunk.strip() for chunk in chunks)
    assert "".join("".join(chunks).split()) == "".join(solution.split())
    if chunks:
        assert read_chunks(join_tagged(chunks), solution) == (ProposalOutcome.KEPT, chunks)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (SOLUTION, ProposalOutcome.TEXT_OUTSIDE_OF_CHUNKS),
        ("", ProposalOutcome.TEXT_OUTSIDE_OF_CHUNKS),
        (f"Here it is: <chunk>{SOLUTION}</chunk>", ProposalOutcome.TEXT_OUTSIDE_OF_CHUNKS),
        (f"<chunk>{SOLUTION}</chunk> Done.", ProposalOutcome.TEXT_OUTSIDE_OF_CHUNKS),
        (f"<chunk>{SOLUTION}", ProposalOutcome.UNBALANCED_TAGS),
        (f"{SOLUTION}</chunk>", ProposalOutcome.UNBALANCED_TAGS),
        (f"<chunk><chunk>{SOLUTION}</chunk></chunk>", ProposalOutcome.UNBALANCED_TAGS),
        (f"<chunk>{SOLUTION}</chunk><chunk>\n</chunk>", ProposalOutcome.EMPTY_CHUNK),
        (f"<chunk>{SOLUTION.replace('  ', ' ')}</chunk>", ProposalOutcome.ALTERED),
        (f"<chunk>{SOLUTION[:-2]}</chunk>", ProposalOutcome.ALTERED),
        (f"<chunk>{SOLUTION}</chunk><chunk>And so on.</chunk>", ProposalOutcome.ALTERED),
        (f"<chunk>{SOLUTION[:10]}</chunk><chunk>{SOLUTION[12:]}</chunk>", ProposalOutcome.ALTERED),
        (f"<chunk>{SOLUTION}</chunk><chunk>{SOLUTION}</chunk>", ProposalOutcome.ALTERED),
    ],
)
def test_what_is_not_the_solution_in_the_format_is_rejected(text, outcome):
    assert read_chunks(text, SOLUTION) == (outcome, ())


def test_the_cut_that_occurs_most_often_is_chosen():
    assert majority_chunking([("a", "b"), ("ab",), ("ab",)]) == (("ab",), 2)
    assert majority_chunking([("a", "b"), ("ab",)]) == (("a", "b"), 1)


def test_rules_of_thumb():
    assert split_solution(SOLUTION, "blank_lines") == tuple(SOLUTION.split("\n\n"))
    assert split_solution(SOLUTION, "sentences") == (
        "Let x = 3.",
        "Then  2x = 6.",
        "So the answer is \\boxed{6}.",
    )
    steps = "Plan: add.\nStep 1: 2 + 2\n= 4\n**Step 2**: 4 + 1.5 = 5.5"
    assert split_solution(steps, "steps") == (
        "Plan: add.",
        "Step 1: 2 + 2\n= 4",
        "**Step 2**: 4 + 1.5 = 5.5",
    )
    assert split_solution("4 + 1.5 = 5.5", "sentences") == ("4 + 1.5 = 5.5",)


def test_the_embedded_tasks_segmenter_learns_to_cut_what_the_policy_writes():
    problems = arithmetic.generate_problems(20, 0, "train")
    untagged = demonstrations.untagged_demonstrations(problems, 0)
    cut = demonstrations.segmenter_demonstrations(problems, 0)
    whole = demonstrations.policy_demonstrations(problems, 0)
    for solution, example, demonstration in zip(untagged, cut, whole, strict=True):
        assert example.prompt == f"{solution.completion} ?"
        assert example.completion == demonstration.completion
        outcome, chunks = read_chunks(example.completion, solution.completion)
        assert outcome is ProposalOutcome.KEPT
        assert len(chunks) == demonstration.completion.count("</chunk>")
        assert set(example.prompt.split()) <= set(arithmetic.VOCABULARY)
