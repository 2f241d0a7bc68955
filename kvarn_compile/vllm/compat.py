"""Everything that depends on vLLM's version: where kvarn hooks in, and the short form --kv-cache-dtype kvarn_<preset>.

Written for vLLM 0.32 (plugin.py lets no other in). What 0.33 needs is listed in docs/vllm.md.

Hooks: the backend is registered as CUSTOM; EngineArgs.create_engine_config translates the short form to the long one
and refuses what cannot work; EngineArgs.add_cli_args lists the short names; the CPU platform, which knows no backend
but its own, gives CUSTOM to layers that ask for it; between loading and repacking of the weights, keys are balanced and
writes are taken out of attention, if they are to be fused (fusion.py).
"""

import functools

import vllm.engine.arg_utils as arg_utils
import vllm.model_executor.model_loader.base_loader as base_loader
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from kvarn.errors import KVarnError
from kvarn.spec import PRESETS
from kvarn_compile.vllm import balance, fusion, refusals
from kvarn_compile.vllm.settings import KEY, Settings

BACKEND = "kvarn_compile.vllm.backend.KVarnBackend"
PREFIX = "kvarn_"
FULL = "full_attention"
"""vLLM's name for the only kind of layer that kvarn takes; the others get their backend as if kvarn were not there."""

def install() -> None:
    """Hook in, once per process."""
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    engine_args = arg_utils.EngineArgs
    if getattr(engine_args, "_kvarn_hooked", False):
        return
    engine_args._kvarn_hooked = True  # pyright: ignore[reportAttributeAccessIssue]
    engine_args.create_engine_config = _create_engine_config(engine_args.create_engine_config)
    engine_args.add_cli_args = staticmethod(_add_cli_args(engine_args.add_cli_args))
    base_loader.process_weights_after_loading = _process_weights(base_loader.process_weights_after_loading)
    _hook_cpu()


def _process_weights(original):
    @functools.wraps(original)
    def process_weights_after_loading(model, *args, **kwargs):
        balance.balance_from_weights(model)
        fusion.write_apart(model)
        return original(model, *args, **kwargs)

    return process_weights_after_loading


def _create_engine_config(original):
    @functools.wraps(original)
    def create_engine_config(self, *args, **kwargs):
        if str(self.kv_cache_dtype).startswith(PREFIX):
            _to_long_form(self)
        config = original(self, *args, **kwargs)
        if _asked(config):
            _prepare(config)
        return config

    return create_engine_config


def _asked(config) -> bool:
    chosen = config.attention_config.backend or config.attention_config.backend_per_kind.get(FULL)
    asked = isinstance(config.additional_config, dict) and KEY in config.additional_config
    if asked and chosen is not AttentionBackendEnum.CUSTOM:
        raise KVarnError(f"additional_config has {KEY!r} but the attention backend is {chosen}; say "
                         "--attention-backend CUSTOM too")
    if asked and not _ours():
        raise KVarnError(f"the attention backend CUSTOM is {AttentionBackendEnum.CUSTOM.get_path()} here, of another "
                         "plugin; choose one by VLLM_PLUGINS")
    return chosen is AttentionBackendEnum.CUSTOM and _ours()


def _ours() -> bool:
    return AttentionBackendEnum.CUSTOM.get_path() == BACKEND


def _to_long_form(args) -> None:
    """--kv-cache-dtype kvarn_<preset> as --attention-backend CUSTOM --additional-config {"kvarn": {"preset": ...}}."""
    if args.attention_backend not in (None, AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CUSTOM.name):
        raise KVarnError(f"kv_cache_dtype={args.kv_cache_dtype!r} brings its own attention backend; leave out "
                         f"attention_backend={args.attention_backend!r}")
    if not isinstance(args.additional_config, dict):
        raise KVarnError(f"kv_cache_dtype={args.kv_cache_dtype!r} needs additional_config to be a dictionary; or use "
                         "the long form: attention_backend='CUSTOM' and additional_config")
    own = {**args.additional_config.get(KEY, {}), "preset": args.kv_cache_dtype.removeprefix(PREFIX)}
    args.additional_config = {**args.additional_config, KEY: own}
    args.kv_cache_dtype, args.attention_backend = "auto", AttentionBackendEnum.CUSTOM


def _prepare(config) -> None:
    """Check the config; give kvarn the full-attention layers and their block size, and nothing else."""
    settings, attention = Settings.of(config.additional_config), config.attention_config
    refusals.check(config, settings)
    balance.check(settings, config)
    fusion.prepare(config, settings)
    attention.backend_per_kind = attention.backend_per_kind | {FULL: AttentionBackendEnum.CUSTOM}
    attention.backend = None
    config.cache_config.block_size, config.cache_config.user_specified_block_size = settings.spec.group, True


def _add_cli_args(original):
    @functools.wraps(original)
    def add_cli_args(parser):
        parser = original(parser)
        for action in parser._actions:
            if "--kv-cache-dtype" in action.option_strings and action.choices is not None:
                action.choices = [*action.choices, *(PREFIX + name for name in PRESETS)]
        return parser

    return add_cli_args


def _hook_cpu() -> None:
    """The CPU platform hands out CPU_ATTN whatever is asked for; let it hand out CUSTOM when asked."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.get_attn_backend_cls.__func__

    @functools.wraps(original)
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        if selected_backend is not AttentionBackendEnum.CUSTOM or not _ours():
            return original(cls, selected_backend, attn_selector_config, num_heads)
        reasons = AttentionBackendEnum.CUSTOM.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise KVarnError(f"kvarn cannot take this layer: {'; '.join(reasons)}")
        return BACKEND

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
