import json
import re
import runpy
import subprocess

import pytest
import torch
from tiny_model import REPOSITORY
from torch._dynamo.utils import counters

from kvarn.spec import PRESETS
from kvarn_passes import Reason

README = (REPOSITORY / "README.md").read_text()
PAGES = [README, *((REPOSITORY / name).read_text() for name in ("CONTRIBUTING.md", "docs/architecture.md"))]


@pytest.mark.parametrize("document, commands", [("README.md", ["pip", "pip", "ruff", "pyright", "pytest"]),
                                                ("docs/vllm.md", ["pip", "pip", "pip", "pip", "pytest"])])
def test_ci_runs_the_documents_commands(document, commands):
    script = (REPOSITORY / ".ci/run").read_text()
    assert f"run_block {document}\n" in script
    extract = ["bash", "-c", re.search(r"\$\((sed .*)\)", script)[1], "run_block", document]
    lines = subprocess.run(extract, cwd=REPOSITORY, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[0] for line in lines] == commands
    assert all("&&" not in line for line in lines)  # bash -e does not stop inside such a list


def test_figures_are_those_of_the_demo():
    figures = runpy.run_path(str(REPOSITORY / "docs/figures.py"))
    measured = json.loads((REPOSITORY / "docs/demo.json").read_text())
    assert figures["updated"](README, measured) == README
    assert figures["updated"](README, {**measured, "ppl_packed": 99.0}) != README


def test_named_files_exist():
    path = r"`((?:kvarn|kvarn_compile|passes|docs|examples)/[\w/.]+\.\w+)`"
    names = {name for page in PAGES for name in re.findall(path, page)}
    assert len(names) > 15
    assert [name for name in sorted(names) if not (REPOSITORY / name).exists()] == []


def test_named_reasons_and_presets_exist():
    reasons = re.findall(r"`([A-Z_]{4,})`", README)
    assert len(reasons) >= 8 and set(reasons) <= {reason.name for reason in Reason}
    assert all(f"`{name}`" in README for name in PRESETS)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_example_runs_packed(tiny, capsys):
    example = re.search(r"```python\n(.*?)```", README, re.S)[1]
    for old, new in (('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(tiny))),
                     ('"k4v2_g128"}', '"k4v2_g128", "inner": "eager"}')):
        assert example.count(old) == 1
        example = example.replace(old, new)
    torch._dynamo.reset()
    counters.clear()
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("The sky is blue because")
    assert counters["kvarn"]["attention_rewritten"] >= 2
