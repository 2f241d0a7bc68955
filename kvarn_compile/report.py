"""What was rewritten and what was not, and why: `explain`."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from kvarn.layout import store_layout
from kvarn.spec import DEFAULT_PRESET, QuantSpec, preset_name, resolve
from kvarn_compile.options import Options
from kvarn_compile.walk import reachable
from kvarn_passes import Rewritten, StorePair


@dataclass(frozen=True)
class Row:
    """One attention: `reason` is None if it was rewritten; bytes are those of its K and V caches together."""

    module: str
    kind: str
    cache: str
    shape: tuple[int | str, ...]
    rewritten: bool
    reason: str | None
    message: str
    hint: str
    source: str
    bytes_before: int | None
    bytes_after: int | None
    balanced: bool


@dataclass(frozen=True)
class GraphReport:
    """What the backend did with one graph: its attentions, or why it did not look for any."""

    rows: tuple[Row, ...] = ()
    refusal: str = ""

    @staticmethod
    def of(rewritten: Rewritten, inputs: Sequence[Any], names: Mapping[str, str]) -> "GraphReport":
        """The report of a rewrite of a graph with these (fake) inputs; `names` are the user's words for its inputs."""
        rows = []
        for decision in rewritten.decisions:
            refusal, before, after, balanced = decision.refusal, None, None, False
            if decision.pair is not None:
                pair = rewritten.pairs[decision.pair]
                before, after = _bytes(pair, inputs)
                balanced = pair.balance is not None
            cache = ", ".join(names.get(name, name) for name in decision.cache.split(", "))
            rows.append(Row(decision.module_path, decision.kind, cache, tuple(decision.shape),
                            decision.accepted, refusal.reason.name if refusal else None,
                            refusal.message if refusal else "", refusal.hint if refusal else "", decision.source,
                            before, after, balanced))
        return GraphReport(tuple(rows))


_collected: ContextVar[list[GraphReport] | None] = ContextVar("kvarn_reports", default=None)


def record(graph: GraphReport) -> None:
    """Hands a report to whoever is collecting them."""
    collected = _collected.get()
    if collected is not None:
        collected.append(graph)


@contextmanager
def collecting() -> Iterator[list[GraphReport]]:
    """Collects the reports of all graphs compiled inside the block."""
    collected: list[GraphReport] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


@dataclass(frozen=True)
class Explanation:
    """What backend="kvarn" does with a model; prints as a table, `to_json` for programs.

    Attributes:
        preset: the format asked for.
        rows: one per attention.
        refusals: why whole graphs were left alone.
        graph_breaks: what split the model into several graphs.
    """

    preset: str
    rows: tuple[Row, ...]
    refusals: tuple[str, ...]
    graph_breaks: tuple[str, ...]

    @property
    def rewritten(self) -> int:
        """How many attentions read a packed cache."""
        return sum(row.rewritten for row in self.rows)

    def to_json(self) -> str:
        """All fields, and "rewritten", as JSON."""
        return json.dumps({"rewritten": self.rewritten, "attentions": len(self.rows), **asdict(self)}, indent=2)

    def __rich_console__(self, console, options):
        table = Table(title=f"KV caches under {self.preset}: {self.rewritten} of {len(self.rows)} attentions packed")
        for column in ("attention", "cache", "decision", "bytes", "source"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            decision = "packed" + (", balanced keys" if row.balanced else "")
            if not row.rewritten:
                decision = f"{row.reason}: {row.message}; {row.hint}"
            size = f"{row.bytes_before:,} -> {row.bytes_after:,}" if row.bytes_before and row.bytes_after else "-"
            shape = " x ".join(map(str, row.shape))
            table.add_row(f"{row.module or '?'} ({row.kind})", f"{row.cache} {shape}".strip() or "-", decision, size,
                          _short(row.source))
        yield table
        for text in self.refusals:
            yield f"graph left alone: {text}"
        for text in self.graph_breaks:
            yield f"graph break: {text}"

    def __str__(self):
        console = Console(width=140)
        with console.capture() as captured:
            console.print(self, markup=False)
        return captured.get()


def explain(model: nn.Module | Callable[..., Any], *args: Any, preset: str | QuantSpec = DEFAULT_PRESET,
            **kwargs: Any) -> Explanation:
    """Runs `model(*args, **kwargs)` once and reports what backend="kvarn" would rewrite in it.

    The run leaves the caches alone: graphs work on copies of their non-parameter inputs, and cache objects in the
    arguments are copied (their tensors are not). Only code outside of compiled graphs, between graph breaks, works on
    the model's own tensors.

    Args:
        model: a module or function; one that torch.compile returned is looked into.
        preset: the format to explain.
        args, kwargs: what to call it with. Gradient mode counts, as in a real call.
    """
    model = getattr(model, "_orig_mod", model)
    breaks = torch._dynamo.utils.counters["graph_break"]
    before = set(breaks)
    shared: dict[int, Any] = {}
    args, kwargs = copy.deepcopy(_pinned((args, kwargs), shared), shared)
    with collecting() as graphs:
        torch.compile(model, backend=_explaining(Options(resolve(preset), inner="eager")))(*args, **kwargs)
    return Explanation(preset_name(resolve(preset)), tuple(row for graph in graphs for row in graph.rows),
                       tuple(graph.refusal for graph in graphs if graph.refusal), tuple(set(breaks) - before))


def _explaining(options: Options) -> Callable[..., Any]:
    from kvarn_compile import backend

    def analyze(gm, example_inputs):
        backend.analyze(gm, example_inputs, options)

        def run(*args):
            return gm(*(a.clone() if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) else a for a in args))

        return run

    return analyze


def _pinned(value: Any, memo: dict[int, Any]) -> Any:
    """`value`, after telling deepcopy, through its memo, to share every tensor and module found in it."""
    for item in reachable(value, into_modules=False):
        memo[id(item)] = item
    return value


def _short(source: str) -> str:
    """A source line without the folder its file is in."""
    place, _, _ = source.partition(": ")
    return place.rsplit("/", 1)[-1] or "-"


def _bytes(pair: StorePair, inputs: Sequence[Any]) -> tuple[int | None, int | None]:
    """Bytes of K and V before and after; None where a size is symbolic."""
    key, value = inputs[pair.key_input], inputs[pair.value_input]
    if not all(isinstance(size, int) for size in key.shape):
        return None, None
    rows, heads, capacity, dim = (key.shape[axis] for axis in pair.axes.order)
    layout = store_layout(pair.spec.key, dim, key.dtype)
    return (key.numel() * key.element_size() + value.numel() * value.element_size(),
            layout.nbytes(rows, heads, capacity))
