"""Asks an exported judge in another library, greedily, and compares what several libraries say.

    stepwiser check EXPORT --file ITEMS --json                    > ours.jsonl
    python ask_exported_judge.py EXPORT ITEMS --with transformers > transformers.jsonl
    python ask_exported_judge.py EXPORT ITEMS --with vllm         > vllm.jsonl
    python ask_exported_judge.py --compare ours.jsonl vllm.jsonl

It needs nothing of stepwiser_jax but the export, which `stepwiser convert` wrote. ITEMS is a JSON
list, or JSON lines, of objects with `problem` and `steps`, as ProcessBench's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERDICT = re.compile(r"\\boxed\s*\{\s*(Positive|Negative)\s*\}")

Message = Callable[[str, list[str], str], str]
"""(question, chunks before, chunk) -> what the judge is asked."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", metavar="EXPORT ITEMS | RESULTS RESULTS")
    parser.add_argument("--with", dest="library", choices=["transformers", "vllm"])
    parser.add_argument("--compare", action="store_true", help="compare two files of results")
    arguments = parser.parse_args()
    if len(arguments.paths) != 2 or arguments.compare == (arguments.library is not None):
        parser.error("expected EXPORT ITEMS --with LIBRARY, or --compare RESULTS RESULTS")
    if arguments.compare:
        compare(*map(Path, arguments.paths))
        return
    export, items = map(Path, arguments.paths)
    ask = {"transformers": with_transformers, "vllm": with_vllm}[arguments.library]
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)  # vLLM logs to stdout, in processes of its own
        for line in results(export, read_items(items), ask):
            print(json.dumps(line, ensure_ascii=False), file=output)


def read_items(path: Path) -> list[dict[str, Any]]:
    """Returns the items of a JSON list, or of JSON lines."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines()]


def results(
    export: Path, items: list[dict[str, Any]], ask: Callable[[Path, list[str]], list[str]]
) -> list[dict[str, Any]]:
    """Returns for each item its chunks, with verdict and reasoning, as `stepwiser check --json`."""
    message = message_of(export)
    asked = [
        message(item["problem"].strip(), [text.strip() for text in item["steps"][:j]], step.strip())
        for item in items
        for j, step in enumerate(item["steps"])
    ]
    print(f"{len(asked)} chunks", file=sys.stderr)
    written = iter(ask(export, asked))
    found = []
    for item in items:
        chunks = []
        for step in item["steps"]:
            text = next(written)
            verdicts = VERDICT.findall(text)
            chunks.append(
                {
                    "text": step,
                    "verdict": verdicts[-1] if verdicts else "Unparsed",
                    "reasoning": text,
                }
            )
        found.append({"id": item.get("id"), "chunks": chunks})
    return found


def message_of(export: Path) -> Message:
    """Returns the function that makes the judge's message, as the model card has it."""
    import yaml

    style = yaml.safe_load((export / "stepwiser_judge.yaml").read_text())["judge"]["prompt_style"]
    prompts = yaml.safe_load((export / "stepwiser_prompts.yaml").read_text())

    def bare(question: str, before: list[str], chunk: str) -> str:
        chunks = [f"<chunk> {text} </chunk>" for text in (*before, chunk)]
        return " ".join([question, *chunks, "<judge>"])

    def with_instructions(question: str, before: list[str], chunk: str) -> str:
        template = prompts["verdict" if style == "verdict" else "judge"]
        return template.format(question=question, history="\n\n".join(before), chunk=chunk)

    return bare if style == "bare" else with_instructions


def dtype_of(export: Path) -> str:
    """Returns the type of the weights. By itself vLLM rounds float32 to bfloat16."""
    return json.loads((export / "config.json").read_text())["dtype"]


def limit_of(export: Path) -> int:
    """Returns the number of tokens that a judgment may have."""
    return json.loads((export / "generation_config.json").read_text())["max_new_tokens"]


def with_transformers(export: Path, messages: list[str]) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export, dtype="auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    texts = []
    for message in messages:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=limit_of(export))
        new = output[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
        print(f"{len(texts)} of {len(messages)}", file=sys.stderr)
    return texts


def with_vllm(export: Path, messages: list[str]) -> list[str]:
    from vllm import LLM, SamplingParams

    llm = LLM(str(export), dtype=dtype_of(export))
    outputs = llm.chat(
        [[{"role": "user", "content": message}] for message in messages],
        SamplingParams(temperature=0, max_tokens=limit_of(export)),
    )
    return [output.outputs[0].text for output in outputs]


def compare(a: Path, b: Path) -> None:
    """Prints how many verdicts and texts of two files are equal, and the chunks that differ."""
    of_a, of_b = (
        [chunk for item in read_items(path) for chunk in item["chunks"]] for path in (a, b)
    )
    if [chunk["text"].strip() for chunk in of_a] != [chunk["text"].strip() for chunk in of_b]:
        sys.exit(f"expected the same chunks in {a} and {b}, found others: ask about the same items")
    pairs = list(zip(of_a, of_b, strict=True))
    verdicts = sum(x["verdict"] == y["verdict"] for x, y in pairs)
    texts = sum(x["reasoning"].strip() == y["reasoning"].strip() for x, y in pairs)
    print(f"{verdicts} of {len(pairs)} verdicts are equal, and {texts} texts")
    for x, y in pairs:
        if x["verdict"] != y["verdict"]:
            print(f"\n{x['text']}\n  {a}: {x['reasoning']}\n  {b}: {y['reasoning']}")


if __name__ == "__main__":
    main()
