"""Serves a model in vLLM, and prints what it answers; run it by the Python of vLLM's environment.

Usage: vllm_answers.py MODEL PROMPTS NUM_TOKENS [SETTINGS], where PROMPTS is JSON: lists of token ids.

The last line is JSON: the greedy `tokens` after each prompt, the bytes that a token takes in each layer's cache, how
many tokens the whole cache holds, and vLLM's class for the model.
"""

import json
import os
import sys
from typing import Any

# The engine in this process, where its caches can be looked at.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def answer(model: str, prompts: list[list[int]], num_tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens that follow each prompt, and the size of the caches."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, skip_tokenizer_init=True, max_model_len=128, dtype="float32", **settings)
    greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    specs = runner.get_kv_cache_spec()
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cache_bytes_per_token": {name: spec.page_size_bytes // spec.block_size for name, spec in specs.items()},
        "cache_tokens": runner.kv_cache_config.num_blocks * min(spec.block_size for spec in specs.values()),
        "class": type(runner.get_model()).__name__,
    }


if __name__ == "__main__":
    model, prompts, num_tokens, *settings = sys.argv[1:]
    found = answer(model, json.loads(prompts), int(num_tokens), json.loads(settings[0]) if settings else {})
    print(json.dumps(found))
