"""Uses what huggingface_hub does not document. tests/orchestrator/sources/test_hub_private.py says what we expect."""

from pathlib import Path


def cache_of_model(model: str) -> Path:
    """Return the folder of the hub's cache that has a model's files."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model")
