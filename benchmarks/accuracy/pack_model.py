"""Cut a GGUF file and text windows into pieces small enough to carry to a machine without network.

    python pack_model.py GGUF MODEL_DIR --out DIR --text wiki=wiki.txt --text novels=novels.txt [--windows 8x4096]

DIR gets part0, part1, ... folders of at most 60 MiB. carried.py loads them. A tied matrix stored twice travels once.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from kvarn_compile.eval import text
from kvarn_compile.eval.hf import load_tokenizer

PIECE = 60 * 2**20
NAMES = [(r"^token_embd\.", "model.embed_tokens."), (r"^output_norm\.", "model.norm."),
         (r"^output\.", "model.embed_tokens."), (r"^blk\.(\d+)\.", r"model.layers.\1."),
         (r"attn_norm\.", "input_layernorm."),
         (r"attn_([qkv])\.", r"self_attn.\1_proj."), (r"attn_([qk])_norm\.", r"self_attn.\1_norm."),
         (r"attn_output\.", "self_attn.o_proj."), (r"ffn_(gate|up|down)\.", r"mlp.\1_proj.")]
FFN_NORMS = {"gemma3_text": [(r"\.ffn_norm\.", ".pre_feedforward_layernorm."),
                             (r"\.post_attention_norm\.", ".post_attention_layernorm."),
                             (r"\.post_ffw_norm\.", ".post_feedforward_layernorm.")]}
DEFAULT_NORMS = [(r"\.ffn_norm\.", ".post_attention_layernorm.")]


def tensors(path, kind):
    reader = GGUFReader(path)
    names = {t.name for t in reader.tensors}
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight" and "output.weight" in names:
            continue
        name = tensor.name
        for pattern, new in [*FFN_NORMS.get(kind, DEFAULT_NORMS), *NAMES]:
            name = re.sub(pattern, new, name)
        yield name, tensor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--windows", action="append", default=[])
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    kind = config["model_type"]
    meta, blobs, offset = [], [], 0
    for name, tensor in tensors(args.gguf, kind):
        data = np.ascontiguousarray(tensor.data)
        heads = 0
        if kind == "llama" and re.search(r"self_attn\.[qk]_proj\.weight", name):
            heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
        shift = -1.0 if kind == "gemma3_text" and name.endswith("norm.weight") else 0.0
        meta.append({"name": name, "type": int(tensor.tensor_type), "shape": [int(n) for n in reversed(tensor.shape)],
                     "dtype": str(data.dtype), "data_shape": list(data.shape), "offset": offset, "bytes": data.nbytes,
                     "heads": heads, "shift": shift})
        blobs.append(data.tobytes())
        offset += data.nbytes
    tokenizer = load_tokenizer(args.model)
    start = text.start_ids(tokenizer)
    sizes = [tuple(map(int, spec.split("x"))) for spec in args.windows or ["8x4096"]]
    ids = {}
    for item in args.text:
        label, path = item.split("=")
        tokens = text.read_ids(tokenizer, path)
        for count, context in sizes:
            ids[f"{label}_{context}"] = text.windows(tokens, count, context, start).numpy().astype(np.int32)
    shutil.rmtree(args.out, ignore_errors=True)
    blob = b"".join(blobs)
    for index, begin in enumerate(range(0, len(blob), PIECE)):
        folder = args.out / f"part{index}"
        folder.mkdir(parents=True)
        (folder / f"{args.out.name}.{index:02d}").write_bytes(blob[begin : begin + PIECE])
    first = args.out / "part0"
    (first / f"{args.out.name}.json").write_text(json.dumps({"config": config, "tensors": meta}))
    np.savez_compressed(first / f"{args.out.name}.npz", **ids)
    print(f"{args.out}: {len(blob) / 2**20:.0f} MiB in {len(list(args.out.iterdir()))} parts, windows {list(ids)}")


if __name__ == "__main__":
    main()
