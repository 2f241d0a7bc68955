"""What becomes of measurements: ratios only within a commit, a profile's instructions summed."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def module(path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as a script finds its neighbours
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    sys.modules.pop("rows", None)
    return found


@pytest.fixture
def speed(monkeypatch):
    return module(BENCHMARKS / "vllm" / "speed.py", monkeypatch)


def test_a_ratio_is_to_bf16_of_the_same_commit(speed, tmp_path):
    rows = [("bf16", "burst", 100, "old"), ("packed", "burst", 150, "old"), ("other", "burst", 50, "old"),
            ("bf16", "burst", 200, "new"), ("packed", "burst", 400, "new"), ("packed", "short", 7, "new")]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["variant", "what", "value", *speed.SETTINGS, "commit"], restval="same")
        writer.writeheader()
        writer.writerows(dict(zip(("variant", "what", "value", "commit"), row, strict=True)) for row in rows)
    found = speed.latest(tmp_path / "x.csv")
    assert (found["packed"]["burst"]["value"], found["packed"]["burst"]["times"]) == ("400", 2.0)
    assert found["other"]["burst"]["times"] == 0.5  # not 0.25, which another machine's bf16 would make of it
    assert found["packed"]["short"]["times"] is None


VIEW = """==PROF== Connected
"Kernel Name","fill_tiles",
"Address","Source","# Samples","Instructions Executed","stall_long_sb","stall_short_sb","stall_wait","stall_selected",\
"stall_barrier","stall_not_selected","stall_mio","L2 Theoretical Sectors Global","L2 Theoretical Sectors Local",\
"L1 Wavefronts Shared","L1 Wavefronts Shared Ideal"
"0x10","LDG.E R1","30","4","20","","","5","","","","128","","",""
"0x20","STL R1","10","2","","4","","","6","","","","64","8","2"
"""


def test_a_view_of_instructions_is_summed(monkeypatch):
    stalls = module(BENCHMARKS / "stalls.py", monkeypatch)
    found = stalls.summed(VIEW)
    assert (found["memory_pct"], found["barrier_pct"], found["issued_pct"]) == (50, 15, 12.5)
    assert (found["instructions"], found["global_sectors"], found["spill_sectors"]) == (6, 128, 64)
    assert (found["shared_wavefronts"], found["shared_ideal"]) == (8, 2)
    with pytest.raises(ValueError, match="Address"):
        stalls.summed("==ERROR== no counters")
    with pytest.raises(ValueError, match="Address"):
        stalls.summed(VIEW[:VIEW.index('"0x10"')])


def test_a_view_without_spills_has_no_column_of_them(monkeypatch):
    stalls = module(BENCHMARKS / "stalls.py", monkeypatch)
    assert stalls.summed(VIEW.replace("L2 Theoretical Sectors Local", "other"))["spill_sectors"] == 0
    with pytest.raises(KeyError):
        stalls.summed(VIEW.replace("stall_wait", "other"))
