"""Finds where a layer's keys come from, so that their balance can be computed from weights alone.

The only form read is the one the formula holds for: half-split rotary embedding straight on a biased projection,

    x = view(addmm(bias, view(h), t(weight)))
    k = x * cos + cat([-x[..., D/2:], x[..., :D/2]]) * sin,    cos and sin of positions * inv_freq

A norm between projection and rotation, interleaved pairs, or a projection shared with queries give no source.
"""

from collections.abc import Iterator
from operator import getitem
from typing import NamedTuple

import torch
from torch import fx

from .axes import VIEWS
from .decision import BalanceSource
from .graph import argument, aten, operand, sizes


def balance_source(k: fx.Node, q: fx.Node | None, inputs: dict[fx.Node, int]) -> BalanceSource | None:
    """The inputs behind new keys, and behind queries that are made like them.

    Args:
        k: the keys written to the cache.
        q: the queries that attend to them.
        inputs: all placeholders with their indices.

    Returns:
        None unless the keys are a rotated projection whose weight and bias are inputs.
    """
    keys, queries = _projection(k, inputs), _projection(q, inputs) if q is not None else None
    if keys is None:
        return None
    head_dim = sizes(k)[-1]
    angles = [node for node in _inputs_above(keys.cos) if node.meta["val"].is_floating_point()
              and sizes(node)[:-1] == (1,) * (len(sizes(node)) - 1) and sizes(node)[-1:] == (head_dim / 2,)]
    norm = _norm_weight(keys.hidden)
    alike = queries is not None and queries.hidden is keys.hidden
    return BalanceSource(inputs[keys.weight], inputs[keys.bias], inputs[angles[0]] if len(angles) == 1 else None,
                         inputs.get(norm) if norm is not None else None,
                         inputs[queries.weight] if queries and alike else None,
                         inputs[queries.bias] if queries and alike else None)


class _Projection(NamedTuple):
    """A rotated x = hidden weight^T + bias, and the cosines that rotate it."""

    weight: fx.Node
    bias: fx.Node
    hidden: fx.Node
    cos: fx.Node


def _projection(tokens: fx.Node, inputs: dict[fx.Node, int]) -> _Projection | None:
    """What keys or queries are a rotation of, None unless weight and bias are inputs."""
    rotated = _rotation(_peel(tokens))
    if rotated is None:
        return None
    x, cos = rotated
    linear = _peel(x)
    if aten(linear) != "addmm" or argument(linear, "alpha") != 1 or argument(linear, "beta") != 1:
        return None
    bias, hidden, weight = (_peel(operand(linear, i)) for i in range(3))
    if bias not in inputs or weight not in inputs or aten(linear.args[2]) != "t" or len(sizes(bias)) != 1:
        return None
    return _Projection(weight, bias, hidden, cos)


def _rotation(add: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """x and cos of x * cos + rotate_half(x) * sin."""
    if aten(add) != "add":
        return None
    terms = [_peel(term) for term in add.args[:2] if isinstance(term, fx.Node)]
    products = [[_peel(factor) for factor in term.args[:2] if isinstance(factor, fx.Node)]
                for term in terms if aten(term) == "mul"]
    for straight, turned in (products, products[::-1]) if len(products) == 2 else ():
        halves = [x for factor in turned if (x := _half_turned(factor)) is not None]
        if len(halves) == 1 and halves[0] in straight:
            cos, = (factor for factor in straight if factor is not halves[0])
            return halves[0], cos
    return None


def _half_turned(cat: fx.Node) -> fx.Node | None:
    """x of cat([-second half, first half]) over the last dimension."""
    if aten(cat) != "cat" or argument(cat, "dim") not in (-1, len(sizes(cat)) - 1):
        return None
    parts = argument(cat, "tensors")
    if len(parts) != 2 or aten(parts[0]) != "neg":
        return None
    second, first = _half(operand(parts[0]), 1), _half(parts[1], 0)
    return first if first is second else None


def _half(node: fx.Node, which: int) -> fx.Node | None:
    """The tensor whose first (0) or second (1) half along the last dimension `node` is."""
    if aten(node) == "slice":
        x, start = operand(node), argument(node, "start") or 0
        right = isinstance(start, int) and (start != 0) == bool(which)
    elif node.target is getitem and aten(node.args[0]) in ("split", "split_with_sizes", "chunk"):
        x = operand(operand(node))
        right = node.args[1] == which
    else:
        return None
    return _peel(x) if right and 2 * sizes(node)[-1] == sizes(x)[-1] else None


def _norm_weight(hidden: fx.Node) -> fx.Node | None:
    """The weight of the norm that made `hidden`: weight * normalized(x), or layer_norm's."""
    if hidden.target is getitem and aten(hidden.args[0]) == "native_layer_norm":
        weight = argument(operand(hidden), "weight")
        return weight if isinstance(weight, fx.Node) else None
    if aten(hidden) != "mul" or not isinstance(hidden.args[1], fx.Node):
        return None
    a, b = (_peel(operand(hidden, i)) for i in range(2))
    for weight, normalized in ((a, b), (b, a)):
        if weight.op == "placeholder" and sizes(weight) == sizes(hidden)[-1:] and aten(normalized) == "mul":
            return weight
    return None


def _peel(node: fx.Node) -> fx.Node:
    """Up through views and casts, which change no value that matters here."""
    while aten(node) in VIEWS - {"slice", "select", "repeat"}:
        node = operand(node)
    return node


def _inputs_above(node: fx.Node) -> Iterator[fx.Node]:
    """Tensor placeholders a node is computed from."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        here = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        stack.extend(here.all_input_nodes)
        if here.op == "placeholder" and isinstance(here.meta["val"], torch.Tensor):
            yield here
