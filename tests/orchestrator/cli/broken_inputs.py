"""Broken models, tokenizers and data, the error that each must give, and the command line that gives it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from orchestrator.cli import main

# What plain lines of progress begin with.
STAGES = ("estimate: ", "no perplexity is measured: ", "layer similarities: ", "pruning: ", "perplexity, ")
Broken = Callable[[Path], None]


def config_with(**changes: Any) -> Broken:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights_with(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Broken:
    """Replace one tensor of a model; by None, leave it out."""

    def write(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        changed = change(tensors.pop(name))
        save_file(tensors | ({name: changed} if changed is not None else {}), model / "model.safetensors")

    return write


def spoilt(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return spoil


def truncated(name: str, length: int) -> Broken:
    def truncate(model: Path) -> None:
        (model / name).write_bytes((model / name).read_bytes()[:-length])

    return truncate


def removed(name: str) -> Broken:
    return lambda model: (model / name).unlink()


def pickle_only(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def written(name: str, content: bytes) -> Broken:
    return lambda model: (model / name).write_bytes(content) and None


def lengthened(name: str, length: int) -> Broken:
    """Give a file a length that takes no room on the disk."""

    def lengthen(model: Path) -> None:
        with (model / name).open("ab") as file:
            file.truncate(length)

    return lengthen


def indexed(weight_map: object) -> Broken:
    """Leave a model's weights to an index alone: a whole file would be preferred to it."""

    def index(model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return index


# What is wrong with the model, and what must be said of it; all known before Ray starts.
BROKEN_MODELS: dict[str, tuple[Broken, str]] = {
    "gone": (shutil.rmtree, "does not exist: pass a directory or a hub id"),
    "no config": (removed("config.json"), "has no config.json"),
    "config is no JSON": (written("config.json", b"{nope"), "config.json is not valid JSON"),
    "config of wrong types": (config_with(num_hidden_layers="three"), "its config.json is wrong"),
    "truncated": (truncated("model.safetensors", 1000), "shard model.safetensors .* truncated or broken"),
    "no weights": (removed("model.safetensors"), "holds no weights"),
    "pickle only": (pickle_only, "only the pickle pytorch_model.bin: convert it to safetensors"),
    "other family": (
        config_with(model_type="gpt2"),
        "'gpt2' are not supported: their linear maps",
    ),
    "unknown family": (config_with(model_type="wombat"), "'wombat' are not supported; supported: llama"),
    "more layers in the config": (config_with(num_hidden_layers=5), "no tensors of layer 3.* incomplete"),
    "a tensor is missing": (
        weights_with("model.layers.1.mlp.up_proj.weight", lambda tensor: None),
        "layer 1 of .* has no mlp.up_proj.weight",
    ),
    "other shapes in the config": (config_with(intermediate_size=64), "layer 0 of .* does not fit its config.json"),
    "layers without end": (config_with(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected .* 4,096"),
    "a huge width": (config_with(hidden_size=10**12), "hidden_size is 1000000000000, expected a whole number"),
    "a huge vocabulary": (config_with(vocab_size=10**12), "vocab_size is 1000000000000"),
    "no heads": (config_with(num_attention_heads=0), "num_attention_heads is 0, expected a whole number from 1"),
    "negative heads": (config_with(num_key_value_heads=-2), "num_key_value_heads is -2"),
    "no number": (config_with(hidden_size=float("nan")), "hidden_size is nan"),
    "a table of labels": (config_with(num_labels=10**10), "num_labels is 10000000000"),
    "quantised": (config_with(quantization_config={"bits": 4}), "quantised: pass the model in bfloat16"),
    "a config nested too deeply": (written("config.json", b"[" * 10**6), "config.json is nested too deeply"),
    "a config of a terabyte": (
        lengthened("config.json", 1 << 40),
        "config.json cannot be read .it has 1,099,511,627,776 bytes, and such a file needs no more",
    ),
    "a header of a terabyte": (
        written("model.safetensors", (10**12).to_bytes(8, "little") + b"{}"),
        "shard model.safetensors .* truncated or broken .*: download it again",
    ),
    "integer weights": (
        weights_with("model.layers.0.mlp.up_proj.weight", lambda tensor: tensor.to(torch.int8)),
        "layer 0 of .* holds mlp.up_proj.weight as I8: pass the model in bfloat16",
    ),
    "an index that leaves the directory": (
        indexed({"model.norm.weight": "../other/model.safetensors"}),
        "model.norm.weight is in '../other/model.safetensors', which is not the name of a safetensors file",
    ),
    "an index of pickles": (
        indexed({"model.norm.weight": "pytorch_model.bin"}),
        "in 'pytorch_model.bin', which is not the name of a safetensors file",
    ),
    "an index of nothing": (indexed([]), "model.safetensors.index.json is truncated or broken"),
}
# A tokenizer that cannot be used, where the calibration data are a text.
BROKEN_TOKENIZERS: dict[str, tuple[Broken, str]] = {
    "no tokenizer": (removed("tokenizer.json"), "has no (tokenizer that loads|vocabulary).*: add its files"),
    "empty": (written("tokenizer.json", b""), "has no tokenizer that loads .*: add its files, or give token blocks"),
    "of another kind": (written("tokenizer.json", b"[1]"), "has no tokenizer that loads .*: add its files"),
    "with code": (
        written("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'),
        "has no tokenizer that loads .*: add its files",
    ),
}
# The same, found by the workers.
DAMAGED_MODELS: dict[str, tuple[Broken, str]] = {
    "logits overflow": (
        weights_with("lm_head.weight", lambda tensor: torch.full_like(tensor, 3e38)),
        "perplexity, dense: the logits on .* NaN or infinity",
    ),
    "nan in a layer": (
        weights_with("model.layers.1.mlp.up_proj.weight", spoilt(float("nan"))),
        "layer 1 of .* NaN or infinity in mlp.up_proj.weight",
    ),
    "infinity in the embedding": (
        weights_with("model.embed_tokens.weight", spoilt(float("inf"))),
        "model.embed_tokens of .* NaN or infinity",
    ),
    "activations overflow": (
        weights_with("model.layers.2.self_attn.v_proj.weight", lambda tensor: tensor * 1e38),
        "layer 2: the activations of .* NaN or infinity",
    ),
}


def table(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


ROW = [1] * 16
BROKEN_DATA: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("x.parquet", lambda path: None, "no such file: check the path"),
    "empty": ("x.txt", text(""), "the file is empty"),
    "no rows": ("x.parquet", table(input_ids=pa.array([], pa.list_(pa.int32()))), "has no rows"),
    "shorter than a block": ("x.txt", text("one two three"), "3 tokens found, and one block needs 64: give more text"),
    "no column": ("x.parquet", table(words=[ROW]), "neither 'text' nor 'input_ids' among the columns .words."),
    "outside the vocabulary": ("x.parquet", table(input_ids=[ROW, [97] * 16]), "token id 97 in row 1, .* has 97"),
    "negative": ("x.parquet", table(input_ids=[ROW, [-1] * 16]), "token id -1 in row 1"),
    "a mask with a hole": (
        "x.parquet",
        table(input_ids=[ROW], attention_mask=[[1, 0] * 8]),
        "row 0 has padding between its tokens",
    ),
    "longer than the model takes": ("x.parquet", table(input_ids=[[1] * 65]), "65 tokens, the model takes 64"),
    "truncated": ("x.parquet", text("PAR1"), "not readable as a whole parquet file"),
    "no arrow": ("x.arrow", text("these are words"), "not readable as a whole arrow file"),
    "another kind": ("x.tab", text("text"), "unknown file type '.tab': use .txt"),
    "no JSON": ("x.jsonl", text('{"text": \n'), "line 1 is not JSON"),
    "nested too deeply": ("x.jsonl", text('{"text": ' + "[" * 10**5), "line 1 is nested too deeply: drop it"),
    "no object": ("x.jsonl", text("[1]"), "line 1 is not an object"),
    "no text": ("x.jsonl", text('{"body": "one"}'), r"no 'text' among the columns \(body\)"),
    "null": ("x.jsonl", text('{"text": null}'), "'text' is null: give a string"),
    "no UTF-8": ("x.txt", lambda path: path.write_bytes(b"caf\xe9") and None, "not readable as UTF-8 text"),
    "fractions": ("x.parquet", table(input_ids=[[0.5] * 16]), "'input_ids' holds list<.*: store lists of integers"),
}


class Cli:
    """Runs `slimllm prune` in a directory of its own and checks how it failed."""

    def __init__(self, directory: Path, tracking_uri: str) -> None:
        self.output, self.tracking_uri = directory / "parent" / "out", tracking_uri

    def run(self, *arguments: object) -> Result:
        command = ["prune", "--output", self.output, "--tracking-uri", self.tracking_uri, *arguments]
        return CliRunner().invoke(main, [str(argument) for argument in command])

    def fails(self, said: str, *arguments: object, with_progress: bool = False) -> None:
        """Check a run's exit code, its one line (below lines of progress, where workers found it), and what is left."""
        result = self.run(*arguments)
        assert isinstance(result.exception, SystemExit), result.output
        *progress, line = result.stderr.splitlines()
        assert result.exit_code == 2, line
        assert all(with_progress and shown.startswith(STAGES) for shown in progress), progress
        assert not result.stdout
        assert line.startswith("slimllm: ")
        assert re.search(said, line), line
        # Neither this process's traceback nor a worker's.
        assert "Traceback" not in result.output
        assert "ray::" not in line
        assert not self.output.parent.exists()
