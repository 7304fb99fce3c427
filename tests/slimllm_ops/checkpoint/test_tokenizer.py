"""A written model cuts text as its source does: for every family, and every tokenizer that its files may describe."""

import json
import shutil
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from slimllm_ops.checkpoint import tokenizer as written_tokenizer
from slimllm_ops.checkpoint.companions import plan_companions
from slimllm_ops.errors import CheckpointError, ReadBackError
from slimllm_ops.models.families import FAMILIES, Family, family_named
from tests.elsewhere import Elsewhere
from tests.tiny import tiny_config

TEXTS = (
    "It's 2023 and 650841823 people.  They've\twaited 3.14 s\n\n",
    " naïve ÇA, 東京 12 \U0001f469\u200d\U0001f4bb e\u0301",
    "<s>one</s><unk> <|end|>two <|user|> three▁four",
)
CHAT = [{"role": "user", "content": "How warm?"}]
TOOLS = [{"type": "function", "function": {"name": "warmth", "description": "x", "parameters": {}}}]
DIGITS_BY_THREE = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = ["It is the year 2023 and 650841823 people have waited for 3.14 s. " * 3, *map(str, range(900, 1400, 7))]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|end|>", "<|user|>"]


def byte_level() -> Tokenizer:
    """Return a BPE on bytes that cuts digits by three, and begins each text with a token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGITS_BY_THREE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return made


def sentences() -> Tokenizer:
    """Return a BPE as those that come from SentencePiece's: spaces are letters, unknown text becomes bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False, max_token_length=9)
    )
    return made


def pieces() -> Tokenizer:
    """Return a unigram model, with a normalizer that transformers' classes for such models do not build."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {"bytes": byte_level, "sentences": sentences, "pieces": pieces}
# The classes that hub files name; "" names none, and None is no tokenizer_config.json at all.
CLASSES = (
    *("GPT2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"),
    *("GemmaTokenizer", "GPTNeoXTokenizer", "CodeLlamaTokenizer", "CohereTokenizer", "PreTrainedTokenizerFast"),
    *("TokenizersBackend", "MadeUpTokenizer", "", None),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with tokenizer.json for every kind, and one with the files that came before it."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in (*KINDS, "vocab and merges")}
    for kind, make in KINDS.items():
        make().save(str(folders[kind] / "tokenizer.json"))
    byte_level().model.save(str(folders["vocab and merges"]))
    return folders


def describe(directory: Path, family: Family, files: Path, **settings: Any) -> Path:
    """Make the source: its config, its vocabulary, and tokenizer_config.json with what is given."""
    shutil.copytree(files, directory)
    tiny_config(family).save_pretrained(directory)
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write(source: Path, directory: Path, family: Family) -> Path:
    """Write what stands beside the weights of the source's pruned model."""
    directory.mkdir()
    plan_companions(source).copy(directory)
    config = json.loads((source / "config.json").read_text())
    code = family.module.rpartition(".")[2]
    config |= {"model_type": f"pruned_{family.model_type}"}
    config |= {"auto_map": {"AutoConfig": f"{code}.Pruned{family.name}Config"}}
    (directory / "config.json").write_text(json.dumps(config))
    written_tokenizer.settle(source, directory)
    return directory


def results(directory: Path) -> Any:
    """What a user gets from a tokenizer."""
    loaded = AutoTokenizer.from_pretrained(directory)
    ids = [
        loaded(text, add_special_tokens=special, verbose=False)["input_ids"]
        for text in TEXTS
        for special in (True, False)
    ]
    chat = loaded.apply_chat_template(CHAT, tools=TOOLS, tokenize=False) if loaded.chat_template else None
    return {
        "ids": ids,
        "text": [loaded.decode(one, skip_special_tokens=skip) for one in ids for skip in (True, False)],
        "inputs": list(loaded(TEXTS[0])),
        "special": (loaded.bos_token, loaded.eos_token, loaded.pad_token, loaded.unk_token),
        "most": loaded.model_max_length,
        "chat": chat,
    }


def settings_of(named: str | None) -> dict[str, Any]:
    """Return what tokenizer_config.json says if it names a class, or none."""
    if named is None:
        return {}
    template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{{ tools }}"
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    more = {"model_max_length": 77, "chat_template": template}
    return ({"tokenizer_class": named} if named else {}) | special | more


def compare(family: Family, made: dict[str, Path], folder: Path, first: int, step: int) -> int:
    """Compare every `step`-th combination from the `first` on; return how many of them transformers loads."""
    compared = 0
    for kind, named in list(product(made, CLASSES))[first::step]:
        place = folder / f"{kind} {named}"
        source = describe(place / "source", family, made[kind], **settings_of(named))
        try:
            expected = results(source)
        # Any exception: some classes do not take some vocabularies.
        except Exception:
            continue
        compared += 1
        assert results(write(source, place / "written", family)) == expected, (kind, named)
    return compared


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_ids_are_those_of_the_source(family: Family, made: dict[str, Path], tmp_path: Path) -> None:
    assert compare(family, made, tmp_path, first=FAMILIES.index(family) % 5, step=5) > 3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_ids_are_those_of_the_source_for_every_class(family: Family, made: dict[str, Path], tmp_path: Path) -> None:
    assert compare(family, made, tmp_path, first=0, step=1) > 30


ELSEWHERE = """
import json
from transformers import AutoTokenizer
for directory in {directories!r}:
    loaded = AutoTokenizer.from_pretrained(directory, **{asked!r})
    print("\\nids:", json.dumps([loaded(text, verbose=False)["input_ids"] for text in {texts!r}]))
"""


@pytest.mark.parametrize("asked", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}], ids=str)
def test_the_ids_are_the_same_where_this_package_is_not(
    made: dict[str, Path], tmp_path: Path, elsewhere: Elsewhere, asked: dict[str, bool]
) -> None:
    written = []
    for number, (name, kind, named) in enumerate(
        [
            ("olmo2", "bytes", "GPT2Tokenizer"),
            ("llama", "sentences", "LlamaTokenizer"),
            ("llama", "bytes", "LlamaTokenizer"),
            ("qwen2", "bytes", None),
            ("qwen2", "vocab and merges", None),
            ("gemma", "sentences", ""),
            ("mistral", "pieces", "MadeUpTokenizer"),
            ("phi3", "sentences", "LlamaTokenizer"),
        ]
    ):
        family = family_named(name)
        source = describe(tmp_path / f"source {number}", family, made[kind], **settings_of(named))
        target = write(source, tmp_path / f"written {number}", family)
        for file in (family.module, "slimllm_ops.models.pruned.pruned_layers"):
            shutil.copy(Path(sys.modules[file].__file__ or ""), target)
        written += [source, target]
    program = ELSEWHERE.format(directories=[str(one) for one in written], texts=TEXTS, asked=asked)
    ended = elsewhere.run(program, tmp_path)
    assert ended.code == 0, ended.stderr[-2000:]
    # Where the user has not said whether to trust code, transformers asks whether to run the model's.
    ids = [json.loads(line[5:]) for line in ended.stdout.splitlines() if line.startswith("ids: ")]
    assert len(ids) == 16
    assert ids[::2] == ids[1::2]


def test_what_needs_no_change_is_not_changed(made: dict[str, Path], tmp_path: Path) -> None:
    family = family_named("llama")
    source = describe(
        tmp_path / "source", family, made["bytes"], tokenizer_class="TokenizersBackend", odd=[1, {"a": 2}]
    )
    (source / "tokenizer_config.json").write_text('{"odd": 1,\n\n "tokenizer_class":  "PreTrainedTokenizerFast"}')
    written = write(source, tmp_path / "written", family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (written / name).read_bytes() == (source / name).read_bytes()


def test_the_flag_that_mends_old_mistral_tokenizers_does_so_in_the_pruned_model(
    made: dict[str, Path], tmp_path: Path
) -> None:
    family = family_named("mistral")
    source = describe(tmp_path / "source", family, made["bytes"], tokenizer_class="LlamaTokenizer")
    # Transformers looks at large vocabularies only.
    rules = json.loads((source / "tokenizer.json").read_text())
    rules["model"]["vocab"] |= {f"more {number}": number for number in range(400, 100_100)}
    (source / "tokenizer.json").write_text(json.dumps(rules))
    plain = results(source)
    described = json.loads((source / "config.json").read_text()) | {"transformers_version": "4.57.1"}
    (source / "config.json").write_text(json.dumps(described))
    settings = {"tokenizer_class": "LlamaTokenizer", "fix_mistral_regex": True}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert results(source)["ids"] != plain["ids"]
    directory = tmp_path / "written"
    directory.mkdir()
    plan_companions(source).copy(directory)
    # What a run writes: transformers puts its own version into a config.
    (directory / "config.json").write_text(
        json.dumps(described | {"model_type": "pruned_mistral", "transformers_version": "5.23.0"})
    )
    written_tokenizer.settle(source, directory)
    assert results(directory) == results(source)


def test_a_class_of_its_own_that_is_not_needed_is_left_out(made: dict[str, Path], tmp_path: Path) -> None:
    family = family_named("qwen2")
    code = {"auto_map": {"AutoTokenizer": [None, "mine.MyTokenizer"]}}
    source = describe(tmp_path / "source", family, made["bytes"], tokenizer_class="MyTokenizer", **code)
    expected = AutoTokenizer.from_pretrained(source, trust_remote_code=False)(TEXTS[0])["input_ids"]
    written = write(source, tmp_path / "written", family)
    for trusted in (False, True):
        assert AutoTokenizer.from_pretrained(written, trust_remote_code=trusted)(TEXTS[0])["input_ids"] == expected


def test_a_tokenizer_that_needs_its_own_code_is_told(made: dict[str, Path], tmp_path: Path) -> None:
    code = {"auto_map": {"AutoTokenizer": ["mine.MyTokenizer", None]}}
    source = describe(tmp_path / "source", family_named("llama"), made["bytes"], **code)
    (source / "mine.py").write_text("raise SystemExit('was run')")
    config = {"model_type": "pruned_llama"}
    line = written_tokenizer.rehearse(plan_companions(source), config)
    assert line is not None
    assert line.endswith(
        "it needs Python code of the model, which does not come along; its files do, not checked and without the name "
        f"of that code, so load the tokenizer from {source}"
    )
    written = write(source, tmp_path / "written", family_named("llama"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["auto_map"]
    assert json.loads((written / "tokenizer_config.json").read_text()) == settings
    assert not (written / "mine.py").exists()
    written_tokenizer.require_same(source, written)


def test_without_a_vocabulary_there_is_nothing_to_write_or_to_check(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    source = describe(tmp_path / "source", family_named("llama"), tmp_path / "none")
    assert written_tokenizer.rehearse(plan_companions(source), {"model_type": "pruned_llama"}) is None
    written = write(source, tmp_path / "written", family_named("llama"))
    assert not (written / "tokenizer_config.json").exists()
    written_tokenizer.require_same(source, written)


@pytest.mark.parametrize(
    ("name", "change", "differs"),
    [
        ("tokenizer.json", lambda text: text.replace('"use_regex": false', '"use_regex": true'), "its rules"),
        ("tokenizer.json", lambda text: text[:1000], "does not load"),
        ("tokenizer_config.json", lambda text: text.replace("77", "78"), "model_max_length"),
        ("tokenizer_config.json", lambda text: text.replace("m.content", "m.role"), "chat_template"),
        ("tokenizer_config.json", lambda text: text.replace('"<pad>"', '"<|end|>"'), "its special tokens"),
    ],
)
def test_a_tokenizer_that_differs_ends_in_an_error(
    made: dict[str, Path], tmp_path: Path, name: str, change: Callable[[str], str], differs: str
) -> None:
    family = family_named("llama")
    settings = settings_of("PreTrainedTokenizerFast")
    source = describe(tmp_path / "source", family, made["bytes"], **settings)
    written = write(source, tmp_path / "written", family)
    written_tokenizer.require_same(source, written)
    before = (written / name).read_text()
    assert change(before) != before
    (written / name).write_text(change(before))
    with pytest.raises(ReadBackError, match=rf"^the tokenizer as written in .* differs from that in .*{differs}"):
        written_tokenizer.require_same(source, written)


def test_broken_settings_are_one_line(made: dict[str, Path], tmp_path: Path) -> None:
    source = describe(tmp_path / "source", family_named("llama"), made["bytes"])
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json is not valid JSON"):
        written_tokenizer.rehearse(plan_companions(source), {"model_type": "pruned_llama"})
