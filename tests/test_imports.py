"""The import rules of the package, checked on the source of every module."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_chatflow"

LAYERS = (
    {"errors"},
    {"utils"},
    {"config", "curriculum", "report", "tokenizer"},
    {"data", "distributed", "planner", "serialization"},
    {"fp8"},
    {"model"},
    {"checkpoint"},
    {"training"},
    {"conversion"},
    {"evaluation"},
    {"cli", "__main__"},
)
"""A package imports from itself and from lower layers only."""

PARTNERS = ({"cli", "__main__"},)
"""Packages of one layer that may use each other."""

WITHOUT_TORCH = {
    "config", "curriculum", "data", "errors", "planner", "report", "tokenizer", "utils",
}  # fmt: skip
WITH_MEGATRON = {
    "checkpoint", "conversion", "distributed", "evaluation", "fp8", "model", "training",
}  # fmt: skip
LATE = {"cli", "__main__"}
"""The command line: it must start fast, so heavy libraries are imported inside functions."""

HEAVY = {"torch", "megatron", "transformer_engine"}
DYNAMIC = ("import_module", "importlib.import_module", "__import__")


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield (dotted name, at module load) for every module that a source file imports.

    An import inside a function or under `if TYPE_CHECKING:` does not happen at module load.
    `package` is the dotted package of the file, from which relative imports are resolved.
    """

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield from ((f"{module}.{alias.name}", at_once) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in DYNAMIC
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value), at_once
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_once and not inside)

    yield from walk(tree, True)


def violations(path: str, source: str) -> list[str]:
    """Return one message per import of a file that breaks the rules.

    `path` is relative to the repository, e.g. megatron_chatflow/data/blend/blended_dataset.py.
    """
    parts = path.removesuffix(".py").split("/")
    package_name = parts[1]
    found = []
    for name, at_once in imports(ast.parse(source), parts[:-1]):
        top = name.split(".")[0]
        if top == "megatron_chatflow":
            other = name.split(".")[1] if "." in name else ""
            if package_name == "__init__":
                if at_once:
                    found.append(f"{path} imports {name}: importing the package must cost nothing")
            elif (
                other
                and other not in {package_name, "__version__"}
                and layer(other) >= layer(package_name)
                and {package_name, other} not in PARTNERS
            ):
                found.append(
                    f"{path} imports {name}: {package_name} may import from lower layers only"
                )
        elif package_name == "__init__":
            if at_once:
                found.append(f"{path} imports {name}: importing the package must cost nothing")
        elif top in HEAVY and package_name in WITHOUT_TORCH:
            found.append(f"{path} imports {name}: {package_name} must not import torch or megatron")
        elif top == "megatron" and package_name not in WITH_MEGATRON:
            found.append(
                f"{path} imports {name}: only these packages import megatron.core: "
                f"{', '.join(sorted(WITH_MEGATRON))}"
            )
        elif top in HEAVY and package_name in LATE and at_once:
            found.append(
                f"{path} imports {name} at module load: the command line imports it in functions"
            )
        elif top == "transformer_engine" and at_once:
            found.append(f"{path} imports {name} at module load: import it inside functions")
    return found


def layer(package_name: str) -> int:
    """Return the index of a package's layer; a package without one is an error."""
    for height, packages in enumerate(LAYERS):
        if package_name in packages:
            return height
    raise AssertionError(
        f"megatron_chatflow/{package_name} has no layer: add it to LAYERS of {__name__} and to "
        f"docs/architecture.md"
    )


def sources() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def test_modules_import_from_lower_layers_only():
    found = [message for path, source in sources().items() for message in violations(path, source)]
    assert found == []


def test_transformer_engine_is_imported_in_one_file_at_most():
    def uses(path: str, source: str) -> bool:
        return any(
            name.split(".")[0] == "transformer_engine"
            for name, _ in imports(ast.parse(source), path.split("/")[:-1])
        )

    assert len([path for path, source in sources().items() if uses(path, source)]) <= 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_chatflow/__init__.py", "import numpy"),
        ("megatron_chatflow/__init__.py", "from megatron_chatflow.curriculum import BlendPlan"),
        ("megatron_chatflow/curriculum/plan.py", "import torch"),
        ("megatron_chatflow/curriculum/plan.py", "from megatron_chatflow.data import open_blend"),
        (
            "megatron_chatflow/data/blend/blended_dataset.py",
            "def read():\n    from torch.utils.data import Dataset",
        ),
        (
            "megatron_chatflow/data/blend/blended_dataset.py",
            "import importlib\nimportlib.import_module('megatron.core')",
        ),
        ("megatron_chatflow/data/blend/blended_dataset.py", "from ...training import trainer"),
        ("megatron_chatflow/data/blend/blended_dataset.py", "from ... import training"),
        ("megatron_chatflow/tokenizer/factory.py", "import megatron.core"),
        (
            "megatron_chatflow/report/tensorboard.py",
            "from torch.utils.tensorboard import SummaryWriter",
        ),
        (
            "megatron_chatflow/planner/memory.py",
            "from megatron_chatflow.training.train_step import step",
        ),
        ("megatron_chatflow/model/gpt.py", "from megatron_chatflow.training import trainer"),
        ("megatron_chatflow/distributed/cuda_shim.py", "from megatron_chatflow.model import gpt"),
        ("megatron_chatflow/fp8/transformer_engine.py", "import transformer_engine.pytorch as te"),
        ("megatron_chatflow/fp8/linear.py", "from megatron_chatflow.model.spec import block_spec"),
        (
            "megatron_chatflow/cli/plan.py",
            "def run():\n    from megatron.core import parallel_state",
        ),
        ("megatron_chatflow/cli/plan.py", "import torch"),
        (
            "megatron_chatflow/__main__.py",
            "try:\n    import torch\nexcept ImportError:\n    torch = None",
        ),
    ],
)
def test_checker_finds_a_forbidden_import(path: str, source: str):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "megatron_chatflow/data/blend/blended_dataset.py",
            (
                "import numpy\nfrom megatron_chatflow.curriculum import BlendPlan\nfrom "
                ".indexed import X"
            ),
        ),
        (
            "megatron_chatflow/training/trainer.py",
            (
                "import torch\nfrom megatron.core import utils\nfrom megatron_chatflow.data "
                "import open_blend"
            ),
        ),
        (
            "megatron_chatflow/fp8/transformer_engine.py",
            "def reason():\n    import transformer_engine.pytorch as te",
        ),
        (
            "megatron_chatflow/cli/train.py",
            "def run():\n    import torch\n    from megatron_chatflow.training import trainer",
        ),
        ("megatron_chatflow/__main__.py", "from megatron_chatflow import __version__"),
        (
            "megatron_chatflow/__init__.py",
            "if TYPE_CHECKING:\n    from megatron_chatflow.config import Config",
        ),
    ],
)
def test_checker_accepts_allowed_imports(path: str, source: str):
    assert violations(path, source) == []


def test_package_without_a_layer_is_an_error():
    with pytest.raises(AssertionError, match="has no layer"):
        violations(
            "megatron_chatflow/data/blend/blended_dataset.py",
            "from megatron_chatflow.attic import chest",
        )


def run_python(code: str) -> str:
    """Return what a new interpreter prints; it finds the package through PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.strip()


def test_importing_the_package_loads_nothing_and_keeps_the_environment():
    code = """
        import os, sys
        environment, before = dict(os.environ), set(sys.modules)
        import megatron_chatflow
        print(sorted(set(sys.modules) - before), environment == dict(os.environ))
    """
    assert (
        run_python("\n".join(line.strip() for line in code.splitlines()))
        == "['megatron_chatflow'] True"
    )


@pytest.mark.parametrize(
    "package_name",
    sorted(name for name in WITHOUT_TORCH | {"__main__"} if list(PACKAGE.glob(name + "*"))),
)
def test_packages_without_torch_do_not_load_it(package_name: str):
    loaded = run_python(
        f"import sys, megatron_chatflow.{package_name}; print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    assert loaded == "[]"
