"""A picture of one key tile: as the model makes it, after the rotation, and after normalization."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvarn.hadamard import rotate


@dataclass(frozen=True)
class TileViews:
    """One key tile [G, D] in three states, float32: plain, rotated, and normalized to 0..1 per channel."""

    plain: Tensor
    rotated: Tensor
    normalized: Tensor


def tile_views(tile: Tensor) -> TileViews:
    """The states of keys [G, D] of one head on their way to codes, as in kvarn/closed.py.

    Rotated: times the Hadamard matrix. Normalized: each token over its rms, then each channel from its smallest to its
    largest value over the tile: times 15 and rounded, these are the 4-bit codes.
    """
    plain = tile.float()
    rotated = rotate(plain)
    unit = rotated / rotated.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    low, high = unit.amin(0), unit.amax(0)
    return TileViews(plain, rotated, (unit - low) / (high - low).clamp_min(1e-30))


def most_uneven(keys: list[Tensor]) -> tuple[int, int]:
    """(layer, head) of the tile, among keys [1, H, G, D] by layer, whose largest channel stands out most.

    Measured as the rms of the largest channel over that of the median channel.
    """
    rms = torch.cat([k[0].float().square().mean(1).sqrt() for k in keys])
    at = int((rms.amax(-1) / rms.median(-1).values).argmax())
    return at // keys[0].shape[1], at % keys[0].shape[1]


def save(views: TileViews, title: str, path: Path) -> None:
    """Draw the three states side by side into a PNG: tokens downwards, channels across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    limit = float(views.plain.abs().max())
    panels = (("keys after RoPE", views.plain, -limit, limit, "RdBu_r", "key"),
              ("rotated", views.rotated, -limit, limit, "RdBu_r", "key"),
              ("normalized: token rms, channel range", views.normalized, 0, 1, "viridis", "code / 15"))
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 5.2), layout="constrained")
    for axis, (name, tile, low, high, colors, unit) in zip(axes, panels, strict=True):
        image = axis.imshow(tile.numpy(), cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        axis.set(title=name, xlabel="channel")
        figure.colorbar(image, ax=axis, label=unit, shrink=0.8)
    axes[0].set_ylabel("token of the tile")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
