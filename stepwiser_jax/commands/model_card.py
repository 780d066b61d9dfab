"""Writes the card of an exported model: what it is, its training and scores, how it is asked.

Every number stands in the run, or in a run that evaluated the model. What was not measured is said
to be so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stepwiser_jax.config_files import read_run_settings
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.settings import KEPT
from stepwiser_jax.manifest import read_manifest, read_run_json
from stepwiser_jax.runs.checkpoint_paths import is_hub_id
from stepwiser_jax.text.templates import Prompts

BARE_TEMPLATE = """\
{%- if messages | length != 1 or messages[0].role != "user" -%}
{{ raise_exception("expected one message, of the user: this model was trained on nothing else") }}
{%- endif -%}
{{ bos_token or "" }}{{ messages[0].content }}"""
"""The chat template of a model that was trained on texts alone, in the prompt style `bare`."""

WHAT = {
    "judge": (
        "A judge of chunks of reasoning",
        "It reads a problem, the chunks of a solution so far and a new chunk. It reasons about the "
        "chunk, and then writes `\\boxed{Positive}` or `\\boxed{Negative}`.",
    ),
    "classifier": (
        "A classifier of chunks of reasoning",
        "It reads a problem and a solution, and says after each chunk how likely it is that the "
        "chunk is right.",
    ),
    "model": ("A fine-tuned language model", "It was fine-tuned on demonstrations."),
}

LIBRARY = {True: "transformers", False: "stepwiser_jax"}
"""What loads the model, by whether it is a language model."""

TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH)
messages = [{"role": "user", "content": MESSAGE}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

VLLM = """\
from vllm import LLM, SamplingParams

llm = LLM(PATH, dtype="DTYPE")  # by itself vLLM rounds float32 to bfloat16
messages = [{"role": "user", "content": MESSAGE}]
(output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=NEW))
print(output.outputs[0].text)"""


def kind_of(settings: Mapping[str, Any]) -> str:
    """Returns what a training run with these settings makes, a key of `WHAT`."""
    return "judge" if "grpo" in settings else "classifier" if "head" in settings else "model"


def model_card(
    run_dir: Path,
    settings: Mapping[str, Any],
    prompts: Prompts,
    evaluations: Sequence[Path],
    *,
    dtype: str,
    adapters: bool = False,
) -> str:
    """Returns the text of README.md for the model of a training run.

    Args:
        run_dir: The run.
        settings: Its settings.
        prompts: What the model is asked with.
        evaluations: Finished runs of `evaluate` whose judge is this model.
        dtype: What the weights are stored in.
        adapters: Whether only the adapters are exported.

    Raises:
        UserError: A run of `evaluations` is none, or is of another model.
    """
    kind = kind_of(settings)
    title, what = WHAT[kind]
    is_language_model = settings.get("head") != "scalar"
    head: dict[str, Any] = {
        "library_name": "peft" if adapters else LIBRARY[is_language_model],
        "tags": ["stepwiser", *(["process-reward-model"] if kind != "model" else [])],
    }
    if is_language_model:
        head["pipeline_tag"] = "text-generation"
    base = settings["model"]["path"]
    if is_hub_id(base):
        head["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {title}\n\n{what} It was trained with stepwiser_jax, an implementation of "
        "[StepWiser](https://arxiv.org/abs/2508.19229).",
        _training(run_dir, settings, adapters),
        _scores(run_dir, evaluations),
        _asking(kind, settings, prompts, None if adapters else dtype),
        _limits(kind, settings),
    ]
    return "\n\n".join(parts) + "\n"


def _training(run_dir: Path, settings: Mapping[str, Any], adapters: bool) -> str:
    summary = _summary(run_dir)
    lora = settings["model"]["lora"]
    how = f", with adapters of rank {lora['rank']}" if lora else ""
    lines = [
        f"- Base: `{settings['model']['path']}`{how}"
        + (", which are merged" if lora and not adapters else ""),
        f"- Data: `{settings['examples']['source']}`"
        + (f", {summary['examples']} examples" if "examples" in summary else ""),
        f"- Prompt style: `{settings['prompt_style']}`; seed {settings['seed']}",
    ]
    length = [
        f"{name.capitalize()}: {summary[name]}"
        for name in ("iterations", "steps")
        if name in summary
    ]
    optimizer = settings["training"]["optimizer"]
    lines.append(
        f"- {length[0] if length else 'The run has not finished'}, AdamW with learning rate "
        f"{optimizer['learning_rate']:g} ({optimizer['schedule']})"
    )
    if "grpo" in settings:
        lines.append(
            f"- GRPO: {settings['prompts_per_iteration']} chunks an iteration, groups of "
            f"{settings['group_size']}, reward `{settings['reward']}`, "
            f"kl_coef {settings['grpo']['kl_coef']:g}"
        )
    return "## Training\n\n" + "\n".join(lines)


def _summary(run_dir: Path) -> dict[str, Any]:
    is_finished = (run_dir / "manifest.json").is_file()
    return read_run_json(run_dir, "summary.json") if is_finished else {}


def _scores(run_dir: Path, evaluations: Sequence[Path]) -> str:
    text = "## Scores\n\n"
    validation = _summary(run_dir).get("validation")
    if validation is not None:
        found = ", ".join(
            f"{name.removeprefix('best_')} {value:.3f}"
            for name, value in validation.items()
            if name.startswith("best_") and name != "best_iteration" and value is not None
        )
        text += (
            f"On {validation['examples']} held-out examples of its own training: {found} at "
            f"iteration {validation['best_iteration']}, the best; exported is iteration "
            f"{validation['exported_iteration']}.\n\n"
        )
    if not evaluations:
        return text + "No benchmark was measured for this card."
    rows = [row for path in evaluations for row in _rows(run_dir, path)]
    return (
        f"{text}Greedy verdicts, percent, with 95% intervals over items.\n\n"
        "| benchmark | items | F1 | first errors found | right solutions accepted | AUC |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(rows)
    )


def _rows(run_dir: Path, evaluation: Path) -> list[str]:
    """Returns the rows of a run of `evaluate`. Raises UserError if its judge is another model."""
    stage, settings = read_manifest(evaluation)["stage"], read_run_settings(evaluation)
    if stage != "evaluate":
        raise UserError(f"--scores: expected a run of evaluate, found one of {stage}: {evaluation}")
    path = Path(settings["judge"]["path"])
    judged = path.parent if path.name == "model" else path
    if judged.resolve() != run_dir.resolve():
        raise UserError(
            f"--scores: expected a run that evaluated {run_dir}, found {evaluation}, which "
            f"evaluated {path}"
        )
    subsets = read_run_json(evaluation, "summary.json").get("greedy", {}).get("subsets", {})
    if not subsets:
        raise UserError(
            f"--scores: expected the greedy verdicts of a benchmark in {evaluation}, found none: "
            "name a run of evaluate on ProcessBench, with `greedy: true`"
        )
    columns = ("official_f1", "official_acc_error", "official_acc_correct", "auc")
    rows = []
    for name, of_subset in subsets.items():
        numbers = {"auc": of_subset.get("auc")}
        numbers |= {f"official_{key}": x for key, x in of_subset.get("official", {}).items()}
        cells = (_cell(numbers.get(key), of_subset.get(f"{key}_interval")) for key in columns)
        rows.append(f"| {name} | {of_subset['items']} | {' | '.join(cells)} |")
    return rows


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "not measured"
    text = f"{100 * value:.1f}"
    return (
        text
        if interval is None
        else text + " [{:.1f}, {:.1f}]".format(*(100 * bound for bound in interval))
    )


# --- how it is asked ----------------------------------------------------------------------------


def _asking(kind: str, settings: Mapping[str, Any], prompts: Prompts, dtype: str | None) -> str:
    """Returns how the model is asked, with weights of this type; None: it is adapters alone."""
    own = "stepwiser check PATH --file mine.txt    # a problem, a blank line, and its solution"
    text = "## How it is asked\n\n"
    if kind != "model" and dtype is not None:
        text += f"With stepwiser_jax, which reads `{KEPT}`:\n\n```bash\n{own}\n```\n\n"
    if kind == "classifier":
        return text + "Other libraries do not know where it answers."
    libraries = "transformers and peft" if dtype is None else "transformers or vLLM"
    text += f"With {libraries}, through its chat template and nothing else"
    text += " (`tokenizer(text)` leaves out the start token):" if _is_bare(settings) else ":"
    new = str(settings["sampling"]["max_new_tokens"]) if kind == "judge" else "1024"
    message = _message(kind, settings, prompts)
    blocks = [message, TRANSFORMERS.replace("NEW", new)]
    if dtype is not None:
        blocks.append(VLLM.replace("NEW", new).replace("DTYPE", dtype))
    return text + "\n\n" + "\n\n".join(f"```python\n{block}\n```" for block in blocks)


def _message(kind: str, settings: Mapping[str, Any], prompts: Prompts) -> str:
    """Returns Python that makes MESSAGE."""
    path = 'PATH = "."  # this directory, or the hub id of the model\n\n'
    if kind == "model":
        return f'{path}MESSAGE = "..."  # as in the data that it was trained on'
    if _is_bare(settings):
        return (
            path
            + '''\
def message(question, before, chunk):
    """Asks about a chunk, after the chunks before it, as the model was trained."""
    chunks = [f"<chunk> {text} </chunk>" for text in (*before, chunk)]
    return " ".join([question, *chunks, "<judge>"])

MESSAGE = message("...", ["..."], "...")'''
        )
    template = prompts["verdict" if settings["prompt_style"] == "verdict" else "judge"]
    return f'''\
{path}TEMPLATE = {_literal(template)}

def message(question, before, chunk):
    """Asks about a chunk, after the chunks before it, as the model was trained."""
    return TEMPLATE.format(question=question, history="\\n\\n".join(before), chunk=chunk)

MESSAGE = message("...", ["..."], "...")'''


def _literal(text: str) -> str:
    """Returns a literal of Python that is the text, with its line breaks if it can have them."""
    is_raw = "'''" not in text and not text.endswith(("'", "\\"))
    return f"r'''{text}'''" if is_raw else repr(text)


def _is_bare(settings: Mapping[str, Any]) -> bool:
    return settings["prompt_style"] == "bare"


def _limits(kind: str, settings: Mapping[str, Any]) -> str:
    lines = [
        "- It knows texts like those it was trained on. Of any others it speaks with the same "
        "confidence; what was measured stands above.",
    ]
    if kind == "judge":
        lines.append(
            "- A verdict is about one chunk, and no proof. A judgment without a box has no verdict."
        )
    lines.append("- The licence of the base and of the data holds for it: add yours to this card.")
    return "## Limits\n\n" + "\n".join(lines)
