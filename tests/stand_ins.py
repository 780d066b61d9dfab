"""Stand-ins for what the recipes read: models, tokenizers and data sets of the real forms, and a
teacher behind a server. Nothing is downloaded.

A model of them is a Markov chain over a few tokens: it writes solutions whose answer is 1 or 2,
with chunks and without, and judgments that say Positive or Negative, each at random. So rollouts
are right and wrong, values differ, and rewards have variance, though no model was trained.
"""

import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from stepwiser_jax.text.templates import OURS
from stepwiser_jax.text.tokenizer import load_tokenizer

END = "<|im_end|>"
CHAIN = {
    "\u010a": {"<chunk": 0.45, "First": 0.2, "Analysis": 0.35},
    "<chunk": {">Let": 0.5, ">So": 0.5},
    ">Let": {"\u0120us": 1},
    "\u0120us": {"\u0120add": 1},
    "\u0120add": {"</": 1},
    "</": {"chunk>": 1},
    "chunk>": {"<chunk": 1},
    ">So": {"\u0120$\\boxed": 1},
    "\u0120$\\boxed": {"{1}$": 0.5, "{2}$": 0.5},
    "{1}$": {"</chunk>": 1},
    "{2}$": {"</chunk>": 1},
    "</chunk>": {END: 1},
    "First": {"\u010a\u010a": 1},
    "\u010a\u010a": {"so": 1},
    "so": {"\u0120\\boxed{": 1},
    "\u0120\\boxed{": {"1}.": 0.5, "2}.": 0.5},
    "1}.": {END: 1},
    "2}.": {END: 1},
    "Analysis": {":\u0120fine": 1},
    ":\u0120fine": {".\u0120\\boxed{": 1},
    ".\u0120\\boxed{": {"Positive": 0.5, "Negative": 0.5},
    "Positive": {"}!": 1},
    "Negative": {"}!": 1},
    "}!": {END: 1},
}
"""What follows a token, as the tokenizer spells it (a line break is Ċ, a space Ġ)."""

UNKNOWN = "an id that the tokenizer does not have"
"""It follows every token, if the model has a logit for it."""

LOUDNESS = 25.0
"""Logit of what is certain; all tokens outside of the chain have 0."""

QWEN = ["<|endoftext|>", "<|im_start|>", END]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""It takes Qwen3's argument."""


def write_tokenizer(directory: Path, size: int | None = None, ordinary: int = 151_643) -> None:
    """A byte-level BPE that knows the prompts' words and the chain's tokens. With `size` it has so
    many ids, as Qwen's: `ordinary` ones, most of which nothing encodes to, then the added ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    names = ("solve", "solve_without_tags", "chunk_solution", "judge", "verdict")
    texts = [OURS[name] for name in names]
    backend.train_from_iterator([*texts, "user system assistant"] * 3, trainer)
    spelled = json.loads(backend.to_str())
    vocab = spelled["model"]["vocab"]
    for token in CHAIN:
        vocab.setdefault(token, len(vocab))
    while size is not None and len(vocab) < ordinary:
        vocab[f"unused{len(vocab)}"] = len(vocab)
    backend = Tokenizer.from_str(json.dumps(spelled))
    more = 0 if size is None else size - ordinary - len(QWEN)
    backend.add_special_tokens([*QWEN, *(f"<|added{i}|>" for i in range(more))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=QWEN[0],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    assert size is None or len(tokenizer) == size


def write_model(directory: Path, *, family: str = "qwen2", vocab_size: int | None = None) -> None:
    """The chain as a model of the family, in a directory that holds its tokenizer."""
    tokenizer = load_tokenizer(str(directory))
    spelled = json.loads((directory / "tokenizer.json").read_text())
    ids = spelled["model"]["vocab"] | {t["content"]: t["id"] for t in spelled["added_tokens"]}
    tokens = [*CHAIN, END, UNKNOWN]
    vocab_size = vocab_size or tokenizer.vocab_size
    ids[UNKNOWN] = vocab_size - 1
    width, slack = 32, len(tokens)  # one axis a token, one that makes all states equally long
    assert slack < width
    embedding = np.zeros((vocab_size, width), np.float32)
    for axis, token in enumerate(tokens):
        embedding[ids[token], axis] = 1
    targets = np.zeros((width, width), np.float32)
    length = 2 * LOUDNESS
    for axis, follows in enumerate(CHAIN.values()):
        often = {UNKNOWN: 0.2} if vocab_size > tokenizer.vocab_size else {}
        for token, share in (follows | often).items():
            targets[tokens.index(token), axis] = LOUDNESS + math.log(share)
        targets[slack, axis] = math.sqrt(length**2 - np.sum(targets[:, axis] ** 2))
    root = math.sqrt(width)
    heads, size = 2, 16
    layer = {
        "self_attn.q_proj.weight": np.zeros((heads * size, width)),
        "self_attn.k_proj.weight": np.zeros((size, width)),
        "self_attn.v_proj.weight": np.zeros((size, width)),
        "self_attn.o_proj.weight": np.zeros((width, heads * size)),
        "mlp.gate_proj.weight": np.eye(width),
        "mlp.up_proj.weight": np.eye(width),
        # What the token was is small beside what follows it.
        "mlp.down_proj.weight": 1e3 * targets,
        "input_layernorm.weight": np.ones(width),
        "post_attention_layernorm.weight": np.ones(width),
    }
    if family == "qwen2":
        for name, wide in (("q", heads * size), ("k", size), ("v", size)):
            layer[f"self_attn.{name}_proj.bias"] = np.zeros(wide)
    else:
        layer |= {f"self_attn.{name}_norm.weight": np.ones(size) for name in "qk"}
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.full(width, length / root),
        **{f"model.layers.0.{name}": array for name, array in layer.items()},
    }
    weights = {name: np.ascontiguousarray(x, np.float32) for name, x in weights.items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": family,
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]],
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": size,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))


# --- data sets, in their own columns ------------------------------------------------------------


def write_data(folder: Path, count: int = 40) -> dict[str, Path]:
    """Files in the place of hub data sets, by their ids."""
    boxed = [f"It is clear.\n\nSo \\boxed{{{1 + i % 2}}}." for i in range(count)]
    rows = {
        "AI-MO/NuminaMath-CoT": [
            {
                "source": "synthetic_math",
                "problem": f"What is {i} modulo 2, plus 1?" if i % 7 else f"Prove lemma {i}.",
                "solution": boxed[i] if i % 7 else "As was to be shown.",
                "messages": [],
            }
            for i in range(1, count)
        ],
        "HuggingFaceH4/MATH-500": [
            {
                "problem": f"What is the remainder of {i}?",
                "solution": boxed[i],
                "answer": str(1 + i % 2),
                "subject": "Algebra",
                "level": 1,
                "unique_id": f"test/algebra/{i}.json",
            }
            for i in range(4)
        ],
        "Qwen/ProcessBench": [
            {
                "id": f"{subset}-{i}",
                "generator": "Qwen2-7B-Instruct",
                "problem": f"What is {i} in {subset}?",
                "steps": ["First we add.", "So \\boxed{1}."],
                "final_answer_correct": i % 2 == 0,
                "label": -1 if i % 2 == 0 else i % 3 % 2,
            }
            for subset in ("gsm8k", "math", "olympiadbench", "omnimath")
            for i in range(4)
        ],
        "DigitalLearningGmbH/MATH-lighteval": [
            {
                "problem": f"What is {i} mod 2, plus 1?",
                "level": "Level 1",
                "solution": boxed[i],
                "type": "Algebra",
            }
            for i in range(4)
        ],
        "prm800k/phase2_train.jsonl": [
            {
                "question": {"problem": f"What is {i} times 2?", "ground_truth_answer": "2"},
                "label": {
                    "steps": [
                        {
                            "completions": [{"text": "We double it.", "rating": 1}],
                            "chosen_completion": 0,
                        },
                        {"completions": [{"text": "So it is 2.", "rating": -1}]},
                    ],
                    "finish_reason": "found_error",
                },
            }
            for i in range(4)
        ],
    }
    files = {}
    for name, content in rows.items():
        files[name] = folder / name.split("/")[-1].removesuffix(".jsonl") / "rows.jsonl"
        files[name].parent.mkdir(parents=True)
        files[name].write_text("".join(json.dumps(row) + "\n" for row in content))
    return files


MODELS = (
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-Math-7B-Instruct",
    "Qwen/Qwen3-8B",
    "Qwen/QwQ-32B-Preview",
    "Qwen/QwQ-32B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "meta-llama/Llama-3.1-70B-Instruct",
)


def with_stand_ins(configs: list[Path], folder: Path, names: dict[str, Path]) -> None:
    """Copies of the configs that name what is here in the place of what is on the hub."""
    folder.mkdir(exist_ok=True)
    for file in configs:
        text = file.read_text()
        for name in sorted(names, key=len, reverse=True):
            text = re.sub(rf"(?<![\w/.-]){re.escape(name)}(?![\w/-])", str(names[name]), text)
        (folder / file.name).write_text(text)


# --- the teacher --------------------------------------------------------------------------------


@contextmanager
def teacher(directory: Path) -> Iterator[str]:
    """The url of a server that cuts a solution at its blank lines."""
    tokenizer = load_tokenizer(str(directory))

    def answer(body: dict) -> dict:
        prompt = tokenizer.decode(body["prompt"])
        solution = prompt.rsplit("Solution:\n", 1)[1].split(END)[0]
        parts = [f"<chunk>{part}</chunk>" for part in solution.split("\n\n")]
        ids = [*tokenizer.encode("\n".join(parts)), tokenizer.eos_ids[0]]
        logprobs = {"token_logprobs": [-1.0] * len(ids)}
        return {"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": "stop"}]}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.dumps(answer(body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
