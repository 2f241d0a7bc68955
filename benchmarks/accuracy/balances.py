"""Every source of key scales that was tried (docs/accuracy.md, question 1): scales [H, D] by layer, by source."""

import torch

from kvarn import balance as product
from kvarn_compile.eval import calibrate
from kvarn_compile.eval.hf import projections, rope_frequencies, run_chunk
from kvarn_compile.eval.session import Recorder


def pair(x):
    low, high = x.chunk(2, -1)
    return torch.cat([low + high] * 2, -1) / 2


def unit_mean(s):
    return s / s.log().mean(-1, keepdim=True).exp()


@torch.no_grad()
def record(model, ids):
    recorder = Recorder()
    run_chunk(model, ids, 0, recorder)
    return recorder


def sampled(recorder, power=0.25, floor=1e-3, clamp=None, group=128, additive=True):
    """The product's formula with its constants open; power 0.25 on mean squares is exponent 1/2 on rms."""
    scales = {}
    for layer, k in recorder.keys.items():
        q = recorder.queries[layer].unflatten(1, (k.shape[1], -1))
        tiles = k[:, :, : k.shape[2] // group * group].float().unflatten(2, (-1, group))
        vk = (tiles - tiles.mean(3, keepdim=True)).square().mean((0, 2, 3))
        vq = q.float().square().mean((0, 2, 3))
        a, b = (pair(x) + floor * x.mean(-1, keepdim=True) if additive else
                torch.maximum(pair(x), floor * x.mean(-1, keepdim=True)) for x in (vq, vk))
        s = unit_mean((a / b).pow(power))
        scales[layer] = unit_mean(s.clamp(1 / clamp, clamp)) if clamp else s
    return scales


@torch.no_grad()
def from_key_weights(model):
    """The key projection's constants alone."""
    return {layer: product.from_weights(key.weight, key.bias, norm, rope_frequencies(model))
            for layer, (key, _, norm) in enumerate(projections(model)) if key.bias is not None}


@torch.no_grad()
def from_all_weights(model, power=0.25, floor=1e-3, group=128):
    """Both projections' constants: rows of W_q and W_k, their biases, the norms before and after them."""
    decoder, scales = model.get_decoder(), {}
    frequencies = decoder.rotary_emb.__dict__.get("inv_freq", None)
    for index, layer in enumerate(decoder.layers):
        att = layer.self_attn
        rope = getattr(decoder, "rotary_emb", None)
        kinds = [n for n, _ in rope.named_buffers() if n.endswith("inv_freq") and "original" not in n]
        kind = getattr(att, "layer_type", None)
        name = next((n for n in kinds if kind and n.startswith(kind)), kinds[0])
        frequencies = getattr(rope, name)
        dim = 2 * frequencies.shape[0]
        gemma = "Gemma" in type(layer).__name__
        norm = layer.input_layernorm.weight.float() + (1.0 if gemma else 0.0)
        heads = att.k_proj.weight.shape[0] // dim

        def power_of(proj, after, norm=norm, dim=dim, gemma=gemma):
            rows = (proj.weight.float() * norm).square().sum(-1).unflatten(0, (-1, dim))
            bias = torch.zeros_like(rows) if proj.bias is None else proj.bias.float().square().unflatten(0, (-1, dim))
            if after is not None:
                gain = after.weight.float() + (1.0 if gemma else 0.0)
                rows = rows / rows.mean(-1, keepdim=True) * gain.square()
            return pair(rows), pair(bias)

        vq, bq = power_of(att.q_proj, getattr(att, "q_norm", None))
        vk, bk = power_of(att.k_proj, getattr(att, "k_norm", None))
        vq = (vq + bq).unflatten(0, (heads, -1)).mean(1)
        angle = frequencies.float() * (group / 2)
        turning = 1 - torch.sinc(angle / torch.pi).square()
        vk = vk + torch.cat([turning, turning]) * bk
        a, b = (x + floor * x.mean(-1, keepdim=True) for x in (vq, vk))
        scales[index] = unit_mean((a / b).pow(power))
    return scales


def all_sources(model, device, text_ids):
    """Scales by name of source: none is the empty dict."""
    vocabulary = model.config.get_text_config().vocab_size
    passes = {seed: record(model, calibrate.random_ids(vocabulary, seed=seed, device=device)) for seed in (0, 1, 2)}
    text = record(model, text_ids)
    return {"none": {}, "product": calibrate.from_random(model, device), "weights": from_key_weights(model),
            "weights_qk": from_all_weights(model),
            "random": sampled(passes[0]), "random_seed1": sampled(passes[1]), "random_seed2": sampled(passes[2]),
            "random_256": sampled(record(model, calibrate.random_ids(vocabulary, 256, 0, device))),
            "random_p1/8": sampled(passes[0], 0.125), "random_p3/8": sampled(passes[0], 0.375),
            "random_clamp2": sampled(passes[0], clamp=2.0), "random_clamp4": sampled(passes[0], clamp=4.0),
            "random_floor1e-2": sampled(passes[0], floor=1e-2), "random_floor1e-1": sampled(passes[0], floor=1e-1),
            "text": sampled(text), "text_clamp4": sampled(text, clamp=4.0), "text_p1/8": sampled(text, 0.125)}


__all__ = ["all_sources", "from_all_weights", "from_key_weights", "product", "sampled"]
