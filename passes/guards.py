"""What a store can hold and where it can run: checks on one cache tensor."""

import torch
from torch import fx

from kvarn.errors import ShapeError
from kvarn.layout import StoreLayout
from kvarn.spec import QuantSpec

from .decision import CacheAxes
from .graph import refuse, sizes
from .refusal import Reason

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = ("cpu", "cuda")


def check_cache(cache: fx.Node, axes: CacheAxes, spec: QuantSpec) -> None:
    """Checks one cache input against the store's format.

    Raises:
        Refused: PARAMETER, DTYPE, DEVICE, GRAD, SYMBOLIC or HEAD_DIM.
    """
    value = cache.meta["val"]
    if _is_parameter(cache):
        raise refuse(Reason.PARAMETER, "the cache is a parameter, and a module's parameters cannot be packed away",
                     "keep caches in buffers (register_buffer)", cache)
    if value.dtype not in DTYPES:
        valid = ", ".join(map(str, DTYPES))
        raise refuse(Reason.DTYPE, f"the cache has dtype {value.dtype}", f"use one of {valid}", cache)
    if value.device.type not in DEVICES:
        raise refuse(Reason.DEVICE, f"the cache is on {value.device}", f"use one of {', '.join(DEVICES)}", cache)
    if value.requires_grad:
        raise refuse(Reason.GRAD, "the cache requires gradients", "run under torch.no_grad()", cache)
    heads, channels = sizes(cache)[axes.heads], sizes(cache)[axes.channels]
    if not (heads.is_Integer and channels.is_Integer):
        raise refuse(Reason.SYMBOLIC, f"heads={heads}, head_dim={channels} are unknown at compile time",
                     "compile with dynamic=None, so that only sizes that change are dynamic", cache)
    try:
        _ = StoreLayout(spec, int(channels), value.dtype).record_bytes
    except ShapeError as error:
        raise refuse(Reason.HEAD_DIM, f"head_dim={channels} has no packed format",
                     f"use preset 'k16v16', or a model whose head_dim is supported ({error})", cache) from None


def _is_parameter(cache: fx.Node) -> bool:
    """True if Dynamo took the input from a module's _parameters; only Dynamo's source on the placeholder tells."""
    source = getattr(cache, "_dynamo_source", None)
    return getattr(getattr(source, "base", None), "member", "") == "_parameters"
