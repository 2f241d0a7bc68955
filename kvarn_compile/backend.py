"""The torch.compile backend "kvarn": capture, rewrite, compile with an inner backend, and what runs at every call.

    Dynamo graph --capture--> --AOTAutograd--> functional ATen graph --rewrite--> inner backend --> Packed
                                                     |
                                                     nothing accepted: the Dynamo graph, unchanged --> inner backend

The entry point torch_dynamo_backends finds it; nothing has to be imported first.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import exceptions_allowed_to_be_fallback

from kvarn.errors import KVarnError
from kvarn_compile import binding, report
from kvarn_compile.inner import compile_inner, copy_dynamo_metadata, mark_stores, source_names
from kvarn_compile.optimized import adapt_transformers
from kvarn_compile.options import Options
from kvarn_compile.runtime import Packed, cache_like, guarded
from kvarn_passes import Reason, Rewritten, capture, rewrite

log = logging.getLogger(__name__)

GRAD = "gradients are recorded: run the model under torch.no_grad() or torch.inference_mode()"


def kvarn(gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
          options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Compiles a Dynamo graph with its KV caches in packed stores; the callable takes the graph's own inputs.

    A graph in which nothing can be packed is compiled as it is by the inner backend, and a warning says why.

    Args:
        gm, example_inputs: as Dynamo passes them.
        mode, options: see kvarn_compile.options.Options.

    Raises:
        SpecError: for bad options. Dynamo reports it as BackendCompilerFailed.
    """
    parsed = Options.parse(mode, options)
    adapt_transformers()
    if _records_gradients(gm, example_inputs):
        return _plain(gm, example_inputs, parsed, GRAD)
    compiled, packing = _pack(gm, example_inputs, parsed)
    if not packing.rewritten.pairs:
        return _plain(gm, example_inputs, parsed)
    return _or_plain(compiled, gm, example_inputs, parsed)


def analyze(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
    """Reports what `kvarn` would do with a graph (kvarn_compile.report.record) and leaves the graph as it was."""
    if _records_gradients(gm, example_inputs):
        report.record(report.GraphReport(refusal=GRAD))
    else:
        _pack(gm, example_inputs, options)


def _pack(gm: fx.GraphModule, example_inputs: Sequence[Any],
          options: Options) -> "tuple[Callable[..., Any], _Packing]":
    packing = _Packing(gm, options)
    undo = capture(gm)
    try:
        compiled = aot_autograd(fw_compiler=packing, inference_compiler=packing,
                                keep_inference_input_mutations=True)(gm, example_inputs)
    finally:
        undo.restore()
    report.record(packing.report)
    return compiled, packing


class _Packing:
    """The compiler AOTAutograd calls with the functional graph: rewrites it and compiles it, or compiles nothing."""

    def __init__(self, dynamo: fx.GraphModule, options: Options):
        self.dynamo, self.options = dynamo, options
        self.rewritten = Rewritten((), (), ())
        self.report = report.GraphReport()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        copy_dynamo_metadata(self.dynamo, gm)
        names = source_names(gm)
        balance = self.options.balance if isinstance(self.options.balance, str) else "off"
        try:
            self.rewritten = rewrite(gm, self.options.spec, balance=balance)
        except exceptions_allowed_to_be_fallback as error:  # Dynamo would make these a graph break, without a word
            raise KVarnError(f"the rewrite failed on a graph: {error}") from error
        self.report = report.GraphReport.of(self.rewritten, inputs, names)
        _log(self.rewritten)
        if not self.rewritten.pairs:
            return gm.forward  # never called: `kvarn` compiles the unchanged graph instead
        mark_stores(gm)
        packed_inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        compiled = compile_inner(gm, packed_inputs, self.options)
        return Packed(compiled, self.rewritten, inputs, self.options)


def _or_plain(compiled: Callable[..., Any], gm: fx.GraphModule, example_inputs: Sequence[Any],
              options: Options) -> Callable[..., Any]:
    """`compiled`, or the original graph for caches that turn out, at run time, not to be ours to free."""
    plain: list[Callable[..., Any]] = []
    caches = [i for i, value in enumerate(example_inputs) if cache_like(value)]

    def run(*args):
        try:
            return compiled(*args)
        except binding.NotOwned as refusal:
            if not plain:
                log.warning("%s; this graph now runs on the plain cache", refusal)
                patches = dict(options.inductor) or None
                plain.append(torch.compile(gm, backend=options.inner, options=patches))
            binding.restore_plain(args[i] for i in caches)
            return plain[0](*args)

    return run


def _plain(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, why: str = "") -> Callable[..., Any]:
    """The graph as it is, compiled by the inner backend."""
    if why:
        log.warning("a graph is compiled without packed KV caches: %s", why)
        report.record(report.GraphReport(refusal=why))
    watched = [i for i, value in enumerate(example_inputs) if cache_like(value)]
    return guarded(compile_inner(gm, example_inputs, options), watched)


def _records_gradients(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = [*example_inputs, *gm.parameters(), *gm.buffers()]
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in tensors)


def _log(rewritten: Rewritten) -> None:
    """One line per graph for what was packed, one per distinct reason for what was not."""
    refused = [d for d in rewritten.decisions if not d.accepted]
    done = len(rewritten.decisions) - len(refused)
    log.info("%d of %d attentions read packed caches", done, len(rewritten.decisions))
    for reason, count in Counter(d.refusal.reason for d in refused if d.refusal).items():
        first = next(d for d in refused if d.refusal and d.refusal.reason is reason)
        # A lazily made cache is packed by the next graph: nothing a user should act on.
        level = logging.INFO if reason is Reason.NOT_AN_INPUT else logging.WARNING
        log.log(level, "%d of %d attentions keep a plain cache, first %s (%s): %s", count, len(rewritten.decisions),
                first.module_path or "?", first.source or "no source line", first.refusal)
