"""Small random-weight models on disk, tokenizer included: vLLM's dummy weights give the same token over and over."""

import json
from pathlib import Path

import torch

VOCABULARY = 512


def write(folder: Path, architecture: str = "llama", heads: int = 4, kv_heads: int = 2, head_dim: int = 64,
          layers: int = 2, hidden: int = 128, attention: float = 1.0, **extra) -> Path:
    """A model of `layers` layers with weights large enough for every token to differ from the last.

    With `attention` (a factor on its output) small, the next token follows from the last few and the text repeats.
    """
    import transformers

    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }[architecture]
    torch.manual_seed(0)
    config = config_class(vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=256, num_hidden_layers=layers,
                          num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
                          max_position_embeddings=2048, initializer_range=0.15, tie_word_embeddings=False,
                          bos_token_id=0, eos_token_id=1, torch_dtype="float32", **extra)
    model = model_class(config).to(torch.float32)
    if architecture == "qwen2":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= attention
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1", unk_token="w2",
                                         ).save_pretrained(folder)
    path = folder / "generation_config.json"
    if path.exists():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 1}))
