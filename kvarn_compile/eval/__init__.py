"""kvarn eval: what a packed KV cache costs a real language model, in its own decode regime, against every peer."""
