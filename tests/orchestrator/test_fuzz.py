"""Thousands of broken files: a model or data directory either opens, or is refused with an error for the user.

The search is the same in every run. `SLIMLLM_FUZZ=20` makes it 20 times as long.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orchestrator.config import ConfigError, PruneConfig, read_config_file
from orchestrator.data import DataError, TextOptions, load_tokens
from slimllm_ops.allocate.layer_size import measure_layer
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.tensor_index import INDEX, SINGLE
from slimllm_ops.errors import InputError

TIMES = int(os.environ.get("SLIMLLM_FUZZ", "1"))


def searched(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    # The directory that is broken is the same for all examples, each of which writes it anew.
    ignored = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples * TIMES, derandomize=True, deadline=None, database=None, suppress_health_check=ignored
    )


# Values of every kind that JSON has, and those that computers are bad at.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**12, 10**30, -(2**31), -(10**30)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=12),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
# What is done to the bytes of a file: where, and what stands there; None cuts the file.
DAMAGE = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.one_of(st.none(), st.binary(min_size=1, max_size=8))),
    min_size=1,
    max_size=6,
)


def damaged(data: bytes, damage: list[tuple[float, bytes | None]]) -> bytes:
    for place, replacement in damage:
        start = int(place * len(data))
        data = data[:start] if replacement is None else data[:start] + replacement + data[start + len(replacement) :]
    return data


def require_one_line(error: Exception) -> None:
    """Check that an error can be shown as it is."""
    assert str(error).isprintable()
    assert len(str(error)) < 1000


def open_model(directory: Path) -> None:
    try:
        checkpoint = Checkpoint.open(directory)
    except InputError as error:
        require_one_line(error)
        return
    # What a run does before Ray starts.
    [measure_layer(checkpoint, layer) for layer in range(checkpoint.num_layers)]
    checkpoint.digest()


@pytest.fixture(scope="module")
def sound(gqa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of words."""
    directory = tmp_path_factory.mktemp("sound") / "model"
    shutil.copytree(gqa_model, directory)
    words = {"<unk>": 0, "<s>": 1} | {f"w{n}": n + 2 for n in range(90)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>").save_pretrained(directory)
    return directory


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "model")


# Settings that a config of this family has, and some that it has not.
KEYS = st.sampled_from(
    [
        *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act", "dtype"),
        *("rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "attention_bias", "mlp_bias"),
        *("model_type", "architectures", "auto_map", "num_labels", "id2label", "pad_token_id", "torch_dtype"),
        *("attn_implementation", "_attn_implementation", "quantization_config", "layer_types", "use_cache"),
        *("num_attention_heads_per_layer", "mlp_output_bias_per_layer", "configuration_files", "is_decoder"),
        *("pruned_heads", "tie_encoder_decoder", "output_attentions", "problem_type", "name_or_path", "per_layer"),
    ]
)


@searched(120)
@given(changes=st.dictionaries(st.one_of(KEYS, KEYS, st.text(max_size=12)), VALUES, min_size=1, max_size=3))
def test_configs_of_other_values(sound: Path, model: Path, changes: dict[str, Any]) -> None:
    described = json.loads((sound / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(described))
    open_model(model)


@searched(60)
@given(
    name=st.sampled_from(["rope_type", "factor", "rope_theta", "original_max_position_embeddings", "long_factor"]),
    kind=st.sampled_from(["linear", "dynamic", "yarn", "longrope", "llama3", "default"]),
    value=VALUES,
)
def test_rotations_of_other_values(sound: Path, model: Path, name: str, kind: str, value: Any) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    changes = {"rope_parameters": rope | {"original_max_position_embeddings": 32} | {name: value}}
    (model / "config.json").write_text(json.dumps(json.loads((sound / "config.json").read_text()) | changes))
    open_model(model)


@searched(120)
@given(name=st.sampled_from(["config.json", SINGLE, INDEX]), damage=DAMAGE)
def test_damaged_files_of_a_model(
    sound: Path, model: Path, name: str, damage: list[tuple[float, bytes | None]]
) -> None:
    if name == INDEX:
        names = Checkpoint.open(sound).files
        whole = json.dumps({"weight_map": names}).encode()
    else:
        whole = (sound / name).read_bytes()
    # Of a file of weights, most is numbers: what is interesting is its beginning.
    head = 8 + int.from_bytes(whole[:8], "little") if name == SINGLE else len(whole)
    (model / name).write_bytes(damaged(whole[:head], damage) + whole[head:])
    try:
        open_model(model)
    finally:
        (model / INDEX).unlink(missing_ok=True)
        for sound_file in (SINGLE, "config.json"):
            shutil.copyfile(sound / sound_file, model / sound_file)


@searched(60)
@given(
    key=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=VALUES,
    name=st.sampled_from(["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "other", "__metadata__"]),
)
def test_headers_of_other_values(sound: Path, model: Path, key: str, value: Any, name: str) -> None:
    whole = (sound / SINGLE).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    header[name] = {**header.get(name, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), key: value}
    changed = json.dumps(header).encode()
    (model / SINGLE).write_bytes(len(changed).to_bytes(8, "little") + changed + whole[end:])
    open_model(model)


# Data

TEXTS = [" ".join(f"w{(7 * d + i) % 90}" for i in range(12)) for d in range(30)]
ROWS = [[(7 * row + i) % 90 for i in range(16)] for row in range(30)]


def write_table(path: Path, table: pa.Table, compression: str | None = None) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression=compression or "snappy", row_group_size=10)
        return
    options = pa.ipc.IpcWriteOptions(compression=compression)
    make = pa.ipc.new_stream if path.name.startswith("stream") else pa.ipc.new_file
    with make(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=10)


TABLES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "text in parquet": ("x.parquet", {"text": TEXTS}, None),
    "text in zstd parquet": ("x.parquet", {"text": TEXTS}, "zstd"),
    "tokens in parquet": ("x.parquet", {"input_ids": ROWS}, None),
    "text in arrow": ("x.arrow", {"text": TEXTS}, None),
    "tokens in arrow": ("x.arrow", {"input_ids": ROWS}, None),
    "tokens in compressed arrow": ("x.arrow", {"input_ids": ROWS}, "lz4"),
    "fixed tokens in arrow": ("x.arrow", {"input_ids": pa.array(ROWS, pa.list_(pa.int32(), 16))}, None),
    "words in arrow": ("x.arrow", {"text": pa.array(TEXTS).dictionary_encode()}, None),
    "text in a stream": ("stream.arrow", {"text": TEXTS}, None),
    "tokens in a stream": ("stream.arrow", {"input_ids": ROWS}, None),
}


def load(path: Path, model: Path) -> None:
    options = TextOptions(samples=8, sequence_length=8)
    try:
        blocks = load_tokens(str(path), model_dir=model, vocab_size=97, max_length=64, options=options)
    except DataError as error:
        require_one_line(error)
        return
    assert 0 <= blocks.input_ids_BT.min() <= blocks.input_ids_BT.max() < 97


@pytest.mark.parametrize("kind", TABLES)
def test_damaged_tables(sound: Path, tmp_path: Path, kind: str) -> None:
    name, columns, compression = TABLES[kind]
    write_table(tmp_path / name, pa.table(columns), compression)
    whole = (tmp_path / name).read_bytes()

    @searched(60)
    @given(damage=DAMAGE)
    def search(damage: list[tuple[float, bytes | None]]) -> None:
        # Another file each time: that of the example before may still be mapped.
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(damaged(whole, damage))
        load(tmp_path / name, sound)

    search()


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_damaged_text(sound: Path, tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"text": text}) if name == "x.jsonl" else text for text in TEXTS]
    whole = "\n".join(lines).encode()

    @searched(60)
    @given(damage=DAMAGE)
    def search(damage: list[tuple[float, bytes | None]]) -> None:
        (tmp_path / name).write_bytes(damaged(whole, damage))
        load(tmp_path / name, sound)

    search()


@searched(60)
@given(
    rows=st.lists(st.one_of(VALUES, st.dictionaries(st.sampled_from(["text", "x"]), VALUES)), min_size=1, max_size=5)
)
def test_rows_of_other_values(sound: Path, tmp_path: Path, rows: list[Any]) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    load(tmp_path / "x.jsonl", sound)


# Tokenizers, of which there are as many as models


@searched(80)
@given(
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]),
    damage=DAMAGE,
)
def test_damaged_tokenizers(
    sound: Path, model: Path, tmp_path: Path, name: str, damage: list[tuple[float, bytes | None]]
) -> None:
    (tmp_path / "x.txt").write_text("\n".join(TEXTS))
    (model / name).write_bytes(damaged((sound / name).read_bytes(), damage))
    load(tmp_path / "x.txt", model)
    shutil.copyfile(sound / name, model / name)


@searched(60)
@given(
    changes=st.dictionaries(
        st.sampled_from(
            [
                "model",
                "pre_tokenizer",
                "post_processor",
                "normalizer",
                "added_tokens",
                "decoder",
                "truncation",
                "padding",
            ]
        ),
        VALUES,
        min_size=1,
        max_size=2,
    )
)
def test_tokenizers_of_other_values(sound: Path, model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "x.txt").write_text("\n".join(TEXTS))
    described = json.loads((sound / "tokenizer.json").read_text()) | changes
    (model / "tokenizer.json").write_text(json.dumps(described))
    load(tmp_path / "x.txt", model)


# Settings


@searched(100)
@given(
    text=st.one_of(
        st.text(max_size=40),
        st.dictionaries(st.sampled_from(sorted(vars(PruneConfig()))), SCALARS).map(
            lambda chosen: "\n".join(f"{key} = {json.dumps(value)}" for key, value in chosen.items())
        ),
    )
)
def test_settings_of_other_values(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    try:
        PruneConfig(**read_config_file(tmp_path / "run.toml"))
    except ConfigError as error:
        require_one_line(error)
