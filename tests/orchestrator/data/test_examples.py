"""Rows of prompts and responses become examples in which the responses count; text counts whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import normalizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from orchestrator.builtin import MODEL_DIR
from orchestrator.data import DataError, TextOptions, TokenBlocks, examples, instructions, load_tokens, pinning
from orchestrator.data.examples import Examples, load_examples, split
from orchestrator.sources import hub
from slimllm_ops.stream.padding import PADDING
from tests.orchestrator.data.instruction_files import load_rows, sides, write_instructions
from tests.orchestrator.data.sample_files import DOCUMENTS, VOCAB_SIZE, assert_refused, write_jsonl, write_rows

SHARED = Path(__file__).parents[3].parent / "shared" / "models"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the models beside the repository are not here")
MODELS = [
    MODEL_DIR,
    *(pytest.param(SHARED / name, marks=needs_shared, id=name) for name in ("lab-llama-11m", "stories260k-gqa")),
]
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
ROWS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello there, you"},
    {"instruction": "Add them.", "input": "one and two", "output": "That is three:\n\n  three.\n"},
    {"instruction": "Go on.", "input": None, "output": "and on"},
]
EXPECTED = [
    (WITHOUT_INPUT.format("Say hello."), "Hello there, you"),
    (WITH_INPUT.format("Add them.", "one and two"), "That is three:\n\n  three.\n"),
    (WITHOUT_INPUT.format("Go on."), "and on"),
]
SHORT = [{"prompt": f"{n}:", "completion": " " + "yes" * (1 + n * 7 % 11)} for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.mark.parametrize("model", MODELS)
def test_the_output_of_an_instruction_counts_and_its_prompt_does_not(tmp_path: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = load_rows(write_instructions(tmp_path / "x.jsonl", ROWS), model)
    rows = [row[row != PADDING].tolist() for row in found.input_ids_BT]
    for ids, (_, response), (asked, said) in zip(rows, sides(found, tokenizer), EXPECTED, strict=True):
        assert response == said + tokenizer.eos_token
        # With BOS, if the tokenizer adds it.
        assert ids == [*tokenizer(asked + said)["input_ids"], tokenizer.eos_token_id]
    assert found.num_tokens == int((found.input_ids_BT != PADDING).sum()) < found.input_ids_BT.size
    assert found.num_counted == int(found.counted_BT.sum())
    assert found.input_ids_BT.shape[1] == max((row != PADDING).sum() for row in found.input_ids_BT)


@pytest.mark.parametrize("name", ["x.json", "x.parquet", "x.arrow", "saved"])
def test_every_form_of_file_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    rows = [row | {"text": "all of it", "id": 1} for row in ROWS]  # as the published file has it
    path = tmp_path / name
    if name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        write_instructions(path, rows)
    found = load_rows(path, MODEL_DIR)
    expected = load_rows(write_instructions(tmp_path / "x.jsonl", ROWS), MODEL_DIR)
    assert (found.digest, found.pinned) == (expected.digest, None)
    assert found.spec == str(path)
    for arrays in zip(*((one.input_ids_BT, one.counted_BT) for one in (found, expected)), strict=True):
        np.testing.assert_array_equal(*arrays)


def test_rows_of_the_hub_are_read_at_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"text": "all of it", "other": None} for row in ROWS]
    monkeypatch.setattr(hub, "dataset_rows", lambda name, revision, *rest: iter(rows if revision == "c" * 40 else []))
    monkeypatch.setattr(pinning.hub, "find_commit", lambda name, revision: "c" * 40)
    found = load_rows("me/tiny", MODEL_DIR)
    assert (found.spec, found.pinned) == ("me/tiny", "me/tiny@" + "c" * 40)
    assert found.digest == load_rows(write_instructions(tmp_path / "x.jsonl", ROWS), MODEL_DIR).digest


def test_a_completion_counts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [("The sky is", " blue."), ("Answer: ", "yes"), ("Q\n", "\nA  "), ("", "alone in here")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    found = load_rows(write_instructions(tmp_path / "x.jsonl", rows), MODEL_DIR)
    (sky, blue), (asked, yes), (q, a), (nothing, alone) = sides(found, tokenizer)
    assert (sky, blue) == ("The sky is", " blue.</s>")
    # A token that begins before the response has the beginning of it.
    assert (asked.rstrip(), yes.lstrip()) == ("Answer:", "yes</s>")
    assert (q.rstrip(), a.lstrip()) == ("Q", "A  </s>")
    # Nothing predicts the first token.
    assert alone != "alone in here</s>"
    assert nothing + alone == "alone in here</s>"
    assert not found.counted_BT[:, 0].any()


def test_the_eos_of_a_tokenizer_or_a_text_is_not_doubled(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_instructions(tmp_path / "x.jsonl", [{"prompt": "a b", "completion": " c"}])
    ended = write_instructions(tmp_path / "y.jsonl", [{"prompt": "a b", "completion": " c</s>"}])
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    adding = AutoTokenizer.from_pretrained(model)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    adding.save_pretrained(model)
    assert sides(load_rows(path, MODEL_DIR), tokenizer) == [("a b", " c</s>")]
    assert sides(load_rows(ended, MODEL_DIR), tokenizer) == [("a b", " c</s>")]
    assert sides(load_rows(path, model), tokenizer) == [("<s>a b", " c</s>")]


def test_a_token_without_characters_at_the_end_of_a_response_counts(tmp_path: Path) -> None:
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    trimming = AutoTokenizer.from_pretrained(model)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trimming.save_pretrained(model)
    path = write_instructions(tmp_path / "x.jsonl", [{"prompt": "one ", "completion": " two  "}])
    ((prompt, response),) = sides(load_rows(path, model), trimming)
    assert (prompt.rstrip(), response.lstrip()) == ("one", "two  </s>")


def test_rows_with_an_empty_response_are_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    empty = [{"instruction": "x", "output": said} for said in ("", " \n")]
    path = write_instructions(tmp_path / "x.jsonl", [empty[0], *ROWS[:2], empty[1], ROWS[2]])
    assert load_rows(path, MODEL_DIR).digest == load_rows(write_instructions(path, ROWS), MODEL_DIR).digest


def test_long_rows_are_cut_and_those_without_any_response_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_instructions(tmp_path / "x.jsonl", ROWS)
    whole = load_rows(path, MODEL_DIR)
    begins = whole.counted_BT.argmax(axis=1)
    length = int(begins[0]) + 2
    assert begins[2] < length <= begins[1]
    for limits in ({"sequence_length": length}, {"max_length": length}):
        found = load_rows(path, MODEL_DIR, **limits)
        np.testing.assert_array_equal(found.input_ids_BT, whole.input_ids_BT[[0, 2], :length])
        np.testing.assert_array_equal(found.counted_BT, whole.counted_BT[[0, 2], :length])
    least = int(begins.min())
    write_instructions(path, ROWS[::-1])
    with pytest.raises(DataError, match=f"cut after {least} tokens, and no response begins before token {least + 1}: "):
        load_rows(path, MODEL_DIR, sequence_length=least)
    assert load_rows(path, MODEL_DIR, sequence_length=least + 1).num_counted == (begins == least).sum() == 1


def test_a_seed_draws_rows_in_their_order(tmp_path: Path) -> None:
    path = write_instructions(tmp_path / "x.jsonl", SHORT)
    every = [tuple(row[row != PADDING]) for row in load_rows(path, MODEL_DIR).input_ids_BT]
    assert len(every) == 40
    drawn = load_rows(path, MODEL_DIR, samples=9, seed=4)
    places = [every.index(tuple(row[row != PADDING])) for row in drawn.input_ids_BT]
    assert places == sorted(set(places))
    assert len(places) == 9
    assert places != list(range(9))
    assert load_rows(path, MODEL_DIR, samples=9, seed=4) == drawn
    assert load_rows(path, MODEL_DIR, samples=9, seed=5).digest != drawn.digest
    assert load_rows(path, MODEL_DIR, samples=400).digest == load_rows(path, MODEL_DIR).digest
    limit = sum(map(len, every[:7]))
    for tokens, rows in ((limit, 7), (limit - 1, 6), (1, 1)):
        assert len(load_rows(path, MODEL_DIR, tokens=tokens).input_ids_BT) == rows


def test_rows_are_packed_whole_first_fit(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_instructions(tmp_path / "x.jsonl", SHORT)
    alone = load_rows(path, MODEL_DIR)
    sizes = (alone.input_ids_BT != PADDING).sum(axis=1)
    length = int(sizes.max()) + 3
    naive: list[list[int]] = []
    for row, size in enumerate(sizes):
        fits = [one for one in naive if sizes[one].sum() + size <= length]
        (fits[0] if fits else naive.append([]) or naive[-1]).append(row)
    assert len(naive) < 40
    assert any(np.diff(one).max(initial=1) > 1 for one in naive)
    packed = load_rows(path, MODEL_DIR, pack=True, sequence_length=length)
    assert len(packed.input_ids_BT) == len(naive)
    assert packed.input_ids_BT.shape[1] <= length
    for ids, counted, rows in zip(packed.input_ids_BT, packed.counted_BT, naive, strict=True):
        for found, whole in ((ids, alone.input_ids_BT), (counted, alone.counted_BT)):
            expected = np.concatenate([whole[row, : sizes[row]] for row in rows])
            np.testing.assert_array_equal(found[: len(expected)], expected)
        assert (ids[sizes[rows].sum() :] == PADDING).all()
    assert (packed.num_tokens, packed.num_counted) == (alone.num_tokens, alone.num_counted)


def test_all_tokens_of_text_but_the_first_count(model_dir: Path, tmp_path: Path, load: Callable) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    blocks: TokenBlocks = load(path, samples=9)
    options = TextOptions(samples=9, sequence_length=8, seed=0)
    model: dict[str, Any] = {"model_dir": model_dir, "vocab_size": VOCAB_SIZE, "max_length": 64}
    found = load_examples(str(path), **model, options=options, responses=False)
    np.testing.assert_array_equal(found.input_ids_BT, blocks.input_ids_BT)
    assert found.counted_BT.tolist() == [[False] + [True] * 7] * 9
    assert (found.num_tokens, found.num_counted, found.spec) == (72, 63, str(path))


def test_padding_of_tokens_does_not_count(tmp_path: Path) -> None:
    found = load_rows(write_rows(tmp_path / "x.parquet", [[1, 2, 3], [4], [5, 6]]), MODEL_DIR, responses=False)
    assert found.input_ids_BT.tolist() == [[1, 2, 3], [4, PADDING, PADDING], [5, 6, PADDING]]
    assert found.counted_BT.tolist() == [[False, True, True], [False] * 3, [False, True, False]]
    with pytest.raises(DataError, match="sequences of one token have nothing to predict: give longer ones"):
        load_rows(write_rows(tmp_path / "y.parquet", [[1], [4]]), MODEL_DIR, responses=False)


def test_instructions_are_text_where_not_only_responses_count(tmp_path: Path) -> None:
    path = write_instructions(tmp_path / "x.jsonl", ROWS[:2] * 20)
    options = TextOptions(samples=4, sequence_length=16)
    model: dict[str, Any] = {"model_dir": MODEL_DIR, "vocab_size": 4096, "max_length": 64, "options": options}
    found = load_examples(str(path), **model, responses=False)
    np.testing.assert_array_equal(found.input_ids_BT, load_tokens(str(path), **model).input_ids_BT)


@pytest.mark.parametrize("responses", [True, False])
def test_examples_cannot_be_written_and_have_the_digest_of_both_arrays(tmp_path: Path, responses: bool) -> None:
    path = write_instructions(tmp_path / "x.jsonl", ROWS * 2)
    found = load_rows(path, MODEL_DIR, responses=responses, sequence_length=90, samples=2)
    assert len(found.input_ids_BT) == 2
    assert (found.input_ids_BT.dtype, found.counted_BT.dtype) == (np.int32, np.bool_)
    assert found.input_ids_BT.flags.c_contiguous
    for array in (found.input_ids_BT, found.counted_BT):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1
    counted = found.counted_BT.copy()
    counted[0, 5] ^= True
    digests = {
        examples._freeze("x", ids.copy(), other, None).digest
        for ids, other in (
            (found.input_ids_BT, found.counted_BT.copy()),
            (found.input_ids_BT + 1, found.counted_BT.copy()),
            (found.input_ids_BT, counted),
            (found.input_ids_BT.reshape(1, -1), found.counted_BT.copy().reshape(1, -1)),
        )
    }
    assert found.digest in digests
    assert len(digests) == 4


def test_the_last_examples_are_held_out(tmp_path: Path) -> None:
    whole = load_rows(write_instructions(tmp_path / "x.jsonl", SHORT), MODEL_DIR)
    training, validation = split(whole, 12)
    for name in ("input_ids_BT", "counted_BT"):
        parts = [getattr(one, name) for one in (training, validation)]
        assert [len(part) for part in parts] == [28, 12]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(whole, name))
        assert not any(part.flags.writeable for part in parts)
    assert len({one.digest for one in (whole, training, validation)}) == 3
    assert training.spec == validation.spec == whole.spec
    everything, nothing = split(whole, 0)
    assert (everything.digest, nothing.num_tokens) == (whole.digest, 0)
    for wrong in (40, 41, -1):
        with pytest.raises(DataError, match=f"40 examples, and {wrong} of them held out .*: hold out fewer than 40"):
            split(whole, wrong)


def one_row(**columns: Any) -> str:
    return json.dumps({"instruction": "a", "output": "b"}) + "\n" + json.dumps(columns) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", "words", r"is text without prompts and responses: give rows of 'instruction' and 'output', of 'pro"),
        ("x.jsonl", "\n\n", "no rows in it: give rows of 'instruction'"),
        ("x.jsonl", one_row(text="a"), r"line 2: no prompt and no response among the columns \(text\): give rows of"),
        ("x.jsonl", one_row(input_ids=[1]), r"line 2: no prompt and no response among the columns \(input_ids\)"),
        (
            "x.jsonl",
            one_row(instruction="a", input="b"),
            r"line 2 has 'instruction' and no 'output' among the columns \(instruction, input\): "
            r"name the column of the response so, or drop the row",
        ),
        ("x.jsonl", one_row(prompt="a", chosen="b"), r"line 2 has 'prompt' and no 'completion' among .*chosen"),
        ("x.jsonl", one_row(completion="a"), "line 2 has 'completion' and no 'prompt' .*name the column of the prompt"),
        ("x.jsonl", one_row(instruction="a", output=None), "line 2: 'output' is null: give a string, or drop the row"),
        ("x.jsonl", one_row(prompt=None, completion="b"), "line 2: 'prompt' is null"),
        ("x.jsonl", one_row(prompt="a", completion=["b"]), "line 2: 'completion' is of type list"),
        ("x.jsonl", one_row(instruction="a", input=3, output="b"), "line 2: 'input' is of type int"),
        ("x.jsonl", one_row(prompt="a", completion="\ud800"), "line 2: the text has a lone surrogate"),
        (
            "x.jsonl",
            '{"prompt": "a", "completion": ""}\n' * 3,
            r"the responses of all rows \(3\) are empty: give rows whose responses have text",
        ),
        ("x.csv", "question,answer\n1,2\n", r"line 2: no prompt and no response among the columns \(question, answer"),
    ],
)
def test_files_that_are_no_instructions(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert_refused(lambda path: load_rows(path, MODEL_DIR), path, said)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "id": "b"}, r"no prompt and no response among the columns \(text, id\): give rows of"),
        ({"instruction": "a", "input": "b"}, r"row 0 has 'instruction' and no 'output'"),
        ({"id": "a", "output": "b"}, r"row 0 has 'output' and no 'instruction'"),
    ],
)
def test_tables_that_are_no_instructions(tmp_path: Path, name: str, row: dict[str, str], said: str) -> None:
    path = write_instructions(tmp_path / name, [row])
    assert_refused(lambda path: load_rows(path, MODEL_DIR), path, said)


def test_builtin_text_has_no_instructions() -> None:
    with pytest.raises(DataError, match="builtin:calibration is text without prompts and responses: give rows of"):
        load_rows("builtin:calibration", MODEL_DIR)


def test_empty_responses_without_end_are_not_read_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "MOST_EMPTY", 100)
    path = write_instructions(tmp_path / "x.jsonl", [{"prompt": "a", "completion": ""}] * 200)
    with pytest.raises(DataError, match="more than 100 rows with empty responses follow each other: drop them"):
        load_rows(path, MODEL_DIR)
    rows = [{"prompt": "a", "completion": " b" if n % 60 == 59 else ""} for n in range(200)]
    assert len(load_rows(write_instructions(path, rows), MODEL_DIR).input_ids_BT) == 3


def test_more_tokens_than_memory_should_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MOST_IDS", 300)
    path = write_instructions(tmp_path / "x.jsonl", SHORT)
    with pytest.raises(DataError, match="more than 300 tokens to train on: say how many rows to take"):
        load_rows(path, MODEL_DIR)
    rows = [{"prompt": "a", "completion": " b"}] * 30 + [{"prompt": "a", "completion": " b" * 99}]
    with pytest.raises(DataError, match=r"31 rows padded to \d+ tokens are too many: take fewer, or cut them shorter"):
        load_rows(write_instructions(path, rows), MODEL_DIR)


def test_a_vocabulary_that_lacks_a_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_instructions(tmp_path / "x.jsonl", [{"prompt": "a", "completion": ""}, *ROWS])
    ids_BT = load_rows(path, MODEL_DIR).input_ids_BT
    highest = int(ids_BT.max())
    row = 1 + int(ids_BT.max(axis=1).argmax())
    with pytest.raises(DataError, match=f"token id {highest} in row {row}, the model's vocabulary has {highest} "):
        load_rows(path, MODEL_DIR, vocab_size=highest)
    assert isinstance(load_rows(path, MODEL_DIR, vocab_size=highest + 1), Examples)


def test_a_tokenizer_that_cannot_end_a_response(tmp_path: Path, model_dir: Path) -> None:
    path = write_instructions(tmp_path / "x.jsonl", [{"prompt": "w1", "completion": " w2"}])
    with pytest.raises(DataError, match=r"the tokenizer in .* names no EOS token, which ends a response: set eos_tok"):
        load_rows(path, model_dir)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no tokenizer that loads .*: add its files$"):
        load_rows(path, tmp_path / "none", vocab_size=9)


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    path = write_instructions(tmp_path / "x.jsonl", ROWS)
    with pytest.raises(DataError, match=r"does not say which characters a token stands for, so .*: save it as"):
        load_rows(path, tmp_path / "bytes")


def test_a_tokenizer_that_drops_responses(tmp_path: Path) -> None:
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    dropping = AutoTokenizer.from_pretrained(model)
    dropping.backend_tokenizer.normalizer = normalizers.Replace("yes", "")
    dropping.save_pretrained(model)
    path = write_instructions(tmp_path / "x.jsonl", [{"prompt": "a b", "completion": "yes"}] * 2)
    with pytest.raises(DataError, match=r"the tokenizer in .* makes no tokens of any response: check both"):
        load_rows(path, model)
