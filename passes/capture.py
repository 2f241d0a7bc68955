"""Makes attention calls of a Dynamo graph opaque, so that they survive AOTAutograd as one node each.

Traced as it is, F.scaled_dot_product_attention turns into whatever ATen the device prefers. As torch.ops.kvarn.sdpa it
stays one functional node with all its arguments, which `rewrite` then finds.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

_TARGETS = {
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.scaled_dot_product_attention,
}
_PARAMETERS = {"query": None, "key": None, "value": None, "attn_mask": None, "dropout_p": 0.0, "is_causal": False,
               "scale": None, "enable_gqa": False}


@dataclass
class Undo:
    """The calls `capture` swapped; `restore` brings them back. No node is made or lost in either direction."""

    calls: list[tuple[fx.Node, Any, tuple, dict]] = field(default_factory=list)
    modules: list[fx.GraphModule] = field(default_factory=list)

    def restore(self) -> None:
        """Puts the original calls back, in place. Doing it twice changes nothing."""
        for node, target, args, kwargs in self.calls:
            node.target, node.args, node.kwargs = target, args, kwargs
        for module in self.modules:
            module.recompile()
        self.calls.clear()
        self.modules.clear()


def capture(gm: fx.GraphModule) -> Undo:
    """Swaps every attention call of a Dynamo graph and its submodules for torch.ops.kvarn.sdpa, in place.

    In place, because a copy of the graph loses the names Dynamo keeps for parameters, and with them what marks weights
    as static inputs. A call with dropout, or whose flags are not plain numbers, is left alone.

        before:  o = torch._C._nn.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=True)
        after:   o = torch.ops.kvarn.sdpa.default(q, k, v, m, 0.0, False, None, True)
    """
    undo = Undo()
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        found = [node for node in module.graph.nodes if node.op == "call_function" and node.target in _TARGETS]
        swapped = [node for node in found if _swap(node, undo)]
        if swapped:
            undo.modules.append(module)
            module.recompile()
    return undo


def _swap(node: fx.Node, undo: Undo) -> bool:
    values = dict(_PARAMETERS)
    values.update(zip(_PARAMETERS, node.args, strict=False))
    values.update(node.kwargs)
    flags = values["is_causal"], values["enable_gqa"]
    if set(values) != set(_PARAMETERS) or any(isinstance(flag, fx.Node) for flag in flags):
        return False
    if values["dropout_p"] != 0 or not isinstance(values["scale"], (int, float, type(None))):
        return False
    undo.calls.append((node, node.target, node.args, node.kwargs))
    scale = None if values["scale"] is None else float(values["scale"])
    node.target = torch.ops.kvarn.sdpa.default
    node.args = (values["query"], values["key"], values["value"], values["attn_mask"], float(values["dropout_p"]),
                 bool(values["is_causal"]), scale, bool(values["enable_gqa"]))
    node.kwargs = {}
    return True
