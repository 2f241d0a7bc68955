"""What a run's logits say against the unquantized run's, per position, and the summary of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_ROWS = 1024
BINS = 16
"""Parts of the context over which KL is reported: drift with the position shows there."""


@dataclass
class Scores:
    """Per-position results of one method over windows of one text: lists of [B, n], one per chunk."""

    kl: list[Tensor] = field(default_factory=list)
    nll: list[Tensor] = field(default_factory=list)
    agree: list[Tensor] = field(default_factory=list)

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """One chunk: logits [B, n, vocabulary] of both runs, targets [B, n] (-1: there is no next token)."""
        shape = targets.shape
        flat = (reference.flatten(0, 1), logits.flatten(0, 1), targets.flatten())
        parts = [_compare(r, x, t) for r, x, t in zip(*(x.split(_ROWS) for x in flat), strict=True)]
        for name, values in zip(("kl", "nll", "agree"), zip(*parts, strict=True), strict=True):
            getattr(self, name).append(torch.cat(values).view(shape).cpu())

    def summary(self, rows: slice = slice(None)) -> dict[str, Any]:
        """Of some windows: perplexity, KL (mean, 99th percentile, by window and by position), top-1 agreement."""
        kl, nll, agree = (torch.cat(x, 1)[rows].double() for x in (self.kl, self.nll, self.agree))
        known = nll[~nll.isnan()]
        bins = min(BINS, kl.shape[1])
        return {"ppl": known.mean().exp().item(), "kl": kl.mean().item(), "kl_p99": kl.flatten().quantile(0.99).item(),
                "top1": agree.mean().item(), "kl_windows": kl.mean(1).tolist(),
                "kl_bins": [part.mean().item() for part in kl.tensor_split(bins, 1)], "positions": kl.numel()}


def _compare(reference: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(reference || method) in nats, negative log likelihood of the target (NaN: none), same most likely token."""
    p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    nll = -q.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    return kl, nll.masked_fill(targets < 0, torch.nan), (p.argmax(-1) == q.argmax(-1)).float()
