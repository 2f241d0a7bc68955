"""`kvarn demo`: one model with a plain and with a packed KV cache, compared by what can be measured in minutes.

`run` measures and returns a dictionary of figures, the keys of `kvarn demo --json`; demo_tables.py prints them.
"""

import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from kvarn.spec import DEFAULT_PRESET, HEAD_DIMS, preset_name, resolve
from kvarn_compile import hf, perplexity, picture, progress, report
from kvarn_compile.decode import Generated, greedy, stream, warm_up, writer
from kvarn_compile.hf_models import LoadedModel, cache_bytes, cache_tensors, open_model, static_cache, stepper

QUESTION = "Who is Emma Woodhouse, and how does she live?"
PARAGRAPHS = slice(4, 8)
"""Lines of the page that the question is about: a few tiles, so that what is generated reads packed records."""

CAPACITY = 1024
CHUNKS = 16
UPSTREAM, LOSSLESS = "upstream_k4v2_g128", "k16v16"


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        model: folder or hub id; None for SmolLM2-135M-Instruct.
        preset: format of the packed cache.
        tokens: new tokens to generate.
        out: folder for the picture.
        inner: what compiles the rewritten graph. With "eager" the plain model runs uncompiled, otherwise compiled by
            the same backend, so that the two are comparable.
    """

    model: str | None = None
    preset: str = DEFAULT_PRESET
    tokens: int = 64
    out: Path = Path(".")
    inner: str = "eager"


@dataclass(frozen=True)
class Generation:
    """A generated text, the bytes of the cache it was made with, and which attentions (by module) read a packed one."""

    prompt_tokens: int
    text: Generated
    cache_bytes: int
    packed: dict[str, bool]


def run(settings: Settings, say: Console) -> dict[str, Any]:
    """Measure, printing texts to `say` as they appear, and return the figures.

    Raises:
        SpecError, ModelError: for a preset or model that does not exist.
    """
    began, spec = time.perf_counter(), resolve(settings.preset)
    loaded = open_model(settings.model)
    say.print(f"After {PARAGRAPHS.stop - PARAGRAPHS.start} paragraphs of Jane Austen's Emma: {QUESTION}")
    plain = generate(loaded, settings, None, say)
    packed = generate(loaded, settings, preset_name(spec), say)
    scores, keys = score_page(loaded, [preset_name(spec), UPSTREAM, LOSSLESS], settings.inner)
    ours = scores[preset_name(spec)]
    fp16_bytes = sum(2 * t.numel() for t in cache_tensors(static_cache(loaded.model, CAPACITY)))
    return {
        "model": loaded.name, "preset": preset_name(spec), "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "inner": settings.inner, "threads": torch.get_num_threads(), "cpu": platform.machine(),
        "versions": {name: version(name) for name in ("kvarn-compile", "torch", "transformers")},
        "cache_tokens": CAPACITY, "cache_bytes_plain": plain.cache_bytes, "cache_bytes_packed": packed.cache_bytes,
        "cache_bytes_fp16": fp16_bytes, "attentions": len(packed.packed), "rewritten": sum(packed.packed.values()),
        "prompt_tokens": plain.prompt_tokens, "tokens_generated": len(plain.text.tokens),
        "tokens_same_start": common_start(plain.text.tokens, packed.text.tokens),
        "tokens_per_second_plain": plain.text.tokens_per_second,
        "tokens_per_second_packed": packed.text.tokens_per_second,
        "text_tokens": scores["plain"].choices.numel(), "tokens_agree": scores["plain"].agreement(ours),
        "ppl_plain": scores["plain"].perplexity, "ppl_packed": ours.perplexity,
        "ppl_upstream": scores[UPSTREAM].perplexity, "ppl_lossless": scores[LOSSLESS].perplexity,
        "picture": draw(keys, spec.group, loaded.name, settings.out), "seconds": time.perf_counter() - began,
    }


def generate(loaded: LoadedModel, settings: Settings, preset: str | None, say: Console) -> Generation:
    """Answer QUESTION on the page with a plain cache (preset None) or a packed one, streaming the text."""
    ids = loaded.prompt_ids("\n".join([*perplexity.page_text().splitlines()[PARAGRAPHS], QUESTION]))
    ids = ids[:, -(CAPACITY - settings.tokens) :]  # a coarse tokenizer's prompt is cut to what the cache holds
    model, cache = prepare(loaded, preset, settings.inner, CAPACITY)
    step = stepper(model, cache, logits_to_keep=1)
    with report.collecting() as graphs, progress.bar(f"{preset or 'plain'}: first calls"):
        warm_up(step, ids)
    cache.reset()
    say.print(f"\n[bold]{preset or 'plain'}[/bold]")
    tokens = stream(greedy(step, ids, settings.tokens, loaded.stop), loaded.tokenizer, writer(say))
    say.print()
    packed: dict[str, bool] = {}
    for row in (row for graph in graphs for row in graph.rows):
        packed[row.module] = packed.get(row.module, True) and row.rewritten
    return Generation(ids.shape[1], tokens, cache_bytes(cache), packed)


def prepare(loaded: LoadedModel, preset: str | None, inner: str, capacity: int) -> tuple[Any, Any]:
    """(model, cache of `capacity` positions): plain for preset None, else compiled with backend="kvarn"."""
    torch._dynamo.reset()
    if preset is None:
        model = loaded.model if inner == "eager" else torch.compile(loaded.model, backend=inner)
        return model, static_cache(loaded.model, capacity)
    model = torch.compile(loaded.model, backend="kvarn", options={"preset": preset, "inner": inner})
    return model, hf.empty_static_cache(loaded.model.config, 1, capacity, loaded.model.dtype)


def common_start(a: list[int], b: list[int]) -> int:
    """How many tokens two texts share before they first differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def score_page(loaded: LoadedModel, presets: list[str], inner: str) -> tuple[dict[str, perplexity.Score], list[Tensor]]:
    """Run the shipped page through the plain model and once more for each preset.

    Returns:
        Scores by name, "plain" and the presets; and the plain run's keys [1, H, CHUNK, D] of the last chunk, by layer.
    """
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    ids = perplexity.page_ids(loaded.tokenizer, min(CHUNKS, (limit or CAPACITY) // perplexity.CHUNK))
    length, scores, keys = ids.shape[1] - 1, {}, []
    for preset in (None, *dict.fromkeys(presets)):
        model, cache = prepare(loaded, preset, inner, max(CAPACITY, length))
        with progress.bar(f"{preset or 'plain'} on {length:,} tokens of Emma", length // perplexity.CHUNK) as advance:
            scores[preset or "plain"] = perplexity.score(stepper(model, cache), ids, advance)
        if preset is None:
            keys = [layer.keys[:, :, length - perplexity.CHUNK : length].clone() for layer in cache.layers
                    if layer.keys.shape[2] >= length]
    return scores, keys


def draw(keys: list[Tensor], group: int, name: str, out: Path) -> str | None:
    """Save the picture of the most uneven tile among keys [1, H, CHUNK, D], by layer; returns its path.

    None if no such tile exists, or it cannot be rotated.
    """
    if not keys or keys[0].shape[-1] not in HEAD_DIMS:
        return None
    layer, head = picture.most_uneven(keys)
    path = out / "kvarn_key_tile.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    views = picture.tile_views(keys[layer][0, head, :group])
    picture.save(views, f"{name}: keys of layer {layer}, KV head {head}", path)
    return str(path)

