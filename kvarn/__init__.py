"""kvarn: the packed KV cache: format, quantizer, ops and kernels. Knows no compiler, no model library, no server."""

from kvarn.cache import PackedCache
from kvarn.errors import KVarnError, OwnershipError, PositionError, ShapeError, SpecError
from kvarn.layout import StoreLayout
from kvarn.spec import DEFAULT_PRESET, PRESETS, QuantSpec, resolve

__all__ = ["DEFAULT_PRESET", "PRESETS", "KVarnError", "OwnershipError", "PackedCache", "PositionError", "QuantSpec",
           "ShapeError", "SpecError", "StoreLayout", "resolve"]
