"""Engines in this process, greedy text from them, and a look at their block pool."""

import random

POOL_BYTES = 48 << 20


def engine(folder, **options):
    """A vLLM engine on a checkpoint folder, sized for tests. Keep it alive: its end takes the process group along."""
    from vllm import LLM

    defaults = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 32, "max_num_batched_tokens": 512,
                "enforce_eager": True, "kv_cache_memory_bytes": POOL_BYTES, "disable_log_stats": True}
    return LLM(model=str(folder), **(defaults | options))


def configure(folder, **options):
    """The VllmConfig of an engine that is not started."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**({"model": str(folder), "max_model_len": 512} | options)).create_engine_config()


def prompts(*lengths, seed=0):
    """One random prompt of each length."""
    numbers = random.Random(seed)
    return [{"prompt_token_ids": [numbers.randrange(3, 500) for _ in range(length)]} for length in lengths]


def greedy(llm, texts, count, **options):
    """The `count` greedy tokens of each prompt, as a list of lists; RequestOutputs with full=True."""
    from vllm import SamplingParams

    full, adapter = options.pop("full", False), options.pop("lora_request", None)
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)
    outputs = llm.generate(texts, sampling, use_tqdm=False, lora_request=adapter)
    return outputs if full else [list(output.outputs[0].token_ids) for output in outputs]


def layers(llm):
    """The engine's attention layers."""
    return list(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values())


def scheduler(llm):
    """The engine's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm):
    """Blocks that no sequence holds."""
    return scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()
