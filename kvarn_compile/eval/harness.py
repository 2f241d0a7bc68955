"""Running a model over windows of text in decode regime, all methods in lock-step with the unquantized run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvarn.errors import ShapeError
from kvarn_compile.eval.hf import model_shape, run_chunk
from kvarn_compile.eval.methods import UNQUANTIZED
from kvarn_compile.eval.methods.base import Facts, Method
from kvarn_compile.eval.metrics import Scores
from kvarn_compile.eval.session import Session

CHUNK = 128
"""Tokens the model reads at once: one tile."""


@torch.no_grad()
def evaluate(model: Any, texts: Mapping[str, Tensor], methods: Sequence[Method], *, probe: bool = False,
             only: frozenset[int] | None = None, sides: str = "kv",
             progress: Callable[[], None] = lambda: None) -> dict[str, dict[str, dict[str, Any]]]:
    """Summaries (metrics.py) by text and method name, the unquantized run's among them.

    Args:
        model: from hf.load_model.
        texts: windows of tokens [B, context] by text; context a multiple of CHUNK, the same for all.
        methods: what to compare with the unquantized model.
        probe, only, sides: see Session; with `probe` a summary also has the errors per layer, over all texts.
        progress: called after every chunk of every method.

    Raises:
        ShapeError: for windows of another length.
    """
    ids = torch.cat(list(texts.values()))
    context = ids.shape[1]
    if context % CHUNK:
        raise ShapeError(f"windows of {context} tokens; valid: multiples of {CHUNK}")
    exact = Session(Method(UNQUANTIZED, Facts(model_shape(model))), context)
    sessions = [Session(method, context, probe, only, sides) for method in methods if method.name != UNQUANTIZED]
    runs = [exact, *sessions]
    scores = [Scores() for _ in runs]
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1)
    for start in range(0, context, CHUNK):
        part = ids[:, start : start + CHUNK]
        reference = run_chunk(model, part, start, exact)
        for session, score in zip(runs, scores, strict=True):
            logits = reference if session is exact else run_chunk(model, part, start, session)
            session.advance(CHUNK)
            score.add(reference, logits, targets[:, start : start + CHUNK])
            progress()
    return {text: {session.method.name: score.summary(rows) | _about(session, context, probe)
                   for session, score in zip(runs, scores, strict=True)} for text, rows in _rows(texts).items()}


def _rows(texts: Mapping[str, Tensor]) -> dict[str, slice]:
    """Where each text's windows lie in the batch."""
    rows, begin = {}, 0
    for text, windows in texts.items():
        rows[text] = slice(begin, begin := begin + len(windows))
    return rows


def _about(session: Session, context: int, probe: bool) -> dict[str, Any]:
    """Bits per element, and relative squared errors of keys, values and attention outputs by layer."""
    about: dict[str, Any] = {"bits": session.method.bits(context), "source": session.method.source}
    if probe and session.errors:
        about["layers"] = {name: [session.errors[layer].relative(name) for layer in sorted(session.errors)]
                           for name in ("k", "v", "out")}
    return about
