"""What an attention mask leaves out is padding; masks that say something else are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.data import DataError, save_blocks, token_rows
from slimllm_ops.stream.padding import PADDING
from tests.conftest import content
from tests.orchestrator.conftest import PruneModel
from tests.orchestrator.data.sample_files import assert_refused, write_rows, write_table

PAD = 0
ROWS = [[1, 2, 3], [4, 5], [6], [7, 8, 9]]
EXPECTED = [[1, 2, 3], [4, 5, PADDING], [6, PADDING, PADDING], [7, 8, 9]]
TABLES = ["x.parquet", "x.arrow", "x.stream.arrow"]
FILES = [*TABLES, "x.jsonl", "x.json"]


def padded(rows: list[list[int]], length: int, side: str) -> dict[str, list[list[int]]]:
    """The columns that a tokenizer gives with `padding` and this `padding_side`."""
    sides = {"right": lambda row, pad: [*row, *pad], "left": lambda row, pad: [*pad, *row]}
    pads = [length - len(row) for row in rows]
    put = sides[side]
    ids = [put(row, [PAD] * pad) for row, pad in zip(rows, pads, strict=True)]
    masks = [put([1] * len(row), [0] * pad) for row, pad in zip(rows, pads, strict=True)]
    return {"input_ids": ids, "attention_mask": masks}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_dropped(tmp_path: Path, load: Callable, name: str, side: str) -> None:
    columns = padded(ROWS, 80, side) | {"labels": [[-100] * 80] * 4}
    blocks = load(write_table(tmp_path / name, **columns))
    assert blocks.input_ids_BT.tolist() == EXPECTED
    assert (blocks.num_tokens, blocks.found) == (9, 4)
    boolean = pa.array([[bool(one) for one in row] for row in columns["attention_mask"]])
    assert load(write_table(tmp_path / name, **columns | {"attention_mask": boolean})).digest == blocks.digest
    shortest = {one: [row[-3:] if side == "left" else row[:3] for row in columns[one]] for one in columns}
    assert load(write_table(tmp_path / name, **shortest)).digest == blocks.digest


@pytest.mark.parametrize("name", FILES)
def test_rows_of_several_lengths_are_their_own_tokens(tmp_path: Path, load: Callable, name: str) -> None:
    alone = load(write_rows(tmp_path / name, ROWS))
    assert alone.input_ids_BT.tolist() == EXPECTED
    ones = [[1] * len(row) for row in ROWS]
    assert load(write_table(tmp_path / name, input_ids=ROWS, attention_mask=ones)).digest == alone.digest


def test_a_mask_of_ones_and_rows_of_one_length_without_padding_are_the_rows(tmp_path: Path, load: Callable) -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    plain = load(write_rows(tmp_path / "plain.arrow", rows))
    assert plain.input_ids_BT.tolist() == rows
    for length, side in ((3, "left"), (9, "left"), (9, "right")):
        assert load(write_table(tmp_path / "x.parquet", **padded(rows, length, side))).digest == plain.digest


def test_padded_blocks_are_saved_and_come_back(tmp_path: Path, load: Callable) -> None:
    blocks = load(write_table(tmp_path / "x.parquet", **padded(ROWS, 5, "left")))
    save_blocks(blocks, tmp_path / "saved.arrow")
    back = load(tmp_path / "saved.arrow")
    assert back.digest == blocks.digest
    np.testing.assert_array_equal(back.input_ids_BT, blocks.input_ids_BT)


def test_what_stands_in_padding_does_not_matter(tmp_path: Path, load: Callable) -> None:
    columns = padded(ROWS, 4, "right")
    pairs = zip(columns["input_ids"], columns["attention_mask"], strict=True)
    columns["input_ids"] = [[one if real else 10**6 for one, real in zip(*pair, strict=True)] for pair in pairs]
    assert load(write_table(tmp_path / "x.parquet", **columns)).input_ids_BT.tolist() == EXPECTED


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ([[1, 1, 1], [1, 0, 1], [1, 1, 1]], "row 1 has padding between its tokens .*keep the tokens of a row together"),
        ([[1, 1, 1], [1, 1], [1, 1, 1]], "row 1 has 3 tokens and an 'attention_mask' of 2"),
        ([[1, 1, 1], [1, 1, 1], [1, 2, 0]], "row 2 has 2 in its 'attention_mask': write 1 for a token and 0"),
        ([[1, 1, 1], [1, 1, 1], [-1, 1, 1]], "row 2 has -1 in its 'attention_mask'"),
        ([[1, 1, 1], [1, 1, 1], [0, 0, 0]], "row 2 of 'input_ids' holds no tokens: give one at least, or drop it"),
        ([[1, 1, 1], None, [1, 1, 1]], "row 1 of 'attention_mask' is or holds null"),
        ([[1, 1, 1], [1, None, 1], [1, 1, 1]], "row 1 of 'attention_mask' is or holds null"),
        ([[1.0] * 3] * 3, "'attention_mask' holds list<.*double.*: store lists of 0 and 1"),
        ([1, 1, 1], "'attention_mask' holds int64"),
        ([[[1, 1, 1]]] * 3, "'attention_mask' holds list<.*list<"),
    ],
)
def test_masks_that_cannot_be_used(tmp_path: Path, load: Callable, name: str, masks: list[Any], said: str) -> None:
    path = write_table(tmp_path / name, input_ids=[[1, 2, 3], [4, 5, 6], [7, 8, 9]], attention_mask=masks)
    with pytest.raises(DataError, match=said) as raised:
        load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"attention_mask": [1, 0, 1]}], "row 0 has padding between its tokens .*keep the tokens of a row together"),
        ([{}, {"attention_mask": [1, 1]}], "line 2 has an 'attention_mask', unlike the first row"),
        ([{"attention_mask": [1, 1, 1]}, {}], "line 2 has no 'attention_mask', unlike the first row"),
        ([{"attention_mask": [1, 1]}], "row 0 has 3 tokens and an 'attention_mask' of 2"),
        ([{"attention_mask": [1, 2, 0]}], "row 0 has 2 in its 'attention_mask': write 1 for a token and 0"),
        ([{"attention_mask": [0, 0, False]}], "row 0 of 'input_ids' holds no tokens: give one at least, or drop it"),
        ([{"attention_mask": None}], "line 1: 'attention_mask' is no list of 0 and 1"),
        ([{"attention_mask": [1, None, 1]}], "line 1: 'attention_mask' is no list of 0 and 1"),
        ([{}, {"input_ids": [1, 2.0]}], "line 2: 'input_ids' is no list of integers: give one, or drop the row"),
        ([{}, {"input_ids": [1, True]}], "line 2: 'input_ids' is no list of integers"),
        ([{"input_ids": [[1, 2]]}], "line 1: 'input_ids' is no list of integers"),
        ([{"input_ids": "1 2 3"}], "line 1: 'input_ids' is no list of integers"),
        ([{"input_ids": None}], "line 1: 'input_ids' is no list of integers"),
        ([{"input_ids": []}], "row 0 of 'input_ids' holds no tokens"),
        ([{"input_ids": [1 << 70]}], "line 1: 'input_ids' holds a number that is no token id"),
        ([{}, {"input_ids": [1, 2, 3, -1]}], "token id -1 in row 1"),
        ([{}, {"input_ids": [1, 103]}], "token id 103 in row 1"),
    ],
)
@pytest.mark.parametrize("at_once", [0, 1 << 20])
def test_rows_of_text_that_cannot_be_used(
    tmp_path: Path, load: Callable, monkeypatch: pytest.MonkeyPatch, rows: list[Any], said: str, at_once: int
) -> None:
    monkeypatch.setattr(token_rows, "IDS_AT_ONCE", at_once)
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [1, 2, 3]} | row) + "\n" for row in rows))
    assert_refused(load, path, said)


def test_a_row_without_ids_among_others_is_refused(tmp_path: Path, load: Callable) -> None:
    (tmp_path / "x.jsonl").write_text('{"input_ids": [1]}\n{"text": "w1"}\n')
    assert_refused(load, tmp_path / "x.jsonl", "line 2 has no 'input_ids', unlike the first row")
    (tmp_path / "x.json").write_text('[{"text": "w1"}, {"input_ids": [1]}]')
    assert_refused(load, tmp_path / "x.json", r"no 'text' among the columns \(input_ids\)")


def test_one_long_row_among_very_many_is_refused(tmp_path: Path, load: Callable) -> None:
    path = write_rows(tmp_path / "x.parquet", [[1]] * (1 << 15) + [[1] * (1 << 14)])
    with pytest.raises(DataError, match="32,769 rows padded to 16,384 tokens are too many: cut the longest"):
        load(path, max_length=1 << 14)


@pytest.fixture(scope="module")
def rows(token_blocks: np.ndarray) -> list[list[int]]:
    return [row[: 2 + 3 * number % 15].tolist() for number, row in enumerate(token_blocks)]


@pytest.mark.parametrize("settings", [{}, {"method": "gram", "refine": True}], ids=["slimllm", "gram"])
def test_a_model_is_pruned_by_the_tokens_and_not_by_the_padding(
    prune_model: PruneModel, gqa_model: Path, tmp_path: Path, rows: list[list[int]], settings: dict[str, Any]
) -> None:
    left, right = (tmp_path / f"{side}.parquet" for side in ("left", "right"))
    for path in (left, right):
        pq.write_table(pa.table(padded(rows, 40, path.stem)), path)
    results = [
        prune_model(gqa_model, calibration=str(path), evaluate=(str(path),), rendered=True, **settings)
        for path in (left, right)
    ]
    one, other = (
        {name: data for name, data in content(Path(result.output)).items() if "safetensors" in name}
        for result in results
    )
    assert one == other
    totals = results[0].totals
    assert totals.calibration_tokens == sum(map(len, rows))
    # transformers itself, with the mask, before and after.
    for directory, found in zip((gqa_model, results[0].output), totals.perplexity[str(left)], strict=True):
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        columns = padded(rows, 40, "right")
        ids, mask = torch.tensor(columns["input_ids"]), torch.tensor(columns["attention_mask"])
        with torch.inference_mode():
            labels = ids.masked_fill(mask == 0, -100)
            loss = float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
        assert found == pytest.approx(np.exp(loss), rel=1e-4)
