"""Secrets in a text are hidden, and text that only looks like a secret is kept."""

import base64
import json
import os
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from orchestrator.secrets import masked, masked_all, uris_masked


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
        # Credentials, whatever the scheme, quoted or cut.
        ("redis://:secret@h, amqp://u:secret@h/v, ftp://u:secret@h", "redis://***@h, amqp://***@h/v, ftp://***@h"),
        ("jdbc:mysql://u:secret@h:3306/db", "jdbc:mysql://***@h:3306/db"),
        ("'http://u:sec'ret@h'", "'http://***@h'"),
        (r'{"uri": "http:\/\/u:secret@h\/x"}', r'{"uri": "http:\/\/***@h\/x"}'),
        ("is 'http://user:sec...', expected", "is 'http://***...', expected"),
        ("next=http%3A%2F%2Fu%3Asecret%40h%2Fx", "next=http%3A%2F%2F***%40h%2Fx"),
        ("http%253a%252f%252fu%253asecret%2540h", "http%253a%252f%252f***%2540h"),
        ("http%3A%2F%2Fhost%3A5000%2Fa%40b", "http%3A%2F%2Fhost%3A5000%2Fa%40b"),
        ("give sqlite:///PATH.db or http://HOST:PORT", "give sqlite:///PATH.db or http://HOST:PORT"),
        # Queries, whole or in part.
        ("https://a.blob.core.windows.net/c?sv=2&sig=a%2Fb", "https://a.blob.core.windows.net/c?sv=***&sig=***"),
        ("...&X-Amz-Signature=abc&X-Amz-Credential=d%2Fe", "...&X-Amz-Signature=***&X-Amz-Credential=***"),
        ("http%3A%2F%2Fh%3Fsig%3Dabc%26x%3D1", "http%3A%2F%2Fh%3Fsig%3D***%26x%3D***"),
        ("http://h/#access_token=abc", "http://h/#access_token=***"),
        # Headers.
        ("Authorization: Bearer abc.d-e_f", "Authorization: Bearer ***"),
        ("{'Authorization': 'Token abc', 'Accept': '*/*'}", "{'Authorization': '***', 'Accept': '*/*'}"),
        ("sent Bearer eyJh.bG-c_i.", "sent Bearer ***."),
        ("sent Basic dXNlcjpwYXNz to it", "sent Basic *** to it"),
        ("X-Api-Key: abc", "X-Api-Key: ***"),
        ("Set-Cookie: a=b; c=d", "Set-Cookie: ***"),
        ("no Bearer token was sent, and the bearer of it", "no Bearer token was sent, and the bearer of it"),
        ("Basic settings, basic information", "Basic settings, basic information"),
        # Names with values.
        ("DB_PASS=abc, MYSQL_PWD='a b' OPENAI_KEY=c'd", "DB_PASS=***, MYSQL_PWD=*** OPENAI_KEY=***"),
        ("AccountName=a;AccountKey=abc==;x=1", "AccountName=a;AccountKey=***;x=1"),
        ('{"api_key": "a b", "pad_token": "<p>", "key": "k"}', '{"api_key": "***", "pad_token": "<p>", "key": "k"}'),
        ("RAY_AUTH_MODE=token, eos_token=</s>, PWD=/tmp", "RAY_AUTH_MODE=token, eos_token=</s>, PWD=/tmp"),
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


NAMES = ("OPENAI_KEY", "MYSQL_PWD", "DB_PASS", "PGPASSWORD", "GITHUB_PAT", "SECRET_KEY_BASE", "NPM_TOKEN_2", "apiKey")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["s3cr/et+x y", "p@ss'w\"<%>", "wJalr-XUtn_FE==", "zażółć\\gęś"])
def test_a_secret_is_hidden_in_every_form(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    encoded = (quote(value), quote(value, safe=""), quote_plus(value), quote(quote(value, safe="")))
    in_base64 = (base64.b64encode(value.encode()).decode(), base64.urlsafe_b64encode(value.encode()).decode())
    swapped = (value.translate(str.maketrans("+/", "-_")), value.translate(str.maketrans("-_", "+/")))
    for form in (value, *encoded, *in_base64, *swapped, repr(value)[1:-1], json.dumps(value)[1:-1]):
        shown = masked(f"is {form}.")
        assert shown.rstrip("=.") == "is ***", form
        assert masked(f"is {form.lower() if '%' in form and value.islower() else form}.").startswith("is ***")


def test_a_secret_of_several_lines_is_hidden_by_line_and_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG\nabc\n-----END PRIVATE KEY-----\n"
    monkeypatch.setenv("SSH_KEY", key)
    assert masked(f"[{key.strip()}]") == masked(f"[{' '.join(key.split())}]") == "[***]"
    assert masked("line MIIEvQIBADANBgkqhkiG") == "line ***"


def test_the_password_of_an_address_in_the_environment_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pr%40xy@proxy:3128")
    assert masked("the proxy proxy:3128 refused me with pr@xy and pr%40xy") == (
        "the proxy proxy:3128 refused me with *** and ***"
    )


def test_what_is_no_secret_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = {
        **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/home/me/auth_token", "SSH_AUTH_SOCK": "/tmp/ssh/agent"},
        **{"OLDPWD": "/before", "SMTP_AUTH": "true", "COMPASS": "north"},
        # A path says where the secret is.
        "SSH_KEY": str(tmp_path),
    }
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    text = ", ".join(kept.values()) + f", {os.environ['PWD']}"
    assert masked(text) == text


def test_data_lose_the_credentials_of_addresses_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_TOKEN", "gram")
    text = "gram s3://u:pw@h/gram.txt?sig=a&b=c a?b=c, http%3A%2F%2Fu%3Apw%40h%3Fa%3Db PASSWORD=x, Bearer y"
    shown = "gram s3://***@h/gram.txt?sig=***&b=*** a?b=c, http%3A%2F%2F***%40h%3Fa%3D*** PASSWORD=x, Bearer y"
    assert uris_masked(text) == shown
    assert masked_all({"gram": ["s3://u:pw@h"]}, uris_masked) == {"gram": ["s3://***@h"]}
