"""Attentions written out by hand: what is refused between scores and output, and which softmaxes are none."""

import pytest
import torch
from compare import RewritingBackend, run_both
from steps import check_refused, drive, write
from torch import nn

from kvarn_passes import Reason


def masked_scores(m, x, position):
    write(m, x, position)
    scores = (x @ m.k_cache.transpose(2, 3)).masked_fill(torch.zeros(1, 64, dtype=torch.bool), -1e9)
    return torch.softmax(scores, -1) @ m.v_cache


def weights_returned(m, x, position):
    write(m, x, position)
    weights = torch.softmax(x @ m.k_cache.transpose(2, 3), -1)
    return weights @ m.v_cache + weights.amax()


def capped(m, x, position):
    write(m, x, position)
    return torch.softmax(torch.tanh(x @ m.k_cache.transpose(2, 3)), -1) @ m.v_cache


def scores_of(m, x, position):
    write(m, x, position)
    return x @ m.k_cache.transpose(2, 3)


def added_bool(m, x, position):
    """Adds 1 where it may attend: no mask at all, in spite of its dtype."""
    return torch.softmax(scores_of(m, x, position) + (torch.arange(64) <= position[:, None]), -1) @ m.v_cache


def added_integers(m, x, position):
    return torch.softmax(scores_of(m, x, position) + torch.arange(64)[None], -1) @ m.v_cache


def floored(m, x, position):
    return torch.softmax(torch.div(scores_of(m, x, position), 8.0, rounding_mode="floor"), -1) @ m.v_cache


def integer_scores(m, x, position):
    return torch.softmax(scores_of(m, x, position).to(torch.int32).float(), -1) @ m.v_cache


def integer_weights(m, x, position):
    return torch.softmax(scores_of(m, x, position), -1).to(torch.int32).float() @ m.v_cache


def weights_changed(m, x, position):
    return (torch.softmax(scores_of(m, x, position), -1) * 0.5) @ m.v_cache


def weights_transposed(m, x, position):
    weights = torch.softmax(scores_of(m, x, position), -1)
    return (m.v_cache.transpose(2, 3) @ weights.transpose(2, 3)).transpose(2, 3)


@pytest.mark.parametrize("step, reason", [
    (added_bool, Reason.MASK), (added_integers, Reason.MASK), (floored, Reason.UNREADABLE_CALL),
    (integer_scores, Reason.UNREADABLE_CALL), (integer_weights, Reason.UNREADABLE_CALL),
    (weights_changed, Reason.UNREADABLE_CALL), (weights_transposed, Reason.UNREADABLE_CALL),
    (capped, Reason.UNREADABLE_CALL), (masked_scores, Reason.UNREADABLE_CALL), (weights_returned, Reason.OTHER_USER),
], ids=lambda value: getattr(value, "__name__", None))
def test_step_is_refused(step, reason):
    refusal = check_refused(drive(step), reason)
    assert "tests/passes/" in refusal.source


def test_router_softmax_is_no_attention():
    backend = RewritingBackend()
    model = nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1), nn.Linear(4, 8))
    run_both(model, lambda f: [f(torch.ones(2, 8))], backend)
    assert backend.decisions == []


def test_gates_and_sampling_are_no_attention():
    """Softmaxes below an attention that have no product with its cache right above them."""
    def step(m, x, position):
        write(m, x, position)
        y = torch.softmax(x @ m.k_cache.transpose(2, 3), -1) @ m.v_cache
        router = torch.softmax(y @ torch.eye(64)[:, :4], -1)
        return y * torch.softmax(y, -1) * router.amax()

    backend = drive(step)
    assert [[d.accepted for d in result.decisions] for result in backend.results] == [[True]] * len(backend.results)
