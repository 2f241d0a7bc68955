"""Tensors that are waited for together, inside kernels."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl


@triton.constexpr_function
def _moves(count: int) -> str:
    return " ".join(f"mov.b32 ${i}, ${count + i};" for i in range(count))


@triton.constexpr_function
def registers(outputs: int, inputs: int, dtype: tl.dtype) -> str:
    """Constraints of an inline assembly; what it writes is apart from what it reads."""
    kind = "f" if dtype == tl.float32 else "r"
    return ",".join([f"=&{kind}"] * outputs + [kind] * inputs)


@triton.constexpr_function
def types(count: int, dtype: tl.dtype) -> tuple:
    """The types of an inline assembly's results."""
    return (dtype,) * count


@triton.jit
def together(x, ASM: tl.constexpr):
    """A tuple of tensors of one shape and type, of at most 32 bits, as it is, but none is used before all are there;
    nor, if they are loaded, before the loads above here are on their way.

    Triton stores what becomes a matrix product's operand to shared memory where it is loaded or made, and reads it back
    at once: a wait for memory, or two barriers, for each. With this between they are for all. The inline assembly does
    nothing, to all of them at once; were it pure, Triton would move it to where they are used.
    """
    count: tl.constexpr = len(x)
    dtype: tl.constexpr = x[0].dtype
    if ASM:
        return tl.inline_asm_elementwise(_moves(count), registers(count, count, dtype), x, dtype=types(count, dtype),
                                         is_pure=False, pack=max(1, 32 // dtype.primitive_bitwidth))
    else:
        return x
