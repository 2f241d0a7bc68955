"""Capture: every spelling becomes one op with the same result, and undo leaves no trace."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from kvarn_passes import capture

KVARN = torch.ops.kvarn.sdpa.default
Q, K, M = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 5, 16), torch.randn(3, 5)
SPELLINGS = {
    "positional": lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m, 0.0, False, scale=0.5, enable_gqa=True),
    "keywords": lambda q, k, m: F.scaled_dot_product_attention(value=k, key=k, query=q, attn_mask=m, enable_gqa=True),
    "causal": lambda q, k, m: F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True),
    "builtin": lambda q, k, m: torch._C._nn.scaled_dot_product_attention(q, k, k, attn_mask=m, enable_gqa=True),
    "aten": lambda q, k, m: torch.ops.aten.scaled_dot_product_attention.default(q, k, k, m, enable_gqa=True),
    "aten packet": lambda q, k, m: torch.ops.aten.scaled_dot_product_attention(q, k, k, m, enable_gqa=True),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling):
    gm = fx.symbolic_trace(SPELLINGS[spelling])
    want, before = gm(Q, K, M), gm.code
    undo = capture(gm)
    assert len(gm.graph.find_nodes(op="call_function", target=KVARN)) == 1
    assert torch.equal(gm(Q, K, M), want)
    undo.restore()
    undo.restore()
    assert gm.code == before and torch.equal(gm(Q, K, M), want)


def test_submodules():
    inner = fx.symbolic_trace(SPELLINGS["causal"])
    graph = fx.Graph()
    args = [graph.placeholder(name) for name in "qkm"]
    graph.output(graph.call_module("inner", tuple(args)))
    gm = fx.GraphModule({"inner": inner}, graph)
    undo = capture(gm)
    assert inner.graph.find_nodes(op="call_function", target=KVARN)
    undo.restore()
    assert not inner.graph.find_nodes(op="call_function", target=KVARN)


def test_dropout_is_left_alone():
    gm = fx.symbolic_trace(lambda q, k: F.scaled_dot_product_attention(q, k, k, dropout_p=0.5))
    capture(gm)
    assert not gm.graph.find_nodes(op="call_function", target=KVARN)


def test_flags_computed_in_the_graph_are_left_alone():
    gm = fx.symbolic_trace(lambda q, k, causal: F.scaled_dot_product_attention(q, k, k, is_causal=causal))
    capture(gm)
    assert not gm.graph.find_nodes(op="call_function", target=KVARN)
