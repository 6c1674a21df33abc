"""How far AdamW moves the attention weights through an adapter, and how far when they are trained themselves.

    python experiments/learning_rate.py        # five minutes of CPU time with one thread, 8 GiB

In the small world, and in Stable Diffusion 1.5 of full size with random weights (128 pixels, two sampling
steps, one picture an update, the small world's reward): plain DRaFT-1 updates with the other settings of
--tiny. The table has, after 1 and more updates, or from 0 on:

    dW         norm of the change of the attention projections, all together; of an adapter that is B A
    factor     dW / rate, divided by that of the first row; and what is expected after the first update
    reward     of the first update's pictures
    theta      norm of what is trained
    e moves    the attention projections so far, e being that of --sam, of the norm 0.01
    fall       of the reward, to first order, at e: 0.01 |gradient|

Expected: AdamW's first update moves every number by the rate, so trained weights by rate sqrt(out in). In an
adapter B becomes +-rate, and A is uniform within 1/sqrt(in), so that its rows have the norm 1/sqrt(3): B A is
rate sqrt(out rank / 3). The factor is sqrt(rank / (3 in)), `in` being the width that a layer reads.
"""
import sys
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import full_size  # noqa: E402, found through the line above; it keeps the libraries quiet
import rsaft  # noqa: E402
from update import update_gradient  # noqa: E402

RHO_W = 0.01
ATTENTION, EVERYTHING = "attention weights", "all weights"     # what is trained; a number: a rank
WORLDS = {    # updates, flags beside --tiny, rows: (what is trained, rate)
    "small world": (20, [], [(ATTENTION, 2e-4), (ATTENTION, 2e-3), (EVERYTHING, 2e-4),
                             (16, 2e-4), (16, 2e-3), (8, 2e-3)]),
    "full size": (3, ["--sampling-steps", "2", "--guidance-scale", "7.5", "--batch-size", "1"],
                  [(ATTENTION, 2e-5), (16, 2e-4)])}


def load_model(world, settings):
    if world == "small world":
        return rsaft.load_model(settings.model, settings.sampling_steps, settings.guidance_scale)
    torch.manual_seed(0)
    pipe = full_size.stable_diffusion()
    for part in pipe.unet, pipe.vae, pipe.text_encoder:
        part.eval().requires_grad_(False)
    return rsaft.StableDiffusion(pipe, settings.sampling_steps, settings.guidance_scale, (4, 16, 16), "cpu")


def make_trained(model, trained):
    """Returns (parameters, () -> the attention projections' changes so far, the expected factor)."""
    endings = tuple(f".{target}.weight" for target in model.lora_targets)
    weights = [p for name, p in model.network.named_parameters() if name.endswith(endings)]
    if isinstance(trained, int):
        params = model.add_adapter(trained, rsaft.named_generator(0, "lora"))
        layers = [layer for layer in model.network.modules() if isinstance(layer, rsaft.LoRALinear)]
        squared = sum(len(w) * trained / 3 for w in weights) / sum(w.numel() for w in weights)
        return params, lambda: [(layer.B @ layer.A).detach() for layer in layers], squared ** 0.5
    params = weights if trained == ATTENTION else list(model.network.parameters())
    for p in params:
        p.requires_grad_()
    before = [w.detach().clone() for w in weights]
    return params, lambda: [w.detach() - start for w, start in zip(weights, before)], 1.0


def norm(tensors):
    return nn.utils.get_total_norm([tensor.detach() for tensor in tensors]).item()


def measure(world, flags, trained, rate, updates):
    """Train. Returns {finished updates, 0, 1 and the last: {column: number}}, and the expected factor."""
    settings = rsaft.check(rsaft.parse(["--tiny", "--device", "cpu", *flags]))
    model, reward = load_model(world, settings), rsaft.make_reward("pickscore", settings.models)
    prompts, (params, changes, expected) = rsaft.read_prompts(settings.prompts), make_trained(model, trained)
    optimizer = torch.optim.AdamW(params, lr=rate, weight_decay=settings.weight_decay, maximize=True)

    def gradient(step):
        return update_gradient(settings, model, reward, prompts, params, step)["reward"]

    measured = {}
    for step in range(updates + 1):
        if step in (0, 1, updates):
            score, here = gradient(0), changes()
            with rsaft.perturbed(params, rsaft.parameter_perturbation([p.grad for p in params], RHO_W)):
                moves = norm([there - start for there, start in zip(changes(), here)])
            measured[step] = {"dW": norm(here), "reward": score, "theta": norm(params), "e moves": moves,
                              "fall": RHO_W * norm([p.grad for p in params])}
        if step < updates:
            gradient(step)
            nn.utils.clip_grad_norm_(params, settings.max_grad_norm)
            optimizer.step()
    return measured, expected


def main():
    for world, (updates, flags, rows) in WORLDS.items():
        print(f"\n| {world}; after 0, 1, {updates} | rate | dW | factor | expected "
              "| reward | theta | e moves | fall |\n" + "| --- " * 9 + "|")
        first = {}
        for trained, rate in rows:
            measured, expected = measure(world, flags, trained, rate, updates)
            reach = {step: numbers["dW"] / rate for step, numbers in measured.items() if step}
            first = first or reach
            factors = ", ".join(f"{reach[step] / first[step]:.3f}" for step in reach)
            digits = {"dW": ".3f", "reward": ".2f", "theta": ".1f", "e moves": ".4f", "fall": ".2g"}
            dW, *others = [", ".join(format(numbers[name], form) for numbers in measured.values())
                           for name, form in digits.items()]
            print("| " + " | ".join([f"rank {trained}" if isinstance(trained, int) else trained, f"{rate:g}",
                                     dW, factors, f"{expected:.3f}", *others]) + " |", flush=True)


if __name__ == "__main__":
    main()
