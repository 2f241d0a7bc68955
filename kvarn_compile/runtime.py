"""What runs around a compiled graph at every call: packed caches in place of plain ones, plain ones where needed."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvarn import balance
from kvarn_compile import binding
from kvarn_compile.options import Options
from kvarn_passes import Rewritten, StorePair


def cache_like(value: Any) -> bool:
    """True for an input that could be a KV cache: a floating tensor of four or more dimensions, not a parameter."""
    return (isinstance(value, Tensor) and value.ndim >= 4 and value.is_floating_point()
            and not isinstance(value, torch.nn.Parameter))


class Packed:
    """A compiled rewritten graph, called with the inputs of the graph before the rewrite (boxed: a list it empties)."""

    _boxed_call = True

    def __init__(self, compiled: Callable[..., Any], rewritten: Rewritten, inputs: Sequence[Any], options: Options):
        self._compiled, self._pairs, self._kept = compiled, rewritten.pairs, rewritten.kept
        self._watched = [i for i in rewritten.kept if cache_like(inputs[i])]
        self._given = [_given_balance(options, i, pair, inputs) for i, pair in enumerate(rewritten.pairs)]

    def __call__(self, args: list[Any]) -> Any:
        """Runs the graph.

        Raises:
            NotOwned: before anything has run, if a cache cannot be packed.
        """
        stores = binding.acquire(self._pairs, args, lambda number: self._balance(number, args))
        binding.restore_plain(args[i] for i in self._watched)
        kept = [args[i] for i in self._kept]
        args.clear()
        return self._compiled(*kept, *(tensor for store in stores for tensor in store.tensors()))

    def _balance(self, number: int, args: list[Any]) -> Tensor | None:
        """The key scale [H, D] of a pair: the given one, one from a biased key projection's weights, or None."""
        source = self._pairs[number].balance
        if source is None or source.inv_freq is None:
            return self._given[number]
        norm, query_weight, query_bias = (None if i is None else args[i] for i in
                                          (source.norm, source.query_weight, source.query_bias))
        return balance.from_weights(args[source.weight], args[source.bias], norm, args[source.inv_freq].flatten(),
                                    self._pairs[number].spec.group, query_weight, query_bias)


def guarded(compiled: Callable[..., Any], watched: Sequence[int]) -> Callable[..., Any]:
    """A graph compiled as it was, for inputs of which those numbered `watched` may be packed by another graph."""
    if not watched:
        return compiled

    def run(*args):
        binding.restore_plain(args[i] for i in watched)
        return compiled(*args)

    return run


def _given_balance(options: Options, layer: int, pair: StorePair, inputs: Sequence[Any]) -> Tensor | None:
    """The scale given for the layer: the last number in its module path, or `layer` where the path has none."""
    shape = inputs[pair.key_input].shape
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", pair.module_path)
    heads, head_dim = (int(shape[axis]) for axis in (pair.axes.heads, pair.axes.channels))
    return options.balance_of(int(numbers[-1]) if numbers else layer, heads, head_dim)
