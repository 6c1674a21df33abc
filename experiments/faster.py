"""Where an update's time goes, and what would make it faster: measured here, left out of rsaft.py.

    python experiments/faster.py        # the small world; 6 minutes of CPU time with one thread

A plain DRaFT-1 update of 32 pictures in 50 steps, and its parts, as multiples of diffusers' own sampling of
the same batch (drawing and decoding); all in one process and in turn, medians of five rounds of CPU time.
Then the same with the adapter folded into the weights (W + B A) where no gradient is needed, with weights in
channels_last, and with the network compiled. Fused attention is what diffusers takes by itself. Last, what
bfloat16 would leave of a folded adapter.
"""
import contextlib
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rsaft  # noqa: E402, found through the line above

SETTINGS = ["--tiny", "--sampling-steps", "50", "--rank", "4", "--eval-every", "0", "--eval-reward",
            "--device", "cpu", "--out", "runs/faster"]      # a name alone: nothing is written


def lora_layers(network):
    return [layer for layer in network.modules() if isinstance(layer, rsaft.LoRALinear)]


@contextlib.contextmanager
def folded(network):
    """Inside the with block each layer with an adapter is one linear layer of the weight W + B A."""
    layers = lora_layers(network)
    originals = [layer.linear.weight.clone() for layer in layers]
    for layer in layers:
        layer.linear.weight.data += layer.B.detach() @ layer.A.detach()
        layer.forward = layer.linear.forward
    yield
    for layer, original in zip(layers, originals):
        layer.linear.weight.data.copy_(original)
        del layer.forward


def kept_in_bfloat16(network, scale):
    """How much of scale B A is left in W + scale B A - W, with W and the sum in bfloat16.

    Returns the length of scale B A over that of W, and what is left along B A over what should be, both over
    all layers.
    """
    wanted, found, weights = [], [], []
    for layer in lora_layers(network):
        change, W = scale * (layer.B @ layer.A).detach(), layer.linear.weight.bfloat16()
        wanted.append(change.flatten())
        found.append(((W + change).bfloat16().float() - W.float()).flatten())
        weights.append(W.float().flatten())
    wanted, found, weights = torch.cat(wanted), torch.cat(found), torch.cat(weights)
    return (wanted.norm() / weights.norm()).item(), (wanted @ found / (wanted @ wanted)).item()


def main():
    torch.set_num_threads(1)
    settings = rsaft.check(rsaft.parse(SETTINGS))
    model, scores, prompts, _ = rsaft.load(settings)
    params = model.add_adapter(settings.rank, rsaft.named_generator(0, "lora"))
    optimizer = torch.optim.AdamW(params, lr=settings.learning_rate, maximize=True)
    drawn, plan = rsaft.training_prompts(prompts, 0, 0, 32), rsaft.make_plan(settings, 0)
    batches = rsaft.micro_batches(drawn, (0, 0), 32)
    make_starts = partial(rsaft.sample_starts, model, plan, size=32)
    make_images = partial(rsaft.sample_images, model, plan)
    theirs = rsaft.load_model(settings.model, 50, settings.guidance_scale)
    theirs.pipe.set_progress_bar_config(disable=True)
    latents = batches[0].noise("xT", model.latent_shape)

    def sampling():
        theirs.pipe(drawn, num_inference_steps=50, output_type="pt", latents=latents,
                    guidance_scale=settings.guidance_scale)

    def update(make_starts=make_starts, **radii):
        rsaft.rsaft_gradient(batches, make_starts, make_images, scores.total, params, **radii)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    def folded_starts(batches):
        with folded(model.network):
            return make_starts(batches)

    def last_step_and_decoding():
        return make_images(batches[0], starts[0])[0]

    def channels_last_starts(batches):
        model.network.to(memory_format=torch.channels_last)
        found = make_starts(batches)
        model.network.to(memory_format=torch.contiguous_format)
        return found

    compiled, plain_network = torch.compile(model.network), model.network

    def compiled_starts(batches):
        model.network = compiled
        found = make_starts(batches)
        model.network = plain_network
        return found

    starts = make_starts(batches)
    images = last_step_and_decoding().detach()
    rows = {"diffusers' sampling": sampling, "plain update": update,
            "both perturbations, window": partial(update, rho=0.01, rho_w=0.01, reuse_starts=True),
            "its steps without gradient": partial(make_starts, batches),
            "the last step and decoding, with a graph": last_step_and_decoding,
            "the reward and its gradient": partial(rsaft.reward_gradient, scores.total, images, drawn),
            "noise by name": lambda: batches[0].noise("xT", model.latent_shape),
            "plain update, adapter folded": partial(update, folded_starts),
            "plain update, channels_last": partial(update, channels_last_starts),
            "plain update, compiled": partial(update, compiled_starts)}
    seconds = {name: [] for name in rows}
    for number in range(6):
        for name, row in rows.items():
            began = time.process_time()
            row()
            if number > 0:               # the first time something may be compiled
                seconds[name].append(time.process_time() - began)
    print("| | CPU seconds | diffusers' sampling = 1 |\n| --- | --- | --- |")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["diffusers' sampling"]))
        print(f"| {name} | {statistics.median(times):.4f} | {ratio:.4f} |")

    whole, pieces = make_starts(batches)[0], folded_starts(batches)[0]
    print(f"\nfolded, float32: the latents differ by at most {(whole - pieces).abs().max():.1e}")
    large = rsaft.micro_batches(rsaft.training_prompts(prompts, 0, 0, 256), (0, 0), 256)[0]
    began = time.process_time()
    large.noise("xT", model.latent_shape)
    print(f"noise by name for 256 pictures: {time.process_time() - began:.4f} s")
    for scale in 1, 0.1, 0.01, 0.001:
        length, kept = kept_in_bfloat16(model.network, scale)
        print(f"bfloat16: a folded adapter of {length:.5f} of the weights' length keeps {kept:.2f} of itself")


if __name__ == "__main__":
    main()
