"""What stands beside the weights comes along, is left out with a word, or is refused before anything is computed."""

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slimllm_ops.checkpoint import companions
from slimllm_ops.checkpoint.companions import Companions, plan_companions
from slimllm_ops.errors import CheckpointError

COPIED = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "vocab.txt": "a",
    "merges.txt": "a b",
    "spiece.model": "\n",
    "sentencepiece.bpe.model": "\n",
    "tekken.json": "{}",
    "cl100k_base.tiktoken": "YQ== 0",
    "chat_template.jinja": "{{ x }}",
    "chat_template.json": "{}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "generation_config.json": "{}",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "LICENSE": "free",
    "LICENCE.md": "free",
    "COPYING": "free",
    "NOTICE.txt": "see",
    "USE_POLICY.md": "do good",
    "LICENSES/Apache-2.0.txt": "free",
    "LICENSES/third/MIT.txt": "free",
    "tokenizer/tokenizer.json": "{}",
    "assets/words.vocab": "a",
}
NOT_MISSED = {
    "config.json": "{}",
    "model.safetensors": "x",
    "model-00001-of-00002.safetensors": "x",
    "model.safetensors.index.json": "{}",
    "README.md": "the dense model",
    "readme_zh.md": "the dense model",
    ".gitattributes": "x",
    ".git/HEAD": "x",
    ".cache/huggingface/x.lock": "x",
    "pruning/plan.json": "{}",
    "pruned_llama.py": "x",
    "LICENSES/.DS_Store": "x",
}
LEFT_OUT = {
    "consolidated.00.pth": "dense weights",
    "pytorch_model.bin": "dense weights",
    "pytorch_model.bin.index.json": "dense weights",
    "tf_model.h5": "dense weights",
    "flax_model.msgpack": "dense weights",
    "model.Q4_K_M.GGUF": "dense weights",
    "optimizer.pt": "dense weights",
    "training_args.bin": "dense weights",
    "consolidated.safetensors": "dense weights",
    "params.json": "dense weights",
    "onnx/model.onnx": "dense weights",
    "original/consolidated.00.pth": "dense weights",
    "tokenization_mine.py": "code",
    "modeling_mine.py": "code",
    "custom_generate/generate.py": "code",
    "run.sh": "code",
    "vocab.pkl": "pickle",
    "modules.json": "names code",
    "kernel.so.1": "code",
    "tool.pyz": "code",
    "trainer_state.json": "training state",
    "runs/events.out.tfevents.1": "training state",
    "checkpoint-500/config.json": "another model",
    "adapter_config.json": "describes other weights",
    "quantize_config.json": "describes other weights",
    "curve.png": "picture or data",
    "all.zip": "archive",
}


def make(directory: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    return directory


def copied(plan: Companions, directory: Path) -> dict[str, str]:
    plan.copy(directory)
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_text() for path in files}


def test_everything_comes_along_but_what_is_told(tmp_path: Path) -> None:
    source = make(tmp_path / "source", COPIED | NOT_MISSED | dict.fromkeys(LEFT_OUT, "x"))
    plan = plan_companions(source)
    assert copied(plan, tmp_path / "written") == COPIED
    expected = {f"{name.partition('/')[0]}{'/' * ('/' in name)}": reason for name, reason in LEFT_OUT.items()}
    assert dict(plan.left_out) == expected


def test_one_line_tells_what_is_left_out(tmp_path: Path) -> None:
    plan = plan_companions(make(tmp_path, {"a.py": "", "b.onnx": "", "tokenizer.json": "{}"}))
    assert plan.told() == f"not copied from {tmp_path}: a.py (code), b.onnx (dense weights)"
    (tmp_path / "a.py").unlink()
    (tmp_path / "b.onnx").unlink()
    assert plan_companions(tmp_path).told() is None
    make(tmp_path, {f"{number:02}\n.py": "" for number in range(30)})
    line = plan_companions(tmp_path).told()
    assert line is not None
    assert line.endswith("07\\n.py (code) and 22 more")
    assert "\n" not in line


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_one_by_any_name(tmp_path: Path, protocol: int) -> None:
    for name, held in (("tokenizer.model", {"a": 1}), ("vocab.txt", os.system)):
        (tmp_path / name).write_bytes(pickle.dumps(held, protocol=protocol) + b"more")
    assert plan_companions(tmp_path).left_out == (("tokenizer.model", "pickle"), ("vocab.txt", "pickle"))


def test_an_archive_and_a_program_are_ones_by_any_name(tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "x"), "zip", make(tmp_path / "folder", {"a": "b"}))
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "x.zip").rename(tmp_path / "vocab.json")
    make(tmp_path, {"tokenizer": "#!/bin/sh\n"})
    assert dict(plan_companions(tmp_path).left_out) == {"tokenizer": "code", "vocab.json": "archive"}


def test_sizes_and_numbers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "MOST_FILES", 3)
    make(tmp_path, {"LICENSE": "free", **{f"LICENSES/{number}": "free" for number in range(4)}})
    for name, size in (("a.txt", companions.LARGEST_FILE + 1), *((f"b{n}", companions.LARGEST_FILE) for n in range(5))):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    plan = plan_companions(tmp_path)
    assert [str(path) for path in plan.files] == ["LICENSE", "b0", "b1", "b2"]
    assert dict(plan.left_out) == {
        "a.txt": "134 MB, more than such a file needs",
        "b3": "more than 512 MiB with the others",
        "b4": "more than 512 MiB with the others",
        "LICENSES/": "more than 3 files",
    }


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_broken_link(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def as_loop(path: Path) -> None:
    path.symlink_to(path)


def as_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def as_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_link_outside(path: Path) -> None:
    path.symlink_to(make(path.parents[2] / "elsewhere", {"secret": "x"}) / "secret")


def as_unreadable(path: Path) -> None:
    path.touch()
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads every file")


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "LICENSES/MIT.txt", "additional_chat_templates/a.jinja"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (as_pipe, "it is a pipe"),
        (as_socket, "it is a socket"),
        (as_link_to_a_device, "it is a device"),
        (as_broken_link, "it is a broken link"),
        (as_loop, "it is a broken link"),
        (as_link_outside, "it is a link to .*/elsewhere/secret, which is outside the directory"),
        (as_unreadable, "Permission denied"),
    ],
)
def test_what_cannot_be_copied_is_refused(tmp_path: Path, name: str, spoil: Callable[[Path], None], said: str) -> None:
    path = tmp_path / "model" / name
    path.parent.mkdir(parents=True)
    spoil(path)
    with pytest.raises(
        CheckpointError,
        match=rf"{name} stands beside the weights and cannot be copied \({said}\): "
        "put a readable file in its place, or remove it$",
    ):
        plan_companions(tmp_path / "model")


def test_what_would_not_come_along_need_not_be_readable(tmp_path: Path) -> None:
    for name in ("optimizer.pt", ".lock", "README.md"):
        os.mkfifo(tmp_path / name)
    assert plan_companions(tmp_path).files == ()


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    make(tmp_path / "blobs", {"0123": "{}", "4567": "{{ x }}"})
    snapshot = tmp_path / "snapshots" / "abc"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    (snapshot / "additional_chat_templates/tool_use.jinja").symlink_to("../../../blobs/4567")
    found = copied(plan_companions(snapshot), tmp_path / "written")
    assert found == {"tokenizer.json": "{}", "additional_chat_templates/tool_use.jinja": "{{ x }}"}
    assert not (tmp_path / "written" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize(
    ("link", "leads_to"),
    [
        # A file of the same name, something in any folder "blobs", and what only begins like the cache or the model.
        ("model/tokenizer.json", "elsewhere/tokenizer.json"),
        ("model/vocab.txt", "blobs/secret"),
        ("repo/snapshots/main/LICENSE", "elsewhere/blobs/secret"),
        ("repo/snapshots/main/LICENSE", "repo/blobs/deeper/secret"),
        ("repo/snapshots/main/LICENSE", "repo/refs/main"),
        ("repo/snapshots/main/LICENSE", "repo/snapshots/other/LICENSE"),
        ("model/LICENSE", "model-private/LICENSE"),
    ],
)
def test_links_out_of_the_directory_are_refused(tmp_path: Path, link: str, leads_to: str) -> None:
    make(tmp_path, {leads_to: "secret"})
    path = tmp_path / link
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / leads_to)
    with pytest.raises(CheckpointError, match=r"it is a link to .*, which is outside the directory\): put a readable"):
        plan_companions(path.parent)


@pytest.mark.parametrize("blobs_are_a_link", [True, False])
def test_a_cache_whose_blobs_are_links_is_none(tmp_path: Path, blobs_are_a_link: bool) -> None:
    secret = make(tmp_path / "home", {"id": "secret"}) / "id"
    snapshot = tmp_path / "repo/snapshots/main"
    snapshot.mkdir(parents=True)
    if blobs_are_a_link:
        (tmp_path / "repo/blobs").symlink_to(secret.parent)
    else:
        (tmp_path / "repo/blobs").mkdir()
        (tmp_path / "repo/blobs/id").symlink_to(secret)
    (snapshot / "LICENSE").symlink_to("../../blobs/id")
    with pytest.raises(CheckpointError, match="which is outside the directory"):
        plan_companions(snapshot)


def test_a_directory_is_followed_if_it_is_a_link_itself(tmp_path: Path) -> None:
    make(tmp_path / "model", {"tokenizer.json": "{}"})
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert copied(plan_companions(tmp_path / "link"), tmp_path / "written") == {"tokenizer.json": "{}"}


def test_what_names_code_is_left_out_of_json_and_all_else_stays(tmp_path: Path) -> None:
    hub = {"AutoTokenizer": ["evil/repo--evil.Tokenizer", None]}
    files = {
        "tokenizer_config.json": '{"auto\\u005fmap": ' + json.dumps(hub) + ', "model_max_length": 7}',
        "processor_config.json": json.dumps({"a": [{"auto_map": "evil/repo--evil.P", "b": 1}]}),
        "generation_config.json": json.dumps({"custom_pipelines": {"x": {"impl": "evil.P"}}, "top_k": 3}),
        "tokenizer/TOKENIZER_CONFIG.JSON": json.dumps({"auto_map": ["a.B", None]}),
        # A vocabulary with such a word, and what nobody can read.
        "tokenizer.json": '{"model": {"vocab":  {"auto_map": 3}}}',
        "broken.json": '{"auto_map": ',
    }
    found = copied(plan_companions(make(tmp_path / "source", files)), tmp_path / "written")
    read = {name: json.loads(found[name]) for name in list(files)[:4]}
    assert list(read.values()) == [{"model_max_length": 7}, {"a": [{"b": 1}]}, {"top_k": 3}, {}]
    assert {name: found[name] for name in list(files)[4:]} == {name: files[name] for name in list(files)[4:]}


def test_links_inside_the_directory_are_followed(tmp_path: Path) -> None:
    make(tmp_path / "model", {"LICENSES/MIT.txt": "free"})
    (tmp_path / "model/LICENSE").symlink_to("LICENSES/MIT.txt")
    found = copied(plan_companions(tmp_path / "model"), tmp_path / "written")
    assert found == {"LICENSES/MIT.txt": "free", "LICENSE": "free"}


def test_a_link_to_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/LICENSES").symlink_to(make(tmp_path / "elsewhere", {"a": "x"}))
    make(tmp_path / "model/texts", {"a": "x"})
    (tmp_path / "model/texts/up").symlink_to(tmp_path)
    assert dict(plan_companions(tmp_path / "model").left_out) == {
        "LICENSES/": "a link to a folder",
        "texts/": "holds a link to a folder",
    }


def test_the_templates_that_transformers_saves_come_along(shared: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(shared / "models/stories260k-gqa")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    templates = {"default": "{{ messages[0].content }}", "tool_use": "TOOLS {{ tools }}"}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(tmp_path / "source")
    plan_companions(tmp_path / "source").copy(tmp_path / "written")
    assert AutoTokenizer.from_pretrained(tmp_path / "written").chat_template == templates
