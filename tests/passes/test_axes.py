"""The view algebra against real index tensors."""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from kvarn_passes.axes import Factor, attention_axes, layout_of, reshape, views_above, whole
from kvarn_passes.graph import sizes
from kvarn_passes.refusal import Reason, Refused


def indices_of(layout, shape) -> torch.Tensor:
    """The element of a cache of `shape` (flat index) that each element of a layout comes from."""
    strides = torch.empty(shape, device="meta").stride()
    flat = torch.zeros([1] * len(layout), dtype=torch.int64)
    for position, dim in enumerate(layout):
        along = torch.zeros((), dtype=torch.int64)
        for factor in dim:
            step = int(factor.stride) * strides[factor.axis] if factor.axis is not None else 0
            along = along[..., None] + torch.arange(int(factor.size)) * step
        flat = flat + along.reshape([-1 if i == position else 1 for i in range(len(layout))])
    return flat


def traced(function, shape):
    """The chain of views a function makes of an index tensor, and the index tensor it makes."""
    cache = torch.arange(torch.Size(shape).numel()).reshape(shape)
    graph = make_fx(function)(cache).graph
    output = graph.find_nodes(op="output")[0].args[0]
    root, chain = views_above(output)
    assert root.op == "placeholder"
    return chain, function(cache)


LAYOUT = ("permute", "transpose", "flatten", "split", "unsqueeze", "expand", "repeat", "clone")


@st.composite
def view(draw, x: torch.Tensor, kinds: tuple[str, ...], times: tuple[int, ...]):
    """A function that applies one view-like op to tensors shaped like x."""
    rank = x.ndim
    axis = draw(st.integers(0, rank - 1))
    kind = draw(st.sampled_from(kinds))
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        return lambda t: t.permute(order)
    if kind == "transpose":
        other = draw(st.integers(0, rank - 1))
        return lambda t: t.transpose(axis, other)
    if kind == "flatten" and rank > 1:
        axis = draw(st.integers(0, rank - 2))
        return lambda t: t.reshape(*t.shape[:axis], -1, *t.shape[axis + 2 :])
    if kind == "split":
        part = draw(st.sampled_from([d for d in range(1, x.shape[axis] + 1) if x.shape[axis] % d == 0]))
        return lambda t: t.reshape(*t.shape[:axis], part, -1, *t.shape[axis + 1 :])
    if kind == "expand":
        size = draw(st.sampled_from(times))
        return lambda t: t.unsqueeze(axis).expand(*t.shape[:axis], size, *t.shape[axis:])
    if kind == "prefix":
        end = draw(st.integers(1, x.shape[axis]))
        return lambda t: t.narrow(axis, 0, end)
    if kind == "first" and rank > 1:
        return lambda t: t.select(axis, 0)
    if kind == "repeat":
        size = draw(st.sampled_from(times))
        return lambda t: t.repeat([size if i == axis else 1 for i in range(rank)])
    if kind == "unsqueeze":
        return lambda t: t.unsqueeze(axis)
    return lambda t: t.clone()


@st.composite
def chain_of_views(draw, extents: tuple[int, ...], kinds: tuple[str, ...], times: tuple[int, ...]):
    """A cache shape and a function of up to six views."""
    shape = draw(st.lists(st.sampled_from(extents), min_size=2, max_size=4))
    x, views = torch.zeros(shape), []
    for _ in range(draw(st.integers(1, 6))):
        step = draw(view(x, kinds, times))
        if step(x).numel() <= 4096:
            x = step(x)
            views.append(step)

    def function(t):
        for step in views:
            t = step(t)
        return t

    return shape, function


@settings(max_examples=100, deadline=None)
@given(chain_of_views((1, 2, 4, 8), LAYOUT, (1, 2, 4)))
def test_layout_is_the_index_tensor(case):
    """With powers of two nothing cuts a factor unevenly: every chain is accepted, and described exactly."""
    shape, function = case
    chain, want = traced(function, shape)
    layout = layout_of(chain, [sympy.Integer(s) for s in shape])
    assert torch.equal(indices_of(layout, shape).expand(want.shape), want)


@settings(max_examples=100, deadline=None)
@given(chain_of_views((1, 2, 3, 6), (*LAYOUT, "prefix", "first"), (1, 2, 3)))
def test_what_is_accepted_is_exact(case):
    """With any sizes and prefixes a chain may be refused, but never described wrongly."""
    shape, function = case
    chain, want = traced(function, shape)
    try:
        layout = layout_of(chain, [sympy.Integer(s) for s in shape])
    except Refused as refused:
        assert refused.refusal.reason is Reason.VIEW
        return
    assert torch.equal(indices_of(layout, shape).expand(want.shape), want)


def proof(function, shape=(2, 3, 8, 4), tokens=None):
    chain, _ = traced(function, shape)
    cache = tuple(sympy.Integer(s) for s in shape)
    node = chain[-1] if chain else None
    return attention_axes(layout_of(chain, cache), cache, tokens, node)


def repeat_kv(t, times, axis):
    return t.unsqueeze(axis + 1).expand(*t.shape[: axis + 1], times, *t.shape[axis + 1 :]).flatten(axis, axis + 1)


@pytest.mark.parametrize("function, shape, order, rows, tokens", [
    (lambda t: t.clone(), (2, 3, 8, 4), (0, 1, 2, 3), 2, 8),
    (lambda t: repeat_kv(t, 5, 1), (2, 3, 8, 4), (0, 1, 2, 3), 2, 8),
    (lambda t: t.transpose(1, 2), (2, 8, 3, 4), (0, 2, 1, 3), 2, 8),
    (lambda t: repeat_kv(t[:1, :5], 2, 2).transpose(1, 2), (2, 8, 3, 4), (0, 2, 1, 3), 1, 5),
    (lambda t: t.permute(1, 2, 0, 3), (8, 2, 3, 4), (1, 2, 0, 3), 2, 8),
    (lambda t: t.repeat_interleave(2, 1), (2, 1, 8, 4), (0, 1, 2, 3), 2, 8),
    (lambda t: t[:, :1].transpose(1, 2), (1, 8, 1, 4), (0, 2, 1, 3), 1, 1),
])
def test_proves_axes(function, shape, order, rows, tokens):
    axes, got_rows, got_tokens = proof(function, shape, tokens=1 if order[2] == 1 else None)
    assert (axes.order, got_rows, got_tokens) == (order, rows, tokens)


@pytest.mark.parametrize("function, reason", [
    (lambda t: t.repeat(1, 2, 1, 1), Reason.LAYOUT),  # repeats heads as a block
    (lambda t: t[:, :2], Reason.LAYOUT),  # some heads
    (lambda t: t[..., :2], Reason.LAYOUT),  # some channels
    (lambda t: t.transpose(0, 1).reshape(3, 2, 8, 4).flatten(0, 1).unsqueeze(1), Reason.LAYOUT),
    (lambda t: t.reshape(2, 3, 4, 8), Reason.LAYOUT),  # tokens run into channels
    (lambda t: t[:1].expand(2, 3, 8, 4), Reason.LAYOUT),  # one row for all
    (lambda t: t[:, :, 1:], Reason.VIEW),
    (lambda t: t[:, :, ::2], Reason.VIEW),
    (lambda t: t.select(0, 1).unsqueeze(0), Reason.VIEW),
])
def test_refuses_other_layouts(function, reason):
    with pytest.raises(Refused) as refused:
        proof(function)
    assert refused.value.refusal.reason is reason


def test_symbolic_sizes_stay_exact():
    """Heads repeated 3 times and flattened with a batch of unknown size come apart again."""
    b, s = sympy.symbols("b s", integer=True, positive=True)
    layout = whole([b, sympy.Integer(2), s, sympy.Integer(4)])
    repeated = (layout[0], (*layout[1], Factor(None, sympy.Integer(3), sympy.Integer(0))), layout[2], layout[3])
    flat = reshape(repeated, [6 * b, s, sympy.Integer(4)])
    assert flat is not None and reshape(flat, [b, sympy.Integer(6), s, sympy.Integer(4)]) == repeated
    assert reshape(layout, [b, sympy.Integer(2), sympy.Integer(4), s]) is None  # whether 4 divides s is unknown


def test_casts_are_no_views():
    graph = make_fx(lambda t: t.to(torch.float64).transpose(0, 1))(torch.zeros(2, 3)).graph
    root, chain = views_above(graph.find_nodes(op="output")[0].args[0])
    assert "to_copy" in root.name and len(chain) == 1 and sizes(root) == (2, 3)
