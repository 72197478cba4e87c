"""In the stand-in for NVIDIA's image Transformer Engine's own Python comes from its wheel; the
first import of it is given the emulated extension.

tests/fp8/emulation is in /opt/standin there.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


class _Loaded(importlib.abc.Loader):
    """Hands over a module that was made already."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """It has run."""


class _Emulated(importlib.abc.MetaPathFinder):
    asked = False

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "transformer_engine" or self.asked:
            return None
        self.asked = True
        sys.path.append("/opt/standin")
        from tests.fp8.emulation import loader

        loader.load((9, 0))
        # Were it still there, Python would take its own specification and run it a second time.
        module = sys.modules.pop(name)
        spec = importlib.machinery.ModuleSpec(name, _Loaded(module), is_package=True)
        spec.submodule_search_locations = list(module.__path__)
        return spec


sys.meta_path.insert(0, _Emulated())
