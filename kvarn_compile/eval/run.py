"""A whole evaluation: load, calibrate, measure what is missing, write, show."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvarn_compile.eval import calibrate, compiled, greedy, harness, hf, plots, report, text
from kvarn_compile.eval.methods import PEERS, UNQUANTIZED, make
from kvarn_compile.eval.methods.base import Facts
from kvarn_compile.eval.results import Results

BALANCES = ("random", "weights", "off")


def run(model_name: str, texts: list[Path], methods: str, context: int, out: Path, device: str,
        settings: dict[str, Any]) -> Results:
    """Evaluate a model and write JSON, plots and a table to `out`; methods already there under these settings stay.

    Args:
        model_name: folder or hub id.
        texts: text files.
        methods: names separated by commas, or "all" for every peer beside our presets.
        context: tokens of a window.
        device: "cpu" or "cuda".
        settings: what identifies comparable results (kvarn_compile/eval/command.py).
    """
    names = ["k4v2_g128", "k4v4_g128", "upstream_k4v2_g128", *PEERS] if methods == "all" else methods.split(",")
    names = list(dict.fromkeys([UNQUANTIZED, *names]))
    file = Results(out, Path(model_name).name, context, settings)
    wanted = [n for n in names if any(n in file.missing(path.stem, names) for path in texts)]
    if wanted:
        model = hf.load_model(model_name, device, getattr(torch, settings["dtype"]))
        facts = Facts(hf.model_shape(model), _scales(model, device, settings))
        windows = _windows(model_name, texts, context, settings, device)
        chosen = [make(name, facts) for name in wanted]
        if settings["engine"] == "compiled":
            file.add(compiled.evaluate(model, windows, chosen))
        else:
            layers = settings["layers"]
            with _progress(len(chosen) * (context // harness.CHUNK)) as tick:
                file.add(harness.evaluate(model, windows, chosen, probe=settings["probe"], sides=settings["sides"],
                                          only=None if layers is None else frozenset(layers), progress=tick))
            if settings["greedy"]:
                file.add(_greedy(model, windows, chosen, settings["greedy"], file))
    report.print_table(file.data)
    plots.draw_all(file.data, out)
    return file


def _scales(model: Any, device: str, settings: dict[str, Any]) -> dict[int, Tensor]:
    if settings["balance"] == "random":
        return calibrate.from_random(model, device, settings["seed"])
    return calibrate.from_weights(model) if settings["balance"] == "weights" else {}


def _windows(model_name: str, texts: list[Path], context: int, settings: dict[str, Any], device: str
             ) -> dict[str, Tensor]:
    tokenizer = hf.load_tokenizer(model_name)
    start = text.start_ids(tokenizer)
    return {path.stem: text.windows(text.read_ids(tokenizer, path), settings["windows"], context, start,
                                    settings["seed"]).to(device) for path in texts}


def _greedy(model: Any, windows: dict[str, Tensor], methods: list, tokens: int, file: Results
            ) -> dict[str, dict[str, Any]]:
    """The summaries so far, each with its count of equal greedy tokens per window."""
    found = {}
    for name, ids in windows.items():
        expected = greedy.continuation(model, ids, tokens, methods[0].facts)
        equal = greedy.divergence(model, ids, expected, methods)
        summaries = file.data["results"][name]
        found[name] = {method: summaries[method] | {"greedy": count} for method, count in equal.items()}
    return found


@contextmanager
def _progress(total: int):
    """A progress bar on the terminal; yields the function that moves it by one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("chunks", total=total)
        yield lambda: bar.advance(task)
