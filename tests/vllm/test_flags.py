"""How kvarn is asked for, what it says, and what it refuses: reasons at start-up, before any weight is loaded."""

import logging
from types import SimpleNamespace

import pytest

arg_utils = pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
import small_models  # noqa: E402
import torch  # noqa: E402
from serving import configure, greedy, prompts  # noqa: E402

from kvarn import SpecError  # noqa: E402
from kvarn.errors import KVarnError  # noqa: E402
from kvarn.paged_layout import paged_layout  # noqa: E402
from kvarn.spec import PRESETS, QuantSpec  # noqa: E402
from kvarn_compile.vllm.refusals import Reason, UnsupportedEngine, check  # noqa: E402
from kvarn_compile.vllm.settings import Settings  # noqa: E402

LONG = {"attention_backend": "CUSTOM", "additional_config": {"kvarn": {"preset": "k4v2_g64"}}}


def test_the_short_form_is_the_long_form(llama):
    short, long = configure(llama, kv_cache_dtype="kvarn_k4v2_g64"), configure(llama, **LONG)
    assert short.additional_config == long.additional_config
    assert short.attention_config == long.attention_config
    assert {kind: backend.name for kind, backend in short.attention_config.backend_per_kind.items()} == {
        "full_attention": "CUSTOM"}
    assert short.cache_config.cache_dtype == long.cache_config.cache_dtype == "auto"


def test_both_forms_serve_the_same_text(llama, engines):
    texts = prompts(130, seed=20)
    short, long = (engines(llama, **options) for options in ({"kv_cache_dtype": "kvarn_k4v2_g64"}, LONG))
    assert greedy(short, texts, 5) == greedy(long, texts, 5)
    assert short.llm_engine.vllm_config.cache_config.block_size == 64


def test_the_command_line_lists_the_presets():
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arg_utils.load_general_plugins()
    parser = arg_utils.EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert parser.parse_args(["--kv-cache-dtype", "kvarn_k4v4_g128"]).kv_cache_dtype == "kvarn_k4v4_g128"


def test_one_line_says_what_was_set_and_gained(llama, engines, caplog):
    caplog.set_level(logging.INFO, "vllm.kvarn")
    kept = engines(llama, dtype="bfloat16", kv_cache_dtype="kvarn_k4v2_g128", max_num_seqs=7)
    lines = [record.getMessage() for record in caplog.records if record.name == "vllm.kvarn"]
    blocks = kept.llm_engine.vllm_config.cache_config.num_gpu_blocks
    layout = paged_layout(PRESETS["k4v2_g128"].key, 64, torch.bfloat16)
    gain = 128 * 64 * 2 * 2 / layout.record_bytes
    assert lines == [f"kvarn: preset k4v2_g128, block size 128. KV cache: {blocks * 128:,} tokens in packed tiles, "
                     f"{gain:.2f}x of bfloat16; each sequence takes {layout.spare} of {blocks:,} blocks for its "
                     "unfinished tile."]


def test_an_engine_that_does_not_ask_stays_stock(stock):
    layers = stock.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    assert {layer.attn_backend.get_name() for layer in layers} == {"CPU_ATTN"}


@pytest.mark.parametrize("options, reason", [
    ({"block_size": 256}, Reason.BLOCK_SIZE),
    ({"kv_cache_dtype": "kvarn_upstream_k4v2_g128"}, Reason.PRESET),
    ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, Reason.KV_CONNECTOR),
    ({"kv_offloading_size": 1.0}, Reason.KV_CONNECTOR),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 60, "prompt_lookup_max": 2}},
     Reason.SPECULATION),
])
def test_refused_configurations(llama, options, reason):
    with pytest.raises(UnsupportedEngine) as error:
        configure(llama, **({"kv_cache_dtype": "kvarn_k4v2_g128"} | options))
    assert reason in [refusal.reason for refusal in error.value.refusals]
    assert all(refusal.instead in str(error.value) for refusal in error.value.refusals)


def test_refused_models(tmp_path):
    odd = small_models.write(tmp_path / "odd", head_dim=80)
    with pytest.raises(UnsupportedEngine, match="80 channels cannot be rotated"):
        configure(odd, kv_cache_dtype="kvarn_k4v2_g128")
    assert configure(odd, kv_cache_dtype="kvarn_k16v16")
    windows = small_models.write(tmp_path / "windows", "gemma3", sliding_window=64,
                                 layer_types=["sliding_attention"] * 2)
    with pytest.raises(UnsupportedEngine, match="every layer has a window"):
        configure(windows, kv_cache_dtype="kvarn_k4v2_g128")


MODEL = {"use_mla": False, "is_encoder_decoder": False, "runner_type": "generate", "is_hybrid": False,
         "get_sliding_window": lambda: None, "get_head_size": lambda: 64, "hf_text_config": None}


def stand_in(**changes):
    """The parts of a VllmConfig that are checked, of a plain decoder; `changes` by name, "__" for a dot."""
    model = SimpleNamespace(**MODEL)
    cache = SimpleNamespace(cache_dtype="auto", kv_offloading_size=None, user_specified_block_size=False, block_size=16)
    parallel = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1)
    config = SimpleNamespace(model_config=model, cache_config=cache, parallel_config=parallel, kv_transfer_config=None,
                             speculative_config=None, device_config=SimpleNamespace(device_type="cpu"))
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        setattr(getattr(config, part) if part else config, field, value)
    return config


@pytest.mark.parametrize("change, reason", [
    ({"model_config__use_mla": True}, Reason.MLA),
    ({"model_config__is_encoder_decoder": True}, Reason.ENCODER),
    ({"model_config__runner_type": "pooling"}, Reason.ENCODER),
    ({"model_config__is_hybrid": True}, Reason.HYBRID),
    ({"parallel_config__decode_context_parallel_size": 2}, Reason.CONTEXT_PARALLEL),
    ({"parallel_config__prefill_context_parallel_size": 2}, Reason.CONTEXT_PARALLEL),
    ({"cache_config__cache_dtype": "fp8"}, Reason.CACHE_DTYPE),
    ({"device_config__device_type": "xpu"}, Reason.DEVICE),
    ({"speculative_config": SimpleNamespace(method="eagle", num_speculative_tokens=2)}, Reason.SPECULATION),
    ({"speculative_config": SimpleNamespace(method="draft_model", num_speculative_tokens=2, draft_model_config=(
        SimpleNamespace(**MODEL | {"get_head_size": lambda: 80})))}, Reason.HEAD_SIZE),
    ({"speculative_config": SimpleNamespace(method="draft_model", num_speculative_tokens=2, draft_model_config=(
        SimpleNamespace(**MODEL | {"get_sliding_window": lambda: 64, "hf_text_config": SimpleNamespace(
            layer_types=["sliding_attention", "full_attention"])})))}, Reason.SPECULATION),
])
def test_what_vllm_itself_stops_earlier_on_a_cpu(change, reason):
    check(stand_in(), Settings.of({}))
    with pytest.raises(UnsupportedEngine) as error:
        check(stand_in(**change), Settings.of({}))
    assert [refusal.reason for refusal in error.value.refusals] == [reason]


@pytest.mark.parametrize("size, settings, reason, words", [
    (32, Settings(PRESETS["k4v2_g128"]), Reason.HEAD_SIZE, "head_dim=32 .*(64, 128, 256)"),
    (64, Settings(QuantSpec(3, 2, 128)), Reason.PRESET, "k3v2.*(2, 4, 8)"),
])
def test_what_has_no_kernels_is_refused_on_a_gpu_alone(size, settings, reason, words):
    change = {"model_config__get_head_size": lambda: size}
    check(stand_in(**change), settings)
    with pytest.raises(UnsupportedEngine, match=words) as error:
        check(stand_in(device_config__device_type="cuda", **change), settings)
    assert [refusal.reason for refusal in error.value.refusals] == [reason]
    check(stand_in(device_config__device_type="cuda", **change), Settings(PRESETS["k16v16"]))


@pytest.mark.parametrize("change, reason", [
    ({"alibi_slopes": [1.0]}, Reason.BIAS), ({"logits_soft_cap": 30.0}, Reason.BIAS),
    ({"sinks": object()}, Reason.BIAS),
    ({"sliding_window": 128}, Reason.SLIDING_WINDOW), ({"attn_type": "encoder"}, Reason.ENCODER),
    ({"kv_sharing_target_layer_name": "layers.0"}, Reason.KV_SHARING),
])
def test_refused_layers(llama, stock, change, reason):
    from vllm.config import set_current_vllm_config

    from kvarn_compile.vllm.impl import KVarnImpl

    with set_current_vllm_config(configure(llama, kv_cache_dtype="kvarn_k4v2_g128")), \
            pytest.raises(UnsupportedEngine) as error:
        KVarnImpl(4, 64, 0.125, 2, **change)
    assert [refusal.reason for refusal in error.value.refusals] == [reason]


@pytest.mark.parametrize("options, words", [
    ({"kv_cache_dtype": "kvarn_k5v1"}, "preset='k5v1' is unknown; valid: k4v2_g128"),
    ({"attention_backend": "CUSTOM", "additional_config": {"kvarn": {"bits": 4}}}, "bits; valid: preset, balance"),
    ({"attention_backend": "CUSTOM", "additional_config": {"kvarn": "k4v2"}}, "valid: a mapping"),
    ({"attention_backend": "CUSTOM", "additional_config": {"kvarn": {"balance": True}}},
     "balance=True; valid: 'weights', 'off'"),
])
def test_bad_options(llama, options, words):
    with pytest.raises(SpecError, match=words):
        configure(llama, **options)


def test_options_without_the_backend(llama):
    with pytest.raises(KVarnError, match="--attention-backend CUSTOM"):
        configure(llama, additional_config={"kvarn": {}})


def test_another_plugins_custom_backend_is_respected(llama, monkeypatch):
    from kvarn_compile.vllm import compat

    monkeypatch.setattr(compat, "BACKEND", "of.another.Plugin")
    assert configure(llama, attention_backend="CUSTOM").attention_config.backend.name == "CUSTOM"
    with pytest.raises(KVarnError, match="of another plugin"):
        configure(llama, **LONG)


def test_another_backend_beside_the_short_form(llama):
    with pytest.raises(KVarnError, match="leave out attention_backend='CPU_ATTN'"):
        configure(llama, kv_cache_dtype="kvarn_k4v2_g128", attention_backend="CPU_ATTN")


def test_another_version_is_left_alone(monkeypatch, caplog):
    from kvarn_compile.vllm import compat, plugin

    monkeypatch.setattr("vllm.version.__version__", "0.33.0")
    monkeypatch.setattr(compat, "install", lambda: pytest.fail("hooked in"))
    plugin.register()
    assert "it stays out" in caplog.text
