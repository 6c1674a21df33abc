"""MPS, Multi-dimensional Preference Score (CVPR 2024), its overall score. A CLIP ViT-H/14 whose image tokens
attend to those words of the prompt that have to do with a list of qualities."""
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rsaft import clip_pixels, import_file, make_tokenize

hpsv2 = import_file(Path(__file__).with_name("hpsv2.py"))    # by its path: there is a package of that name
FILES = {"model.safetensors": "RE-N-Y/mpsv1", "tokenizer_config.json": hpsv2.FILES["tokenizer_config.json"]}

QUALITIES = ("light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
             "structure, instance, texture, quantity, attributes, position, number, location, word, things.")
LAYERS, HEAD = 4, 64    # HEAD: the width of one
CROSS = "norm.weight norm.bias to_q.weight to_kv.weight to_out.weight ff.0.weight ff.2.weight".split()
OWN = ("norm.weight norm.bias rotary_emb.inv_freq fused_attn_ff_proj.weight attn_out.weight "
       "ff_out.1.weight").split()


def attend(q, k, v, mask=None):
    """Attention of many heads q, (B, n, heads * HEAD), to a single one, k and v, (B, m, HEAD)."""
    q = q.unflatten(-1, (-1, HEAD)).transpose(1, 2)
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def rotated(x, frequencies):
    """Rotary position embedding (arXiv 2104.09864) of every head of x, (B, n, heads * HEAD)."""
    angles = torch.outer(torch.arange(x.shape[1], device=x.device), frequencies).repeat(1, 2)[:, None]
    x = x.unflatten(-1, (-1, HEAD))
    a, b = x.chunk(2, -1)
    return (x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()).flatten(2)


def gated(x, out):
    """SwiGLU (arXiv 2002.05202) of a doubled hidden layer, and the layer after it."""
    x, gate = x.chunk(2, -1)
    return F.linear(F.silu(gate) * x, out)


def cross_layer(cross, own, x, text, mask):
    """Image tokens x, (B, n, d), attend to text, (B, m, d), where mask (B, 1, 1, m), then to themselves; each
    attention has its feed-forward layer beside it, not after."""
    weight, bias, to_q, to_kv, to_out, ff_in, ff_out = cross
    y = F.layer_norm(x, weight.shape, weight, bias)
    k, v = F.linear(text, to_kv).chunk(2, -1)
    x = x + F.linear(attend(F.linear(y, to_q), k, v, mask), to_out) + gated(F.linear(y, ff_in), ff_out)
    weight, bias, frequencies, fused, to_out, ff_out = own
    y = F.linear(F.layer_norm(x, weight.shape, weight, bias), fused)
    q, k, v, hidden = y.split([to_out.shape[1], HEAD, HEAD, 2 * ff_out.shape[1]], -1)
    y = attend(rotated(q, frequencies), rotated(k, frequencies), v)
    return x + F.linear(y, to_out) + gated(hidden, ff_out)


def load(folders, device):
    state = load_file(Path(folders["model.safetensors"], "model.safetensors"))
    layers = [[[state.pop(f"mps.cross_model.layers.{i}.{j}.fn.{name}").to(device) for name in names]
               for j, names in enumerate((CROSS, OWN))] for i in range(LAYERS)]
    state = {key.removeprefix("mps.model."): tensor for key, tensor in state.items()}
    tokenizer = folders["tokenizer_config.json"]
    model = hpsv2.make_vit_h(state, tokenizer).to(device)
    size = model.config.vision_config.image_size
    tokenize = make_tokenize(tokenizer, model.config.text_config.max_position_embeddings, device)

    def read(prompts):
        """Every token's embedding, and the prompt's."""
        output = model.text_model(input_ids=tokenize(prompts).input_ids)
        return model.text_projection(output.last_hidden_state), model.text_projection(output.pooler_output)

    def reward(images, prompts):
        tokens, text = read(prompts)
        close = (tokens @ read([QUALITIES])[0].mT).amax(-1)
        # The original divides by the largest of all prompts that it is given at once; here each is by itself.
        mask = (close / close.amax(-1, keepdim=True) > 0.01)[:, None, None]
        x = model.vision_model(pixel_values=clip_pixels(images, size)).last_hidden_state
        x = model.visual_projection(x)
        for cross, own in layers:
            x = cross_layer(cross, own, x, tokens, mask)
        return model.logit_scale.exp() * F.cosine_similarity(text, x[:, 0])

    return reward
