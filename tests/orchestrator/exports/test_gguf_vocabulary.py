"""llama.cpp tokenizes text as transformers does, and an unknown tokenizer is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from orchestrator.exports.gguf_vocabulary import EXPRESSIONS
from slimllm_ops.models.families import family_named
from tests.orchestrator.exports.gguf_files import (
    ROUNDING,
    SOURCE,
    TEXT,
    TEXTS,
    assert_same_tokens,
    compare,
    edit,
    exported,
    fields_of,
    prune,
    refused,
)
from tests.tiny import save_tiny

# Puts a token before a text that is not the one that begins texts.
BETWEEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"x": {"id": "x", "ids": [5], "tokens": ["x"]}},
}


def train(directory: Path, pre: Any, normalizer: Any = None, ignore_merges: bool = False) -> None:
    """Give a model directory a byte-level tokenizer of 400 tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 3, SOURCE], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(directory)


def after(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Bytes, after a regular expression has cut the text."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def pre_of(name: str) -> pre_tokenizers.PreTokenizer:
    patterns = {known: pattern for pattern, (known, _) in EXPRESSIONS.items()}
    return after(patterns[name]) if name in patterns else pre_tokenizers.ByteLevel(add_prefix_space=False)


def tokenized(folder: Path, name: str, vocab_size: int = 410) -> Path:
    """A pruned model with a byte-level tokenizer, which cuts text as llama.cpp's NAME does."""
    source = save_tiny(family_named("llama"), folder / "dense", vocab_size=vocab_size)
    train(source, pre_of(name), normalizers.NFC() if name == "qwen2" else None, ignore_merges=name == "llama-bpe")
    return prune(source, folder / "model-0.2")


def sentencepiece(folder: Path, prepend: bool, metaspace: bool = False) -> Path:
    """A pruned model with a tokenizer as those that come from SentencePiece's: merges are all ways to a token."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=360, show_progress=False, max_token_length=8)
    trained.train_from_iterator([SOURCE.replace(" ", "▁")], trainer)
    learnt = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    vocab = {token: number for number, token in enumerate([*first, *(token for token, _ in learnt)])}
    merges = [(token[:cut], token[cut:]) for token, _ in learnt for cut in range(1, len(token))]
    merges = [(left, right) for left, right in merges if left in vocab and right in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replaced = normalizers.Replace(" ", "▁")
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first" if prepend else "never", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prepend else replaced
    source = save_tiny(family_named("llama"), folder / "dense", vocab_size=len(vocab))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(source)
    return prune(source, folder / "model-0.2")


@pytest.mark.parametrize("name", ["gpt-2", *(name for name, _ in EXPRESSIONS.values())])
def test_llama_cpp_cuts_text_into_the_same_tokens(llama_cpp: Any, gguf: Any, tmp_path: Path, name: str) -> None:
    directory = tokenized(tmp_path, name)
    path = exported(directory)
    assert_same_tokens(llama_cpp, directory, path)
    compare(llama_cpp, directory, path, ROUNDING)


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("prepend", [False, True])
def test_llama_cpp_cuts_text_as_sentencepiece_does(
    llama_cpp: Any, gguf: Any, tmp_path: Path, prepend: bool, metaspace: bool
) -> None:
    directory = sentencepiece(tmp_path, prepend, metaspace)
    path = exported(directory)
    # Metaspace puts no blank before a blank, llama.cpp does: of texts that begin with one, the first token differs.
    assert_same_tokens(llama_cpp, directory, path, TEXTS[:-1] if metaspace else TEXTS)
    fields = fields_of(gguf, path)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", prepend)
    # Of several merges to a token, the first gives its score.
    merges = ["".join(pair) for pair in json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]]
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert len(merges) > len(set(merges)) > 50
    assert all(scores[token] == -1 - merges.index(token) for token in merges)


def test_the_file_says_what_the_tokenizer_does(gguf: Any, tmp_path: Path) -> None:
    fields = fields_of(gguf, exported(tokenized(tmp_path, "gpt-2")))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (tokens[:2], types[:2]) == (["<s>", "</s>"], [3, 3])
    assert set(types[2:400]) == {1}
    assert (tokens[409], types[400:]) == ("[PAD409]", [5] * 10)
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (False, False)
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_sentencepiece_begins_a_text_with_its_first_token(gguf: Any, shared: Path, tmp_path: Path) -> None:
    directory = prune(shared / "models" / "stories260k-gqa", tmp_path / "pruned")
    fields = fields_of(gguf, exported(directory))
    assert fields["tokenizer.ggml.model"] == "llama"
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_space_prefix"]) == (True, True)
    types = fields["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3]
    assert set(types[3:259]) == {6}
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    # The first two merges of this tokenizer.
    assert (scores["▁t"], scores["he"]) == (-1, -2)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("model", "type"), "WordPiece", "no tokenizer that loads"),
        (("model", "merges"), [], "it is of type BPE with 0 merges"),
        (("model", "ignore_merges"), True, "its ignore_merges is not what llama.cpp's gpt-2 does"),
        (("normalizer",), {"type": "Lowercase"}, "it has a normalizer of type Lowercase"),
        (("pre_tokenizer", "add_prefix_space"), True, "it cuts text in a way for which no"),
        (("pre_tokenizer",), {"type": "Whitespace"}, "it cuts text in a way for which no"),
        (("post_processor",), BETWEEN, "it adds tokens other than BOS and EOS to a text"),
        (("model", "byte_fallback"), True, "it treats blanks differently from SentencePiece"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(
    tmp_path: Path, place: tuple[str, ...], value: object, reason: str
) -> None:
    directory = tokenized(tmp_path, "gpt-2")
    described = json.loads((directory / "tokenizer.json").read_text())
    inner = described
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    (directory / "tokenizer.json").write_text(json.dumps(described))
    assert reason in refused(directory)
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    assert "it has a token id 399, and the model's vocabulary has 390" in refused(tokenized(tmp_path, "gpt-2", 390))


def test_what_ends_a_text_is_the_configs_where_the_tokenizer_has_nothing(gguf: Any, tmp_path: Path) -> None:
    directory = tokenized(tmp_path, "gpt-2")
    edit(directory / "tokenizer_config.json", eos_token=None)
    edit(directory / "config.json", eos_token_id=[7, 8])
    assert fields_of(gguf, exported(directory))["tokenizer.ggml.eos_token_id"] == 7


def test_a_tokenizer_that_ends_no_text_is_refused(tmp_path: Path) -> None:
    directory = tokenized(tmp_path, "gpt-2")
    edit(directory / "tokenizer_config.json", eos_token=None)
    edit(directory / "config.json", eos_token_id=None)
    assert "it has no token that ends a text" in refused(directory)


def test_a_tokenizer_without_all_bytes_is_refused(tmp_path: Path) -> None:
    directory = sentencepiece(tmp_path, prepend=True)
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(text.replace("<0x41>", "<0xZZ>"))
    assert "it has tokens for 255 of 256 bytes" in refused(directory)
