"""Packages import only what the design allows; checked on the sources."""

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import orchestrator

ROOT = Path(__file__).parents[1]
SIBLINGS = {
    "orchestrator": {"actors", "slimllm_ops", "cluster"},
    "actors": {"slimllm_ops"},
    "slimllm_ops": set(),
    "cluster": set(),
}
# The rooms of slimllm_ops, bottom to top: each imports only rooms below it.
ROOMS = (
    *("errors", "files", "models", "moments", "decide", "checkpoint", "allocate", "stream"),
    *("evaluation", "training", "timing"),
    *("methods", "module_solves", "stock"),
)
MOST_LINES = 300
# Files that may be longer, and why.
LONGER = {
    "slimllm_ops/models/families.py": "a table of families",
    "orchestrator/config.py": "a table of settings",
}
MATHEMATICS = {"torch", "transformers", "safetensors", "accelerate", "numpy", "peft", "lm_eval", "wrapt"}


def imported(package: str) -> Iterator[tuple[str, str]]:
    """Every import in a package, wherever in a file it stands: the file, and the top-level name it imports."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no sources in {package}"
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if not node.level else [package]
            yield from ((str(file.relative_to(ROOT)), name.partition(".")[0]) for name in names)


@pytest.mark.parametrize("package", SIBLINGS)
def test_packages_import_only_the_siblings_below_them(package: str) -> None:
    allowed = SIBLINGS[package] | {package}
    wrong = {(file, name) for file, name in imported(package) if name in SIBLINGS and name not in allowed}
    assert not wrong


def module_name(file: Path) -> str:
    """What a file is imported as."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(packages: Iterable[str] = SIBLINGS) -> dict[str, Path]:
    """The files of packages, by what they are imported as."""
    return {module_name(file): file for package in packages for file in sorted((ROOT / package).rglob("*.py"))}


@cache
def modules() -> dict[str, Path]:
    return sources()


def modules_named(module: str, node: ast.AST) -> list[str]:
    """The modules that an import names: of `from room import name`, the module `name` where there is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    # Classes that are copied into checkpoints import each other by relative names.
    parent = ".".join(module.split(".")[: -node.level]) if node.level else ""
    place = ".".join(filter(None, [parent, node.module]))
    return [inside if (inside := f"{place}.{alias.name}") in modules() else place for alias in node.names]


def imports_at_once(module: str, tree: ast.AST) -> Iterator[str]:
    """The modules that are imported when a module is: not those in functions, nor those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from modules_named(module, node)
        yield from imports_at_once(module, node)


def find_circle(imports: dict[str, list[str]]) -> list[str]:
    """The first circle of modules that import each other; nothing if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in imports[module]:
            if circle := visit(other, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in imports if (circle := visit(module, []))), [])


@pytest.mark.parametrize("name", orchestrator.__all__)
def test_no_module_takes_the_place_of_a_public_function(name: str) -> None:
    # Once imported, a module `orchestrator.bench` would be what `from orchestrator import bench` gives.
    assert find_spec(f"orchestrator.{name}") is None


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = {module: [*imports_at_once(module, ast.parse(file.read_text()))] for module, file in modules().items()}
    assert not find_circle({module: [one for one in named if one in imports] for module, named in imports.items()})


def test_a_circle_is_found() -> None:
    assert find_circle({"a": ["b"], "b": ["c"], "c": ["d", "b"], "d": []}) == ["b", "c", "b"]
    assert find_circle({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []


def test_each_room_of_the_mathematics_imports_only_rooms_below_it() -> None:
    found = {module.split(".")[1] for module in sources(["slimllm_ops"]) if "." in module}
    assert found == set(ROOMS)
    wrong = []
    for module, file in sources(["slimllm_ops"]).items():
        for node in ast.walk(ast.parse(file.read_text())):
            for other in modules_named(module, node):
                package, _, inside = other.partition(".")
                if package == "slimllm_ops" and "." in module:
                    room, below = module.split(".")[1], inside.split(".")[0]
                    if not inside or ROOMS.index(below) > ROOMS.index(room):
                        wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_file_is_longer_than_one_reads_at_once() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in sources().values()}
    assert not {file: lines for file, lines in lengths.items() if lines > MOST_LINES and file not in LONGER}


def test_the_mathematics_knows_of_no_ray_and_no_mlflow() -> None:
    allowed = MATHEMATICS | {"slimllm_ops"} | sys.stdlib_module_names
    wrong = {(file, name) for file, name in imported("slimllm_ops") if name not in allowed}
    assert not wrong


# What a run without Ray and MLflow loads, and what `slimllm --help` waits for.
LIGHT = (
    "cluster",
    "cluster.inside_job",
    "orchestrator.cli",
    "orchestrator.inputs",
    "orchestrator.record.files",
    "orchestrator.record.run_toml",
    "orchestrator.tracking.ray_job",
)


def at_once(module: str) -> Iterator[str]:
    """Every module that is imported as this one is, and not only when a function of it runs."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    left: list[ast.AST] = [ast.parse(file.read_text())]
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            left += ast.iter_child_nodes(node)


def everything_at_once(module: str) -> set[str]:
    """Every module that comes with this one, those of other packages by their top-level names."""
    found, left = set[str](), [module]
    while left:
        name = left.pop()
        top = name.partition(".")[0]
        path = ROOT.joinpath(*name.split("."))
        if top not in SIBLINGS:
            found.add(top)
        elif name not in found and (path.is_dir() or path.with_suffix(".py").is_file()):
            found.add(name)
            left += [*at_once(name), *([name.rpartition(".")[0]] if "." in name else [])]
    return found


@pytest.mark.parametrize("module", LIGHT)
def test_what_needs_no_ray_and_no_mlflow_imports_neither(module: str) -> None:
    assert not everything_at_once(module) & {"ray", "mlflow"}


def test_what_connects_to_ray_imports_it() -> None:
    """Otherwise the test above looks at nothing."""
    assert "ray" in everything_at_once("cluster.session")
    assert {"torch", "slimllm_ops.errors"} <= everything_at_once("slimllm_ops.checkpoint.reading")


def test_nothing_unpickles_or_runs_a_models_code() -> None:
    """A model directory is data: whatever loads a part of it says that no code of its own is to be run."""
    for path in (path for folder in SIBLINGS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            assert not names & {"pickle", "cloudpickle", "joblib", "dill"}, path
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func)
            assert called != "torch.load", path
            # NumPy's own `load` unpickles only where it is told to.
            assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, path
            if called.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                assert "trust_remote_code=False" in ast.unparse(node), f"{path}: {ast.unparse(node)}"
