"""generate() of a transformers model with a packed KV cache: python examples/transformers_generate.py MODEL [PROMPT]

MODEL is a local folder or a hub id. The cache takes no plain memory at any time: it is empty until it is packed.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvarn_compile.hf import empty_static_cache


def main(name: str, prompt: str = "The sky is blue because", new_tokens: int = 32) -> str:
    """The text that greedy decoding gives."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    cache = empty_static_cache(model.config, batch=1, max_len=ids.shape[1] + new_tokens, dtype=model.dtype)

    # "inner" names what compiles the rewritten graph: "inductor" (the default) is faster, and slower to start.
    compiled = torch.compile(model, backend="kvarn", options={"preset": "k4v2_g128", "inner": "eager"})
    out = compiled.generate(ids, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)


if __name__ == "__main__":
    print(main(*sys.argv[1:3]))
