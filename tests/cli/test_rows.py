"""benchmarks/rows.py: rows go under a file's own columns, or not at all."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "rows.py"
SPEC = importlib.util.spec_from_file_location("benchmark_rows", PATH)
assert SPEC and SPEC.loader
rows = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(rows)


def test_append_follows_the_columns_of_the_file(tmp_path):
    file = tmp_path / "new" / "x.csv"
    rows.append(file, [{"ms": 1, "card": "a"}])
    rows.append(file, [{"card": "b", "ms": 2}])
    assert file.read_text().split() == ["ms,card", "1,a", "2,b"]


@pytest.mark.parametrize("row", [{"ms": 1}, {"ms": 1, "card": "a", "commit": "c"}])
def test_other_columns_are_refused_and_nothing_is_written(tmp_path, row):
    file = tmp_path / "x.csv"
    rows.append(file, [{"ms": 1, "card": "a"}])
    before = file.read_text()
    with pytest.raises(ValueError, match="columns"):
        rows.append(file, [row])
    assert file.read_text() == before


def test_a_commit_is_named(monkeypatch):
    monkeypatch.setenv("COMMIT", "abc")
    assert rows.commit() == "abc"
