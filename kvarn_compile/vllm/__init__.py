"""kvarn in stock vLLM, through vLLM's own plugin hooks. The only folder that imports vllm; nothing here is patched in
until an engine asks for kvarn (docs/vllm.md)."""
