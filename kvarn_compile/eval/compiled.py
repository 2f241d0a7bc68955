"""The same measurement through the product: torch.compile(backend="kvarn") over a static cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvarn.errors import SpecError
from kvarn_compile.eval import hf
from kvarn_compile.eval.harness import CHUNK
from kvarn_compile.eval.methods.base import Method
from kvarn_compile.eval.methods.packed import Packed
from kvarn_compile.eval.metrics import Scores


@torch.no_grad()
def evaluate(model: Any, texts: Mapping[str, Tensor], methods: Sequence[Method], inner: str = "eager"
             ) -> dict[str, dict[str, dict[str, Any]]]:
    """Summaries by text and method, as harness.evaluate's.

    A chunk attends the closed tiles from their records and itself exactly, as in the harness; the numbers agree up to
    float rounding of scores.

    Args:
        model: from hf.load_model; runs with PyTorch's own attention meanwhile.
        texts: windows of tokens [B, context] by text.
        methods: our presets; others have no compiled form.
        inner: the backend that compiles the rewritten graph.

    Raises:
        SpecError: for a method that is not a preset of ours.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {text: {} for text in texts}
    with hf.own_attention(model):
        for method in methods:
            if type(method) is not Method and not (isinstance(method, Packed) and not method.tail_read):
                raise SpecError(f"method={method.name!r} with --engine compiled; valid: presets of kvarn, unquantized")
            for text, ids in texts.items():
                scores = _run(model, ids, method, inner)
                found[text][method.name] = scores.summary() | {"bits": method.bits(ids.shape[1]),
                                                               "source": "torch.compile(backend='kvarn')"}
    return found


def _run(model: Any, ids: Tensor, method: Method, inner: str) -> Scores:
    """One method over windows ids [B, context], chunk by chunk, beside the plain model."""
    torch._dynamo.reset()
    step = model
    if isinstance(method, Packed):
        step = torch.compile(model, backend="kvarn", options=_options(method, inner))
    plain, packed = (hf.static_cache(model, ids.shape[0], ids.shape[1]) for _ in range(2))
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1)
    scores = Scores()
    for start in range(0, ids.shape[1], CHUNK):
        part = ids[:, start : start + CHUNK]
        reference = hf.run_cached(model, part, plain)
        scores.add(reference, hf.run_cached(step, part, packed), targets[:, start : start + CHUNK])
    return scores


def _options(method: Packed, inner: str) -> dict[str, Any]:
    scales = method.facts.balance if method.balanced else {}
    balance = {f"layers.{layer}": scale for layer, scale in scales.items()} if scales else "off"
    return {"preset": method.layout.spec, "inner": inner, "balance": balance}
