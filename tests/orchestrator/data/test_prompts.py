"""What sampled sequences begin with."""

import numpy as np
import pytest
from transformers import LlamaConfig

from orchestrator.data import DataError
from orchestrator.data.prompts import PROMPT_TOKENS, begin_prompts, draw_prompts, sequences_asked
from slimllm_ops.errors import InputError
from slimllm_ops.stream.padding import PADDING


@pytest.mark.parametrize(("spec", "number"), [("self:3", 3), ("text.txt", 0), ("builtin:heldout", 0), ("./self:3", 0)])
def test_only_self_asks_for_sequences(spec: str, number: int) -> None:
    assert sequences_asked(spec) == number


@pytest.mark.parametrize("spec", ["self:", "self:0", "self:-2", "self:many", "self:1.5", "self:²"])
def test_anything_but_a_number_of_sequences_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match=r"^self:.* is to name how many sequences the model samples: pass self:128"):
        sequences_asked(spec)


@pytest.mark.parametrize(
    ("tokens", "expected"), [((5, 6), 5), ((None, 6), 6), ((None, [7, 6]), 7), ((99, 6), 6), ((0, 6), 0)]
)
def test_a_sequence_begins_as_texts_do(tokens: tuple[int, int], expected: int) -> None:
    config = LlamaConfig(vocab_size=90)
    config.bos_token_id, config.eos_token_id = tokens
    prompts = begin_prompts(config, 3)
    assert (prompts.tolist(), prompts.dtype) == ([[expected]] * 3, np.int32)


def test_a_model_without_such_tokens_needs_text() -> None:
    config = LlamaConfig(vocab_size=90)
    config.bos_token_id = config.eos_token_id = None
    with pytest.raises(InputError, match=r"names neither bos_token_id nor eos_token_id.* --generate"):
        begin_prompts(config, 3)


def test_prompts_follow_each_other_in_the_text_and_every_place_may_be_drawn() -> None:
    ids_BT = np.arange(80, dtype=np.int32).reshape(2, 40)
    prompts = draw_prompts(ids_BT, 500, seed=0)
    assert (prompts.shape, prompts.dtype) == ((500, PROMPT_TOKENS), np.int32)
    assert np.array_equal(prompts, prompts[:, :1] + np.arange(PROMPT_TOKENS))
    places = 40 - PROMPT_TOKENS + 1
    assert set(prompts[:, 0]) == {*range(places), *range(40, 40 + places)}
    assert np.array_equal(draw_prompts(ids_BT, 500, seed=0), prompts)
    assert not np.array_equal(draw_prompts(ids_BT, 500, seed=1), prompts)


def test_no_prompt_holds_padding() -> None:
    ids_BT = np.full((3, 50), PADDING, dtype=np.int32)
    ids_BT[0, :2], ids_BT[1, :35], ids_BT[2, :10] = 1, 2, 3
    assert set(draw_prompts(ids_BT, 200, seed=0).flatten()) == {2}


def test_short_blocks_leave_one_token_to_sample() -> None:
    ids_BT = np.arange(8, dtype=np.int32).reshape(2, 4)
    assert set(draw_prompts(ids_BT, 99, seed=0)[:, 0]) == {0, 1, 4, 5}
    with pytest.raises(DataError, match="blocks of one token"):
        draw_prompts(ids_BT[:, :1], 3, seed=0)
