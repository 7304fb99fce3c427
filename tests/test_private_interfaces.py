"""What Ray, MLflow, transformers and the hub's libraries do not document is used in one module of each room."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.test_imports import sources

# The modules that their documentation names, as far as we use them.
DOCUMENTED = {
    "ray": {
        *("ray", "ray.exceptions", "ray.job_config", "ray.job_submission", "ray.autoscaler.sdk"),
        *("ray.util.placement_group", "ray.util.scheduling_strategies", "ray.train", "ray.train.torch"),
    },
    "mlflow": {"mlflow", "mlflow.entities", "mlflow.exceptions"},
    "transformers": {"transformers", "transformers.trainer_utils", "transformers.utils.logging"},
    "huggingface_hub": {"huggingface_hub", "huggingface_hub.utils"},
    "gguf": {"gguf"},
    "datasets": {"datasets"},
    "accelerate": {"accelerate"},
    "safetensors": {"safetensors", "safetensors.torch", "safetensors.numpy"},
}
# Submodules that are read as attributes, which are no classes or functions of the package.
UNDOCUMENTED = ("ray.util.client", "ray.experimental", "ray.core", "mlflow.tracking", "transformers.models")
# One module for each library in each room, or for one purpose, each with a test of its name beside it.
PRIVATE = {
    "actors.ray_private",
    "actors.train_private",
    "cluster.local_ray",
    "cluster.ray_private",
    "orchestrator.sources.hub_private",
    "orchestrator.tracking.mlflow_private",
    "slimllm_ops.models.transformers_private",
}
# Subclasses that override one method of Ray: through which a job server's client asks, and by which a job's settings
# travel to the workers. They are pinned with the others.
OVERRIDES = {"cluster.job_client": {"_do_request"}, "cluster.driver_paths": {"_serialize"}}
# A whole string that names a module of a library, as for `python -m` and for a logger.
MODULE_NAME = re.compile(r"(ray|transformers|huggingface_hub)(\.[a-z_0-9]+)+")


def is_private(module: str) -> bool:
    library = module.partition(".")[0]
    return library in DOCUMENTED and module not in DOCUMENTED[library]


def found(tree: ast.AST) -> Iterator[str]:
    """What a module uses of the libraries that is private or not documented."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif (
            isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] in DOCUMENTED
        ):
            private = is_private(str(node.module))
            yield from (f"{node.module}.{one.name}" for one in node.names if private or one.name.startswith("_"))
        elif isinstance(node, ast.Attribute):
            if is_private_attribute(name := ast.unparse(node)):
                yield name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            yield node.value


def is_private_attribute(name: str) -> bool:
    owner = name.partition(".")[0]
    if owner not in DOCUMENTED and owner != "super()":
        return False
    return name in UNDOCUMENTED or re.search(r"\._(?!_)", name) is not None


def test_private_interfaces_are_used_in_their_modules_alone() -> None:
    wrong = {
        module: left
        for module, file in sources().items()
        if module not in PRIVATE
        and (left := {*found(ast.parse(file.read_text()))} - {f"super().{one}" for one in OVERRIDES.get(module, ())})
    }
    assert not wrong


def test_the_modules_exist_and_each_has_its_test() -> None:
    for module in PRIVATE:
        assert [*found(ast.parse(sources()[module].read_text()))], f"{module} uses nothing private"
        *rooms, name = module.split(".")
        assert (sources()[module].parents[len(rooms)] / "tests").joinpath(*rooms, f"test_{name}.py").is_file()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from ray._private.services import a", "ray._private.services.a"),
        ("from ray.experimental.internal_kv import a", "ray.experimental.internal_kv.a"),
        ("import mlflow.store.tracking", "mlflow.store.tracking"),
        ("from transformers import _lazy", "transformers._lazy"),
        ("x = ray.util.client.ray.is_connected()", "ray.util.client"),
        ("x = ray._private.worker.global_worker", "ray._private"),
        ("def f():\n    from huggingface_hub.file_download import a", "huggingface_hub.file_download.a"),
        ("run(['-m', 'ray.scripts.scripts'])", "ray.scripts.scripts"),
        ("super()._do_request()", "super()._do_request"),
    ],
)
def test_what_is_private_is_found(line: str, name: str) -> None:
    assert name in set(found(ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["from ray.exceptions import RayError", "ray.init()", "import mlflow.entities", "x = ray.__version__"]
)
def test_what_is_documented_is_not(line: str) -> None:
    assert not set(found(ast.parse(line)))
