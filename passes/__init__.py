"""FX passes that move a KV cache from plain tensors to packed stores: `capture`, then `rewrite`.

This folder, passes/, is installed and imported as the package kvarn_passes.
"""

from .base import uuid
from .capture import Undo, capture
from .decision import BalanceSource, CacheAxes, Decision, Rewritten, StorePair
from .refusal import Reason, Refusal
from .rewrite import Rewrite, rewrite

__all__ = ["BalanceSource", "CacheAxes", "Decision", "Reason", "Refusal", "Rewrite", "Rewritten", "StorePair", "Undo",
           "capture", "rewrite", "uuid"]
