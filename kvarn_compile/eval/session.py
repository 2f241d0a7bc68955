"""Attention over a stored past: one Session is one run of a model whose finished tiles went through a Method.

The model runs over consecutive chunks of one tile. Each chunk attends the earlier tiles as the method stored them and
its own tokens exactly, as in decoding; errors therefore accumulate through layers and time.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kvarn_compile.eval.methods.base import Method


class Attends(Protocol):
    """What a model's attention layers call instead of their own attention (kvarn_compile/eval/hf.py)."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """softmax(q K^T * scale) V of one chunk: q [B, Hq, n, D], k and v [B, H, n, D] its own tokens."""
        ...


@dataclass
class LayerError:
    """Sums of squares of one layer: of keys, values, attention outputs, and of their errors."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, exact: Tensor, approximate: Tensor) -> None:
        """Account for one tensor and its approximation."""
        self.sums[name] = self.sums.get(name, 0.0) + exact.square().sum()
        self.sums[name + "_error"] = self.sums.get(name + "_error", 0.0) + (exact - approximate).square().sum()

    def relative(self, name: str) -> float | None:
        """Relative squared error, or None if nothing was accounted."""
        return float(self.sums[name + "_error"] / self.sums[name].clamp_min(1e-30)) if name in self.sums else None


@dataclass
class Session:
    """The past of every layer of one run, [B, H, context, D] each, as `method` stored it.

    Attributes:
        method: what stores the tiles.
        context: positions to hold.
        probe: also account errors per layer; the attention output's in the last chunk only, as they take a second one.
        only: layers the method applies to; None for all. Others stay exact.
        sides: "kv", "k" or "v": what the method applies to.
    """

    method: Method
    context: int
    probe: bool = False
    only: frozenset[int] | None = None
    sides: str = "kv"
    errors: dict[int, LayerError] = field(default_factory=dict)
    _past: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _exact: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _start: int = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one chunk in one layer; then its tile is stored."""
        start, end = self._start, self._start + k.shape[2]
        if layer not in self._past:
            self._past[layer] = _buffers(k, self.context)
        past = self._past[layer]
        own = self.method.own(layer, k, v) if self._applies(layer) else (k, v)
        for buffer, x in zip(past, own, strict=True):
            buffer[:, :, start:end] = x
        out = grouped_attention(q, past[0][:, :, :end], past[1][:, :, :end], start, scale, window)
        if self.probe:
            self._probe(layer, q, k, v, out, scale, window)
        stored = self._stored(layer, k, v)
        for buffer, x in zip(past, stored, strict=True):
            buffer[:, :, start:end] = x
        if self.probe:
            error = self.errors.setdefault(layer, LayerError())
            error.add("k", k, stored[0])
            error.add("v", v, stored[1])
        return out

    @property
    def position(self) -> int:
        """Tokens seen."""
        return self._start

    def advance(self, tokens: int) -> None:
        """The model has seen one more chunk of `tokens` tokens."""
        self._start += tokens

    def _applies(self, layer: int) -> bool:
        return self.only is None or layer in self.only

    def _stored(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self._applies(layer):
            return k, v
        k_hat, v_hat = self.method.store(layer, k, v, self._start)
        return (k_hat if "k" in self.sides else k), (v_hat if "v" in self.sides else v)

    def _probe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float,
               window: int | None) -> None:
        start, end = self._start, self._start + k.shape[2]
        if layer not in self._exact:
            self._exact[layer] = _buffers(k, self.context)
        exact = self._exact[layer]
        for buffer, x in zip(exact, (k, v), strict=True):
            buffer[:, :, start:end] = x
        if end == self.context:
            better = grouped_attention(q, exact[0][:, :, :end], exact[1][:, :, :end], start, scale, window)
            self.errors.setdefault(layer, LayerError()).add("out", better, out)


@dataclass
class Recorder:
    """Plain causal attention that keeps every layer's queries and keys after RoPE, for balanced keys."""

    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of a whole sequence."""
        self.queries[layer], self.keys[layer], self.values[layer] = q, k, v
        return grouped_attention(q, k, v, 0, scale, window)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, window: int | None) -> Tensor:
    """Causal attention of queries at positions start, start + 1, ... over keys at 0..S-1; [B, Hq, n, D].

    q [B, Hq, n, D]; k, v [B, H, S, D]; a query sees the last `window` positions, its own included, or all before it.
    """
    tokens, groups = q.shape[2], q.shape[1] // k.shape[1]
    at = torch.arange(start, start + tokens, device=q.device)[:, None]
    key_at = torch.arange(k.shape[2], device=q.device)
    seen = key_at <= at
    if window is not None:
        seen &= key_at > at - window
    # The queries of a GQA group share their KV head: they become further rows of one attention.
    rows = q.unflatten(1, (k.shape[1], groups)).flatten(2, 3)
    out = torch.nn.functional.scaled_dot_product_attention(rows, k, v, seen.repeat(groups, 1), scale=scale)
    return out.unflatten(2, (groups, tokens)).flatten(1, 2)


def _buffers(x: Tensor, context: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], context, x.shape[3])
    return x.new_zeros(shape), x.new_zeros(shape)
