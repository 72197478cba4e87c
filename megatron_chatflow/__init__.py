"""Continual pre-training of language models on blends whose shares move, on megatron-core.

What `__all__` names is the public API (docs/api.md); every other name is private and may change in
any release. Names are imported at first use, so `import megatron_chatflow` loads neither torch nor
numpy and changes nothing outside the package.
"""

TYPE_CHECKING = False  # `typing` would be a module to load; type checkers know the name
if TYPE_CHECKING:
    from megatron_chatflow.config import Config
    from megatron_chatflow.conversion.convert import convert_from_hf, convert_to_hf
    from megatron_chatflow.curriculum import BlendPlan, load_curriculum
    from megatron_chatflow.data import open_blend
    from megatron_chatflow.evaluation.evaluate import evaluate
    from megatron_chatflow.evaluation.generate import generate
    from megatron_chatflow.tokenizer import load_tokenizer
    from megatron_chatflow.training.callbacks import Callback
    from megatron_chatflow.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "BlendPlan",
    "Callback",
    "Config",
    "Trainer",
    "convert_from_hf",
    "convert_to_hf",
    "evaluate",
    "generate",
    "load_curriculum",
    "load_tokenizer",
    "open_blend",
]

_MODULE_OF = {
    "BlendPlan": "curriculum",
    "Callback": "training.callbacks",
    "Config": "config",
    "Trainer": "training.trainer",
    "convert_from_hf": "conversion.convert",
    "convert_to_hf": "conversion.convert",
    "evaluate": "evaluation.evaluate",
    "generate": "evaluation.generate",
    "load_curriculum": "curriculum",
    "load_tokenizer": "tokenizer",
    "open_blend": "data",
}
"""Public name -> the module of this package that defines it."""


def __getattr__(name: str) -> object:
    """Import a public name at its first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names too, before they are imported."""
    return sorted({*globals(), *__all__})
