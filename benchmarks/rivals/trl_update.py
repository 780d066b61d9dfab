"""TRL's GRPOTrainer as a side of train_step.py: `--rival trl=VENV/bin/python`.

    python3.11 -m venv VENV
    VENV/bin/pip install torch==2.13.0 trl==1.16.0

It has float32 weights under bfloat16 autocast (its default), and micro-batches of 8 rows with a
prompt each. In `update` the completions of train_step.py, with the same token ids, replace its
sampling. Its bookkeeping around an update is in the seconds of both workloads.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from typing import Any

import torch
from common import WORKLOAD, peak_mib, random_completions, reset_peak
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

TRAIN = WORKLOAD["train"]
MANY = 1000  # updates; the parent ends this process when it has seen enough


class Turns(TrainerCallback):
    """The protocol of common.serve around the trainer's own loop: a line starts an update."""

    workload = ""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.workload = sys.stdin.readline().strip()
        if not self.workload:
            raise SystemExit
        reset_peak()
        self.start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.process_time() - self.start
        print("\n" + json.dumps({"seconds": seconds, "peak_mib": peak_mib()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=True,
        report_to=[],
        save_strategy="no",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=TRAIN["prompts"] * TRAIN["samples"] // 8,
        num_generations=TRAIN["samples"],
        max_completion_length=TRAIN["completion_len"],
        temperature=1.0,
        beta=0.0,
        learning_rate=TRAIN["lr"],
        max_steps=MANY,
        gradient_checkpointing=False,
        generation_kwargs={"min_new_tokens": TRAIN["completion_len"]},
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    prompts = [tokenizer.decode(ids) for ids in WORKLOAD["prompts"][: TRAIN["prompts"]]]
    turns = Turns()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[turns],
    )
    sample = trainer._generate_single_turn
    fixed = [ids for group in random_completions() for ids in group]

    def completions(*given: Any, **named: Any) -> tuple[list[list[int]], None]:
        return sample(*given, **named) if turns.workload == "step" else (fixed, None)

    trainer._generate_single_turn = completions
    print(json.dumps({"ready": True}), flush=True)
    trainer.train()


if __name__ == "__main__":
    main()
