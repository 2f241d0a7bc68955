"""Small questions about FX nodes: sizes as exact expressions, user source, module path, the node that holds a size."""

import re
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from .refusal import Reason, Refusal, Refused

Size = sympy.Expr
_FRAME = re.compile(r'File "([^"]*)", line (\d+), in [^\n]*(?:\n\s*([^\n]*))?')


def refuse(reason: Reason, message: str, hint: str, node: fx.Node | None = None) -> Refused:
    """The exception that leaves an analysis with this refusal, located at `node`."""
    return Refused(Refusal(reason, message, hint, node.name if node else "", source_line(node) if node else ""))


def expr(size: int | torch.SymInt) -> Size:
    """A size as an expression; equal sizes have equal expressions, and no guard is ever added to find out."""
    return sympy.Integer(size) if isinstance(size, int) else sympy.expand(size.node.expr)


def sizes(node: fx.Node) -> tuple[Size, ...]:
    """The sizes of the tensor a node makes."""
    return tuple(expr(size) for size in node.meta["val"].shape)


def same_size(a: Size, b: Size, node: fx.Node) -> bool:
    """True if two sizes are equal. Two symbols that agree today become one, by a guard of the shape env of `node`."""
    if a == b or (a.is_Integer and b.is_Integer):
        return a == b
    env = node.meta["val"].fake_mode.shape_env
    return guard_or_false(env.create_symintnode(a, hint=None) == env.create_symintnode(b, hint=None))


def same_sizes(a: Sequence[Size], b: Sequence[Size], node: fx.Node) -> bool:
    """True if two shapes are equal, by `same_size`."""
    return len(a) == len(b) and all(same_size(x, y, node) for x, y in zip(a, b, strict=True))


def settled(size: Size, node: fx.Node) -> Size:
    """A size read earlier in the symbols of now: `same_size` may have made two symbols one since."""
    return size if size.is_Integer else sympy.expand(node.meta["val"].fake_mode.shape_env.replace(size))


def arg_expr(arg: int | torch.SymInt | fx.Node) -> Size:
    """An int or SymInt argument as an expression."""
    return expr(arg.meta["val"] if isinstance(arg, fx.Node) else arg)


def size_node(graph: fx.Graph, size: Size, before: fx.Node) -> int | fx.Node:
    """What to write into the graph for a size: an int, or a node ahead of `before` that holds exactly this SymInt.

    Never a hint: a size nobody holds is a refusal.
    """
    if size.is_Integer:
        return int(size)
    size = settled(size, before)
    for node in graph.nodes:
        if node is before:
            break
        if isinstance(node.meta.get("val"), torch.SymInt) and expr(node.meta["val"]) == size:
            return node
    raise refuse(Reason.SYMBOLIC, f"no node of the graph holds the size {size}",
                 "compile with dynamic=False, or pass that size to the model as an argument", before)


def aten(node: Any) -> str:
    """The name of an ATen call without overload ("view"), "" for everything else."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    namespace, name = node.target.overloadpacket._qualified_op_name.split("::")
    return name if namespace == "aten" else ""


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """A positional argument that is a node."""
    found = node.args[index]
    assert isinstance(found, fx.Node), f"argument {index} of {node.format_node()}"
    return found


def argument(node: fx.Node, name: str, *missing: Any) -> Any:
    """An argument of an op call by its schema name, its default where the call leaves it out.

    `missing` is what to return if the overload has no such argument; without it that is a KeyError.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    for i, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[i] if i < len(node.args) and not parameter.kwarg_only else parameter.default_value
    if missing:
        return missing[0]
    raise KeyError(name)


def source_line(node: fx.Node) -> str:
    """The innermost line of user code behind a node, "file:line: code"; "" if unknown."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line, code = frames[-1]
    return f"{file}:{line}: {code.strip()}" if code else f"{file}:{line}"


def module_path(node: fx.Node) -> str:
    """The module that runs a node, as named_modules() spells it ("model.layers.0.self_attn"); "" if unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    # Dynamo names the root by the local that holds it: L['self'], or L['args'][0] under a wrapper.
    path = re.sub(r"^L\['\w+'\](\[\d+\])?|^self\b", "", path)
    path = re.sub(r"\._modules\['(\w+)'\]|\['(\w+)'\]|\[(\d+)\]", lambda m: "." + next(filter(None, m.groups())), path)
    return path.removeprefix(".").removeprefix("_orig_mod.").removeprefix("_orig_mod")


def same_value(a: Any, b: Any) -> bool:
    """True if two arguments are the same node or the same functional computation of the same nodes."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(same_value, a, b))
        return type(a) is type(b) and a == b
    if a is b:
        return True
    if a.op != "call_function" or a.target is not b.target or a.kwargs.keys() != b.kwargs.keys():
        return False
    if torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()):
        return False
    return same_value(a.args, b.args) and all(same_value(a.kwargs[key], b.kwargs[key]) for key in a.kwargs)
