"""The inputs a key balance is computed from."""

import pytest
import torch
from compare import RewritingBackend, run_both
from steps import in_chunks
from toy_models import Config, GptFast, HFModel

from kvarn.spec import PRESETS

SPEC = PRESETS["k4v2_g128"]


def traced(model, style="hf", **options):
    """The backend and the original inputs of the first graph (their values)."""
    backend = RewritingBackend(SPEC, **options)
    seen = []
    inner = backend._compile

    def keep(gm, inputs):
        seen.append([tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor)])
        return inner(gm, inputs)

    backend._compile = keep
    run_both(model, in_chunks(style, (5,)), backend)
    return backend.results[0].pairs, seen[0]


def test_biased_projection_behind_a_norm():
    """Weight, bias, frequencies and norm of each layer: the shapes say which input it is."""
    config = Config(bias=True)
    pairs, shapes = traced(HFModel(config))
    for pair in pairs:
        source = pair.balance
        kv = config.kv_heads * config.head_dim
        assert [shapes[i] for i in (source.weight, source.bias, source.inv_freq, source.norm)] == [
            (kv, config.hidden), (kv,), (config.head_dim // 2,), (config.hidden,)]
        wide = config.heads * config.head_dim
        assert [shapes[i] for i in (source.query_weight, source.query_bias)] == [(wide, config.hidden), (wide,)]
    assert len({pair.balance.weight for pair in pairs}) == config.layers
    assert len({pair.balance.inv_freq for pair in pairs}) == 1


@pytest.mark.parametrize("model, style", [(HFModel(Config()), "hf"), (GptFast(Config()), "gpt")])
def test_no_bias_no_source(model, style):
    pairs, _ = traced(model, style)
    assert [pair.balance for pair in pairs] == [None, None]


def test_balance_off():
    pairs, _ = traced(HFModel(Config(bias=True)), balance="off")
    assert [pair.balance for pair in pairs] == [None, None]


def test_interleaved_rotation_has_no_source():
    """The formula is for half-split pairs; pairs (2j, 2j + 1) must not be taken for them."""
    model = HFModel(Config(bias=True))

    def interleaved(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    import toy_models
    original, toy_models.rotate_half = toy_models.rotate_half, interleaved
    try:
        pairs, _ = traced(model)
    finally:
        toy_models.rotate_half = original
    assert [pair.balance for pair in pairs] == [None, None]
