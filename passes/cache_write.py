"""Recognizes how a graph writes new tokens into a cache tensor.

On the functional graph a write is a node W computed from the cache input P and the new tokens, plus the epilogue that
stores it:

    HF StaticCache     W = index_copy(P, dim, positions, new)
    gpt-fast           W = index_put(P, [None, None, positions], new)
    one row each       W = index_put(P, [arange(B)[:, None], None, positions], new)         positions [B, n]
    Llama reference    W = slice_scatter(P, copy(slice(P, 1, s, s + n), new), 1, s, s + n)  nested for batch slices
    epilogue           copy_(P, W)

Everything else that makes a cache is refused with the reason a person would give.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .graph import Size, arg_expr, argument, aten, operand, refuse, same_size, same_sizes, sizes
from .refusal import Reason

_LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Span:
    """A slice start:end of one cache axis, as the graph's own arguments."""

    start: Any
    end: Any


@dataclass(frozen=True)
class Index:
    """Positions on the token axis: [n], or one list per row: [B, n], [B] for lists of one."""

    node: fx.Node
    per_row: bool = False


@dataclass(frozen=True)
class CacheWrite:
    """One recognized write.

    Attributes:
        node: W, the cache after the write.
        cache: P, the placeholder.
        new: the tokens written.
        new_axes: the cache axis each dimension of `new` runs along; -1 for a dimension `new` lacks (its size is 1).
        where: what part of a cache axis is written, by axis; axes not named are written whole.
        store: the epilogue copy_(P, W).
        inside: nodes that belong to the write and disappear with it, W and the epilogue among them.
    """

    node: fx.Node
    cache: fx.Node
    new: fx.Node
    new_axes: tuple[int, ...]
    where: dict[int, Span | Index]
    store: fx.Node
    inside: frozenset[fx.Node] = field(repr=False)

    @property
    def token_axis(self) -> int | None:
        """The token axis where the write names it beyond doubt."""
        return next((axis for axis, what in self.where.items() if isinstance(what, Index)), None)


def find_write(root: fx.Node, reader: fx.Node) -> CacheWrite:
    """The write whose result an attention reads.

    Args:
        root: what views_above found above the attention's operand.
        reader: the attention, where a refusal has no better place.

    Raises:
        Refused: with what `root` is instead, or with what its write lacks.
    """
    if root.op == "placeholder":
        raise refuse(Reason.NOT_WRITTEN, f"the graph reads {root.name} without writing to it",
                     "compile the cache update and the attention in one graph (no graph break between them)", reader)
    make = {"index_copy": _index_copy, "index_put": _index_put, "slice_scatter": _spans, "copy": _spans}.get(aten(root))
    if make is None:
        raise _not_a_write(root, reader)
    cache, new, new_axes, where, inside = make(root)
    _expect_input(cache, root)
    stores = [user for user in cache.users if aten(user) == "copy_" and user.args[0] is cache]
    if len(stores) != 1 or stores[0].args[1] is not root:
        raise refuse(Reason.NOT_WRITTEN_BACK, f"{cache.name} is not updated in place with what is attended",
                     "update the cache in place (index_copy_, slice or index assignment), once per forward", root)
    return CacheWrite(root, cache, new, new_axes, where, stores[0], frozenset({root, stores[0], *inside}))


_Parts = tuple[fx.Node, fx.Node, tuple[int, ...], dict[int, Span | Index], set[fx.Node]]


def _index_copy(node: fx.Node) -> _Parts:
    cache, index, new = operand(node), operand(node, 2), operand(node, 3)
    rank = len(sizes(cache))
    if len(sizes(index)) != 1:
        raise _form(node, f"positions have shape {sizes(index)}, not [n]")
    return cache, new, tuple(range(rank)), {argument(node, "dim") % rank: Index(index)}, set()


def _index_put(node: fx.Node) -> _Parts:
    cache, indices, new = operand(node), argument(node, "indices"), operand(node, 2)
    if argument(node, "accumulate"):
        raise _form(node, "index_put with accumulate=True adds to the cache")
    rank = len(sizes(cache))
    at = {axis: index for axis, index in enumerate(indices) if isinstance(index, fx.Node)}
    if any(index.meta["val"].dtype not in (torch.int64, torch.int32) for index in at.values()):
        raise _form(node, "the cache is written through a mask")
    if len(at) == 1:
        (axis, index), = at.items()
        if len(sizes(index)) != 1:
            raise _form(node, f"positions have shape {sizes(index)}, not [n]")
        axes, where = tuple(range(rank)), {axis: index}
    elif len(at) == 2 and 0 in at and _counts_rows(at[0]):
        axis = max(at)
        index, rows = at[axis], at[0]
        # Index dimensions come first, because either the row index is the first or a None separates the two.
        axes, where = (0, axis, *(other for other in range(rank) if other not in at)), {axis: index}
        if len(sizes(index)) == 1 and len(sizes(rows)) == 1:
            axes = (0, *axes[2:])
        elif len(sizes(index)) != 2 or len(sizes(rows)) != 2:
            raise _form(node, f"positions have shape {sizes(index)}, not [batch, n]")
        if not same_size(sizes(rows)[0], sizes(index)[0], node):
            raise _form(node, f"{sizes(rows)[0]} rows are written at positions of {sizes(index)[0]} rows")
    else:
        raise _form(node, f"{len(at)} axes of the cache are indexed")
    missing = len(axes) - len(sizes(new))
    full = _written_sizes(cache, axes, where)
    if missing < 0 or any(size != 1 for size in full[:missing]) or not same_sizes(sizes(new), full[missing:], node):
        raise _form(node, f"what is written has shape {sizes(new)}, not {full}")
    return cache, new, (*axes[missing:],), {axis: Index(index, len(at) == 2) for axis, index in where.items()}, set()


def _written_sizes(cache: fx.Node, axes: tuple[int, ...], where: dict[int, fx.Node]) -> tuple[Size, ...]:
    (axis, index), = where.items()
    known = dict(enumerate(sizes(cache)))
    known[axis] = sizes(index)[-1]
    if axis not in axes or len(sizes(index)) == 2:
        known[0] = sizes(index)[0]
    return tuple(known[a] for a in axes)


def _counts_rows(index: fx.Node) -> bool:
    """True for arange(B) or arange(B)[:, None], any B: row b of the index is row b of the cache."""
    while aten(index) in ("unsqueeze", "view"):
        if len(sizes(index)) == 2 and sizes(index)[1] != 1:
            return False
        index = operand(index)
    if aten(index) != "arange" or len(sizes(index)) != 1:
        return False
    return arg_expr(argument(index, "start", 0)) == 0 and arg_expr(argument(index, "step", 1)) == 1


def _spans(node: fx.Node) -> _Parts:
    """Nested slice_scatter down to the copy into the innermost slice; `copy` alone writes the whole cache."""
    taken: list[tuple[int, Span]] = []
    inside: set[fx.Node] = set()
    cache: fx.Node | None = None
    here = node
    while aten(here) == "slice_scatter":
        base, above = _slices(here.args[0], inside)
        if (cache is not None and base is not cache) or above != taken:
            raise _form(here, "nested slice writes do not go into the same part of the cache")
        cache, taken = base, taken + _slice_of(here)
        inside.add(here)
        here = operand(here, 1)
    if aten(here) == "copy":
        base, above = _slices(here.args[0], inside)
        new = operand(here, 1)
        if (cache is not None and base is not cache) or above != taken:
            raise _form(here, "the slice written is not the slice read")
        if not same_sizes(sizes(new), sizes(here), here) or new.meta["val"].dtype != here.meta["val"].dtype:
            raise _form(here, f"what is written has shape {sizes(new)} and dtype {new.meta['val'].dtype}")
        inside.add(here)
        cache, here = base, new
    assert cache is not None
    rank = len(sizes(cache))
    where: dict[int, Span | Index] = dict(taken)
    if len(where) != len(taken):
        raise _form(node, "one axis is sliced twice")
    if any(aten(above) in ("roll", "cat") and _caches_above(above, 3) for above in _above(here, 4)):
        raise _not_a_write(here, node)
    return cache, here, tuple(range(rank)), where, inside


def _slices(node: Any, inside: set[fx.Node]) -> tuple[fx.Node, list[tuple[int, Span]]]:
    """The tensor a chain of slices starts from, and the slices that leave something out, outermost first."""
    taken: list[tuple[int, Span]] = []
    while aten(node) == "slice":
        inside.add(node)
        taken = _slice_of(node) + taken
        node = node.args[0]
    return node, taken


def _slice_of(node: fx.Node) -> list[tuple[int, Span]]:
    """The part a slice or slice_scatter takes, nothing if it takes all."""
    base = sizes(operand(node))
    axis = argument(node, "dim") % len(base)
    size, start, end = base[axis], argument(node, "start") or 0, argument(node, "end")
    if arg_expr(argument(node, "step")) != 1:
        raise _form(node, f"the slice has a step of {argument(node, 'step')}")
    if isinstance(end, int) and size.is_Integer:
        end = min(end, int(size))
    if end is None or end == _LAST:
        end = int(size) if size.is_Integer else None
    bounds = (arg_expr(start), size if end is None else arg_expr(end))
    if bounds == (0, size):
        return []
    taken = sizes(node if aten(node) == "slice" else operand(node, 1))[axis]
    if (isinstance(start, int) and start < 0) or bounds[1] - bounds[0] != taken:
        raise _form(node, f"the slice {bounds[0]}:{bounds[1]} of {size} counts from the end or is cut off there")
    return [(axis, Span(start, end))]


def _expect_input(cache: Any, write: fx.Node) -> None:
    if isinstance(cache, fx.Node) and cache.op == "placeholder":
        return
    if aten(cache) in ("select", "unbind") or (aten(cache) == "" and cache.op == "call_function"):
        raise refuse(Reason.FUSED_CACHE, f"the cache is a part (aten.{aten(cache) or 'getitem'}) of a larger tensor",
                     "keep keys and values in one tensor each", write)
    if aten(cache) == "roll":
        raise _not_a_write(cache, write)
    if aten(cache) in ("index_copy", "index_put", "slice_scatter", "copy"):
        raise _form(write, f"{cache.name} is written twice in one graph")
    if not _caches_above(cache, 8):
        raise refuse(Reason.NOT_AN_INPUT, f"the cache ({cache.name}) is made inside this graph",
                     "nothing to do if it is the first forward: the next graph takes the cache over", write)
    raise refuse(Reason.VIEW, f"the cache passes through {cache.format_node()} before it is written",
                 "write into the cache tensor itself", write)


def _not_a_write(root: fx.Node, reader: fx.Node) -> Exception:
    """Words for keys or values that come from something else than a write."""
    near = [root, *_above(root, 6)]
    caches = _caches_above(root, 6)
    name = aten(root)
    if any(aten(node) in ("roll", "cat") and _caches_above(node, 3) for node in near):
        return refuse(Reason.ROLLING_WINDOW, "a full sliding window moves its tokens at every step",
                      "give sliding-window layers a full-length cache, or leave these layers as they are", root)
    if name == "cat":
        return refuse(Reason.GROWING_CACHE, "keys and values are concatenated (aten.cat), not written into a cache",
                      "use a preallocated cache (transformers: cache_implementation='static')", root)
    if name in ("select", "select_scatter", "unbind") or any(aten(node) == "select_scatter" for node in near[:2]):
        return refuse(Reason.FUSED_CACHE, "keys and values are parts of one cache tensor",
                      "keep keys and values in one tensor each", root)
    if name in ("scatter", "scatter_add", "index_add", "masked_scatter", "index_fill"):
        return _form(root, f"aten.{name}")
    if caches:
        return refuse(Reason.VIEW, f"aten.{name or root.target} changes keys or values between the cache and attention",
                      "attend to the cache itself", root)
    return refuse(Reason.NO_CACHE, "keys and values do not come from a cache",
                  "nothing to do: there is no KV cache behind this attention", reader)


def _form(node: fx.Node, what: str) -> Exception:
    return refuse(Reason.WRITE_FORM, f"{what}: no known form of a cache write",
                  "write tokens with index_copy_, cache[:, :, positions] = k or cache[:, start:end] = k", node)


def _above(node: fx.Node, depth: int) -> list[fx.Node]:
    """Inputs of a node up to `depth` steps away, nearest first."""
    found: dict[fx.Node, None] = {}
    front = [node]
    for _ in range(depth):
        front = [above for here in front for above in here.all_input_nodes if above not in found]
        found.update(dict.fromkeys(front))
    return list(found)


def _caches_above(node: fx.Node, depth: int) -> bool:
    """True if a tensor input that the graph updates, of cache rank, is among a node's inputs."""
    return any(above.op == "placeholder" and isinstance(above.meta.get("val"), torch.Tensor) and len(sizes(above)) >= 3
               and any(aten(user) == "copy_" for user in above.users) for above in [node, *_above(node, depth)])
