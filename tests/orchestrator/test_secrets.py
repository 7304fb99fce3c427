"""Secrets in a text are hidden, and text that only looks like a secret is kept."""

import pytest

from orchestrator.secrets import masked, masked_all


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:secret@127.0.0.1:5000", "http://***@127.0.0.1:5000"),
        ("at http://secret@host, port 80", "at http://***@host, port 80"),
        ("http://user:se/c@r:et@host/x", "http://***@host/x"),
        ("http://user:12345@host", "http://***@host"),
        ("postgresql+psycopg://u:secret@h:5432/db?password=secret&x=1", "postgresql+psycopg://***@h:5432/db?password=***&x=***"),
        ("url: /?token=secret/api/2.0 (refused)", "url: /?token=*** (refused)"),
        ("sqlite:////tmp/a@b/x.db", "sqlite:////tmp/a@b/x.db"),
        ("'http://host:5000/a@b'", "'http://host:5000/a@b'"),
        ("s3://me:secret@bucket/x", "s3://***@bucket/x"),
        ("s3://bucket/a@b/x", "s3://bucket/a@b/x"),
        ("mail a@b, is it?", "mail a@b, is it?"),
    ],
)  # fmt: skip
def test_a_text_is_shown_without_its_secrets(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_the_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hf_abcdef")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA-me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/XUtn")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoG+ZXI=")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountKey=x1y2")
    assert masked("hf_abc, hf_abcdef, false, a") == "***, ***, false, a"
    assert masked("AKIA-me, wJalr/XUtn, FwoG+ZXI=, AccountKey=x1y2") == "AKIA-me, ***, ***, ***"


def test_values_are_masked_within_lists_and_mappings() -> None:
    value = {"a": ["http://u:p@h", 1], "b": ("http://u:p@h", None), "c": 0.5}
    assert masked_all(value) == {"a": ["http://***@h", 1], "b": ("http://***@h", None), "c": 0.5}
