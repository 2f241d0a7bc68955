import json

import pytest
import torch
import toy_models
from drive import Driver, prompt
from toy_models import Config

import kvarn_compile
from kvarn.errors import SpecError
from kvarn.layout import store_layout
from kvarn.spec import PRESETS
from kvarn_compile.binding import binding_of


def explain(driver: Driver, ids, **options) -> kvarn_compile.Explanation:
    with torch.no_grad():
        return kvarn_compile.explain(driver.call, ids, driver.cache, **options)


def test_every_attention_has_a_row():
    config = Config(capacity=1024, dtype=torch.float16)
    driver = Driver("hf", config)
    driver.model.to(torch.float16)
    result = explain(driver, prompt(config, 5))
    layout = store_layout(PRESETS["k4v2_g128"].key, 64, torch.float16)
    assert [row.module for row in result.rows] == ["layers.0", "layers.1"]
    for row in result.rows:
        assert row.rewritten and row.kind == "sdpa" and row.shape == (1, 2, 1024, 64) and row.reason is None
        assert "toy_models.py" in row.source and "scaled_dot_product_attention" in row.source
        assert (row.bytes_before, row.bytes_after) == (2 * 2 * 1024 * 64 * 2, layout.nbytes(1, 2, 1024))
    assert result.rewritten == 2 and not result.refusals and not result.graph_breaks


def test_prints_as_table_and_json():
    result = explain(Driver("hf", Config()), prompt(Config(), 5), preset="kvarn_k4v4_g64")
    text = str(result)
    assert "k4v4_g64: 2 of 2 attentions packed" in text and "layers.1" in text and "packed" in text
    data = json.loads(result.to_json())
    assert (data["rewritten"], data["attentions"], data["preset"]) == (2, 2, "k4v4_g64")
    assert data["rows"][0]["shape"] == [1, 2, 320, 64]


def test_caches_are_left_alone():
    driver = Driver("hf", Config())
    driver.step(prompt(driver.config, 7))
    before = [cache.clone() for cache in driver.caches()]
    explain(driver, prompt(driver.config, 5))
    assert all(torch.equal(old, new) for old, new in zip(before, driver.caches(), strict=True))
    assert driver.cache[0].cumulative_length.item() == 7
    assert not any(binding_of(cache) for cache in driver.caches())


def test_a_compiled_model_is_looked_into():
    driver = Driver("hf", Config()).compile()
    assert explain(driver, prompt(driver.config, 5)).rewritten == 2
    driver.step(prompt(driver.config, 3))
    assert explain(driver, prompt(driver.config, 5)).rewritten == 2
    assert all(binding_of(cache) for cache in driver.caches())


def test_refusals_say_what_would_help():
    config = Config(head_dim=48)
    row = explain(Driver("hf", config), prompt(config, 5)).rows[0]
    assert not row.rewritten and row.reason == "HEAD_DIM" and "k16v16" in row.hint
    assert row.bytes_before is None


def test_gradients_are_a_refusal_of_the_graph():
    result = kvarn_compile.explain(Driver("hf", Config()).model, prompt(Config(), 5), Driver("hf", Config()).cache)
    assert not result.rows and "gradients are recorded" in result.refusals[0]
    assert "gradients are recorded" in str(result)


class Broken(toy_models.HFModel):
    def forward(self, ids, cache):
        torch._dynamo.graph_break()
        return super().forward(ids, cache)


def test_graph_breaks_are_listed():
    driver = Driver("hf", Config())
    driver.call = Broken(driver.config).eval()
    result = explain(driver, prompt(driver.config, 5))
    assert result.rewritten == 2 and len(result.graph_breaks) == 1


def test_unknown_preset():
    with pytest.raises(SpecError, match="k4v2_g128"):
        explain(Driver("hf", Config()), prompt(Config(), 5), preset="k5")
