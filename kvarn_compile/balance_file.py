"""`kvarn balance`: key scales of a whole model as a safetensors file, which options={"balance": FILE} reads."""

from pathlib import Path

from safetensors.torch import save_file

from kvarn_compile import progress
from kvarn_compile.errors import ModelError
from kvarn_compile.eval import calibrate
from kvarn_compile.eval.hf import adopt
from kvarn_compile.hf_models import open_model


def write(name: str, out: Path) -> int:
    """Write {"layers.0": [KV heads, head_dim], ...} float32 to `out`; returns how many layers there are.

    Raises:
        ModelError: for a model that cannot be read, or a file that cannot be written.
    """
    loaded = open_model(name)
    with progress.bar(f"one pass over {calibrate.RANDOM_TOKENS:,} random tokens"):
        scales = calibrate.from_random(adopt(loaded.model), "cpu")
    try:
        save_file({f"layers.{layer}": scale.contiguous() for layer, scale in sorted(scales.items())}, out)
    except OSError as error:
        raise ModelError(f"{out} cannot be written: {error}") from error
    return len(scales)
