"""The embedded task: exact truth, a systematically wrong teacher, and judgments that can be
right."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.genprm import form as genprm_form
from stepwiser_jax.judges.thinkprm import FORMS, clean_chain, step_verdicts
from stepwiser_jax.records import Verdict
from stepwiser_jax.tasks import arithmetic as task
from stepwiser_jax.tasks import arithmetic_demonstrations as demonstrations
from stepwiser_jax.text.prompts import parse_verdict

PROBLEMS = task.generate_problems(300, 0, "train")
MOD_7 = task.generate_problems(300, 0, "train", task.MOD_7)
both_tasks = pytest.mark.parametrize("problems", [PROBLEMS, MOD_7], ids=["mod 10", "mod 7"])


class Infallible(demonstrations.Teacher):
    def chunk(self, value, operation, rng):
        return list(task.exact_lines(value, operation))


def perfect(question):
    return demonstrations.demonstrate(question, Infallible(0), np.random.default_rng(0))


@both_tasks
def test_answers_by_another_route(problems):
    for problem in problems:
        words = problem.question.split()
        expression = words[1]
        for op, right in re.findall(r"([*+-]) (\d)", problem.question):
            expression = f"({expression} {op} {right})"
        assert eval(expression) % (10 if words[0] == "start" else 7) == int(problem.answer)


def test_the_second_task_has_other_operations():
    kinds = {
        part[::2]
        for problem in MOD_7
        for part in re.findall(r"; (\S) (\d) (\S) (\d)", problem.question)
    }
    assert kinds == {("+", "-"), ("+", "*"), ("*", "-"), ("*", "*")}
    assert {p.source for p in MOD_7} == {"arithmetic-mod-7"}
    assert max(int(digit) for p in MOD_7 for digit in re.findall(r"\d", p.question)) == 6
    assert sorted(task.MOD_7.facts) == sorted(
        {(x, op, y) for x in range(7) for op in "+-*" for y in range(1 + (op == "*"), 7)}
    )


@pytest.mark.parametrize("of", task.TASKS)
def test_splits_share_no_question_and_ids_are_stable(of):
    questions = {
        split: {p.question for p in task.generate_problems(200, 1, split, of)}
        for split in task.SPLITS
    }
    splits = list(questions)
    for i, a in enumerate(splits):
        for b in splits[i + 1 :]:
            assert not questions[a] & questions[b]
    assert task.generate_problems(50, 3, "dev", of) == task.generate_problems(80, 3, "dev", of)[:50]


@both_tasks
def test_perfect_solutions_are_true_throughout(problems):
    for problem in problems:
        chunks = perfect(problem.question)
        assert all(task.chunk_truth(problem.question, chunks))
        assert task.first_error(problem.question, chunks) == -1


@both_tasks
def test_one_changed_digit_is_found_where_it_is(problems):
    rng = np.random.default_rng(0)
    for problem in problems:
        chunks = perfect(problem.question)
        j = int(rng.integers(len(chunks)))
        digits = [m.start() for m in re.finditer(r"\d", chunks[j])]
        place = int(rng.choice(digits))
        changed = (int(chunks[j][place]) + int(rng.integers(1, 10))) % 10
        wrong = [*chunks]
        wrong[j] = chunks[j][:place] + str(changed) + chunks[j][place + 1 :]
        assert task.first_error(problem.question, wrong) == j


def test_truth_is_local_and_knows_repairs():
    question = "start 4 ; * 7 + 5 ; * 3 - 2 ?"
    wrong = "<chunk> 4 * 7 = 9 ; 9 + 5 = 4 </chunk>"
    goes_on = "<chunk> 4 * 3 = 2 ; 2 - 2 = 0 </chunk>"
    answer = "<chunk> \\boxed{ 0 } </chunk>"
    assert task.chunk_truth(question, [wrong, goes_on, answer]) == [False, True, True]
    repair = "<chunk> fix ; 4 * 7 = 8 ; 8 + 5 = 3 </chunk>"
    right = "<chunk> 3 * 3 = 9 ; 9 - 2 = 7 </chunk>"
    end = "<chunk> \\boxed{ 7 } </chunk>"
    assert task.chunk_truth(question, [wrong, repair, right, end]) == [False, True, True, True]
    assert task.first_error(question, [wrong, repair, right, end]) == 0


@pytest.mark.parametrize(
    "chunk",
    ["", "<chunk> </chunk>", "nonsense", "<chunk> \\boxed{ 4 } </chunk>", "<chunk> fix </chunk>"],
)
def test_malformed_or_early_chunks_are_wrong(chunk):
    question = "start 4 ; * 7 + 5 ; * 3 - 2 ?"
    assert task.chunk_truth(question, [chunk]) == [False]
    after = [chunk, "<chunk> 4 * 7 = 8 ; 8 + 5 = 3 </chunk>"]
    assert task.chunk_truth(question, after) == [False, True]


@pytest.mark.parametrize("of", task.TASKS)
def test_the_teacher_is_wrong_in_the_same_way_each_time(of):
    teacher, rng = demonstrations.Teacher(0, of), np.random.default_rng(1)
    errors = defaultdict(Counter)
    for fact in of.facts * 60:
        line = teacher.line(*fact, rng)
        if line.result != task.compute(*fact, of.modulus):
            errors[fact][line.result] += 1
    assert len(errors) == round(0.13 * len(of.facts))
    for found in errors.values():
        assert len(found) == 1
        assert 0.15 < sum(found.values()) / 60 < 0.85


@both_tasks
def test_demonstrations_are_imperfect_but_mostly_right(problems):
    chunks = [
        re.findall(r"<chunk> .*? </chunk>", example.completion)
        for example in demonstrations.policy_demonstrations(problems, 0)
    ]
    truth = [
        right
        for problem, solution in zip(problems, chunks, strict=True)
        for right in task.chunk_truth(problem.question, solution)
    ]
    assert 0.05 < 1 - np.mean(truth) < 0.25


@both_tasks
def test_an_exact_full_judgment_is_the_truth(problems):
    teacher, rng = demonstrations.teacher_of(problems, 0), np.random.default_rng(0)
    seen = Counter()
    for problem in problems:
        chunks = demonstrations.demonstrate(problem.question, teacher, rng)
        for j, right in enumerate(task.chunk_truth(problem.question, chunks)):
            analysis, verdict = demonstrations.judge_chunk(
                problem.question, chunks[: j + 1], "full", teacher, rng, 0.0
            )
            assert verdict == right
            assert ("diff" in analysis) != right
            seen[right] += 1
    assert seen[False] > 30


@both_tasks
def test_judgments_can_be_parsed_and_spelled(problems, word_tokenizer):
    examples = demonstrations.judge_demonstrations(
        problems, 0
    ) + demonstrations.policy_demonstrations(problems, 0)
    for example in examples:
        text = f"{example.prompt} {example.completion}"
        ids = word_tokenizer.encode(text)
        assert word_tokenizer.decode(ids) == text
        assert word_tokenizer.encode("<unk>")[0] not in ids
        assert len(ids) <= 158
    verdicts = Counter(parse_verdict(e.completion) for e in examples[: len(problems)])
    assert verdicts[Verdict.UNPARSED] == 0
    assert min(verdicts[Verdict.POSITIVE], verdicts[Verdict.NEGATIVE]) > 40


@both_tasks
def test_the_truth_of_the_chunks_that_judgments_are_about(problems):
    """As many right and wrong ones as the classifier may learn in place of the judgments."""
    judgments = demonstrations.judge_demonstrations(problems, 0)
    truths = demonstrations.labelled_truth(problems, 0)
    for problem, judgment, truth in zip(problems, judgments, truths, strict=True):
        assert judgment.prompt == f"{problem.question} {' '.join(truth.chunks)} <judge>"
        right = [task.chunk_truth(problem.question, truth.chunks)[-1]]
        assert list(truth.is_positive) == right and truth.labelled == (len(truth.chunks) - 1,)
    agrees = [
        (parse_verdict(judgment.completion) is Verdict.POSITIVE) == truth.is_positive[0]
        for judgment, truth in zip(judgments, truths, strict=True)
    ]
    assert 0.6 < np.mean(agrees) < 0.95
    assert 0.2 < np.mean([truth.is_positive[0] for truth in truths]) < 0.8


def test_verdicts_are_the_judgments_without_their_analysis():
    from stepwiser_jax.text.prompts import is_bare_verdict

    whole, verdicts = (
        demonstrations.judge_demonstrations(PROBLEMS, 0),
        demonstrations.verdict_demonstrations(PROBLEMS, 0),
    )
    for judgment, verdict in zip(whole, verdicts, strict=True):
        assert is_bare_verdict(verdict.completion) and not is_bare_verdict(judgment.completion)
        assert parse_verdict(verdict.completion) is parse_verdict(judgment.completion)
        assert verdict.prompt == judgment.prompt
        assert judgment.completion.endswith(verdict.completion)


@pytest.mark.parametrize("style", ["bare", "instruct"])
def test_verification_demonstrations_are_chains_that_stop_at_the_first_error(style, word_tokenizer):
    form = FORMS[style]
    examples = demonstrations.thinkprm_demonstrations(PROBLEMS, 0, style)
    assert len(examples) == len(PROBLEMS)
    answers = Counter()
    for example in examples:
        text = f"{example.prompt} {example.completion}"
        if style == "bare":
            ids = word_tokenizer.encode(text)
            assert word_tokenizer.decode(ids) == text
            assert word_tokenizer.encode("<unk>")[0] not in ids
            assert len(ids) <= 285
        written = step_verdicts(example.completion, form)
        assert [v.step for v in written] == list(range(len(written)))
        *before, last = [v.verdict for v in written]
        assert set(before) <= {Verdict.POSITIVE}
        num_chunks = example.prompt.count("<chunk>") or example.prompt.split("Review")[0].count(
            "Step "
        )
        is_correct = last is Verdict.POSITIVE
        assert len(written) == num_chunks if is_correct else len(written) <= num_chunks
        chain = example.completion.removeprefix(form.opening).split(form.question)[0]
        assert example.completion == form.whole(clean_chain(chain, form), is_correct)
        answers[is_correct] += 1
    assert min(answers.values()) > len(PROBLEMS) / 10


def turns_of(dialogue):
    """The assistant's turns as lists of (role, text), and the user's texts."""
    turns, asked = [], []
    for role, text in zip(dialogue.roles, dialogue.texts, strict=True):
        if role == "user":
            asked.append(text)
            turns.append([])
        elif role != "system":
            turns[-1].append((role, text))
    return turns, asked


@pytest.mark.parametrize("style", ["bare", "instruct"])
def test_conversation_demonstrations_are_what_a_judge_writes(style):
    form, verdicts = genprm_form.FORMS[style], Counter()
    dialogues = demonstrations.genprm_demonstrations(PROBLEMS, 0, style)
    assert [d.problem_id for d in dialogues] == [p.problem_id for p in PROBLEMS]
    for dialogue, problem in zip(dialogues, PROBLEMS, strict=True):
        assert dialogue.roles[0] == ("user" if style == "bare" else "system")
        parts, asked = turns_of(dialogue)
        assert asked[0].startswith(problem.question) and "boxed" in asked[-1]
        turns = ["".join(text for _, text in turn) for turn in parts]
        for t, (turn, part) in enumerate(zip(turns, parts, strict=True)):
            assert genprm_form.split_outputs(turn) == part
            assert turn.startswith(form.opening.format(number=t + 1))
            written = turn[: turn.index(form.stop) + len(form.stop)]
            word = turn.removeprefix(written + form.to_verdict(written))
            assert word in (form.verdict(True), form.verdict(False))
            verdicts[word] += 1
        critique = genprm_form.parse_turns(genprm_form.join_turns(turns), form, len(turns))
        assert critique is not None
        assert critique.turns == tuple(turns[: len(critique.turns)])
    assert min(verdicts.values()) > sum(verdicts.values()) / 10


def test_code_in_demonstrations_prints_what_follows_it_and_decides(capsys):
    """Also where the analysis before it is wrong; but for the tenth that is flipped."""
    agreeing, without_code = defaultdict(list), 0
    for dialogue in demonstrations.genprm_demonstrations(PROBLEMS, 0, "instruct"):
        for t, turn in enumerate(turns_of(dialogue)[0]):
            said = turn[0][1]
            code = genprm_form.code_to_run(said)
            if code is None:
                without_code += 1
                assert [role for role, _ in turn] == ["assistant"] and "[Code" not in said
                continue
            assert [role for role, _ in turn] == ["assistant", "output", "assistant"]
            assert said.endswith(genprm_form.CODE_OUTPUT)
            exec(code, {})
            printed = capsys.readouterr().out.strip()
            assert turn[1][1] == genprm_form.output_text(printed)
            analysis = genprm_form.analysis_of(said, t, genprm_form.INSTRUCT)
            lines = re.findall(r"= (\d) (\S) (?:same|diff)", analysis)
            if "?" not in analysis:
                believed, claimed = ([line[i] for line in lines] for i in (0, 1))
                is_right = genprm_form.INSTRUCT.verdict(True) in turn[2][1]
                exact = printed.split("\n")
                agreeing[believed == exact].append(is_right == (claimed == exact))
    assert without_code and len(agreeing[False]) > 20
    for agrees in agreeing.values():
        assert 0.8 < np.mean(agrees) < 0.97


def test_bad_questions_and_splits_are_refused():
    with pytest.raises(UserError, match="found 'what is 3'"):
        task.parse_question("what is 3")
    with pytest.raises(UserError, match="expected a split"):
        task.generate_problems(1, 0, "validation")
