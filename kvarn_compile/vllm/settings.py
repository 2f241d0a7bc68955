"""What a user asked of kvarn in vLLM: the "kvarn" entry of --additional-config, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvarn.errors import SpecError
from kvarn.spec import DEFAULT_PRESET, QuantSpec, resolve

KEY = "kvarn"
"""The name of our entry in vLLM's additional_config."""

WEIGHTS, OFF = "weights", "off"
OPTIONS = "preset, balance, fuse_rope"


@dataclass(frozen=True)
class Settings:
    """Options of one engine.

    Attributes:
        spec: what a tile stores.
        balance: where key scales come from: WEIGHTS, OFF, or a safetensors file that `kvarn balance` wrote.
        fuse_rope: whether to make one op of RoPE and the cache write, in a compiled model (fusion.py).
    """

    spec: QuantSpec
    balance: str = WEIGHTS
    fuse_rope: bool = False

    @staticmethod
    def of(additional_config: Any) -> "Settings":
        """The settings in vLLM's additional_config; the default preset where it says nothing.

        Raises:
            SpecError: for an unknown preset or option, listing the known ones.
        """
        options = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(options, Mapping):
            raise SpecError(f"additional_config[{KEY!r}] is {options!r}; valid: a mapping with {OPTIONS}")
        unknown = sorted(set(options) - set(OPTIONS.split(", ")))
        if unknown:
            raise SpecError(f"additional_config[{KEY!r}] has {', '.join(unknown)}; valid: {OPTIONS}")
        balance = options.get("balance", WEIGHTS)
        if not isinstance(balance, str):
            raise SpecError(f"balance={balance!r}; valid: {WEIGHTS!r}, {OFF!r} or the path of a safetensors file")
        fuse_rope = options.get("fuse_rope", False)
        if not isinstance(fuse_rope, bool):
            raise SpecError(f"fuse_rope={fuse_rope!r}; valid: true, false")
        return Settings(resolve(options.get("preset", DEFAULT_PRESET)), balance, fuse_rope)
