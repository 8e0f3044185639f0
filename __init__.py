"""llmc: compiles Hugging Face language models ahead of time, and runs what it compiled.

Names are resolved on first use: importing llmc imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compiler.compare.compare import compare
    from .compiler.driver import compile_model as compile
    from .runtime.llm import LLM
    from .runtime.load import load
    from .runtime.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__", "compare", "compile", "load"]

# Public name -> (module that owns it, its name there).
_EXPORTS = {
    "LLM": (".runtime.llm", "LLM"),
    "SamplingParams": (".runtime.params", "SamplingParams"),
    "compare": (".compiler.compare.compare", "compare"),
    "compile": (".compiler.driver", "compile_model"),
    "load": (".runtime.load", "load"),
}


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(import_module(module, __name__), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
