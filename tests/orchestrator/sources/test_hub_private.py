"""What we expect of what huggingface_hub does not document, with the one that is installed."""

from pathlib import Path

from huggingface_hub import constants, snapshot_download

from orchestrator.sources.hub_private import cache_of_model


def test_a_models_files_lie_where_the_hubs_own_cache_has_them() -> None:
    cache = cache_of_model("no-such-owner/no.such-model")
    assert cache.parent == Path(constants.HF_HUB_CACHE)
    assert cache.name == "models--no-such-owner--no.such-model"


def test_the_hub_finds_there_what_it_downloaded(tmp_path: Path) -> None:
    name, commit = cache_of_model("me/tiny").name, "a" * 40
    snapshot = tmp_path / name / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / name / "refs").mkdir()
    (tmp_path / name / "refs" / "main").write_text(commit)
    assert snapshot_download("me/tiny", cache_dir=tmp_path, local_files_only=True) == str(snapshot)
