"""The methods `kvarn eval` knows, by name."""

import re
from collections.abc import Callable
from dataclasses import replace

from kvarn.errors import SpecError
from kvarn.spec import PRESETS, QuantSpec
from kvarn_compile.eval.methods.base import Facts, Method
from kvarn_compile.eval.methods.kivi import Kivi
from kvarn_compile.eval.methods.packed import Packed
from kvarn_compile.eval.methods.per_token import Float8, Int4
from kvarn_compile.eval.methods.rotated import Rotated
from kvarn_compile.eval.methods.turboquant import TurboQuant

UNQUANTIZED = "unquantized"

_PEERS: dict[str, Callable[[str, Facts], Method]] = {
    UNQUANTIZED: Method,
    "quarot_k4v2": lambda name, facts: Rotated(name, facts, 4, 2),
    "quarot_k4v4": lambda name, facts: Rotated(name, facts, 4, 4),
    "kivi_k4v2": lambda name, facts: Kivi(name, facts, 4, 2),
    "kivi_k4v4": lambda name, facts: Kivi(name, facts, 4, 4),
    "kivi_k2v2": lambda name, facts: Kivi(name, facts, 2, 2),
    "turboquant_k8v4": lambda name, facts: TurboQuant(name, facts, 8, 4),
    "turboquant_4bit_nc": lambda name, facts: TurboQuant(name, facts, 4, 4),
    "turboquant_k3v4_nc": lambda name, facts: TurboQuant(name, facts, 3, 4),
    "turboquant_3bit_nc": lambda name, facts: TurboQuant(name, facts, 3, 3),
    "turboquant_3bit_nc_skip": lambda name, facts: TurboQuant(name, facts, 3, 3, skip=True),
    "int4_per_token": Int4,
    "fp8_e4m3": Float8,
}
PEERS = tuple(_PEERS)
_BITS = re.compile(r"(upstream_)?k(\d)v(\d)_g(\d+)")


def make(name: str, facts: Facts) -> Method:
    """The method called `name`: a preset, any other k<bits>v<bits>_g<tokens>, a QuantSpec.key, or a peer.

    All but a peer may carry suffixes: "+unbalanced" (no balanced keys), "+fp16tail", "+tailread" (the unfinished tile
    is read from the tail), "+nosink" (upstream's without its sink).

    Raises:
        SpecError: for an unknown name.
    """
    if name in _PEERS:
        return _PEERS[name](name, facts)
    base, *suffixes = name.split("+")
    spec = PRESETS.get(base.removeprefix("kvarn_")) or _from_bits(base) or _from_key(base)
    unknown = set(suffixes) - {"unbalanced", "fp16tail", "tailread", "nosink"}
    if spec is None or unknown:
        raise SpecError(f"method={name!r}; valid: {', '.join([*PRESETS, *PEERS])}, or a spec key")
    if "fp16tail" in suffixes:
        spec = replace(spec, tail_bits=16)
    if "nosink" in suffixes:
        spec = replace(spec, sink=False)
    # Balanced keys are ours; upstream's algorithm does without.
    balanced = spec.method == "kvarn" and "unbalanced" not in suffixes
    return Packed(name, facts, spec, balanced, "tailread" in suffixes)


def _from_bits(name: str) -> QuantSpec | None:
    """The spec of a name formed like a preset's: ours, or with the prefix "upstream_" upstream's."""
    match = _BITS.fullmatch(name)
    if not match:
        return None
    like = PRESETS["upstream_k4v2_g128" if match[1] else "k4v2_g128"]
    try:
        return replace(like, k_bits=int(match[2]), v_bits=int(match[3]), group=int(match[4]))
    except SpecError:
        return None


def _from_key(key: str) -> QuantSpec | None:
    try:
        return QuantSpec.from_key(key)
    except SpecError:
        return None
