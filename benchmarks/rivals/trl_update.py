"""One GRPO update by TRL's GRPOTrainer on one core, in the interpreter that has it.

    python trl_update.py DIR WORKLOAD.json UPDATES      -> one line of JSON

float32 weights under bfloat16 autocast (its default), micro-batches of 8. The first step samples
its completions; they are then used again, so that later steps are forward, backward and AdamW.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

model_dir, workload_file, updates = sys.argv[1], sys.argv[2], int(sys.argv[3])
workload = json.loads(Path(workload_file).read_text())
train = workload["train"]
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
model.generation_config.eos_token_id = None
config = GRPOConfig(
    output_dir=tempfile.mkdtemp(),
    use_cpu=True,
    bf16=True,
    report_to=[],
    save_strategy="no",
    per_device_train_batch_size=8,
    gradient_accumulation_steps=train["prompts"] * train["samples"] // 8,
    num_generations=train["samples"],
    max_completion_length=train["completion_len"],
    temperature=1.0,
    beta=0.0,
    learning_rate=train["lr"],
    max_steps=updates + 1,
    gradient_checkpointing=False,
    generation_kwargs={"min_new_tokens": train["completion_len"]},
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
prompts = [tokenizer.decode(ids) for ids in workload["prompts"][: train["prompts"]]]


def reward(completions, **_):
    return [float(len(text) % 7) for text in completions]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=config,
    train_dataset=Dataset.from_dict({"prompt": prompts * (updates + 1)}),
    processing_class=tokenizer,
)
generate = trainer._generate_and_score_completions
kept = {}
seconds = {"steps": []}


def once(inputs):
    if not kept:
        start = time.process_time()
        kept.update(generate(inputs))
        seconds["generation"] = time.process_time() - start
    return dict(kept)


class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        self.start = time.process_time()

    def on_step_end(self, *_, **__):
        seconds["steps"].append(time.process_time() - self.start)


trainer._generate_and_score_completions = once
trainer.add_callback(Clock())
trainer.train()
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
found = {"runs": seconds["steps"][1:], "generation": seconds["generation"], "peak_mib": peak}
print(json.dumps(found), flush=True)
