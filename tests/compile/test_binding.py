import copy
import gc
import sys
import weakref

import pytest
import torch
from drive import LOSSLESS, STYLES, Driver, assert_same, prompt
from test_storage import MB, resident
from toy_models import Config

import kvarn_compile
from kvarn.errors import OwnershipError, SpecError
from kvarn_compile.binding import binding_of
from kvarn_compile.options import Options


@pytest.mark.parametrize("style", STYLES)
def test_release_gives_the_content_back(style):
    config = Config()
    plain, packed = Driver(style, config), Driver(style, config).compile()
    before = plain.generate(prompt(config, 130)), packed.generate(prompt(config, 130))
    assert_same(*before)
    owner = packed.cache if style == "hf" else packed.model
    assert kvarn_compile.release(owner) == 2
    assert kvarn_compile.release(owner) == 0
    for expected, cache in zip(plain.caches(), packed.caches(), strict=True):
        torch.testing.assert_close(cache, expected)
        assert cache.stride() == expected.stride() and not binding_of(cache)
    packed.call = packed.model
    assert_same(plain.generate(prompt(config, 2)), packed.generate(prompt(config, 2)))


def test_released_cache_is_packed_again():
    config = Config()
    plain, packed = Driver("gptfast", config), Driver("gptfast", config).compile()
    for driver in (plain, packed):
        driver.generate(prompt(config, 130))
        kvarn_compile.release(driver.model)
    assert_same(plain.generate(prompt(config, 1)), packed.generate(prompt(config, 1)))
    assert binding_of(packed.caches()[0])


@pytest.mark.parametrize("pack", [lambda k, v: k, lambda k, v: [k, v], lambda k, v: {"k": k}, lambda k, v: (v,)])
def test_release_takes_tensors_and_containers(pack):
    driver = Driver("gptfast", Config(layers=1)).compile()
    driver.step(prompt(driver.config, 4))
    assert kvarn_compile.release(pack(*driver.caches())) == 1
    assert not any(binding_of(cache) for cache in driver.caches())


def test_release_of_something_else():
    for nothing in (3, [], {"k": "v"}):
        with pytest.raises(OwnershipError, match="no tensor found in it; valid: a tensor, a module"):
            kvarn_compile.release(nothing)


def test_release_finds_tensors_at_any_depth():
    driver = Driver("gptfast", Config(layers=1)).compile()
    driver.step(prompt(driver.config, 4))
    holder = torch.nn.Module()
    holder.state = {"caches": [{"k": driver.caches()[0]}]}
    assert kvarn_compile.release(holder) == 1


def test_a_view_of_a_packed_cache_is_refused_with_words():
    driver = Driver("gptfast", Config(layers=1)).compile()
    driver.step(prompt(driver.config, 4))
    view = driver.caches()[0][:, :, :4]
    with torch.no_grad(), pytest.raises(OwnershipError, match="before taking views"):
        torch.compile(lambda x: x * 2, backend="kvarn", options=LOSSLESS)(view)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_packing_a_husk_never_holds_its_size():
    """Two empty caches of 128 MB each move to a store; the kernel's high-water mark tells what it took meanwhile."""
    from pathlib import Path

    from kvarn.spec import resolve
    from kvarn_compile import empty_cache
    from kvarn_compile.binding import acquire
    from kvarn_passes import CacheAxes, StorePair

    def peak():
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    caches = [empty_cache((4, 8, 16384, 64), torch.float32) for _ in range(2)]
    pair = StorePair(0, 1, CacheAxes(0, 1, 2, 3), resolve("k4v2_g128"), None, "layer")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident
    before = resident()
    store, = acquire([pair], caches, lambda number: None)
    assert caches[0].nbytes == 128 * MB and not store.lengths.any()
    assert peak() - before < store.nbytes + 64 * MB  # far under the 256 MB of the caches


def test_existing_content_is_imported():
    config = Config()
    plain, packed = Driver("hf", config), Driver("hf", config)
    for driver in (plain, packed):
        driver.step(prompt(config, 140))
    packed.compile()
    assert_same(plain.generate(prompt(config, 1)), packed.generate(prompt(config, 1)))
    assert binding_of(packed.caches()[0]).store.lengths.item() == 144


def test_a_packed_cache_cannot_be_copied():
    driver = Driver("gptfast", Config()).compile()
    driver.step(prompt(driver.config, 4))
    with pytest.raises((OwnershipError, RuntimeError)):
        copy.deepcopy(driver.caches()[0])
    with pytest.raises((OwnershipError, RuntimeError)):
        copy.deepcopy(driver.model)


def test_two_formats_for_one_cache(caplog):
    config = Config()
    plain, packed = Driver("gptfast", config), Driver("gptfast", config).compile()
    for driver in (plain, packed):
        driver.step(prompt(config, 130))
    packed.compile(preset="k8v8_g128")
    signal = plain.step(prompt(config, 1))
    torch.testing.assert_close(packed.step(prompt(config, 1)), signal, atol=0.05, rtol=0.05)
    assert binding_of(packed.caches()[0]).store.spec.k_bits == 8
    assert "different formats" in caplog.text


def test_store_dies_with_the_tensor():
    driver = Driver("hf", Config()).compile()
    driver.step(prompt(driver.config, 4))
    store = weakref.ref(binding_of(driver.caches()[0]).store)
    driver.cache = None
    gc.collect()
    assert store() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_model_falls():
    config = Config(capacity=32768, layers=2, batch=2)
    driver = Driver("hf", config)
    for cache in driver.caches():
        cache.fill_(1.0)
        cache[:, :, 300:] = 0
    plain = sum(cache.nbytes for cache in driver.caches())
    driver.rewind(300)
    driver.compile(preset="k4v2_g128")
    before = resident()
    driver.step(prompt(config, 1))
    packed = sum(binding_of(layer.keys).store.nbytes for layer in driver.cache)
    assert plain == 128 * MB and packed < plain / 3.5
    assert before - resident() > 0.6 * plain


def test_eager_code_reads_zeros_and_cannot_write():
    driver = Driver("gptfast", Config()).compile()
    driver.step(prompt(driver.config, 4))
    key = driver.caches()[0]
    assert not key.any()
    with pytest.raises(RuntimeError):
        key.zero_()


def test_given_balance_reaches_the_store():
    config = Config()
    scales = {f"layers.{i}": torch.rand(2, 64) + 0.5 for i in range(2)}
    driver = Driver("gptfast", config).compile(preset="k8v8_g128", balance=scales)
    packed = driver.step(prompt(config, 130))
    assert torch.equal(binding_of(driver.caches()[2]).store.balance, scales["layers.1"])
    torch.testing.assert_close(packed, Driver("gptfast", config).step(prompt(config, 130)), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("path", "key"), [("model.layers.3.attn", "layers.3"), ("layers.10", "layers.10"),
                                           ("h2.attn", "layers.1"), ("", "layers.1")])
def test_given_balance_goes_by_the_layer_number(path, key):
    """The graph's second pair may be any layer: others can be refused, or in another graph after a graph break."""
    from kvarn.spec import resolve
    from kvarn_compile.runtime import _given_balance
    from kvarn_passes import CacheAxes, StorePair

    scales = {f"layers.{n}": torch.full((2, 64), 1.0 + n) for n in (1, 3, 10)}
    pair = StorePair(0, 1, CacheAxes(0, 1, 2, 3), resolve("k4v2_g128"), None, path)
    options = Options.parse(options={"balance": scales})
    assert torch.equal(_given_balance(options, 1, pair, [torch.zeros(1, 2, 8, 64)]), scales[key])


def test_missing_balance_is_an_error():
    driver = Driver("gptfast", Config()).compile(balance={"layers.0": torch.ones(2, 64)})
    with pytest.raises(Exception, match=r"no 'layers.1'"):
        driver.step(prompt(driver.config, 3))
    assert issubclass(SpecError, ValueError) and Options.parse().balance_of(0, 2, 64) is None


def test_balance_from_weights():
    from kvarn import balance

    config = Config(bias=True)
    driver = Driver("hf", config)
    with torch.no_grad():
        for layer in driver.model.layers:
            layer.k_proj.bias.normal_(0, 3)
    driver.compile(preset="k4v2_g128").step(prompt(config, 130))
    layer, norm = driver.model.layers[1], driver.model.norms[1]
    expected = balance.from_weights(layer.k_proj.weight, layer.k_proj.bias, norm.weight, driver.model.rope.inv_freq,
                                    128, layer.q_proj.weight, layer.q_proj.bias)
    torch.testing.assert_close(binding_of(driver.cache[1].keys).store.balance, expected.detach())
    off = Driver("hf", config).compile(preset="k4v2_g128", balance="off")
    off.step(prompt(config, 3))
    assert (binding_of(off.cache[1].keys).store.balance == 1).all()
