"""What a user may pass to torch.compile(..., backend="kvarn", options={...}), checked before anything is compiled."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from kvarn.errors import SpecError
from kvarn.spec import DEFAULT_PRESET, PRESETS, QuantSpec, resolve

INNER = ("inductor", "aot_eager", "eager")
"""Backends the rewritten graph can be compiled with."""

_KEYS = ("preset", "balance", "inner", "inductor", "mode")


@dataclass(frozen=True)
class Options:
    """Checked options of one torch.compile call.

    Attributes:
        spec: the format of the packed caches.
        balance: "weights" (a key scale from the weights of a biased key projection, else none), "off", or the scales
            themselves: {"layers.0": [H, D], ...} float32. The number is the layer's in the model (the last number in
            its attention's module path), or, in a model without numbers, that of the packed cache in the graph.
        inner: the backend that compiles the rewritten graph, one of INNER.
        inductor: config patches for inductor, mode's included.
    """

    spec: QuantSpec
    balance: "str | Mapping[str, Tensor]" = "weights"
    inner: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(mode: str | None = None, options: Mapping[str, Any] | None = None) -> "Options":
        """The options of a `torch.compile(mode=mode, options=options)` call.

        Args:
            mode: an inductor mode such as "reduce-overhead" or "max-autotune".
            options: keys "preset" (name or QuantSpec), "balance" (also the path of a safetensors file), "inner",
                "inductor", and "mode", because torch.compile takes either a mode or options.

        Raises:
            SpecError: for an unknown key or value, naming the valid ones.
        """
        given = dict(options or {})
        for key in given:
            if key not in _KEYS:
                raise SpecError(unknown("option", key, _KEYS))
        preset = given.get("preset", DEFAULT_PRESET)
        if isinstance(preset, str) and preset.removeprefix("kvarn_") not in PRESETS:
            raise SpecError(unknown("preset", preset, PRESETS))
        inner = given.get("inner", "inductor")
        if inner not in INNER:
            raise SpecError(unknown("inner", inner, INNER))
        return Options(resolve(preset), _balance(given.get("balance", "weights")), inner,
                       _inductor(given.get("mode", mode), given.get("inductor", {}), inner))

    def balance_of(self, layer: int, heads: int, head_dim: int) -> Tensor | None:
        """The given key scale [H, D] of the layer's attention, None if it is not given as tensors.

        Raises:
            SpecError: if there is none for this layer, or its shape is another.
        """
        if isinstance(self.balance, str):
            return None
        scale = self.balance.get(f"layers.{layer}")
        if scale is None:
            raise SpecError(f"balance has no 'layers.{layer}'; it has: {', '.join(self.balance)}")
        if scale.shape != (heads, head_dim):
            raise SpecError(f"balance['layers.{layer}'] is {tuple(scale.shape)}; this model needs {(heads, head_dim)}")
        return scale


def unknown(what: str, value: object, valid: Iterable[str]) -> str:
    """The words for an unknown name, with the closest valid one if there is one."""
    valid = list(valid)
    close = get_close_matches(str(value), valid, 1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    return f"{what} {value!r} is unknown{guess} (valid: {', '.join(valid)})"


def _balance(value: Any) -> "str | Mapping[str, Tensor]":
    if isinstance(value, Mapping):
        scales = dict(value)
    elif value in ("weights", "off"):
        return value
    elif isinstance(value, (str, PathLike)):
        scales = _read_scales(value)
    else:
        raise SpecError(f"balance={value!r}; valid: 'weights', 'off', a dict of tensors, a safetensors file")
    for name, scale in scales.items():
        if not isinstance(scale, Tensor) or scale.ndim != 2:
            raise SpecError(f"balance[{name!r}] must be a tensor [KV heads, head_dim]")
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise SpecError(f"balance[{name!r}] has entries that are not positive and finite")
    return {name: scale.to(torch.float32) for name, scale in scales.items()}


def _read_scales(path: "str | PathLike[str]") -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SpecError(f"balance={str(path)!r} is neither 'weights', 'off' nor a readable safetensors file "
                        f"({error})") from error


def _inductor(mode: str | None, patches: Any, inner: str) -> dict[str, Any]:
    if not isinstance(patches, Mapping):
        raise SpecError(f"inductor={patches!r}; valid: a dict of inductor config patches")
    if inner != "inductor":
        if patches:
            raise SpecError(f"inductor={dict(patches)!r} needs inner='inductor', not {inner!r}")
        return {}  # a mode only tunes inductor
    from torch._inductor import config, list_mode_options

    modes = {}
    if mode and mode != "default":
        if mode not in list_mode_options():
            raise SpecError(unknown("mode", mode, list_mode_options()))
        modes = list_mode_options(mode)
    known = config.get_config_copy()
    for key in patches:
        if key not in known:
            close = get_close_matches(str(key), known, 3)
            raise SpecError(f"inductor option {key!r} is unknown" + (f"; close: {', '.join(close)}" if close else ""))
    return {**modes, **patches}
