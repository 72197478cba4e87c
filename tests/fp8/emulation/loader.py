"""Import Transformer Engine's Python on a machine without CUDA, over `kernels`.

Its sources are compiled unchanged except for three things: assertions are removed (they require
CUDA devices), the device "cuda" becomes "cpu", and triton and onnx are stubs. This changes imports
for the rest of the process, so use a separate process.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

from tests.fp8.emulation import kernels
from tests.fp8.emulation.quantized import CAPABILITY

WHEELS = Path(__file__).parents[3] / "build" / "oracle"
"""Where tests/run.sh installs requirements-oracle.txt, outside of the environment.

The package cannot be imported without this loader.
"""
STUBBED = (
    "triton",
    "triton.language",
    "triton.runtime",
    "triton.language.standard",
    "onnx",
    "onnx.helper",
    "onnxscript",
    "onnxscript.onnx_types",
    "onnxscript.function_libs",
)


def load(capability: tuple[int, int]) -> Any:
    """Return transformer_engine.pytorch on an emulated device of this compute capability."""
    CAPABILITY[:] = capability
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its common package then loads no CUDA library
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"
    sys.path.append(str(WHEELS))
    sys.modules["transformer_engine_torch"] = kernels
    for name in STUBBED:
        sys.modules["stub_" + name] = _Stub("stub_" + name)
    sys.meta_path.insert(0, _Finder())
    _pretend(capability)
    import transformer_engine.common as common

    common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch as pytorch

    return pytorch


def _pretend(capability: tuple[int, int]) -> None:
    cuda = torch.cuda
    properties = types.SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        name="emulated",
        total_memory=80 << 30,
    )
    cuda.get_device_properties = lambda *arguments, **named: properties
    cuda.get_device_capability = lambda *arguments, **named: capability
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *arguments, **named: None
    cuda.nvtx.range = lambda *arguments, **named: contextlib.nullcontext()
    torch.version.cuda = "13.0"
    torch.distributed._coalescing_manager = _together


class _Together:
    def wait(self) -> None:
        """Return at once: every collective inside has completed."""


@contextlib.contextmanager
def _together(*arguments: Any, **named: Any) -> Any:
    """Run the collectives one by one: gloo has no coalescing."""
    yield _Together()


class _Anything:
    """An attribute of a stub: callable, a decorator, a base class or a type in an annotation."""

    def __init__(self, *arguments: Any, **named: Any) -> None: ...
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return (
            arguments[0]
            if len(arguments) == 1 and callable(arguments[0]) and not named
            else _Anything()
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __getitem__(self, key: Any) -> Any:
        return _Anything()

    def __or__(self, other: Any) -> Any:
        return _Anything()

    __ror__ = __or__

    def __iter__(self) -> Any:
        return iter(())

    def __mro_entries__(self, bases: Any) -> tuple[()]:
        return ()


class _Stub(types.ModuleType):
    __path__: list[str] = []
    __version__ = "0.0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


def _is_stubbed(name: str | None) -> bool:
    return name is not None and name.split(".")[0] in {module.split(".")[0] for module in STUBBED}


class _OnCpu(ast.NodeTransformer):
    """Replace the device "cuda" (argument, default or value) by "cpu", and import the stubs."""

    def visit_Import(self, node: ast.Import) -> ast.AST:
        for alias in node.names:
            if _is_stubbed(alias.name):
                alias.asname, alias.name = (
                    alias.asname or alias.name.split(".")[0],
                    "stub_" + alias.name,
                )
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.level == 0 and _is_stubbed(node.module):
            node.module = "stub_" + node.module
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        if node.arg in ("device", "map_location"):
            node.value = self._device(node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "device":
            node.args = [self._device(argument) for argument in node.args]
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        node.value = self._device(node.value)
        return node

    def visit_arguments(self, node: ast.arguments) -> ast.AST:
        self.generic_visit(node)
        node.defaults = [self._device(default) for default in node.defaults]
        node.kw_defaults = [default and self._device(default) for default in node.kw_defaults]
        return node

    @staticmethod
    def _device(node: ast.expr) -> ast.expr:
        return (
            ast.copy_location(ast.Constant("cpu"), node)
            if isinstance(node, ast.Constant) and node.value == "cuda"
            else node
        )


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        tree = ast.fix_missing_locations(_OnCpu().visit(ast.parse(self.get_data(path), path)))
        return compile(tree, path, "exec", dont_inherit=True, optimize=1)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] != "transformer_engine":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
