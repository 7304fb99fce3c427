"""What llama.cpp loads from an export computes what transformers does; what it could not is refused.

Reading a file back needs the package `gguf`, running it `llama-cpp-python`: pip install -e '.[gguf-test]'.
"""

import inspect
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from orchestrator.cli import main
from orchestrator.exports.gguf import export_gguf
from orchestrator.exports.gguf_vocabulary import EXPRESSIONS
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.decide.recovery import Line
from slimllm_ops.models.families import FAMILIES, family_named, layer_shape
from tests.conftest import content, files_of_at_most
from tests.tiny import save_tiny

BIASES = {"attention_bias": True, "mlp_bias": True}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
# Every build: the family, and what its config says beside the family's own settings (Llama: llama3's RoPE, tied, GQA).
BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "plain-rope": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "biases": ("llama", {**BIASES, "tie_word_embeddings": False}),
    "every-head-its-own": ("llama", {"num_key_value_heads": 4}),
    "wide-heads": ("llama", {"head_dim": 12}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "yarn-of-another-amplitude": ("llama", {"rope_parameters": {**YARN, "attention_factor": 0.7}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
}
# Of logits whose standard deviation is 3; float32 against float64 in transformers alone differs by up to 4e-5.
ROUNDING = 5e-4
TEXT = "Don't say 1234567 or  naïve things: it's ünïque,\t🚀 数字 123 \n\n   def f(x):\n    return x  \n I'LL GO."

SOURCE = inspect.getsource(Checkpoint)
TEXTS = (TEXT, SOURCE, "a", " a")

# Puts a token before a text that is not the one that begins texts.
BETWEEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"x": {"id": "x", "ids": [5], "tokens": ["x"]}},
}


@pytest.fixture(scope="session")
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")


@pytest.fixture(scope="session")
def llama_cpp(gguf: Any) -> Any:
    return pytest.importorskip("llama_cpp", reason="pip install -e '.[gguf-test]'")


def decision(seed: int, kept: int, units: int, hidden: int) -> Decision:
    """A random choice of units, with a recovery that changes the weights a little and adds a bias that matters."""
    generator = torch.Generator().manual_seed(seed)
    chosen = sorted(torch.randperm(units, generator=generator)[:kept].tolist())
    scale_D, bias_D = torch.randn(2, hidden, generator=generator, dtype=torch.float64)
    return Decision(tuple(chosen), (0.0,) * units, Line(1 + 0.1 * scale_D, 0.1 * bias_D, 0.0), 0.0)


def free_plans(source: Path) -> list[LayerPlan]:
    """Plans that leave every layer another shape, and some branches as they are."""
    config = Checkpoint.open(source).config
    shape, hidden = layer_shape(config, 0), config.hidden_size
    units, channels = shape.num_attention_units, shape.intermediate_size
    return [
        LayerPlan(
            attention=decision(layer, units - 1 - layer // 3 % 2, units, hidden) if layer % 3 != 1 else None,
            mlp=decision(100 + layer, channels - 5 - layer, channels, hidden) if layer % 3 != 2 else None,
        )
        for layer in range(config.num_hidden_layers)
    ]


def uniform_plans(source: Path) -> list[LayerPlan]:
    """Plans that leave every layer the same shape."""
    config = Checkpoint.open(source).config
    shape, hidden = layer_shape(config, 0), config.hidden_size
    units, channels = shape.num_attention_units, shape.intermediate_size
    return [
        LayerPlan(
            attention=decision(layer, units - 1, units, hidden),
            mlp=decision(100 + layer, channels - 8, channels, hidden),
        )
        for layer in range(config.num_hidden_layers)
    ]


def untouched(source: Path) -> list[LayerPlan]:
    """Plans that take nothing."""
    return [LayerPlan()] * Checkpoint.open(source).num_layers


Plans = Callable[[Path], list[LayerPlan]]
KINDS: dict[str, Plans] = {"deci": free_plans, "llama": uniform_plans}


def prune(source: Path, directory: Path, plans: Plans = free_plans) -> Path:
    writer = CheckpointWriter(Checkpoint.open(source), directory)
    for layer, plan in enumerate(plans(source)):
        writer.write_layer(layer, plan)
    writer.finish(plans(source))
    return directory


def pruned_build(build: str, folder: Path, plans: Plans = free_plans, dtype: torch.dtype = torch.float32) -> Path:
    model_type, settings = BUILDS[build]
    source = save_tiny(family_named(model_type), folder / "dense", **settings)
    if dtype != torch.float32:
        AutoModelForCausalLM.from_pretrained(source).to(dtype).save_pretrained(source)
    return prune(source, folder / "model-0.2", plans)


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A Llama of which every layer has another shape."""
    return pruned_build("llama", tmp_path)


def exported(directory: Path, path: Path | None = None) -> Path:
    """Export it, and return where to."""
    path = path or directory.with_name(f"{directory.name}.gguf")
    export_gguf(directory, path, overwrite=False)
    return path


def fields_of(gguf: Any, path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(gguf: Any, path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as float32, in the order of axes that transformers has."""
    held = {}
    for tensor in gguf.GGUFReader(path).tensors:
        bits = np.ascontiguousarray(tensor.data)
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            bits = (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        held[tensor.name] = bits.astype(np.float32).reshape([int(size) for size in reversed(tensor.shape)])
    return held


def in_turns(rows: np.ndarray, heads: int) -> np.ndarray:
    """Naive: of each head, row i of the first half goes to 2i, and row i of the second to 2i + 1."""
    turned, width = np.empty_like(rows), len(rows) // heads
    for head in range(heads):
        for i in range(width // 2):
            turned[head * width + 2 * i] = rows[head * width + i]
            turned[head * width + 2 * i + 1] = rows[head * width + width // 2 + i]
    return turned


def logits_of(llama_cpp: Any, path: Path, ids: list[int]) -> np.ndarray:
    """What llama.cpp computes, with keys and values in float32 rather than its default of float16."""
    threads = {"n_threads": 1, "n_threads_batch": 1}
    # Without this the program's own lines would be taken for errors.
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, **threads)
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    model.close()
    return logits


def compare(llama_cpp: Any, directory: Path, path: Path, tolerance: float) -> None:
    """Logits agree at every position, and so does the token that comes next."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, size=48).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = logits_of(llama_cpp, path, ids)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert (found.argmax(1) == expected.argmax(1)).all()


def assert_same_text(llama_cpp: Any, directory: Path, path: Path) -> None:
    """From the same words, the likeliest go on in the same way."""
    words = "Once upon a time, there was a"
    model = llama_cpp.Llama(str(path), n_ctx=64, verbose=False, type_k=0, type_v=0, n_threads=1, n_threads_batch=1)
    found = model.create_completion(words, max_tokens=24, temperature=0.0)["choices"][0]["text"]
    model.close()
    tokenizer, dense = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer(words, return_tensors="pt")["input_ids"]
    whole = dense.float().generate(ids, max_new_tokens=24, do_sample=False)[0]
    assert len(found) > 20
    assert found.strip() == tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", BUILDS)
def test_llama_cpp_computes_what_transformers_does(llama_cpp: Any, tmp_path: Path, build: str, kind: str) -> None:
    directory = pruned_build(build, tmp_path, KINDS[kind])
    compare(llama_cpp, directory, exported(directory), ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "tolerance"), [("lab-llama-11m", 0.01), ("stories260k-gqa", ROUNDING)])
def test_real_models_too(llama_cpp: Any, shared: Path, tmp_path: Path, name: str, tolerance: float, kind: str) -> None:
    # The 11M model is float16, in which llama.cpp multiplies what is stored so; transformers does in float32 here.
    directory = prune(shared / "models" / name, tmp_path / "pruned", KINDS[kind])
    path = exported(directory)
    compare(llama_cpp, directory, path, tolerance)
    assert_same_tokens(llama_cpp, directory, path)
    assert_same_text(llama_cpp, directory, path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", BUILDS)
def test_the_file_says_what_each_layer_has(gguf: Any, tmp_path: Path, build: str, kind: str) -> None:
    directory = pruned_build(build, tmp_path, KINDS[kind])
    config = Checkpoint.open(directory).config
    fields = fields_of(gguf, exported(directory))
    assert fields["general.architecture"] == kind
    for name, key in (
        ("attention.head_count", "num_attention_heads_per_layer"),
        ("attention.head_count_kv", "num_key_value_heads_per_layer"),
        ("feed_forward_length", "intermediate_size_per_layer"),
    ):
        numbers = getattr(config, key)
        assert fields[f"{kind}.{name}"] == (numbers if kind == "deci" else numbers[0])
    width = 12 if build == "wide-heads" else 8
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert fields[f"{kind}.{name}"] == width
    assert fields[f"{kind}.block_count"] == 3
    assert fields[f"{kind}.context_length"] == 64
    assert fields[f"{kind}.vocab_size"] == 97
    assert fields[f"{kind}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert fields["tokenizer.ggml.model"] == "none"
    assert fields["general.name"] == "model-0.2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", ["biases", "qwen2"])
def test_every_tensor_is_there_as_it_was(gguf: Any, tmp_path: Path, build: str, dtype: torch.dtype) -> None:
    directory = pruned_build(build, tmp_path, dtype=dtype)
    path = exported(directory)
    checkpoint, held = Checkpoint.open(directory), tensors_of(gguf, path)
    renamed = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
    }
    renamed |= {f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"}
    renamed |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    for layer in range(3):
        shape = layer_shape(checkpoint.config, layer)
        heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_key_value_heads}
        for name, tensor in checkpoint.read_layer(layer).items():
            module, _, kind = name.rpartition(".")
            expected = tensor.float().numpy()
            if renamed[module] in heads:
                expected = in_turns(expected, heads[renamed[module]])
            np.testing.assert_array_equal(held.pop(f"blk.{layer}.{renamed[module]}.{kind}"), expected)
    outside = {
        "model.embed_tokens": "token_embd.weight",
        "model.norm": "output_norm.weight",
        "lm_head": "output.weight",
    }
    for module in checkpoint.outside():
        expected = checkpoint.read_module(module)["weight"].float().numpy()
        np.testing.assert_array_equal(held.pop(outside[module]), expected)
    # Llama's own here has a scaled RoPE.
    assert set(held) == ({"rope_freqs.weight"} if build == "biases" else set())
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2}
    assert kinds == {{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(dtype).removeprefix("torch.")]}
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 1} == {"F32"}


def test_a_tied_head_is_the_embedding_though_it_is_stored(gguf: Any, tmp_path: Path) -> None:
    source = save_tiny(family_named("llama"), tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    directory = prune(source, tmp_path / "pruned")
    assert "lm_head" in Checkpoint.open(directory).outside()
    held = tensors_of(gguf, exported(directory))
    assert "token_embd.weight" in held
    assert "output.weight" not in held


def add_to_layer(directory: Path, name: str) -> None:
    checkpoint = Checkpoint.open(directory)
    CheckpointWriter(checkpoint, directory).write_tensors(2, checkpoint.read_layer(2) | {name: torch.ones(4)})


def test_what_is_computed_anew_is_left_out(gguf: Any, pruned: Path) -> None:
    before = exported(pruned)
    add_to_layer(pruned, "self_attn.rotary_emb.inv_freq")
    assert exported(pruned, pruned.with_name("after.gguf")).read_bytes() == before.read_bytes()


def test_a_tensor_that_llama_cpp_has_no_place_for_is_refused(pruned: Path) -> None:
    add_to_layer(pruned, "self_attn.q_norm.weight")
    assert "holds model.layers.2.self_attn.q_norm.weight, which llama.cpp has no place for" in refused(pruned)


def test_layers_are_let_go_before_the_next_is_read(gguf: Any, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    read_layer = Checkpoint.read_layer

    def watched(checkpoint: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
        assert not [one for one in held if one() is not None]
        tensors = read_layer(checkpoint, layer)
        held.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    monkeypatch.setattr(Checkpoint, "read_layer", watched)
    exported(pruned)
    assert len(held) > 20


def test_the_same_checkpoint_gives_the_same_bytes(gguf: Any, pruned: Path, tmp_path: Path) -> None:
    first, second = exported(pruned), exported(pruned, tmp_path / "second.gguf")
    assert first.read_bytes() == second.read_bytes()


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


def assert_same_tokens(llama_cpp: Any, directory: Path, path: Path, texts: tuple[str, ...] = TEXTS) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in texts:
        found = model.tokenize(text.encode(), add_bos=True, special=False)
        assert tokenizer.convert_ids_to_tokens(found) == tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    model.close()


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


def refused(*arguments: object) -> str:
    """The one line that a command ends in."""
    result = CliRunner().invoke(main, ["export", *map(str, arguments), "--to", "gguf"])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("slimllm: ")
    return line


def test_the_command_says_where_the_file_is(gguf: Any, pruned: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(pruned), "--to", "gguf"], catch_exceptions=False)
    path = pruned.with_name("model-0.2.gguf")
    assert (result.exit_code, result.stdout) == (0, f"gguf: {path}, of llama.cpp's architecture deci\n")
    assert fields_of(gguf, path)["general.architecture"] == "deci"
    assert {one.name for one in pruned.parent.iterdir()} == {"dense", "model-0.2", "model-0.2.gguf"}


def test_a_file_that_is_there_is_replaced_only_if_asked(gguf: Any, pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "there.gguf"
    path.write_text("mine")
    assert "exists: choose another --output, or pass --overwrite" in refused(pruned, "--output", path)
    assert path.read_text() == "mine"
    command = ["export", str(pruned), "--to", "gguf", "--output", str(path), "--overwrite"]
    assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0
    assert path.read_bytes().startswith(b"GGUF")


def test_a_place_where_no_file_can_be_is_refused(pruned: Path, tmp_path: Path) -> None:
    assert "is a directory: name a file" in refused(pruned, "--output", tmp_path)
    assert "there is no directory" in refused(pruned, "--output", tmp_path / "none" / "model.gguf")


def test_without_the_package_one_line_says_what_to_install(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    before = content(pruned.parent)
    assert refused(pruned).endswith("not installed: pip install -e '.[gguf]' in slimllm's checkout")
    assert content(pruned.parent) == before


def test_what_is_no_pruned_checkpoint_is_refused(pruned: Path, tmp_path: Path) -> None:
    assert "none is no directory: pass what slimllm prune wrote" in refused(tmp_path / "none")
    assert "dense is no pruned model (its type is llama)" in refused(pruned.parent / "dense")
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json" in refused(tmp_path / "empty")


@pytest.mark.parametrize(
    "model_type", [one.model_type for one in FAMILIES if one.model_type not in ("llama", "mistral", "qwen2")]
)
def test_other_families_are_refused(tmp_path: Path, model_type: str) -> None:
    source = save_tiny(family_named(model_type), tmp_path / "dense")
    directory = prune(source, tmp_path / "pruned", untouched)
    line = refused(directory)
    assert f"{family_named(model_type).name} is not a Llama in llama.cpp; supported: llama, mistral, qwen2" in line


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "its sliding_window is 8, of 64 positions"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "its sliding_window is 8, of 64 positions",
        ),
        ("llama", {"hidden_act": "gelu"}, "its hidden_act is gelu, llama.cpp's is silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "its RoPE scaling is dynamic; supported: default, linear, llama3, yarn",
        ),
        (
            "llama",
            {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
            "RoPE turns 4 of the 8 numbers of its heads, in llama.cpp all",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    tmp_path: Path, model_type: str, settings: dict[str, Any], reason: str
) -> None:
    directory = prune(save_tiny(family_named(model_type), tmp_path / "dense", **settings), tmp_path / "pruned")
    assert reason in refused(directory)
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_window_as_wide_as_the_context_does_not_matter(llama_cpp: Any, tmp_path: Path) -> None:
    source = save_tiny(family_named("mistral"), tmp_path / "dense", sliding_window=64)
    directory = prune(source, tmp_path / "pruned")
    compare(llama_cpp, directory, exported(directory), ROUNDING)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("model", "type"), "WordPiece", "no tokenizer that loads"),
        (("model", "merges"), [], "it is of type BPE with 0 merges"),
        (("model", "ignore_merges"), True, "its ignore_merges is not what llama.cpp's gpt-2 does"),
        (("normalizer",), {"type": "Lowercase"}, "it has a normalizer of type Lowercase"),
        (("pre_tokenizer", "add_prefix_space"), True, "it cuts text in another way"),
        (("pre_tokenizer",), {"type": "Whitespace"}, "it cuts text in another way"),
        (("post_processor",), BETWEEN, "it adds other tokens to a text than the first and the last"),
        (("model", "byte_fallback"), True, "it treats blanks in another way than SentencePiece"),
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
    assert "it has a token 399, and the model's vocabulary is 390" in refused(tokenized(tmp_path, "gpt-2", 390))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


def test_a_full_disk_leaves_nothing(gguf: Any, pruned: Path) -> None:
    before = content(pruned.parent)
    with files_of_at_most(20_000):
        result = CliRunner().invoke(main, ["export", str(pruned), "--to", "gguf"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"slimllm: the system refused {pruned}.gguf: ")
    assert content(pruned.parent) == before


def test_a_damaged_weight_leaves_nothing(gguf: Any, pruned: Path) -> None:
    checkpoint = Checkpoint.open(pruned)
    tensors = checkpoint.read_layer(2)
    tensors["mlp.up_proj.weight"][0, 0] = torch.nan
    CheckpointWriter(checkpoint, pruned).write_tensors(2, tensors)
    before = content(pruned.parent)
    assert "layer 2 of" in refused(pruned)
    assert content(pruned.parent) == before
