"""RSA-FT: Reward Sharpness-Aware Fine-Tuning of text-to-image diffusion models, in one file.

The method of Kim & Sim, CVPR 2026 (arXiv 2603.21175); equation numbers are that paper's. A diffusion model is tuned
by gradient ascent on a differentiable reward r of its own pictures, backpropagated through part of a DDIM rollout: as
much as one of five published methods does, DRaFT-1 by default (arXiv 2309.17400):

    max_theta  E_{c, xT} [ r( x0(xT, c; theta), c ) ]                                      (Eq. 4)

Where the reward's surface is steep, pictures get a higher score without getting better: reward hacking. RSA-FT
follows the gradient of a flattened reward instead, at the worst nearby picture and the worst nearby weights:

    d = -rho   grad_x0 r    / |grad_x0 r|        one per picture                 --noise   (Eq. 15)
    e = -rho_w grad_theta r / |grad_theta r|     one for all trained weights     --sam     (Eq. 17)

    max_theta  E_{c, xT} [ r( x0(xT, c; theta + e) + d, c ) ]                              (Eq. 19)

Try it on any laptop, with the small trained models of tiny/, then on Stable Diffusion 1.5:

    python rsaft.py --tiny --reward pickscore --sam --noise
    python rsaft.py --reward pickscore --sam --noise

The file is in the order of the story: settings, sampling step, rollout, perturbations, Algorithm 1, LoRA; then rewards,
models, evaluation, training loop and command line. Down to LoRA all is tensors in, tensors out: copy what you need, it
brings nothing but torch along.
"""
import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import defaultdict, namedtuple
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent


# ---- Settings ------------------------------------------------------------------------------------------------------

def option(default, help, **argparse_options):
    """A setting: its default, its line in --help, and what else argparse wants to know."""
    return field(default=default, metadata={"help": help, **argparse_options})


@dataclass(frozen=True)
class Config:
    """All settings; the command line is made of these fields. README says which defaults are the paper's."""
    model: str = option("stable-diffusion-v1-5/stable-diffusion-v1-5", "a diffusers folder, or an id on the hub")
    models: str = option(None, "take reward models from this folder, one sub-folder per name, not from the hub")
    tiny: bool = option(False, "the small models in tiny/, and defaults that suit a CPU")
    reward: tuple = option(("pickscore",), "what is maximised: names or FILE.py:FUNCTION, a weighted sum of several",
                           nargs="+", type=str, metavar="NAME[=WEIGHT]")
    eval_reward: tuple = option((), "held-out scores, never trained on", nargs="*", type=str, metavar="REWARD")
    prompts: str = option(str(HERE / "prompts.txt"), "a text file, one prompt a line")
    eval_prompts: str = option(None, "another one for the evaluations (default: the same)")
    noise: float = option(0.0, "perturb the pictures within a radius, 0.01 unless given", nargs="?", const=1e-2,
                          metavar="RHO")
    noise_type: str = option("worst", "the worst direction, or a mean over random ones", choices=("worst", "gaussian"))
    noise_draws: int = option(4, "number of random directions for --noise-type gaussian")
    sam: float = option(0.0, "perturb the weights within a radius, 0.01 unless given", nargs="?", const=1e-2,
                        metavar="RHO")
    sam_rollout: str = option("full", "the second rollout of --sam: all of it, or the steps with gradient",
                              choices=("full", "window"))
    train_steps: int = option(200, "number of updates")
    sampling_steps: int = option(50, "DDIM steps of a rollout, T")
    method: str = option("draft", "which part of the rollout is differentiated",
                         choices=("draft", "draft-lv", "alignprop", "refl", "drtune"))
    grad_steps: int = option(None, "K, how many steps carry the gradient (default: the method's)")
    guidance_scale: float = option(7.5, "classifier-free guidance; 1 turns it off")
    height: int = option(None, "of the pictures, in pixels (default: the model's)")
    width: int = option(None, "of the pictures, in pixels (default: the model's)")
    batch_size: int = option(32, "pictures per update")
    micro_batch_size: int = option(1, "pictures in memory at a time; must divide the batch")
    learning_rate: float = option(2e-5, "of AdamW")
    weight_decay: float = option(1e-4, "of AdamW")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm")
    rank: int = option(16, "of the LoRA adapter")
    eval_every: int = option(20, "updates between evaluations; 0: no evaluation at all")
    eval_images: int = option(32, "pictures per evaluation")
    gradient_checkpointing: bool = option(False, "recompute activations instead of keeping them: less memory, slower")
    checkpoint_every: int = option(20, "updates between checkpoints; 0: only when the run ends")
    resume: bool = option(False, "go on from the checkpoint in --out, or begin where there is none")
    overwrite: bool = option(False, "replace the results of an earlier run in --out")
    stop_on_hacking: bool = option(False, "end the run when the alarm is raised")
    evaluate: str = option(None, "no training: judge the adapter in this folder", metavar="DIR")
    lora_scale: tuple = option((1.0,), "with --evaluate: how much of the adapter", nargs="+", type=float, metavar="X")
    tensorboard: bool = option(False, "write the log for tensorboard as well")
    seed: int = option(0, "of everything random")
    dtype: str = option("float32", "of the frozen weights; the adapter is float32", choices=("float32", "bfloat16"))
    device: str = option(None, "cuda, mps or cpu (default: the first of them that is there)")
    out: str = option(None, "the folder for the results (default: a new runs/NNN)")
    # No annotation, so no settings: what related methods have in another form.
    program, title = "rsaft.py", "Reward Sharpness-Aware Fine-Tuning of text-to-image diffusion models."
    may_be_zero = "noise", "sam", "weight_decay", "eval_every", "checkpoint_every", "guidance_scale", "seed"


# What --tiny puts in the place of the defaults, and nothing else. The radii stay the paper's.
TINY = dict(model=str(HERE / "tiny" / "stable-diffusion"), models=str(HERE / "tiny"),
            prompts=str(HERE / "tiny" / "prompts.txt"), eval_reward=("judge", f"{HERE / 'tiny' / 'world.py'}:oracle"),
            sampling_steps=10, guidance_scale=3.0, micro_batch_size=None, learning_rate=2e-3, rank=8,
            train_steps=60, eval_images=144)
S1_RADIUS, S1_RADIUS_TINY = 0.01, 0.1  # one radius for the sharpness of every run, so that runs can be compared


class UserError(Exception):
    """Something the user can put right. `main` prints it as one line and exits with 2."""


@contextlib.contextmanager
def explained(problem):
    """Inside the with block any exception becomes a UserError, one line: the problem and its cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem}: {type(error).__name__}: {' '.join(str(error).split())}"[:300]) from error


# ---- One sampling step. Every deterministic sampler here is linear in the latent x and the network's output f. -----

# One step, at timestep t: x_next = a x + b f and x0 = c x + d f, where x = alpha x0 + sigma noise. Plain numbers.
Step = namedtuple("Step", "t a b c d alpha sigma")


def ddim_steps(scheduler, sampling_steps):
    """The DDIM update (arXiv 2010.02502, eta = 0) as numbers: a list of Step, the noisiest first.

    scheduler: a diffusers DDIMScheduler. Raises ValueError where its step isn't linear or isn't defined: clip_sample,
    thresholding, prediction_type "sample", epsilon prediction where alpha is 0, a number of steps it can't make.
    """
    config = scheduler.config
    if config.clip_sample or config.thresholding:
        raise ValueError("the scheduler clips its samples (clip_sample or thresholding): that step isn't linear")
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {config.prediction_type!r} is not supported, only epsilon and v_prediction")
    scheduler.set_timesteps(sampling_steps)
    if len(scheduler.timesteps) != sampling_steps or max(scheduler.timesteps) >= config.num_train_timesteps:
        # "trailing" spacing rounds some numbers of steps up by one; "leading" runs over the end at 1000.
        raise ValueError(f"the scheduler's spacing can't make {sampling_steps} steps; take another number")
    steps = []
    for t in scheduler.timesteps.tolist():
        # Trap: alpha' is read a T-th of the schedule further on, not at the next of `timesteps`, which may differ.
        t_next = t - config.num_train_timesteps // sampling_steps
        squares = scheduler.alphas_cumprod[t], (scheduler.alphas_cumprod[t_next] if t_next >= 0
                                                else scheduler.final_alpha_cumprod)
        (alpha, sigma), (alpha_, sigma_) = [(float(x) ** 0.5, (1 - float(x)) ** 0.5) for x in squares]
        if config.prediction_type == "v_prediction":
            a, b, c, d = alpha_ * alpha + sigma_ * sigma, sigma_ * alpha - alpha_ * sigma, alpha, -sigma
        elif alpha > 0:
            a, b, c, d = alpha_ / alpha, sigma_ - alpha_ * sigma / alpha, 1 / alpha, -sigma / alpha
        else:
            raise ValueError(f"alpha is 0 at timestep {t}: there epsilon prediction says nothing about the image")
        steps.append(Step(t, a, b, c, d, alpha, sigma))
    return steps


# ---- The differentiable rollout, x0(xT, c; theta) ------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """Which part of a rollout is differentiated. Drawn once per update, and the same in both of its passes.

    grad: for each step that is taken, whether the network's output carries a gradient. It may be shorter than the
    schedule: the rollout then stops early. predict_x0: the last step taken jumps to its prediction of x0.
    detach_input: no gradient through what the network is given. renoised: DRaFT-LV's number of extra pictures.
    """
    grad: tuple
    predict_x0: bool = False
    detach_input: bool = False
    renoised: int = 0

    @property
    def window(self):
        """The index of the first step that carries a gradient; the number of steps if none does."""
        return (*self.grad, True).index(True)


def draw(rng, low, high):
    """An integer, uniform over low..high, both included."""
    return torch.randint(low, high + 1, (), generator=rng).item()


def last_steps(taken, K, shortest):
    """`Plan.grad` with the last K of the steps taken. Raises ValueError if the shortest rollout has fewer than K."""
    if K > shortest:
        raise ValueError(f"{K} steps can't carry the gradient: the rollout may have only {shortest}")
    return (False,) * (taken - K) + (True,) * K


# The five methods: plans drawn from T sampling steps and a torch.Generator; K overrides the method's own.

def draft(T, rng, K=None):
    """DRaFT-K (arXiv 2309.17400): all T steps, the last K = 1 with gradient."""
    return Plan(last_steps(T, K or 1, T))


def draft_lv(T, rng, K=None):
    """DRaFT-LV (arXiv 2309.17400): DRaFT-1, and two more pictures from x0 noised again to the last timestep."""
    return Plan(last_steps(T, K or 1, T), renoised=2)


def alignprop(T, rng, K=None):
    """AlignProp (arXiv 2310.03739): K uniform over 1..T. (As published from 0, where nothing would be learnt.)"""
    return Plan(last_steps(T, K or draw(rng, 1, T), T))


def refl(T, rng, K=None):
    """ReFL (arXiv 2304.05977): up to a random step of the last quarter, which carries the gradient and predicts x0."""
    first = 3 * T // 4
    return Plan(last_steps(draw(rng, first, T - 1) + 1, K or 1, first + 1), predict_x0=True)


def drtune(T, rng, K=None):
    """DRTune (arXiv 2405.00760): K = T/10 evenly spaced steps up to a random stop in the last 40 percent, where x0 is
    predicted. The network's input is detached: the gradient flows through the sampler's arithmetic alone."""
    first = T - math.ceil(0.4 * T)
    taken, K = draw(rng, first, T - 1) + 1, K or max(1, round(T / 10))
    last_steps(taken, K, first + 1)  # for the check alone
    offset = draw(rng, 0, taken // K - 1)
    chosen = range(offset, taken, taken // K)[:K]
    return Plan(tuple(i in chosen for i in range(taken)), predict_x0=True, detach_input=True)


METHODS = {"draft": draft, "draft-lv": draft_lv, "alignprop": alignprop, "refl": refl, "drtune": drtune}


def rollout(denoise, x, steps, plan, first=0, stop=None):
    """Deterministic DDIM sampling that keeps the gradient where the plan says so.

    denoise: (x, t) -> f, the network's output with guidance, of x's shape; x: (B, C, h, w) noise xT, or the latents
    that step `first` begins with; steps: list of Step; stop: the step before which to stop, by default the plan's own.
    Returns the final latents, (B, C, h, w), with a graph through the steps of `plan.grad`.
    """
    for i in range(first, len(plan.grad) if stop is None else stop):
        step = steps[i]
        with torch.set_grad_enabled(plan.grad[i] and torch.is_grad_enabled()):
            f = denoise(x.detach() if plan.detach_input else x, step.t)
        if plan.predict_x0 and i == len(plan.grad) - 1:
            return step.c * x + step.d * f
        x = step.a * x + step.b * f    # outside the block: DRTune's gradient flows here where the network carries none
    return x


def renoise(denoise, x0, step, noise):
    """DRaFT-LV's extra picture: latents x0, taken as constants, noised to `step` and predicted again in one call."""
    x = step.alpha * x0.detach() + step.sigma * noise
    return step.c * x + step.d * denoise(x, step.t)


def network_evaluations(plan, guided=True, second_rollout=False, window=False):
    """The UNet evaluations that a picture costs: (without gradient, with gradient).

    For a plan of S steps, K of them with gradient, the first of those at index w, and n renoised pictures:
    g (S - K) and g (K + n), with g = 2 under guidance, else 1. A second rollout costs the same again, or, if it is but
    the window from w on, g (S - K - w) and g (K + n).
    """
    g, S, K, w = 1 + guided, len(plan.grad), sum(plan.grad), plan.window
    again = 0 if not second_rollout else S - K - w if window else S - K
    return g * (S - K + again), g * (K + plan.renoised) * (1 + second_rollout)


def make_denoise(unet, prompt_embeds, negative_embeds, guidance_scale):
    """A function (x, t) -> f for `rollout`: the UNet under classifier-free guidance (arXiv 2207.12598).

    prompt_embeds, negative_embeds: (B, tokens, width). The two branches run as one batch, and the gradient goes
    through both. x and f are float32, whatever dtype the UNet computes in. A guidance_scale of 1 or less means
    no guidance, as in diffusers.
    """
    guided = guidance_scale > 1
    embeds = torch.cat([negative_embeds, prompt_embeds]) if guided else prompt_embeds

    def denoise(x, t):
        x = torch.cat([x, x]) if guided else x
        f = unet(x.to(embeds.dtype), t, encoder_hidden_states=embeds).sample.float()
        if guided:
            unconditional, conditional = f.chunk(2)
            f = unconditional + guidance_scale * (conditional - unconditional)
        return f

    return denoise


def decode(vae, latents):
    """(B, C, h, w) latents to (B, 3, H, W) images in [0, 1], float32, as diffusers' pipeline makes them.

    Saturated pixels carry no gradient: that is the clamp.
    """
    images = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
    return (images / 2 + 0.5).clamp(0, 1)


# ---- The reward's gradient, and the two perturbations ----------------------------------------------------------------
# A reward is a function (images, prompts) -> (B,), with images (B, 3, H, W) in [0, 1], float32, and B prompts.

def reward_gradient(reward, x0, prompts, deltas=(0.0,)):
    """Mean over `deltas` of r(x0 + delta), and its gradient, with x0 taken as a leaf.

    x0: (B, 3, H, W); deltas: tensors of that shape, constants of the gradient. Returns values (B,) and gradients
    (B, 3, H, W), one per picture and not divided by B, both detached. The reward's graph is freed here, before the
    diffusion graph is walked: push the gradient on with x0.backward(gradient).
    """
    values = gradients = 0
    for delta in deltas:
        x = (x0.detach() + delta).requires_grad_()
        value = reward(x, prompts)
        gradients = gradients + torch.autograd.grad(value.sum(), x)[0] / len(deltas)
        values = values + value.detach() / len(deltas)
    return values, gradients


def sample_perturbation(grad, rho):
    """d = -rho g / |g|, the worst small change of each picture to first order (Eq. 15).

    grad: (B, ...), the reward's gradient at each picture; rho: the L2 norm of d over all elements of one picture,
    in units of pixels in [0, 1]. Returns a tensor of grad's shape; where a gradient is zero, so is d.
    """
    norm = grad.flatten(1).norm(dim=1).view(-1, *[1] * (grad.dim() - 1))
    return -rho * grad / norm.where(norm > 0, 1)


def parameter_perturbation(grads, rho):
    """e = -rho g / |g| with one norm over all tensors: SAM's step (arXiv 2010.01412), turned round (Eq. 17).

    grads: list of tensors, the reward's gradient over the WHOLE batch; rho: the global L2 norm of e, in units of the
    parameters. Returns a list of tensors of the same shapes; all zero if the gradient is.
    """
    norm = nn.utils.get_total_norm(grads)
    scale = -rho / norm.where(norm > 0, 1)
    return [scale * grad for grad in grads]


@contextlib.contextmanager
def perturbed(params, epsilons):
    """Add `epsilons` to `params` inside the with block; afterwards they are the same bits again, whatever happens.

    Yields the displacements that were reached, after rounding. Adding and then subtracting would not be exact,
    so the values are copied and copied back.
    """
    originals = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, epsilon in zip(params, epsilons):
                p.add_(epsilon)
        yield [p.detach() - original for p, original in zip(params, originals)]
    finally:
        with torch.no_grad():
            for p, original in zip(params, originals):
                p.copy_(original)


def reward_sharpness(reward, images, prompts, rho):
    """S1 = r(x) - r(x + d) with d = -rho g / |g| (Eq. 10): (B,), how far the reward falls within the radius rho."""
    value, gradient = reward_gradient(reward, images, prompts)
    with torch.no_grad():
        return value - reward(images + sample_perturbation(gradient, rho), prompts)


# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Batch:
    """Prompts, and the random numbers that belong to them.

    noise(purpose, shape) returns (B, *shape) of standard normal noise, always the same for the same purpose.
    """
    prompts: list
    noise: Callable


def sum_over_processes(tensors):
    """Replace each tensor by its sum over all processes of torch.distributed; a process alone changes nothing."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def rsaft_gradient(batches, generate, reward, params, rho=0.0, rho_w=0.0, gaussian_draws=0, window=False):
    """The gradient of the flattened reward, E[ r( x0(xT, c; theta + e) + d, c ) ] (Eq. 19), left in `params`' .grad.

    It points uphill: use an optimizer with maximize=True. With both radii 0 it is the plain gradient of Eq. 4.

    batches: list of Batch, the micro-batches of one update; with several processes, those of this one.
    generate: (Batch, start) -> (images, start), the same each time for the same weights: images (n B, 3, H, W), n of
    each prompt, with a graph to `params`; start None is a whole rollout, and the start that is returned lets a later
    call begin where the gradient does.
    reward: (images, prompts) -> one value per image. rho: radius of the pictures' perturbation; rho_w: of the weights'.
    gaussian_draws: if not 0, the mean over that many random directions of norm rho takes the worst one's place.
    window: leave out of the second rollout what carries no gradient. That is not the paper's: the weights' perturbation
    then reaches the picture through those steps alone that are differentiated.

    Returns a dict of floats, means over the pictures: the reward (of the first picture of each prompt) and, for each
    perturbation that is on, the norm reached, the fall of the reward that the first order predicts, and the fall
    measured. Every picture costs 1 evaluation of the reward, or with rho 1 + m for m directions (1, or gaussian_draws);
    rho_w adds m, and 1 more if there is a rho.
    """
    count = torch.tensor(sum(len(batch.prompts) for batch in batches))
    sum_over_processes([count])
    total, log, kept = count.item(), defaultdict(float), []
    for p in params:
        p.grad = None
    for batch in batches:                                                      # first pass, at theta
        x0, start = generate(batch, None)
        n = len(x0) // len(batch.prompts)
        prompts, share = batch.prompts * n, 1 / (total * n)             # one picture's share in the mean
        r, g = reward_gradient(reward, x0, prompts)
        log["reward"] += r[:len(batch.prompts)].sum().item() / total
        uphill, deltas = g, [0.0]
        if rho > 0:
            directions = [batch.noise(f"gaussian {i}", (n, *x0.shape[1:])).transpose(0, 1).flatten(0, 1)
                          for i in range(gaussian_draws)] or [g]
            deltas = [sample_perturbation(direction, rho) for direction in directions]           # d, Eq. 15
            if rho_w > 0:                                                      # its value, for the log alone
                with torch.no_grad():
                    r_d = sum(reward(x0 + delta, prompts) for delta in deltas) / len(deltas)
            else:
                r_d, uphill = reward_gradient(reward, x0, prompts, deltas)
            log["noise_fall_measured"] += share * (r - r_d).sum().item()
            for delta in deltas:
                reached = (x0.detach() + delta - x0.detach()).flatten(1).norm(dim=1)
                log["noise_fall_predicted"] -= share * (g * delta).sum().item() / len(deltas)
                log["noise_norm"] += share * reached.sum().item() / len(deltas)
        x0.backward(share * uphill)
        kept.append((start if window else None, deltas, r))
    sum_over_processes([p.grad for p in params])

    if rho_w > 0:
        # Only now, with the whole batch seen, is the gradient known whose direction e takes.
        grads = [p.grad for p in params]
        epsilons = parameter_perturbation(grads, rho_w)                                          # e, Eq. 17
        predicted = -sum((grad * e).sum().item() for grad, e in zip(grads, epsilons))
        for p in params:
            p.grad = None
        with perturbed(params, epsilons) as reached:
            norm = nn.utils.get_total_norm(reached).item()
            for batch, (start, deltas, r) in zip(batches, kept):               # second pass, at theta + e
                x0, _ = generate(batch, start)
                r_e, g = reward_gradient(reward, x0, batch.prompts * n, deltas)      # at x0' + d: Eq. 19
                x0.backward(share * g)
                if rho > 0:                                                    # at x0', for the log alone
                    with torch.no_grad():
                        r_e = reward(x0, batch.prompts * n)
                log["sam_fall_measured"] += share * (r - r_e).sum().item()
        sum_over_processes([p.grad for p in params])

    sums = torch.tensor(list(log.values()), dtype=torch.float64)               # these are of this process alone
    sum_over_processes([sums])
    log = dict(zip(log, sums.tolist()))
    return {**log, "sam_norm": norm, "sam_fall_predicted": predicted} if rho_w > 0 else log


# ---- LoRA (arXiv 2106.09685) ---------------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """A frozen linear layer plus scale * B A, in float32 whatever the layer's dtype. B starts at 0: no change."""

    def __init__(self, linear, rank, generator):
        super().__init__()
        self.linear, self.scale = linear, 1.0
        bound = linear.in_features ** -0.5
        A = (2 * torch.rand(rank, linear.in_features, generator=generator) - 1) * bound
        self.A = nn.Parameter(A.to(linear.weight.device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x):
        y = self.linear(x)
        return (y.float() + self.scale * (x.float() @ self.A.T @ self.B.T)).to(y.dtype)


def add_lora(unet, rank, generator=None):
    """Freeze a UNet and put a LoRALinear around each attention projection (to_q, to_k, to_v, to_out.0).

    Returns the trained parameters, a list of float32 tensors in a fixed order.
    """
    unet.requires_grad_(False)
    for name, module in list(unet.named_modules()):
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")) and isinstance(module, nn.Linear):
            unet.set_submodule(name, LoRALinear(module, rank, generator))
    return [p for p in unet.parameters() if p.requires_grad]


def lora_parameters(unet):
    """The adapter under diffusers' names, {"unet.<module>.lora_A.weight": parameter, ...}; alpha is the rank.

    Trap: without the prefix "unet." diffusers loads nothing, and raises nothing.
    """
    return {f"unet.{name}.lora_{part}.weight": getattr(layer, part)
            for name, layer in unet.named_modules() if isinstance(layer, LoRALinear) for part in "AB"}


@contextlib.contextmanager
def lora_scale(unet, scale):
    """Inside the with block the adapter counts `scale` times; 0 is the base model. Outside it counts once."""
    layers = [module for module in unet.modules() if isinstance(module, LoRALinear)]
    try:
        for layer in layers:
            layer.scale = scale
        yield
    finally:
        for layer in layers:
            layer.scale = 1.0


ADAPTER = "pytorch_lora_weights.safetensors"


def write_whole(path, content):
    """Write bytes to a file that has at any moment, whatever happens, all of its old content or all of the new."""
    new = Path(f"{path}.new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def save_lora(adapter, folder):
    """Write an adapter, named as in `lora_parameters`, so that diffusers' load_lora_weights(folder) takes it."""
    from safetensors.torch import save
    Path(folder).mkdir(exist_ok=True)
    write_whole(Path(folder, ADAPTER), save({key: p.detach().cpu() for key, p in adapter.items()}))


def set_lora(unet, state):
    """Copy an adapter, named as in `lora_parameters`, into the UNet's own. Raises ValueError if the names differ."""
    own = lora_parameters(unet)
    if own.keys() != state.keys():
        raise ValueError(f"surplus or missing: {sorted(own.keys() ^ state.keys())}")
    with torch.no_grad():
        for key, tensor in state.items():
            own[key].copy_(tensor)


def load_lora(unet, folder):
    """Add the adapter in `folder` to a UNet that has none. Raises UserError if it is not one for this UNet."""
    from safetensors.torch import load_file
    with explained(f"the adapter in {folder} doesn't fit this model"):
        state = load_file(Path(folder, ADAPTER))
        add_lora(unet, next(tensor.shape[0] for key, tensor in state.items() if key.endswith(".lora_A.weight")))
        set_lora(unet, state)


# ---- Six rewards -----------------------------------------------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images, size, pad=False):
    """Images (B, 3, H, W) in [0, 1] to what a vision tower takes, (B, 3, size, size), with the gradient kept.

    Antialiased bicubic resize of the short side and a centre crop: CLIP's preprocessing of 8-bit pictures. That rounds
    the overshoot away, hence the clamp: where it acts there is no gradient. With `pad` the long side is resized, zeros
    fill the square and nothing is clamped (HPSv2's own). Either way the right size passes untouched.
    """
    H, W = images.shape[-2:]
    if (H, W) != (size, size):
        side = max(H, W) if pad else min(H, W)
        H, W = round(H * size / side), round(W * size / side)
        images = F.interpolate(images.float(), (H, W), mode="bicubic", antialias=True)
        images = images if pad else images.clamp(0, 1)
        top, left = int((H - size) / 2), int((W - size) / 2)  # negative where there is something to fill
        images = F.pad(images, (-left, size - W + left, -top, size - H + top))
    mean, std = images.new_tensor([CLIP_MEAN, CLIP_STD])[..., None, None]
    return (images - mean) / std


def frozen(device, *modules):
    """Put modules where they are used, for use alone."""
    for module in modules:
        module.to(device).eval().requires_grad_(False)


def tokenizer(files, length, device):
    """A function of B prompts to input_ids and attention_mask, (B, length) each: truncated, padded to the maximum."""
    from transformers import AutoTokenizer
    tokenize = AutoTokenizer.from_pretrained(files["tokenizer_config.json"])
    return lambda prompts: tokenize(list(prompts), padding="max_length", truncation=True, max_length=length,
                                    return_tensors="pt").to(device)


def load_clip(files):
    """A transformers CLIPModel in float32; without dtype the file's own would be kept."""
    from transformers import CLIPModel
    return CLIPModel.from_pretrained(files["config.json"], dtype=torch.float32)


def embed_images(model, images, pad=False):
    """The image embeddings of a CLIPModel, (B, projection_dim), not normalised."""
    pixels = clip_pixels(images, model.config.vision_config.image_size, pad)
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def clip_reward(model, files, device, scale, pad=False):
    """scale * cosine of text and image under a CLIPModel."""
    frozen(device, model)
    tokens = tokenizer(files, model.config.text_config.max_position_embeddings, device)

    def reward(images, prompts):
        text = model.text_projection(model.text_model(input_ids=tokens(prompts).input_ids).pooler_output)
        return scale * F.cosine_similarity(text, embed_images(model, images, pad))

    return reward


def pickscore(files, device):
    """PickScore (arXiv 2305.01569), exp(logit_scale) * cosine: about 18 to 24."""
    model = load_clip(files)
    return clip_reward(model, files, device, model.logit_scale.exp().item())


def clipscore(files, device):
    """CLIPScore (arXiv 2104.08718) as 100 * cosine under CLIP ViT-L/14."""
    return clip_reward(load_clip(files), files, device, 100.0)


def load_checkpoint(files, name):
    """The tensors of a .pt or .pth file, from a folder or the hub; never a pickle that could run code."""
    from huggingface_hub import hf_hub_download
    path = Path(files[name], name) if Path(files[name]).is_dir() else hf_hub_download(files[name], name)
    return torch.load(path, map_location="cpu", weights_only=True)


def renamed(state, rules):
    """A checkpoint under new names: each of the (pattern, replacement) rules applied to every key, in order."""
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, key): tensor for key, tensor in state.items()}
    return state


OPEN_CLIP = (  # open_clip's names to those of transformers' CLIPModel
    (r"^visual\.", "vision_model."), (r"^(?!vision_model\.|logit_scale)", "text_model."),
    (r"^vision_model\.proj$", "visual_projection.weight"), (r"^text_model\.text_projection$", "text_projection.weight"),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"), (r"\.ln_final\.", ".final_layer_norm."),
    (r"\.(token_embedding|class_embedding)", r".embeddings.\1"), (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.ln_pre\.", ".pre_layrnorm."), (r"\.ln_post\.", ".post_layernorm."), (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.transformer\.resblocks\.", ".encoder.layers."), (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."))


# CLIP ViT-H/14. Trap: the default hidden_act of CLIPConfig, quick_gelu, is wrong for it.
VIT_H = dict(text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              hidden_act="gelu"),
             vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                                hidden_act="gelu", patch_size=14, image_size=224),
             projection_dim=1024)


def hpsv2(files, device):
    """HPSv2 and HPSv2.1 (arXiv 2306.09341), 100 * cosine: about 23 to 28, and 14 to 32. CLIP in open_clip's layout."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    state = load_checkpoint(files, next(name for name in files if name.endswith(".pt")))["state_dict"]
    state = renamed(state, OPEN_CLIP)
    for key in [key for key in state if ".attn.in_proj_" in key]:
        for letter, part in zip("qkv", state.pop(key).chunk(3)):
            state[key.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")] = part
    for key in "visual_projection.weight", "text_projection.weight":
        state[key] = state[key].T.contiguous()
    config = CLIPConfig(**VIT_H)
    # Trap: the text is pooled at the first eos_token_id; with an id that never occurs, silently at position 0.
    config.text_config.eos_token_id = AutoTokenizer.from_pretrained(files["tokenizer_config.json"]).eos_token_id
    model = CLIPModel(config)
    model.load_state_dict(state)
    return clip_reward(model, files, device, 100.0, pad=True)


def linear_head(state):
    """The five linear layers, with nothing between them, that end ImageReward and the aesthetic predictor."""
    layers = nn.ModuleDict({i: nn.Linear(*state[f"layers.{i}.weight"].shape[::-1]) for i in "02467"})
    nn.ModuleDict({"layers": layers}).load_state_dict(state)
    return nn.Sequential(*layers.values())


BLIP_VISION = (  # ImageReward's names to those of transformers' BlipVisionModel
    (r"^(cls_token)$", "embeddings.class_embedding"), (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."), (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."), (r"\.norm([12])\.", r".layer_norm\1."), (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."))


BLIP_LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                  image_size=224, patch_size=16, layer_norm_eps=1e-6)
BLIP_TEXT = dict(vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12, is_decoder=True)


def imagereward(files, device):
    """ImageReward (arXiv 2304.05977): BLIP and a linear head, standardised; about -2 to 2."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
    vision = BlipVisionModel(BlipVisionConfig(**BLIP_LARGE))
    text = BlipTextModel(BlipTextConfig(**BLIP_TEXT), add_pooling_layer=False)  # a "decoder" has the cross attention
    state = load_checkpoint(files, "ImageReward.pt")

    def part(prefix):
        return {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}

    for unused in "blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids":
        part(unused)
    vision.load_state_dict(renamed(part("blip.visual_encoder."), BLIP_VISION))
    text.load_state_dict(part("blip.text_encoder."))
    head = linear_head(part("mlp."))
    if state:
        raise ValueError(f"unexpected keys {list(state)}")
    frozen(device, vision, text, head)
    tokens = tokenizer(files, 35, device)

    def reward(images, prompts):
        image = vision(pixel_values=clip_pixels(images, BLIP_LARGE["image_size"])).last_hidden_state
        hidden = text(**tokens(prompts), encoder_hidden_states=image, is_decoder=False).last_hidden_state[:, 0]
        return (head(hidden)[:, 0] - 0.16717362830052426) / 1.0333394966054072

    return reward


def aesthetic(files, device):
    """The LAION aesthetic predictor: a linear head on CLIP ViT-L/14, about 1 to 10; it ignores the prompt."""
    clip, head = load_clip(files), linear_head(load_checkpoint(files, "aesthetic-model.pth"))
    frozen(device, clip, head)
    return lambda images, prompts: head(F.normalize(embed_images(clip, images), dim=-1))[:, 0]


# name: (loader, {file that must be there: its id on the hub}). A loader takes ({file: folder or hub id}, device).
CLIP_H, CLIP_L = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
REWARDS = {
    "pickscore": (pickscore, {"config.json": "yuvalkirstain/PickScore_v1", "tokenizer_config.json": CLIP_H}),
    "hpsv2": (hpsv2, {"HPS_v2_compressed.pt": "xswu/HPSv2", "tokenizer_config.json": CLIP_H}),
    "hpsv2.1": (hpsv2, {"HPS_v2.1_compressed.pt": "xswu/HPSv2", "tokenizer_config.json": CLIP_H}),
    "imagereward": (imagereward, {"ImageReward.pt": "zai-org/ImageReward",
                                  "tokenizer_config.json": "google-bert/bert-base-uncased"}),
    "aesthetic": (aesthetic, {"config.json": CLIP_L, "aesthetic-model.pth": "trl-lib/ddpo-aesthetic-predictor"}),
    "clipscore": (clipscore, {"config.json": CLIP_L, "tokenizer_config.json": CLIP_L}),
    "judge": (pickscore, {"config.json": None, "tokenizer_config.json": None}),  # the judge in tiny/; on no hub
}


def reward_files(name, models=None):
    """Where the reward `name` is to be had, {file: folder or hub id}; loads nothing. Raises UserError."""
    file = name.rpartition(":")[0]
    if file.endswith(".py"):
        if not Path(file).is_file():
            raise UserError(f"reward {name}: there is no file {file}")
        return {}
    if name not in REWARDS:
        raise UserError(f"unknown reward {name!r}; there are {', '.join(REWARDS)}, and FILE.py:FUNCTION for your own")
    hub = REWARDS[name][1]
    if not models and not all(hub.values()):
        raise UserError(f"the reward {name} is on no hub; --models DIR must name the folder that holds {name}/")
    if not models:
        return {file: find_model(source) for file, source in hub.items()}
    if missing := [str(Path(models, name, file)) for file in hub if not Path(models, name, file).is_file()]:
        raise UserError(f"reward {name}: there is no {' and no '.join(missing)}; see --models")
    return dict.fromkeys(hub, str(Path(models, name)))


def make_reward(name, models=None, device="cpu"):
    """The reward `name` as a function reward(images, prompts) -> (B,), frozen and differentiable in the images.

    name: one of REWARDS, or "FILE.py:FUNCTION", a function of your own with that signature. images: (B, 3, H, W)
    in [0, 1]; prompts: B strings. models: a folder with a folder per reward; without it the weights come from the
    hub. Raises UserError where there is no such reward or it doesn't load.
    """
    files = reward_files(name, models)
    with explained(f"the reward {name} doesn't load"):
        if files:
            return REWARDS[name][0](files, device)
        file, _, function = name.rpartition(":")
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)


# ---- Random numbers by name: a sample's noise depends on what it is for, never on the order of the draws ------------

def named_generator(*name):
    """A CPU generator seeded by `name`, any numbers and strings; independent of every other name's."""
    return torch.Generator().manual_seed(int(hashlib.sha256(repr(name).encode()).hexdigest()[:16], 16))


def micro_batches(prompts, name, size, device="cpu"):
    """`prompts` as a list of Batch of at most `size`; sample i's noise depends on (*name, i, purpose) alone."""
    def batch(indices):
        def noise(purpose, shape):
            return torch.stack([torch.randn(shape, generator=named_generator(*name, i, purpose))
                                for i in indices]).to(device)
        return Batch([prompts[i] for i in indices], noise)

    return [batch(range(len(prompts))[first:first + size]) for first in range(0, len(prompts), size)]


def training_prompts(prompts, seed, update, batch_size):
    """The prompts of one update, counted from 0; all are used once, in a new random order, before any comes again."""
    def prompt(position):
        epoch, place = divmod(position, len(prompts))
        return prompts[torch.randperm(len(prompts), generator=named_generator(seed, "prompts", epoch))[place]]

    return [prompt(update * batch_size + i) for i in range(batch_size)]


def evaluation_batches(prompts, count, size, device="cpu"):
    """The pictures of every evaluation, whatever the run's seed: the first `count` of `prompts`, over and over."""
    return micro_batches([prompts[i % len(prompts)] for i in range(count)], ("evaluation",), size, device)


def evaluation_latents(count, shape):
    """The noise xT of the first `count` evaluation pictures, (count, *shape), with shape (channels, h, w).

    With the same prompts a diffusers pipeline that gets it as `latents` makes the pictures of the grid.
    """
    return evaluation_batches([""], count, count)[0].noise("xT", shape)


# ---- Models --------------------------------------------------------------------------------------------------------

@functools.cache
def find_model(model):
    """A folder or hub id for from_pretrained, after one short probe; without a network the hub's cached copy."""
    if Path(model).is_dir():
        return model
    from huggingface_hub import HfApi, snapshot_download
    try:
        HfApi().model_info(model, timeout=2)
        return model
    except Exception as error:
        with contextlib.suppress(Exception):
            return snapshot_download(model, local_files_only=True)
        raise UserError(f"{model} is no folder here, and the hub doesn't have it or can't be reached "
                        f"({type(error).__name__}); name local folders (--model DIR, --models DIR), or try --tiny")


def model_size(model, height=None, width=None):
    """The latents' shape (channels, h, w) and the pictures' height and width in pixels, before any weights load.

    model: from `find_model`; height, width: by default the model's own. Raises UserError for a model that is no
    Stable Diffusion, and for a size that it can't make.
    """
    from huggingface_hub import hf_hub_download
    locate = Path if Path(model).is_dir() else hf_hub_download
    with explained(f"{model} is no Stable Diffusion 1 or 2, the only models supported"):
        kind, unet, vae = (json.loads(Path(locate(model, name)).read_text())
                           for name in ("model_index.json", "unet/config.json", "vae/config.json"))
        for part, name in (kind, "StableDiffusionPipeline"), (unet, "UNet2DConditionModel"), (vae, "AutoencoderKL"):
            if part["_class_name"] != name:
                raise ValueError(f"it has a {part['_class_name']} where a {name} should be")
        channels, factor = unet["in_channels"], 2 ** (len(vae["block_out_channels"]) - 1)
        height, width = height or factor * unet["sample_size"], width or factor * unet["sample_size"]
    if height % factor or width % factor:
        raise UserError(f"--height and --width must be multiples of {factor} for this model, not {height} and {width}")
    return (channels, height // factor, width // factor), height, width


def load_pipeline(model, dtype=torch.float32, device="cpu"):
    """A frozen diffusers StableDiffusionPipeline from a folder or a hub id. Raises UserError if it doesn't load."""
    from diffusers import StableDiffusionPipeline
    with explained(f"the model {model} doesn't load"):
        pipe = StableDiffusionPipeline.from_pretrained(model, dtype=dtype, safety_checker=None, feature_extractor=None,
                                                       requires_safety_checker=False)
    frozen(device, pipe.unet, pipe.vae, pipe.text_encoder)
    return pipe


def checkpoint_gradients(pipe):
    """Recompute the activations of UNet and VAE in the backward pass instead of keeping them."""
    pipe.unet.enable_gradient_checkpointing()
    pipe.vae.enable_gradient_checkpointing()


def make_embed(pipe):
    """A function embed(prompts) -> (B, tokens, width), the prompt_embeds of a StableDiffusionPipeline, frozen.

    A prompt goes through the text encoder once and is kept.
    """
    @functools.cache
    @torch.no_grad()
    def embed_one(prompt):
        return pipe.encode_prompt(prompt, pipe.device, 1, False)[0]

    return lambda prompts: torch.cat([embed_one(prompt) for prompt in prompts])


def make_generate(pipe, sampling_steps, guidance_scale, latent_shape):
    """A function generate(batch, start=None, *, plan) -> (images, start), from a StableDiffusionPipeline's parts.

    start: the latents at the first step with gradient, (B, *latent_shape); None is a rollout from xT. images:
    (B, 3, H, W); with plan.renoised = n there are n + 1 times as many, the sample's own B first. The scheduler is DDIM,
    made from the pipeline's own. Raises UserError for a scheduler that DDIM can't follow.
    """
    from diffusers import DDIMScheduler
    with explained("DDIM can't sample this model"):
        steps = ddim_steps(DDIMScheduler.from_config(pipe.scheduler.config), sampling_steps)
    embed = make_embed(pipe)

    def generate(batch, start=None, *, plan):
        prompt_embeds, negative_embeds = embed(batch.prompts), embed([""] * len(batch.prompts))
        denoise = make_denoise(pipe.unet, prompt_embeds, negative_embeds, guidance_scale)
        if start is None:
            start = rollout(denoise, batch.noise("xT", latent_shape), steps, plan, stop=plan.window)
        latents = [rollout(denoise, start, steps, plan, first=plan.window)]
        for k in range(plan.renoised):
            latents.append(renoise(denoise, latents[0], steps[-1], batch.noise(f"renoise {k}", latent_shape)))
        return decode(pipe.vae, torch.cat(latents)), start

    return generate


# ---- Evaluation ----------------------------------------------------------------------------------------------------

def short_name(name):
    """What a reward is called in the log: FILE.py:FUNCTION is FUNCTION."""
    return name.rpartition(":")[2]


def scores_by_name(rewards, images, prompts):
    """{name: (B,)} of all `rewards`, {name: function}; a function that returns a dict gives NAME_KEY for each key."""
    scores = {}
    for name, reward in rewards.items():
        score = reward(images, prompts)
        parts = {f"_{key}": value for key, value in score.items()} if isinstance(score, dict) else {"": score}
        scores |= {short_name(name) + key: value for key, value in parts.items()}
    return scores


def check_reward(name, reward, prompts, height, width, device, trained, differentiable):
    """Score a random picture for each of `prompts`. Raises UserError unless the scores can be used."""
    image = torch.rand(1, 3, height, width, generator=named_generator("check")).to(device)
    for first in range(0, len(prompts), 32):
        few = prompts[first:first + 32]
        images = image.repeat(len(few), 1, 1, 1).requires_grad_(differentiable)
        with explained(f"the reward {name} can't be used"):
            scores = scores_by_name({name: reward}, images, few)
            for score in scores.values():
                if score.shape != (len(few),):
                    raise ValueError(f"it returned the shape {tuple(score.shape)} for {len(few)} pictures")
                if not score.isfinite().all():
                    raise ValueError("it is not finite on a random picture")
            if trained and short_name(name) not in scores:
                raise ValueError("it returns several scores, so it can't be trained on")
            if differentiable and not score.requires_grad:
                raise ValueError("it is not differentiable in the images, so it can't be trained on")
            if differentiable and not torch.autograd.grad(score.sum(), images)[0].isfinite().all():
                raise ValueError("its gradient is not finite on a random picture")


def is_hacking(trained, held_out, patience=3):
    """The alarm: over the last `patience` evaluations in a row the training reward rose and the held-out score fell.

    trained, held_out: the two scores at each evaluation so far, equally long lists.
    """
    pairs = list(zip(trained, held_out))[-patience - 1:]
    return len(pairs) > patience and all(r1 > r0 and h1 < h0 for (r0, h0), (r1, h1) in zip(pairs, pairs[1:]))


def save_grid(images, path, columns=4):
    """The images as one PNG; small ones are enlarged by a whole factor, so that a person sees something."""
    from PIL import Image
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns), value=1.0)
    rows = [torch.cat(list(row), dim=-1) for row in images.split(columns)]
    factor = max(1, 128 // images.shape[-2])
    pixels = torch.cat(rows, dim=-2).repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    Image.fromarray(pixels.permute(1, 2, 0).mul(255).round().byte().numpy()).save(path)


# ---- The run -------------------------------------------------------------------------------------------------------

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's; rank 0 writes
CHECKPOINT = "checkpoint.pt"
RESULTS = "config.json", "log.jsonl", "samples", "best", ADAPTER, CHECKPOINT
MAY_CHANGE = ("train_steps", "micro_batch_size", "gradient_checkpointing", "checkpoint_every", "resume", "overwrite",
              "stop_on_hacking", "tensorboard", "device", "out", "versions")  # when a run is resumed


class RunStopped(Exception):
    """The run ended early; what it had is saved. `main` prints it as one line and exits with 1."""


def split_weight(text):
    """NAME=WEIGHT to (NAME, WEIGHT); without a weight it is 1."""
    with contextlib.suppress(ValueError):
        name, equals, weight = text.rpartition("=")
        return (name, float(weight)) if equals else (text, 1.0)
    return text, 1.0


def check(config):
    """Raise UserError for settings that can't work, as far as that can be told without loading anything."""
    def require(condition, message):
        if not condition:
            raise UserError(message)

    for name, value in asdict(config).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            require(0 <= value < math.inf and (value > 0 or name in config.may_be_zero),
                    f"--{name.replace('_', '-')} can't be {value}")
    with explained(f"--grad-steps {config.grad_steps} won't do with --sampling-steps {config.sampling_steps}"):
        METHODS[config.method](config.sampling_steps, named_generator("check"), config.grad_steps)
    parts = PROCESSES * (config.micro_batch_size or 1)
    require(config.batch_size % parts == 0, f"--batch-size {config.batch_size} can't be divided by {parts}, "
            f"--micro-batch-size {config.micro_batch_size or 1} times {PROCESSES} processes")
    trained = [] if config.evaluate else [split_weight(text) for text in config.reward]
    require(all(map(math.isfinite, dict(trained).values())), f"--reward {' '.join(config.reward)}: give finite weights")
    names = [short_name(name) for name in [*(name for name, _ in trained), *config.eval_reward]]
    require(len(set(names)) == len(names), f"a reward is named twice ({', '.join(names)}); what is trained on can't be "
            "held out, give another --eval-reward")
    require(not config.models or Path(config.models).is_dir(), f"--models {config.models} is no folder")
    if config.device:
        kind = config.device.partition(":")[0]
        require(kind in ("cuda", "mps", "cpu") and getattr(torch, kind).is_available(),
                f"--device {config.device} is not here; leave the flag out, or use cpu")
    require(config.out or not (config.resume or config.overwrite), "--resume and --overwrite need the folder: --out")
    require(bool(config.resume) + bool(config.overwrite) + bool(config.evaluate) < 2,
            "--resume, --overwrite and --evaluate exclude each other")
    if config.out:
        path = Path(config.out).absolute()
        parent = next(p for p in (path, *path.parents) if p.exists())
        require(parent.is_dir() and os.access(parent, os.W_OK), f"--out {config.out}: can't write to {parent}")
        used = parent == path and any(path.iterdir())
        require(not used or config.resume or config.overwrite,
                f"--out {config.out} is not empty; name another folder, or add --resume or --overwrite")
        require(not used or (path / "config.json").is_file(), f"--out {config.out} is not empty, and holds no run")
    if config.evaluate:
        require(Path(config.evaluate, ADAPTER).is_file(), f"--evaluate {config.evaluate}: there is no {ADAPTER} in it")
        require(config.eval_reward, "--evaluate needs the scores to judge by: --eval-reward")
    require(not config.stop_on_hacking or config.eval_every and config.eval_reward,
            "--stop-on-hacking needs evaluations, --eval-every, and a held-out score, --eval-reward")
    if config.tensorboard:
        with explained("--tensorboard needs a package that isn't here, pip install tensorboard"):
            importlib.import_module("torch.utils.tensorboard")


def read_prompts(path):
    """The lines of a UTF-8 text file that aren't empty. Raises UserError."""
    with explained(f"the prompt file {path} can't be read"):
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"the prompt file {path} is empty; write one prompt a line")
    return prompts


def quiet_libraries():
    """Leave the terminal to our own lines: no notes about torchvision, no bars for weights. Returns the versions."""
    import transformers
    transformers.logging.set_verbosity_error()
    import diffusers
    diffusers.logging.set_verbosity_error()
    for library in transformers, diffusers:
        library.logging.disable_progress_bar()
    return {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}


def peak_gb(device):
    """Peak memory so far in GiB: on CUDA what torch took there, elsewhere the process's; None on Windows."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    with contextlib.suppress(ImportError):
        from resource import RUSAGE_SELF, getrusage
        return getrusage(RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


class Run:
    """What training and judging share: settings, prompts, rewards, the model, and the folder for the results.

    Raises UserError before anything is written. `fit` is the training loop of any method that leaves a gradient;
    a method that needs none of the reward says differentiable=False.
    """

    def __init__(self, config, differentiable=True):
        check(config)
        self.config, self.prompts = config, read_prompts(config.prompts)
        eval_prompts = read_prompts(config.eval_prompts) if config.eval_prompts else self.prompts
        self.weights = {} if config.evaluate else dict(map(split_weight, config.reward))
        self.has_sharpness = bool(self.weights) and (differentiable or self.weights.keys() <= REWARDS.keys())
        names = [*self.weights, *config.eval_reward]
        model = find_model(config.model)
        for name in names:
            reward_files(name, config.models)
        self.latent_shape, height, width = model_size(model, config.height, config.width)
        self.device = config.device or next(d for d in ("cuda", "mps", "cpu") if getattr(torch, d).is_available())
        digest = hashlib.sha256(repr((self.prompts, eval_prompts)).encode()).hexdigest()
        self.settings = {**asdict(config), "height": height, "width": width, "prompts_sha256": digest}
        self.saved = self.read_checkpoint() if config.resume else None

        print(f"loading {', '.join(names)} and {config.model}".replace(f"{HERE}{os.sep}", ""), flush=True)
        self.settings |= {"device": self.device, "versions": quiet_libraries()}
        if PROCESSES > 1:
            if self.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group()
        self.rewards = dict.fromkeys(names)
        for name in sorted(names, key=REWARDS.__contains__):  # the reader's own first: they fail fastest
            self.rewards[name] = make_reward(name, config.models, self.device)
            # A model takes any prompt; a function of your own may not, so it is shown all of them.
            shown = list(dict.fromkeys(self.prompts + eval_prompts))[:1 if name in REWARDS else None]
            check_reward(name, self.rewards[name], shown, height, width, self.device,
                         name in self.weights, differentiable and name in self.weights)
        self.pipe = load_pipeline(model, getattr(torch, config.dtype), self.device)
        if config.gradient_checkpointing:
            checkpoint_gradients(self.pipe)
        self.generate = make_generate(self.pipe, config.sampling_steps, config.guidance_scale, self.latent_shape)
        self.micro_batch_size = config.micro_batch_size or config.batch_size // PROCESSES
        self.evaluation = evaluation_batches(eval_prompts, config.eval_images, self.micro_batch_size, self.device)
        self.counts = defaultdict(int)
        self.pipe.unet.register_forward_pre_hook(self.count_network)

    def count_network(self, unet, inputs):
        """One network evaluation is one UNet forward of one sample; those with gradient are counted apart."""
        gradient = "with" if torch.is_grad_enabled() else "without"
        self.counts[f"network_evaluations_{gradient}_gradient"] += len(inputs[0]) * PROCESSES

    def reward(self, images, prompts):
        """What is maximised: the weighted sum of the training rewards, (B,)."""
        self.counts["reward_evaluations"] += len(images) * PROCESSES
        return sum(weight * self.rewards[name](images, prompts) for name, weight in self.weights.items())

    def evaluate(self):
        """Score the pictures of the fixed prompts and noise. Returns {name: mean} and the first 16 pictures."""
        sampling, parts = Plan((False,) * self.config.sampling_steps), {}
        for i in range(RANK, len(self.evaluation), PROCESSES):
            batch = self.evaluation[i]
            with torch.no_grad():
                images, _ = self.generate(batch, plan=sampling)
                scores = scores_by_name(self.rewards, images, batch.prompts)
            if self.has_sharpness:
                radius = S1_RADIUS_TINY if self.config.tiny else S1_RADIUS
                scores["s1"] = reward_sharpness(self.reward, images, batch.prompts, radius)
            shown = max(0, 16 - i * self.micro_batch_size)
            parts[i] = {name: score.sum().item() for name, score in scores.items()}, images[:shown].cpu()
        if PROCESSES > 1:
            gathered = [None] * PROCESSES
            torch.distributed.all_gather_object(gathered, parts)
            parts = {i: part for process in gathered for i, part in process.items()}
        scores, pictures = zip(*(parts[i] for i in range(len(self.evaluation))))
        return ({name: sum(score[name] for score in scores) / self.config.eval_images for name in scores[0]},
                torch.cat(pictures))

    def read_checkpoint(self):
        """The checkpoint in --out, None where there is none yet. Raises UserError if its run had other settings."""
        folder = Path(self.config.out)
        if not (folder / CHECKPOINT).is_file():
            return None
        with explained(f"--resume: the run in {folder} can't be read"):
            then = json.loads((folder / "config.json").read_text())
            saved = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
        now = json.loads(json.dumps(self.settings))
        for name in now.keys() - set(MAY_CHANGE):
            if now[name] != then.get(name):
                raise UserError(f"--resume: {folder} was begun with {name} {then.get(name)}, not {now[name]}")
        if saved["step"] > self.config.train_steps:
            raise UserError(f"--resume: the run in {folder} is past update {self.config.train_steps}")
        return saved

    @explained("the folder for the results can't be used")
    def open_out(self):
        """Begin to write, in --out or the next free runs/NNN; what is newer there than the checkpoint goes."""
        free = (f"runs/{number:03d}" for number in range(10 ** 6) if not Path(f"runs/{number:03d}").exists())
        self.out = Path(self.config.out or next(free))
        if RANK > 0:
            return
        if self.saved:
            os.truncate(self.out / "log.jsonl", self.saved["log_bytes"])
            for picture in (self.out / "samples").glob("step_*.png"):
                if int(picture.stem.removeprefix("step_")) > self.saved["step"]:
                    picture.unlink()
        else:
            for path in [self.out / name for name in RESULTS]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.settings, "out": str(self.out)}, indent=1)
        write_whole(self.out / "config.json", f"{text}\n".encode())
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.out, purge_step=self.saved["step"] + 1 if self.saved else None)

    def write(self, record):
        """Append a line to log.jsonl, and to tensorboard's log if wanted."""
        if RANK == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        if RANK == 0 and self.config.tensorboard:
            for name, value in record.items():
                self.board.add_scalar(("eval/" if "eval" in record else "train/") + name, value, record["step"])

    def fit(self, optimizer, gradient, copies=()):
        """The training loop, with evaluations, best adapter, alarm, checkpoints. Raises RunStopped.

        gradient: step -> a dict for the log; it leaves the gradient of that update, counted from 0, in what the
        optimizer has. copies: more tensors that a resumed run needs.
        """
        from tqdm import tqdm
        config, params = self.config, optimizer.param_groups[0]["params"]
        adapter = lora_parameters(self.pipe.unet)
        step, history, best = 0, [], {}                    # updates done, evaluations as logged, the best adapter
        if self.saved:
            with explained(f"the checkpoint in {config.out} doesn't fit this model"):
                set_lora(self.pipe.unet, self.saved["adapter"])
                optimizer.load_state_dict(self.saved["optimizer"])
                for tensor, copy in zip(copies, self.saved["copies"], strict=True):
                    tensor.data.copy_(copy)
            step, history, best = (self.saved[name] for name in ("step", "history", "best"))
        if not config.eval_reward:
            print("nothing is held out, so reward hacking can't be seen; give --eval-reward")
        self.open_out()

        def evaluate_now():
            scores, pictures = self.evaluate()
            names, weights = list(scores), self.weights.values()      # in order: trained on, held out, s1
            history.append({"eval": True, "step": step, **scores, "alarm": False})
            if config.eval_reward:
                judge = names[len(weights)]
                trained = [sum(w * scores[name] for w, name in zip(weights, names)) for scores in history]
                history[-1]["alarm"] = is_hacking(trained, [scores[judge] for scores in history])
                if scores[judge] > best.get(judge, -math.inf):
                    kept = {key: p.detach().cpu().clone() for key, p in adapter.items()}
                    best.update({"step": step, judge: scores[judge], "adapter": kept})
            if history[-1]["alarm"]:
                progress.set_description("ALARM: reward hacking")
            self.write(history[-1])
            if RANK == 0:
                save_grid(pictures, self.out / "samples" / f"step_{step:06d}.png")

        def save():
            if RANK == 0:
                save_lora(adapter, self.out)
                if best:
                    save_lora(best["adapter"], self.out / "best")
                    text = json.dumps({name: value for name, value in best.items() if name != "adapter"})
                    write_whole(self.out / "best" / "best.json", f"{text}\n".encode())
                state = {"step": step, "history": history, "best": best, "adapter": adapter, "copies": list(copies),
                         "optimizer": optimizer.state_dict(), "log_bytes": (self.out / "log.jsonl").stat().st_size}
                torch.save(state, content := io.BytesIO())
                write_whole(self.out / CHECKPOINT, content.getvalue())

        def ask_to_stop(*_):
            if asked:
                raise KeyboardInterrupt
            asked.append(True)
            print("\nfinishing this update, then saving; once more stops at once", file=sys.stderr)

        asked = []
        handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        progress = tqdm(total=config.train_steps, initial=step, unit="update", disable=RANK > 0)
        try:
            while True:
                done = step == config.train_steps
                if config.eval_every and (done or step % config.eval_every == 0) and (
                        not history or history[-1]["step"] < step):
                    evaluate_now()
                done = done or config.stop_on_hacking and any(scores["alarm"] for scores in history)
                stop = torch.tensor(len(asked))
                sum_over_processes([stop])                 # all of them stop at the same step
                if done or stop or step and config.checkpoint_every and step % config.checkpoint_every == 0:
                    save()
                if done:
                    break
                if stop:
                    raise RunStopped(f"stopped after update {step}; the same flags and --resume --out {self.out} go on")
                began = time.perf_counter()
                self.counts.clear()
                record = gradient(step)
                record["grad_norm"] = nn.utils.clip_grad_norm_(params, config.max_grad_norm).item()
                if record["grad_norm"] == 0 or not all(map(math.isfinite, record.values())):
                    save()
                    raise RunStopped(f"update {step + 1} has no finite gradient ({record}); the last good adapter is "
                                     f"in {self.out}")
                optimizer.step()
                step += 1
                record["seconds"] = time.perf_counter() - began
                self.write({"step": step, **record, **self.counts, "peak_gb": peak_gb(self.device)})
                shown = f"reward={record['reward']:.3f}, seconds={record['seconds']:.1f}"
                progress.set_postfix_str(shown, refresh=False)
                progress.update()
        except OSError as error:
            raise RunStopped(f"stopped at update {step}, {error}; what {self.out} held is there; --resume goes on")
        except RunStopped:
            raise
        except Exception:
            save()
            raise
        finally:
            progress.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.report(history, best)

    def report(self, history, best):
        """What a user sees at the end."""
        print()
        if history:
            names = [name for name in history[0] if name not in ("eval", "step", "alarm")]
            roles = {**dict.fromkeys(names, "held out"), **dict.fromkeys(names[:len(self.weights)], "trained on"),
                     "s1": "sharpness"}
            print_table(["before", "after", "change"], {
                f"{name} ({roles[name]})": (history[0][name], history[-1][name], history[-1][name] - history[0][name])
                for name in names})
        alarms = [scores["step"] for scores in history if scores["alarm"]]
        print("best", {name: value for name, value in best.items() if name != "adapter"} if best else "is not known")
        print(f"ALARM: reward hacking at step {alarms}, the training reward rose and the held-out score fell" if alarms
              else "no alarm" if best else "nothing was held out, so reward hacking could not be seen")
        print(f"adapter, log.jsonl, config.json and samples/ are in {self.out}")


def train(config):
    """Tune the model by RSA-FT, or plain if both radii are 0. Raises UserError, then RunStopped."""
    run = Run(config)
    params = add_lora(run.pipe.unet, config.rank, named_generator(config.seed, "lora"))
    optimizer = torch.optim.AdamW(params, lr=config.learning_rate, betas=(0.9, 0.999),
                                  weight_decay=config.weight_decay, maximize=True)
    window, draws = config.sam_rollout == "window", config.noise_draws if config.noise_type == "gaussian" else 0

    def make_plan(step):
        rng = named_generator(config.seed, step, "plan")
        return METHODS[config.method](config.sampling_steps, rng, config.grad_steps)

    def gradient(step):
        prompts = training_prompts(run.prompts, config.seed, step, config.batch_size)
        batches = micro_batches(prompts, (config.seed, step), run.micro_batch_size, run.device)[RANK::PROCESSES]
        generate = functools.partial(run.generate, plan=make_plan(step))
        return rsaft_gradient(batches, generate, run.reward, params, config.noise, config.sam, draws, window)

    costs = network_evaluations(make_plan(0), config.guidance_scale > 1, config.sam > 0, window)
    print(f"{run.device} x {PROCESSES}, {config.dtype}, {sum(p.numel() for p in params):,} trained parameters; update "
          "1 takes {} network evaluations without gradient, {} with".format(*(config.batch_size * n for n in costs)))
    run.fit(optimizer, gradient)


def judge(config):
    """Score a saved adapter at several scales, beside the base model (scale 0). Raises UserError."""
    run = Run(config)
    load_lora(run.pipe.unet, config.evaluate)
    run.open_out()
    rows, base = {}, None
    for scale in (0.0, *config.lora_scale):
        with lora_scale(run.pipe.unet, scale):
            scores, pictures = run.evaluate()
        base = pictures if base is None else base
        if RANK == 0:
            save_grid(torch.cat([base, pictures], dim=-1), run.out / "samples" / f"scale_{scale:g}.png")
        run.write({"eval": True, "step": 0, "lora_scale": scale, **scores})
        rows[f"scale {scale:g}" if scale else "base model"] = scores.values()
    print_table(scores, rows)
    print(f"pairs of pictures, the base model's on the left, and log.jsonl are in {run.out}")


def print_table(columns, rows):
    """A table of numbers: column names, and {row name: numbers}."""
    width = max(map(len, rows))
    print(" " * width + "".join(f"{name:>{max(12, len(name) + 2)}}" for name in columns))
    for name, values in rows.items():
        print(f"{name:>{width}}" + "".join(f"{value:{max(12, len(column) + 2)}.3f}"
                                           for column, value in zip(columns, values)))


# ---- Command line --------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as everything else here does."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse(argv=None, kind=Config, tiny=TINY):
    """The Config of a command line. --tiny replaces defaults, and what is given wins. Raises UserError."""
    parser = Parser(description=kind.title, usage=f"python {kind.program} [FLAGS]",
                    argument_default=argparse.SUPPRESS, allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=118))
    for setting in fields(kind):
        options = {"type": setting.type, "metavar": {int: "N", float: "X"}.get(setting.type), **setting.metadata}
        if setting.type is bool:
            options = {"action": "store_true", **setting.metadata}
        elif setting.default not in (None, ()):
            shown = setting.default[0] if isinstance(setting.default, tuple) else setting.default
            options["help"] += f" (default: {shown})".replace(f"{HERE}{os.sep}", "")
        parser.add_argument("--" + setting.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    defaults = tiny if "tiny" in given else {}
    if "evaluate" in given:  # by default the model and the sampler that the adapter was trained with
        folder = Path(given["evaluate"]).absolute()
        paths = folder / "config.json", folder.parent / "config.json"          # best/ has none of its own
        if path := next(filter(Path.is_file, paths), None):
            with explained(f"{path} can't be read"):
                saved = json.loads(path.read_text())
                defaults = {**defaults, **{name: saved[name] for name in (
                    "model", "models", "tiny", "prompts", "eval_prompts", "sampling_steps", "guidance_scale", "height",
                    "width", "micro_batch_size", "eval_images")}}
    return kind(**{**defaults, **given})


def main(argv=None, train=train, kind=Config, tiny=TINY):
    """Run a command line. Returns the exit code: 0, 2 for what the user can put right, 1 for a run that stopped."""
    try:
        with contextlib.redirect_stdout(None if RANK > 0 else sys.stdout):
            config = parse(argv, kind, tiny)
            (judge if config.evaluate else train)(config)
        return 0
    except (UserError, RunStopped) as error:
        print(f"{kind.program}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(f"{kind.program}: stopped by hand; what the last checkpoint holds is saved", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print(f"{kind.program}: out of memory; try --gradient-checkpointing, a smaller --micro-batch-size, "
              "--dtype bfloat16", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
