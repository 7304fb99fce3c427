"""Provides a small Llama, and text that every Python installation has, so that a first run needs no network."""

from pathlib import Path

from orchestrator.builtin.text import calibration_text, heldout_text

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""A Hugging Face checkpoint of about 4 MB, written by ``python -m orchestrator.builtin.train``."""

__all__ = ["MODEL_DIR", "calibration_text", "heldout_text"]
