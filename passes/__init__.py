"""FX passes that move a KV cache from plain tensors to packed stores: `capture`, then `rewrite`."""

from .base import uuid
from .capture import Undo, capture
from .decision import BalanceSource, CacheAxes, Decision, Rewritten, StorePair
from .refusal import Reason, Refusal
from .rewrite import Rewrite, rewrite

__all__ = ["BalanceSource", "CacheAxes", "Decision", "Reason", "Refusal", "Rewrite", "Rewritten", "StorePair", "Undo",
           "capture", "rewrite", "uuid"]
