"""Step-labelled data of others: all that a row says about its steps is read, once, unchanged."""

import copy
import random
from collections import Counter

import pytest

from stepwiser_jax.data.step_formats import (
    parse_solutions,
    to_classifier_examples,
    to_judge_examples,
    to_processbench_items,
)
from stepwiser_jax.errors import UserError
from stepwiser_jax.records import LabelledSolution

SEEDS = range(20)
WORDS = ["so 2 + 2 = 4", " Then x.\n", "\nHence\n\n+", "Step 1: again -", "ß", "0.5"]


def told(solutions):
    """(history, step, label) of all that solutions do not share, with multiplicity."""
    return Counter(
        (s.steps[:t], s.steps[t], s.labels[t])
        for s in solutions
        for t in range(s.shared_steps, len(s.steps))
    )


def shared_steps_stand_in_an_earlier_solution(solutions):
    return all(
        any(
            (e.steps[: s.shared_steps], e.labels[: s.shared_steps])
            == (s.steps[: s.shared_steps], s.labels[: s.shared_steps])
            for e in solutions[:k]
        )
        for k, s in enumerate(solutions)
        if s.shared_steps
    )


# --- PRM800K --------------------------------------------------------------------------------------


def completion(text, rating):
    return {"text": text, "rating": rating, "flagged": False}


def prm800k(steps, finish_reason="solution", **question):
    return {
        "labeler": "l",
        "question": {"problem": "2+2?", "ground_truth_answer": "4"} | question,
        "label": {"steps": steps, "finish_reason": finish_reason, "total_time": 1},
    }


def step(*completions, human=None, chosen=None):
    human = None if human is None else completion(human, None)
    return {
        "completions": [completion(*c) for c in completions] or None,
        "human_completion": human,
        "chosen_completion": chosen,
    }


def random_prm800k(rng):
    steps, expected, way = [], Counter(), ()
    for number in range(rng.randint(1, 6)):
        rated = [
            (f"{rng.choice(WORDS)}{number}{i}", rng.choice([-1, 0, 1, None])) for i in range(3)
        ]
        chosen, human = rng.choice([(0, None), (2, None), (None, "mine"), (1, "mine")])
        steps.append(step(*rated, human=human, chosen=chosen))
        rated += [(human, None)] if human else []
        labels = {-1: 0.0, 0: 0.5, 1: 1.0, None: None}
        expected.update((way, text, labels[rating]) for text, rating in rated)
        way += (human if chosen is None else rated[chosen][0],)
    return prm800k(steps), expected


@pytest.mark.parametrize("seed", SEEDS)
def test_every_completion_of_prm800k_is_read_behind_its_history(seed):
    row, expected = random_prm800k(random.Random(seed))
    solutions = parse_solutions(row, "p/0")
    assert told(solutions) == expected
    assert shared_steps_stand_in_an_earlier_solution(solutions)
    assert [s.solution_id for s in solutions] == [f"p/0#{k}" for k in range(len(solutions))]
    assert {(s.question, s.answer, s.finish_reason) for s in solutions} == {
        ("2+2?", "4", "solution")
    }


def test_phase_2_stops_at_the_first_error_and_the_solution_goes_on_unlabelled():
    generated = ["a", "b", "c", "# Answer\n\n5"]
    steps = [step(("a", 1), chosen=0), step(("b", -1), ("B", 1))]
    row = prm800k(steps, "found_error", pre_generated_steps=generated, pre_generated_answer="5")
    model, branch = parse_solutions(row, "p")
    assert (model.steps, model.labels) == (tuple(generated), (1.0, 0.0, None, None))
    assert (model.first_error, model.final_answer_correct) == (1, False)
    assert (branch.steps, branch.labels, branch.shared_steps) == (("a", "B"), (1.0, 1.0), 1)
    assert branch.final_answer_correct is None
    (item,) = to_processbench_items([model, branch])
    assert (item.first_error, item.steps) == (1, model.steps)
    assert [(e.history, e.chunk, e.is_positive) for e in to_judge_examples([model, branch])] == [
        ("", "a", True),
        ("a", "b", False),
        ("a", "B", True),
    ]


def test_the_answer_of_phase_1_stands_in_its_last_step():
    for text, right in (("# Answer\n\n4", True), ("# Answer\n\n5", False), ("4", None)):
        (solution,) = parse_solutions(prm800k([step((text, 1), chosen=0)]), "p")
        assert solution.final_answer_correct is right


def test_giving_up_leaves_the_steps_so_far():
    row = prm800k([step(("a", 1), chosen=0), step(("b", -1), human="B"), step()], "give_up")
    way, branch = parse_solutions(row, "p")
    assert (way.steps, way.labels, way.first_error) == (("a", "B"), (1.0, None), -1)
    assert (branch.steps, branch.first_error) == (("a", "b"), 1)
    assert parse_solutions(prm800k([step()], "bad_problem"), "p") == []


# --- Math-Shepherd --------------------------------------------------------------------------------


def math_shepherd(question, steps, labels):
    def render(marks):
        lines = (f"Step {i}: {s} {m}" for i, (s, m) in enumerate(zip(steps, marks, strict=True), 1))
        return f"{question} " + "\n".join(lines)

    return {"input": render(["ки"] * len(steps)), "label": render(labels), "task": "GSM8K"}


@pytest.mark.parametrize("seed", SEEDS)
def test_math_shepherd_can_be_written_back(seed):
    rng = random.Random(seed)
    words = [word for word in WORDS if "Step" not in word]
    steps = [rng.choice(words) for _ in range(rng.randint(1, 5))]
    marks = rng.choices(["+", "-"] if seed % 2 else ["0", "1", "0.25", "1.0"], k=len(steps))
    row = math_shepherd("Step 1: add. + or - ?", steps, marks)
    (solution,) = parse_solutions(row, "s/0")
    assert solution.question == "Step 1: add. + or - ?"
    assert solution.steps == tuple(f"Step {i}: {s}" for i, s in enumerate(steps, 1))
    value = {"+": 1.0, "-": 0.0}
    assert solution.labels == tuple(value.get(m) if m in value else float(m) for m in marks)
    text = "\n".join(f"{s} ки" for s in solution.steps)
    assert f"{solution.question} {text}" == row["input"]
    assert solution.final_answer_correct is (solution.labels[-1] > 0)
    assert solution.source == "math-shepherd/GSM8K"


def test_a_right_step_makes_those_before_it_right_where_labels_are_cumulative():
    row = math_shepherd("?", list("abcd"), "+-+-")
    (solution,) = parse_solutions(row, "s")
    assert solution.first_error == 3
    assert [e.is_positive for e in to_judge_examples([solution])] == [True, True, True, False]
    row = math_shepherd("?", list("abcd"), "+---")
    (solution,) = parse_solutions(row, "s")
    assert solution.first_error == 1
    assert [e.is_positive for e in to_judge_examples([solution])] == [True, False]


# --- Math-APS -------------------------------------------------------------------------------------


def random_tree(rng, depth, text):
    names = rng.sample(range(100), rng.randint(1 if depth == 3 else 0, 3)) if depth else []
    return {
        "text": text,
        "mc_value": rng.choice([0.0, 0.03125, 0.5, 1.0]),
        "children": [random_tree(rng, depth - 1, f"{rng.choice(WORDS)}{n}") for n in names],
    }


def nodes_of(node, history=()):
    yield history, node["text"], node["mc_value"]
    for child in node["children"]:
        yield from nodes_of(child, (*history, node["text"]))


@pytest.mark.parametrize("seed", SEEDS)
def test_trees_and_prefixes_tell_the_same_values(seed):
    tree = random_tree(random.Random(seed), 3, "Q?")
    row = {"question": "Q?", "final_answer": "4", "reasoning_steps": tree}
    solutions = parse_solutions(row, "a/0")
    expected = Counter((h[1:], text, value) for h, text, value in list(nodes_of(tree))[1:])
    assert told(solutions) == expected
    assert shared_steps_stand_in_an_earlier_solution(solutions)
    assert {(s.question_value, s.answer) for s in solutions} == {(tree["mc_value"], "4")}

    prefixes = [
        {"solution_prefix": "\n\n".join([*h, text]), "mc_value": value}
        for h, text, value in nodes_of(tree)
    ]
    random.Random(seed).shuffle(prefixes)
    flat = parse_solutions(row | {"reasoning_steps": prefixes}, "a/0")
    assert {(s.steps, s.labels) for s in flat} == {(s.steps, s.labels) for s in solutions}
    assert told(flat) == expected
    assert {s.question_value for s in flat} == {tree["mc_value"]}


def test_a_prefix_sampled_twice_is_read_twice():
    prefixes = [("Q?", 0.5), ("Q?\n\na", 0.25), ("Q?\n\na", 0.5), ("Q?\n\na\n\nb", 1.0)]
    row = {
        "question": "Q?",
        "reasoning_steps": [{"solution_prefix": p, "mc_value": v} for p, v in prefixes],
    }
    solutions = parse_solutions(row, "a/0")
    assert told(solutions) == Counter(
        [((), "a", 0.25), ((), "a", 0.5), (("a",), "b", 1.0)]  # the first one goes on
    )
    assert (("a", "b"), (0.25, 1.0)) in {(s.steps, s.labels) for s in solutions}


# --- PRMBench, ProcessBench -----------------------------------------------------------------------

PRMBENCH = {
    "original_question": "Q?",
    "modified_question": "Q'?",
    "original_process": ["a", "b"],
    "modified_process": ["a", "c", "d", "e"],
    "modified_steps": [2, 3],
    "error_steps": [2, 4],
    "classification": "circular",
    "idx": "circular_0",
}
PROCESSBENCH = {
    "id": "gsm8k-7",
    "generator": "some model",
    "problem": "Q?",
    "steps": ["a", "b", "c"],
    "final_answer_correct": False,
    "label": 1,
}


def test_prmbench_names_wrong_steps_and_has_each_original_once():
    (solution,) = parse_solutions(PRMBENCH, "b")
    assert (solution.question, solution.source) == ("Q'?", "prmbench/circular")
    assert solution.labels == (1.0, 0.0, 1.0, 0.0)
    assert solution.first_error == 1, "a right step after it does not make it right"
    _, original = parse_solutions(PRMBENCH | {"classification": "redundency"}, "b")
    assert (original.question, original.steps, original.labels) == ("Q?", ("a", "b"), (1.0, 1.0))
    with pytest.raises(UserError, match="whether its final answer is right"):
        to_processbench_items([solution])


@pytest.mark.parametrize("label", [-1, 0, 1, 2])
def test_processbench_items_come_back_whole(label):
    (solution,) = parse_solutions(PROCESSBENCH | {"label": label}, "x")
    (item,) = to_processbench_items([solution])
    assert item.item_id == "gsm8k-7" and item.subset == "gsm8k" and item.question == "Q?"
    assert (item.steps, item.first_error) == (("a", "b", "c"), label)
    assert sum(known is not None for known in solution.labels) == (3 if label == -1 else label + 1)


# --- all of them ----------------------------------------------------------------------------------


def test_examples_are_the_labelled_steps_up_to_the_first_error():
    solution = LabelledSolution(
        "s#1", "s", "x", "Q?", None, tuple("abcd"), (1.0, None, 0.5, 0.0), True, shared_steps=1
    )
    assert [(e.example_id, e.history, e.is_positive) for e in to_judge_examples([solution])] == [
        ("s#1/2", "a\n\nb", True),
        ("s#1/3", "a\n\nb\n\nc", False),
    ]


@pytest.mark.parametrize(
    ("labels", "cumulative", "labelled", "is_positive", "q"),
    [
        ((1.0, None, 0.5, 0.0, 1.0), False, (0, 2, 3), (True, True, False), (1.0, 0.5, 0.0)),
        ((0.0, 0.25, 0.0, 0.0), True, (0, 1, 2), (True, True, False), (1.0, 0.25, 0.0)),
        ((None, 1.0), True, (1,), (True,), (1.0,)),
    ],
)
def test_a_classifier_learns_the_same_steps_at_once(labels, cumulative, labelled, is_positive, q):
    steps = tuple("abcde"[: len(labels)])
    solution = LabelledSolution("s", "s", "x", "Q?", None, steps, labels, cumulative)
    (example,) = to_classifier_examples([solution])
    assert (example.labelled, example.is_positive, example.q) == (labelled, is_positive, q)
    alone = [(e.example_id, e.chunk, e.is_positive) for e in to_judge_examples([solution])]
    assert alone == [
        (f"s/{step}", steps[step], right) for step, right in zip(labelled, is_positive, strict=True)
    ]


@pytest.mark.parametrize(
    ("labels", "finish_reason", "is_item"),
    [
        ((1.0, 1.0), "solution", True),
        ((1.0, 0.0), "found_error", True),
        ((0.0, None), "found_error", True),
        ((1.0, None), "give_up", False),
        ((1.0, 1.0), "bad_problem", False),
    ],
)
def test_what_is_not_labelled_to_its_end_is_no_item(labels, finish_reason, is_item):
    solution = LabelledSolution(
        "s", "s", "x", "Q?", None, ("a", "b"), labels, True,
        final_answer_correct=False, finish_reason=finish_reason,
    )  # fmt: skip
    if is_item:
        assert to_processbench_items([solution])[0].first_error == solution.first_error
    else:
        with pytest.raises(UserError, match="labelled up to its end"):
            to_processbench_items([solution])


def test_math_aps_needs_no_value_of_the_bare_problem():
    prefixes = [{"solution_prefix": "q\n\na", "mc_value": 1}]
    tree = {"text": "q", "children": [{"text": "a", "mc_value": 1}]}
    for steps in (prefixes, tree):
        (solution,) = parse_solutions({"question": "q", "reasoning_steps": steps}, "r")
        assert (solution.question_value, solution.labels) == (None, (1.0,))


def test_a_solution_without_a_label_teaches_a_classifier_nothing():
    solution = LabelledSolution("s", "s", "x", "Q?", None, ("a", "b"), (None, None), True)
    assert not list(to_classifier_examples([solution]))


def places(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    for key, child in children:
        yield from places(child, (*path, key))


def test_whatever_stands_in_a_row_is_read_or_refused():
    """No place of a row can hold anything that raises another error than the user's."""
    rows = [
        random_prm800k(random.Random(0))[0],
        prm800k([step(("a", -1))], "found_error", pre_generated_steps=["a", "b"]),
        math_shepherd("?", ["a", "b"], "+-"),
        {"question": "Q?", "reasoning_steps": random_tree(random.Random(1), 2, "Q?")},
        {"question": "Q?", "reasoning_steps": [{"solution_prefix": "Q?", "mc_value": 0.5}]},
        PRMBENCH | {"classification": "redundency"},
        PROCESSBENCH,
    ]
    refused = 0
    for row in rows:
        for path in list(places(row))[1:]:
            for junk in (None, 7, -1.5, "junk", [], ["junk"], {}, {"text": 3}, True):
                changed = copy.deepcopy(row)
                place = changed
                for key in path[:-1]:
                    place = place[key]
                place[path[-1]] = junk
                try:
                    solutions = parse_solutions(changed, "r")
                except UserError:
                    refused += 1
                else:
                    list(to_judge_examples(solutions))
                    assert all(isinstance(s, str) for x in solutions for s in x.steps)
                    assert all(len(x.steps) == len(x.labels) for x in solutions)
    assert refused > 500


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "expected the columns of PRM800K .* found \\['text'\\]"),
        (prm800k([step(("a", 2), chosen=0)]), "expected a 'rating' of -1, 0, 1 or null, found 2"),
        (prm800k([step(("a", 1), chosen=1)]), "step 1: expected 'chosen_completion' from 0 to 0"),
        (prm800k([step(("a", 1)), step(("b", 1))]), "step 2 goes on after a step"),
        ({"input": "Q? Step 1: a ки", "label": "Q? Step 1: a ?"}, "step 1: expected 'label'"),
        ({"input": "Q? Step 1: a ки b", "label": ""}, "expected 'input' to be a question"),
        (PRMBENCH | {"error_steps": [0]}, "integers from 1 on, found \\[0\\]"),
        ({"question": "Q?", "reasoning_steps": {"text": "R?"}}, "to begin with the question"),
        (
            {"question": "Q?", "reasoning_steps": [{"solution_prefix": "R?", "mc_value": 1}]},
            "prefixes that begin with the question, found 'R\\?'",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, message):
    with pytest.raises(UserError, match=message):
        parse_solutions(row, "r")
