"""Joins attentions with the cache writes they read, and decides per (K cache, V cache): all of its readers or none.

A pair becomes a store only if nothing is left that needs the plain tensors: every user of the cache inputs, of the
written caches and of the views between them and attention belongs to the write, the epilogue or an accepted attention.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvarn.spec import QuantSpec

from .attention import Attention
from .axes import ONE, attention_axes
from .cache_write import CacheWrite, Index, Span, find_write
from .decision import CacheAxes
from .graph import Size, arg_expr, refuse, same_size, same_sizes, same_value, sizes
from .guards import check_cache
from .refusal import Reason, Refusal, Refused


@dataclass(frozen=True, eq=False)
class Reader:
    """An attention proven to read a prefix of the tokens of a written K cache and V cache."""

    attention: Attention
    k: CacheWrite
    v: CacheWrite
    axes: CacheAxes
    kv_len: Size


@dataclass(frozen=True, eq=False)
class Pair:
    """A K cache and a V cache with all the attentions that read them, in graph order."""

    k: CacheWrite
    v: CacheWrite
    axes: CacheAxes
    readers: tuple[Reader, ...]


Outcome = Reader | Refusal


def read(attention: Attention, spec: QuantSpec) -> Reader:
    """Proves what one attention reads.

    Raises:
        Refused: with the first thing that does not hold.
    """
    if attention.refusal:
        raise Refused(attention.refusal)
    assert attention.k and attention.v and attention.q
    writes = [find_write(operand.root, attention.node) for operand in (attention.k, attention.v)]
    k, v = writes
    _check_alike(k, v, attention)
    proofs = [attention_axes(operand.layout(sizes(write.cache)), sizes(write.cache), write.token_axis, attention.node)
              for operand, write in zip((attention.k, attention.v), writes, strict=True)]
    if proofs[0][0] != proofs[1][0] or not same_sizes(proofs[0][1:], proofs[1][1:], attention.node):
        raise refuse(Reason.PAIR_MISMATCH, f"K is read as {proofs[0]}, V as {proofs[1]}", "read both alike",
                     attention.node)
    (axes, rows, kv_len), _ = proofs
    for write in writes:
        _check_tokens(write, axes, rows, attention)
        check_cache(write.cache, axes, spec)
    _check_mask(attention, kv_len)
    return Reader(attention, k, v, axes, kv_len)


def pair_up(attentions: Iterable[Attention], spec: QuantSpec) -> tuple[list[Pair], list[Outcome]]:
    """Reads every attention and keeps the pairs all of whose users are accounted for.

    Returns:
        The accepted pairs in the order of their first reader, and one outcome per attention.
    """
    attentions = list(attentions)
    outcomes: list[Outcome] = [_try(read, attention, spec) for attention in attentions]
    while True:
        refused = {node: outcome for attention, outcome in zip(attentions, outcomes, strict=True)
                   if isinstance(outcome, Refusal) for node in _nodes(attention)}
        pairs = _group(outcomes)
        lost = {pair: why for pair in pairs if (why := _try(_check_pair, pair, pairs, refused))}
        if not lost:
            return pairs, outcomes
        away = {id(reader): why for pair, why in lost.items() for reader in pair.readers}
        outcomes = [away.get(id(outcome), outcome) for outcome in outcomes]


def _try(check: Callable[..., Any], *args: Any) -> Any:
    """The result of a check, or the refusal it raised."""
    try:
        return check(*args)
    except Refused as refused:
        return refused.refusal


def _group(outcomes: Iterable[Outcome]) -> list[Pair]:
    groups: dict[tuple[fx.Node, fx.Node], list[Reader]] = {}
    for outcome in outcomes:
        if isinstance(outcome, Reader):
            groups.setdefault((outcome.k.cache, outcome.v.cache), []).append(outcome)
    return [Pair(readers[0].k, readers[0].v, readers[0].axes, tuple(readers)) for readers in groups.values()]


def _check_pair(pair: Pair, pairs: list[Pair], refused: dict[fx.Node, Refusal]) -> None:
    """Checks what only shows with all attentions known; `refused` maps nodes of refused attentions to why.

    Raises:
        Refused: for the whole pair.
    """
    for other in pairs:
        if other is not pair and {pair.k.cache, pair.v.cache} & {other.k.cache, other.v.cache}:
            raise refuse(Reason.PAIR_MISMATCH, f"{pair.k.cache.name}, {pair.v.cache.name} are also paired as "
                         f"{other.k.cache.name}, {other.v.cache.name}", "give each pair tensors of its own",
                         pair.k.node)
    for reader in pair.readers:
        if reader.axes != pair.axes:
            raise refuse(Reason.LAYOUT, f"two attentions read one cache as {pair.axes} and as {reader.axes}",
                         "read it in one layout", reader.attention.node)
    _check_users(pair, refused)


def _check_alike(k: CacheWrite, v: CacheWrite, attention: Attention) -> None:
    a, b = k.cache.meta["val"], v.cache.meta["val"]
    if k.cache is v.cache:
        raise refuse(Reason.FUSED_CACHE, f"{k.cache.name} is both the K and the V cache",
                     "keep keys and values in one tensor each", attention.node)
    if not same_sizes(sizes(k.cache), sizes(v.cache), k.cache) or a.dtype != b.dtype or a.device != b.device:
        raise refuse(Reason.PAIR_MISMATCH, f"the K cache is {a.dtype} {tuple(a.shape)} on {a.device}, the V cache "
                     f"{b.dtype} {tuple(b.shape)} on {b.device}", "allocate both alike", attention.node)
    if k.where.keys() != v.where.keys() or not all(_same_place(k.where[axis], v.where[axis]) for axis in k.where):
        raise refuse(Reason.PAIR_MISMATCH, "keys and values are written at different positions",
                     "write both with the same positions tensor", v.node)


def _same_place(a: Span | Index, b: Span | Index) -> bool:
    if isinstance(a, Span) and isinstance(b, Span):
        return same_value(a.start, b.start) and same_value(a.end, b.end)
    return isinstance(a, Index) and isinstance(b, Index) and same_value(a.node, b.node)


def _check_tokens(write: CacheWrite, axes: CacheAxes, rows: Size, attention: Attention) -> None:
    """The write must cover all heads and channels of the attended rows, and q must be the new tokens' query."""
    for axis, where in write.where.items():
        if isinstance(where, Index) and where.per_row and axes.batch != 0:
            raise refuse(Reason.WRITE_FORM, f"positions are given per index of axis 0 of {write.cache.name}, its batch "
                         f"is axis {axes.batch}", "give positions per batch row", write.node)
        if axis == axes.batch and isinstance(where, Span) and arg_expr(where.start) == 0:
            continue
        if axis != axes.tokens:
            raise refuse(Reason.WRITE_FORM, f"the write covers a part of axis {axis} of {write.cache.name}",
                         "write all heads and channels of rows 0 to B-1", write.node)
    written = dict(zip(write.new_axes, sizes(write.new), strict=True))
    assert attention.q is not None
    n, batch = written.get(axes.tokens, ONE), written.get(axes.batch, ONE)
    q = [arg_expr(size) for size in attention.q_shape] or list(sizes(attention.q))
    if not same_sizes((rows, q[0], q[2]), (batch, batch, n), attention.q):
        raise refuse(Reason.LAYOUT, f"{q[2]} queries of {q[0]} rows attend to {rows} rows, where {n} tokens of "
                     f"{batch} rows are written", "let the query of each written token attend to the rows written",
                     attention.node)
    if q[3] != sizes(write.cache)[axes.channels]:
        raise refuse(Reason.LAYOUT, f"the query has {q[3]} channels, the cache {sizes(write.cache)[axes.channels]}",
                     "use one head_dim for q, k and v", attention.node)
    cache_dtype, dtype = write.cache.meta["val"].dtype, attention.q.meta["val"].dtype
    if dtype != cache_dtype:
        raise refuse(Reason.DTYPE, f"a query of {dtype} attends to a cache of {cache_dtype}", "use one dtype for both",
                     attention.node)
    heads = sizes(write.cache)[axes.heads]
    if not (q[1] / heads).is_Integer:  # pyright: ignore[reportOptionalOperand]
        raise refuse(Reason.LAYOUT, f"{q[1]} query heads on {heads} KV heads", "use a multiple", attention.node)


def _check_mask(attention: Attention, kv_len: Size) -> None:
    if attention.mask is None:
        return
    dtype = attention.mask.meta["val"].dtype
    if not dtype.is_floating_point and (dtype != torch.bool or attention.kind == "softmax"):
        added = "added to the scores" if attention.kind == "softmax" else "of the attention"
        raise refuse(Reason.MASK, f"the mask {added} has dtype {dtype}",
                     "add a mask of 0 and -inf, or pass a bool mask to scaled_dot_product_attention", attention.node)
    last = sizes(attention.mask)[-1:]
    if not last or not (last[0] == ONE or same_size(last[0], kv_len, attention.mask)):
        raise refuse(Reason.MASK, f"the mask has {last[0] if last else 0} tokens, the attention {kv_len}",
                     "make the mask as long as the attended part of the cache", attention.node)
    if len(sizes(attention.mask)) > 4:
        raise refuse(Reason.MASK, f"the mask has {len(sizes(attention.mask))} dimensions", "use at most 4",
                     attention.node)


def _check_users(pair: Pair, refused: dict[fx.Node, Refusal]) -> None:
    """Nothing but this pair's write and readers may use P, W or the views between.

    A graph may return the epilogue: that is the cache input itself, which AOTAutograd hands out from the inputs.
    """
    allowed = set(pair.k.inside | pair.v.inside)
    for reader in pair.readers:
        allowed |= _nodes(reader.attention)
    ends = {reader.attention.out for reader in pair.readers}
    stores = {pair.k.store, pair.v.store}
    seen: set[fx.Node] = set()
    stack = [pair.k.cache, pair.v.cache]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in refused:
                why = refused[user]
                raise refuse(Reason.OTHER_READER, f"{pair.k.cache.name} is also read by an attention that stays: "
                             f"{why.message}", why.hint, user)
            if user.op == "output" and node not in stores:
                raise refuse(Reason.OTHER_USER, f"the graph returns {node.name}, a view or copy of the cache",
                             "do not return the cache from the compiled function", node)
            if user.op != "output" and user not in allowed:
                raise refuse(Reason.OTHER_USER, f"{user.name} ({user.target}) also uses the cache",
                             "let only attention read the cache", user)
            if user in allowed and user not in seen and user not in ends:
                seen.add(user)
                stack.append(user)


def _nodes(attention: Attention) -> set[fx.Node]:
    """All nodes between the written caches and an attention's output."""
    nodes = set(attention.inside) | {attention.node}
    for operand in (attention.k, attention.v):
        nodes.update(operand.chain if operand else ())
    return nodes
