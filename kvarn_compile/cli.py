"""The command `kvarn`. Everything heavy is imported inside the commands, so that --help answers at once."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvarn_compile.eval.command import eval_command

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="KV caches in 4-bit keys and 2-bit values, through torch.compile(model, backend='kvarn').")

MODEL_HELP = "local model folder or hub id"
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
Preset = Annotated[str, typer.Option(help="format of the packed cache, e.g. k4v2_g128, k8v8_g128, k16v16 (lossless)")]
Inner = Annotated[str, typer.Option(help="what runs the rewritten graph: eager, aot_eager or inductor")]


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help=f"{MODEL_HELP}; default: SmolLM2-135M-Instruct")] = None,
    preset: Preset = "k4v2_g128",
    tokens: Annotated[int, typer.Option(min=1, max=800, help="new tokens to generate")] = 64,
    out: Annotated[Path, typer.Option(help="folder for the picture")] = Path("."),
    inner: Inner = "eager",
    as_json: Annotated[bool, typer.Option("--json", help="figures as JSON on stdout, all else on stderr")] = False,
):
    """Compare a model with a plain and with a packed KV cache, on this machine's CPU."""
    say = Console(stderr=as_json)
    with _reported():
        _check(preset, inner)
        from kvarn_compile import demo, demo_tables

        figures = demo.run(demo.Settings(model, preset, tokens, out, inner), say)
        demo_tables.show(figures, say)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="what to answer or to continue")],
    preset: Preset = "k4v2_g128",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="stop after this many tokens")] = 128,
    inner: Inner = "eager",
):
    """Generate greedily with a packed KV cache."""
    say = Console()
    with _reported():
        _check(preset, inner)
        from kvarn_compile import generation

        generation.run(model, prompt, preset, max_new_tokens, inner, say)


@app.command()
def explain(model: Model, preset: Preset = "k4v2_g128",
            as_json: Annotated[bool, typer.Option("--json", help="print as JSON")] = False):
    """Say, attention by attention, what would be packed and why not."""
    with _reported():
        _check(preset)
        from kvarn_compile import generation

        explanation = generation.explain_model(model, preset)
    typer.echo(explanation.to_json()) if as_json else Console().print(explanation)


@app.command()
def balance(model: Model, out: Annotated[Path, typer.Option(help="safetensors file to write")]):
    """Write key scales for options={"balance": FILE}, from one seeded pass over 1,024 random tokens."""
    with _reported():
        from kvarn_compile import balance_file

        layers = balance_file.write(model, out)
    typer.echo(f"{out}: key scales of {layers} layers")


app.command("eval")(eval_command)


def _check(preset: str, inner: str = "eager") -> None:
    """Refuse bad options before a model is loaded."""
    from kvarn_compile.options import Options

    Options.parse(options={"preset": preset, "inner": inner})


@contextmanager
def _reported() -> Iterator[None]:
    """Turn the errors a user can cause into one line on stderr and exit code 2."""
    from kvarn.errors import KVarnError

    try:
        yield
    except KVarnError as error:
        typer.secho(f"kvarn: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None
