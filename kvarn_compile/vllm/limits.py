"""Sizes that follow from an engine's configuration alone: what a decode is, how much is unpacked at once."""

DRAFT = "draft_model."
"""How the names of a draft model's layers begin."""


def decode_tokens(config, group: int, beyond: int = 0) -> int:
    """The most new tokens with which a row is a decode, of layers with `group` query heads per KV head: 1, the drafts
    and `beyond` more (tokens_beyond), or as many of these three as the decode kernel takes."""
    drafts = config.num_speculative_tokens
    wanted = (1 + drafts + beyond, 1 + drafts, 1)
    if drafts == 0 or config.device_config.device_type == "cpu":
        return wanted[0]
    from kvarn.decode_cuda import decode_limit  # needs Triton

    return next(tokens for tokens in wanted if tokens <= decode_limit(group))


def heads_per_kv_head(config, layer_names: list[str]) -> int:
    """Query heads per KV head of these layers, the most of any: an engine's config knows those of its target alone."""
    layers = config.compilation_config.static_forward_context
    return max(layers[name].num_heads // layers[name].num_kv_heads for name in layer_names)


def scratch_tokens(config) -> int:
    """Keys of a layer, and values, that are unpacked together at the most: one sequence of any length beside a step's
    new tokens."""
    return config.model_config.max_model_len + config.scheduler_config.max_num_batched_tokens


def tokens_beyond(config) -> int:
    """Tokens with which the first pass of a draft model, if there is one, begins to draft, behind those of the target:
    rows have them on the device, and vLLM's host lengths leave them out."""
    speculative = config.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return 0
    return speculative.num_speculative_tokens if speculative.parallel_drafting else 1
