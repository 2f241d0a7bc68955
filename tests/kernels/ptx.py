"""Inline assembly in Triton's interpreter: the few PTX instructions that kernels use, on arrays of registers.

A thread's `pack` elements are taken to be neighbours along the last axis, as an operand's layout has them on a GPU.
"""

import re

import numpy as np
import torch


def create_inline_asm(self, assembly, constraints, values, types, is_pure, pack):
    """What the interpreter's builder lacks (InterpreterBuilder.create_inline_asm)."""
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    shape = values[0].data.shape
    inputs = [lane for value in values for lane in registers(value.data, pack)]
    outputs = constraints.count("=")
    named = run(assembly, {f"${outputs + i}": lane for i, lane in enumerate(inputs)})
    results, at = [], 0
    for ty in types:
        element = getattr(ty, "element_ty", ty)
        count = max(1, pack * element.primitive_bitwidth // 32)
        lanes = np.stack([named[f"${at + i}"] for i in range(count)], -1)
        data = lanes.view(_get_np_dtype(element))
        results.append(TensorHandle(np.ascontiguousarray(data).reshape(shape), element))
        at += count
    assert at == outputs and len(inputs) == constraints.count(",") + 1 - outputs
    return Results(results)


class Results:
    """The results of a call, as Triton asks for them."""

    def __init__(self, handles):
        self.get_result = handles.__getitem__


def registers(data, pack):
    """The 32-bit registers of each group of `pack` elements, as a list of arrays [groups] uint32."""
    words = np.ascontiguousarray(data).reshape(-1, pack).view(np.uint32)
    return list(words.T)


def run(assembly, values):
    """Values of all registers after the instructions, of those before."""
    text = assembly.strip()
    text = text[1:-1] if text.startswith("{") and text.endswith("}") and ".reg" in text.split(";")[0] else text
    for line in filter(None, (part.strip() for part in text.split(";"))):
        name, operands = line.split(None, 1)
        if name == ".reg":
            continue
        operands = re.findall(r"\{[^}]*\}|[^,\s]+", operands)
        target, sources = operands[0], [read(values, part) for part in operands[1:]]
        result = INSTRUCTIONS[name](*sources)
        if target.startswith("{"):
            low, high = (part.strip() for part in target[1:-1].split(","))
            values |= {low: result & np.uint32(0xFFFF), high: result >> np.uint32(16)}
        else:
            values[target] = result.astype(np.uint32)
    return values


def read(values, name):
    if name.startswith("{"):
        low, high = (values[part.strip()] for part in name[1:-1].split(","))
        return low | high << np.uint32(16)
    return values[name] if name in values else np.uint32(int(name, 0))


def halves(function):
    """A function of float16 on both halves of 32-bit registers."""
    def on_registers(*registers):
        pairs = [np.ascontiguousarray(r).view(np.float16) for r in np.broadcast_arrays(*registers)]
        return function(*pairs).astype(np.float16).view(np.uint32)
    return on_registers


def look_up(a, b, c, table):
    """lop3: bit i of `table` is the result where a, b, c have the bits of i, a's the highest."""
    result = np.uint32(0)
    for i in range(8):
        if int(table) >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def from_e4m3(pair):
    """Two e4m3 bytes in the lower half as two float16."""
    bytes_ = np.ascontiguousarray(pair.astype(np.uint16)).view(np.uint8)
    return torch.from_numpy(bytes_.copy()).view(torch.float8_e4m3fn).half().numpy().view(np.uint32)


INSTRUCTIONS = {
    "and.b32": np.bitwise_and, "shr.u32": np.right_shift, "mov.b32": lambda x: x, "lop3.b32": look_up,
    "sub.rn.f16x2": halves(np.subtract), "mul.rn.f16x2": halves(np.multiply), "cvt.rn.f16x2.e4m3x2": from_e4m3,
    "cvt.f32.f16": lambda x: x.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32),
}
