import pytest
import torch
from safetensors.torch import save_file

from kvarn.errors import SpecError
from kvarn.spec import PRESETS, QuantSpec
from kvarn_compile.options import Options


def test_defaults():
    options = Options.parse()
    assert (options.spec, options.balance, options.inner) == (PRESETS["k4v2_g128"], "weights", "inductor")


@pytest.mark.parametrize("preset", ["k4v4_g64", "kvarn_k4v4_g64", QuantSpec(4, 4, 64)])
def test_presets_by_name_and_spec(preset):
    assert Options.parse(options={"preset": preset}).spec == QuantSpec(4, 4, 64)


@pytest.mark.parametrize("options, message", [
    ({"presett": "k4v2_g128"}, "did you mean 'preset'"),
    ({"preset": "k4v2_g129"}, "did you mean 'k4v2_g128'.*k16v16"),
    ({"preset": 4}, "preset=4"),
    ({"inner": "inductr"}, "did you mean 'inductor'"),
    ({"balance": 1}, "valid: 'weights', 'off'"),
    ({"balance": "no/such.safetensors"}, "no/such.safetensors"),
    ({"balance": {"layers.0": torch.zeros(2, 4)}}, "positive and finite"),
    ({"balance": {"layers.0": torch.ones(4)}}, r"\[KV heads, head_dim\]"),
    ({"inductor": {"max_autotun": True}}, "close: .*max_autotune"),
    ({"inductor": True}, "a dict of inductor config"),
    ({"inner": "eager", "inductor": {"max_autotune": True}}, "needs inner='inductor'"),
    ({"mode": "fast"}, "mode 'fast' is unknown"),
])
def test_bad_values_name_the_valid_ones(options, message):
    with pytest.raises(SpecError, match=message):
        Options.parse(options=options)


def test_modes_become_inductor_patches():
    assert Options.parse("max-autotune").inductor["max_autotune"]
    patched = Options.parse(options={"mode": "reduce-overhead", "inductor": {"triton.cudagraphs": False}})
    assert patched.inductor == {"triton.cudagraphs": False}


def test_balance_from_a_file(tmp_path):
    scale = torch.rand(2, 4) + 0.5
    save_file({"layers.0": scale}, tmp_path / "s.safetensors")
    options = Options.parse(options={"balance": tmp_path / "s.safetensors"})
    assert torch.equal(options.balance_of(0, 2, 4), scale)
    with pytest.raises(SpecError, match=r"no 'layers.1'; it has: layers.0"):
        options.balance_of(1, 2, 4)
    with pytest.raises(SpecError, match=r"needs \(2, 8\)"):
        options.balance_of(0, 2, 8)
