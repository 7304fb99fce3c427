"""Lists the engines by the value of `--engine`, and defines those that are not transformers.

The engines of vLLM and llama.cpp use only the documented calls of their packages, which slimllm does not require.
"""

import os
import time
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from orchestrator.config import ConfigError
from orchestrator.speed.config import COMPILED, LLAMA_CPP, TRANSFORMERS, VLLM
from slimllm_ops.timing.engines import CompiledEngine, OpenEngine, TransformersEngine
from slimllm_ops.timing.generation import Generation, random_prompts

# The package of an engine, and the command that installs it.
PACKAGES = {VLLM: ("vllm", "pip install vllm"), LLAMA_CPP: ("llama_cpp", "pip install llama-cpp-python")}


def require_installed(engine: str) -> None:
    """Check that an engine's package is installed.

    Raises:
        ConfigError: It is not.
    """
    package, command = PACKAGES.get(engine, ("transformers", ""))
    if find_spec(package) is None:
        raise ConfigError(
            f"engine {engine} needs the package {package}, which is not installed: run `{command}`, or pass "
            f"--engine {TRANSFORMERS}"
        )


class VllmEngine:
    """A model in vLLM, in this process.

    vLLM gives whole answers. So the prompts are timed with one new token, and then with all of them. The difference is
    the time of the later tokens; single tokens have no times.
    """

    def __init__(self, directory: Path, most_tokens: int) -> None:
        # vLLM's own processes would not know the classes of pruned models, which `slimllm_ops` registers in this one.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self._vllm = import_module("vllm")
        self._model = self._vllm.LLM(
            str(directory), max_model_len=most_tokens, skip_tokenizer_init=True, enable_prefix_caching=False
        )
        self._vocab_size = self._model.get_model_config().get_vocab_size()
        self.described = f"vLLM {self._vllm.__version__}"

    def generate(self, batch_size: int, length: int, new_tokens: int, seed: int) -> Generation:
        """Generate tokens after random prompts, and time them."""
        prompts = random_prompts(self._vocab_size, batch_size, length, seed).tolist()
        first_seconds, _ = self._answer(prompts, 1)
        seconds, tokens = self._answer(prompts, new_tokens)
        return Generation(first_seconds, seconds - first_seconds, (), tokens)

    def profile(self, batch_size: int, length: int, seed: int) -> dict[str, float]:
        """Return nothing: vLLM's kernels have names of their own."""
        return {}

    def _answer(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, tuple[tuple[int, ...], ...]]:
        """Return the seconds of answers with that many tokens, and the tokens."""
        sampling = self._vllm.SamplingParams(
            temperature=0, min_tokens=new_tokens, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self._model.generate(asked, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, tuple(tuple(answer.outputs[0].token_ids) for answer in answers)


class LlamaCppEngine:
    """A GGUF file in llama.cpp, one sequence at a time."""

    def __init__(self, file: Path, most_tokens: int) -> None:
        threads = int(os.environ["OMP_NUM_THREADS"]) if "OMP_NUM_THREADS" in os.environ else None
        package = import_module("llama_cpp")
        self._model = package.Llama(
            str(file), n_ctx=most_tokens, n_gpu_layers=-1, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.described = f"llama-cpp-python {package.__version__}"

    def generate(self, batch_size: int, length: int, new_tokens: int, seed: int) -> Generation:
        """Generate tokens after a random prompt, and time them."""
        (tokens,) = random_prompts(self._model.n_vocab(), batch_size, length, seed).tolist()
        self._model.reset()
        times, chosen = [time.perf_counter()], []
        for _ in range(new_tokens):
            self._model.eval(tokens)
            tokens = [self._model.sample(temp=0.0)]
            times.append(time.perf_counter())
            chosen += tokens
        steps = tuple(after - before for before, after in pairwise(times))
        return Generation(steps[0], times[-1] - times[1], steps[1:], (tuple(chosen),))

    def profile(self, batch_size: int, length: int, seed: int) -> dict[str, float]:
        """Return nothing: torch does not compute here."""
        return {}


ENGINES: dict[str, OpenEngine] = {
    TRANSFORMERS: TransformersEngine,
    COMPILED: CompiledEngine,
    VLLM: VllmEngine,
    LLAMA_CPP: LlamaCppEngine,
}
