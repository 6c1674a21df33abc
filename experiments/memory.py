"""How much memory an update of Stable Diffusion 1.5 at 512 px with PickScore takes on a GPU, counted, not run.

    python experiments/memory.py

The models are made without storage, in bfloat16 and PickScore in float32, and one picture's worth of forward
pass of the last step (UNet under guidance, VAE, PickScore's vision tower) counts the tensors that autograd
keeps for the backward pass. Attention keeps its inputs and output, as a fused kernel does. What lies above is
the weights; what isn't counted is the backward pass's own scratch and the allocator's loss.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rsaft  # noqa: E402, found through the line above

rsaft.quiet_libraries()
import full_size  # noqa: E402

GIB = 2 ** 30


class FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: queries, keys, values and output, never the attention matrix."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


def kept(forward, weights):
    """GiB of the tensors that autograd keeps of forward(), without the weights themselves."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage       # held, so that no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    own = {weight.untyped_storage()._cdata for weight in weights}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own) / GIB


if __name__ == "__main__":
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: FusedAttention.apply(query, key, value)
    with torch.device("meta"):
        pipe, clip = full_size.stable_diffusion(), full_size.pickscore()
    pipe.unet.to(torch.bfloat16), pipe.vae.to(torch.bfloat16)
    parts = {"UNet": pipe.unet, "VAE": pipe.vae, "PickScore": clip}
    for part in parts.values():
        part.eval().requires_grad_(False)
    weights = [weight for part in parts.values() for weight in part.parameters()]
    held = sum(weight.nbytes for weight in weights) / GIB
    with torch.device("meta"):
        rsaft.add_lora(pipe.unet, 16)
        print(f"weights {held:.1f} GiB; kept for the backward pass, GiB:\n"
              f"{'':24}{'pictures':>10}{''.join(f'{name:>11}' for name in parts)}{'in all':>10}")
        for checkpointing in False, True:
            if checkpointing:
                for part in pipe.unet, pipe.vae:
                    part.train().enable_gradient_checkpointing()
            for B in 1, 2, 4, 8:
                x, text = torch.empty(2 * B, 4, 64, 64).bfloat16(), torch.empty(2 * B, 77, 768).bfloat16()
                latents = torch.empty(B, 4, 64, 64, dtype=torch.bfloat16, requires_grad=True)
                pixels = torch.empty(B, 3, 224, 224, requires_grad=True)
                sizes = [kept(lambda: pipe.unet(x, torch.tensor(1), encoder_hidden_states=text), weights),
                         kept(lambda: pipe.vae.decode(latents), weights),
                         kept(lambda: clip.vision_model(pixel_values=pixels), weights)]
                print(f"{'--gradient-checkpointing' if checkpointing else '':24}{B:10}"
                      f"{''.join(f'{size:11.2f}' for size in sizes)}{held + sum(sizes):10.1f}")
