"""Final answers: where they are, whether they are right, and how long that may take."""

import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from landlock import needs_landlock
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges import thinkprm
from stepwiser_jax.judges.genprm import form as genprm_form
from stepwiser_jax.records import Problem
from stepwiser_jax.tasks import mathematics, verifier
from stepwiser_jax.tasks.mathematics import compare_plainly, extract_answer
from stepwiser_jax.tasks.verifier import Verifier
from stepwiser_jax.text import chunking
from stepwiser_jax.text.prompts import is_bare_verdict, parse_verdict


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}} .", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{ 2 }", "2"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{x \\right.}", "\\left\\{x \\right."),
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
    "rest",
    ["\\boxed{2", "\\boxed{\\frac{1}{2}", "\\boxed {", "\\boxed", "\\boxed{\\}", "\\boxed{\n"],
)
def test_an_unfinished_last_box_is_no_answer(rest):
    for before in ("\\boxed{1}, no: ", "#### 1\n", "The answer is 1. So "):
        assert extract_answer(before) == "1"
        assert extract_answer(before + rest) is None


def last_box_by_counting(text):
    """The slow way, of texts whose braces are not escaped."""
    begin = text.rfind("\\boxed{")
    depth, content = 0, ""
    for character in text[begin + len("\\boxed") :] if begin >= 0 else "":
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return content[1:].strip()
        content += character
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "x", " "]), max_size=12).map("".join))
def test_the_last_box_against_counting(text):
    assert mathematics.last_box(text) == last_box_by_counting(text)


def cpu_seconds(function, text):
    """Of the fastest of three calls."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        function(text)
        seconds.append(time.process_time() - start)
    return min(seconds)


def of_chain(text):
    chain = thinkprm.cut_chain(text, thinkprm.FORMS["instruct"], 10**6)
    thinkprm.verdicts_of([chain], thinkprm.FORMS["instruct"], len(chain) // 10)
    thinkprm.clean_chain(chain, thinkprm.FORMS["instruct"])


def of_critique(text):
    genprm_form.parse_critique(text, 3)
    genprm_form.parse_turns(text, genprm_form.INSTRUCT, 3)
    genprm_form.code_to_run(text)
    genprm_form.split_outputs(text)


def of_segments(text):
    chunking.read_chunks(text, text)
    chunking.read_chunks(chunking.join_tagged(text.split()), text)
    for splitter in ("blank_lines", "steps", "sentences"):
        chunking.split_solution(text, splitter)


READERS = [extract_answer, parse_verdict, is_bare_verdict, of_chain, of_critique, of_segments]
LOOPS = {
    "open boxes": lambda n: "\\boxed{" * n,
    "boxes": lambda n: "\\boxed{1} " * n,
    "braces in a box": lambda n: "\\boxed{" + "{}" * n,
    "spaces behind a box": lambda n: "\\boxed" + " " * n,
    "marks": lambda n: "#### \t" * n + "\n",
    "answers": lambda n: "the answer is " * n,
    "blank lines": lambda n: "a" + "\n" * n + "a",
    "lines of spaces": lambda n: "a" + "\n " * n + "a",
    "words": lambda n: "a " * n,
    "headings": lambda n: "Step 1: \\boxed{correct}\n" * n,
    "stars": lambda n: ("*" * 9 + "\n") * n,
    "an analysis of spaces": lambda n: "### Paragraph 1\n<analyze>" + " " * n,
    "a check of spaces": lambda n: "### Paragraph 1\n<analyze></analyze><verify>" + " " * n,
    "code": lambda n: "```python\n" * n,
    "outputs": lambda n: "[Code Output]\n\n```\n" * n,
    "chunks": lambda n: "<chunk>a</chunk>" * n,
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("reader", READERS)
def test_readers_of_what_a_model_wrote_take_linear_time(reader, loop):
    """A model may write the same thing until it is cut. Four times as much costs about four times
    as much, or nothing that can be measured; with a square it would be 16."""
    few, many = (cpu_seconds(reader, LOOPS[loop](n)) for n in (2_000, 8_000))
    assert many < 0.002 or many / few < 10, (few, many)


def test_numbers_of_any_length_are_read():
    digits = "9" * 5000
    assert compare_plainly("1", digits) is False and compare_plainly(digits, "1") is False
    of_chain(f"Step {digits}: \\boxed{{correct}}")
    of_critique(f"### Paragraph {digits}\n<analyze>a</analyze>\\boxed{{{digits}}}")
    one = f"### Paragraph 1\n<analyze>a</analyze>\\boxed{{{digits}}}"
    assert genprm_form.parse_critique(one, 1) is None


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
    assert mathematics.is_equivalent(answer, reference) is equal


# --- what can be verified -------------------------------------------------------------------------

MATHEMATICS = [
    "42",
    "1,234.5",
    "\\frac{3}{4}",
    "x^2 + 2xy",
    "AB=9,CD=4",
    "(-\\infty, 3] \\cup [5, 7)",
    "f'(x) = 2x",
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
    "x = 1 \\text{ or } x = 2",
    "x = 1 or x = 2",
    "x > 1 and x < 2",
    "\\text{There are no such numbers}",
    "\\text{(A)}",
    "Wednesday",
    "{odd}",
    "Softball,Kickball,Picnic",
    "-2{or}-12",
    "10\\text{ square inches}",
    "10 square inches",
    "2 \\pi r",
]
NO_MATHEMATICS = [
    "",
    "9" * 2000,
    "assert double(2) == 4",
    "assert f(2)",
    "def f(x): return x",
    "print('hello')",
    '[["1 2", "3"], ["4"]]',
    "SELECT name FROM people WHERE age > 3",
    "The proof is left to the reader",
    "the answer is 5 apples",
]


def problems(*answers):
    return [Problem(f"p{i}", "q", answer, "s") for i, answer in enumerate(answers)]


def verify(verifier, pairs):
    """Whether each answer, in a box, equals its reference."""
    answers = ["" if answer is None else f"so \\boxed{{{answer}}}" for answer, _ in pairs]
    return verifier.verify(answers, problems(*(reference for _, reference in pairs)))


def test_what_is_mathematics():
    with Verifier(workers=1) as verifier:
        assert verifier.check(problems(*MATHEMATICS)) == [None] * len(MATHEMATICS)
        reasons = verifier.check(problems(*NO_MATHEMATICS))
        assert all("expected a reference answer that is mathematics" in r for r in reasons)
        assert verifier.timeouts == verifier.failures == 0


# --- workers --------------------------------------------------------------------------------------

OWN = "stand_in_verifiers:follow"
HALF = ("\\frac{2}{4}", "\\frac12")


def own(count_or_orders):
    """As `stand_in_verifiers.follow` takes them."""
    return list(count_or_orders), problems(*("",) * len(count_or_orders))


def test_verifier_uses_workers_for_what_is_hard_only():
    with Verifier(workers=1) as verifier:
        assert verify(verifier, [("3", "3"), ("4", "3"), (None, "3")]) == [True, False, False]
        first, *others = verifier.check(problems("3", "", "f(1) == 2"))
        assert first is None and all(others)
        assert not verifier._workers
        assert verify(verifier, [HALF, (None, "\\frac12")]) == [True, False]
        assert len(verifier._workers) == 1


def test_equal_answers_are_compared_once():
    with Verifier(workers=1) as verifier:
        half = problems("\\frac12") * 3
        texts = [
            f"{way} \\boxed{{{answer}}}"
            for way, answer in zip("abc", ("0.5", HALF[0], HALF[0]), strict=True)
        ]
        assert verifier.verify(texts, half) == [True] * 3
        assert verifier._workers[0].questions == 2
        assert verifier.verify(["#### \\frac{3}{6}\nend"], half[:1]) == [True]


def test_many_hard_answers_take_their_deadlines_and_no_more():
    """Of each the deadline, by two workers at a time, and something for what replaces a worker."""
    with Verifier(workers=2, timeout_seconds=60) as verifier:
        assert all(verify(verifier, [(f"\\frac{{{n}}}{{{3 * n}}}", "\\frac13") for n in (2, 3)]))
        verifier._timeout = 0.5
        start = time.monotonic()
        hard = [(f"{n}^{{9^{{9^{{9}}}}}}", "\\frac12") for n in range(2, 12)]
        assert verify(verifier, hard) == [False] * 10
        assert 2.5 <= time.monotonic() - start < 8
        assert (verifier.timeouts, verifier.failures) == (10, 0)
        verifier._timeout = 5.0
        assert verify(verifier, [HALF]) == [True]


def test_a_deadline_holds_for_a_reference_and_for_what_cannot_be_interrupted():
    start = time.monotonic()
    with Verifier(timeout_seconds=0.5) as verifier:
        (reason,) = verifier.check(problems("{" * 480 + "1" + "}" * 480))
        assert reason == "the verifier took longer than 0.5 s"
    with Verifier(OWN, timeout_seconds=0.5) as verifier:
        assert verifier.verify(*own(["hold the interpreter", "wait for a signal"])) == [False] * 2
        assert verifier.timeouts == 2
    assert time.monotonic() - start < 30


def test_a_slow_answer_does_not_stop_the_others():
    with Verifier(OWN, workers=2, timeout_seconds=20.0) as verifier:
        verifier.verify(*own(["sleep 0.1", "sleep 0.2"]))
        start = time.monotonic()
        slow_and_fast = ["sleep 1.5", "sleep 0", "sleep 0.0", "sleep 1.50"]
        assert verifier.verify(*own(slow_and_fast)) == [True] * 4
        assert 1.5 <= time.monotonic() - start < 2.6, "two after one another are 3 seconds"
        assert verifier.timeouts == verifier.failures == 0


def test_a_worker_that_was_killed_is_replaced_and_asked_again():
    with Verifier(workers=1) as verifier:
        assert verify(verifier, [HALF]) == [True]
        verifier._workers[0].process.kill()
        verifier._workers[0].process.join()
        assert verify(verifier, [("\\frac{3}{6}", "\\frac12")]) == [True]
        assert verifier.failures == 0


def test_ctrl_c_does_not_reach_the_workers():
    with Verifier(workers=1) as verifier:
        assert verify(verifier, [HALF]) == [True]
        process = verifier._workers[0].process
        os.kill(process.pid, signal.SIGINT)
        assert verify(verifier, [("\\frac{3}{6}", "\\frac12")]) == [True]
        assert verifier._workers[0].process is process


def test_what_kills_two_workers_or_raises_is_a_failure_of_its_own():
    with Verifier(OWN, workers=1) as verifier:
        assert verifier.verify(*own(["exit"])) == [False]
        assert verifier.failures == 1
        assert verifier.verify(*own(["raise"])) == [False]
        assert verifier.failures == 2
        assert verifier.verify(*own(["right", "wrong"])) == [True, False]


def test_a_worker_is_replaced_when_it_is_used_up(monkeypatch):
    monkeypatch.setattr(verifier, "QUESTIONS_PER_WORKER", 2)
    with Verifier(OWN, workers=1) as checker:
        checker.verify(*own(["right"]))
        first = checker._workers[0].process
        assert checker.verify(*own(["right", "wrong"])) == [True, False]
        assert checker._workers[0].process is not first and not first.is_alive()


def sleeps(pipe, name):
    time.sleep(60)


@pytest.mark.parametrize(
    ("serve", "seconds", "reason"), [(int, 60.0, "EOFError"), (sleeps, 0.5, "after 0.5 s")]
)
def test_workers_that_cannot_start_are_no_wrong_answers(monkeypatch, serve, seconds, reason):
    """`int` raises on what it is given, as a module does that cannot be imported."""
    monkeypatch.setattr(verifier, "_serve", serve)
    monkeypatch.setattr(verifier, "START_SECONDS", seconds)
    with Verifier(workers=2) as checker:
        with pytest.raises(UserError, match=rf"could not be started.*{reason}.*__main__"):
            verify(checker, [HALF])
        assert not checker._workers


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from stepwiser_jax.records import Problem\n"
        "from stepwiser_jax.tasks.verifier import Verifier\n"
        "with Verifier(workers=2) as verifier:\n"
        f"    problem = Problem('p', 'q', {HALF[1]!r}, 's')\n"
        f"    print(verifier.verify(['#### ' + {HALF[0]!r}], [problem]))\n"
    )
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert found.returncode == 1 and found.stdout == ""
    assert "UserError" in found.stderr and "if __name__ == '__main__':" in found.stderr


def test_workers_import_no_jax():
    code = (
        "import stepwiser_jax.tasks.math_warm_up, stepwiser_jax.tasks.verifier, sys; "
        "print('jax' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


# --- programs with unit tests ---------------------------------------------------------------------

TESTS = ["assert double(2) == 4", "assert double(-1) == -2"]


def program(code):
    return f"I double it.\n```python\n{code}\n```\nThat is all."


@needs_landlock
def test_a_program_is_right_if_its_tests_pass():
    by_text = Problem("p", "double", "", "s", {"tests": "\n".join(TESTS)})
    by_list = Problem("q", "double", "", "s", {"tests": TESTS})
    right = program("def double(x):\n    return 2 * x")
    wrong = {
        "another function": program("def double(x):\n    return x * x"),
        "no code": "double(x) = 2 * x",
        "an unfinished fence": "```python\ndef double(x):\n    return 2 * x\n",
        "an exit before the tests": program("raise SystemExit(0)"),
        "a hard exit": program("import os\nos._exit(0)"),
        "an endless loop": program("while True: pass"),
    }
    with Verifier("code", workers=2, timeout_seconds=30) as verifier:
        assert verifier.check([by_text, by_list]) == [None, None]
        assert verifier.verify([right, f"{wrong['a hard exit']}\n{right}"], [by_text, by_list]) == [
            True,
            True,
        ]
        found = verifier.verify(list(wrong.values()), [by_text] * len(wrong))
        assert dict(zip(wrong, found, strict=True)) == dict.fromkeys(wrong, False)
        assert verifier.timeouts == verifier.failures == 0


@needs_landlock
@pytest.mark.parametrize("tests", [None, 3, [], ["assert True", 4]])
def test_a_problem_without_tests_cannot_be_checked_as_code(tests):
    extra = {"level": "hard"} | ({} if tests is None else {"tests": tests})
    with Verifier("code", workers=1) as verifier:
        (reason,) = verifier.check([Problem("p", "double", "4", "s", extra)])
    assert "expected a column 'tests' with Python code" in reason and "'level'" in reason


def test_a_verifier_that_is_not_there_is_named():
    with pytest.raises(UserError, match="a verifier: code, mathematics, or module"):
        Verifier("math")
