"""The pass that makes one op of a layer's RoPE and its cache write, in vLLM's compiled graph.

Before (functional, as vLLM's post-grad passes see it; `rope` is RoPE as a custom op):

    rope = auto_functionalized(_C.rotary_embedding, positions, query=q, key=k, head_size, cos_sin_cache, is_neox)
    q1, k1 = rope[1], rope[2]
    written = vllm.unified_kv_cache_update(reshape(k1), reshape(v), layer)
    attention(reshape(q1), reshape(k1), reshape(v), layer, written)

After:

    roped = kvarn.rope_store(q, k, v, positions, cos_sin_cache, head_size, is_neox, layer)
    q1, k1, written = roped[0], roped[1], roped[2]
    attention(reshape(q1), reshape(k1), reshape(v), layer, written)

Why this cut. Attention needs the roped q of every row, and the roped k of a prompt's own tokens, so both leave the op;
what a decode saves is a launch and the latency between two. They leave as new tensors: an op that ropes in place would
write into the projection that q, k and v are slices of, for which inductor copies all three. Other readers of the roped
q and k are no obstacle: they read the op's outputs. The op takes RoPE's place in the graph, so v must be there by then.

Where q and k are such slices, functionalization scatters the roped ones into the projection and splits it again. The
readers of these splits are led to what was scattered (or, of v, to the projection), and with them go the scatters.

Guards, each with its reason: see Reason. A write that fails one stays as it is.
"""

import inspect
import operator
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import vllm._custom_ops  # noqa: F401  (defines _C.rotary_embedding)
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx.experimental.symbolic_shapes import statically_known_true
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.logger import init_logger

import kvarn_compile.vllm.rope_store  # noqa: F401  (defines the op)

logger = init_logger("vllm.kvarn")
aten, ROPE = torch.ops.aten, torch.ops._C.rotary_embedding.default
WRITE = torch.ops.vllm.unified_kv_cache_update.default
VIEWS = (aten.reshape.default, aten.view.default)
SPLIT, SCATTER, ITEM = aten.split_with_sizes.default, aten.slice_scatter.default, operator.getitem


class Reason(Enum):
    """Why a cache write is not fused."""

    NO_ROPE = "its key is not what one rotary embedding gives"
    OTHER_ROPE = "its key is rotated in another way than rope_store does it"
    SHARED = "its key goes to another layer's cache too"
    LATE = "its value is computed after the rotation of its key"


@dataclass(frozen=True)
class Part:
    """Channels start..stop - 1 of a node's last dimension; all of them where stop is None."""

    node: fx.Node
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Match:
    """A write whose key is RoPE's, and what its value is."""

    write: fx.Node
    rope: fx.Node
    value: Part


class RopeStorePass(InductorPass):
    """Fuses what can be fused and says what cannot; `before` runs first, if there is one."""

    def __init__(self, before: InductorPass | None = None):
        self.before = before
        self._said: set[Reason] = set()

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place."""
        if self.before is not None:
            self.before(graph)
        found = dict(decisions(graph))
        matches = [x for x in found.values() if isinstance(x, Match)]
        for match in matches:
            fuse(graph, match)
        if matches:
            shortcut(graph)
        for reason in {x for x in found.values() if isinstance(x, Reason)} - self._said:
            self._said.add(reason)  # most layers' graphs are alike
            logger.info("kvarn: a cache write stays apart from RoPE: %s (%s).", reason.value, reason.name)

    def uuid(self) -> str:
        """Changes with the source of this file and with the pass before."""
        return InductorPass.hash_source(inspect.getsource(sys.modules[__name__]),
                                        str(self.before.uuid()) if self.before is not None else "")


def decisions(graph: fx.Graph) -> Iterator[tuple[fx.Node, Match | Reason]]:
    """Every cache write of the graph, and how it is fused or why not."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    writes = [node for node in order if node.target is WRITE]
    ropes = [_rope_of(trace(_arg(write, 0))) for write in writes]
    for write, rope in zip(writes, ropes, strict=True):
        if rope is None:
            yield write, Reason.NO_ROPE
        elif not _plain(rope, _arg(write, 0)):
            yield write, Reason.OTHER_ROPE
        elif ropes.count(rope) > 1:
            yield write, Reason.SHARED
        else:
            value = trace(_arg(write, 1))
            needed = [value.node, *(x for x in write.args[2:] if isinstance(x, fx.Node))]
            yield write, Match(write, rope, value) if all(order[x] < order[rope] for x in needed) else Reason.LATE


def trace(node: fx.Node) -> Part:
    """Where a tensor's channels come from: through reshapes that keep the tokens, splits, and scatters into what is
    split."""
    while node.target in VIEWS and statically_known_true(_value(node).shape[0] == _value(_arg(node, 0)).shape[0]):
        node = _arg(node, 0)
    split = _arg(node, 0) if node.target is ITEM else None
    if split is None or split.target is not SPLIT or not _along_channels(split, 2):
        return Part(node)
    whole, sizes, index = _arg(split, 0), _any(split, 1), _any(node, 1)
    start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
    while whole.target is SCATTER and _along_channels(whole, 2) and len(whole.args) == 5:
        low, high = _any(whole, 3), _any(whole, 4)
        if (low, high) == (start, stop):
            return trace(_arg(whole, 1))
        if low < stop and start < high:
            break
        whole = _arg(whole, 0)
    return Part(whole, start, stop)


def fuse(graph: fx.Graph, match: Match) -> None:
    """rope_store in RoPE's place."""
    rope, write, x = match.rope, match.write, match.rope.kwargs
    with graph.inserting_before(rope):
        fused = graph.call_function(torch.ops.kvarn.rope_store.default, (
            x["query"], x["key"], _take(graph, match.value), x["positions"], x["cos_sin_cache"], x["head_size"],
            x["is_neox"], write.args[2]))
        parts = [graph.call_function(ITEM, (fused, i)) for i in range(3)]
    roped = [torch.empty_like(_value(x[name]), memory_format=torch.contiguous_format) for name in ("query", "key")]
    fused.meta["val"] = (*roped, _value(write))
    for part, value in zip(parts, fused.meta["val"], strict=True):
        part.meta["val"] = value
    for user in list(rope.users):
        user.replace_all_uses_with(parts[_any(user, 1) - 1])
        graph.erase_node(user)
    write.replace_all_uses_with(parts[2])
    for node in (write, rope):
        graph.erase_node(node)


def shortcut(graph: fx.Graph) -> None:
    """Lead readers of a split to what was scattered there, and drop the scatters that then have no reader."""
    scatters = [node for node in graph.nodes if node.target is SCATTER]
    splits = [user for node in scatters for user in node.users if user.target is SPLIT]
    for item in [user for split in splits for user in split.users]:
        part = trace(item)
        if part.node is not _arg(_arg(item, 0), 0):
            with graph.inserting_before(item):
                item.replace_all_uses_with(_take(graph, part))
            graph.erase_node(item)
    for node in [*splits, *reversed(scatters)]:
        if not node.users:
            graph.erase_node(node)


def _rope_of(key: Part) -> fx.Node | None:
    """The rotary embedding whose roped key this is."""
    if key.stop is not None or key.node.target is not ITEM or key.node.args[1] != 2:
        return None
    rope = _arg(key.node, 0)
    return rope if rope.target is auto_functionalized and rope.args[0] is ROPE else None


def _plain(rope: fx.Node, key: fx.Node) -> bool:
    """Heads of the layer's size, turned forward, from their first channel on, by one position a token."""
    x = rope.kwargs
    return (not x.get("rope_dim_offset") and not x.get("inverse") and _value(x["positions"]).dim() == 1
            and bool(x["head_size"] == _value(key).shape[-1]))


def _take(graph: fx.Graph, part: Part) -> fx.Node:
    """A node for it."""
    if part.stop is None:
        return part.node
    whole = _value(part.node)
    node = graph.call_function(aten.slice.Tensor, (part.node, whole.dim() - 1, part.start, part.stop))
    node.meta["val"] = whole[..., part.start : part.stop]
    return node


def _along_channels(node: fx.Node, at: int) -> bool:
    """Whether the dimension that is a node's argument `at` is the last of its first argument."""
    return len(node.args) > at and node.args[at] in (-1, _value(node.args[0]).dim() - 1)


def _arg(node: fx.Node, at: int) -> fx.Node:
    found = node.args[at]
    assert isinstance(found, fx.Node)
    return found


def _any(node: fx.Node, at: int) -> Any:
    return node.args[at]


def _value(node: Any) -> torch.Tensor:
    """The fake tensor that a node makes."""
    return node.meta["val"]
