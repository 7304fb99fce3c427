"""Tokenizers that end responses, files of instructions, and examples read as text."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from orchestrator.builtin import MODEL_DIR
from orchestrator.data import TextOptions
from orchestrator.data.examples import Examples, load_examples
from slimllm_ops.stream.padding import PADDING
from tests.orchestrator.data.sample_files import write_table


def write_instructions(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes rows, which may have different columns in a file of text."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
        return path
    return write_table(path, **{name: [row.get(name) for row in rows] for name in rows[0]})


def load_rows(path: Path | str, model: Path, **changes: Any) -> Examples:
    """Loads examples for a model whose limits are out of the way, unless the test sets them."""
    options = TextOptions(
        samples=changes.pop("samples", None),
        sequence_length=changes.pop("sequence_length", 4096),
        seed=changes.pop("seed", 0),
        tokens=changes.pop("tokens", None),
    )
    settings: dict[str, Any] = {"vocab_size": 4096, "max_length": 4096, "responses": True}
    return load_examples(str(path), model_dir=model, options=options, **settings | changes)


def sides(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """For each example, the text of its tokens that do not count, and that of those that do."""
    pairs = zip(examples.input_ids_BT, examples.counted_BT, strict=True)
    return [
        (str(tokenizer.decode(ids[(ids != PADDING) & ~counted])), str(tokenizer.decode(ids[counted])))
        for ids, counted in pairs
    ]


def with_template(directory: Path, template: str, source: Path = MODEL_DIR) -> Path:
    """Saves a tokenizer that knows the marks of ChatML and has a chat template."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory
