"""Kernels with inline assembly give what they give without. A GPU runs the assembly; here an emulation of its few
instructions does (ptx.py), so that a wrong mask, shift or order of registers is seen without one.
"""

import numpy as np
import ptx
import pytest
import torch
from stores import DEVICE, error, tokens, twins, write
from test_decode_paged import Step

from kvarn import cuda, decode_cuda

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the instructions themselves")

CASES = [("k4v2_g64", 64), ("k4v4_g64", 64), ("k8v8_g128", 64), ("k4v2_g128", 128)]


@pytest.fixture(params=(1, 2))
def assembled(monkeypatch, request):
    """Decodes take the way of a GPU that runs PTX; the instructions that ran, by name."""
    from triton.runtime.interpreter import InterpreterBuilder

    ran = set()

    def counted(name, function):
        def run(*sources):
            ran.add(name)
            return function(*sources)
        return run

    monkeypatch.setattr(ptx, "INSTRUCTIONS", {name: counted(name, f) for name, f in ptx.INSTRUCTIONS.items()})
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", ptx.create_inline_asm)
    monkeypatch.setattr(decode_cuda, "assembly", lambda device: request.param)
    return ran


@pytest.mark.parametrize("preset,dim", CASES)
def test_a_step_by_assembly_is_the_step(assembled, monkeypatch, request, preset, dim):
    step = Step([300, 129, 40], [1, 2, 0], preset, dim)
    by_assembly = step.run()
    converts = request.node.callspec.params["assembled"] > 1
    assert "and.b32" in assembled and ("cvt.rn.f16x2.e4m3x2" in assembled) == converts
    monkeypatch.setattr(decode_cuda, "assembly", lambda device: 0)
    assembled.clear()
    assert error(by_assembly, step.run().double()) < 1e-3
    assert not assembled
    assert error(by_assembly, step.expected()) < 3e-3


def test_a_tile_rounded_by_assembly_has_the_same_bytes(assembled, monkeypatch):
    stores = [twins("k4v2_g64", 1, 2, 200, 64, torch.float16)[1] for _ in range(2)]
    for store, level in zip(stores, (1, 0), strict=True):
        assembled.clear()
        monkeypatch.setattr(cuda, "assembly", lambda device, level=level: level)
        write(None, store, *tokens(1, 2, 150, 64, torch.float16, 0), torch.arange(150))
        assert assembled == ({"mov.b32"} if level else set())
    assert stores[0].records.any() and stores[0].records.equal(stores[1].records)


def test_a_wrong_instruction_is_seen(assembled, monkeypatch):
    step = Step([300], [1])
    right = step.run()
    monkeypatch.setitem(ptx.INSTRUCTIONS, "shr.u32", lambda x, n: np.right_shift(x, n + 1))
    assert error(step.run(), right.double()) > 0.05


def test_instructions_that_numpy_does_not_have():
    x, y = (np.array([v], np.uint32) for v in (0x3C00C000, 0x40003800))  # halves (-2, 1) and (0.5, 2), low ones first
    assert ptx.run("sub.rn.f16x2 $0, a, b;", {"a": x, "b": y})["$0"].view(np.float16).tolist() == [-2.5, -1.0]
    a, b, c = (np.array([v], np.uint32) for v in (0b11110000, 0b11001100, 0b10101010))
    assert ptx.run("lop3.b32 $0, a, b, c, 0x6a;", {"a": a, "b": b, "c": c})["$0"] == 0x6A
    split = ptx.run("{ .reg .b16 l, h; mov.b32 {l, h}, $1; mov.b32 $0, {h, l}; }", {"$1": x})
    assert split["$0"] == 0xC0003C00
    pair = torch.tensor([1.5, -0.25]).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    word = np.array([int(pair[0]) | int(pair[1]) << 8], np.uint32)
    both = ptx.run("cvt.rn.f16x2.e4m3x2 $0, a;", {"a": word})["$0"]
    assert both.view(np.float16).tolist() == [1.5, -0.25]
    upper = ptx.run("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }", {"$1": both})["$0"]
    assert upper.view(np.float32).tolist() == [-0.25]
