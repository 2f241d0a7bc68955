"""Runs a model plain and with its caches rewritten, and compares: the harness of every test of a whole rewrite."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from kvarn.layout import StoreLayout
from kvarn.spec import PRESETS, QuantSpec
from kvarn_passes import Rewritten, capture, rewrite

LOSSLESS = PRESETS["k16v16"]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1, torch.float64: 1e-9}
"""Largest difference of logits of order 1 that a different order of additions explains."""

Calls = Callable[[Callable], list[Tensor]]


@dataclass
class RewritingBackend:
    """A torch.compile backend that rewrites and runs the graph as it is; one store per cache tensor, kept in a dict.

    graphs and results hold what was compiled, in order.
    """

    spec: QuantSpec = LOSSLESS
    balance: str = "weights"
    graphs: list[fx.GraphModule] = field(default_factory=list)
    results: list[Rewritten] = field(default_factory=list)
    stores: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence):
        undo = capture(gm)
        compiler = aot_autograd(fw_compiler=self._compile, inference_compiler=self._compile,
                                keep_inference_input_mutations=True)
        try:
            return compiler(gm, inputs)
        finally:
            undo.restore()

    def _compile(self, gm: fx.GraphModule, inputs: Sequence):
        result = rewrite(gm, self.spec, balance=self.balance)
        self.graphs.append(gm)
        self.results.append(result)

        def run(*args):
            stores = [tensor for pair in result.pairs for tensor in self._store(args[pair.key_input], pair)]
            return gm(*(args[i] for i in result.kept), *stores)

        return run

    def _store(self, cache: Tensor, pair) -> tuple[Tensor, ...]:
        if cache.data_ptr() not in self.stores:
            rows, heads, tokens, channels = (cache.shape[axis] for axis in pair.axes.order)
            layout = StoreLayout(self.spec, channels, cache.dtype)
            self.stores[cache.data_ptr()] = (
                torch.zeros(rows, heads, layout.tiles(tokens), layout.record_bytes, dtype=torch.uint8),
                torch.zeros(rows, heads, layout.tail_bytes, dtype=torch.uint8),
                torch.zeros(rows, dtype=torch.int64), torch.ones(heads, channels))
        return self.stores[cache.data_ptr()]

    @property
    def decisions(self) -> list:
        return [decision for result in self.results for decision in result.decisions]

    def ops(self, target) -> int:
        """Calls of an op in all graphs."""
        return sum(len(gm.graph.find_nodes(op="call_function", target=target)) for gm in self.graphs)


@torch.no_grad()
def run_both(model: nn.Module, calls: Calls, backend: RewritingBackend, **compile_options) -> float:
    """The largest difference between a model's outputs plain and under `backend`, each on a copy of its own.

    Args:
        model: in eval mode, with empty caches.
        calls: makes the calls with the function it is given, and returns their outputs.
        backend: gets every graph.
        compile_options: for torch.compile; fullgraph is on.
    """
    want = calls(copy.deepcopy(model))
    got = calls(torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True, **compile_options))
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(want, got, strict=True))
