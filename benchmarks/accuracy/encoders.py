"""What the encoder alone could still win: same record, same decoder, other choices. Real bytes, the product's decode.

    python encoders.py PIECES OUT MODEL... [--context 4096] [--windows 4] [--device cuda]

    exact    the token kept exactly is the one of smallest |V| (the product), or the one whose key points least along
             the tile's mean key:  argmin_t <u_t, mean_s u_s>,  u = K / kt;  or a blend of both:
             argmin_t |V_t|^(1/2) / |u_t - mean_s u_s|^2
    refit    w after the codes:  w[t] = <V[t] - c[t] vt[t], m> / <m, m>
    steps    per token the best of three rounding steps, 0.9, 1 and 1.1 of the Gaussian one:  max <Z, c>^2 / <c, c>
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from carried import load
from torch import Tensor

from kvarn import closed
from kvarn.layout import StoreLayout
from kvarn.packing import pack_values
from kvarn.quantize import decode
from kvarn.spec import PRESETS
from kvarn_compile.eval import calibrate, harness, hf
from kvarn_compile.eval.methods import make
from kvarn_compile.eval.methods.base import Facts
from kvarn_compile.eval.methods.packed import Packed


@dataclass(frozen=True)
class Choice:
    """One encoder; the defaults are the product's."""

    exact: str = "value"
    refit: bool = False
    steps: tuple[float, ...] = (1.0,)


CHOICES = {"product": Choice(), "exact: key": Choice("key"), "exact: blend": Choice("blend"),
           "refit, steps": Choice("value", True, (1.0, 0.9, 1.1)),
           "exact: blend, refit, steps": Choice("blend", True, (1.0, 0.9, 1.1)),
           "exact: key, refit, steps": Choice("key", True, (1.0, 0.9, 1.1))}


class Tried(Packed):
    """k4v2_g128 as another encoder writes it."""

    source = "benchmarks/accuracy/encoders.py"

    def __init__(self, name: str, facts: Facts, choice: Choice):
        super().__init__(name, facts, PRESETS["k4v2_g128"])
        self.choice = choice

    def store(self, layer, k, v, start):
        group, balance = self.layout.spec.group, self.balance(layer, k.shape[1], k)
        tiles = (x.unflatten(2, (-1, group)) for x in self._through_tail(*self._in(k, v, balance)))
        k_hat, v_hat = decode(encode(*tiles, self.layout, self.choice), self.layout)
        return self._out(k_hat.flatten(2, 3), v_hat.flatten(2, 3), balance)


def encode(k: Tensor, v: Tensor, layout: StoreLayout, choice: Choice) -> Tensor:
    """kvarn.closed.encode under a choice."""
    record = k.new_zeros((*k.shape[:-2], layout.record_bytes), dtype=torch.uint8)
    at = rank(k, v, choice.exact).topk(layout.spec.exact_rows, -1, largest=False).indices
    closed._encode_exact(k, v, at, record, layout)
    closed._encode_keys(k, at, record, layout)
    closed._encode_values(v, v.square().sum(-1), at, record, layout)
    if choice.refit or len(choice.steps) > 1:
        values(v, at, record, layout, choice)
    return record


def rank(k: Tensor, v: Tensor, exact: str) -> Tensor:
    """The number [..., G] whose least token is kept exactly."""
    norm = v.square().sum(-1)
    if exact == "value":
        return norm
    u = k / k.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    mean = u.mean(-2, keepdim=True)
    if exact == "key":
        return (u * mean).sum(-1)
    return norm.pow(0.25) / (u - mean).square().sum(-1).clamp_min(1e-30)


def values(v: Tensor, at: Tensor, record: Tensor, layout: StoreLayout, choice: Choice) -> None:
    """Write codes, vt and w again; m stays."""
    f, half = layout.record, (2**layout.spec.v_bits - 1) / 2
    _, w, m = closed.value_scales(record, layout)
    z = v - w[..., None] * m[..., None, :]
    step, best, codes = closed._value_step(z, layout.spec.v_bits).clamp_min(1e-30), None, None
    for factor in choice.steps:
        c = (z / (step * factor)).floor().add(0.5).clamp(-half, half)
        fit = (z * c).sum(-1, keepdim=True).square() / c.square().sum(-1, keepdim=True)
        codes = c if best is None else torch.where(fit > best, c, codes)
        best = fit if best is None else torch.maximum(fit, best)
    gain = z.square().sum(-1) / (z * codes).sum(-1).clamp_min(1e-30)
    f["v_codes"].of(record).copy_(pack_values(codes + half, layout.spec.v_bits))
    put(gain.scatter(-1, at, 0), "vt", 0, record, layout)
    if choice.refit:
        vt = closed.value_scales(record, layout)[0]
        rest = ((v - codes * vt[..., None]) @ m[..., None])[..., 0]
        put((rest / m.square().sum(-1, keepdim=True).clamp_min(1e-30)).scatter(-1, at, 0), "w", 1, record, layout)


def put(x: Tensor, name: str, unit_at: int, record: Tensor, layout: StoreLayout) -> None:
    scaled, unit = closed._scaled(x)
    closed._set_e4m3(layout.record[name].of(record), scaled)
    layout.record["scalars"].of(record)[..., unit_at : unit_at + 1] = unit


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    for name in args.models:
        model, windows = load(args.pieces, name, args.device)
        texts = {t: windows[f"{t}_{args.context}"][: args.windows].to(args.device) for t in ("wiki", "novels")}
        facts = Facts(hf.model_shape(model), calibrate.from_random(model, args.device))
        methods = [make("upstream_k4v2_g128", facts), *(Tried(n, facts, choice) for n, choice in CHOICES.items())]
        data = {"model": name, "context": args.context, "device": args.device,
                "choices": {n: asdict(choice) for n, choice in CHOICES.items()}, "results": {t: {} for t in texts}}
        for method in methods:  # one at a time: a session holds a whole cache
            for t, found in harness.evaluate(model, texts, [method]).items():
                data["results"][t] |= found
            kl = {t: round(found[method.name]["kl"], 5) for t, found in data["results"].items()}
            print(name, method.name, kl, flush=True)
        (args.out / f"encoders_{name}.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
