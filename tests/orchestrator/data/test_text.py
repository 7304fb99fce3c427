"""Text becomes the same token blocks as in a naive reference."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from orchestrator.data import DataError
from orchestrator.data.text import draw_blocks, text_pieces
from tests.orchestrator.data.sample_files import (
    DOCUMENTS,
    TEXT_FILES,
    naive_blocks,
    naive_ids,
    source,
    write_jsonl,
    write_table,
)

SHARED = Path(__file__).parents[3].parent / "shared" / "models"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the models beside the repository are not here")


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
        ids_BT, found = draw_blocks("x", chunks, 2, samples=3, seed=seed)
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
