"""Finding the tensors and modules that a user's object holds, whatever it is."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def reachable(value: Any, into_modules: bool = True) -> Iterator[Tensor | nn.Module]:
    """Every tensor and module in `value`: in mappings, lists, tuples and attributes, at any depth, each once.

    Args:
        value: a tensor, module, transformers Cache, container or any object with attributes.
        into_modules: also what modules hold; otherwise a module is yielded and left closed.
    """
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, (Tensor, nn.Module)):
            yield item
        if isinstance(item, Mapping):
            todo.extend(item.values())
        elif isinstance(item, (list, tuple)):
            todo.extend(item)
        elif hasattr(item, "__dict__") and not isinstance(item, Tensor) and (
                into_modules or not isinstance(item, nn.Module)):
            todo.extend(vars(item).values())
