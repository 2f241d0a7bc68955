"""Finds the attentions of a functional ATen graph, captured or written out by hand, and describes both alike.

Captured:      kvarn::sdpa(q, k, v, mask, ...)
By hand:       s = bmm(q, k^T) -> view [B, Hq, n, S] -> mul or div by a number -> + mask
               p = _softmax(s) over the last dimension, in any float dtype
               o = bmm(p, v) -> view [B, Hq, n, D]
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import fx

from . import axes
from .graph import Size, argument, aten, expr, operand, refuse, settled, sizes
from .refusal import Reason, Refusal, Refused


@dataclass(frozen=True)
class Operand:
    """Keys or values as an attention reads them, as a view of some root node: [B, Hq, S, D] after `layout`."""

    root: fx.Node
    chain: tuple[fx.Node, ...]
    shape: tuple[Size, ...]
    transposed: bool = False

    def layout(self, cache: tuple[Size, ...]) -> axes.Layout:
        """The layout [B, heads, S, D] of the operand over a cache of these sizes.

        Raises:
            Refused: (VIEW, LAYOUT) if the views are not pure layout.
        """
        shape = [settled(size, self.root) for size in self.shape]
        layout = axes.reshape(axes.layout_of(self.chain, cache), shape)
        if layout is None:
            raise refuse(Reason.LAYOUT, f"the cache {cache} cannot be read as {self.shape}",
                         "keep batch, heads, tokens and channels apart", self.chain[-1] if self.chain else self.root)
        return (*layout[:2], layout[3], layout[2]) if self.transposed else layout


@dataclass(frozen=True)
class Attention:
    """One attention: out = softmax(q k^T * scale + mask) v.

    Attributes:
        kind: "sdpa" or "softmax".
        node: the node a decision is about.
        out: the node whose value is the attention's output [B, Hq, n, D].
        q: the query; reshape it to q_shape, arguments fit for a view.
        k, v: the operands.
        mask: additive float or bool, None if there is none.
        inside: all nodes between operands and output, `out` included.
        refusal: why it cannot be read, None if it can.
    """

    kind: str
    node: fx.Node
    out: fx.Node
    q: fx.Node | None = None
    q_shape: tuple = ()
    k: Operand | None = None
    v: Operand | None = None
    mask: fx.Node | None = None
    is_causal: bool = False
    scale: float = 1.0
    inside: frozenset[fx.Node] = field(default=frozenset(), repr=False)
    refusal: Refusal | None = None


_SOFTMAX = {"_softmax", "_safe_softmax", "softmax"}
_DECOMPOSED = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
               "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
               "_scaled_dot_product_attention_math", "scaled_dot_product_attention"}


def find_attentions(graph: fx.Graph) -> list[Attention]:
    """Every attention of the graph in its order; those that cannot be read carry their refusal."""
    found = []
    for node in graph.nodes:
        read = None
        if node.target is torch.ops.kvarn.sdpa.default:
            read = _captured
        elif aten(node) in _SOFTMAX:
            read = _by_hand
        elif aten(node) in _DECOMPOSED or str(node.target) == "flex_attention":
            why = _unread(node, f"{node.target} was not captured").refusal
            found.append(Attention("sdpa", node, node, refusal=why))
        try:
            attention = read(node) if read else None
        except Refused as refused:
            attention = Attention("softmax" if read is _by_hand else "sdpa", node, node, refusal=refused.refusal)
        if attention:
            found.append(attention)
    return found


def _captured(node: fx.Node) -> Attention:
    q, k, v = (operand(node, i) for i in range(3))
    mask, dropout, is_causal, scale = (argument(node, name) for name in ("mask", "dropout_p", "is_causal", "scale"))
    if dropout != 0:
        raise refuse(Reason.DROPOUT, f"dropout_p={dropout}", "call model.eval()", node)
    if not len(sizes(q)) == len(sizes(k)) == len(sizes(v)) == 4:
        raise _unread(node, f"a query of {len(sizes(q))} dimensions")
    if scale is None:
        scale = _head_dim(node, q) ** -0.5
    return Attention("sdpa", node, node, q, (), _operand(k), _operand(v), mask, is_causal, scale, frozenset({node}))


def _by_hand(softmax: fx.Node) -> Attention | None:
    """Reads softmax(q k^T * scale + mask) v around a softmax; None if it is none: no product below, no cache above."""
    rank = len(sizes(softmax))
    inside = {softmax}
    product = _down_to_product(softmax, inside)
    if product is None:
        if _scores_a_cache(softmax):
            raise _unread(softmax, "the weights of a cache's tokens enter no matrix product")
        return None
    if rank != 4 or argument(softmax, "dim") % rank != rank - 1:
        raise _unread(softmax, f"softmax over dimension {argument(softmax, 'dim')} of {rank}")
    scores, mask, scale = _up_to_product(softmax, inside)
    split = scores
    while aten(split) != "bmm":
        inside.add(split)
        split = operand(split)
    inside.update((split, product))
    outs = [user for user in product.users if user.op != "output"]
    q, k, v = operand(split), operand(split, 1), operand(product, 1)
    batch, heads, n, tokens = sizes(scores)
    channels = sizes(q)[-1]
    out = outs[0] if len(outs) == 1 else product
    if aten(out) not in ("view", "_unsafe_view") or sizes(out) != (batch, heads, n, sizes(v)[-1]):
        raise _unread(product, "its output is not viewed as [batch, heads, n, channels]")
    inside.add(out)
    q_shape = (*argument(scores, "size")[:3], _head_dim(split, q))
    key = Operand(*_root(k), (batch, heads, channels, tokens), transposed=True)
    value = Operand(*_root(v), (batch, heads, tokens, sizes(v)[-1]))
    for node in inside - {out}:
        outside = [user for user in node.users if user not in inside]
        if outside:
            raise refuse(Reason.OTHER_USER, f"attention scores or weights are also used by {outside[0].name}",
                         "turn off output_attentions", node)
    return Attention("softmax", softmax, out, q, q_shape, key, value, mask, False, scale, frozenset(inside))


def _down_to_product(softmax: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
    """The bmm the weights go into, through casts, dropout left over as clone, expand and view."""
    node = softmax
    while True:
        users = [user for user in node.users if user.op != "output"]
        if not users:
            return None
        if aten(users[0]) == "bmm":
            return users[0] if users[0].args[0] is node else None
        if _drops(users[0]):
            raise refuse(Reason.DROPOUT, "attention weights go through dropout", "call model.eval()", users[0])
        if aten(users[0]) not in ("_to_copy", "clone", "expand", "view", "_unsafe_view", "alias", "detach"):
            return None
        node = users[0]
        _expect_floats(node)
        inside.add(node)


def _scores_a_cache(softmax: fx.Node) -> bool:
    """True if a softmax is taken of products with a cache the graph writes: that is an attention, and no router."""
    seen: set[fx.Node] = set()
    stack = [operand(softmax)]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if aten(node) not in ("mm", "bmm", "addmm", "baddbmm"):
            stack.extend(node.all_input_nodes)
            continue
        factors = [_above(factor, axes.VIEWS) for factor in node.args[-2:] if isinstance(factor, fx.Node)]
        # Attention weights times values end an earlier attention.
        if not any(aten(factor) in _SOFTMAX for factor in factors) and any(map(_is_cache, factors)):
            return True
    return False


def _is_cache(node: fx.Node) -> bool:
    """True for an input of cache rank that the graph updates, before or after its write."""
    node = _above(node, axes.VIEWS | {"index_copy", "index_put", "slice_scatter", "copy"})
    return (node.op == "placeholder" and len(sizes(node)) >= 3
            and any(aten(user) == "copy_" and user.args[0] is node for user in node.users))


def _above(node: fx.Node, through: Collection[str]) -> fx.Node:
    """The first node, going up by the first operand, that is not one of these ops."""
    while aten(node) in through:
        node = operand(node)
    return node


def _drops(node: fx.Node) -> bool:
    """True for dropout, whole or as a product with a random mask."""
    if aten(node) in ("native_dropout", "dropout"):
        return True
    return aten(node) == "mul" and any(aten(above) in ("div", "div_") and aten(above.all_input_nodes[0]) == "bernoulli"
                                       for above in node.all_input_nodes if above.all_input_nodes)


def _up_to_product(softmax: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, fx.Node | None, float]:
    """Walks from the softmax up to the scores [B, Hq, n, S] as the product left them, collecting mask and scale."""
    mask, scale = None, 1.0
    node = operand(softmax)
    while True:
        name = aten(node)
        if name in ("view", "_unsafe_view") and aten(operand(node)) == "bmm":
            return node, mask, scale
        if name in ("_to_copy", "clone"):
            _expect_floats(node)
            above = operand(node)
        elif factor := _factor(node):
            scale *= factor
            above = operand(node)
        elif name == "add" and scale == 1.0 and mask is None and argument(node, "alpha") == 1:
            above, mask = _scores_and_mask(node)
        else:
            raise _unread(node, f"{node.target} between the scores and softmax")
        inside.add(node)
        node = above


def _factor(node: fx.Node) -> float | None:
    """The number a node multiplies by, None if it does not, or by 0."""
    number = node.args[1] if aten(node) in ("mul", "div") else None
    if not isinstance(number, (int, float)) or number == 0:
        return None
    if aten(node) == "mul":
        return number
    return 1 / number if argument(node, "rounding_mode", None) is None else None


def _expect_floats(node: fx.Node) -> None:
    """A cast to another float is rounding, which this pass may move; a cast to integers is part of the function."""
    if not node.meta["val"].is_floating_point():
        raise _unread(node, f"scores or weights as {node.meta['val'].dtype}")


def _scores_and_mask(add: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Which operand of an addition is the scores: the one computed from a product through the forms we read."""
    for scores, mask in (add.args[:2], add.args[1::-1]):
        node = scores
        while isinstance(node, fx.Node) and aten(node) in ("mul", "div", "_to_copy", "view", "_unsafe_view", "clone"):
            node = node.args[0]
        if aten(node) == "bmm" and isinstance(mask, fx.Node) and isinstance(scores, fx.Node):
            return scores, mask
    raise _unread(add, "an addition between the scores and softmax")


def _operand(node: fx.Node) -> Operand:
    return Operand(*_root(node), sizes(node))


def _root(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    root, chain = axes.views_above(node)
    return root, tuple(chain)


def _head_dim(node: fx.Node, q: fx.Node) -> int:
    size = expr(q.meta["val"].shape[-1])
    if not size.is_Integer:
        raise refuse(Reason.SYMBOLIC, f"the head dimension is the unknown {size}", "compile with a fixed one", node)
    return int(size)


def _unread(node: fx.Node, what: str) -> Refused:
    return refuse(Reason.UNREADABLE_CALL, f"{what}: not a form of attention this pass reads",
                  "call torch.nn.functional.scaled_dot_product_attention with 4-dimensional tensors", node)
