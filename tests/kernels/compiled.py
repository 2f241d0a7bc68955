"""Compile kernels as they are launched, for GPUs that need not be here, and report what ptxas made of them.

    python compiled.py sm_90 close decode ...   prints {kernel: {"registers", "stack", "matrix", "local"}} as JSON

Run as a program of its own: TRITON_INTERPRET, which the tests set, turns kernels into Python functions.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvarn.kernels import append, combine, configs, decode, prepare, quantize, unpack
from kvarn.layout import StoreLayout
from kvarn.spec import PRESETS

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {"positions": "*i64", "records": "*u8", "tail": "*u8", "lengths": "*i64", "before": "*i64",
            "balance": "*fp32", "rotated": "*fp16", "extent": "*i32", "mask": "*u8", "partial": "*fp32",
            "sums": "*fp32", "sums_out": "*fp32", **dict.fromkeys(("k", "v", "k_out", "v_out", "out"), "*bf16")}


def launches(dim: int) -> dict:
    """name -> (kernel, constexprs, num_warps, num_stages, maxnreg, types that differ), as configs.py has them."""
    layout = StoreLayout(PRESETS["k4v2_g128"], dim, torch.bfloat16)
    offsets, quarter = configs.offsets(layout), dim // 4
    warps, limit = configs.close(dim)
    block, unpack_warps = configs.unpack(dim)
    config = configs.decode(32, 8, 128, 8, layout, 132)
    token = {name: offsets[name] for name in ("G", "Q", "VW", "TAIL", "WORDS", "K_SCALE", "V_SCALE")}
    step = {"ASM": True, "STEP": config.step, **offsets}
    how = config.num_warps, config.num_stages, config.maxnreg, {"q": "*fp16"}
    masked = {"MASKED": True, "ADDITIVE": False, "ROWS": False}
    return {
        "close": (quantize.close_tiles, {"FULL": True, "ONE": False, **offsets}, warps, 3, limit, {}),
        "write": (append.write_token, {"R": 16, **token}, 4, 3, None, {}),
        "unpack": (unpack.unpack_tiles, {"R": block, **offsets}, unpack_warps, 3, None, {}),
        "prepare": (prepare.prepare_rows, {"R": 16, "MP": 8, "Q": quarter, **masked, "BLOCK": 1024}, 4, 3, None,
                    {"q": "*bf16"}),
        "decode": (decode.decode_tiles, {"MP": 8, **masked, "MASKED": False, **step}, *how),
        "masked": (decode.decode_tiles, {"MP": 8, **masked, **step}, *how),
        "combine": (combine.combine_parts, {"P": 16, "MP": 8, "Q": quarter, "BLOCK": 16}, 4, 3, None, {}),
    }


def build(kernel, constants, num_warps, num_stages, maxnreg, types, capability: int) -> dict:
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name) or POINTERS.get(
            name, "fp32" if name == "scale" else "i32")
        if name in constants:
            values[(i,)] = constants[name]
        elif signature[name].startswith("*") or name.startswith(("k_", "v_", "q_")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": num_warps, "num_stages": num_stages} | ({"maxnreg": maxnreg} if maxnreg else {})
    binary = triton.compile(ASTSource(kernel, signature, values, attributes), target=GPUTarget("cuda", capability, 32),
                            options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
                       for flag in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "stack": int(stack), "matrix": len(re.findall(r"\b[HQ]G?MMA\b", code)),
            "local": len(re.findall(r"\b(?:LDL|STL)\b", code)), "instructions": code.count(";")}


def main(target: str, *names: str) -> None:
    report = {}
    for name in names:
        kernel, dim = name.split("-")
        report[name] = build(*launches(int(dim))[kernel], int(target.removeprefix("sm_")))
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
