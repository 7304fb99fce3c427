"""The forms in which text comes: packed files, JSON, folders of `save_to_disk`, chats and rows of several columns."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from orchestrator.data import DataError, json_objects, rows
from orchestrator.data.text_rows import read_text_rows
from tests.orchestrator.data.sample_files import (
    DOCUMENTS,
    assert_refused,
    naive_blocks,
    naive_ids,
    write_jsonl,
    write_table,
)

TEMPLATE = (
    "{{ bos_token }}{% if tools %} w90 {{ tools | length }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}{{ raise_exception('late') }}"
    "{% endif %}{{ ' w91 ' if message.role == 'user' else ' w92 ' }}{{ message.content }}"
    "{% if 'name' in message %} w93{% endif %}{% endfor %}"
)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def dumped(documents: list[str], form: str) -> str:
    """The documents in a form of text, as `json` writes them."""
    objects = [{"id": n, "text": text} for n, text in enumerate(documents)]
    separated = io.StringIO()
    pandas.DataFrame(objects).to_csv(separated, sep="\t" if form == ".tsv" else ",", index=False)
    return {
        ".csv": separated.getvalue(),
        ".tsv": separated.getvalue(),
        ".jsonl": "".join(json.dumps(one) + "\n" for one in objects),
        ".JSON": json.dumps(objects),
        ".json": "\n ".join(json.dumps(one, indent=1) for one in objects),
    }[form]


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("form", [".jsonl", ".json", ".JSON", ".csv", ".tsv"])
def test_packed_documents_are_the_documents(tmp_path: Path, load: Callable, form: str, ending: str) -> None:
    path = tmp_path / f"x.y{form}{ending}"
    path.write_bytes(PACKERS[ending](dumped(DOCUMENTS, form).encode("utf-8-sig")))
    np.testing.assert_array_equal(load(path).input_ids_BT, naive_blocks(naive_ids(DOCUMENTS), 8))


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("form", [".txt", ".md", ".TXT", ".Md"])
def test_packed_text_is_the_text(tmp_path: Path, load: Callable, form: str, ending: str) -> None:
    text = "\n\n".join(DOCUMENTS * 20)
    (tmp_path / "plain.txt").write_text(text)
    path = tmp_path / f"x{form}{ending}"
    path.write_bytes(PACKERS[ending](text.encode()))
    found, expected = load(path), load(tmp_path / "plain.txt")
    assert (found.digest, found.source_digest) == (expected.digest, expected.source_digest)


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separated_values_are_those_that_pandas_reads(tmp_path: Path, separator: str, end: str) -> None:
    values = ["", "NA", "1", 'a "word"', "a, b\tc", "two\nlines", ' "x', "é\u2028ü", "'", "#", "null"]
    path = tmp_path / ("x.csv" if separator == "," else "x.tsv")
    frame = pandas.DataFrame({"id": range(len(values)), "text": values})
    frame.to_csv(path, sep=separator, index=False, lineterminator=end)
    path.write_bytes(path.read_bytes() + end.encode() * 2)
    expected = pandas.read_csv(path, sep=separator, keep_default_na=False, dtype=str).to_dict("records")
    assert [row["text"] for row in expected] == values
    assert [row for _, row in read_text_rows(path)] == expected


def test_rows_of_separated_values_are_documents_as_others_are(tmp_path: Path, load: Callable) -> None:
    columns = {"instruction": DOCUMENTS, "input": ["", "w5"] * 20, "output": DOCUMENTS[::-1]}
    pandas.DataFrame(columns).to_csv(tmp_path / "x.CSV", index=False)
    assert load(tmp_path / "x.CSV").digest == load(write_table(tmp_path / "x.parquet", **columns)).digest


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text\nw1\n", "2 tokens found, and one block needs 8"),
        ("text\n", "all documents are empty"),
        ("\n\n", "all documents are empty"),
        ("body,id\nw1,2\n", r"line 2: no 'text' among the columns .body, id"),
        ("id,text\n1,w1\n2,w2,w3\n", "line 3 has 3 values, and the first line names 2 columns: fix or drop it"),
        ("id,text\n1\n", "line 2 has 1 values"),
        ('id,text\n1,w1\n2,"w2\n3,w3\n', "line 3 does not hold separated values .unexpected end of data"),
        ('id,text\n1,"w1" w2\n', "line 2 does not hold separated values .*fix its quotes, or write .jsonl"),
        ("text,text\nw1,w2\n", "line 1 names a column twice"),
        ("text\n" + "w1 " * 50_000, "line 2 does not hold separated values .*write .jsonl"),
        ("input_ids\n1 2 3\n", "line 2: 'input_ids' is no list of integers"),
        ('messages\n"[{""role"": ""user""}]"\n', "line 2: 'messages' is of type str: give a list"),
    ],
)
def test_separated_values_that_cannot_be_used(tmp_path: Path, load: Callable, content: str, said: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content)
    assert_refused(load, path, said)


def test_suffixes_in_capitals(tmp_path: Path, load: Callable) -> None:
    expected = load(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)).digest
    for name in ("x.JSONL", "x.PARQUET", "x.Arrow"):
        small = tmp_path / name.lower()
        written = write_jsonl(small, DOCUMENTS) if "JSONL" in name else write_table(small, text=DOCUMENTS)
        assert load(written.rename(tmp_path / name)).digest == expected


def test_several_packed_parts_are_one_file(tmp_path: Path, load: Callable) -> None:
    halves = [dumped(part, ".jsonl").encode() for part in (DOCUMENTS[:20], DOCUMENTS[20:])]
    for ending in (".gz", ".zst"):
        path = tmp_path / f"x.jsonl{ending}"
        path.write_bytes(b"".join(map(PACKERS[ending], halves)))
        np.testing.assert_array_equal(load(path).input_ids_BT, naive_blocks(naive_ids(DOCUMENTS), 8))


@pytest.mark.parametrize("ending", [ending for ending in PACKERS if ending])
def test_packed_files_that_are_broken(tmp_path: Path, load: Callable, ending: str) -> None:
    whole = PACKERS[ending](dumped(DOCUMENTS * 500, ".jsonl").encode())
    for broken in (whole[: len(whole) // 2], b"not packed at all " * 9):
        path = tmp_path / f"x.jsonl{ending}"
        path.write_bytes(broken)
        with pytest.raises(DataError, match=rf"not readable as UTF-8 text in a whole {ending.lower()} file") as raised:
            load(path, samples=10**6)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz"])
def test_a_line_that_unpacks_to_more_than_memory_holds(tmp_path: Path, load: Callable, name: str) -> None:
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(1 << 6):
            file.write(b"a" * (1 << 22))
    tracemalloc.start()
    with pytest.raises(DataError, match="is longer than 33,554,432 characters"):
        load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Enough for the longest line that is read, and not for this one.
    assert peak < 5 << 25 < 1 << 28


def test_objects_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": "w1 " * 1000}] * 5000))
    tracemalloc.start()
    with path.open() as file:
        count = sum(1 for _ in json_objects.read_objects(file, path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5000
    assert peak < 1 << 21 < path.stat().st_size // 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"text": "w1"}, {"text": ]', "row 1 is not a JSON object .Expecting value"),
        ('[{"text": "w1"}', "row 1 is not a JSON object .the list does not end"),
        ('[{"text": "w1"},', "row 1 is not a JSON object .expected an object"),
        ('[{"text": "w1"} {"text": "w2"}]', "row 1 is not a JSON object .expected a comma"),
        ('[{"text": "w1"}] {}', "row 1 is not a JSON object .there is something after"),
        ('["w1"]', "row 0 is not a JSON object .expected an object"),
        ('"w1"', "row 0 is not a JSON object"),
        ('{"text": "w1"}\n{"body": 1}', r"row 1: no 'text' among the columns \(body\)"),
        ('[{"text": null}]', "row 0: 'text' is null"),
        ('{"text": ["w1", "w2"]}', "row 0: 'text' is of type list"),
        ("[]", "all documents are empty"),
        ('[{"text": ' + "[" * 10**5, "row 0 is nested too deeply"),
        ('[{"text": ' + "9" * 5000 + "}]", "row 0 is not a JSON object .Exceeds the limit"),
    ],
)
def test_json_that_cannot_be_used(tmp_path: Path, load: Callable, content: str, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    assert_refused(load, path, said)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_saved_dataset(tmp_path: Path, load: Callable, num_shards: int) -> None:
    dataset = datasets.Dataset.from_dict({"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS})
    expected = naive_blocks(naive_ids(DOCUMENTS), 8)
    dataset.save_to_disk(tmp_path / "plain", num_shards=num_shards)
    datasets.DatasetDict({"test": dataset.select([0]), "train": dataset}).save_to_disk(tmp_path / "dict")
    for folder in ("plain", "dict", "dict/train"):
        np.testing.assert_array_equal(load(tmp_path / folder).input_ids_BT, expected)
    picked = dataset.select(range(20, 40))
    picked.save_to_disk(tmp_path / "picked")
    np.testing.assert_array_equal(load(tmp_path / "picked").input_ids_BT, naive_blocks(naive_ids(DOCUMENTS[20:]), 8))


def test_a_saved_dataset_of_tokens_with_masks(tmp_path: Path, load: Callable, model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir, pad_token="<unk>")
    encoded = tokenizer(DOCUMENTS, padding=True)
    datasets.Dataset.from_dict(dict(encoded)).save_to_disk(tmp_path / "tokens", num_shards=2)
    found = [row[row >= 0].tolist() for row in load(tmp_path / "tokens").input_ids_BT]
    assert found == [naive_ids([text]) for text in DOCUMENTS]


def test_saved_datasets_that_cannot_be_used(tmp_path: Path, load: Callable) -> None:
    dataset = datasets.Dataset.from_dict({"text": DOCUMENTS})
    datasets.DatasetDict({"a": dataset, "b": dataset}).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match="is a dataset of the splits a, b: name the folder of one of them"):
        load(tmp_path / "dict")
    for broken in ("{", "[]", '{"_data_files": [{"filename": "gone.arrow"}]}'):
        (tmp_path / "dict" / "a" / "state.json").write_text(broken)
        with pytest.raises(DataError, match="not readable as a whole folder of save_to_disk") as raised:
            load(tmp_path / "dict" / "a")
        assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def chat_model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = shutil.copytree(model_dir, tmp_path_factory.mktemp("chat") / "model")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def tokenizer(chat_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_model)


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"w{number} w2"}, {"role": "assistant", "content": "w3 w4", "name": "w"}]


CHATS = [chat(number) for number in range(30)]


def chat_rows(column: str) -> list[dict[str, Any]]:
    """Rows of chats: under usual names, under those of ShareGPT, or split into prompt and completion."""
    renamed = [
        [{"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]} for one in messages]
        for messages in CHATS
    ]
    return {
        "messages": [{"messages": messages, "id": 1} for messages in CHATS],
        "conversations": [{"conversations": messages} for messages in renamed],
        "prompt": [{"prompt": messages[:1], "completion": messages[1:]} for messages in CHATS],
    }[column]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.arrow"])
@pytest.mark.parametrize("column", ["messages", "conversations", "prompt"])
def test_chats_are_what_the_tokenizer_makes_of_them(
    tmp_path: Path, load: Callable, chat_model: Path, tokenizer: PreTrainedTokenizerBase, name: str, column: str
) -> None:
    path, found = tmp_path / name, chat_rows(column)
    if path.suffix in (".jsonl", ".json"):
        path.write_text("\n".join(map(json.dumps, found)) if path.suffix == ".jsonl" else json.dumps(found))
    else:
        write_table(path, **{key: [row[key] for row in found] for key in found[0]})
    chats = CHATS
    if column == "conversations":
        chats = [[{key: value for key, value in one.items() if key != "name"} for one in chat] for chat in CHATS]
    ids = [i for one in chats for i in tokenizer.apply_chat_template(one, tokenize=True, return_dict=False)]
    assert ids.count(tokenizer.bos_token_id) == len(CHATS)
    np.testing.assert_array_equal(load(path, model_dir=chat_model).input_ids_BT, naive_blocks(ids, 8))


def test_tools_reach_the_template(
    tmp_path: Path, load: Callable, chat_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"messages": one, "tools": tools}) for one in CHATS))
    options: dict[str, Any] = {"tokenize": True, "return_dict": False}
    ids = [i for one in CHATS for i in tokenizer.apply_chat_template(one, tools=tools, **options)]
    assert ids != [i for one in CHATS for i in tokenizer.apply_chat_template(one, **options)]
    np.testing.assert_array_equal(load(path, model_dir=chat_model).input_ids_BT, naive_blocks(ids, 8))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "line 2: 'messages' is an empty list"),
        ({"messages": None}, "line 2: 'messages' is null"),
        ({"messages": "w1"}, "line 2: 'messages' is of type str"),
        ({"messages": ["w1"]}, "line 2: 'messages' is a list of something else"),
        ({"messages": [{"content": "w1"}]}, "line 2: a message of 'messages' has no role"),
        ({"messages": [*CHATS[0], {"role": "system", "content": "w1"}]}, "line 2: the chat template in .*late.*fix or"),
        ({"messages": CHATS[0], "tools": "w1"}, "line 2: 'tools' is of type str"),
        ({"instruction": "w1", "output": None}, "line 2: 'output' is null"),
        ({"instruction": "w1"}, r"line 2: no 'text' among the columns \(instruction\)"),
        ({"prompt": "w1", "completion": ["w1"]}, "line 2: 'completion' is of type list"),
    ],
)
def test_rows_that_cannot_be_used(
    tmp_path: Path, load: Callable, chat_model: Path, row: dict[str, Any], said: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": CHATS[0]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=said) as raised:
        load(path, model_dir=chat_model)
    assert "\n" not in str(raised.value)


def test_a_chat_needs_a_template(tmp_path: Path, load: Callable) -> None:
    path = write_table(tmp_path / "x.parquet", messages=CHATS)
    with pytest.raises(DataError, match=r"row 0 is a chat, and the tokenizer in .* has no chat template: add one"):
        load(path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_rows_of_several_columns_are_put_together(tmp_path: Path, load: Callable, name: str) -> None:
    one = {"instruction": "w1 w2", "input": "w3", "output": "w4"}
    other = {"instruction": "w5", "input": "", "output": "w6"}
    expected = [
        "### Instruction:\nw1 w2\n\n### Input:\nw3\n\n### Response:\nw4",
        "### Instruction:\nw5\n\n### Response:\nw6",
    ]
    pairs = [{"prompt": "w1 w2", "completion": " w3"}, {"prompt": "w4", "completion": " w5"}]
    for number, (given, texts) in enumerate((([one, other], expected), (pairs, ["w1 w2 w3", "w4 w5"]))):
        path = tmp_path / f"{number}{name}"
        if path.suffix == ".jsonl":
            path.write_text("\n".join(map(json.dumps, given)))
        else:
            write_table(path, **{key: [row[key] for row in given] for key in given[0]})
        plain = write_jsonl(tmp_path / "plain.jsonl", texts)
        assert load(path, sequence_length=2).source_digest == load(plain, sequence_length=2).source_digest


def test_text_wins_over_other_columns(tmp_path: Path, load: Callable) -> None:
    path = write_table(tmp_path / "x.parquet", messages=[chat(1)] * 40, text=DOCUMENTS, prompt=DOCUMENTS)
    np.testing.assert_array_equal(load(path).input_ids_BT, naive_blocks(naive_ids(DOCUMENTS), 8))


def test_keys_that_a_table_fills_with_null_do_not_reach_the_template() -> None:
    row = {"messages": [{"role": "user", "content": "w1", "name": None}, {"role": "assistant", "content": None}]}
    assert rows.without_nulls(row) == {"messages": [{"role": "user", "content": "w1"}, row["messages"][1]]}
