"""The few tests that compile with inductor, which calls a C++ compiler."""

import subprocess
import sys
from pathlib import Path

import torch
from drive import Driver, assert_same, prompt
from torch._dynamo.utils import counters
from toy_models import Config

from kvarn_compile.binding import binding_of

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
from drive import Driver, prompt
from toy_models import Config
from torch._dynamo.utils import counters

config = Config(layers=1, head_dim=32)
driver = Driver("gptfast", config).compile(inner="inductor", preset={preset!r})
driver.step(prompt(config, 1))
inductor, aot = counters["inductor"], counters["aot_autograd"]
print(inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"], aot["autograd_cache_hit"],
      counters["kvarn"]["attention_rewritten"])
"""


def test_inductor_equals_plain():
    config = Config(layers=1, head_dim=32)
    plain, packed = Driver("hf", config), Driver("hf", config).compile(inner="inductor")
    assert_same(plain.generate(prompt(config, 129), 3), packed.generate(prompt(config, 129), 3))
    assert all(binding_of(cache) for cache in packed.caches())
    assert counters["kvarn"]["attention_rewritten"] == 2


def test_compile_caches_hit_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    here = Path(__file__).parent

    def run(preset):
        script = SCRIPT.format(paths=[str(here), str(here.parent)], preset=preset)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
        return done.stdout.split()

    assert run("k4v2_g128") == ["0", "1", "0", "1"]
    _, misses, aot_hits, rewritten = run("k4v2_g128")
    assert (misses, aot_hits, rewritten) == ("0", "1", "1")
    assert run("k4v4_g128")[1] == "1", "another format must not reuse the graph"


def test_aot_eager_equals_plain():
    config = Config()
    plain, packed = Driver("llama", config), Driver("llama", config).compile(inner="aot_eager")
    assert_same(plain.generate(prompt(config, 129)), packed.generate(prompt(config, 129)))
    assert torch.is_tensor(packed.caches()[0]) and all(binding_of(cache) for cache in packed.caches())
