"""Commands that read from and write to a store, whose secrets must not appear anywhere."""

from pathlib import Path

from click.testing import CliRunner, Result

from orchestrator.cli import main
from orchestrator.sources import storage
from tests.orchestrator.stores import BUCKET

SECRETS = {"AWS_SECRET_ACCESS_KEY": "k-Wq71", "AWS_SESSION_TOKEN": "t-Xk93"}
IN_URI = "u-Zt58"
OUTPUT = f"s3://{BUCKET}/pruned/tiny"
SMALL = ["--sparsity", ".33", "--local"]


def run(command: list[str], code: int = 0) -> Result:
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert_no_secret(result.output.encode(), command[0])
    return result


def assert_no_secret(text: bytes, where: object) -> None:
    for secret in (*SECRETS.values(), IN_URI):
        assert secret.encode() not in text, f"{secret} is in {where}"


def waiting() -> list[Path]:
    """What is on its way to a store, or was left of it."""
    return list((storage.cache_directory() / "outputs").glob("*"))


def assert_one_line(result: Result, says: str) -> None:
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"slimllm: {says}"), line
    assert not waiting()
