import runpy

import pytest
from tiny_model import REPOSITORY

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


def example(name):
    return runpy.run_path(str(REPOSITORY / "examples" / f"{name}.py"))["main"]


def test_transformers_generate(tiny):
    assert example("transformers_generate")(str(tiny), "Hello", 4).startswith("Hello")


def test_own_module():
    error, caches = example("own_module")("k16v16")
    assert error < 1e-6 and caches == 1
    error, caches = example("own_module")("k8v8_g128")
    assert 1e-6 < error < 0.02 and caches == 1


def test_explain_refusal():
    explanation = example("explain_refusal")()
    assert [row.rewritten for row in explanation.rows] == [True, False]
    assert explanation.rows[1].reason == "OTHER_USER"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_and_tested(path):
    assert len(path.read_text().splitlines()) < 60
    assert f'example("{path.stem}")' in (REPOSITORY / "tests/cli/test_examples.py").read_text()
