"""Sizes that follow from an engine's configuration alone: what a decode is, how much is unpacked at once."""


def decode_tokens(config, kv_heads: int) -> int:
    """The most new tokens with which a row of `kv_heads` KV heads is a decode: 1 and the drafts, if the decode kernel
    takes so many queries per KV head, else 1."""
    wanted = 1 + config.num_speculative_tokens
    if wanted == 1 or config.device_config.device_type == "cpu":
        return wanted
    from kvarn.decode_cuda import decode_limit  # needs Triton

    group = config.model_config.get_num_attention_heads(config.parallel_config) // kv_heads
    return wanted if wanted <= decode_limit(group) else 1


def scratch_tokens(config) -> int:
    """Keys of a layer, and values, that are unpacked together at the most: one sequence of any length beside a step's
    new tokens."""
    return config.model_config.max_model_len + config.scheduler_config.max_num_batched_tokens
