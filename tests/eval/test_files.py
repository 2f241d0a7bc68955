import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from kvarn.errors import ShapeError
from kvarn_compile.eval import plots, report, text
from kvarn_compile.eval.command import eval_command
from kvarn_compile.eval.metrics import Scores
from kvarn_compile.eval.results import Results, load_all


def summary(kl, bits=4.0, ppl=10.0):
    return {"kl": kl, "kl_p99": 2 * kl, "top1": 0.9, "ppl": ppl, "bits": bits, "kl_windows": [kl], "kl_bins": [kl] * 4,
            "positions": 4}


def test_scores_of_equal_and_of_shifted_logits():
    logits, targets = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    targets[:, -1] = -1
    same, other = Scores(), Scores()
    same.add(logits, logits, targets)
    other.add(logits, torch.randn(2, 6, 11), targets)
    assert same.summary()["kl"] == 0 and same.summary()["top1"] == 1
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, :-1].flatten()).exp()
    assert same.summary()["ppl"] == pytest.approx(float(expected), rel=1e-5)
    assert other.summary()["kl"] == pytest.approx(sum(other.summary()["kl_windows"]) / 2)
    assert other.summary(slice(0, 1))["kl"] == pytest.approx(other.summary()["kl_windows"][0])


def test_results_resume_under_equal_settings_only(tmp_path):
    first = Results(tmp_path, "m", 128, {"seed": 0})
    first.add({"wiki": {"a": summary(0.1)}})
    again = Results(tmp_path, "m", 128, {"seed": 0})
    assert again.missing("wiki", ["a", "b"]) == ["b"] and again.missing("novels", ["a"]) == ["a"]
    assert Results(tmp_path, "m", 128, {"seed": 1}).missing("wiki", ["a"]) == ["a"]
    (tmp_path / "other.json").write_text("[]")
    assert [d["model"] for d in load_all(tmp_path)] == ["m"]


def test_windows_are_spread_led_by_the_start_tokens_and_seeded():
    ids = torch.arange(1000)
    found = text.windows(ids, 3, 128, [-7], seed=0)
    assert found.shape == (3, 128) and found[:, 0].tolist() == [-7] * 3
    assert bool((found[:, 2:] - found[:, 1:-1] == 1).all()) and bool((found[1:, 1] > found[:-1, -1]).all())
    assert torch.equal(found, text.windows(ids, 3, 128, [-7], seed=0))
    assert not torch.equal(found, text.windows(ids, 3, 128, [-7], seed=1))
    with pytest.raises(ShapeError, match="a window needs 128"):
        text.windows(ids[:100], 1, 128, [])


def test_tables_are_sorted_and_relative_to_the_unquantized_run():
    data = {"model": "m", "context": 128, "results": {
        "wiki": {"bad": summary(0.4, ppl=12.0), "good": summary(0.1, ppl=10.1), "unquantized": summary(0.0)},
        "novels": {"bad": summary(0.2, ppl=12.0), "good": summary(0.3, ppl=10.1), "unquantized": summary(0.0)}}}
    merged = report.averaged(data)
    assert merged["good"]["kl"] == pytest.approx(0.2) and merged["bad"]["kl"] == pytest.approx(0.3)
    table = report.rows(merged)
    assert [row[0] for row in table] == ["unquantized", "good", "bad"]
    assert [row[-1] for row in table] == ["+0.00%", "+1.00%", "+20.00%"]
    assert report.markdown(("a", "b"), [("x", "1")]).splitlines() == ["| a | b |", "| --- | ---: |", "| x | 1 |"]


def test_plots_follow_the_data(tmp_path):
    pytest.importorskip("matplotlib")
    data = {"model": "m", "context": 128, "results": {"wiki": {"k4v2_g128": summary(0.1), "unquantized": summary(0)}}}
    names = {path.name for path in plots.draw_all(data, tmp_path)}
    assert names == {f"m_128_{what}.{kind}" for what in ("bits", "positions") for kind in ("png", "svg")}
    data["results"]["wiki"]["k4v2_g128"]["layers"] = {"k": [0.1], "v": [0.2], "out": [None]}
    assert (tmp_path / "m_128_layers.svg") in plots.draw_all(data, tmp_path)


@pytest.fixture
def folder(model, tmp_path):
    """The test model with a word tokenizer, and a text of its words."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {f"w{i}": i for i in range(97)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 97, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "words.txt").write_text(" ".join(f"w{i}" for i in ids) + " a")
    return tmp_path


def test_the_command_writes_resumes_and_refuses(folder):
    app, runner = typer.Typer(), CliRunner()
    app.command()(eval_command)
    arguments = ["--model", str(folder / "model"), "--text", str(folder / "words.txt"), "--context", "256", "--windows",
                 "2", "--greedy", "128", "--out", str(folder / "out"), "--methods"]
    first = runner.invoke(app, [*arguments, "k4v2_g128"])
    assert first.exit_code == 0, first.output
    path = folder / "out" / "model_256.json"
    before = json.loads(path.read_text())["results"]["words"]
    assert set(before) == {"unquantized", "k4v2_g128"} and len(before["k4v2_g128"]["greedy"]) == 2
    assert (folder / "out" / "model_256_layers.png").exists()
    assert runner.invoke(app, [*arguments, "k4v2_g128,fp8_e4m3"]).exit_code == 0
    after = json.loads(path.read_text())["results"]["words"]
    assert set(after) == {"unquantized", "k4v2_g128", "fp8_e4m3"} and after["k4v2_g128"] == before["k4v2_g128"]
    assert runner.invoke(app, [*arguments, "k4v2_g128", "--keys-only", "--values-only"]).exit_code == 2
    assert "harness, compiled" in runner.invoke(app, [*arguments, "k4v2_g128", "--engine", "x"]).output
