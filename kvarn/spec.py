"""What a packed KV cache stores: bits, tile length and method, and the named presets."""

import re
from dataclasses import dataclass
from functools import lru_cache

from kvarn.errors import SpecError

FORMAT_VERSION = 2
"""Raised whenever older bytes would be read differently; part of every op call (QuantSpec.key)."""

HEAD_DIMS = (16, 32, 64, 128, 256)
"""Head dimensions a rotated record supports: powers of two, for the Sylvester-Hadamard rotation."""

_METHODS = ("kvarn", "upstream", "raw")
_KEY = re.compile(r"(kvarn|upstream|raw)(\d+):k(\d+)v(\d+)g(\d+)e(\d+)t(\d+)s(\d)")


@dataclass(frozen=True)
class QuantSpec:
    """How one tile (`group` consecutive tokens of one KV head) is stored.

    Attributes:
        k_bits: bits of one key element: 2, 3, 4 or 8; 16 with method "raw".
        v_bits: bits of one value element, likewise.
        group: tokens per tile, 64 or 128.
        method: "kvarn" (closed-form normalization, unbiased rounding: kvarn/closed.py), "upstream" (the iterative
            algorithm of arXiv 2606.03458 to the letter: kvarn/upstream.py) or "raw" (the cache's own bits).
        exact_rows: tokens of smallest value norm per tile that keep their key and value, at 8 bits an element (method
            "kvarn").
        tail_bits: bits of an element of the unfinished tile: 8 on average (keys 10, values 6, symmetric per token:
            kvarn/words.py) or 16 (the cache's own dtype).
        sink: the first tile of a sequence stays in the cache's own dtype (upstream's 128-token sink).

    Raises:
        SpecError: for a combination no record exists for.
    """

    k_bits: int
    v_bits: int
    group: int
    method: str = "kvarn"
    exact_rows: int = 1
    tail_bits: int = 8
    sink: bool = False

    def __post_init__(self):
        if self.method not in _METHODS:
            raise SpecError(f"method={self.method!r}; valid: {', '.join(_METHODS)}")
        bits = (16,) if self.method == "raw" else (2, 3, 4, 8)
        for side in ("k_bits", "v_bits"):
            if getattr(self, side) not in bits:
                raise SpecError(f"{side}={getattr(self, side)} with method {self.method!r}; valid: {bits}")
        if self.group not in (64, 128):
            raise SpecError(f"group={self.group}: a tile holds 64 or 128 tokens")
        if self.tail_bits not in (8, 16):
            raise SpecError(f"tail_bits={self.tail_bits}; valid: 8, 16")
        if not 0 <= self.exact_rows <= (8 if self.method == "kvarn" else 0):
            raise SpecError(f"exact_rows={self.exact_rows} with method {self.method!r}; valid: 0..8 ('kvarn') or 0")

    @property
    def rotated(self) -> bool:
        """True when the store's frame is Hadamard-rotated with balanced keys; False for the lossless method "raw"."""
        return self.method != "raw"

    @property
    def key(self) -> str:
        """The spec as the string that ops carry and compile caches hash, e.g. "kvarn2:k4v2g128e1t8s0"."""
        return (f"{self.method}{FORMAT_VERSION}:k{self.k_bits}v{self.v_bits}g{self.group}"
                f"e{self.exact_rows}t{self.tail_bits}s{int(self.sink)}")

    @staticmethod
    @lru_cache(maxsize=256)
    def from_key(key: str) -> "QuantSpec":
        """The spec a `key` stands for.

        Raises:
            SpecError: if it is no key, or one of another format version.
        """
        match = _KEY.fullmatch(key)
        if not match:
            raise SpecError(f"{key!r} is not a spec key such as {PRESETS['k4v2_g128'].key!r}")
        method, version, *numbers = match.groups()
        if int(version) != FORMAT_VERSION:
            raise SpecError(f"{key!r} is format {version}; this build reads format {FORMAT_VERSION}")
        k, v, g, e, t, s = map(int, numbers)
        return QuantSpec(k, v, g, method, e, t, bool(s))


PRESETS = {
    "k4v2_g128": QuantSpec(4, 2, 128),
    "k4v4_g128": QuantSpec(4, 4, 128),
    "k4v2_g64": QuantSpec(4, 2, 64),
    "k4v4_g64": QuantSpec(4, 4, 64),
    "k8v8_g128": QuantSpec(8, 8, 128),
    "k16v16": QuantSpec(16, 16, 128, "raw", exact_rows=0, tail_bits=16),
    "upstream_k4v2_g128": QuantSpec(4, 2, 128, "upstream", exact_rows=0, tail_bits=16, sink=True),
}
"""Named specs; each is also known with the prefix "kvarn_". Bytes of one token of one KV head, keys and values and
scales (a test holds this table to the layout), at head_dim 64, 128 and 256; plain float16 takes 256, 512 and 1,024:

    k4v2_g128            55.75   107.25   210.25
    k4v4_g128            72.75   140.25   275.25
    k4v2_g64             59.50   114.50   224.50
    k4v4_g64             76.50   147.50   289.50
    k8v8_g128           136.75   268.25   531.25
    k16v16              256.00   512.00  1024.00
    upstream_k4v2_g128   57.00   108.00   210.00
"""

DEFAULT_PRESET = "k4v2_g128"


def resolve(preset: "str | QuantSpec") -> QuantSpec:
    """The spec of a preset name (with or without the prefix "kvarn_"), or the spec itself.

    Raises:
        SpecError: for an unknown name, listing the known ones.
    """
    if isinstance(preset, QuantSpec):
        return preset
    spec = PRESETS.get(preset.removeprefix("kvarn_")) if isinstance(preset, str) else None
    if spec is None:
        raise SpecError(f"preset={preset!r} is unknown; valid: {', '.join(PRESETS)}")
    return spec


def preset_name(spec: QuantSpec) -> str:
    """The preset a spec is known by, else its key."""
    return next((name for name, known in PRESETS.items() if known == spec), spec.key)
