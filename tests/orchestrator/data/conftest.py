"""Fixtures for tests of data: a model's tokenizer, and the loader of blocks for it.

The tokenizer gives the word "wN" the id N + 3, a line break 2, the start of a document 1, and everything else 0. So the
expected output of a source can be written down without a tokenizer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from orchestrator.data import TextOptions, TokenBlocks, load_tokens
from tests.orchestrator.data.sample_files import VOCAB_SIZE


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = {"<unk>": 0, "<s>": 1, "\n": 2} | {f"w{n}": n + 3 for n in range(100)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n"), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")
    path = tmp_path_factory.mktemp("words")
    fast.save_pretrained(path)
    return path


@pytest.fixture
def load(model_dir: Path) -> Callable[..., TokenBlocks]:
    """Loads for a model whose limits are out of the way, unless the test sets them."""

    def loader(spec: str | Path, **changes: Any) -> TokenBlocks:
        options = TextOptions(
            samples=changes.pop("samples", 1000),
            sequence_length=changes.pop("sequence_length", 8),
            seed=changes.pop("seed", 0),
        )
        model: dict[str, Any] = {"model_dir": model_dir, "vocab_size": VOCAB_SIZE, "max_length": 64} | changes
        return load_tokens(str(spec), **model, options=options)

    return loader
