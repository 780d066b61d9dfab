"""A user's prompts: each replaces ours, in every place; wrong ones are refused; runs keep them."""

import re
from types import SimpleNamespace

import pytest
import yaml
from flax import nnx
from hypothesis import example, given
from hypothesis import strategies as st

from stepwiser_jax.checksums import write_checksums
from stepwiser_jax.config import (
    GenPrmTeacher,
    Model,
    Sampling,
    Sft,
    StepwiserTeacher,
    ThinkPrmTeacher,
)
from stepwiser_jax.config_files import config_digest, load_config, validate
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.classifier import encode_solution
from stepwiser_jax.judges.genprm.form import conversation, form_of, rethink_prompt
from stepwiser_jax.model.hf import save_hf
from stepwiser_jax.model.transformer import Transformer
from stepwiser_jax.record_io import RecordWriter, write_manifest
from stepwiser_jax.records import ChunkedSolution, ClassifierExample, JudgeExample
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.stages import sft
from stepwiser_jax.stages.chunk_solutions import Proposer
from stepwiser_jax.stages.rejection_sample import prompt_ids, task_of
from stepwiser_jax.text import templates
from stepwiser_jax.text.dialogues import encode_dialogue
from stepwiser_jax.text.prompts import encode_judge_prompt, encode_solve_prompt
from stepwiser_jax.text.templates import (
    KEPT,
    OURS,
    fields_of,
    prompts_of,
    read_prompts,
    save_prompts,
)
from stepwiser_jax.text.tokenizer import load_tokenizer
from stepwiser_jax.yaml_files import load_yaml
from tiny import tiny_config

FIELDS = {
    "question": "How many?",
    "history": "Old.",
    "chunk": "New.",
    "solution": "It is 42.",
    "analysis": "Bad.",
}
ONE = ClassifierExample("s", "p", "How many?", ("One.",), (0,), (True,), (1.0,))
TWO = ClassifierExample("s", "p", "How many?", ("One.", "Two."), (0, 1), (True,) * 2, (1.0,) * 2)
CHUNK = JudgeExample("e", "p", "How many?", "Old.", "New.", True)


def asked_by(judge, example, **settings):
    """What a teacher that writes examples is asked."""

    def ids(tokenizer):
        model = {"path": "m", "engine": {"buckets": [99]}, "sampling": {"max_new_tokens": 9}}
        teacher = judge.model_validate(model | settings)
        writer = SimpleNamespace(tokenizer=tokenizer, prompt_style=teacher.prompt_style)
        return prompt_ids(writer, task_of(teacher, tokenizer), example)

    return ids


def proposer(tokenizer):
    teacher = SimpleNamespace(prompt_style="instruct", sampling=Sampling(max_new_tokens=9))
    config = SimpleNamespace(num_segmentations=1, seed=0)
    return Proposer(config, teacher, tokenizer, None, 99).prompt_ids("It is 42.")


def genprm(tokenizer):
    form = form_of("instruct", tokenizer.prompts)
    turns = [form.opening.format(number=1), "no"]
    said = conversation("How many?", ["One.", "Two."], turns, form)
    return encode_dialogue(tokenizer, *said, "instruct")[0]


def rethink(tokenizer):
    return tokenizer.encode(rethink_prompt("One.", "Bad.", "instruct", tokenizer.prompts))


def classifier(tokenizer):
    return encode_solution(tokenizer, "How many?", ["One.", "Two."], "instruct")[0]


CASES = {
    "solve": (lambda t: encode_solve_prompt(t, "How many?", "instruct"), {}),
    "solve_without_tags": (
        lambda t: encode_solve_prompt(t, "How many?", "instruct", tags=False),
        {},
    ),
    "rethink": (rethink, {"step": "One."}),
    "chunk_solution": (proposer, {}),
    "judge": (lambda t: encode_judge_prompt(t, "How many?", "Old.", "New.", "instruct"), {}),
    "judge, sampled": (asked_by(StepwiserTeacher, CHUNK), {}),
    "verdict": (lambda t: encode_judge_prompt(t, "How many?", "Old.", "New.", "verdict"), {}),
    "classifier_first_step": (classifier, {"step": "One."}),
    "classifier_step": (classifier, {"step": "Two."}),
    "genprm_system": (genprm, {}),
    "genprm_first_step": (genprm, {"step": "One."}),
    "genprm_first_step, sampled": (
        asked_by(GenPrmTeacher, TWO, turn_by_turn=True),
        {"step": "One."},
    ),
    "genprm_step": (genprm, {"step": "Two."}),
    "genprm_opening": (genprm, {"number": 1}),
    "genprm_synthesis": (
        asked_by(GenPrmTeacher, TWO, code_rounds=0),
        {
            "verify": "",
            "solution": "<paragraph_1>\nOne.\n</paragraph_1>\n\n"
            "<paragraph_2>\nTwo.\n</paragraph_2>",
        },
    ),
    "genprm_synthesis_verify": (asked_by(GenPrmTeacher, TWO, code_rounds=1), {}),
    "thinkprm_verify": (asked_by(ThinkPrmTeacher, TWO), {"steps": "Step 1: One.\nStep 2: Two."}),
    "thinkprm_step": (asked_by(ThinkPrmTeacher, ONE), {"number": 1, "step": "One."}),
    "thinkprm_opening": (asked_by(ThinkPrmTeacher, TWO), {}),
}
"""Who asks with a prompt, and the fields that are not in FIELDS."""

ELSEWHERE = {
    *("genprm_after_analysis", "genprm_run_code"),  # tests/unit/test_genprm.py
    *("thinkprm_question", "thinkprm_yes", "thinkprm_no"),  # tests/unit/test_thinkprm.py
    *("thinkprm_round_2", "thinkprm_round_3", "thinkprm_round_4"),
}


def test_every_prompt_has_a_case():
    assert {case.split(",")[0] for case in CASES} | ELSEWHERE == set(OURS)


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_is_replaced_by_the_users(case, bpe_directory, tmp_path):
    """The ids are those of the text, with ours exchanged for what the user's template says."""
    name = case.split(",")[0]
    ask, fields = CASES[case]
    template = "Mine: {{}} " + " | ".join(f"{{{field}}}" for field in fields_of(OURS[name]))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({name: template}))
    model = validate(Model, {"path": "m", "prompts": str(tmp_path / "mine.yaml")}, "here")
    tokenizer = load_tokenizer(bpe_directory, **model.asked)
    before, after = ask(load_tokenizer(bpe_directory)), ask(tokenizer)
    ours, mine = (text.format(**FIELDS | fields) for text in (OURS[name], template))
    told = tokenizer.decode(before)
    assert ours in told and "Mine: {}" not in told
    place = told.rindex(ours) if name == "classifier_step" else told.index(ours)
    expected = told[:place] + mine + told[place + len(ours) :]
    assert tokenizer.decode(after) == expected
    special = {i for i in after if i in tokenizer._hf.all_special_ids}
    assert special == {i for i in before if i in tokenizer._hf.all_special_ids}


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"jugde": "x"}, "unknown prompt 'jugde'; did you mean 'judge'?"),
        ({"solve": "Solve it."}, r"solve: expected the fields \{question\}, found \{question\} m"),
        (
            {"judge": "{question} {chunk} \\boxed{Positive}"},
            r"\{question\}, \{history\}, \{chunk\}, found \{history\} missing and the unknown "
            r"\{Positive\}; a brace that is text stands twice",
        ),
        ({"solve": "{question} }"}, "solve: Single '}' encountered.*stands twice"),
        ({"solve": "{question!r}"}, r"\{question\} missing and the unknown \{question!r\}"),
        ({"solve": "{question:>9}"}, r"the unknown \{question:>9\}"),
        ({"solve": "{question.x} {question} {}"}, r"unknown \{question.x\}, \{\}"),
        ({"genprm_system": "{question}"}, r"genprm_system has no fields, found the unknown"),
        ({"thinkprm_yes": True}, "thinkprm_yes: expected a text, found True: put it in quotes"),
        (["solve"], "expected a mapping of prompts, found list"),
    ],
)
def test_a_template_with_other_fields_is_refused(prompts, message, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(prompts))
    with pytest.raises(UserError, match=message):
        validate(Model, {"path": "m", "prompts": str(file)}, "here")


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(UserError, match=r"(?s)solve: .*; judge: .*; unknown prompt 'x'"):
        read_prompts({"solve": "", "judge": "", "x": ""})
    (tmp_path / "twice.yaml").write_text("solve: '{question}'\nsolve: '{question}'\n")
    with pytest.raises(UserError, match="the key 'solve' is there twice"):
        read_prompts(str(tmp_path / "twice.yaml"))
    with pytest.raises(UserError, match=r"expected a file of prompts, found .*twice\.yaml"):
        read_prompts(str(tmp_path / "twic.yaml"))
    with pytest.raises(UserError, match="expected a file of prompts, or a mapping"):
        validate(Model, {"path": "m", "prompts": 3}, "here")


def test_a_number_may_be_left_out():
    assert read_prompts({"thinkprm_step": "{step}", "genprm_opening": "So: "})


def test_the_bare_style_has_no_prompts_to_replace(request):
    configs = request.config.rootpath / "configs"
    for file, key in (("smoke_rollouts", "policy"), ("smoke_judge", "model")):
        stage = yaml.safe_load((configs / f"{file}.yaml").read_text())["stage"]
        with pytest.raises(UserError, match="bare has no words to replace"):
            load_config(stage, configs / f"{file}.yaml", (f"{key}.prompts.genprm_system=x",))
    sets = ("judge.prompts.genprm_system=x",)
    with pytest.raises(UserError, match="bare has no words to replace"):
        load_config("refine", configs / "smoke_genprm_refine.yaml", sets)


# --- what is kept -------------------------------------------------------------------------------


def test_a_changed_file_is_refused_when_a_run_resumes(tmp_path):
    mine = tmp_path / "mine.yaml"
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"values": "v", "rollouts": "r", "tokenizer": "t", "prompts": str(mine)})
    )

    def config(text):
        mine.write_text(yaml.safe_dump({"judge": text}))
        return load_config("label", tmp_path / "c.yaml")

    first = config("{question} {history} {chunk}")
    RunDirectory(tmp_path / "run", "label", first).create()
    kept = load_config("label", tmp_path / "run" / "config.yaml")
    assert kept == first and kept.prompts == {"judge": "{question} {history} {chunk}"}
    other = config("{question} {history} {chunk}?")
    assert config_digest(other) != config_digest(first)
    with pytest.raises(UserError, match=r"differs in prompts\.judge: '.*chunk\}' -> '.*chunk\}\?'"):
        RunDirectory(tmp_path / "run", "label", other)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """A finished run of chunk-solutions."""
    run = tmp_path_factory.mktemp("chunked")
    (run / "config.yaml").write_text("{}")
    writer = RecordWriter(run, ChunkedSolution)
    writer.append([ChunkedSolution("t", "p", "How many?", ("It is 42.",), 1, ("kept",))])
    writer.close()
    write_manifest(run, "chunk-solutions", "", [ChunkedSolution])
    return str(run)


def test_a_trained_run_keeps_its_prompts(bpe_directory, chunked, tmp_path, monkeypatch):
    """It learns them, and later stages ask with them and with what was ours at the time."""
    tokenizer = load_tokenizer(bpe_directory)
    model = Transformer(tiny_config(vocab_size=tokenizer.vocab_size), rngs=nnx.Rngs(0))
    save_hf(model, tokenizer, str(tmp_path / "base"))
    (tmp_path / "base" / KEPT).unlink()  # no run trained it
    write_checksums(tmp_path / "base")
    mine = {"solve": "Mine: {question}"}
    learned = []
    monkeypatch.setattr(
        sft,
        "fitting_documents",
        lambda documents, length: (learned.extend(documents) or learned, 0),
    )
    settings = {
        "model": {"path": str(tmp_path / "base"), "prompts": mine},
        "examples": {"source": chunked},
        "steps": 1,
        "batch_size": 8,
        "max_length": 128,
        "training": {"optimizer": {"learning_rate": 1e-3}},
        "mesh": {"data": 8},
    }
    run = str(tmp_path / "run")
    sft.run(validate(Sft, settings, "here"), run)
    with_mine = load_tokenizer(bpe_directory, prompts=mine)
    asked = encode_solve_prompt(with_mine, "How many?", "instruct")
    assert learned[0].tokens_T[: len(asked)].tolist() == asked
    assert "Mine: How many?" in tokenizer.decode(asked)
    for prompts in ({}, mine, {"judge": OURS["judge"]}):
        kept = load_tokenizer_of(run, prompts=prompts)
        assert encode_solve_prompt(kept, "How many?", "instruct") == asked
        assert kept.prompts == {**OURS, **mine}
    for name, text in (("solve", OURS["solve"]), ("judge", OURS["judge"] + "!")):
        with pytest.raises(UserError, match=f"trained with another text of {name}.*: leave it out"):
            load_tokenizer_of(run, prompts={name: text})
    with monkeypatch.context() as later:
        later.setattr(templates, "OURS", {**OURS, "judge": "Worded anew. " + OURS["judge"]})
        assert load_tokenizer_of(run).prompts["judge"] == OURS["judge"]
        assert load_tokenizer(bpe_directory).prompts["judge"] != OURS["judge"]
    with open(tmp_path / "run" / "model" / KEPT, "a") as file:
        file.write("judge: other")
    with pytest.raises(UserError, match=KEPT):
        load_tokenizer_of(run)


@example({"genprm_system": "a\x85b\u2028"})
@given(st.dictionaries(st.sampled_from(["genprm_system", "genprm_synthesis_verify"]), st.text()))
def test_any_text_is_kept_as_it_is(tmp_path_factory, texts):
    texts = {name: text.replace("{", "{{").replace("}", "}}") for name, text in texts.items()}
    directory = tmp_path_factory.mktemp("kept")
    save_prompts(directory, {**OURS, **texts})
    file = directory / KEPT
    assert read_prompts(str(file)) == {**OURS, **texts}


def test_what_an_older_export_does_not_keep_was_ours(tmp_path):
    """One of a run without the file, and one with a text that was not ours. A model that no run
    trained may be asked in any words."""
    other = {"judge": OURS["judge"] + "!"}
    assert prompts_of(tmp_path, other, "it") == {**OURS, **other}
    assert prompts_of(tmp_path, {}, "it", trained=True) == OURS
    with pytest.raises(UserError, match="trained with another text of judge"):
        prompts_of(tmp_path, other, "it", trained=True)
    (tmp_path / KEPT).write_text("solve: 'Mine: {question}'")
    assert prompts_of(tmp_path, {}, "it") == {**OURS, "solve": "Mine: {question}"}
    with pytest.raises(UserError, match="trained with another text of judge"):
        prompts_of(tmp_path, other, "it")


def test_the_files_in_the_docs_are_read(request):
    page = (request.config.rootpath / "docs" / "models.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)\n```\n", page.replace("\\n```\\n", "FENCE"), re.DOTALL)
    found = [read_prompts(load_yaml(block)) for block in blocks]
    assert [next(iter(x)).split("_")[0] for x in found] == ["judge", "genprm", "thinkprm"]
    assert "\\boxed{Positive}" in found[0]["judge"].format(question="", history="", chunk="")
