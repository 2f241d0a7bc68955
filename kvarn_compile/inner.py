"""Compiling a graph with the inner backend, and what a graph must carry for inductor to treat weights as static."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._dynamo.source import ConstantSource

from kvarn_compile.options import Options


def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """`gm` compiled by options.inner for inputs like these (fake or real); called as fn(*args)."""
    if options.inner == "eager":
        return gm.forward
    if options.inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, example_inputs, config_patches=dict(options.inductor))  # type: ignore[return-value]


def copy_dynamo_metadata(dynamo: fx.GraphModule, gm: fx.GraphModule) -> None:
    """Makes the ATen graph `gm`, traced from the graph `dynamo`, pass for a Dynamo graph, before its inputs change.

    AOTAutograd takes from these marks which inputs keep their address from call to call (weights, caches); CUDA graphs
    would otherwise copy them at every call, or refuse the graph because it writes to its inputs. Where AOTAutograd
    merged inputs the two graphs do not match one to one, and the marks are left out.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    lifted = [name for name, _ in dynamo.named_parameters()] + [name for name, _ in dynamo.named_buffers()]
    originals = dynamo.graph.find_nodes(op="placeholder")
    if "dynamo_compile_id" not in dynamo.meta or len(placeholders) != len(lifted) + len(originals):
        return
    gm.meta["dynamo_compile_id"] = dynamo.meta["dynamo_compile_id"]
    sources: Any = dynamo._param_name_to_source
    for node, name in zip(placeholders, lifted, strict=False):
        node._dynamo_source = sources[name]
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    for node, original in zip(placeholders[len(lifted):], originals, strict=True):
        node._dynamo_source = original._dynamo_source
        if "tensor_dict" in original.meta:
            node.meta["tensor_dict"] = original.meta["tensor_dict"]
    constants = [name for name, _ in gm.named_parameters()] + [name for name, _ in gm.named_buffers()]
    vars(gm)["_param_name_to_source"] = {name: ConstantSource(f"kvarn_{name}") for name in constants}


def source_names(gm: fx.GraphModule) -> dict[str, str]:
    """The user's expression for each input of a graph that carries Dynamo's metadata, e.g. "cache.layers[0].keys"."""
    names = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node, "_dynamo_source", None)
        if source is not None:
            name = str(source.name() if callable(source.name) else source.name)  # a method in older torch
            names[node.name] = re.sub(r"L\['(\w+)'\]", r"\1", name)
    return names


def mark_stores(gm: fx.GraphModule) -> None:
    """Gives the store inputs a rewrite added the mark of a Dynamo input: they come from no expression of the user's."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if not hasattr(node, "_dynamo_source"):
            node._dynamo_source = None
