"""Specs, preset names and byte layout."""

import re
from pathlib import Path

import pytest
import torch

from kvarn import spec as spec_module
from kvarn.errors import ShapeError, SpecError
from kvarn.layout import ALIGN, StoreLayout
from kvarn.spec import PRESETS, QuantSpec, preset_name, resolve


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_known_by_both_names_and_survives_its_key(name):
    spec = resolve(name)
    assert resolve(f"kvarn_{name}") == spec
    assert QuantSpec.from_key(spec.key) == spec
    assert preset_name(spec) == name


def test_unknown_preset_lists_the_valid_ones():
    with pytest.raises(SpecError, match=r"k3v9.*valid: k4v2_g128"):
        resolve("k3v9")


def test_a_key_of_another_format_version_is_refused():
    with pytest.raises(SpecError, match="format 99"):
        QuantSpec.from_key("kvarn99:k4v2g128e1t8s0")
    with pytest.raises(SpecError, match="not a spec key"):
        QuantSpec.from_key("k4v2_g128")


@pytest.mark.parametrize(("field", "bad"), [("k_bits", {"k_bits": 5}), ("v_bits", {"v_bits": 16}),
                                            ("group", {"group": 32}), ("method", {"method": "gptq"}),
                                            ("tail_bits", {"tail_bits": 4}), ("exact_rows", {"exact_rows": 9}),
                                            ("exact_rows", {"method": "upstream", "exact_rows": 1})])
def test_impossible_specs_name_the_field(field, bad):
    with pytest.raises(SpecError, match=field):
        QuantSpec(**{"k_bits": 4, "v_bits": 2, "group": 128, **bad})


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fields_are_disjoint_inside_the_record_and_aligned_to_their_dtype(name, head_dim, dtype):
    layout = StoreLayout(resolve(name), head_dim, dtype)
    for fields, size in ((layout.record, layout.record_bytes), (layout.tail, layout.tail_bytes)):
        marks = torch.zeros(size, dtype=torch.uint8)
        for label, field in fields.items():
            if label == "token":  # the words that hold kt, vt and w
                continue
            assert field.offset % field.dtype.itemsize == 0
            before = int(marks.sum())
            view = field.of(marks)
            view.view(torch.uint8).fill_(1) if view.is_contiguous() else view.copy_(torch.full_like(view.float(), 3.0))
            touched = int((marks != 0).sum())
            assert touched > before, f"{label} overlaps another field"
            marks.clamp_(max=1)
        assert size % ALIGN == 0


def test_a_field_view_writes_through():
    layout = StoreLayout(resolve("k4v2_g128"), 64, torch.float16)
    record = torch.zeros(2, 3, layout.record_bytes, dtype=torch.uint8)
    layout.record["kz"].of(record)[1, 2, 5] = 1.5
    assert layout.record["kz"].of(record)[1, 2, 5] == 1.5
    assert record.count_nonzero() == 1  # float16 1.5 is 0x3E00


def test_capacity_promises():
    default = StoreLayout(resolve("k4v2_g128"), 128, torch.float16)
    assert default.bytes_per_token <= 108
    small = StoreLayout(resolve("k4v2_g128"), 64, torch.float16)
    assert small.nbytes(1, 1, 1024) * 3.5 <= 1024 * 64 * 2 * 2
    raw = StoreLayout(resolve("k16v16"), 80, torch.bfloat16)
    assert raw.bytes_per_token == 80 * 2 * 2


def test_the_documented_bytes_are_the_layouts():
    text = Path(spec_module.__file__).read_text()
    for name, preset in PRESETS.items():
        sizes = [StoreLayout(preset, dim, torch.float16).bytes_per_token for dim in (64, 128, 256)]
        documented = re.search(rf"^    {name} +([\d. ]+)$", text, re.M)
        assert documented and [float(x) for x in documented[1].split()] == sizes, (name, sizes)


def test_head_dim_and_dtype_are_checked():
    with pytest.raises(ShapeError, match=r"head_dim=80.*power of two"):
        StoreLayout(resolve("k4v2_g128"), 80, torch.float16)
    with pytest.raises(ShapeError, match=r"float64.*valid"):
        StoreLayout(resolve("k16v16"), 80, torch.float64)
