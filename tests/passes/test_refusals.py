"""What is not rewritten: for each the reason, an unchanged result, and counters that add up."""

import pytest
import torch
import torch.nn.functional as F
from compare import TOLERANCE, RewritingBackend, run_both
from steps import attend, check_refused, drive, in_chunks, plain, reasons, write
from torch._dynamo.utils import counters
from toy_models import (
    Config,
    DynamicLayer,
    FusedLayer,
    HFModel,
    RollingLayer,
    sdpa_attention,
    wrong_repeat_attention,
)

from kvarn.spec import PRESETS
from kvarn_passes import Reason


def test_control_is_rewritten():
    """The step all refused ones below differ from by one thing."""
    assert reasons(drive(plain)) == {None}


def shifted(m, x, position):
    write(m, x, position)
    return attend(m, x, m.k_cache[:, :, 1:], m.v_cache[:, :, 1:])


def strided(m, x, position):
    write(m, x, position)
    return attend(m, x, m.k_cache[:, :, ::2], m.v_cache[:, :, ::2])


def scaled_keys(m, x, position):
    write(m, x, position)
    return attend(m, x, m.k_cache * 0.5, m.v_cache)


def cast_keys(m, x, position):
    write(m, x, position)
    return attend(m, x.double(), m.k_cache.double(), m.v_cache.double()).float()


def other_user(m, x, position):
    write(m, x, position)
    return attend(m, x, m.k_cache, m.v_cache) + m.k_cache.mean()


def read_before_write(m, x, position):
    early = m.k_cache.sum()
    write(m, x, position)
    return attend(m, x, m.k_cache, m.v_cache) + early


def no_write(m, x, position):
    return attend(m, x, m.k_cache, m.v_cache)


def no_cache(m, x, position):
    return attend(m, x, x + 1, x)


def half_written(m, x, position):
    m.k_cache[:, :, position] = x
    return attend(m, x, m.k_cache, m.v_cache)


def other_positions(m, x, position):
    m.k_cache[:, :, position] = x
    m.v_cache[:, :, position + 1] = x
    return attend(m, x, m.k_cache, m.v_cache)


def not_in_place(m, x, position):
    k, v = m.k_cache.index_copy(2, position, x), m.v_cache.index_copy(2, position, x)
    return attend(m, x, k, v)


def made_inside(m, x, position):
    k = torch.zeros(1, 2, 64, 64).index_copy_(2, position, x)
    return attend(m, x, k, k)


def one_for_both(m, x, position):
    m.k_cache[:, :, position] = x
    return attend(m, x, m.k_cache, m.k_cache)


def accumulated(m, x, position):
    m.k_cache.index_put_((torch.tensor([0]), torch.tensor([0]), position), x[0, 0], accumulate=True)
    m.v_cache[:, :, position] = x
    return attend(m, x, m.k_cache, m.v_cache)


def twice(m, x, position):
    write(m, x, position)
    m.k_cache[:, :, position + 1] = x
    return attend(m, x, m.k_cache, m.v_cache)


def scattered(m, x, position):
    index = position[None, None, :, None].expand_as(x)
    m.k_cache.scatter_(2, index, x)
    m.v_cache.scatter_(2, index, x)
    return attend(m, x, m.k_cache, m.v_cache)


def other_queries(m, x, position):
    write(m, x, position)
    return attend(m, torch.cat([x, x], 2), m.k_cache, m.v_cache)


def window(m, x, position):
    """A full sliding window that takes several tokens: the old ones move up, attention sees old and new."""
    k, v = torch.cat([m.k_cache[:, :, 1:], x], 2), torch.cat([m.v_cache[:, :, 1:], x], 2)
    m.k_cache.copy_(k[:, :, -64:])
    m.v_cache.copy_(v[:, :, -64:])
    return attend(m, x, k, v)


def cache_returned(m, x, position):
    write(m, x, position)
    return attend(m, x, m.k_cache, m.v_cache) + 0, m.k_cache[:, :, :3]


def scalar_index(m, x, position):
    m.k_cache.index_copy_(2, position[0], x)
    m.v_cache.index_copy_(2, position[0], x)
    return attend(m, x, m.k_cache, m.v_cache)


@pytest.mark.parametrize("step, reason", [
    (scalar_index, Reason.WRITE_FORM),
    (shifted, Reason.VIEW), (strided, Reason.VIEW), (scaled_keys, Reason.VIEW), (cast_keys, Reason.VIEW),
    (other_user, Reason.OTHER_USER), (read_before_write, Reason.OTHER_USER),
    (no_write, Reason.NOT_WRITTEN), (half_written, Reason.NOT_WRITTEN), (no_cache, Reason.NO_CACHE),
    (other_positions, Reason.PAIR_MISMATCH), (not_in_place, Reason.NOT_WRITTEN_BACK),
    (made_inside, Reason.NOT_AN_INPUT), (one_for_both, Reason.FUSED_CACHE), (accumulated, Reason.WRITE_FORM),
    (twice, Reason.WRITE_FORM), (scattered, Reason.WRITE_FORM), (other_queries, Reason.LAYOUT),
    (window, Reason.ROLLING_WINDOW),
], ids=lambda value: getattr(value, "__name__", None))
def test_step_is_refused(step, reason):
    refusal = check_refused(drive(step), reason)
    assert "tests/passes/" in refusal.source


@pytest.mark.parametrize("kind, reason", [
    (RollingLayer, Reason.ROLLING_WINDOW), (DynamicLayer, Reason.GROWING_CACHE), (FusedLayer, Reason.FUSED_CACHE)])
def test_cache_of_another_kind(kind, reason):
    backend = RewritingBackend()
    assert run_both(HFModel(Config()), in_chunks("hf", (1, 1), kind=kind), backend) == 0
    check_refused(backend, reason)


def test_heads_repeated_as_a_block():
    backend = RewritingBackend()
    assert run_both(HFModel(Config(), wrong_repeat_attention), in_chunks("hf", (5, 1)), backend) == 0
    check_refused(backend, Reason.LAYOUT)


def test_view_of_the_cache_returned():
    """A view of the cache that leaves the graph would show what is no longer there."""
    backend = drive(cache_returned)
    check_refused(backend, Reason.OTHER_USER)


def test_dropout():
    def dropped(m, x, position):
        write(m, x, position)
        return F.scaled_dot_product_attention(x, m.k_cache, m.v_cache, dropout_p=0.5) * 0

    check_refused(drive(dropped), Reason.DROPOUT)


@pytest.mark.parametrize("config, spec, reason", [
    (Config(heads=2, kv_heads=2, capacity=64, head_dim=48), PRESETS["k4v2_g128"], Reason.HEAD_DIM),
    (Config(heads=2, kv_heads=2, capacity=64, head_dim=48), PRESETS["k16v16"], None),
    (Config(heads=2, kv_heads=2, capacity=64, dtype=torch.float64), PRESETS["k16v16"], Reason.DTYPE),
])
def test_formats(config, spec, reason):
    backend = drive(plain, config, config.dtype, spec)
    assert reasons(backend) == {reason}


def test_short_mask():
    """A boolean mask shorter than the cache would broadcast or fail: one token's worth broadcasts and is fine."""
    def one(m, x, position):
        write(m, x, position)
        return F.scaled_dot_product_attention(x, m.k_cache, m.v_cache, attn_mask=torch.ones(1, 1, dtype=torch.bool))

    assert reasons(drive(one)) == {None}


@pytest.mark.parametrize("batch, rows, reason", [(2, 1, Reason.WRITE_FORM), (2, 2, None), (1, 1, None)])
def test_rows_are_counted(batch, rows, reason):
    """An index of one row broadcasts: every new row goes to row 0, which is no write of rows 0 to B-1."""
    def step(m, x, position):
        x, row = x.expand(batch, -1, -1, -1), torch.arange(rows)[:, None]
        position = position.expand(batch, -1) + torch.arange(batch)[:, None]
        m.k_cache[row, :, position] = x.transpose(1, 2)
        m.v_cache[row, :, position] = x.transpose(1, 2)
        return attend(m, x, m.k_cache, m.v_cache)

    assert reasons(drive(step, Config(heads=2, kv_heads=2, capacity=64, batch=batch))) == {reason}


def test_positions_per_head_are_not_per_row():
    """A cache [H, B, S, D] written at positions [H, n], with as many heads as rows."""
    def step(m, x, position):
        x, head = x.expand(2, -1, -1, -1), torch.arange(2)[:, None]
        position = position.expand(2, -1) + torch.arange(2)[:, None]
        m.k_cache[head, :, position] = x.permute(1, 2, 0, 3)
        m.v_cache[head, :, position] = x.permute(1, 2, 0, 3)
        return attend(m, x, m.k_cache.transpose(0, 1), m.v_cache.transpose(0, 1))

    check_refused(drive(step, Config(heads=2, kv_heads=2, capacity=64, batch=2)), Reason.WRITE_FORM)


def test_one_refused_reader_refuses_its_pair():
    """Layer 2 reads the same cache in a form that stays: the first reader must not take the cache away from it."""
    def both(m, x, position):
        write(m, x, position)
        return attend(m, x, m.k_cache, m.v_cache) + attend(m, x, m.k_cache[:, :, 1:], m.v_cache[:, :, 1:])

    backend = drive(both)
    first, second = backend.results[0].decisions
    assert (first.refusal.reason, second.refusal.reason) == (Reason.OTHER_READER, Reason.VIEW)
    assert backend.ops(torch.ops.aten.scaled_dot_product_attention.default) == 2 * len(backend.graphs)


def test_mixed_model():
    """Refused and accepted layers in one graph: each decided on its own."""
    config = Config(layers=3)
    model = HFModel(config, sdpa_attention)
    model.layers[1].attention = wrong_repeat_attention
    backend = RewritingBackend()
    assert run_both(model, in_chunks("hf", (5, 1, 1)), backend) < TOLERANCE[config.dtype]
    for result in backend.results:
        assert [d.accepted for d in result.decisions] == [True, False, True]
        assert [d.pair for d in result.decisions] == [0, None, 1]
        assert [d.module_path for d in result.decisions] == ["layers.0", "layers.1", "layers.2"]
    graphs = len(backend.graphs)
    assert counters["kvarn"] == {"attention_found": 3 * graphs, "attention_rewritten": 2 * graphs,
                                 "attention_refused": graphs}


def test_caches_swapped_between_pairs():
    """One tensor in two pairs belongs to neither."""
    def crossed(m, x, position):
        write(m, x, position)
        return attend(m, x, m.k_cache, m.v_cache) + attend(m, x, m.v_cache, m.k_cache)

    check_refused(drive(crossed), Reason.PAIR_MISMATCH)
