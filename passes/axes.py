"""An exact algebra of views: which element of a cache does each element of an attention operand come from?

A tensor made from a cache by views is described dimension by dimension. A dimension is a row-major product of factors,
and a factor is `size` steps of `stride` along one axis of the cache, or of no axis (a broadcast). Nothing has an
offset: an axis without a factor stands at index 0. So [B, H, S, D] seen through repeat_kv by 3 is

    (axis 0: B) (axis 1: H, broadcast: 3) (axis 2: S) (axis 3: D)

and torch.repeat along heads would be (broadcast: 3, axis 1: H). Sizes are expressions, so dynamic shapes cost nothing;
what the algebra cannot express (an offset, a step, a cast) is refused with the operation's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from .decision import CacheAxes
from .graph import Size, arg_expr, argument, aten, operand, refuse, sizes
from .refusal import Reason

ONE = sympy.Integer(1)
_COPIES = {"clone", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy", "_to_copy"}
_RESHAPES = {"view", "reshape", "_unsafe_view", "unflatten", "squeeze", "unsqueeze"}
VIEWS = _COPIES | _RESHAPES | {"permute", "transpose", "t", "expand", "slice", "select", "repeat"}
_HINT = "keep only layout changes (view, transpose, expand, prefix slices) between the cache and attention"


@dataclass(frozen=True)
class Factor:
    """`size` steps of `stride` along a cache axis; axis None repeats the same elements (stride 0)."""

    axis: int | None
    size: Size
    stride: Size


Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]


def whole(shape: Sequence[Size]) -> Layout:
    """The layout of the cache itself."""
    return tuple(_dim([Factor(axis, size, ONE)]) for axis, size in enumerate(shape))


def views_above(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Walks up through views: the first node that is none, and the views below it in order of execution."""
    chain = []
    while aten(node) in VIEWS and not _converts(node):
        chain.append(node)
        node = operand(node)
    return node, chain[::-1]


def layout_of(chain: Sequence[fx.Node], shape: Sequence[Size]) -> Layout:
    """The layout of the last of a chain of views that starts at a cache of `shape`.

    Raises:
        Refused: (VIEW) at the first view that moves or picks elements in a way the algebra does not express.
    """
    layout = whole(shape)
    for node in chain:
        layout = _apply(node, layout)
    return layout


def reshape(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """The layout after a row-major reshape, None if a dimension would cut through a factor unevenly."""
    rest = [factor for dim in layout for factor in dim]
    result = []
    for wanted in shape:
        taken = []
        while wanted != ONE:
            if not rest:
                return None
            factor = rest.pop(0)
            if _divides(factor.size, wanted):
                taken.append(factor)
                wanted = _quotient(wanted, factor.size)
            elif _divides(wanted, factor.size):
                inner = _quotient(factor.size, wanted)
                taken.append(Factor(factor.axis, wanted, sympy.expand(factor.stride * inner)))
                rest.insert(0, Factor(factor.axis, inner, factor.stride))
                wanted = ONE
            else:
                return None
        result.append(_dim(taken))
    return None if rest else tuple(result)


def attention_axes(
    layout: Layout, cache: Sequence[Size], tokens: int | None, node: fx.Node
) -> tuple[CacheAxes, Size, Size]:
    """Proves that `layout` is [batch prefix, heads each repeated in a row, token prefix, channels] of a cache.

    Args:
        layout: of an attention operand [B, Hq, S, D].
        cache: the plain cache's sizes.
        tokens: the cache's token axis where the write names it; settles what sizes of 1 leave open.
        node: the attention, for refusals.

    Returns:
        The cache's axes, the rows attended, and the tokens attended.

    Raises:
        Refused: (LAYOUT) naming the dimension that differs.
    """
    if len(layout) != 4 or len(cache) != 4:
        raise refuse(Reason.LAYOUT, f"a cache of {len(cache)} dimensions is attended as {len(layout)} dimensions",
                     "keep [batch, heads, tokens, channels] in the cache and in attention", node)
    found = {role: _only_axis(dim) for role, dim in zip(_ROLES, layout, strict=True)}
    head_dim = layout[1]
    if len(head_dim) == 2 and head_dim[0].axis is not None and head_dim[1].axis is None:
        found["heads"] = _only_axis(head_dim[:1])
    elif len(head_dim) == 1 and head_dim[0].axis is None:
        found["heads"] = None
    for role, dim in zip(_ROLES, layout, strict=True):
        if found[role] == _MIXED:
            raise refuse(Reason.LAYOUT, f"dimension {role} of the attention is {_text(dim)} of the cache",
                         "repeat each KV head in a row (repeat_interleave or repeat_kv) and change nothing else", node)
    axes = _complete(found, cache, tokens)
    if axes is None:
        raise refuse(Reason.LAYOUT, f"the attention reads the cache {tuple(cache)} as {' x '.join(map(_text, layout))}",
                     "attend over all heads and channels of the cache", node)
    extents = [_extent(layout[0]), _extent(head_dim[:1]), _extent(layout[2]), _extent(layout[3])]
    for role, axis, extent in (("heads", axes.heads, extents[1]), ("channels", axes.channels, extents[3])):
        full = cache[axis] == (ONE if found[role] is None else extent)
        if not full:
            raise refuse(Reason.LAYOUT, f"the attention reads {extent} of {cache[axis]} {role}",
                         f"attend over all {role} of the cache", node)
    return axes, extents[0], extents[2]


_ROLES = ("batch", "heads", "tokens", "channels")
_MIXED = -1


def _apply(node: fx.Node, layout: Layout) -> Layout:
    """The layout after one view."""
    name, dims = aten(node), list(layout)
    result: Sequence[Dim] | None = None
    if name in _COPIES:
        result = dims
    elif name in _RESHAPES:
        result = reshape(layout, sizes(node))
    elif name == "permute":
        result = [dims[axis] for axis in argument(node, "dims")]
    elif name in ("transpose", "t"):
        a, b = (argument(node, "dim0"), argument(node, "dim1")) if name == "transpose" else (0, len(dims) - 1)
        dims[a], dims[b] = dims[b], dims[a]
        result = dims
    elif name == "expand":
        result = _expand(layout, sizes(node))
    elif name == "repeat":
        repeats = [arg_expr(repeat) for repeat in argument(node, "repeats")]
        padded = [()] * (len(repeats) - len(dims)) + dims
        result = [_dim([Factor(None, r, sympy.Integer(0)), *dim]) for r, dim in zip(repeats, padded, strict=True)]
    elif name == "slice":
        result = _prefix(node, dims)
    elif name == "select" and arg_expr(argument(node, "index")) == 0:
        axis = argument(node, "dim") % len(dims)
        result = dims[:axis] + dims[axis + 1 :] if len(dims[axis]) <= 1 else None
    if result is None:
        raise refuse(Reason.VIEW, f"aten.{name} ({node.format_node()}) between the cache and attention picks or moves "
                     "elements", _HINT, node)
    return tuple(result)


def _prefix(node: fx.Node, dims: list[Dim]) -> list[Dim] | None:
    axis = argument(node, "dim") % len(dims)
    if arg_expr(argument(node, "start") or 0) != 0 or arg_expr(argument(node, "step")) != 1:
        return None
    size, dim = sizes(node)[axis], dims[axis]
    if size != _extent(dim):
        if len(dim) != 1:
            return None
        dims[axis] = _dim([Factor(dim[0].axis, size, dim[0].stride)])
    return dims


def _expand(layout: Layout, shape: Sequence[Size]) -> list[Dim]:
    padded = [()] * (len(shape) - len(layout)) + list(layout)
    return [dim if dim or size == ONE else (Factor(None, size, sympy.Integer(0)),)
            for dim, size in zip(padded, shape, strict=True)]


def _dim(factors: Sequence[Factor]) -> Dim:
    """Factors in their one normal form: none of size 1, neighbours that continue each other merged."""
    result: list[Factor] = []
    for factor in factors:
        if factor.size == ONE:
            continue
        if result and result[-1].axis == factor.axis:
            last = result[-1]
            if sympy.expand(factor.stride * factor.size - last.stride) == 0:
                result[-1] = Factor(factor.axis, sympy.expand(last.size * factor.size), factor.stride)
                continue
        result.append(factor)
    return tuple(result)


def _divides(divisor: Size, size: Size) -> bool:
    return bool(sympy.cancel(size / divisor).is_integer)


def _quotient(size: Size, divisor: Size) -> Size:
    return sympy.expand(sympy.cancel(size / divisor))


def _extent(dim: Dim) -> Size:
    return sympy.expand(sympy.prod([factor.size for factor in dim]))


def _only_axis(dim: Dim) -> int | None:
    """The one axis a dimension walks from its start in steps of 1; None for size 1; _MIXED for anything else."""
    if not dim:
        return None
    return dim[0].axis if len(dim) == 1 and dim[0].axis is not None and dim[0].stride == ONE else _MIXED


def _complete(found: dict[str, int | None], cache: Sequence[Size], tokens: int | None) -> CacheAxes | None:
    """Gives the axes no dimension shows (size 1, or a prefix of 1) to the roles that lack one."""
    roles = dict(found)
    if roles["tokens"] is None and tokens not in roles.values():
        roles["tokens"] = tokens
    free = [axis for axis in range(4) if axis not in roles.values()]
    if roles["heads"] is None:
        single = [axis for axis in free if cache[axis] == ONE]
        # Batch comes before heads in every cache we know, so of two axes of size 1 the later one is heads.
        roles["heads"] = single[-1] if single else None
    for role in ("batch", "tokens", "channels"):
        if roles[role] is None:
            free = [axis for axis in range(4) if axis not in roles.values()]
            roles[role] = free[0] if free else None
    if sorted(axis for axis in roles.values() if axis is not None) != [0, 1, 2, 3]:
        return None
    return CacheAxes(**{role: axis for role, axis in roles.items() if axis is not None})


def _converts(node: fx.Node) -> bool:
    """True for a copy that also changes dtype or device."""
    before, after = operand(node).meta["val"], node.meta["val"]
    return before.dtype != after.dtype or before.device != after.device


def _text(dim: Dim) -> str:
    if not dim:
        return "one element"
    names = [f"{f.size} repeats" if f.axis is None else f"{f.size} of axis {f.axis}" +
             (f" in steps of {f.stride}" if f.stride != ONE else "") for f in dim]
    return "(" + " by ".join(names) + ")"
