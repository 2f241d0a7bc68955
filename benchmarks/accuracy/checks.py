"""Tables that hold our measurement to something else: the compiled model, and maintained implementations of peers."""

import json
from pathlib import Path

from verdict import ENOUGH

from kvarn_compile.eval.report import markdown, number


def engines(folder: Path) -> str:
    """The compiled model beside the harness."""
    found = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/*.json")}
    if set(found) != {"harness", "compiled"}:
        return ""
    table = []
    for text, summaries in found["harness"]["results"].items():
        for name, s in summaries.items():
            other = found["compiled"]["results"][text][name]
            table.append((name, number(s["kl"]), number(other["kl"]), f"{s['ppl']:.4f}", f"{other['ppl']:.4f}"))
    about = found["harness"]
    return ("## The compiled model gives the same numbers\n\n`--engine compiled` runs the model through "
            "`torch.compile(backend=\"kvarn\")` over a static cache: packed records, CPU ops, no harness code in the "
            f"attention. {about['model']}, {about['context']} tokens. Where float32 rounding tips one code over, every "
            "later layer sees other numbers, so the two agree as two draws of the same rounding noise do; the lossless "
            "preset, which has none, agrees to float32.\n\n"
            + markdown(("preset", "KL, harness", "KL, compiled", "ppl, harness", "ppl, compiled"), table))


def libraries(results: Path) -> str:
    """Our peers beside transformers' QuantizedCache (cross_check.py)."""
    parts = []
    for path in sorted(results.glob("cross_check_*.json")):
        data = json.loads(path.read_text())
        table, apart = [], {}
        for case in data["cases"]:
            for text, ours in case["ours"].items():
                theirs = case["theirs"][text]
                table.append((f"{case['about']}, {text}", f"`{case['method']}`", f"{case['backend']}",
                              number(ours["kl"]), number(theirs["kl"]), f"{ours['ppl']:.3f}", f"{theirs['ppl']:.3f}"))
                apart.setdefault(case["about"], []).append(theirs["kl"] / ours["kl"] - 1)
        versions = ", ".join(" ".join(pair) for pair in data["versions"].items())
        same = [a for a, case in zip(apart.values(), data["cases"], strict=True) if case["backend"] == "quanto"]
        widest = max(abs(x) for ratios in same for x in ratios)
        parts.append(
            f"{data['model']}, {data['windows']} windows of {data['context']:,} tokens of each text, on the CPU; "
            f"{versions}.\n\n"
            + markdown(("method", "ours", "library", "KL, ours", "KL, library", "ppl, ours", "ppl, library"), table)
            + f"\nThe quanto backend is our KIVI and int4 per token at the same axes and groups: KL differs by at most "
            f"{100 * widest:.0f}%, quanto's scales being float32 and its history being rounded again with every tile. "
            "The other two are related, not equal: hqq searches its step and zero point for least error, where ours "
            "takes minimum and maximum; transformers' fp8 has one scale per tensor, set by the first chunk, where ours "
            "has scale 1.\n")
    return ("## Peers against maintained implementations\n\n`cross_check.py` runs transformers' `QuantizedCache` over "
            "the same windows in the same chunks, every backend on the CPU.\n\n" + "\n".join(parts)) if parts else ""


def encoders(results: Path) -> str:
    """What other choices of the encoder alone would change (encoders.py)."""
    found = {d["model"]: d for p in sorted(results.glob("encoders_*.json")) for d in [json.loads(p.read_text())]}
    if not found:
        return ""
    kl = {model: _over_texts(data) for model, data in found.items()}
    names = list(next(iter(found.values()))["choices"])
    table = [(name, *(f"{number(kl[m][name])} ({100 * (kl[m][name] / kl[m]['product'] - 1):+.0f}%)" for m in found))
             for name in names]
    table.append(("upstream with sink", *(number(kl[m]["upstream_k4v2_g128"]) for m in found)))
    first = next(iter(found.values()))
    positions = sum(t["product"]["positions"] for t in first["results"].values())
    return ("### 6. What the encoder alone could still win\n\nNot in the product: other choices by the encoder of the "
            f"same record, read by the same decoder (`encoders.py`; {positions:,} positions in windows of "
            f"{first['context']:,}, on {first['device']}{SMALL if positions < ENOUGH else ''}).\n\n"
            + markdown(("KL of k4v2, change", *found), table) + ENCODERS)


SMALL = ": a small sample, differences under 5% are noise"
ENCODERS = """
"key" keeps exactly the token whose key points least along the tile's mean key instead of the one of smallest |V|;
"blend" weighs both (argmin |V|^(1/2) / |u - mean u|^2, u the key over its rms); "refit" computes w again from the
codes; "steps" takes the best of three rounding steps per token.
"""


def _over_texts(data) -> dict[str, float]:
    texts = list(data["results"].values())
    return {name: sum(t[name]["kl"] for t in texts) / len(texts) for name in texts[0]}

