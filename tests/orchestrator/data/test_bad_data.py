"""Unusable text, tables and tokenizers are reported in one line that says why, and what to do."""

import json
import pickle
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from orchestrator.data import DataError, TextOptions, TokenBlocks, json_objects, rows, text, text_rows, token_rows
from tests.orchestrator.data.sample_files import (
    DOCUMENTS,
    TEXT_FILES,
    assert_refused,
    source,
    write_jsonl,
    write_rows,
    write_table,
)


def test_options_are_checked_when_made() -> None:
    for wrong in ({"samples": 0}, {"sequence_length": 0}, {"seed": -1}):
        with pytest.raises(DataError, match=f"{next(iter(wrong))} is"):
            TextOptions(**wrong)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("absent.txt", "absent.txt: no such file"),
        ("./absent", "no such file"),
        ("a/b/absent", "no such file"),
        ("", "is a directory"),
        ("folder", "'folder' is a directory"),
        ("notes.tab", r"unknown file type '.tab': use .txt, .md, .jsonl, .json, .csv, .tsv, .parquet, .arrow"),
        ("zero.parquet", "the file is empty"),
        ("builtin:other", "use builtin:calibration or builtin:heldout"),
        ("x" * 5000, "not a readable path .*too long.*: check it"),
        ("~nobody-of-this-name/x.txt", "not a readable path .*home.*: check it"),
    ],
)
def test_specs_that_name_nothing(
    tmp_path: Path, load: Callable, monkeypatch: pytest.MonkeyPatch, spec: str, said: str
) -> None:
    if spec == "builtin:other":
        pytest.importorskip("orchestrator.builtin")
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("notes.tab").write_text("text\nw1\n")
    Path("zero.parquet").touch()
    with pytest.raises(DataError, match=said) as raised:
        load(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "w1"}\n\n{"text": \n', "line 3 is not JSON"),
        ('{"text": "w1"}\n["w1"]\n', "line 2 is not an object"),
        ('{"text": "w1"}\n{"body": "w1", "id": 1}\n', r"line 2: no 'text' among the columns \(body, id\)"),
        ('{"text": "w1"}\n{"text": null}\n', "line 2: 'text' is null"),
        ('{"text": 5}\n', "line 1: 'text' is of type int"),
        ('{"text": "\\ud800"}\n', "line 1: the text has a lone surrogate"),
        ('{"text": ""}\n{"text": ""}\n', "all documents are empty"),
        ("\n\n", "all documents are empty"),
        ('{"text": ' + "[" * 10**5, "line 1 is nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "line 1 is not JSON"),
        ("{" + ", ".join(f'"c{n}": 1' for n in range(5000)) + "}", r"columns \(c0, .*c9, \.\.\.\): rename"),
        ('{"text": "w1 w2"}\n', "3 tokens found, and one block needs 8.* at most 3"),
    ],
)
def test_jsonl_that_cannot_be_used(tmp_path: Path, load: Callable, content: str, said: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    assert_refused(load, path, said)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_text_that_is_not_utf8(tmp_path: Path, load: Callable, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="not readable as UTF-8 text"):
        load(tmp_path / name)


def test_a_txt_shorter_than_one_block(tmp_path: Path, load: Callable) -> None:
    (tmp_path / "x.txt").write_text("w1\n\nw2")
    with pytest.raises(DataError, match="5 tokens found, and one block needs 6"):
        load(tmp_path / "x.txt", sequence_length=6)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.stream.arrow"])
@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"body": ["w1"], "id": [1]}, r"neither 'text' nor 'input_ids' among the columns \(body, id\)"),
        ({"text": ["w1", "w2", None]}, "row 2: 'text' is null"),
        ({"text": [1, 2]}, "row 0: 'text' is of type int"),
        ({"text": ["", ""]}, "all documents are empty"),
        ({"text": pa.array([], pa.string())}, "all documents are empty"),
        ({"input_ids": pa.array([], pa.list_(pa.int32()))}, "'input_ids' has no rows"),
        ({"input_ids": [[], []]}, "holds list<item: null>|list<element: null>"),
        ({"input_ids": pa.array([[], []], pa.list_(pa.int32()))}, "row 0 of 'input_ids' holds no tokens"),
        ({"input_ids": [1, 2]}, "'input_ids' holds int64"),
        ({"input_ids": [[1.0], [2.0]]}, "'input_ids' holds list<.*: double"),
        ({"input_ids": [[1, 2], [3, 4], None]}, "row 2 of 'input_ids' is or holds null"),
        ({"input_ids": [[1, 2], [3, 4], [5, None]]}, "row 2 of 'input_ids' is or holds null"),
        (
            {"input_ids": [[1, 2], [3, 4], [5], []]},
            "row 3 of 'input_ids' holds no tokens: give one at least, or drop it",
        ),
        ({"input_ids": [[1, 2], [3, 4], [5, 103], [104, 4]]}, "token id 104 in row 3.* vocabulary has 103"),
        ({"input_ids": [[1, 103]]}, "token id 103 in row 0"),
        ({"input_ids": [[1, 2], [3, -7]]}, "token id -7 in row 1"),
        ({"input_ids": [[1, 2], [2**32 + 1, 7]]}, "token id 4294967297 in row 1"),
        ({"input_ids": [[1] * 65]}, "blocks of 65 tokens, the model takes 64"),
    ],
)
def test_tables_that_cannot_be_used(
    tmp_path: Path, load: Callable, name: str, columns: dict[str, Any], said: str
) -> None:
    path = write_table(tmp_path / name, **columns)
    assert_refused(load, path, said)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.stream.arrow"])
@pytest.mark.parametrize("column", ["text", "input_ids"])
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.02], ids=lambda keep: f"{keep} of it")
def test_tables_that_are_broken(tmp_path: Path, load: Callable, name: str, column: str, keep: float) -> None:
    values = DOCUMENTS * 50 if column == "text" else [[n % 100, 7] * 8 for n in range(2000)]
    whole = write_table(tmp_path / name, **{column: values}).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match="not readable as a whole") as raised:
        load(tmp_path / name, samples=10**6)
    assert "\n" not in str(raised.value)


def test_a_document_longer_than_memory_should_hold(
    tmp_path: Path, load: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (text_rows, json_objects, rows):
        monkeypatch.setattr(module, "LONGEST_DOCUMENT", 1000)
    said = r"(line 2|row 1) is longer than 1,000 characters: split it into several documents"
    for name in TEXT_FILES:
        with pytest.raises(DataError, match=said):
            load(source(tmp_path / name, ["w1", "w1 " * 400]))


def test_a_line_without_end_is_not_read(tmp_path: Path, load: Callable) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 28)
    tracemalloc.start()
    with pytest.raises(DataError, match="line 1 is longer than 33,554,432 characters"):
        load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 3


def test_few_bytes_that_stand_for_many_rows(tmp_path: Path, load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "MOST_IDS", 10_000)
    for name in ("x.parquet", "x.arrow"):
        with pytest.raises(DataError, match="more than 10,000 token ids: give fewer rows"):
            load(write_rows(tmp_path / name, [[1] * 8] * 2000))


@pytest.mark.parametrize("name", ["x.arrow", "x.stream.arrow"])
@pytest.mark.parametrize("column", ["text", "input_ids"])
def test_offsets_that_point_anywhere(tmp_path: Path, load: Callable, name: str, column: str) -> None:
    """Followed unchecked, they end the process."""
    count = 64
    values = ["w1 w2 w3"] * count if column == "text" else [[1, 2, 3, 4, 5, 6, 7, 8]] * count
    whole = write_table(tmp_path / name, **{column: values}).read_bytes()
    offsets = np.arange(count // 2, dtype=np.int32) * 8
    place = whole.index(offsets.tobytes())
    broken = (offsets + (1 << 30)).tobytes()
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(whole[:place] + broken + whole[place + len(broken) :])
    with pytest.raises(DataError, match="not readable as a whole arrow file"):
        load(tmp_path / name)


def test_lists_that_share_their_values_are_refused(tmp_path: Path, load: Callable) -> None:
    """A million rows of a million tokens each can share one list of them."""
    views = pa.ListViewArray.from_arrays([0] * 1000, [1000] * 1000, pa.array(range(1000), pa.int32()))
    with pytest.raises(DataError, match="'input_ids' holds list_view"):
        load(write_table(tmp_path / "x.arrow", input_ids=views))


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "no unknown token": ({"unk_token": "<none>", "vocab": {"w1": 0}}, "cannot read the text .*: download its files"),
    "ids beyond all numbers": (
        {"vocab": {"<unk>": 2**32 - 1, "w1": 2**32 - 2}},
        "cannot read the text .*OverflowError|token id",
    ),
    "no vocabulary": ({"vocab": {}}, "has no vocabulary|has no tokenizer that loads|cannot read the text"),
    "no model of tokenizers": (
        {"type": "Wombat"},
        "has no tokenizer that loads .*: add its files, or give token blocks",
    ),
}


@pytest.mark.parametrize("broken", TOKENIZERS)
def test_a_broken_tokenizer(tmp_path: Path, load: Callable, model_dir: Path, broken: str) -> None:
    changes, said = TOKENIZERS[broken]
    directory = shutil.copytree(model_dir, tmp_path / "model")
    described = json.loads((directory / "tokenizer.json").read_text())
    described["model"] |= changes
    described["post_processor"] = None
    (directory / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match=said) as raised:
        load(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), model_dir=directory)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("content", ["", "[]", "[" * 10**5, '{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'])
def test_a_tokenizers_config_that_is_none_or_names_code(
    tmp_path: Path, load: Callable, model_dir: Path, content: str
) -> None:
    directory = shutil.copytree(model_dir, tmp_path / "model")
    (directory / "tokenizer_config.json").write_text(content)
    (directory / "evil.py").write_text("raise SystemExit('was run')\n")
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match=r"has no tokenizer that loads .*: add its files"):
        load(path, model_dir=directory)


def test_a_file_that_is_no_table(tmp_path: Path, load: Callable) -> None:
    for name in ("x.parquet", "x.arrow"):
        (tmp_path / name).write_text("these are words, not columns\n" * 10)
        with pytest.raises(DataError, match="not readable as a whole"):
            load(tmp_path / name)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path, load: Callable) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ["w1 w2 w50 w3 w4 w5 w6"])
    with pytest.raises(DataError, match="token id 53 in row 0, the model's vocabulary has 50 "):
        load(path, vocab_size=50)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma", None])
def test_text_for_a_model_without_a_tokenizer(tmp_path: Path, load: Callable, family: str | None) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    if family:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(DataError, match=r"tokenizer.*give token blocks \(input_ids") as raised:
        load(path, model_dir=tmp_path)
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="no tokenizer that loads"):
        load(path, model_dir=tmp_path / "absent" / "folder")


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral", "opt"])
def test_a_vocabulary_whose_package_is_missing(
    tmp_path: Path, load: Callable, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    # The first pieces, as SentencePiece writes them; then as tiktoken does.
    for content, said in (
        (
            b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02",
            r"no tokenizer that loads: tokenizer.model is .*: pip install sentencepiece",
        ),
        (b"IQ== 0\nIg== 1\n", r"tokenizer.*give token blocks \(input_ids"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(DataError, match=said) as raised:
            load(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), model_dir=tmp_path)
        assert ("tiktoken" in str(raised.value)) <= (content[:1] == b"I")
        assert "\n" not in str(raised.value)


def test_errors_travel_between_processes() -> None:
    assert str(pickle.loads(pickle.dumps(DataError("a: b: c")))) == "a: b: c"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", "\n" * 200, "line 101 follows 100 empty ones: drop them"),
        ("x.csv", "text\n" + " \n" * 200, "line 102 follows 100 empty ones: drop them"),
        ("x.jsonl", '{"text": ""}\n' * 200, "more than 100 documents without text follow each other: drop them"),
    ],
)
def test_nothing_without_end_is_not_read_to_its_end(
    load: Callable[..., TokenBlocks],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str,
    said: str,
) -> None:
    monkeypatch.setattr(text_rows, "MOST_EMPTY", 100)
    monkeypatch.setattr(text, "MOST_EMPTY", 100)
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        load(path)
