"""An exported judge, asked in transformers as its model card says, against the same judge here."""

import contextlib
import io
import re

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'numerics'")

from stand_ins import write_model, write_tokenizer

from stepwiser_jax import Checker, JudgeExample, run_stage, write_records
from stepwiser_jax.__main__ import main
from stepwiser_jax.judges.check import PACKAGED

QUESTION = "start 5 ; * 3 - 7 ; * 6 - 2 ?"
STEPS = ["5 * 3 = 5 ; 5 - 7 = 8", "8 * 6 = 8 ; 8 - 2 = 1"]


@pytest.fixture(scope="module", params=["bare", "instruct", "verdict"])
def export(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    path = PACKAGED
    if request.param != "bare":
        path = folder / "base"
        path.mkdir()
        write_tokenizer(path)
        write_model(path)
    examples = [
        JudgeExample(f"p/{i}", "p", QUESTION, "", f"<chunk> {text} </chunk>", i == 0)
        for i, text in enumerate(STEPS)
    ]
    write_records(folder / "examples.jsonl", examples)
    settings = {
        "model": {"path": str(path)},
        "examples": {"source": str(folder / "examples.jsonl")},
        "iterations": 1,
        "prompts_per_iteration": 2,
        "group_size": 2,
        "prompt_style": request.param,
        "max_prompt_tokens": 900,
        "row_lengths": [1024],
        "sampling": {"max_new_tokens": 24},
        "engine": {"rows": [4], "buckets": [1024] if request.param != "bare" else [192]},
        "training": {"optimizer": {"learning_rate": 1e-6}},
    }
    if request.param == "bare":
        settings |= {"max_prompt_tokens": 160, "row_lengths": [256]}
    run_stage("train-judge", settings, folder / "judge")
    arguments = ["--checkpoint", str(folder / "judge"), "--output", str(folder / "export")]
    assert main(["convert", *arguments]) == 0
    return folder / "export"


def test_the_model_card_asks_as_the_judge_was_trained(export, monkeypatch):
    """It runs the card's own lines."""
    message, ask, _ = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.S)
    monkeypatch.chdir(export)
    namespace = {}
    exec(message, namespace)
    check = Checker.load(str(export))
    found = check(QUESTION, STEPS)
    for j, judgment in enumerate(found.chunks):
        namespace["MESSAGE"] = namespace["message"](QUESTION, STEPS[:j], STEPS[j])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(ask, namespace)
        ours = check.judge.prompt_ids(check.asked(found.solution), j)
        assert namespace["inputs"]["input_ids"][0].tolist() == ours
        assert printed.getvalue().split() == judgment.completion.split()
        assert judgment.verdict.is_given or "bare" not in (export / "README.md").read_text()


def test_a_judge_that_was_trained_on_texts_alone_refuses_a_conversation(export):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    messages = [{"role": role, "content": "5"} for role in ("user", "assistant", "user")]
    if "Prompt style: `bare`" in (export / "README.md").read_text():
        with pytest.raises(Exception, match="expected one message, of the user"):
            tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        assert tokenizer.apply_chat_template(messages, tokenize=False)


def test_peft_loads_adapters_that_were_exported_alone(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra 'numerics'")
    from transformers import AutoModelForCausalLM

    settings = {
        "model": {"path": str(PACKAGED), "lora": {"rank": 4, "alpha": 6}},
        "prompt_style": "bare",
        "examples": {"source": "arithmetic-judge", "limit": 40, "seed": 0},
        "batch_size": 2,
        "max_length": 160,
        "steps": 3,
        "training": {"optimizer": {"learning_rate": 1e-2}},
    }
    run_stage("sft", settings, tmp_path / "run")
    convert = ["convert", "--checkpoint", str(tmp_path / "run"), "--output"]
    assert main([*convert, str(tmp_path / "adapters"), "--adapters"]) == 0
    base, whole = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (PACKAGED, tmp_path / "run" / "model")
    )
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")(ids).logits
        merged = whole(ids).logits
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=1e-4)
    assert main([*convert, str(tmp_path / "again"), "--adapters", "--dtype", "float32"]) == 2
    assert not (tmp_path / "again").exists()
