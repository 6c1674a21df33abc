"""RSA-FT: Reward Sharpness-Aware Fine-Tuning of text-to-image diffusion models, in one file.

The method of Kim & Sim, CVPR 2026 (arXiv 2603.21175); equation numbers are that paper's, which is known here
from its abstract and from public summaries. A diffusion model is tuned by gradient ascent on a differentiable
reward r of its own pictures. The gradient goes back through part of a DDIM rollout; through which part, one
of five published methods says, DRaFT-1 by default (arXiv 2309.17400):

    max_theta  E_{c, xT} [ r( x0(xT, c; theta), c ) ]                                   (Eq. 4)

Where the reward's surface is steep, pictures get a higher score without getting better: reward hacking.
RSA-FT follows the gradient of a flattened reward instead, that at the worst nearby picture and weights:

    d = -rho   grad_x0 r    / |grad_x0 r|        one per picture              --noise   (Eq. 15)
    e = -rho_w grad_theta r / |grad_theta r|     one for all trained weights  --sam     (Eq. 17)

    max_theta  E_{c, xT} [ r( x0(xT, c; theta + e) + d, c ) ]                           (Eq. 19)

Without the two flags it is plain reward fine-tuning. Despite its flag's name d is no random noise. Try it on
any laptop (Linux or macOS), with the small trained models of tiny/, then on Stable Diffusion 1.5:

    python rsaft.py --tiny --reward pickscore --sam --noise
    python rsaft.py --reward pickscore --sam --noise

The story comes first: sampling step, rollout, perturbations, Algorithm 1, LoRA, and the training loop,
`train`. Supporting code follows: errors, loading, the model, rewards, evaluation, the run, flags. What stands
before LoRA needs torch and the standard library alone: copy from it. Parameters without a caller here are for
related/, tools/ and experiments/, which import this file.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback

import argparse
import contextlib
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import sys
import time
import traceback
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent


# ---- One sampling step, linear in the latents and the network's output -----------------------------------

@dataclass(frozen=True)
class Step:
    """One sampling step at timestep t, as plain numbers. There the latents are x = alpha x0 + sigma noise."""
    t: float
    alpha: float
    sigma: float
    next_x: float      # the next latents are next_x x + next_f f, with f the network's output
    next_f: float
    x0_x: float        # the x0 that the network predicts is x0_x x + x0_f f
    x0_f: float

    def next(self, x, f):
        return self.next_x * x + self.next_f * f

    def x0(self, x, f):
        return self.x0_x * x + self.x0_f * f


def ddim_steps(scheduler, sampling_steps):
    """The DDIM update (arXiv 2010.02502, eta = 0) as numbers: a list of Step, the noisiest first.

    scheduler: a diffusers DDIMScheduler. Raises ValueError where its step isn't linear or isn't defined:
    clip_sample, thresholding, prediction_type "sample", epsilon prediction where alpha is 0, a number of
    steps that it can't make.
    """
    config = scheduler.config
    if config.clip_sample or config.thresholding:
        raise ValueError("the scheduler clips (clip_sample or thresholding), and that step isn't linear")
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {config.prediction_type!r}, not epsilon or v_prediction")
    scheduler.set_timesteps(sampling_steps)
    if len(scheduler.timesteps) != sampling_steps or max(scheduler.timesteps) >= config.num_train_timesteps:
        # "trailing" spacing rounds some numbers of steps up by one; "leading" runs over the end at 1000.
        raise ValueError(f"the scheduler's spacing can't make {sampling_steps} steps; take another number")
    steps = []
    for t in scheduler.timesteps.tolist():
        # Trap: DDIM goes down by num_train_timesteps // T, which may differ from the next of `timesteps`.
        t_next = t - config.num_train_timesteps // sampling_steps
        squared = float(scheduler.alphas_cumprod[t])
        after = scheduler.alphas_cumprod[t_next] if t_next >= 0 else scheduler.final_alpha_cumprod
        alpha, sigma = squared ** 0.5, (1 - squared) ** 0.5
        alpha_next, sigma_next = float(after) ** 0.5, (1 - float(after)) ** 0.5
        if config.prediction_type == "v_prediction":
            next_x = alpha_next * alpha + sigma_next * sigma
            next_f = sigma_next * alpha - alpha_next * sigma
            x0_x, x0_f = alpha, -sigma
        elif alpha > 0:
            next_x, next_f = alpha_next / alpha, sigma_next - alpha_next * sigma / alpha
            x0_x, x0_f = 1 / alpha, -sigma / alpha
        else:
            raise ValueError(f"alpha is 0 at timestep {t}, where epsilon says nothing of the image")
        steps.append(Step(t, alpha, sigma, next_x, next_f, x0_x, x0_f))
    return steps


def flow_steps(scheduler, sampling_steps, tokens, even=False, mu=None):
    """Euler's update of flow matching (arXiv 2210.02747) as numbers: with alpha = 1 - sigma, f = noise - x0.

    scheduler: a diffusers FlowMatchEulerDiscreteScheduler, else ValueError; tokens: of a picture, which set
    the sigmas' shift where it is dynamic; mu: that shift, given outright; even: before the shift the sigmas
    are 1, 1 - 1/T, ... 1/T, not the scheduler's own. Returns a list of Step.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if kind != "FlowMatchEulerDiscreteScheduler" or config.stochastic_sampling or config.invert_sigmas:
        raise ValueError(f"{kind} is no FlowMatchEulerDiscreteScheduler, or is set to add noise or invert")
    if config.use_dynamic_shifting and mu is None:
        low, high = config.base_image_seq_len, config.max_image_seq_len
        mu = config.base_shift + (config.max_shift - config.base_shift) * (tokens - low) / (high - low)
    sigmas = [1 - i / sampling_steps for i in range(sampling_steps)] if even else None
    scheduler.set_timesteps(sampling_steps, sigmas=sigmas, mu=mu)
    levels = zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), scheduler.sigmas.diff().tolist())
    return [Step(t, 1 - sigma, sigma, 1.0, change, 1.0, -sigma) for t, sigma, change in levels]


# ---- The differentiable rollout, x0(xT, c; theta) ----------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """Which part of a rollout is differentiated. Drawn once per update, and the same in both of its passes.

    grad: for each step that is taken, whether the network's output carries a gradient. It may be shorter than
    the schedule: the rollout then stops early. predict_x0: the last step taken jumps to its prediction of x0.
    detach_input: no gradient through the network's input. renoised: DRaFT-LV's number of extra pictures.
    """
    grad: tuple
    predict_x0: bool = False
    detach_input: bool = False
    renoised: int = 0

    @property
    def first_grad_step(self):
        """The index of the first step that carries a gradient; the number of steps if none does."""
        return (*self.grad, True).index(True)


def draw(rng, low, high):
    """An integer, uniform over low..high, both included."""
    return torch.randint(low, high + 1, (), generator=rng).item()


def last_steps(taken, K, shortest):
    """`Plan.grad` with the last K of the steps taken. Raises ValueError if the shortest rollout has fewer."""
    if K > shortest:
        raise ValueError(f"{K} steps can't carry the gradient: the rollout may have only {shortest}")
    return (False,) * (taken - K) + (True,) * K


# The five methods: plans drawn from T sampling steps and a torch.Generator; K overrides the method's own.

def draft(T, rng, K=None):
    """DRaFT-K (arXiv 2309.17400): all T steps, the last K = 1 with gradient."""
    return Plan(last_steps(T, K or 1, T))


def draft_lv(T, rng, K=None):
    """DRaFT-LV (arXiv 2309.17400): `draft`, and two more pictures, x0 noised again to the last timestep."""
    return Plan(last_steps(T, K or 1, T), renoised=2)


def alignprop(T, rng, K=None):
    """AlignProp (arXiv 2310.03739): K uniform over 1..T (published from 0, where nothing is learnt)."""
    return Plan(last_steps(T, K or draw(rng, 1, T), T))


def refl(T, rng, K=None):
    """ReFL (arXiv 2304.05977): up to a random step of the last quarter, with gradient, which predicts x0."""
    first = 3 * T // 4
    return Plan(last_steps(draw(rng, first, T - 1) + 1, K or 1, first + 1), predict_x0=True)


def drtune(T, rng, K=None):
    """DRTune (arXiv 2405.00760): K = T/10 evenly spaced steps up to a random stop in the last 40 percent,
    where x0 is predicted. The gradient flows through the sampler's arithmetic alone."""
    first = T - math.ceil(0.4 * T)
    taken, K = draw(rng, first, T - 1) + 1, K or max(1, round(T / 10))
    last_steps(taken, K, first + 1)      # not for its steps: it refuses more of them than there are
    spacing = taken // K
    offset = draw(rng, 0, spacing - 1)
    chosen = [offset + i * spacing for i in range(K)]
    return Plan(tuple(i in chosen for i in range(taken)), predict_x0=True, detach_input=True)


METHODS = {"draft": draft, "draft-lv": draft_lv, "alignprop": alignprop, "refl": refl, "drtune": drtune}


def rollout(denoise, x, steps, plan, first=0, stop=None):
    """Deterministic sampling that keeps the gradient where the plan says so.

    denoise: (x, t) -> f, the network's output with guidance, of x's shape; x: (B, C, h, w) noise xT, or the
    latents that step `first` begins with; steps: list of Step; stop: the step before which to stop, by
    default the plan's own. Returns the last latents, (B, C, h, w), with a graph as the plan has it.
    """
    for i in range(first, len(plan.grad) if stop is None else stop):
        step = steps[i]
        with torch.set_grad_enabled(plan.grad[i] and torch.is_grad_enabled()):
            f = denoise(x.detach() if plan.detach_input else x, step.t)
        if plan.predict_x0 and i == len(plan.grad) - 1:
            return step.x0(x, f)
        x = step.next(x, f)    # also where the network has no gradient: DRTune's flows through here alone
    return x


def renoise(denoise, x0, step, noise):
    """DRaFT-LV's extra picture: latents x0, as constants, noised to `step` and predicted again at once."""
    x = step.alpha * x0.detach() + step.sigma * noise
    return step.x0(x, denoise(x, step.t))


# ---- Pictures, and noise that depends on its name alone ----------------------------------------------------

@dataclass(frozen=True)
class Batch:
    """Prompts, and for each picture the name that seeds its noise, a tuple such as (seed, update, i)."""
    prompts: list
    names: list

    def noise(self, purpose, shape):
        """Standard normal noise, (B, *shape): always the same for the same names and purpose."""
        return torch.stack([torch.randn(shape, generator=named_generator(*name, purpose))
                            for name in self.names])


def named_generator(*name):
    """A CPU generator seeded by `name`, any numbers and strings.

    So noise depends on what it is for, never on the order of the draws, on micro-batches or on processes.
    """
    return torch.Generator().manual_seed(int(hashlib.sha256(repr(name).encode()).hexdigest()[:16], 16))


def micro_batches(prompts, name, size):
    """`prompts` as a list of Batch of at most `size`; picture i is named (*name, i)."""
    names = [(*name, i) for i in range(len(prompts))]
    return [Batch(prompts[i:i + size], names[i:i + size]) for i in range(0, len(prompts), size)]


# A picture is made in two halves: the steps before the first gradient, which need no graph and so go through
# in large pieces, and the rest, one micro-batch at a time. `model` is anything with the five members of
# Backbone that are used here: steps, latent_shape, device, denoiser(prompts) and decode(latents).

def sample_starts(model, plan, batches, size):
    """From noise up to the first step with gradient, `size` pictures at a time, without a graph.

    Returns for each Batch the latents (B, *latent_shape) that step `plan.first_grad_step` begins with; they
    are the final ones where no step carries a gradient.
    """
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    noise = torch.cat([batch.noise("xT", model.latent_shape) for batch in batches])
    pieces = []
    for i in range(0, len(prompts), size):
        with torch.no_grad():
            x = noise[i:i + size].to(model.device)
            pieces.append(rollout(model.denoiser(prompts[i:i + size]), x, model.steps, plan,
                                  stop=plan.first_grad_step))
    return torch.cat(pieces).split([len(batch.prompts) for batch in batches])


def sample_images(model, plan, batch, start):
    """From the latents `start` to the pictures of a Batch, with a graph. Returns (images, their prompts).

    images: (B, 3, H, W) in [0, 1], float32; with plan.renoised = n there are n + 1 times as many pictures and
    prompts, the batch's own first.
    """
    denoise = model.denoiser(batch.prompts)
    latents = [rollout(denoise, start, model.steps, plan, first=plan.first_grad_step)]
    for k in range(plan.renoised):
        noise = batch.noise(f"renoise {k}", model.latent_shape).to(model.device)
        latents.append(renoise(denoise, latents[0], model.steps[-1], noise))
    return model.decode(torch.cat(latents)), batch.prompts * len(latents)


# ---- The reward's gradient, and the two perturbations ------------------------------------------------------
# A reward is a function (images, prompts) -> (B,), with images (B, 3, H, W) in [0, 1], with d a little
# outside, float32, and B prompts. Why float32: a radius of 0.01 over 3x512x512 values moves each by about
# 1e-5, and bfloat16, whose step near 1 is 0.004, rounds that away: a picture plus d is the picture again. So
# halves become float32.

def at_least_float32(tensor):
    """Halves as float32, anything else as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reward_gradient(reward, x0, prompts):
    """r(x0) and its gradient, with x0 taken as a leaf.

    x0: (B, 3, H, W). Returns r (B,) and the gradient (B, 3, H, W), one per picture and not divided by B, both
    detached, in float32 at least. The reward's graph is freed here, before the diffusion graph is walked:
    push the gradient on with x0.backward(gradient).
    """
    x = at_least_float32(x0.detach()).requires_grad_()
    r = reward(x, prompts)
    gradient, = torch.autograd.grad(r.sum(), x)
    return r.detach(), gradient


def sample_perturbation(gradient, rho):
    """d = -rho g / |g|, the worst small change of each picture to first order (Eq. 15).

    gradient: (B, ...), the reward's gradient at each picture; rho: the L2 norm of d over all elements of one
    picture, in units of pixels in [0, 1]. Returns a tensor of the gradient's shape, in float32 at least;
    where a gradient is zero, so is d. Trap: x0 + d may leave [0, 1]; don't clamp it again, which would undo
    part of d just where the picture is saturated.
    """
    gradient = at_least_float32(gradient)
    norm = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.dim() - 1))
    return -rho * gradient / norm.where(norm > 0, 1)


def parameter_perturbation(gradients, rho):
    """e = -rho g / |g| with one norm over all tensors: SAM's step (arXiv 2010.01412), downhill (Eq. 17).

    gradients: list of tensors, the REWARD's gradient over the WHOLE batch: negate where .grad is a loss's,
    else e is the best nearby point. rho: the global L2 norm of e, in units of the parameters. Returns a list
    of tensors of the same shapes; all zero if the gradient is. Raises ValueError where a gradient is None.
    """
    missing = [i for i, gradient in enumerate(gradients) if gradient is None]
    if missing:
        raise ValueError(f"no gradient for parameters {missing} of {len(gradients)}: nothing reached them")
    norm = nn.utils.get_total_norm(gradients)
    scale = -rho / norm.where(norm > 0, 1)
    return [scale * gradient for gradient in gradients]


@contextlib.contextmanager
def perturbed(params, epsilons):
    """Add `epsilons` to `params` inside the with block; afterwards they are the same bits, come what may.

    Backward belongs inside (gradient checkpointing would silently recompute at theta), the optimizer's step
    outside: what it does inside is undone. Yields what was really added, after rounding; in half
    precision most of e is lost. Adding and subtracting isn't exact, so the values are copied and put back.
    """
    originals = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, epsilon in zip(params, epsilons, strict=True):
                p.add_(epsilon)
        yield [p.detach() - original for p, original in zip(params, originals)]
    finally:
        with torch.no_grad():
            for p, original in zip(params, originals):
                p.copy_(original)


def reward_sharpness(reward, images, prompts, rho):
    """S1 = r(x) - r(x + d) with d = -rho g / |g| (Eq. 10): (B,), how far the reward falls within a radius."""
    r, gradient = reward_gradient(reward, images, prompts)
    with torch.no_grad():
        return r - reward(images + sample_perturbation(gradient, rho), prompts)


# ---- Algorithm 1 -------------------------------------------------------------------------------------------

def rsaft_gradient(batches, make_starts, make_images, reward, params, rho=0.0, rho_w=0.0, reuse_starts=False):
    """The gradient of the flattened reward, E[ r( x0(xT, c; theta + e) + d, c ) ] (Eq. 19), left in p.grad.

    1. Make the pictures x0 and take the reward's gradient g at each; d = -rho g / |g|, from here on constant.
    2. Carry g back to the weights; its mean over the batch is grad_theta, and e = -rho_w grad_theta / |...|.
    3. Make the pictures once more at theta + e, from the same noise; take the reward's gradient at them plus
       that same d, and carry it back: the result. Without e, step 2 takes it at x0 + d and is the last one.

    It points uphill: use an optimizer with maximize=True. With both radii 0 it is the plain one, of Eq. 4.

    batches: the micro-batches of one update and process, each with a list `prompts`, such as Batch.
    make_starts: batches -> for each the latents before the first step with gradient, as `sample_starts`.
    make_images: (batch, start) -> (images, prompts) with a graph to `params`, as `sample_images`. Both must
    give the same again for the same weights, so no dropout. reward: (images, prompts) -> one value per
    picture. rho: radius of the pictures' perturbation; rho_w: of the weights', over all `params` together.
    reuse_starts: begin the second rollout with the first one's starts instead of with noise; cheaper, but not
    the paper's: e then acts only from the first step with gradient on. What was in p.grad is dropped.
    Processes are summed over here: no DDP around it.

    Returns a dict of floats, means over the pictures; all but `reward` are of a perturbation:
    reward, worst_reward: at theta and x0, and where the gradient is taken; of each prompt's first picture
    fall_measured, fall_predicted: from the one to the other, of all pictures, and to first order, which is
        -mean <g, d> - <grad_theta, e> and knows nothing of e in steps that carry no gradient
    noise_norm, sam_norm: of d and of e, as they arrived
    """
    means, first_pass = Means(), []
    total = torch.tensor(sum(len(batch.prompts) for batch in batches))
    sum_over_processes([total])
    for p in params:
        p.grad = None

    starts = make_starts(batches)
    for batch, start in zip(batches, starts):                           # first pass, at theta
        x0, prompts = make_images(batch, start)
        B = len(batch.prompts)
        share = B / (total.item() * len(prompts))                       # 1 / the number of all pictures
        r, g = reward_gradient(reward, x0, prompts)
        d = sample_perturbation(g, rho) if rho > 0 else 0.0             # Eq. 15
        means.add(reward=r[:B])
        if rho_w > 0:
            first_pass.append((r, d))                                   # for the second one
        if rho > 0:
            arrived = x0.detach() + d - x0.detach()                     # d, as far as rounding lets it
            means.add(noise_norm=arrived.flatten(1).norm(dim=1), fall_predicted=-(g * d).flatten(1).sum(1))
        if rho > 0 and rho_w == 0:                                      # no second pass: d counts in this one
            r_worst, g = reward_gradient(reward, x0 + d, prompts)
            means.add(worst_reward=r_worst[:B], fall_measured=r - r_worst)
        x0.backward(share * g)
    sum_over_processes([p.grad for p in params])

    if rho_w > 0:
        # Only now, with the whole batch seen, is the gradient known whose direction e takes.
        gradients = [p.grad for p in params]
        epsilons = parameter_perturbation(gradients, rho_w)             # Eq. 17
        for p in params:
            p.grad = None
        with perturbed(params, epsilons) as reached:
            if not reuse_starts:
                starts = make_starts(batches)                           # from the same noise
            for batch, start, (r, d) in zip(batches, starts, first_pass):    # second pass, at theta + e
                x0, prompts = make_images(batch, start)
                B = len(batch.prompts)
                share = B / (total.item() * len(prompts))
                r_worst, g = reward_gradient(reward, x0 + d, prompts)   # at x0' + d: Eq. 19
                means.add(worst_reward=r_worst[:B], fall_measured=r - r_worst)
                x0.backward(share * g)
        sum_over_processes([p.grad for p in params])

    log = means.over_processes()
    if rho_w > 0:
        log["sam_norm"] = nn.utils.get_total_norm(reached).item()
        slope = rho_w * nn.utils.get_total_norm(gradients).item()       # -<gradient, e>
        log["fall_predicted"] = log.get("fall_predicted", 0.0) + slope
    return log


class Means:
    """Means over pictures by name, whatever micro-batches and processes these are spread over."""

    def __init__(self):
        self.values = defaultdict(list)

    def add(self, **values):
        """values: a tensor of one value per picture for each name."""
        for name, value in values.items():
            self.values[name].append(value)

    def over_processes(self):
        """{name: float}; every process must have added the same names."""
        columns = [torch.cat(values) for values in self.values.values()]
        sums = torch.tensor([[column.sum().item(), len(column)] for column in columns], dtype=torch.float64)
        sum_over_processes([sums])
        return dict(zip(self.values, (sums[:, 0] / sums[:, 1]).tolist()))


def sum_over_processes(tensors):
    """Replace each tensor by its sum over all processes, if there are several: the one collective here."""
    if distributed():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def distributed():
    """Whether this is one of several connected processes, as torchrun starts and `load` connects them."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_index():
    """The number of this process; process 0 writes and prints."""
    return torch.distributed.get_rank() if distributed() else 0


def process_count():
    """How many processes share the work."""
    return torch.distributed.get_world_size() if distributed() else 1


def my_share(batches):
    """Those of a list that this process takes, in turn with the others."""
    return batches[process_index()::process_count()]


# ---- LoRA (arXiv 2106.09685) -------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """A frozen linear layer plus B A, in float32 whatever the layer's dtype. B starts at 0: no change."""

    def __init__(self, linear, rank, generator):
        super().__init__()
        self.linear = linear
        bound = linear.in_features ** -0.5
        A = (2 * torch.rand(rank, linear.in_features, generator=generator) - 1) * bound
        self.A = nn.Parameter(A.to(linear.weight.device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x):
        y = self.linear(x)
        return (y.float() + x.float() @ self.A.T @ self.B.T).to(y.dtype)


def add_lora(network, rank, generator=None, targets=("to_q", "to_k", "to_v", "to_out.0")):
    """Freeze a network and put a LoRALinear around each linear layer whose name ends in one of `targets`.

    Returns the trained parameters, a list of float32 tensors in a fixed order: A, B, A, B ... Raises
    ValueError where no layer has such a name, or the rank is above a layer's width.
    """
    endings = tuple(f".{target}" for target in targets)
    found = [(name, module) for name, module in network.named_modules()
             if f".{name}".endswith(endings) and isinstance(module, nn.Linear)]
    if not found:
        raise ValueError(f"the adapter has no place: no linear layer is named {', '.join(targets)}")
    largest = min(min(linear.in_features, linear.out_features) for _, linear in found)
    if rank > largest:
        raise ValueError(f"rank {rank} is above {largest}, the width of the smallest layer that is tuned")
    network.requires_grad_(False)
    for name, linear in found:
        network.set_submodule(name, LoRALinear(linear, rank, generator))
    return [p for p in network.parameters() if p.requires_grad]


def lora_parameters(network, prefix="unet"):
    """The adapter under diffusers' names, {"unet.<module>.lora_A.weight": parameter, ...}; alpha is the rank.

    Trap: without the right prefix, the pipeline's part, diffusers loads nothing, and raises nothing.
    """
    return {f"{prefix}.{name}.lora_{part}.weight": getattr(layer, part)
            for name, layer in network.named_modules() if isinstance(layer, LoRALinear) for part in "AB"}


# ---- Training ----------------------------------------------------------------------------------------------

def train(settings):
    """Tune a model by RSA-FT, or plain if both radii are 0. Raises UserError, RunStopped."""
    if not settings.reward:
        raise UserError("--reward needs a name")
    settings = check(settings)
    with explained(f"--grad-steps {settings.grad_steps} and --sampling-steps {settings.sampling_steps}"):
        plan = make_plan(settings, 0)
    model, scores, prompts, evaluation = load(settings)
    params = model.add_adapter(settings.rank, named_generator(settings.seed, "lora"))
    optimizer = torch.optim.AdamW(params, lr=settings.learning_rate, betas=(0.9, 0.999),
                                  weight_decay=settings.weight_decay, maximize=True)
    window = settings.sam_rollout == "window"
    costs = network_evaluations(plan, model.branches, settings.sam > 0, window)
    without, with_gradient = (settings.batch_size * cost for cost in costs)
    size = sum(p.numel() for p in params)
    say(f"{size:,} trained parameters; update 1 takes {without} network evaluations without gradient, "
        f"{with_gradient} with")

    with Run(settings, model.adapter(), optimizer, evaluation) as run:
        for step in run.steps():
            plan = make_plan(settings, step)
            drawn = training_prompts(prompts, settings.seed, step, settings.batch_size)
            batches = my_share(micro_batches(drawn, (settings.seed, step), settings.micro_batch_size))
            make_starts = partial(sample_starts, model, plan, size=settings.sampling_batch_size)
            make_images = partial(sample_images, model, plan)
            log = rsaft_gradient(batches, make_starts, make_images, scores.total, params, rho=settings.noise,
                                 rho_w=settings.sam, reuse_starts=window)
            grad_norm = nn.utils.clip_grad_norm_(params, settings.max_grad_norm)
            optimizer.step()
            run.record(**log, grad_norm=grad_norm.item())


def network_evaluations(plan, branches=2, second_rollout=False, reuse_starts=False):
    """The network evaluations that a picture costs: (without gradient, with gradient).

    branches: evaluations per step, 2 under guidance. A second rollout costs the same once more; where it
    reuses the starts of the first one, only what comes after them.
    """
    K = sum(plan.grad)
    free = len(plan.grad) - K
    again = free - (plan.first_grad_step if reuse_starts else 0) if second_rollout else 0
    return branches * (free + again), branches * (K + plan.renoised) * (1 + second_rollout)


def make_plan(settings, step):
    """The plan of an update, counted from 0, shared by its micro-batches, processes and both passes."""
    rng = named_generator(settings.seed, step, "plan")
    return METHODS[settings.method](settings.sampling_steps, rng, settings.grad_steps)


def training_prompts(prompts, seed, step, batch_size):
    """The prompts of one update, counted from 0; all are used once, in a random order, before any again."""
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, len(prompts))
        order = torch.randperm(len(prompts), generator=named_generator(seed, "prompts", epoch))
        chosen.append(prompts[order[place]])
    return chosen


# ---- What can go wrong. A user gets one line; RSAFT_TRACEBACK=1 in the environment shows everything. -------

class UserError(Exception):
    """Something to put right. `main` prints it as one line; exit code 2."""


class RunStopped(Exception):
    """What there was is saved, and the same command may work again. Exit code 1."""


def in_words(error):
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def is_out_of_memory(error):
    """Whether an exception says that a GPU's or the machine's memory is full."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def explained(problem, folder=None):
    """Inside the with block any other exception becomes a UserError, one line: the problem and its cause.

    folder: of a file in rewards/ or backbones/, or of your own; the line then names the place in there that
    the exception came from.
    """
    try:
        yield
    except (Exception, SystemExit) as error:    # a reward's file may call sys.exit
        if isinstance(error, (UserError, RunStopped)) or is_out_of_memory(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if folder and frame.filename[0] != "<"    # <frozen importlib...>
               and Path(frame.filename).resolve().parent == folder]
        if own:
            problem += f" at {Path(own[-1].filename).name}:{own[-1].lineno} (RSAFT_TRACEBACK=1 shows all)"
        raise UserError(f"{problem}: {in_words(error)}") from error


# ---- Loading: whole, or refused ----------------------------------------------------------------------------

def quiet_libraries():
    """Leave the terminal to our own lines: no notes on torchvision, no bars. Returns versions."""
    import transformers
    transformers.logging.set_verbosity_error()
    import diffusers
    diffusers.logging.set_verbosity_error()
    for library in transformers, diffusers:
        library.logging.disable_progress_bar()
    return {library.__name__: str(library.__version__) for library in (torch, diffusers, transformers)}


def load_complete(kind, source, dtype=torch.float32, **where):
    """A frozen model of a class of diffusers or transformers, with all of its weights. Raises UserError.

    Left to themselves both libraries put random numbers where weights are missing. They are asked which these
    are: files also have surplus and old names, which they know, so names can't be compared from outside.
    """
    with explained(f"{source} doesn't load as a {kind.__name__}"):
        model, report = kind.from_pretrained(source, dtype=dtype, output_loading_info=True, **where)
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(f"{len(missing)} of its weights are missing, {', '.join(missing[:3])}")
    return model.eval().requires_grad_(False)


def load_tokenizer(kind, source, **where):
    """A tokenizer of transformers. Raises UserError for one to which all prompts are alike."""
    with explained(f"the tokenizer of {source} doesn't load"):
        tokenize = kind.from_pretrained(source, **where)
        if len({tuple(tokenize(text).input_ids) for text in ("red cat", "big dog", "old map")}) == 1:
            raise ValueError("it gives different prompts the same tokens; is its vocabulary there?")
    return tokenize


def load_tensors(path):
    """What a .pt or .pth file holds, on the CPU; never a pickle that could run code. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:    # torch's own message advises to read it as a pickle all the same
        if isinstance(error, PermissionError) or is_out_of_memory(error):
            raise
        path = Path(path).resolve()     # in the hub's cache names are links; the file itself is to be deleted
        raise UserError(f"{path} can't be read: it is damaged (delete it and get it again, if it was "
                        "downloaded), or holds more than tensors") from error


# Name patterns of what is fetched of a repository: one precision, in the one format that can't run code.
CONFIGS = ["model_index.json", *(f"{part}/config.json" for part in ("unet", "transformer", "vae"))]
WEIGHTS = ["config.json", "model.safetensors*", "model-*.safetensors", "diffusion_pytorch_model.safetensors*",
           "diffusion_pytorch_model-*.safetensors"]
TOKENIZER = ["config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "spiece.model"]


def fetch(wanted):
    """Folders to load from, {model: folder}. wanted: {a folder or an id on the hub: name patterns of files}.

    What the hub's cache has whole is taken as it is, and the hub isn't asked: what ran once runs without a
    network. The rest is downloaded, announced if it is large. Raises UserError; RunStopped if the hub may
    answer later.
    """
    from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, LocalEntryNotFoundError
    from safetensors import safe_open
    from tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": True})

    folders, downloads, new = {}, {}, []
    for model, patterns in wanted.items():
        if Path(model).is_dir():
            folders[model] = model
            continue
        download = partial(snapshot_download, model, allow_patterns=patterns, tqdm_class=Silent)
        try:
            get_cached_repo_tree(model)    # raises where no list of its files is cached: whole can't be told
            folders[model] = download(local_files_only=True)
            continue
        except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError, HFValidationError):
            pass
        try:
            new += [(model, file) for file in ask_hub(model, partial(download, dry_run=True))
                    if file.will_download]
            downloads[model] = download
        except (UserError, RunStopped) as problem:
            with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
                folders[model] = download(local_files_only=True)    # perhaps whole, after all
                continue
            raise problem
    large = [(model, file) for model, file in new if (file.file_size or 0) > 1e6]
    if large:
        size = sum(file.file_size for _, file in large) / 1e9
        say(f"fetching {size:.2f} GB from the hub: {', '.join(downloads)}")
    for model, file in large:              # with a bar for each; the small ones follow
        ask_hub(model, partial(hf_hub_download, model, file.filename, revision=file.commit_hash,
                               tqdm_class=Silent if process_index() > 0 else None))
    for model, download in downloads.items():
        folders[model] = ask_hub(model, download)
    for model, patterns in wanted.items():
        for path in sorted({path for pattern in patterns for path in Path(folders[model]).glob(pattern)}):
            # The libraries wouldn't say which it is. In the cache names are links: the file itself must go.
            with explained(f"{path.resolve()} can't be read; was it cut short, delete it and get it again"):
                if path.suffix == ".json":
                    json.loads(path.read_text(encoding="utf-8"))
                elif path.suffix == ".safetensors":
                    with safe_open(path, "pt"):
                        pass
    return folders


def ask_hub(model, question):
    """What question() learns of a model from the hub; it has a second try. Raises UserError, RunStopped."""
    for last_try in (False, True):
        try:
            return question()
        except Exception as error:
            stop, wait = hub_problem(model, error)
            if last_try or not isinstance(stop, RunStopped):
                raise stop from error
        say(f"{str(stop).rpartition('; try again')[0]}; once more in {wait} s")
        time.sleep(wait)


def hub_problem(model, error):
    """In one line what the hub's exception means for a user, as an exception, and the seconds to wait."""
    from huggingface_hub import errors
    causes = [error]
    while causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    final = {    # GatedRepoError first: it is a RepositoryNotFoundError too
        errors.GatedRepoError:
            f"is gated: ask for access, https://huggingface.co/{model}, then `hf auth login`",
        errors.RepositoryNotFoundError: "is no folder here and not on the hub; if private: `hf auth login`",
        errors.HFValidationError: "is no folder here, and can't be a name on the hub",
        errors.OfflineModeIsEnabled: "is no folder here, nor whole in the hub's cache; HF_HUB_OFFLINE is set"}
    for kind, words in final.items():
        if any(isinstance(cause, kind) for cause in causes):
            return UserError(f"{model} {words}"), 0
    response = next((cause.response for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    why = in_words(causes[-1]) if response is None else f"status {response.status_code}"
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    stop = RunStopped(f"{model} is no folder here and can't be had from the hub ({why}); try again, or name "
                      "local folders (--model and --models), or try --tiny")
    return stop, min(int(asked), 10) if asked.isdigit() else 1


# ---- The model ---------------------------------------------------------------------------------------------

class Backbone:
    """A text-to-image model as a rollout sees it: its steps, latent_shape, device, denoiser and decode.

    A family is a subclass, as StableDiffusion below. It has step_table(n), a list of Step; encode(prompt),
    what the network is told of a prompt, a list of tensors (1, ...), where "" is what guidance leads away
    from; predict(x, t, *conditions), the network's output f for latents x, without guidance.
    """
    pipeline, pipeline_options = None, {}
    network_name, network_class = "unet", None     # what is trained; its name is the adapter's prefix
    vae_class = "AutoencoderKL"
    encoder_names = ("text_encoder",)              # what only prompts need; each has a tokenizer beside it
    may_be_null = ()                               # parts that a model may do without
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    patch_size = 1                                 # the side of the network's tokens, in latents
    guidance_is_input = False                      # the last condition is then its scale, (B,)
    sampling_steps, guidance_scale = 50, 7.5       # defaults

    def __init__(self, pipe, sampling_steps, guidance_scale, latent_shape, device):
        self.pipe, self.network, self.vae = pipe, getattr(pipe, self.network_name), pipe.vae
        self.guidance_scale, self.latent_shape, self.device = guidance_scale, latent_shape, device
        self.branches = self.branches_at(guidance_scale)
        self.counts, self.encoded = Counter(), {}      # of network evaluations; what was encoded, by prompt
        self.heartbeat = lambda: None      # called at each network evaluation, to show that it goes on
        with explained("this model can't be sampled"):
            self.steps = self.step_table(sampling_steps)

    @classmethod
    def tokenizer_names(cls):
        return [name.replace("text_encoder", "tokenizer") for name in cls.encoder_names]

    @classmethod
    def files(cls):
        """Name patterns of the files that are loaded."""
        small, large = ("scheduler", *cls.tokenizer_names()), (*cls.encoder_names, "vae", cls.network_name)
        return ["model_index.json", *(f"{part}/*" for part in small),
                *(f"{part}/{pattern}" for part in large for pattern in WEIGHTS)]

    @classmethod
    def geometry(cls, network, vae):
        """From their configs: the default latents' shape, (C, h, w), and the pixels to a latent's side."""
        size, channels = network["sample_size"], network["in_channels"]
        rows, columns = size if isinstance(size, list) else (size, size)
        if channels != vae["latent_channels"]:
            raise ValueError(f"its {cls.network_name} takes {channels} channels, its latents have "
                             f"{vae['latent_channels']}; is it for inpainting?")
        return (channels, rows, columns), 2 ** (len(vae["block_out_channels"]) - 1)

    def pipeline_arguments(self, latents, guidance_scale):
        """What, beside prompts, size and steps, the diffusers pipeline needs for the same pictures."""
        return {"latents": latents, "guidance_scale": guidance_scale}

    def branches_at(self, guidance_scale):
        """Network evaluations per step. Raises UserError for a scale that the model can't take."""
        return 2 if guidance_scale > 1 else 1

    def add_adapter(self, rank, generator):
        """Put a new LoRA adapter into the network. Returns the trained parameters. Raises UserError."""
        with explained("the adapter doesn't fit this model"):
            return add_lora(self.network, rank, generator, self.lora_targets)

    def adapter(self):
        """{name in diffusers: parameter}."""
        return lora_parameters(self.network, self.network_name)

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode what hasn't been yet; each prompt goes through the text encoder once, and alone."""
        from tqdm import tqdm
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.encoded]
        for prompt in tqdm(new, "encoding prompts", delay=5, leave=False, disable=process_index() > 0):
            self.encoded[prompt] = [tensor.cpu() for tensor in self.encode(prompt)]

    def drop_encoders(self):
        """Let go of the text encoders, which may be larger than what is trained; what is encoded stays."""
        for name in self.encoder_names:
            setattr(self.pipe, name, None)
        gc.collect()

    def denoiser(self, prompts, guidance_scale=None):
        """A function (x, t) -> f for `rollout`: the network under guidance (CFG, arXiv 2207.12598).

        The two branches run as one batch, and the gradient goes through both. x and f are float32, whatever
        the network computes in. A guidance_scale of 1 or less means no guidance, as in diffusers, but where
        it is an input of the network.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        two = self.branches_at(scale) == 2
        asked = [*[""] * len(prompts), *prompts] if two else prompts
        self.encode_prompts(asked)
        encoded = [self.encoded[prompt] for prompt in asked]
        conditions = [torch.cat(tensors).to(self.device) for tensors in zip(*encoded)]
        if self.guidance_is_input:
            conditions.append(torch.full((len(prompts),), float(scale), device=self.device))

        def denoise(x, t):
            x = torch.cat([x, x]) if two else x
            kind = "with" if torch.is_grad_enabled() else "without"
            self.counts[f"network_evaluations_{kind}_gradient"] += len(x)
            self.heartbeat()
            f = self.predict(x, t, *conditions).float()
            if two:
                unconditional, conditional = f.chunk(2)
                f = unconditional + scale * (conditional - unconditional)
            return f

        return denoise

    def decode(self, latents):
        """(B, C, h, w) latents to (B, 3, H, W) images in [0, 1], float32, as diffusers' pipeline makes them.

        Saturated pixels carry no gradient: that is the clamp.
        """
        images = self.vae.decode(self.to_vae(latents).to(self.vae.dtype)).sample.float()
        return (images / 2 + 0.5).clamp(0, 1)

    def to_vae(self, latents):
        """Latents as the VAE has them; `from_vae` undoes it."""
        return latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)

    def from_vae(self, encoded):
        return (encoded - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor


class StableDiffusion(Backbone):
    """Stable Diffusion 1 and 2: a UNet that attends to the output of one text encoder, sampled by DDIM."""
    pipeline = "StableDiffusionPipeline"
    pipeline_options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    network_class = "UNet2DConditionModel"

    def step_table(self, sampling_steps):
        from diffusers import DDIMScheduler
        config = self.pipe.scheduler.config
        # Trap: where another scheduler's config is silent on clip_sample, DDIM's own default would be True.
        clip_sample = config.get("clip_sample", False)
        self.pipe.scheduler = DDIMScheduler.from_config(config, clip_sample=clip_sample)
        return ddim_steps(self.pipe.scheduler, sampling_steps)

    def encode(self, prompt):
        return [self.pipe.encode_prompt(prompt, self.device, 1, False)[0]]

    def predict(self, x, t, embeds):
        return self.network(x.to(embeds.dtype), t, encoder_hidden_states=embeds).sample


def find_families():
    """{pipeline of diffusers: family}: StableDiffusion, and the FAMILY of each file in backbones/."""
    files = sorted(file for file in (HERE / "backbones").glob("*.py") if not file.name.startswith("test_"))
    return {family.pipeline: family for family in [StableDiffusion, *(import_file(f).FAMILY for f in files)]}


def inspect_model(model, height=None, width=None):
    """What a model is, before weights load: its family, latents' shape (C, h, w), height, width in pixels.

    height, width: None is the model's own. Raises UserError: no known family, or a size that it can't make;
    RunStopped as `fetch`.
    """
    folder = Path(fetch({model: CONFIGS})[model])
    with explained(f"{model} is no model that can be tuned here", HERE / "backbones"):
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        families = find_families()
        if name not in families:
            raise ValueError(f"it is a {name}; supported are {', '.join(families)}")
        family = families[name]
        network, vae = (json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
                        for part in (family.network_name, "vae"))
        for config, expected in (network, family.network_class), (vae, family.vae_class):
            if config["_class_name"] != expected:
                raise ValueError(f"it has a {config['_class_name']} where a {expected} should be")
        (channels, rows, columns), factor = family.geometry(network, vae)
        height, width = height or factor * rows, width or factor * columns
        multiple = factor * family.patch_size
        if height % multiple or width % multiple:
            raise ValueError(f"--height {height} and --width {width} must be multiples of {multiple} for it")
    return family, (channels, height // factor, width // factor), height, width


def load_model(model, sampling_steps=None, guidance_scale=None, height=None, width=None, dtype=torch.float32,
               device="cpu"):
    """A frozen Backbone, from a folder or hub id; None is the family's own. Raises UserError, RunStopped."""
    import diffusers
    import transformers
    family, latent_shape, *_ = inspect_model(model, height, width)
    folder, parts = fetch({model: family.files()})[model], dict.fromkeys(family.may_be_null)
    index = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))
    tokenizers = family.tokenizer_names()
    for part in ("scheduler", *tokenizers, *family.encoder_names, "vae", family.network_name):
        with explained(f"{model}: its {part} doesn't load"):
            library, name = index[part]
            if part in family.may_be_null and name is None:
                continue
            kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
            if part == "scheduler":
                parts[part] = kind.from_pretrained(folder, subfolder=part)
            elif part in tokenizers:
                parts[part] = load_tokenizer(kind, folder, subfolder=part)
            else:
                parts[part] = load_complete(kind, folder, dtype, subfolder=part).to(device)
    switches = {name: value for name, value in index.items() if isinstance(value, bool)}
    with explained(f"{model}: the switches in its model_index.json don't fit"):
        pipe = getattr(diffusers, family.pipeline)(**parts, **switches | family.pipeline_options)
    guidance_scale = family.guidance_scale if guidance_scale is None else guidance_scale
    return family(pipe, sampling_steps or family.sampling_steps, guidance_scale, latent_shape, device)


# ---- Rewards: PickScore as the example; the others are files in rewards/; FILE.py:FUNCTION is your own -----

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images, size, pad=False):
    """Images (B, 3, H, W) in [0, 1] to what a vision tower takes, (B, 3, size, size), with the gradient kept.

    Antialiased bicubic resize of the short side and a centre crop: CLIP's preprocessing of 8-bit pictures.
    That rounds the overshoot away, hence the clamp: where it acts there is no gradient. With `pad` the long
    side is resized, zeros fill the square, nothing is clamped (HPSv2's). The right size passes untouched.
    """
    H, W = images.shape[-2:]
    if (H, W) != (size, size):
        if pad:
            scale = size / max(H, W)
            H, W = round(H * scale), round(W * scale)
        else:    # CLIP truncates where HPSv2 rounds
            H, W = int(H * size / min(H, W)), int(W * size / min(H, W))
        images = F.interpolate(images.float(), (H, W), mode="bicubic", antialias=True)
        images = images if pad else images.clamp(0, 1)     # as 8 bits do; it takes from d what is outside
        top, left = int((H - size) / 2), int((W - size) / 2)    # negative where there is something to fill
        images = F.pad(images, (-left, size - W + left, -top, size - H + top))
    mean, std = images.new_tensor([CLIP_MEAN, CLIP_STD])[..., None, None]
    return (images - mean) / std


def make_tokenize(source, length, device):
    """A function of B prompts to input_ids and attention_mask, (B, length), truncated or padded."""
    from transformers import AutoTokenizer
    tokenize = load_tokenizer(AutoTokenizer, source)
    return lambda prompts: tokenize(list(prompts), padding="max_length", truncation=True, max_length=length,
                                    return_tensors="pt").to(device)


def embed_images(model, images, pad=False):
    """The image embeddings of a CLIPModel, (B, projection_dim), not normalised."""
    pixels = clip_pixels(images, model.config.vision_config.image_size, pad)
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def clip_reward(model, tokenizer_source, device, scale, pad=False):
    """A reward: scale * cosine of text and image under a CLIPModel."""
    model.to(device)
    tokenize = make_tokenize(tokenizer_source, model.config.text_config.max_position_embeddings, device)

    def reward(images, prompts):
        text = model.text_projection(model.text_model(input_ids=tokenize(prompts).input_ids).pooler_output)
        return scale * F.cosine_similarity(text, embed_images(model, images, pad))

    return reward


# A reward found by name has FILES, {a file that must be there: its repository on the hub, or None}, and
# load(folders, device) with {the same file: the folder that it is in}, which returns the reward. The file
# "clip/config.json" is in a folder clip/ of the reward's own folder in --models, and in none on the hub. A
# reward that can't judge every prompt has check_prompt(prompt) as well, which raises UserError.

PICKSCORE_FILES = {"config.json": "yuvalkirstain/PickScore_v1",
                   "tokenizer_config.json": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}


def load_pickscore(folders, device):
    """PickScore (arXiv 2305.01569), exp(logit_scale) * cosine: about 18 to 24."""
    from transformers import CLIPModel
    model = load_complete(CLIPModel, folders["config.json"])
    return clip_reward(model, folders["tokenizer_config.json"], device, model.logit_scale.exp().item())


def own_file(name):
    """The path in FILE.py:FUNCTION; None for a reward that is found by name."""
    file = name.rpartition(":")[0]
    return Path(file) if file.endswith(".py") else None


def short_name(name):
    """What a reward is called in the log: FILE.py:FUNCTION is FUNCTION."""
    return name.rpartition(":")[2]


def import_file(path):
    """The module of a Python file that may import its neighbours; once, so that functions share its state."""
    path = Path(path).resolve()
    name = f"{path.stem} in {path.parent}"
    if name not in sys.modules:
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)    # dataclasses look it up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def find_reward(name, models=None, prompts=()):
    """The loader of a reward found by name, and {file: folder or hub id}; fetches none. Raises UserError.

    prompts: those that it will be asked to judge.
    """
    leaves = {path.stem: path for path in sorted((HERE / "rewards").glob("[!_]*.py"))
              if not path.stem.startswith("test_")}
    if name in leaves:
        with explained(f"the reward {name} doesn't load", HERE / "rewards"):
            leaf = import_file(leaves[name])
            load, files = leaf.load, leaf.FILES
            for prompt in prompts if hasattr(leaf, "check_prompt") else ():
                leaf.check_prompt(prompt)
    elif name == "pickscore":
        load, files = load_pickscore, PICKSCORE_FILES
    else:
        raise UserError(f"no reward {name!r}; there are pickscore, {', '.join(leaves)}, and FILE.py:FUNCTION")
    if models:
        missing = [str(Path(models, name, file)) for file in files if not Path(models, name, file).is_file()]
        if missing:
            raise UserError(f"reward {name}: there is no {' and no '.join(missing)}; see --models")
        return load, {file: str(Path(models, name, file).parent) for file in files}
    if None in files.values():
        raise UserError(f"the reward {name} is on no hub; --models DIR must name a folder with {name}/ in it")
    return load, files


def add_patterns(wanted, files):
    """Add to `wanted`, a defaultdict(list), what `fetch` is to get for a reward with these FILES."""
    for file, source in files.items():
        file = Path(file).name
        wanted[source] += {"config.json": WEIGHTS, "tokenizer_config.json": TOKENIZER}.get(file, [file])
    return wanted


def make_reward(name, models=None, device="cpu"):
    """The reward `name` as a function reward(images, prompts) -> (B,), float32.

    name: pickscore, a file in rewards/, or FILE.py:FUNCTION. images: (B, 3, H, W) in [0, 1], but for d;
    prompts: B strings. models: a folder with a folder per reward; without it the weights come from the hub. A
    reward is a guest: it gets a copy of the images, and what it returns is checked each time. Raises
    UserError where it isn't found or doesn't load; so does the function returned where it fails, or gives no
    finite numbers. Raises RunStopped as `fetch`.
    """
    folder = own_file(name).resolve().parent if own_file(name) else HERE / "rewards"
    with explained(f"the reward {name} doesn't load", folder):
        if own_file(name):
            score = getattr(import_file(own_file(name)), short_name(name))
        else:
            load, files = find_reward(name, models)
            folders = fetch(add_patterns(defaultdict(list), files))
            score = load({file: folders[source] for file, source in files.items()}, device)

    def reward(images, prompts):
        with explained(f"the reward {name} failed", folder):
            scores = score(images.clone(), list(prompts))
        if not isinstance(scores, torch.Tensor):
            raise UserError(f"the reward {name} returned a {type(scores).__name__}, not a tensor")
        if scores.shape != (len(prompts),) or scores.is_complex():
            raise UserError(f"the reward {name} returned {scores.dtype} of the shape {tuple(scores.shape)} "
                            f"for {len(prompts)} pictures; it must be one real number for each")
        if not scores.isfinite().all():
            raise UserError(f"the reward {name} returned a score that is not finite")
        return scores.to(images.device, torch.float32)

    return reward


def try_reward(name, reward, prompts, settings, backward):
    """Score a random picture for each of `prompts`. Returns whether gradients came, asked `backward`."""
    shape, size, gradients = (1, 3, settings.height, settings.width), settings.micro_batch_size, []
    picture = torch.rand(shape, generator=named_generator("check")).to(settings.device)
    for i in range(0, len(prompts), size):
        few = prompts[i:i + size]
        images = picture.repeat(len(few), 1, 1, 1).requires_grad_()
        scores = reward(images, few)
        if backward and scores.requires_grad:
            with explained(f"the gradient of the reward {name} failed"):
                gradients.append(torch.autograd.grad(scores.sum(), images, allow_unused=True)[0])
    return bool(gradients) and all(g is not None and g.isfinite().all() for g in gradients)


class Scores:
    """What is maximised and what is held out: {name: reward}, and {name: weight} of those trained on."""

    def __init__(self, rewards, weights, counts):
        self.rewards, self.weights, self.counts = rewards, weights, counts
        held_out = [name for name in rewards if name not in weights]
        self.judge = held_out[0] if held_out else None     # by it best/ is chosen, and the alarm raised

    def total(self, images, prompts):
        """What is maximised: the weighted sum, (B,)."""
        self.counts["reward_evaluations"] += len(images)
        return sum(weight * self.rewards[name](images, prompts) for name, weight in self.weights.items())


# ---- Evaluation --------------------------------------------------------------------------------------------

S1_RADIUS, S1_RADIUS_TINY = 0.01, 0.1    # fixed, so that the sharpness of runs can be compared
GRID = 16                                # pictures in samples/


def evaluation_latents(count, shape):
    """The noise xT of the first `count` evaluation pictures, (count, *shape), whatever a run's seed.

    With the same prompts a diffusers pipeline that gets it as `latents` makes the pictures of the grid.
    """
    return micro_batches([""] * count, ("evaluation",), count)[0].noise("xT", shape)


@dataclass
class Evaluation:
    """Pictures of the same prompts and noise each time, scored one by one."""
    model: Backbone
    scores: Scores
    prompts: list
    settings: argparse.Namespace
    s1_radius: float             # None where no gradient passes through what is maximised

    def __call__(self):
        """Returns {name: (N,) float64}, `s1` last, and the first pictures, (n, 3, H, W), on the CPU."""
        plan, N = Plan((False,) * len(self.model.steps)), len(self.prompts)
        names = [*self.scores.rewards, "s1"] if self.s1_radius else [*self.scores.rewards]
        values = {name: torch.zeros(N, dtype=torch.float64) for name in names}
        pictures = torch.zeros(min(GRID, N), 3, self.settings.height, self.settings.width)
        batches = my_share(micro_batches(self.prompts, ("evaluation",), self.settings.micro_batch_size))
        size = self.settings.sampling_batch_size
        # No step has a gradient, so these are the last latents. A process may have no batch.
        starts = sample_starts(self.model, plan, batches, size) if batches else []
        for batch, start in zip(batches, starts):
            with torch.no_grad():
                images, prompts = sample_images(self.model, plan, batch, start)
                scores = {name: reward(images, prompts) for name, reward in self.scores.rewards.items()}
            if self.s1_radius:
                scores["s1"] = reward_sharpness(self.scores.total, images, prompts, self.s1_radius)
            numbers = [number for _, number in batch.names]
            for name in names:
                values[name][numbers] = scores[name].cpu().double()
            for number, image in zip(numbers, images):
                if number < len(pictures):
                    pictures[number] = image.cpu()
        sum_over_processes([*values.values(), pictures])     # each process has filled its places among zeros
        return values, pictures


def change_since_best(history):
    """How a held-out score has changed since its best evaluation, and what change chance doesn't explain.

    history: (k, N), the scores of the same N pictures at each of k evaluations, both at least 2. Returns the
    best evaluation before the last, an index; the last one's mean change to it; the standard error of that
    over the pictures, each compared with itself; the change below which to raise an alarm.

    A score that doesn't change goes up and down all the same, and the best was chosen for being high. So at
    evaluation k each of the k - 1 comparisons that it might be rings wrongly with a chance of
    0.05 / (k (k - 1)^2): all together, over all k, with 0.05 at most, if the changes are about normal and the
    pictures not few (with 8 it may be twice that).
    """
    k, N = history.shape
    best = history[:-1].mean(1).argmax().item()
    change = history[-1] - history[best]
    error = change.std().item() / N ** 0.5
    z = NormalDist().inv_cdf(1 - 0.05 / (k * (k - 1) ** 2))
    t = z + (z ** 3 + z) / (4 * (N - 1))                       # Student's, to first order in 1 / (N - 1)
    return best, change.mean().item(), error, -t * error


def make_grid(images, columns=4):
    """Images (n, 3, H, W) in [0, 1] as the bytes of a PNG file; small ones are enlarged by a whole factor."""
    from PIL import Image
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns), value=1.0)
    grid = torch.cat([torch.cat(list(row), dim=-1) for row in images.split(columns)], dim=-2)
    factor = max(1, 128 // images.shape[-2])
    grid = grid.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    content = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).mul(255).round().byte().numpy()).save(content, "PNG")
    return content.getvalue()


# ---- The run: a function of its settings, kept in a folder -------------------------------------------------
# The checkpoint is the only truth, written whole after every update: a kill at any moment costs one update.
# Everything else in the folder is made from it, or, as the pictures are, just before it.

CHECKPOINT, ADAPTER, LOCK = "checkpoint.pt", "pytorch_lora_weights.safetensors", ".lock"
# On resume these may change. The device and the pictures at a time change how sums are rounded, no more. The
# dtype, which follows the device where it isn't given, may not change.
MAY_CHANGE = {"train_steps", "stop_on_alarm", "gradient_checkpointing", "out", "versions", "device",
              "micro_batch_size", "sampling_batch_size"}
# Names in the log that a reward can't have.
LOG_NAMES = {"step", "reward", "worst_reward", "fall_predicted", "fall_measured", "noise_norm", "sam_norm",
             "grad_norm", "seconds", "peak_gb", "eval", "s1", "best", "alarm", "since_best", "pictures"}


def say(text):
    """Print, above a progress bar where there is one; of several processes the first speaks."""
    from tqdm import tqdm
    if process_index() == 0:
        with tqdm.external_write_mode():
            print(text, flush=True)


def write_atomic(path, content):
    """Write bytes to a file that has at any moment all of its old or all of its new content."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(f"{path}.new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def make_run_folder():
    """Make runs/NNN with the first number that is free, and return it: no two runs are given the same."""
    Path("runs").mkdir(exist_ok=True)
    for number in itertools.count():
        with contextlib.suppress(FileExistsError):
            Path(f"runs/{number:03d}").mkdir()
            return number


def read_checkpoint(settings):
    """The run in `settings.out`, as `Run.save` left it; None where one can begin. Else raises UserError."""
    folder = Path(settings.out)
    if not (folder / CHECKPOINT).is_file():
        if folder.exists() and {path.name for path in folder.iterdir()} - {LOCK, f"{CHECKPOINT}.new"}:
            raise UserError(f"--out {folder} is not empty, and holds no run; name another folder")
        return None
    state, now = load_tensors(folder / CHECKPOINT), vars(settings)
    with explained(f"{folder / CHECKPOINT} is not the checkpoint of a run"):
        made, then = len(state["updates"]), state["settings"]
        changed = [f"{name} {then.get(name)}, not {value}" for name, value in now.items()
                   if name not in MAY_CHANGE and value != then.get(name)]
    if changed:
        raise UserError(f"--out {folder} holds a run with {'; '.join(changed)}; name another folder")
    if made > settings.train_steps:
        raise UserError(f"--out {folder} holds a run that is past update {settings.train_steps}, at {made}")
    return state


class Run:
    """A run: its folder and lock, what survives a kill, and what the terminal shows. Use it in a with block.

    settings: from `check`; adapter: {name: parameter}, what is evaluated and saved; extra_state: other
    tensors that an update changes. Raises UserError, or RunStopped for what may go on.
    """

    def __init__(self, settings, adapter, optimizer, evaluation, extra_state=()):
        self.settings, self.adapter, self.optimizer = settings, adapter, optimizer
        self.evaluation, self.extra_state = evaluation, extra_state
        self.updates, self.evaluations, self.best = [], [], {}      # lines of the log, and the best adapter
        self.counts, self.has_header = evaluation.model.counts, False
        self.doing, self.shown = "", 0.0             # what the bar says, and since when

    def __enter__(self):
        from tqdm import tqdm
        if not self.settings.out:
            number = torch.tensor(make_run_folder() if process_index() == 0 else 0)
            sum_over_processes([number])
            self.settings.out = f"runs/{number:03d}"
        self.out = Path(self.settings.out)
        if process_index() == 0:
            import fcntl
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / LOCK, "w")      # the lock dies with its process, however that ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is writing to {self.out}")
        sum_over_processes([torch.zeros(1)])            # the others wait here
        state = read_checkpoint(self.settings)
        if state:
            with explained(f"the checkpoint in {self.out} doesn't fit this model"):
                self.restore(state)
        made = torch.tensor(len(self.updates))
        sum_over_processes([made])
        if made != len(self.updates) * process_count():
            raise UserError(f"the processes don't see the same folder {self.out}; all of them must share it")
        self.save()
        self.bar = tqdm(total=self.settings.train_steps, initial=len(self.updates), unit="update",
                        disable=process_index() > 0)
        self.evaluation.model.heartbeat = self.show
        return self

    def __exit__(self, kind, error, trace):
        self.bar.close()
        if process_index() == 0:
            self.lock.close()
        if isinstance(error, (KeyboardInterrupt, OSError)) and not isinstance(error, BrokenPipeError):
            why = "by hand" if isinstance(error, KeyboardInterrupt) else f"by {in_words(error)}"
            raise RunStopped(f"stopped {why}; the same command with --out {self.out} goes on") from error

    def restore(self, state):
        """Take over what `save` saved. Raises what it will where that doesn't fit."""
        if self.adapter.keys() != state["adapter"].keys():
            raise ValueError(f"surplus or missing: {sorted(self.adapter.keys() ^ state['adapter'])[:3]}")
        saved = [state["adapter"][name] for name in self.adapter] + state["extra"]
        for tensor, value in zip([*self.adapter.values(), *self.extra_state], saved, strict=True):
            if tensor.shape != value.shape or not value.isfinite().all():
                raise ValueError("a tensor has another shape, or values that are not finite")
            tensor.data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates, self.evaluations, self.best = state["updates"], state["evaluations"], state["best"]

    def save(self):
        """Write the checkpoint, and from it what a user looks for."""
        from safetensors.torch import save
        if process_index() > 0:
            return
        state = {"settings": vars(self.settings), "updates": self.updates, "evaluations": self.evaluations,
                 "best": self.best, "adapter": self.copy_adapter(),
                 "extra": [tensor.detach() for tensor in self.extra_state],
                 "optimizer": self.optimizer.state_dict()}
        content = io.BytesIO()
        torch.save(state, content)
        log = sorted(self.updates + self.evaluations, key=lambda line: line["step"])
        files = {CHECKPOINT: content.getvalue(), ADAPTER: save(state["adapter"]),
                 "config.json": f"{json.dumps(state['settings'], indent=1)}\n".encode(),
                 "log.jsonl": "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in log).encode()}
        if self.best:
            best = {"step": self.best["step"], self.best["judge"]: self.best["score"]}
            files |= {f"best/{ADAPTER}": save(self.best["adapter"]),
                      "best/best.json": f"{json.dumps(best)}\n".encode()}
        for name, content in files.items():
            write_atomic(self.out / name, content)

    def copy_adapter(self):
        return {name: p.detach().cpu().clone() for name, p in self.adapter.items()}

    def steps(self):
        """The numbers of the updates that are left, from 0. Evaluates between them, reports at the end."""
        settings = self.settings
        if len(self.updates) == settings.train_steps:
            say("this run has made all its updates before; a larger --train-steps goes further")
        while True:
            step = len(self.updates)
            done = step == settings.train_steps
            due = settings.eval_every and (done or step % settings.eval_every == 0)
            if due and step not in [line["step"] for line in self.evaluations]:
                self.evaluate(step)
            if done or settings.stop_on_alarm and any(line["alarm"] for line in self.evaluations):
                break
            self.counts.clear()
            self.doing = f"reward={self.updates[-1]['reward']:.3f}" if self.updates else "update 1"
            self.began = time.perf_counter()
            yield step
        self.bar.close()
        self.report()

    def show(self):
        """In a terminal, show once a second that an update goes on: it may take minutes."""
        if sys.stderr.isatty() and time.perf_counter() > self.shown + 1:
            self.shown = time.perf_counter()
            count = sum(count for name, count in self.counts.items() if name.startswith("network"))
            self.bar.set_postfix_str(f"{self.doing}, {count:,} network evaluations")

    def record(self, reward, grad_norm, **values):
        """Log an update that the optimizer has made, and save; `steps` goes on by it.

        Raises UserError for an update without a gradient, or with a value that is not finite.
        """
        step = len(self.updates) + 1
        values = {"reward": reward, **values, "grad_norm": grad_norm}
        wrong = [f"{name} = {value:g}" for name, value in values.items() if not math.isfinite(value)]
        if grad_norm == 0 or wrong:
            raise UserError(f"update {step} has {', '.join(wrong) or 'a gradient of zero'}; the last good "
                            f"adapter is in {self.out}")
        counts = {name: count * process_count() for name, count in self.counts.items()}
        memory = {}
        if self.settings.device.startswith("cuda"):
            memory["peak_gb"] = torch.cuda.max_memory_allocated(self.settings.device) / 2 ** 30
        self.updates.append({"step": step, **values, **counts, "seconds": time.perf_counter() - self.began,
                             **memory})
        self.save()
        self.bar.set_postfix_str(f"reward={reward:.3f}", refresh=False)
        self.bar.update()

    def evaluate(self, step):
        """Score the evaluation's pictures; keep the adapter if its held-out score is the best so far."""
        judge = self.evaluation.scores.judge
        if step == 0:
            say(f"evaluating {len(self.evaluation.prompts)} pictures before the first update")
        self.counts.clear()
        self.doing = "evaluating"
        values, pictures = self.evaluation()
        means = {name: value.mean().item() for name, value in values.items()}
        if not self.has_header:
            self.has_header = True
            say("  step" + "".join(f"{name:>{max(8, len(name)) + 2}}" for name in means))
        row = "".join(f"{mean:{max(8, len(name)) + 2}.3f}" for name, mean in means.items())
        say(f"{step:6d}{row}")
        line = {"eval": True, "step": step, **means, "alarm": None}
        if judge and self.evaluations:
            line |= self.compare_with_best(means, values[judge])
        if judge and (not self.best or means[judge] > self.best["score"]):
            self.best = {"step": step, "judge": judge, "score": means[judge], "adapter": self.copy_adapter()}
        line["pictures"] = {name: value.tolist() for name, value in values.items()}
        self.evaluations.append(line)
        if process_index() == 0:
            prompts = "".join(f"{prompt}\n" for prompt in self.evaluation.prompts[:GRID])
            write_atomic(self.out / "samples/prompts.txt", prompts.encode())
            write_atomic(self.out / f"samples/step_{step:06d}.png", make_grid(pictures))
        self.save()

    def compare_with_best(self, means, held_out):
        """For the log: the first held-out score since its best evaluation, and the alarm that it raises."""
        scores = self.evaluation.scores
        history = [line["pictures"][scores.judge] for line in self.evaluations] + [held_out.tolist()]
        index, change, error, alarm_below = change_since_best(torch.tensor(history, dtype=torch.float64))
        then, alarm = self.evaluations[index], None
        gain = sum(weight * (means[name] - then[name]) for name, weight in scores.weights.items())
        if change < alarm_below:
            alarm = "hacking" if gain > 0 else "breaking"
            rest = "the reward rose" if gain > 0 else "the reward didn't rise; lower the learning rate"
            say(f"ALARM, {alarm}: since step {then['step']} {scores.judge} fell by {-change:.3f} +- "
                f"{error:.3f}, and {rest}")
        return {"alarm": alarm, "since_best": {"step": then["step"], "reward": gain, "held_out": change,
                                               "error": error, "alarm_below": alarm_below}}

    def report(self):
        """What a user reads at the end."""
        best, weights = self.best, self.evaluation.scores.weights
        if self.evaluations:
            first, last = self.evaluations[0]["pictures"], self.evaluations[-1]["pictures"]
            say(f"\n{'+-: the standard error':28}{'before':>10}{'after':>10}{'change':>10}{'+-':>8}")
            for name in first:
                role = "trained on" if name in weights else "sharpness" if name == "s1" else "held out"
                before, after = torch.tensor([first[name], last[name]], dtype=torch.float64)
                change = after - before
                error = change.std().item() / len(change) ** 0.5
                say(f"{f'{name} ({role})':>28}{before.mean():10.3f}{after.mean():10.3f}{change.mean():10.3f}"
                    f"{error:8.3f}")
        if best:
            alarms = ", ".join(f"{line['alarm']} at step {line['step']}" for line in self.evaluations
                               if line["alarm"])
            say(f"best {best['judge']}: {best['score']:.3f} after update {best['step']}, in {self.out}/best")
            say(f"ALARM: {alarms}" if alarms else "no alarm")
        else:
            say("nothing held out was measured, so reward hacking could not be seen; see --eval-reward and "
                "--eval-every")
        say(f"adapter, log.jsonl, config.json and samples/ are in {self.out}; to judge and to plot:\n"
            f"    python tools/evaluate.py {self.out}{f' {self.out}/best' if best else ''}\n"
            f"    python tools/plot.py {self.out}")


# ---- Settings and loading, in the order in which what is wrong shows soonest -------------------------------

def read_prompts(path):
    """The lines of a UTF-8 text file that aren't empty. Raises UserError."""
    with explained(f"the prompt file {path} can't be read"):
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError("it is empty; write one prompt a line")
    return prompts


def split_weight(text):
    """NAME=WEIGHT to (NAME, WEIGHT); without a weight it is 1."""
    name, _, weight = text.rpartition("=")
    try:
        return (name, float(weight)) if name else (text, 1.0)
    except ValueError:
        return text, 1.0


def check(settings):
    """A copy of the settings with what was left to the model and the machine filled in; loads no weights.

    Raises UserError for whatever can be known by now, before diffusers is imported; RunStopped as `fetch`.
    """
    settings = argparse.Namespace(**vars(settings))
    with explained("RANK and WORLD_SIZE in the environment are not torchrun's"):
        together = int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= int(os.environ.get("RANK", 0)) < together:
            raise ValueError(f"RANK {os.environ.get('RANK')} of {together}")
    settings.micro_batch_size = settings.micro_batch_size or max(1, settings.batch_size // together)
    settings.sampling_batch_size = settings.sampling_batch_size or settings.batch_size
    if settings.batch_size % (together * settings.micro_batch_size):
        raise UserError(f"--batch-size {settings.batch_size} can't be divided by --micro-batch-size "
                        f"{settings.micro_batch_size} times {together} processes")
    there = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    with explained(f"--device {settings.device} won't do"):
        settings.device = settings.device or there[0]
        if torch.device(settings.device).type not in there:
            raise ValueError(f"here are {', '.join(there)}")
    settings.dtype = settings.dtype or ("bfloat16" if settings.device.startswith("cuda") else "float32")
    prompts = read_prompts(settings.prompts), read_prompts(settings.eval_prompts or settings.prompts)
    settings.prompts_sha256 = hashlib.sha256(repr(prompts).encode()).hexdigest()

    family, _, height, width = inspect_model(settings.model, settings.height, settings.width)
    settings.height, settings.width = height, width
    settings.sampling_steps = settings.sampling_steps or family.sampling_steps
    if settings.guidance_scale is None:
        settings.guidance_scale = family.guidance_scale

    weights = [split_weight(text) for text in settings.reward]
    numbers = [weight for _, weight in weights]
    if not all(map(math.isfinite, numbers)) or (numbers and not any(numbers)):
        raise UserError(f"--reward {' '.join(settings.reward)}: give finite weights, not all of them 0")
    names = [*(name for name, _ in weights), *settings.eval_reward]
    for name in names:
        if [*map(short_name, names)].count(short_name(name)) > 1 or short_name(name) in LOG_NAMES:
            raise UserError(f"the reward {name} is named twice, or as the log names something else; what is "
                            "trained on can't be held out")
        if own_file(name) is None:
            find_reward(name, settings.models, sum(prompts, []))
        elif not own_file(name).is_file():
            raise UserError(f"reward {name}: there is no file {own_file(name)}")
    if settings.stop_on_alarm and not (settings.eval_every and settings.eval_reward):
        raise UserError("--stop-on-alarm needs evaluations, --eval-every, and a held-out --eval-reward")

    out = settings.out or "runs"        # without --out, a new folder in it, made when the run begins
    with explained(f"--out {out} can't be used"):
        path = Path(out).absolute()
        parent = next(folder for folder in (path, *path.parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ValueError(f"{parent} can't be written to")
        if settings.out:
            read_checkpoint(settings)
    return settings


Loaded = namedtuple("Loaded", "model scores prompts evaluation")


def load(settings, must_have_gradient=True, more_prompts=()):
    """Model, rewards, prompts of checked settings, tried out; no file yet. Raises UserError, RunStopped."""
    weights, prompts = dict(map(split_weight, settings.reward)), read_prompts(settings.prompts)
    eval_prompts = read_prompts(settings.eval_prompts or settings.prompts)
    eval_prompts = [eval_prompts[i % len(eval_prompts)] for i in range(settings.eval_images)]
    names = [*weights, *settings.eval_reward]
    if "WORLD_SIZE" in os.environ and not distributed():
        if settings.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        with explained("the processes can't be connected; start them with torchrun"):
            torch.distributed.init_process_group()
    say(f"{settings.device} x {process_count()}, {settings.dtype}; loading {', '.join(names)} and "
        f"{settings.model}".replace(f"{HERE}{os.sep}", ""))
    if settings.device == "cpu" and settings.height * settings.width >= 256 ** 2:
        say(f"no GPU is used, and on a CPU a picture of {settings.height}x{settings.width} takes minutes; if "
            "there is one, see what torch.cuda.is_available() says")
    if not settings.eval_reward:
        other = "pickscore (4.0 GB)" if "clipscore" in weights else "clipscore (1.7 GB)"
        say(f"nothing is held out, so reward hacking can't be seen; add --eval-reward {other}")
    family, *_ = inspect_model(settings.model, settings.height, settings.width)
    wanted = defaultdict(list, {settings.model: family.files()})
    for name in names:
        if own_file(name) is None:
            add_patterns(wanted, find_reward(name, settings.models)[1])
    fetch(wanted)    # all at once and first, so that it is announced in one line; later calls find it cached
    settings.versions = quiet_libraries()
    torch.backends.cudnn.allow_tf32 = False    # perturbations and rewards are float32, convolutions too

    rewards, differentiable = dict.fromkeys(map(short_name, names)), bool(weights)
    for name in sorted(names, key=lambda name: own_file(name) is None):    # your own first: likeliest to fail
        rewards[short_name(name)] = make_reward(name, settings.models, settings.device)
        # A model takes any prompt; a function of your own may not, so it is shown all of them.
        shown = list(dict.fromkeys(prompts + eval_prompts)) if own_file(name) else prompts[:1]
        has_gradient = try_reward(name, rewards[short_name(name)], shown, settings, name in weights)
        if name in weights and not has_gradient:
            differentiable = False
            if must_have_gradient:
                raise UserError(f"the reward {name} can't be trained on: it is not differentiable in the "
                                "images, or its gradient is not finite")
    model = load_model(settings.model, settings.sampling_steps, settings.guidance_scale, settings.height,
                       settings.width, getattr(torch, settings.dtype), settings.device)
    if settings.gradient_checkpointing:
        model.network.enable_gradient_checkpointing()
        model.vae.enable_gradient_checkpointing()
    scores = Scores(rewards, {short_name(name): weight for name, weight in weights.items()}, model.counts)
    model.encode_prompts(["", *prompts, *eval_prompts, *more_prompts])
    model.drop_encoders()
    radius = S1_RADIUS_TINY if settings.tiny else S1_RADIUS
    evaluation = Evaluation(model, scores, eval_prompts, settings, radius if differentiable else None)
    return Loaded(model, scores, prompts, evaluation)


# ---- Flags -------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is one line, as everywhere here."""

    def __init__(self, program, description):
        super().__init__(usage=f"python {program} [FLAGS]", description=description, allow_abbrev=False,
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 28, 110))
        self.set_defaults(program=program)    # a setting, so that no program goes on with another one's run

    def error(self, message):
        raise UserError(f"{message}; see --help")

    def flags(self, title, rows):
        """Add a group of flags, each a row (name, default, help, what else argparse wants to know)."""
        group = self.add_argument_group(title)
        for name, default, help, options in rows:
            shown = " ".join(map(str, default)) if isinstance(default, list) else "%(default)s"
            if shown and default is not None and default is not False:
                help += f" (default: {shown})"
            group.add_argument(name, default=default, help=help, **options)

    def format_help(self):
        return super().format_help().replace(f"{HERE}{os.sep}", "")


def number(kind, low, high, above=False, **options):
    """What argparse wants to know of a number from low, or just above it, to high."""
    def parse_number(text):
        value = kind(text)
        if not low <= value <= high or above and value == low:
            least = f"above {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {least} and at most {high:g}")
        return value

    parse_number.__name__ = "whole number" if kind is int else "number"
    return {"type": parse_number, "metavar": "N" if kind is int else "X", **options}


COUNT, AMOUNT, SWITCH = number(int, 1, 10 ** 6), number(float, 0, 1e6, above=True), {"action": "store_true"}
COUNT_OR_0, AMOUNT_OR_0, PIXELS = number(int, 0, 10 ** 6), number(float, 0, 1e6), number(int, 1, 8192)
RADIUS = number(float, 0, 1e6, nargs="?", const=1e-2, metavar="RHO")
NAMES, FILE, FOLDER = {"nargs": "*", "metavar": "NAME"}, {"metavar": "FILE"}, {"metavar": "DIR"}

# What --tiny puts in the place of the defaults. The radii stay the paper's; S1's is S1_RADIUS_TINY.
TINY = dict(model=str(HERE / "tiny/stable-diffusion"), models=str(HERE / "tiny"), rank=8, learning_rate=2e-3,
            prompts=str(HERE / "tiny/prompts.txt"), sampling_steps=10, guidance_scale=3.0, train_steps=60,
            micro_batch_size=None, sampling_batch_size=None, eval_images=144,
            eval_reward=["judge", f"{HERE / 'tiny/world.py'}:oracle_accuracy",
                         f"{HERE / 'tiny/world.py'}:oracle_rmse"])


def add_common_flags(parser):
    """The flags of all methods, also of related/. The paper is RSA-FT's, as far as public summaries tell."""
    parser.flags("model, reward, prompts", [
        ("--model", "stable-diffusion-v1-5/stable-diffusion-v1-5", "a diffusers folder or a hub id: Stable "
         "Diffusion 1 or 2, SDXL, SD3, SD3.5, FLUX.1, FLUX.2 klein, Z-Image", FOLDER),
        ("--models", None, "a folder with a folder per reward, to load them from instead of the hub", FOLDER),
        ("--tiny", False, "the small models of tiny/, and defaults for a CPU", SWITCH),
        ("--reward", ["pickscore"], "what is maximised, NAME[=WEIGHT] or FILE.py:FUNCTION, a sum of several; "
         "paper: hpsv2", NAMES),
        ("--eval-reward", [], "held out, never trained on; the first one picks best/, and raises the alarm "
         "where it falls; paper: hpsv2.1 pickscore imagereward", NAMES),
        ("--prompts", str(HERE / "prompts.txt"), "a text file, one prompt a line", FILE),
        ("--eval-prompts", None, "another one for the evaluations", FILE)])
    parser.flags("sampling (without a default: the model's own)", [
        ("--sampling-steps", None, "steps of a rollout, T; paper: 50, SD3 28", number(int, 1, 10 ** 4)),
        ("--guidance-scale", None, "classifier-free guidance, ours; 1 turns it off, but FLUX.1-dev's, which "
         "is an input", AMOUNT_OR_0),
        ("--height", None, "of the pictures, in pixels; paper: 512, SDXL and SD3 1024", PIXELS),
        ("--width", None, "of the pictures, in pixels", PIXELS)])
    parser.flags("training", [
        ("--train-steps", 200, "number of updates; ours", number(int, 1, 10 ** 9)),
        ("--batch-size", 32, "pictures per update; paper: 32", COUNT),
        ("--learning-rate", 3e-4, "of AdamW; the paper's 2e-05 is, as far as known, for all weights; ours "
         "moves the adapted ones about as far", AMOUNT),
        ("--weight-decay", 1e-4, "of AdamW; paper: 0.0001", AMOUNT_OR_0),
        ("--max-grad-norm", 1.0, "clip the gradient to this norm; ours", AMOUNT),
        ("--rank", 16, "of the LoRA adapter; ours", COUNT),
        ("--seed", 0, "of all that is random but the evaluations' noise", number(int, 0, 2 ** 63))])
    parser.flags("memory and speed (ours)", [
        ("--micro-batch-size", 1, "pictures at a time where there is a gradient, and in the decoder and the "
         "rewards; must divide the batch", COUNT),
        ("--sampling-batch-size", 8, "pictures at a time in the steps without gradient", COUNT),
        ("--gradient-checkpointing", False, "recompute activations: less memory, slower", SWITCH),
        ("--dtype", None, "of the frozen weights; without the flag bfloat16 on CUDA, float32 elsewhere",
         {"choices": ("float32", "bfloat16")}),
        ("--device", None, "cuda, mps or cpu; without the flag the first of them that is there", {})])
    parser.flags("evaluation and results (ours)", [
        ("--eval-every", 20, "updates between evaluations; 0: no evaluation at all", COUNT_OR_0),
        ("--eval-images", 32, "pictures per evaluation, two or more", number(int, 2, 10 ** 6)),
        ("--stop-on-alarm", False, "end the run when the alarm is raised", SWITCH),
        ("--out", None, "the run's folder, where a stopped one goes on (without: a new runs/NNN)", FOLDER)])


def parse_with(parser, argv, tiny):
    """The settings of a command line. --tiny replaces defaults, and what is given wins. Raises UserError."""
    if parser.parse_args(argv).tiny:
        parser.set_defaults(**tiny)
    return parser.parse_args(argv)


def parse(argv=None, program="rsaft.py"):
    """The settings of rsaft.py's command line, an argparse.Namespace. Raises UserError."""
    parser = Parser(program, "Reward Sharpness-Aware Fine-Tuning of text-to-image diffusion models.")
    parser.flags("method", [
        ("--noise", 0.0, "move each picture to the worst one within a radius; without a number the paper's, "
         "0.01; 0: off", RADIUS),
        ("--sam", 0.0, "move the weights to the worst within a radius; without a number the paper's, 0.01; "
         "0: off", RADIUS),
        ("--sam-rollout", "full", "the second rollout of --sam: all of it, the paper's, or the steps with "
         "gradient", {"choices": ("full", "window")}),
        ("--method", "draft", "which part of the rollout is differentiated; paper: all but draft-lv",
         {"choices": METHODS}),
        ("--grad-steps", None, "K, how many steps carry the gradient; without the flag the method's", COUNT)])
    add_common_flags(parser)
    return parse_with(parser, argv, TINY)


# ---- The program -------------------------------------------------------------------------------------------

def main(argv=None, parse=parse, train=train, program="rsaft.py"):
    """Run a command line. Returns the exit code: 0; 2: something to put right; 1: anything else ended it."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")    # a path may hold what the terminal can't show
    try:
        train(parse(argv))
        return 0
    except BrokenPipeError:    # nobody reads any more, as after `| head`; Python would write once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        message = in_words(error)
        if isinstance(error, (UserError, RunStopped)):
            message = str(error)
        elif isinstance(error, KeyboardInterrupt):
            message = "stopped by hand, before the run began or went on; what was downloaded is kept"
        elif is_out_of_memory(error):
            message = "out of memory; try --gradient-checkpointing, --micro-batch-size 1, --dtype bfloat16"
        elif not isinstance(error, OSError):
            message += "; RSAFT_TRACEBACK=1 in the environment shows where"
        if os.environ.get("RSAFT_TRACEBACK"):
            traceback.print_exc()
        if distributed() or os.environ.get("LOCAL_RANK", "0") == "0":    # unconnected, all fail alike
            print(f"{program}: {message}", file=sys.stderr)
        return 2 if isinstance(error, (UserError, OSError)) else 1
    finally:
        if distributed():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.modules["rsaft"] = sys.modules["__main__"]    # what the files of rewards/ and your own import
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
