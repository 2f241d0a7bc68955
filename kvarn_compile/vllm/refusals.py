"""What kvarn refuses at start-up, each with its reason and what to do instead."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch

import kvarn.paged_ops  # noqa: F401  (defines the ops)
from kvarn.device import check_head_dim, check_spec
from kvarn.errors import KVarnError, ShapeError, SpecError
from kvarn.paged_layout import PagedLayout
from kvarn.spec import HEAD_DIMS
from kvarn_compile.vllm.settings import Settings


class Reason(Enum):
    """Why an engine cannot keep its KV cache packed."""

    MLA = "MLA"
    ENCODER = "encoder"
    HYBRID = "hybrid model"
    SLIDING_WINDOW = "sliding window"
    HEAD_SIZE = "head size"
    CACHE_DTYPE = "kv cache dtype"
    PRESET = "preset"
    BLOCK_SIZE = "block size"
    KV_CONNECTOR = "KV connector"
    CONTEXT_PARALLEL = "context parallel"
    SPECULATION = "speculative decoding"
    BIAS = "attention bias"
    KV_SHARING = "KV sharing"
    DEVICE = "device"


@dataclass(frozen=True)
class Refusal:
    """One reason, in words, and what would make it work."""

    reason: Reason
    message: str
    instead: str

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.message}; {self.instead}"


class UnsupportedEngine(KVarnError, ValueError):
    """An engine that kvarn refuses; `refusals` holds why."""

    def __init__(self, refusals: list[Refusal]):
        super().__init__("kvarn cannot serve this configuration. " + " | ".join(map(str, refusals)))
        self.refusals = refusals


STOCK = "serve it without kvarn"


def check(config, settings: Settings) -> None:
    """Refuse a VllmConfig as a whole, with every reason there is.

    Raises:
        UnsupportedEngine: if there is one.
    """
    device = config.device_config.device_type
    refusals = [*_model(config.model_config, settings, device), *_preset(settings, device), *_serving(config),
                *_speculation(config, settings), *_block_size(config, settings)]
    if refusals:
        raise UnsupportedEngine(refusals)


def _model(model, settings: Settings, device: str) -> Iterator[Refusal]:
    """Of a ModelConfig: the target's, or that of a model that drafts for it."""
    if model.use_mla:
        yield Refusal(Reason.MLA, "latent attention has no keys and values per head to pack", STOCK)
    if model.is_encoder_decoder or model.runner_type not in ("generate", "draft"):
        yield Refusal(Reason.ENCODER, "only causal attention over a decoder's own tokens is packed", STOCK)
    if model.is_hybrid:
        yield Refusal(Reason.HYBRID, "state-space layers share pages with packed tiles: not proven yet", STOCK)
    windows = model.get_sliding_window() is not None
    if windows and "full_attention" not in (getattr(model.hf_text_config, "layer_types", None) or ()):
        yield Refusal(Reason.SLIDING_WINDOW, "every layer has a window, and windows stay in vLLM's own format", STOCK)
    yield from head_size(model.get_head_size(), settings, device)


def has_window(config) -> bool:
    """True if some layers attend a sliding window: they stay in vLLM's own format, beside packed ones."""
    return config.model_config.get_sliding_window() is not None


def head_size(size: int, settings: Settings, device: str) -> Iterator[Refusal]:
    """The refusal of one layer's head size on a device of this type, if any."""
    instead = "use preset k16v16, or " + STOCK
    if not settings.spec.rotated:
        return
    if size not in HEAD_DIMS:
        yield Refusal(Reason.HEAD_SIZE, f"{size} channels cannot be rotated; valid: {HEAD_DIMS}", instead)
    elif device == "cuda":
        try:
            check_head_dim(size, settings.spec)
        except ShapeError as error:
            yield Refusal(Reason.HEAD_SIZE, str(error), instead)


def _preset(settings: Settings, device: str) -> Iterator[Refusal]:
    if settings.spec.sink:
        yield Refusal(Reason.PRESET, f"{settings.spec.key} keeps a sequence's first tile in 16 bits, for which a paged "
                      "cache has no place", "use k4v2_g128")
    elif device == "cuda" and settings.spec.rotated:
        try:
            check_spec(settings.spec)
        except SpecError as error:
            yield Refusal(Reason.PRESET, str(error), "use k4v2_g128")


def _serving(config) -> Iterator[Refusal]:
    cache, parallel = config.cache_config, config.parallel_config
    device = config.device_config.device_type
    if not torch._C._dispatch_has_kernel_for_dispatch_key("kvarn::attend_paged", device.upper()):
        yield Refusal(Reason.DEVICE, f"the paged ops have no implementation for {device!r}", STOCK)
    if cache.cache_dtype != "auto":
        yield Refusal(Reason.CACHE_DTYPE, f"kv_cache_dtype={cache.cache_dtype!r} beside kvarn's own format",
                      "leave it at 'auto' and choose a preset")
    if config.kv_transfer_config is not None or cache.kv_offloading_size is not None:
        yield Refusal(Reason.KV_CONNECTOR, "it moves whole blocks by their tokens and would lose the unfinished tile",
                      "drop the connector or kvarn")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield Refusal(Reason.CONTEXT_PARALLEL, "tokens of one tile would lie on several ranks",
                      "use tensor parallelism")


def _speculation(config, settings: Settings) -> Iterator[Refusal]:
    speculative, device = config.speculative_config, config.device_config.device_type
    if speculative is None:
        return
    models = [config.model_config]
    if speculative.method == "draft_model":
        models.append(speculative.draft_model_config)
        yield from _model(models[1], settings, device)
    elif speculative.method != "ngram":
        yield Refusal(Reason.SPECULATION, f"method {speculative.method!r} is not proven yet",
                      "use ngram or a draft model")
    sizes = [model.get_head_size() for model in models]
    if settings.spec.sink or any(any(head_size(size, settings, device)) for size in sizes):
        return  # refused already: there is no page
    page = min(PagedLayout(settings.spec, size, torch.bfloat16).page for size in sizes)
    if speculative.num_speculative_tokens >= page:
        yield Refusal(Reason.SPECULATION, f"{speculative.num_speculative_tokens} draft tokens, of which a rejection "
                      f"may take back more than the {page} tokens a page keeps", f"use at most {page - 1}")
    if any(model.get_sliding_window() is not None for model in models[1:]):
        yield Refusal(Reason.SPECULATION, "a draft model with sliding windows is not proven yet",
                      "use one without, or ngram")


def _block_size(config, settings: Settings) -> Iterator[Refusal]:
    cache, group = config.cache_config, settings.spec.group
    if cache.user_specified_block_size and cache.block_size != group:
        yield Refusal(Reason.BLOCK_SIZE, f"--block-size {cache.block_size}, but a block is a tile of {group} tokens",
                      f"leave it out, or say {group}")
