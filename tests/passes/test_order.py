"""Where new nodes go: several attentions of one graph that feed each other, or finish in another order than they start.
"""

import pytest
import torch
import torch.nn.functional as F
from compare import TOLERANCE, RewritingBackend, run_both
from steps import Cached, attend, drive, plain, write
from torch import nn

KVARN = torch.ops.kvarn


def by_hand(m, x, position):
    write(m, x, position)
    return attend_by_hand(m, x)


def attend_by_hand(m, q, mask=None):
    scores = q @ m.k_cache.transpose(2, 3)
    return torch.softmax(scores if mask is None else scores + mask, -1) @ m.v_cache


def attend_captured(m, q, mask=None):
    return F.scaled_dot_product_attention(q, m.k_cache, m.v_cache, attn_mask=mask)


def write_copies(m, x, position):
    m.k_cache.index_copy_(2, position, x)
    m.v_cache.index_copy_(2, position, 2 * x)


def check_counts(backend, appends: int, attends: int):
    graphs = len(backend.graphs)
    assert all(decision.accepted for decision in backend.decisions)
    assert backend.ops(KVARN.append.default) == graphs * appends
    assert backend.ops(KVARN.attend.default) == graphs * attends


@pytest.mark.parametrize("written", [write, write_copies])
def test_crossed_outputs(written):
    """The second softmax's product with the values comes first: the append must stand before it."""
    def crossed(m, x, position):
        written(m, x, position)
        a, b = (torch.softmax(q @ m.k_cache.transpose(2, 3), -1) for q in (x, 2 * x))
        second = b @ m.v_cache
        return a @ m.v_cache - second

    backend = drive(crossed)
    check_counts(backend, 1, 2)
    for gm in backend.graphs:
        targets = [node.target for node in gm.graph.nodes]
        assert targets.index(KVARN.append.default) < targets.index(KVARN.attend.default)


class Stack(nn.Module):
    """Layers with nothing between one's output and the next one's write and query."""

    def __init__(self, *steps):
        super().__init__()
        self.layers = nn.ModuleList(map(Cached, steps))

    def forward(self, x, position):
        for layer in self.layers:
            x = layer(x, position)
        return x


@pytest.mark.parametrize("first", [plain, by_hand])
@pytest.mark.parametrize("second", [plain, by_hand])
def test_output_is_written_next(first, second):
    def calls(f):
        return [f(torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(p)), torch.tensor([p]))
                for p in range(3)]

    backend = RewritingBackend()
    assert run_both(Stack(first, second, first), calls, backend) < TOLERANCE[torch.float32]
    check_counts(backend, 3, 3)


@pytest.mark.parametrize("again", [attend_captured, attend_by_hand])
@pytest.mark.parametrize("use", ["query", "mask"])
def test_output_is_the_next_query_or_mask(again, use):
    """Both read one cache; 64 channels make a mask of 64 tokens."""
    def step(m, x, position):
        y = plain(m, x, position)
        return again(m, y) if use == "query" else again(m, x, y)

    check_counts(drive(step), 1, 2)


def test_mask_of_one_dimension():
    def step(m, x, position):
        write(m, x, position)
        return attend_by_hand(m, x, torch.linspace(-1, 1, 64))

    check_counts(drive(step), 1, 1)


def copied(m, x, position):
    write_copies(m, x, position)
    return attend(m, x, m.k_cache, m.v_cache)


def as_many_as_positions(m, x, position):
    write(m, x, position)
    return attend(m, x, m.k_cache[:, :, : len(position)], m.v_cache[:, :, : len(position)])


def as_many_as_tokens(m, x, position):
    write(m, x, position)
    return attend(m, x, m.k_cache[:, :, : x.shape[2]], m.v_cache[:, :, : x.shape[2]])


@pytest.mark.parametrize("step", [plain, copied, by_hand, as_many_as_positions, as_many_as_tokens])
def test_second_prompt_length(step):
    """Automatic dynamic shapes give tokens and positions a symbol each: a guard makes them one."""
    def calls(f):
        return [f(torch.randn(1, 2, n, 64, generator=torch.Generator().manual_seed(n)), torch.arange(n))
                for n in (5, 9, 17, 33)]

    backend = RewritingBackend()
    assert run_both(Cached(step), calls, backend) < TOLERANCE[torch.float32]
    check_counts(backend, 1, 1)
    assert len(backend.graphs) == 2  # one for 5 tokens, one for any other number
