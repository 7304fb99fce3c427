"""Token blocks from every form of source, by a tokenizer of words made here and by real ones.

The tokenizer made here gives a word "wN" the id N + 3, a line break 2, a document's start 1, and all else 0,
so that what a source must give can be written down without a tokenizer.
"""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orchestrator.data import DataError, TextOptions, TokenBlocks, documents, files, load_tokens, save_blocks
from orchestrator.data.text import draw_blocks, text_pieces

SHARED = Path(__file__).parents[3].parent / "shared" / "models"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the models beside the repository are not here")
VOCAB_SIZE = 103
DOCUMENTS = [" ".join(f"w{(7 * d + i) % 100}" for i in range(5 + d % 4)) for d in range(40)]


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


def naive_ids(documents: list[str]) -> list[int]:
    return [token for text in documents for token in [1, *(int(word[1:]) + 3 for word in text.split())]]


def naive_blocks(ids: list[int], length: int) -> np.ndarray:
    return np.array([ids[i : i + length] for i in range(0, len(ids) - length + 1, length)])


def write_jsonl(path: Path, documents: Sequence[str | None]) -> Path:
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)))
    return path


def write_table(path: Path, **columns: Any) -> Path:
    """Writes the kind of file that the suffixes say; ``x.stream.arrow`` is a stream of two batches."""
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffixes[:1] == [".stream"]:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=max(1, (len(table) + 1) // 2))
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    return path


def write_rows(path: Path, rows: Sequence[Sequence[int]], kind: pa.DataType | None = None) -> Path:
    return write_table(path, input_ids=pa.array(rows, kind or pa.list_(pa.int32())))


# Text


def source(path: Path, documents: list[str]) -> Path:
    return write_jsonl(path, documents) if path.suffix == ".jsonl" else write_table(path, text=documents)


TEXT_FILES = ["x.jsonl", "x.parquet", "x.arrow", "x.stream.arrow"]


@pytest.mark.parametrize("name", TEXT_FILES)
def test_documents_give_the_blocks_of_the_naive_reference(tmp_path: Path, load: Callable, name: str) -> None:
    blocks = load(source(tmp_path / name, DOCUMENTS))
    expected = naive_blocks(naive_ids(DOCUMENTS), 8)
    np.testing.assert_array_equal(blocks.input_ids_BT, expected)
    assert blocks.found == len(expected)
    assert blocks.input_ids_BT.dtype == np.int32
    assert blocks.input_ids_BT.flags.c_contiguous
    assert not blocks.input_ids_BT.flags.writeable
    assert blocks.spec == str(tmp_path / name)


def test_string_types_and_empty_documents_make_no_difference(tmp_path: Path, load: Callable) -> None:
    mixed = ["", *DOCUMENTS, "", ""]
    large = write_table(tmp_path / "large.parquet", text=pa.array(mixed, pa.large_string()))
    plain = write_jsonl(tmp_path / "plain.jsonl", DOCUMENTS)
    plain.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert load(large).digest == load(plain).digest
    assert load(large).source_digest == load(plain).source_digest


@pytest.mark.parametrize("lines", [60, 20_000], ids=["one piece", "many pieces"])
def test_a_txt_is_one_text_with_its_blank_lines(tmp_path: Path, load: Callable, lines: int) -> None:
    path = tmp_path / "x.txt"
    parts = [["w1 w2", "", "w3", "\n", "w4 w5 w6"][n % 5] + "\n" for n in range(lines)]
    path.write_text("".join(parts))
    words = "".join(parts).replace("\n", " \n ").split(" ")
    ids = [1] + [2 if word == "\n" else int(word[1:]) + 3 for word in words if word]
    np.testing.assert_array_equal(load(path, samples=10**6).input_ids_BT, naive_blocks(ids, 8))


def test_a_txt_is_cut_where_a_line_begins_with_a_word(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    text = "".join(["a line\n", "another\n", "\n", "   \n", "\tindented\n", "more\n"][n % 6] for n in range(60_000))
    path.write_text(text)
    pieces = list(text_pieces(path))
    assert "".join(pieces) == text
    assert len(pieces) > 4
    assert max(map(len, pieces)) < len(text) / 3
    assert all(before.endswith("\n") for before in pieces[:-1])
    assert not any(after[0].isspace() for after in pieces)


def test_a_line_longer_than_memory_should_hold_is_cut(tmp_path: Path, load: Callable) -> None:
    path = tmp_path / "x.txt"
    path.write_text("w " * 600_000)  # "w" is unknown and stays one token wherever the line is cut
    blocks = load(path, samples=10**6, max_length=1000, sequence_length=1000)
    assert blocks.found == 600
    assert len(list(text_pieces(path))) == 2
    assert (blocks.input_ids_BT.reshape(-1)[1:] == 0).all()


def test_the_source_digest_is_of_the_text(tmp_path: Path, load: Callable) -> None:
    (tmp_path / "x.txt").write_text("w1 w2\n\nw3 w4 w5")
    assert load(tmp_path / "x.txt").source_digest == hashlib.sha256(b"w1 w2\n\nw3 w4 w5").hexdigest()
    documents = write_jsonl(tmp_path / "x.jsonl", ["w1 w2", "w3 w4 w5 w6"])
    assert load(documents).source_digest == hashlib.sha256(b"w1 w2\0w3 w4 w5 w6\0").hexdigest()


def test_the_model_shortens_the_blocks(tmp_path: Path, load: Callable) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    assert load(path, max_length=5).input_ids_BT.shape[1] == 5
    assert load(path, max_length=5, sequence_length=3).input_ids_BT.shape[1] == 3


def test_a_seed_draws_distinct_blocks_in_the_order_of_the_text(tmp_path: Path, load: Callable) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    every = [tuple(row) for row in load(path).input_ids_BT]
    drawn = load(path, samples=9, seed=4)
    places = [every.index(tuple(row)) for row in drawn.input_ids_BT]
    assert len(places) == 9
    assert places == sorted(set(places))
    assert drawn.found == len(every)
    assert load(path, samples=9, seed=4) == drawn
    assert load(path, samples=9, seed=5).digest != drawn.digest
    assert load(path, samples=9, seed=5).source_digest == drawn.source_digest


def test_every_block_is_as_likely_to_be_drawn() -> None:
    counts = np.zeros(12)
    for seed in range(2000):
        chunks = iter(np.split(np.arange(25, dtype=np.int32), [3, 4, 17]))
        ids_BT, found = draw_blocks("x", chunks, 2, TextOptions(samples=3, seed=seed))
        assert found == 12
        counts[ids_BT[:, 0] // 2] += 1
    # 500 expected of each; the standard deviation is 19.4.
    np.testing.assert_allclose(counts, 500, atol=5 * 19.4)


def test_too_few_blocks_are_all_taken_and_counted(tmp_path: Path, load: Callable) -> None:
    blocks = load(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS[:3]), samples=50)
    assert blocks.found == len(blocks.input_ids_BT) == len(naive_ids(DOCUMENTS[:3])) // 8


def test_a_long_source_is_not_read_to_its_end(tmp_path: Path, load: Callable) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [f"w{n % 100} {'x' * 2000}" for n in range(1200)])
    with path.open("a") as file:
        file.write("broken\n")
    blocks = load(path, samples=2, sequence_length=3)
    assert blocks.found == 32
    assert set(blocks.input_ids_BT[:, 1]) <= set(range(3, 35))
    with pytest.raises(DataError, match="line 1201 is not JSON"):
        load(path, samples=1000, sequence_length=3)


@pytest.mark.parametrize("part", ["calibration", "heldout"])
def test_builtin_texts(load: Callable, model_dir: Path, part: str) -> None:
    builtin = pytest.importorskip("orchestrator.builtin")
    blocks = load(f"builtin:{part}", samples=4)
    documents = {"calibration": builtin.calibration_text, "heldout": builtin.heldout_text}[part]()
    ids = np.array(AutoTokenizer.from_pretrained(model_dir)(documents[0])["input_ids"])
    assert blocks.input_ids_BT.shape == (4, 8)
    every = load(f"builtin:{part}", samples=10**6).input_ids_BT
    np.testing.assert_array_equal(every.reshape(-1)[: len(ids)], ids[: every.size])


# Real tokenizers


@needs_shared
@pytest.mark.parametrize("model", ["lab-llama-11m", "stories260k-gqa", "babyllama-gqa"])
def test_real_tokenizers_read_a_txt_as_they_read_it_whole(tmp_path: Path, load: Callable, model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / model)
    text = "".join(f"Once upon a time there were {n} dogs.\nThey were big.\n\n" for n in range(6000))
    (tmp_path / "x.txt").write_text(text)
    whole = tokenizer(text)["input_ids"]
    blocks = load(tmp_path / "x.txt", model_dir=SHARED / model, vocab_size=len(tokenizer), samples=10**6)
    ours = blocks.input_ids_BT.reshape(-1).tolist()
    # A cut costs a few tokens: a SentencePiece tokenizer puts its blank before the first word of each piece.
    cuts = len(text) // (1 << 16)
    assert abs(len(ours) - len(whole)) <= 4 * cuts + 8
    same = 1 << 14
    assert ours[:same] == whole[:same]
    end, whole_end = (str(tokenizer.decode(ids)).replace(" ", "") for ids in (ours[-200:], whole[-400:]))
    assert end[20:] in whole_end


@needs_shared
def test_the_tokenizers_own_special_tokens_open_each_document(tmp_path: Path, load: Callable) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ["one little dog"] * 20)
    model = SHARED / "stories260k-gqa"
    alone = AutoTokenizer.from_pretrained(model)("one little dog")["input_ids"]
    blocks = load(path, model_dir=model, vocab_size=512)
    assert alone[0] == 1
    np.testing.assert_array_equal(blocks.input_ids_BT, naive_blocks(alone * 20, 8))


# Tokens

ROWS = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 102]]
INTEGERS = [pa.int8(), pa.uint16(), pa.int32(), pa.int64(), pa.uint64()]
LISTS = {"list": pa.list_, "large": pa.large_list, "fixed": lambda kind: pa.list_(kind, 3)}


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.stream.arrow"])
@pytest.mark.parametrize("make_list", LISTS.values(), ids=LISTS)
def test_token_rows_are_taken_as_they_are(
    tmp_path: Path, load: Callable, name: str, make_list: Callable[[pa.DataType], pa.DataType]
) -> None:
    for kind in INTEGERS:
        path = write_rows(tmp_path / name, ROWS, make_list(kind))
        blocks = load(path, model_dir=tmp_path, samples=1, sequence_length=2, seed=3)
        np.testing.assert_array_equal(blocks.input_ids_BT, ROWS)
        assert blocks.input_ids_BT.dtype == np.int32
        assert blocks.input_ids_BT.flags.c_contiguous
        assert blocks.found == 4
        assert blocks.source_digest is None


def test_tokens_win_over_text(tmp_path: Path, load: Callable) -> None:
    path = write_table(tmp_path / "x.parquet", text=["w1", "w2"], input_ids=[[5, 6], [7, 8]])
    assert load(path).input_ids_BT.tolist() == [[5, 6], [7, 8]]


def test_saved_blocks_come_back_the_same(tmp_path: Path, load: Callable) -> None:
    drawn = load(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), samples=9)
    saved = tmp_path / "saved.arrow"
    save_blocks(drawn, saved)
    back = load(saved)
    np.testing.assert_array_equal(back.input_ids_BT, drawn.input_ids_BT)
    assert back.digest == drawn.digest
    assert pa.ipc.open_file(saved).schema.field("input_ids").type == pa.list_(pa.int32(), 8)
    save_blocks(back, saved)  # onto the file that it is mapped from
    assert load(saved).digest == back.digest == drawn.digest
    np.testing.assert_array_equal(back.input_ids_BT, drawn.input_ids_BT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved.arrow", "x.jsonl"]


def test_saved_blocks_are_mapped_not_copied(tmp_path: Path, load: Callable) -> None:
    ids = np.arange(1 << 20, dtype=np.int32).reshape(-1, 64)
    save_blocks(TokenBlocks("x", ids, digest="", found=len(ids)), tmp_path / "x.arrow")
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    blocks = load(tmp_path / "x.arrow", vocab_size=1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert blocks.input_ids_BT.nbytes == 1 << 22
    assert peak < 1 << 20
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_blocks_are_saved_under_a_name_that_can_be_loaded(tmp_path: Path) -> None:
    blocks = TokenBlocks("x", np.zeros((1, 2), np.int32), digest="", found=1)
    with pytest.raises(DataError, match=r"name it x\.arrow"):
        save_blocks(blocks, tmp_path / "x.bin")


def test_the_digest_is_of_shape_and_content_only(tmp_path: Path, load: Callable) -> None:
    narrow = load(write_rows(tmp_path / "a.parquet", ROWS, pa.list_(pa.uint16())))
    wide = load(write_rows(tmp_path / "b.arrow", ROWS, pa.list_(pa.int64(), 3)))
    assert narrow.digest == wide.digest
    assert len(narrow.digest) == 64
    other_shape = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 102]]
    other_content = [*ROWS[:3], [10, 11, 101]]
    digests = {load(write_rows(tmp_path / "c.arrow", rows)).digest for rows in (other_shape, other_content)}
    assert len(digests | {narrow.digest}) == 3


# Errors


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
        ("notes.csv", r"type '.csv' .* use .txt, .jsonl, .parquet, .arrow"),
        ("zero.parquet", "the file is empty"),
        ("builtin:other", "use builtin:calibration or builtin:heldout"),
        ("x" * 5000, "no path that can be read .*too long.*: check it"),
        ("~nobody-of-this-name/x.txt", "no path that can be read .*home.*: check it"),
    ],
)
def test_specs_that_name_nothing(
    tmp_path: Path, load: Callable, monkeypatch: pytest.MonkeyPatch, spec: str, said: str
) -> None:
    if spec == "builtin:other":
        pytest.importorskip("orchestrator.builtin")
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("notes.csv").write_text("text\nw1\n")
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
        ('{"text": "\\ud800"}\n', "line 1: 'text' has a lone surrogate"),
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
    with pytest.raises(DataError, match=said) as raised:
        load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


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
        ({"input_ids": pa.array([[], []], pa.list_(pa.int32()))}, "hold no tokens"),
        ({"input_ids": [1, 2]}, "'input_ids' holds int64"),
        ({"input_ids": [[1.0], [2.0]]}, "'input_ids' holds list<.*: double"),
        ({"input_ids": [[1, 2], [3, 4], None]}, "row 2 of 'input_ids' is or holds null"),
        ({"input_ids": [[1, 2], [3, 4], [5, None]]}, "row 2 of 'input_ids' is or holds null"),
        ({"input_ids": [[1, 2], [3, 4], [5], [6]]}, "row 0 has 2 tokens and row 2 has 1"),
        ({"input_ids": [[1, 2], [3, 103], [104, 4]]}, "token id 104 in row 2.* vocabulary has 103"),
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
    with pytest.raises(DataError, match=said) as raised:
        load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


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
    for module in (documents, files):
        monkeypatch.setattr(module, "LONGEST_DOCUMENT", 1000)
    said = r"(line 2|row 1) is longer than 1,000 characters: split it into several documents"
    for name in TEXT_FILES:
        with pytest.raises(DataError, match=said):
            load(source(tmp_path / name, ["w1", "w1 " * 400]))


def test_a_line_without_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    program = (
        "import resource, sys\nfrom pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))\n"
        "from orchestrator.data import DataError\nfrom orchestrator.data.documents import read_documents\n"
        "try: list(read_documents('x', Path(sys.argv[1])))\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=100)
    assert "line 1 is longer than" in done.stdout, done.stderr


def test_few_bytes_that_stand_for_many_rows(tmp_path: Path, load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_IDS", 10_000)
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
    "no unknown token": ({"unk_token": "<none>", "vocab": {"w1": 0}}, "cannot read the text .*: take its files"),
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


def test_errors_travel_between_processes() -> None:
    assert str(pickle.loads(pickle.dumps(DataError("a: b: c")))) == "a: b: c"


# The hub: a server that speaks as much of its protocol as a public dataset of one file needs

HUB = """
import json, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

data = Path(sys.argv[2]).read_bytes()
entry = {"type": "file", "path": "train.jsonl", "size": len(data), "oid": "b" * 40}
info = {"id": "me/tiny", "sha": "a" * 40, "siblings": [{"rfilename": "train.jsonl"}], "tags": []}

class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.endswith("/train.jsonl"):
            self.reply(200, data)
        elif path.startswith("/api/datasets/me/tiny"):
            self.reply(200, json.dumps([entry] if "/tree/" in path else info).encode())
        else:
            self.reply(404, b"")
    do_HEAD = do_POST = do_GET

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.send_header("X-Repo-Commit", "a" * 40)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
threading.Thread(target=server.serve_forever, daemon=True).start()

from orchestrator.data import DataError, TextOptions, load_tokens

def ask(spec):
    start = time.monotonic()
    options = TextOptions(samples=1000, sequence_length=8)
    model = {"model_dir": Path(sys.argv[1]), "vocab_size": 103, "max_length": 64}
    try:
        said = load_tokens(spec, **model, options=options).input_ids_BT.tolist()
    except DataError as error:
        said = str(error)
    return said, time.monotonic() - start

import datasets

ask(sys.argv[2])  # so that the seconds of the others are not those of imports
answers = {spec: ask(spec) for spec in sys.argv[3:]}
server.shutdown()
server.server_close()
answers["unreachable"] = ask("me/tiny")
print(json.dumps(answers))
"""


def ask_hub(tmp_path: Path, model_dir: Path, *specs: str, **environment: str) -> dict[str, Any]:
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    command = [sys.executable, "-c", HUB, str(model_dir), str(path), *specs]
    proxies = {f"{name}_proxy": "" for name in ("http", "https", "all")}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k.lower() not in proxies}
    # Its own home: what this machine's cache of the hub holds must not answer.
    ours = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[3]), **environment}
    done = subprocess.run(command, env=clean | ours, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_dataset_on_the_hub(tmp_path: Path, model_dir: Path) -> None:
    specs = [
        "me/tiny",
        "me/tiny:default",
        "me/tiny:default:train",
        "me/tiny:default:test",
        "me/tiny:no",
        "me/none",
    ]
    answers = ask_hub(tmp_path, model_dir, *specs)
    expected = naive_blocks(naive_ids(DOCUMENTS), 8).tolist()
    assert [answers[spec][0] for spec in specs[:3]] == [expected] * 3
    for spec, said in zip(specs[3:], ["Bad split: test", "'no' not found", "RepositoryNotFoundError"], strict=True):
        assert said in answers[spec][0]
        assert "\n" not in answers[spec][0]
    message, seconds = answers["unreachable"]
    assert "me/tiny: no file of this name, and no dataset" in message
    assert "give a local file (.txt, .jsonl, .parquet, .arrow)" in message
    assert seconds < 15  # load_dataset alone retries for 23 s


def test_the_hub_when_offline(tmp_path: Path, model_dir: Path) -> None:
    message, seconds = ask_hub(tmp_path, model_dir, "me/tiny", HF_HUB_OFFLINE="1")["me/tiny"]
    assert "ConnectionError" in message
    assert "give a local file" in message
    assert seconds < 15
