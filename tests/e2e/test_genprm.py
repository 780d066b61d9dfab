"""GenPRM through the command line: conversations are learned, judged by, and written anew."""

import json
import random

import pytest

from stepwiser_jax.__main__ import main
from stepwiser_jax.judges.genprm.form import BARE
from stepwiser_jax.record_io import RecordWriter, read_records
from stepwiser_jax.record_lines import write_records
from stepwiser_jax.records import (
    ClassifierExample,
    Dialogue,
    Judgment,
    ProcessBenchItem,
    Rationale,
    SearchResult,
)

from .conftest import CONFIGS

STAGES = {
    "genprm_cold_start": "sft",
    "genprm": "sft",
    "genprm_rationales": "rejection-sample",
    "genprm_evaluate": "evaluate",
    "genprm_refine": "refine",
}


def command(name, run, *sets):
    config = CONFIGS / f"smoke_{name}.yaml"
    arguments = [STAGES[name], "--config", str(config), "--run-dir", str(run)]
    return arguments + [word for setting in sets for word in ("--set", setting)]


def solution(rng):
    """Three digits, of which the even ones are right."""
    digits = [rng.randrange(10) for _ in range(3)]
    chunks = tuple(f"<chunk> {digit} </chunk>" for digit in digits)
    return f"start {rng.randrange(10)} ?", chunks, [digit % 2 == 0 for digit in digits]


def turn(is_right):
    return f"{'same' if is_right else 'diff'} | {BARE.stop}{BARE.verdict(is_right)}"


def dialogue(name, rng):
    question, chunks, right = solution(rng)
    asked = [BARE.user_turn(question, chunks, t) for t in range(3)]
    texts = [text for t in range(3) for text in (asked[t], turn(right[t]))]
    return Dialogue(name, name, ("user", "assistant") * 3, tuple(texts))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A judge that has learned the rule from conversations in a file."""
    folder, rng = tmp_path_factory.mktemp("genprm"), random.Random(0)
    write_records(folder / "dialogues.jsonl", [dialogue(f"d{i}", rng) for i in range(160)])
    sets = (
        "model.path=arithmetic",
        f"examples.source={folder}/dialogues.jsonl",
        "examples.limit=null",
    )
    sets += ("steps=60", "max_length=48", "batch_size=16")
    assert main(command("genprm_cold_start", folder / "judge", *sets)) == 0
    return folder / "judge"


def test_it_finds_first_errors_and_goes_on_after_a_kill(trained, tmp_path, monkeypatch):
    rng = random.Random(1)
    items = []
    for i in range(12):
        question, chunks, right = solution(rng)
        first = right.index(False) if False in right else -1
        items.append(ProcessBenchItem(f"i{i}", "digits", question, chunks, first, first == -1))
    write_records(tmp_path / "items.jsonl", items)
    sets = (f"judge.path={trained}", f"benchmark.source={tmp_path}/items.jsonl", "block_size=5")
    sets += ("judge.sampling.max_new_tokens=8", "judge.engine.buckets=[64]")
    assert main(command("genprm_evaluate", tmp_path / "run", *sets)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for voter in ("greedy", "mean_2"):
        assert summary[voter]["average"]["official"]["f1"] == 1
        assert summary[voter]["subsets"]["digits"]["unparsed_rate"] == 0
    assert summary["code_runs"] == 0 and 2 <= summary["tokens_per_judgment"] <= 8
    judgments = {j.example_id: j for j in read_records(tmp_path / "run", Judgment)}
    assert len(judgments) == 12 * 3 * 3
    assert judgments["i0/2/vote1"].completion in (turn(True), turn(False))
    assert all(j.p_positive not in (0, 0.5, 1) for j in judgments.values())

    append = RecordWriter.append

    def dying(self, records):
        append(self, records[:7])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "append", dying)
        assert main(command("genprm_evaluate", tmp_path / "cut", *sets)) == 130
    assert main(command("genprm_evaluate", tmp_path / "cut", *sets)) == 0
    (part,) = (tmp_path / "cut").glob("records/judgments/*")
    assert (
        part.read_bytes() == (tmp_path / "run" / "records" / "judgments" / part.name).read_bytes()
    )


@pytest.mark.slow
def test_critiques_that_agree_with_the_labels_become_conversations(trained, tmp_path, capsys):
    """Half of the solutions are labelled by the rule, half by its opposite."""
    rng = random.Random(2)
    examples = []
    for i in range(12):
        question, chunks, right = solution(rng)
        labels = tuple(r if i % 2 == 0 else not r for r in right)
        q = tuple(map(float, labels))
        examples.append(ClassifierExample(f"s{i}", "p", question, chunks, (0, 1, 2), labels, q))
    write_records(tmp_path / "labelled.jsonl", examples)
    sets = (f"judge.path={trained}", f"examples.source={tmp_path}/labelled.jsonl")
    sets += ("judge.sampling.max_new_tokens=8", "judge.sampling.temperature=0")
    sets += ("judge.engine.buckets=[64]",)
    run = tmp_path / "rationales"
    assert main(command("genprm_rationales", run, *sets)) == 0
    of = {rationale.rationale_id: rationale for rationale in read_records(run, Rationale)}
    assert [of[f"s{i}/0"].outcome for i in range(12)] == ["kept", "disagrees"] * 6
    assert {of[f"s{i}/1"].outcome for i in range(0, 12, 2)} == {"repeated"}
    dialogues = read_records(run, Dialogue)
    assert [d.example_id for d in dialogues] == [f"s{i}/0" for i in range(0, 12, 2)]
    for example, found in zip(examples[::2], dialogues, strict=True):
        labels = [*example.is_positive, False]
        asked = labels.index(False) + 1 if labels.index(False) < 3 else 3
        assert found.texts[1::2] == tuple(turn(right) for right in labels[:asked])
    sets = (f"model.path={trained}", f"examples.source={run}", "steps=1", "max_length=48")
    assert main(command("genprm", tmp_path / "again", *sets)) == 0
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["examples"] == 6
    capsys.readouterr()
    assert main(command("genprm_rationales", tmp_path / "x", "judge.code_rounds=1")) == 2
    assert "bare has no code in it: set code_rounds to 0" in capsys.readouterr().err


def test_a_policy_thinks_again(trained, tmp_path):
    """The judge that has learned the rule, as a policy of no use, and as itself."""
    sets = (f"policy.path={trained}", f"judge.path={trained}", "chunking=[diff, same]")
    sets += (
        "problems.limit=4",
        "turns=1",
        "sampling.max_new_tokens=8",
        "judge.sampling.max_new_tokens=8",
    )
    sets += ("engine.buckets=[96]", "judge.engine.buckets=[96]")
    assert main(command("genprm_refine", tmp_path / "run", *sets)) == 0
    results = {r.search_id: r for r in read_records(tmp_path / "run", SearchResult)}
    assert len(results) == 4 * 2
    before, after = (
        [r for r in results.values() if r.method == method] for method in ("turn0", "turn1")
    )
    assert all(0 < r.accepted_tokens <= 8 and r.judge_tokens == 0 for r in before)
    assert all(r.judge_tokens > 0 for r in after)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["turn1"]["rethought"] == sum(r.rejected_tokens > 0 for r in after)
