"""What an update costs on a GPU, counted and not run: memory and operations. `python experiments/counted.py`

The models of full_size.py are made without storage, in bfloat16, and PickScore in float32. A forward pass of
the network, the VAE and PickScore's vision tower counts the operations, and the tensors that autograd keeps
for the backward pass. Attention keeps what a fused kernel does; a backward pass, which needs no gradient of
frozen weights, counts as one more forward pass. "In all" is these tensors and the weights, without the
backward pass's own scratch and the allocator's loss. Batch 32, DRaFT-1, the family's own steps and guidance.
AlignProp's gradient passes through up to all of the steps, half of them on average.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rsaft  # noqa: E402, found through the line above

rsaft.quiet_libraries()
import full_size  # noqa: E402

GIB, BATCH = 2 ** 30, 32
# Pixels, and the shapes of what the network is told of a prompt.
SIZES = {"stable-diffusion": (512, [(77, 768)]), "sdxl": (1024, [(77, 2048), (1280,)]),
         "sd3.5-medium": (1024, [(77 + 256, 4096), (2048,)]), "flux.1-dev": (1024, [(512, 4096), (768,), ()])}


class FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: queries, keys, values, output. Its operations are added to `operations`."""
    operations = 0

    @staticmethod
    def forward(ctx, query, key, value):
        FusedAttention.operations += 2 * query.numel() * key.shape[-2] * 2
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("nothing runs backward here")


def cost(forward, weights):
    """Of forward(): the GiB that autograd keeps, without the weights, and the TFLOP."""
    storages, FusedAttention.operations = {}, 0

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage       # held, so that no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(
            display=False) as counter:
        forward()
    own = {weight.untyped_storage()._cdata for weight in weights}
    kept = sum(storage.nbytes() for address, storage in storages.items() if address not in own)
    return kept / GIB, (counter.get_total_flops() + FusedAttention.operations) / 1e12


def without_storage(name):
    """A Backbone with an adapter, and PickScore; on the device "meta", where nothing is computed."""
    with torch.device("meta"):
        pipe, clip = full_size.MODELS[name](), full_size.pickscore()
    family = rsaft.find_families()[type(pipe).__name__]
    (channels, _, _), factor = family.geometry(pipe.components[family.network_name].config, pipe.vae.config)
    pixels, told = SIZES[name]
    pipe.components[family.network_name].to(torch.bfloat16), pipe.vae.to(torch.bfloat16)
    model = family(pipe, family.sampling_steps, family.guidance_scale,
                   (channels, pixels // factor, pixels // factor), "meta")
    for part in model.network, model.vae, clip:
        part.eval().requires_grad_(False)
    return model, clip, told


def main():
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: (
        FusedAttention.apply(query, key, value))
    for name in SIZES:
        model, clip, told = without_storage(name)
        weights = [weight for part in (model.network, model.vae, clip) for weight in part.parameters()]
        held, T = sum(weight.nbytes for weight in weights) / GIB, len(model.steps)
        with torch.device("meta"):
            model.add_adapter(16, None)
            print(f"{name}: weights {held:.1f} GiB")
            for checkpointing in False, True:
                if checkpointing:
                    for part in model.network, model.vae:
                        part.train().enable_gradient_checkpointing()
                for B in 1, 2, 4, 8:
                    x = torch.empty(B * model.branches, *model.latent_shape)
                    conditions = [torch.empty(len(x), *shape).bfloat16() for shape in told]
                    latents = torch.empty(B, *model.latent_shape, requires_grad=True)
                    pixels = torch.empty(B, 3, 224, 224, requires_grad=True)
                    costs = [cost(lambda: model.predict(x, 1.0, *conditions), weights),
                             cost(lambda: model.decode(latents), weights),
                             cost(lambda: clip.vision_model(pixel_values=pixels), weights)]
                    if B == 1 and not checkpointing:
                        (_, network), (_, vae), (_, reward) = costs
                        plain = BATCH * (network * (T + 1) + 2 * vae + 2 * reward)
                        window = BATCH * (network * (T + 3) + 4 * vae + 4 * reward)
                        alignprop = plain + BATCH * network * (T - 1) / 2
                        print(f"  TFLOP of an update: plain {plain:,.0f}, --sam --noise {2 * plain:,.0f}, "
                              f"with the window {window:,.0f}, plain AlignProp {alignprop:,.0f}")
                    kept = [gib for gib, _ in costs]
                    in_all = held + sum(kept)
                    flags = f"--micro-batch-size {B}{' --gradient-checkpointing' if checkpointing else ''}"
                    print(f"  {flags}: network {kept[0]:.1f}, VAE {kept[1]:.1f}, reward {kept[2]:.1f}, "
                          f"in all {in_all:.0f} GiB; AlignProp up to {in_all + kept[0] * (T - 1):.0f} GiB",
                          flush=True)


if __name__ == "__main__":
    main()
