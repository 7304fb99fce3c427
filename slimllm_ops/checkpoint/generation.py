"""Lets a written model generate with its source's settings."""

from contextlib import suppress
from pathlib import Path

from slimllm_ops.files import require_plain, write_json

SETTINGS = "generation_config.json"
MOST_BYTES = 1 << 24


def settle(source: Path, written: Path) -> None:
    """Write the generation settings of a source that has no file for them, as transformers takes them from config.json.

    Older models have them there, and transformers drops them from a config that it writes.
    """
    from transformers import GenerationConfig

    try:
        require_plain(source / SETTINGS, MOST_BYTES)
        GenerationConfig.from_pretrained(source, local_files_only=True)
        return
    # What transformers catches too: there is no file, or it is broken.
    except OSError:
        pass
    # Any exception: the values are untrusted, and transformers refuses to load the source with them.
    except Exception:
        return
    with suppress(Exception):
        found = GenerationConfig.from_pretrained(source, config_file_name="config.json", local_files_only=True)
        # It has the model's own settings too.
        known = [name for name in GenerationConfig().to_dict() if not name.startswith(("_", "transformers_"))]
        held = {name: value for name, value in found.to_dict().items() if name in known and value is not None}
        write_json(written / SETTINGS, held, indent=2)
