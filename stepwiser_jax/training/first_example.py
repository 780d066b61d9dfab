"""Shows the first example of a training as the model gets it: the surest way to see that a prompt,
a mask or a label is wrong.

It is printed when a training begins, and kept in <run_dir>/first_example.txt. What is learned
stands between « and »; a classifier's targets follow in brackets.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from stepwiser_jax.distributed import hosts
from stepwiser_jax.files import atomic_write
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.runs.progress import printable, say
from stepwiser_jax.text.tokenizer import Tokenizer
from stepwiser_jax.training.batches import Document

if TYPE_CHECKING:
    from stepwiser_jax.rl.rollouts import RolloutGroup

FILE = "first_example.txt"

MOST = 1500
"""The characters that are printed of the example's beginning, and of its end; the file has all."""


def show_first_document(directory: RunDirectory, document: Document, tokenizer: Tokenizer) -> None:
    """Shows an example of supervised training."""
    parts = []
    start = 0
    for learned, run in itertools.groupby(document.target_mask_T.tolist()):
        end = start + len(list(run))
        text = tokenizer.decode(document.tokens_T[start:end].tolist())
        parts.append(f"«{text}»" if learned else text)
        if learned and document.targets_T is not None:
            parts.append(f"[{', '.join(f'{x:g}' for x in document.targets_T[start:end])}]")
        start = end
    head = (
        f"the first example: {len(document.tokens_T)} tokens, "
        f"{np.count_nonzero(document.target_mask_T)} of them learned (between « and »)"
    )
    _show(directory, head, "".join(parts))


def show_first_group(directory: RunDirectory, group: RolloutGroup, tokenizer: Tokenizer) -> None:
    """Shows a prompt, and its completions with what each earns."""
    head = (
        f"the first rollout group: a prompt of {len(group.prompt_ids)} tokens and "
        f"{len(group.completions_G)} completions (between « and »), each with its reward"
    )
    text = tokenizer.decode(group.prompt_ids.tolist())
    for tokens, reward in zip(group.completions_G, group.rewards_G, strict=True):
        text += f"\n«{tokenizer.decode(tokens.tolist())}» [{reward:g}]"
    _show(directory, head, text)


def _show(directory: RunDirectory, head: str, text: str) -> None:
    file = directory.create() / FILE
    if not hosts.is_primary() or file.exists():  # a run that resumes has shown it
        return
    text = printable(text)
    atomic_write(file, f"{head}\n\n{text}\n")
    if len(text) > 2 * MOST:
        cut = len(text) - 2 * MOST
        text = f"{text[:MOST]}\n[... {cut} characters, see {file} ...]\n{text[-MOST:]}"
    say(f"{directory.stage}: {head}\n{text}")
