"""torch.compile(model, backend="kvarn"): KV caches in packed low-bit tiles. What users import.

Names are loaded at first use, so that `kvarn --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvarn_compile.binding import release
    from kvarn_compile.report import Explanation, explain
    from kvarn_compile.storage import empty_cache

__all__ = ["Explanation", "empty_cache", "explain", "release"]

_MODULES = {"Explanation": "report", "empty_cache": "storage", "explain": "report", "release": "binding"}


def __getattr__(name: str) -> Any:
    """The public name, imported from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
