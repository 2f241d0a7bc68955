"""The command `kvarn eval`: options, progress, files. The measurement is harness.py's."""

from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_METHODS = "k4v2_g128,k4v4_g128,upstream_k4v2_g128,turboquant_4bit_nc,turboquant_3bit_nc,kivi_k4v2," \
                  "int4_per_token,fp8_e4m3"


def eval_command(
    model: Annotated[str, typer.Option(help="local model folder or hub id")],
    text: Annotated[list[Path], typer.Option(help="text file; may be repeated", exists=True, dir_okay=False)],
    methods: Annotated[str, typer.Option(help="methods, presets or spec keys, separated by commas; 'all' for every peer"
                                         )] = DEFAULT_METHODS,
    context: Annotated[int, typer.Option(min=128, help="tokens of a window, a multiple of 128")] = 4096,
    windows: Annotated[int, typer.Option(min=1, help="windows per text")] = 4,
    out: Annotated[Path, typer.Option(help="folder for JSON, plots and table")] = Path("kvarn-eval"),
    balance: Annotated[str, typer.Option(help="key scales from: random (tokens), weights or off")] = "random",
    engine: Annotated[str, typer.Option(help="harness, or compiled: torch.compile(backend='kvarn') runs our presets"
                                        )] = "harness",
    layer: Annotated[list[int] | None, typer.Option(help="quantize only this layer; may be repeated")] = None,
    keys_only: Annotated[bool, typer.Option("--keys-only", help="quantize keys only")] = False,
    values_only: Annotated[bool, typer.Option("--values-only", help="quantize values only")] = False,
    greedy: Annotated[int, typer.Option(min=0, help="also count equal greedy tokens of this many, a multiple of 128"
                                        )] = 0,
    probe: Annotated[bool, typer.Option(help="also report errors per layer (twice the memory)")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; 16 bits alone cost a KL of about 0.001"
                                       )] = "float32",
    seed: Annotated[int, typer.Option(help="shifts the windows; seeds the random tokens")] = 0,
):
    """Measure what a quantized KV cache costs a model, in decode regime over real text, against other methods."""
    from kvarn_compile.eval import run

    if keys_only and values_only:
        raise typer.BadParameter("--keys-only and --values-only exclude each other")
    for name, value, valid in (("engine", engine, ("harness", "compiled")), ("balance", balance, run.BALANCES),
                               ("dtype", dtype, ("float32", "float16", "bfloat16"))):
        if value not in valid:
            raise typer.BadParameter(f"--{name} {value}; valid: {', '.join(valid)}")
    settings: dict[str, Any] = {
        "texts": [path.stem for path in text], "windows": windows, "balance": balance, "engine": engine,
        "layers": sorted(layer) if layer else None, "sides": "k" if keys_only else "v" if values_only else "kv",
        "probe": probe, "dtype": dtype, "seed": seed, "greedy": greedy}
    run.run(model, text, methods, context, out, device, settings)
