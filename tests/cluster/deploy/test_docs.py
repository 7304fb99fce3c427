"""The slimllm commands in docs/cluster.md are valid, and the files that it names exist."""

import re

from tests.cluster.deploy.commands import DEPLOY, IMAGE, ROOT, settings_of

PAGE = (ROOT / "docs" / "cluster.md").read_text()
# Docker, a job, a cluster that stays, the launcher, Slurm.
WAYS = 5
# What holds of every way has sections of its own.
OTHER = ("Submit a job", "Models, data and output")
SECTIONS = [section for section in PAGE.split("\n## ")[1:] if not section.startswith(OTHER)]
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", "".join(SECTIONS), flags=re.DOTALL)]


def commands() -> list[str]:
    """Every `slimllm prune` of the page; the Slurm script's words are for it too."""
    lines = [line for block in BLOCKS for line in block.splitlines()]
    found = [match[0] for line in lines if (match := re.search(r"slimllm prune [^\">|]*?(?= 2>|\"|$)", line))]
    return [*found, *[line.replace("prune.sbatch", "slimllm prune") for line in lines if line.startswith("sbatch")]]


def test_every_command_prunes_the_model_into_the_place_that_is_fetched() -> None:
    read = [settings_of(command[command.index("slimllm prune") :]) for command in commands()]
    # Of the job, the manifest has the command.
    assert len(read) == WAYS - 1
    for config in read:
        assert (config.model, config.method, config.sparsity) == ("Qwen/Qwen2.5-7B", "gram", (0.2,))
        assert config.output.removeprefix("/data/") == "pruned/qwen2.5-7b-0.2"
        assert config.calibration
        assert config.evaluate
    assert sum(config.resume for config in read) == len(read) - 1, "but for the Slurm script, which adds it"


def test_there_is_a_block_for_every_way_and_none_is_long() -> None:
    assert len(BLOCKS) == WAYS
    for block in BLOCKS:
        assert 5 <= len(block.splitlines()) <= 12


def test_the_files_that_are_named_are_there_and_all_are_named() -> None:
    named = set(re.findall(r"[\w.]+\.(?:yaml|sbatch)|Dockerfile", PAGE))
    there = {path.name for path in DEPLOY.rglob("*") if path.is_file() and path.suffix != ".dockerignore"}
    assert named == there
    assert IMAGE in PAGE
