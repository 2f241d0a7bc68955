"""The attention backend: which layers it takes and what their cache looks like."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvarn.spec import PRESETS
from kvarn_compile.vllm.refusals import head_size
from kvarn_compile.vllm.settings import Settings


@dataclass(frozen=True)
class Engine:
    """What a layer knows of its engine: options, the dtype of keys and values, a block's padded size, if any."""

    settings: Settings
    dtype: torch.dtype
    page_bytes: int | None


class KVarnBackend(AttentionBackend):
    """Full attention over packed tiles, under vLLM's name CUSTOM."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto"]
    forward_includes_kv_cache_update: bool = True

    built_for: ClassVar[Engine] = Engine(Settings(PRESETS["k4v2_g128"]), torch.bfloat16, None)
    """The engine that builds its layers in this process: set by each layer (impl.py), for what vLLM asks without a
    config."""

    @staticmethod
    def get_name() -> str:
        """The name of the enum member the backend is registered under."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls():
        """The implementation of one layer."""
        from kvarn_compile.vllm.impl import KVarnImpl

        return KVarnImpl

    @staticmethod
    def get_builder_cls():
        """The builder of a step's metadata."""
        from kvarn_compile.vllm.metadata import TileMetadataBuilder

        return TileMetadataBuilder

    @classmethod
    def settings(cls) -> Settings:
        """Settings of the engine at hand."""
        config = get_current_vllm_config_or_none()
        return Settings.of(config.additional_config) if config is not None else cls.built_for.settings

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list:
        """One tile."""
        return [KVarnBackend.settings().spec.group]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """One tile and no multiple of it: a sequence's spare blocks are counted in tiles."""
        return block_size in (None, *cls.get_supported_kernel_block_sizes())

    @classmethod
    def customize_spec(cls, spec):
        """The packed spec of a full-attention layer."""
        from kvarn_compile.vllm.spec import TileSpec

        return TileSpec.of(spec, cls.settings().spec, cls.built_for.dtype, cls.built_for.page_bytes)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A layer's blocks one after the other, each dense; a block has one state, so both are the same bytes."""
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: which rows are decodes, and the sizes of launches, come from the host's query lengths."""
        return False

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        """The kernels need Ampere's asynchronous copies and bfloat16; a CPU has none to check."""
        return capability is None or capability.major >= 8

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """No: connectors move whole blocks by their tokens, and the unfinished tile's are elsewhere."""
        return False

    @classmethod
    def supports_combination(cls, head_size_: int, *args, **kwargs) -> str | None:
        """The reason why a layer's head size is refused, if it is."""
        return next(map(str, head_size(head_size_, cls.settings(), current_platform.device_type)), None)


class KVarnApart(KVarnBackend):
    """The same, of layers whose attention leaves the write to an op before it (fusion.py)."""

    forward_includes_kv_cache_update = False
