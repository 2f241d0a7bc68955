"""Loading what pack_model.py cut: a model in float32 (its weights through float16, as a model folder holds them)."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

PIECE = 60 * 2**20


def load(folder, name, device):
    """(model, windows by label) of pieces folder/name.NN, folder/name.json and folder/name.npz."""
    from gguf import GGMLQuantizationType, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM

    from kvarn_compile.eval.hf import adopt

    folder = Path(folder)
    wait_for(folder / f"{name}.json", folder / f"{name}.npz")
    about = json.loads((folder / f"{name}.json").read_text())
    (folder / f"config_{name}").mkdir(exist_ok=True)
    (folder / f"config_{name}" / "config.json").write_text(json.dumps(about["config"]))
    config = AutoConfig.from_pretrained(folder / f"config_{name}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def tensor(item):
        raw = read(folder, name, item["offset"], item["bytes"]).view(item["dtype"]).reshape(item["data_shape"])
        plain = np.ascontiguousarray(dequantize(raw, GGMLQuantizationType(item["type"])))
        x = torch.from_numpy(plain.reshape(item["shape"]))
        if item["heads"]:
            x = x.unflatten(0, (item["heads"], -1, 2)).transpose(1, 2).flatten(0, 2)
        return item["name"], (x + item["shift"]).half().to(device).float()

    with ThreadPoolExecutor(4) as pool:
        state = dict(pool.map(tensor, about["tensors"]))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(device)
    embed = decoder.embed_tokens
    if hasattr(embed, "embed_scale"):
        embed.embed_scale = torch.tensor(config.hidden_size**0.5, device=device)
    left = [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.device.type == "meta"]
    if left:
        raise RuntimeError(f"not loaded: {left}")
    windows = {k: torch.from_numpy(v.astype(np.int64)) for k, v in np.load(folder / f"{name}.npz").items()}
    return adopt(model.eval()), windows


def wait_for(*paths):
    """Until every file is there: pieces arrive while processes already run."""
    while not all(path.exists() for path in paths):
        time.sleep(0.1)


def read(folder, name, offset, size):
    """Bytes offset..offset+size-1 of the pieces' concatenation."""
    parts = []
    while size:
        path = folder / f"{name}.{offset // PIECE:02d}"
        wait_for(path)
        count = min(size, PIECE - offset % PIECE)
        parts.append(np.fromfile(path, np.uint8, count, offset=offset % PIECE))
        offset, size = offset + count, size - count
    return np.concatenate(parts)
