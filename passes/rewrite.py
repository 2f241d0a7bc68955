"""Replaces caches and attentions that `pair` accepted by stores: the pass itself and the graph surgery."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

import kvarn.ops  # noqa: F401  (registers torch.ops.kvarn)
from kvarn.layout import StoreLayout
from kvarn.spec import QuantSpec

from .attention import Attention, find_attentions
from .base import Pass, count, log
from .cache_write import CacheWrite, Span
from .decision import Decision, Rewritten, StorePair
from .graph import arg_expr, aten, module_path, operand, size_node, sizes, source_line
from .pair import Outcome, Pair, pair_up
from .refusal import Refusal
from .rope import balance_source

_ATEN = torch.ops.aten


class Rewrite(Pass[Rewritten]):
    """Moves every accepted (K cache, V cache) into a store.

        before:  w_k = index_copy(keys, 2, positions, k)
                 w_v = index_copy(values, 2, positions, v)
                 o = kvarn.sdpa(q, w_k, w_v, mask, 0.0, False, None, True)
                 copy_(keys, w_k);  copy_(values, w_v)

        after:   kvarn.append(k, v, positions, records, tail, lengths, balance, S, spec)
                 o = kvarn.attend(q, k, v, positions, records, tail, lengths, balance, mask, S, False, scale, spec)
    """

    name = "rewrite"

    def __init__(self, spec: QuantSpec, balance: str = "weights"):
        self.spec, self.balance = spec, balance

    def run(self, gm: fx.GraphModule) -> Rewritten:
        """Rewrites a functional ATen graph in place; see the module's `rewrite`."""
        graph = gm.graph
        inputs = graph.find_nodes(op="placeholder")
        attentions = find_attentions(graph)
        pairs, outcomes = pair_up(attentions, self.spec)
        index = {node: i for i, node in enumerate(inputs)}
        caches = {cache for pair in pairs for cache in (pair.k.cache, pair.v.cache)}
        # Described before the surgery, which takes away what the descriptions point at.
        result = Rewritten(
            tuple(self._describe(pair, index) for pair in pairs),
            tuple(_decide(a, outcome, pairs) for a, outcome in zip(attentions, outcomes, strict=True)),
            tuple(i for i, node in enumerate(inputs) if node not in caches))
        stores = [_add_store_inputs(graph, pair, self.spec, number) for number, pair in enumerate(pairs)]
        outputs = [old_and_new for pair, store in zip(pairs, stores, strict=True)
                   for old_and_new in _insert(graph, pair, store, self.spec)]
        # Only now, so that the new nodes of one pair follow where their inputs are the outputs of another.
        for old, new in outputs:
            old.replace_all_uses_with(new)
        _release_captured(graph)
        graph.eliminate_dead_code()
        for cache in caches:
            graph.erase_node(cache)
        graph.lint()
        gm.recompile()
        _report(result.decisions)
        return result

    def _describe(self, pair: Pair, index: dict[fx.Node, int]) -> StorePair:
        wanted = self.balance == "weights" and self.spec.rotated
        source = balance_source(pair.k.new, pair.readers[0].attention.q, index) if wanted else None
        return StorePair(index[pair.k.cache], index[pair.v.cache], pair.axes, self.spec, source,
                         module_path(pair.k.node))


def rewrite(gm: fx.GraphModule, spec: QuantSpec, *, balance: str = "weights") -> Rewritten:
    """Moves the KV caches of a functional ATen graph (aot_autograd, inference, no decompositions) to stores, in place.

    Attentions that cannot be moved stay as plain aten.scaled_dot_product_attention, their caches plain tensors.

    Args:
        gm: the graph, with torch.ops.kvarn.sdpa where `capture` put it.
        spec: the store's format.
        balance: "weights" to look for the inputs a key balance can be computed from, anything else for none.

    Returns:
        What became of every attention, and the calling convention of the new graph (see Rewritten).
    """
    return Rewrite(spec, balance)(gm)


def _decide(attention: Attention, outcome: Outcome, pairs: list[Pair]) -> Decision:
    node = attention.node
    about = module_path(node), source_line(node), attention.kind
    if isinstance(outcome, Refusal):
        caches = [operand.root for operand in (attention.k, attention.v) if operand]
        written = [cache.args[0] if cache.op != "placeholder" and cache.args else cache for cache in caches]
        inputs = [cache for cache in written if isinstance(cache, fx.Node) and cache.op == "placeholder"]
        shape = _shape(inputs[0]) if inputs else ()
        return Decision(*about, ", ".join(cache.name for cache in inputs), shape, False, outcome)
    number = next(i for i, pair in enumerate(pairs) if outcome in pair.readers)
    caches = f"{outcome.k.cache.name}, {outcome.v.cache.name}"
    return Decision(*about, caches, _shape(outcome.k.cache), True, None, number)


def _shape(cache: fx.Node) -> tuple[int | str, ...]:
    return tuple(int(size) if size.is_Integer else str(size) for size in sizes(cache))


def _report(decisions: tuple[Decision, ...]) -> None:
    accepted = sum(decision.accepted for decision in decisions)
    count("attention_found", len(decisions))
    count("attention_rewritten", accepted)
    count("attention_refused", len(decisions) - accepted)
    for decision in decisions:
        if decision.refusal:
            log.info("%s stays as it is: %s", decision.module_path or "an attention", decision.refusal)


def _add_store_inputs(graph: fx.Graph, pair: Pair, spec: QuantSpec, number: int) -> tuple[fx.Node, ...]:
    """The pair's four placeholders, after all others: records, tail, lengths, balance."""
    value, axes = pair.k.cache.meta["val"], pair.axes
    rows, heads, capacity, head_dim = (value.shape[axis] for axis in axes.order)
    layout = StoreLayout(spec, int(head_dim), value.dtype)
    heads = int(heads)
    shapes = {"records": ((rows, heads, layout.tiles(capacity), layout.record_bytes), torch.uint8),
              "tail": ((rows, heads, layout.tail_bytes), torch.uint8),
              "lengths": ((rows,), torch.int64), "balance": ((heads, int(head_dim)), torch.float32)}
    nodes = []
    for name, (shape, dtype) in shapes.items():
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            node = graph.placeholder(f"kvarn_{name}_{number}")
        with value.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=value.device)
        # Stores never move; without this mark cudagraph trees refuse graphs that mutate their inputs.
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        nodes.append(node)
    return tuple(nodes)


def _insert(graph: fx.Graph, pair: Pair, store: tuple[fx.Node, ...], spec: QuantSpec) -> list[tuple[fx.Node, fx.Node]]:
    """Writes and reads the store, and drops the epilogues; returns each attention's old output with its new one."""
    records, tail, lengths, balance = store
    outs = {reader.attention.out for reader in pair.readers}
    # The first output is not always the first reader's. All outputs come after the write, so what it writes is there.
    first = next(node for node in graph.nodes if node in outs)
    replaced = []
    with graph.inserting_before(first):
        make = _Maker(graph, first)
        k, v = (_new_tokens(make, write, pair.axes.order) for write in (pair.k, pair.v))
        positions = _positions(make, pair)
        make(torch.ops.kvarn.append.default, k, v, positions, *store, _capacity(make, pair, records, spec), spec.key)
    for reader in pair.readers:
        attention = reader.attention
        assert attention.q is not None
        with graph.inserting_before(attention.out):
            make = _Maker(graph, attention.out)
            q = _query(make, attention)
            kv_len = size_node(graph, reader.kv_len, attention.out)
            out = make(torch.ops.kvarn.attend.default, q, k, v, positions, records, tail, lengths, balance,
                       _mask(make, attention), kv_len, attention.is_causal, float(attention.scale), spec.key)
        replaced.append((attention.out, out))
    for write in (pair.k, pair.v):
        # A returned epilogue is the cache input, which AOTAutograd's wrapper hands out itself: it drops this value.
        for user in list(write.store.users):
            user.args = map_arg(user.args, lambda n, gone=write.store: None if n is gone else n)
        graph.erase_node(write.store)
    return replaced


class _Maker:
    """Makes call nodes at the graph's insertion point: meta of the node they stand for, value from fake inputs."""

    def __init__(self, graph: fx.Graph, like: fx.Node):
        self.graph, self.like = graph, like

    def __call__(self, target: Callable[..., Any], *args, **kwargs) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {key: value for key, value in self.like.meta.items() if key in ("stack_trace", "nn_module_stack")}
        fake_args, fake_kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.like.meta["val"].fake_mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        return node


def _new_tokens(make: _Maker, write: CacheWrite, order: tuple[int, ...]) -> fx.Node:
    """The written tokens as [B', H, n, D]."""
    node, axes = write.new, list(write.new_axes)
    for axis in range(4):
        if axis not in axes:
            node = make(_ATEN.unsqueeze.default, node, 0)
            axes.insert(0, axis)
    permutation = [axes.index(axis) for axis in order]
    return node if permutation == [0, 1, 2, 3] else make(_ATEN.permute.default, node, permutation)


def _positions(make: _Maker, pair: Pair) -> fx.Node:
    """Token positions int64 [n] or [B', n] of the write."""
    axis, write = pair.axes.tokens, pair.k
    device = write.cache.meta["val"].device
    where = write.where.get(axis) or Span(0, size_node(make.graph, sizes(write.cache)[axis], make.like))
    if isinstance(where, Span):
        end = where.end
        if end is None:
            end = size_node(make.graph, sizes(write.cache)[axis], make.like)
        return make(_ATEN.arange.start, where.start, end, dtype=torch.int64, device=device, pin_memory=False)
    node = where.node
    if node.meta["val"].dtype != torch.int64:
        node = make(_ATEN._to_copy.default, node, dtype=torch.int64)
    return make(_ATEN.unsqueeze.default, node, 1) if where.per_row and node.meta["val"].ndim == 1 else node


def _capacity(make: _Maker, pair: Pair, records: fx.Node, spec: QuantSpec) -> int | fx.Node:
    """Positions of the plain cache; where that is symbolic, those of the store's tiles, which may be a few more."""
    capacity = sizes(pair.k.cache)[pair.axes.tokens]
    if capacity.is_Integer:
        return int(capacity)
    return make(operator.mul, make(_ATEN.sym_size.int, records, 2), spec.group)


def _query(make: _Maker, attention: Attention) -> fx.Node:
    """The query as [B', Hq, n, D]: the tensor before matmul flattened it, or a view of what matmul made."""
    node = attention.q
    assert node is not None
    if not attention.q_shape:
        return node
    wanted = tuple(map(arg_expr, attention.q_shape))
    found, above = None, node
    while aten(above) in ("view", "_unsafe_view", "expand"):
        above = operand(above)
        found = above if sizes(above) == wanted else found
    return found or make(_ATEN.view.default, node, list(attention.q_shape))


def _mask(make: _Maker, attention: Attention) -> fx.Node | None:
    """The mask with at least the dimensions [n, kv_len]."""
    mask = attention.mask
    while mask is not None and len(sizes(mask)) < 2:
        mask = make(_ATEN.unsqueeze.default, mask, 0)
    return mask


def _release_captured(graph: fx.Graph) -> None:
    """Turns every capture op that stayed into the plain attention it stood for."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.kvarn.sdpa.default):
        q, k, v, mask, dropout, is_causal, scale, enable_gqa = node.args
        with graph.inserting_before(node):
            make = _Maker(graph, node)
            out = make(_ATEN.scaled_dot_product_attention.default, q, k, v, mask, dropout, is_causal, scale=scale,
                       enable_gqa=enable_gqa)
            if out.meta["val"].stride() != node.meta["val"].stride():
                # The graph behind it was traced with the capture op's strides, and its views may need them.
                out = make(_ATEN.clone.default, out, memory_format=torch.contiguous_format)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
