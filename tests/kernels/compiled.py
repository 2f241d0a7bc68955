"""Compile kernels as they are launched, for GPUs that need not be here, and report what ptxas made of them.

    python compiled.py sm_90 fill-128 decode-64 ...   prints {kernel: {"warps", "registers", "stack", ...}} as JSON

Run as a program of its own: TRITON_INTERPRET, which the tests set, turns kernels into Python functions.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import chunk_launches
import decode_launches
import triton
import write_launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {"positions": "*i64", "records": "*u8", "tail": "*u8", "lengths": "*i64", "before": "*i64",
            "balance": "*fp32", "extent": "*i32", "mask": "*u8", "partial": "*fp16", "sums": "*fp32", "sinks": "*fp32",
            "hadamard": "*fp16",
            **dict.fromkeys(("q", "k", "v", "q_out", "k_out", "v_out", "out", "like", "angles"), "*bf16"),
            "cache": "*u8", **dict.fromkeys(("table", "starts", "ends", "offsets"), "*i32")}


def build(kernel, constants, num_warps, num_stages, maxnreg, types, capability: int) -> dict:
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name) or POINTERS.get(
            name, "fp32" if name in ("scale", "cap") else "i32")
        if name in constants:
            values[(i,)] = constants[name]
        elif signature[name].startswith("*") or name.startswith(("k_", "v_", "q_", "r_", "c_", "o_")):
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
    groups = len(re.findall(r"warp_group_dot |tc_gen5_mma", binary.asm["ttgir"]))
    return {"warps": num_warps, "registers": int(registers), "stack": int(stack),
            "matrix": len(re.findall(r"\b[HQ]G?MMA\b", code)), "groups": groups,
            "looped": sum(bool(re.search(r"\b(?:LDL|STL)\b", line)) for loop in innermost(code) for line in loop),
            "instructions": code.count(";")}


def innermost(code: str) -> list[list[str]]:
    """The instructions of each loop that has no other in it."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    jumps = [(i, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for i, (_, text) in enumerate(lines)]
    spans = [(place[int(to[1], 16)], i) for i, to in jumps if to and place.get(int(to[1], 16), i) < i]
    inner = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    return [[text for _, text in lines[a:b + 1]] for a, b in inner]


def main(target: str, *names: str) -> None:
    report, capability = {}, int(target.removeprefix("sm_"))
    for name in names:
        kernel, dim = name.split("-")
        launches = (write_launches.launches(int(dim), capability) | decode_launches.launches(int(dim), capability)
                    | chunk_launches.launches(int(dim), capability))
        report[name] = build(*launches[kernel], capability)
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
