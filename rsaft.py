"""RSA-FT: Reward Sharpness-Aware Fine-Tuning of text-to-image diffusion models, in one file.

The method of Kim & Sim, CVPR 2026 (arXiv 2603.21175); equation numbers are that paper's. A diffusion model is tuned
by gradient ascent on a differentiable reward r of its own pictures, backpropagated through the last K steps of a
DDIM rollout (DRaFT-K, arXiv 2309.17400):

    max_theta  E_{c, xT} [ r( x0(xT, c; theta), c ) ]                                      (Eq. 4)

Where the reward's surface is steep, pictures get a higher score without getting better: reward hacking. RSA-FT
follows the gradient of a flattened reward instead, at the worst nearby picture and the worst nearby weights:

    d = -rho   grad_x0 r    / |grad_x0 r|        one per picture                 --noise   (Eq. 15)
    e = -rho_w grad_theta r / |grad_theta r|     one for all trained weights     --sam     (Eq. 17)

    max_theta  E_{c, xT} [ r( x0(xT, c; theta + e) + d, c ) ]                              (Eq. 19)

Try it on any laptop, with the small trained models of tiny/, then on Stable Diffusion 1.5:

    python rsaft.py --tiny --reward pickscore --sam --noise
    python rsaft.py --reward pickscore --sam --noise

The file is in the order of the story: settings, sampling step, rollout, rewards, perturbations, Algorithm 1, LoRA;
then models, evaluation, training loop and command line. Down to LoRA all is tensors in, tensors out: copy what you
need, it brings nothing but torch along.
"""
import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent


# ---- Settings ------------------------------------------------------------------------------------------------------

def option(default, help, **argparse_options):
    return field(default=default, metadata={"help": help, **argparse_options})


@dataclass(frozen=True)
class Config:
    """All settings; the command line is made of these fields. README says which defaults are the paper's."""
    model: str = option("stable-diffusion-v1-5/stable-diffusion-v1-5", "a diffusers folder, or an id on the hub")
    models: str = option(None, "take reward models from this folder, one sub-folder per name, not from the hub")
    tiny: bool = option(False, "the small models in tiny/, and defaults that suit a CPU")
    reward: str = option("pickscore", "what is maximised: a name, or FILE.py:FUNCTION")
    eval_reward: tuple = option((), "held-out scores, never trained on", nargs="*", type=str, metavar="REWARD")
    prompts: str = option(str(HERE / "prompts.txt"), "a text file, one prompt a line")
    noise: float = option(0.0, "perturb the pictures, within radius RHO; 0.01 if no number is given",
                          nargs="?", const=1e-2, metavar="RHO")
    noise_type: str = option("worst", "the worst direction, or a mean over random ones", choices=("worst", "gaussian"))
    noise_draws: int = option(4, "number of random directions for --noise-type gaussian")
    sam: float = option(0.0, "perturb the weights, within radius RHO; 0.01 if no number is given",
                        nargs="?", const=1e-2, metavar="RHO")
    train_steps: int = option(200, "number of updates")
    sampling_steps: int = option(50, "DDIM steps of a rollout, T")
    grad_steps: int = option(1, "the last K of them carry the gradient")
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
    seed: int = option(0, "of everything random")
    dtype: str = option("float32", "of the frozen weights; the adapter is float32", choices=("float32", "bfloat16"))
    device: str = option(None, "cuda, mps or cpu (default: the first of them that is there)")
    out: str = option(None, "a new or empty folder for the results (default: a new runs/NNN)")


# What --tiny puts in the place of the defaults, and nothing else. The radii stay the paper's.
TINY = dict(model=str(HERE / "tiny" / "stable-diffusion"), models=str(HERE / "tiny"),
            prompts=str(HERE / "tiny" / "prompts.txt"), eval_reward=("judge", f"{HERE / 'tiny' / 'world.py'}:oracle"),
            sampling_steps=10, guidance_scale=3.0, micro_batch_size=None, learning_rate=2e-3, rank=8,
            train_steps=60, eval_images=144)
S1_RADIUS, S1_RADIUS_TINY = 0.01, 0.1  # one radius for the sharpness of every run, so that runs can be compared


class UserError(Exception):
    """Something the user can put right. `main` prints it as one line and exits with 2."""


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
    """Which part of a rollout is differentiated. Drawn once, and the same in both passes of an update.

    grad: for each step that is taken, whether the network's output carries a gradient.
    """
    grad: tuple


def draft(T, K=1):
    """The plan of DRaFT-K (arXiv 2309.17400): all T steps, the last K with gradient. K = 0 is plain sampling."""
    return Plan(grad=(False,) * (T - K) + (True,) * K)


def rollout(denoise, x, steps, plan):
    """Deterministic DDIM sampling that keeps the gradient where the plan says so.

    denoise: (x, t) -> f, the network's output with guidance, of x's shape; x: (B, C, h, w) noise xT;
    steps: list of Step. Returns the final latents, (B, C, h, w), with a graph through the steps of `plan.grad`.
    """
    for step, carries_grad in zip(steps, plan.grad):
        with torch.set_grad_enabled(carries_grad and torch.is_grad_enabled()):
            f = denoise(x, step.t)
        x = step.a * x + step.b * f
    return x


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


# ---- Rewards: functions reward(images, prompts) -> (B,), with images (B, 3, H, W) in [0, 1], float32 ---------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images, size):
    """Images (B, 3, H, W) in [0, 1] to what a CLIP vision tower takes, (B, 3, size, size), with the gradient kept.

    Antialiased bicubic resize of the short side, then a centre crop: CLIP's preprocessing of 8-bit pictures. That
    rounds the overshoot away, hence the clamp: where it acts there is no gradient. The right size passes untouched.
    """
    H, W = images.shape[-2:]
    if (H, W) != (size, size):
        H, W = round(H * size / min(H, W)), round(W * size / min(H, W))
        images = F.interpolate(images.float(), (H, W), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (H - size) // 2, (W - size) // 2
        images = images[..., top:top + size, left:left + size]
    mean, std = images.new_tensor([CLIP_MEAN, CLIP_STD])[..., None, None]
    return (images - mean) / std


def clip_score(model, input_ids, pixels):
    """exp(logit_scale) * cosine of text and image under a transformers CLIPModel: (B,), differentiable in `pixels`.

    input_ids: (B, tokens); pixels: (B, 3, size, size), normalised. With its weights this is PickScore (2305.01569).
    """
    image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    text = model.text_projection(model.text_model(input_ids=input_ids).pooler_output)
    return model.logit_scale.exp() * F.cosine_similarity(image, text, dim=-1)


def pickscore(files, device):
    """PickScore as a reward; pictures score about 18 to 24. files: {"weights": ..., "tokenizer": ...}."""
    from transformers import AutoTokenizer, CLIPModel
    model = CLIPModel.from_pretrained(files["weights"], dtype=torch.float32).to(device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(files["tokenizer"])
    tokens, size = model.config.text_config.max_position_embeddings, model.config.vision_config.image_size

    def reward(images, prompts):
        input_ids = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=tokens,
                              return_tensors="pt").input_ids.to(device)
        return clip_score(model, input_ids, clip_pixels(images, size))

    return reward


def own_function(files, device):
    """The reader's own reward: the function FUNCTION of FILE.py."""
    spec = importlib.util.spec_from_file_location(Path(files["file"]).stem, files["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, files["function"])


# name: (loader, {what: hub id}). A loader takes ({what: folder or hub id}, device) and returns the reward function.
REWARDS = {
    "pickscore": (pickscore, {"weights": "yuvalkirstain/PickScore_v1",
                              "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}),
    "judge": (pickscore, {"weights": None, "tokenizer": None}),  # the held-out judge of tiny/; on no hub
}


def reward_files(name, models=None):
    """Where the reward `name` is to be had, {what: file, folder or hub id}; loads nothing. Raises UserError."""
    file, _, function = name.rpartition(":")
    if file.endswith(".py"):
        if not Path(file).is_file():
            raise UserError(f"reward {name}: there is no file {file}")
        return {"file": file, "function": function}
    if name not in REWARDS:
        raise UserError(f"unknown reward {name!r}; there are {', '.join(REWARDS)}, and FILE.py:FUNCTION for your own")
    hub = REWARDS[name][1]
    if models:
        if not Path(models, name, "config.json").is_file():
            raise UserError(f"reward {name}: there is no {Path(models, name, 'config.json')}; see --models")
        return dict.fromkeys(hub, str(Path(models, name)))
    if not all(hub.values()):
        raise UserError(f"the reward {name} is on no hub; --models DIR must name the folder that holds {name}/")
    return {what: find_model(source) for what, source in hub.items()}


def make_reward(name, models=None, device="cpu"):
    """The reward `name` as a function reward(images, prompts) -> (B,), frozen and differentiable in the images.

    name: one of REWARDS, or "FILE.py:FUNCTION", a function of your own with that signature. images: (B, 3, H, W)
    in [0, 1]; prompts: B strings. models: a folder with a folder per reward; without it the weights come from the
    hub. Raises UserError where there is no such reward or it doesn't load.
    """
    files = reward_files(name, models)
    try:
        return REWARDS.get(name, (own_function,))[0](files, device)
    except Exception as error:
        raise UserError(f"the reward {name} doesn't load: {one_line(error)}") from error


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


# ---- The two perturbations -----------------------------------------------------------------------------------------

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


def rsaft_gradient(batches, generate, reward, params, rho=0.0, rho_w=0.0, gaussian_draws=0):
    """The gradient of the flattened reward, E[ r( x0(xT, c; theta + e) + d, c ) ] (Eq. 19), left in `params`' .grad.

    It points uphill: use an optimizer with maximize=True. With both radii 0 it is the plain gradient of Eq. 4.

    batches: list of Batch, the micro-batches of one update; generate: Batch -> images (B, 3, H, W) with a graph to
    `params`, the same images each time for the same weights; reward: (images, prompts) -> (B,); rho: radius of the
    picture's perturbation; rho_w: radius of the weights'; gaussian_draws: if not 0, the mean over that many random
    directions of norm rho takes the place of the worst one.

    Returns a dict of floats, means over the pictures: the reward and, for each perturbation that is on, the norm
    reached, the fall of the reward that the first order predicts, and the fall measured.
    """
    size, log, kept = sum(len(batch.prompts) for batch in batches), {}, []

    def add(name, values):
        log[name] = log.get(name, 0.0) + values.sum().item() / size

    for p in params:
        p.grad = None
    for batch in batches:                                                      # first pass, at theta
        x0 = generate(batch)
        r, g = reward_gradient(reward, x0, batch.prompts)
        add("reward", r)
        uphill, deltas = g, [0.0]
        if rho > 0:
            directions = [batch.noise(f"gaussian {i}", x0.shape[1:]) for i in range(gaussian_draws)] or [g]
            deltas = [sample_perturbation(v, rho) for v in directions]                           # d, Eq. 15
            if rho_w > 0:                                                      # its value, for the log alone
                with torch.no_grad():
                    r_d = sum(reward(x0 + delta, batch.prompts) for delta in deltas) / len(deltas)
            else:
                r_d, uphill = reward_gradient(reward, x0, batch.prompts, deltas)
            add("noise_fall_measured", r - r_d)
            for delta in deltas:
                add("noise_fall_predicted", -g * delta / len(deltas))
                add("noise_norm", (x0.detach() + delta - x0.detach()).flatten(1).norm(dim=1) / len(deltas))
        x0.backward(uphill / size)
        kept.append(deltas)

    if rho_w > 0:
        # Only now, with the whole batch seen, is the gradient known whose direction e takes.
        grads = [p.grad for p in params]
        epsilons = parameter_perturbation(grads, rho_w)                                          # e, Eq. 17
        log["sam_fall_predicted"] = -sum((grad * e).sum().item() for grad, e in zip(grads, epsilons))
        log["sam_fall_measured"] = log["reward"]
        for p in params:
            p.grad = None
        with perturbed(params, epsilons) as reached:
            log["sam_norm"] = nn.utils.get_total_norm(reached).item()
            for batch, deltas in zip(batches, kept):                           # second pass, at theta + e
                x0 = generate(batch)
                r, g = reward_gradient(reward, x0, batch.prompts, deltas)      # at x0' + d: Eq. 19
                x0.backward(g / size)
                if rho > 0:                                                    # at x0', for the log alone
                    with torch.no_grad():
                        r = reward(x0, batch.prompts)
                add("sam_fall_measured", -r)
    return log


# ---- LoRA (arXiv 2106.09685) ---------------------------------------------------------------------------------------

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


def add_lora(unet, rank, generator=None):
    """Freeze a UNet and put a LoRALinear around each attention projection (to_q, to_k, to_v, to_out.0).

    Returns the trained parameters, a list of float32 tensors in a fixed order.
    """
    unet.requires_grad_(False)
    for name, module in list(unet.named_modules()):
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")) and isinstance(module, nn.Linear):
            unet.set_submodule(name, LoRALinear(module, rank, generator))
    return [p for p in unet.parameters() if p.requires_grad]


def lora_state_dict(unet):
    """The adapter under diffusers' names, {"unet.<module>.lora_A.weight": tensor, ...}, with alpha equal to the rank.

    Trap: without the prefix "unet." diffusers loads nothing, and raises nothing.
    """
    return {f"unet.{name}.lora_{part}.weight": getattr(layer, part).detach().cpu().contiguous()
            for name, layer in unet.named_modules() if isinstance(layer, LoRALinear) for part in "AB"}


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

def one_line(error):
    """An exception as one line of at most 200 characters, for a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def find_model(model):
    """A folder or hub id as from_pretrained takes it: `model`, or its copy in the hub's cache if there's no network.

    One short probe instead of minutes of retries. Raises UserError if there is no such model.
    """
    if Path(model).is_dir():
        return model
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    try:
        HfApi().model_info(model, timeout=2)
        return model
    except (HFValidationError, RepositoryNotFoundError):
        raise UserError(f"{model} is neither a folder here nor a model on the hub") from None
    except Exception:
        with contextlib.suppress(Exception):
            return snapshot_download(model, local_files_only=True)
        raise UserError(f"{model} is no folder here, and the hub can't be reached; name local folders "
                        "(--model DIR, --models DIR), or try --tiny") from None


def model_size(model, height=None, width=None):
    """The latents' shape (channels, h, w) and the pictures' height and width in pixels, before any weights load.

    model: from `find_model`; height, width: by default the model's own. Raises UserError for a model that is no
    Stable Diffusion, and for a size that it can't make.
    """
    from huggingface_hub import hf_hub_download
    locate = Path if Path(model).is_dir() else hf_hub_download
    try:
        kind, unet, vae = (json.loads(Path(locate(model, name)).read_text())
                           for name in ("model_index.json", "unet/config.json", "vae/config.json"))
    except Exception as error:
        raise UserError(f"{model} is no diffusers model: {one_line(error)}") from None
    if kind["_class_name"] != "StableDiffusionPipeline":
        raise UserError(f"{model} is a {kind['_class_name']}; only Stable Diffusion 1 and 2 are supported")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    height, width = height or factor * unet["sample_size"], width or factor * unet["sample_size"]
    if height % factor or width % factor:
        raise UserError(f"--height and --width must be multiples of {factor} for this model, not {height} and {width}")
    return (unet["in_channels"], height // factor, width // factor), height, width


def load_pipeline(model, dtype=torch.float32, device="cpu"):
    """A frozen diffusers StableDiffusionPipeline from a folder or a hub id. Raises UserError if it doesn't load."""
    from diffusers import StableDiffusionPipeline
    try:
        pipe = StableDiffusionPipeline.from_pretrained(model, dtype=dtype, safety_checker=None, feature_extractor=None,
                                                       requires_safety_checker=False)
    except Exception as error:
        raise UserError(f"the model {model} doesn't load: {one_line(error)}") from error
    for module in pipe.unet, pipe.vae, pipe.text_encoder:
        module.to(device).eval().requires_grad_(False)
    return pipe


def make_generate(pipe, sampling_steps, guidance_scale, latent_shape):
    """A function generate(batch, plan) -> images (B, 3, H, W), from the parts of a StableDiffusionPipeline.

    Its scheduler is DDIM made from the pipeline's own. A prompt goes through the text encoder once and is kept.
    Raises UserError for a scheduler that DDIM can't follow.
    """
    from diffusers import DDIMScheduler
    try:
        steps = ddim_steps(DDIMScheduler.from_config(pipe.scheduler.config), sampling_steps)
    except ValueError as error:
        raise UserError(f"this model can't be used: {error}") from None

    @functools.cache
    @torch.no_grad()
    def embed(prompt):
        return pipe.encode_prompt(prompt, pipe.device, 1, False)[0]

    def generate(batch, plan):
        prompt_embeds = torch.cat([embed(prompt) for prompt in batch.prompts])
        denoise = make_denoise(pipe.unet, prompt_embeds, embed("").expand_as(prompt_embeds), guidance_scale)
        return decode(pipe.vae, rollout(denoise, batch.noise("xT", latent_shape), steps, plan))

    return generate


# ---- Evaluation ----------------------------------------------------------------------------------------------------

def scores_by_name(name, reward, images, prompts):
    """{name: (B,)}; FILE.py:FUNCTION is called FUNCTION, and one that returns a dict gives FUNCTION_KEY for each."""
    name, scores = name.rpartition(":")[2], reward(images, prompts)
    return {f"{name}_{key}": value for key, value in scores.items()} if isinstance(scores, dict) else {name: scores}


def check_reward(name, reward, prompts, height, width, device, differentiable):
    """Score a random picture for each of `prompts`. Raises UserError unless the scores can be used."""
    images = torch.rand(1, 3, height, width, generator=named_generator("check")).to(device)
    images = images.repeat(len(prompts), 1, 1, 1).requires_grad_(differentiable)
    try:
        scores = scores_by_name(name, reward, images, prompts)
        for score in scores.values():
            if score.shape != (len(prompts),):
                raise ValueError(f"it returned the shape {tuple(score.shape)} for {len(prompts)} pictures")
            if not score.isfinite().all():
                raise ValueError("it is not finite on a random picture")
        if differentiable:
            if len(scores) > 1 or not score.requires_grad:
                raise ValueError("it is not differentiable in the images, so it can't be trained on")
            if not torch.autograd.grad(score.sum(), images)[0].isfinite().all():
                raise ValueError("its gradient is not finite on a random picture")
    except Exception as error:
        raise UserError(f"the reward {name} can't be used: {one_line(error)}") from error


def evaluate(generate, batches, trained, held_out, s1_radius):
    """Score the pictures of `batches`. Returns ({name: mean}, images (N, 3, H, W) on the CPU).

    generate: Batch -> images; trained: (name, reward), whose S1 is measured too; held_out: {name: reward}.
    """
    totals, pictures = {}, []
    for batch in batches:
        with torch.no_grad():
            images = generate(batch)
            scores = {key: value for name, reward in [trained, *held_out.items()]
                      for key, value in scores_by_name(name, reward, images, batch.prompts).items()}
        scores["s1"] = reward_sharpness(trained[1], images, batch.prompts, s1_radius)
        for key, value in scores.items():
            totals[key] = totals.get(key, 0.0) + value.sum().item()
        pictures.append(images.cpu())
    pictures = torch.cat(pictures)
    return {key: total / len(pictures) for key, total in totals.items()}, pictures


def save_grid(images, path, columns=4):
    """The first 16 images as one PNG; small ones are enlarged by a whole factor, so that a person sees something."""
    from PIL import Image
    images = images[:16]
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns), value=1.0)
    rows = [torch.cat(list(row), dim=-1) for row in images.split(columns)]
    factor = max(1, 128 // images.shape[-1])
    pixels = torch.cat(rows, dim=-2).repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    Image.fromarray(pixels.permute(1, 2, 0).mul(255).round().byte().numpy()).save(path)


# ---- The run -------------------------------------------------------------------------------------------------------

class RunStopped(Exception):
    """The run ended early; what it had is saved. `main` prints it as one line and exits with 1."""


def check(config):
    """Raise UserError for settings that can't work, as far as that can be told without loading anything."""
    def require(condition, message):
        if not condition:
            raise UserError(message)

    may_be_zero = ("tiny", "noise", "sam", "weight_decay", "eval_every", "guidance_scale", "seed")
    for name, value in asdict(config).items():
        if isinstance(value, (int, float)):
            require(0 <= value < math.inf and (value > 0 or name in may_be_zero),
                    f"--{name.replace('_', '-')} can't be {value}")
    require(config.grad_steps <= config.sampling_steps <= 1000,
            f"--sampling-steps {config.sampling_steps} must be at least --grad-steps {config.grad_steps}, at most 1000")
    require(config.batch_size % (config.micro_batch_size or 1) == 0,
            f"--micro-batch-size {config.micro_batch_size} does not divide --batch-size {config.batch_size}")
    require(config.reward not in config.eval_reward, f"{config.reward} is trained on, so it can't be held out; "
            "give another --eval-reward")
    require(not config.models or Path(config.models).is_dir(), f"--models {config.models} is no folder")
    if config.device:
        kind = config.device.partition(":")[0]
        require(kind in ("cuda", "mps", "cpu") and getattr(torch, kind).is_available(),
                f"--device {config.device} is not here; leave the flag out, or use cpu")
    if config.out:
        path = Path(config.out).absolute()
        parent = next(p for p in (path, *path.parents) if p.exists())
        require(parent.is_dir() and os.access(parent, os.W_OK), f"--out {config.out}: can't write to {parent}")
        require(parent != path or not any(path.iterdir()), f"--out {config.out} is not empty; name a new folder")


def read_prompts(path):
    """The lines of a UTF-8 text file that aren't empty. Raises UserError."""
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise UserError(f"the prompt file {path} can't be read: {one_line(error)}") from None
    if not prompts:
        raise UserError(f"the prompt file {path} is empty; write one prompt a line")
    return prompts


def make_out(out):
    """Make the folder for the results, `out` or a new runs/NNN, with samples/ in it."""
    number = 0
    while not out or (number and Path(out).exists()):
        out, number = f"runs/{number:03d}", number + 1
    Path(out, "samples").mkdir(parents=True)
    return Path(out)


def quiet_libraries():
    """Leave the terminal to our own lines: no notes about torchvision, no bars for weights. Returns the versions."""
    import transformers
    transformers.logging.set_verbosity_error()
    import diffusers
    diffusers.logging.set_verbosity_error()
    for library in transformers, diffusers:
        library.logging.disable_progress_bar()
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    return {"python": sys.version.split()[0], **versions}


def peak_gb(device):
    """Peak memory so far in GiB: on CUDA what torch took there, elsewhere the process's; None on Windows."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if sys.platform == "win32":
        return None
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def train(config):
    """One run, from settings to files. Raises UserError before anything is written, RunStopped after that."""
    check(config)
    prompts = read_prompts(config.prompts)
    names = [config.reward, *config.eval_reward]
    for name in names:
        reward_files(name, config.models)
    model = find_model(config.model)
    latent_shape, height, width = model_size(model, config.height, config.width)
    device = config.device or next(d for d in ("cuda", "mps", "cpu") if getattr(torch, d).is_available())

    print(f"loading {', '.join(names)} and {config.model}".replace(f"{HERE}{os.sep}", ""), flush=True)
    versions = quiet_libraries()
    made = {name: make_reward(name, config.models, device) for name in sorted(names, key=REWARDS.__contains__)}
    for name in names:  # a model takes any prompt; a function of your own may not, so it is shown all of them
        check_reward(name, made[name], prompts[:1] if name in REWARDS else prompts, height, width, device,
                     differentiable=name == config.reward)
    reward, rewards = made[config.reward], {name: made[name] for name in config.eval_reward}
    pipe = load_pipeline(model, getattr(torch, config.dtype), device)
    generate = make_generate(pipe, config.sampling_steps, config.guidance_scale, latent_shape)
    params = add_lora(pipe.unet, config.rank, named_generator(config.seed, "lora"))
    optimizer = torch.optim.AdamW(params, lr=config.learning_rate, betas=(0.9, 0.999),
                                  weight_decay=config.weight_decay, maximize=True)
    plan, sampling = draft(config.sampling_steps, config.grad_steps), draft(config.sampling_steps, K=0)
    micro_batch_size = config.micro_batch_size or config.batch_size
    evaluation = evaluation_batches(prompts, config.eval_images, micro_batch_size, device)

    from safetensors.torch import save_file
    from tqdm import tqdm
    out = make_out(config.out)
    settings = {**asdict(config), "height": height, "width": width, "device": device, "out": str(out)}
    (out / "config.json").write_text(json.dumps({**settings, **versions}, indent=1))

    def write(record):
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def evaluate_now(step):
        scores, pictures = evaluate(lambda batch: generate(batch, sampling), evaluation, (config.reward, reward),
                                    rewards, S1_RADIUS_TINY if config.tiny else S1_RADIUS)
        write({"eval": True, "step": step, **scores})
        save_grid(pictures, out / "samples" / f"step_{step:06d}.png")
        return scores

    calls = config.batch_size * (2 if config.guidance_scale > 1 else 1) * (2 if config.sam else 1)
    print(f"{device}, {config.dtype}, {sum(p.numel() for p in params):,} trained parameters; network evaluations per "
          f"update: {calls * plan.grad.count(False)} without gradient, {calls * plan.grad.count(True)} with")
    if not rewards:
        print("nothing is held out, so reward hacking can't be seen; give --eval-reward")

    try:
        before = after = evaluate_now(0) if config.eval_every else {}
        progress = tqdm(range(1, config.train_steps + 1), unit="update")
        for step in progress:
            start = time.perf_counter()
            chosen = training_prompts(prompts, config.seed, step - 1, config.batch_size)
            batches = micro_batches(chosen, (config.seed, step - 1), micro_batch_size, device)
            record = rsaft_gradient(batches, lambda batch: generate(batch, plan), reward, params, config.noise,
                                    config.sam, config.noise_draws if config.noise_type == "gaussian" else 0)
            record["grad_norm"] = nn.utils.clip_grad_norm_(params, config.max_grad_norm).item()
            if record["grad_norm"] == 0 or not all(map(math.isfinite, record.values())):
                raise RunStopped(f"update {step} has no finite gradient ({record}); the adapter before it is in {out}")
            optimizer.step()
            record["seconds"] = time.perf_counter() - start
            write({"step": step, **record, "peak_gb": peak_gb(device)})
            progress.set_postfix(reward=f"{record['reward']:.3f}", seconds=f"{record['seconds']:.1f}", refresh=False)
            if config.eval_every and (step % config.eval_every == 0 or step == config.train_steps):
                after = evaluate_now(step)
    except KeyboardInterrupt:
        raise RunStopped(f"stopped by hand; the adapter as it was then is in {out}") from None
    finally:
        save_file(lora_state_dict(pipe.unet), out / "pytorch_lora_weights.safetensors")

    if before:
        print(f"\n{'':>20}{'before':>10}{'after':>10}{'change':>10}")
    for name in before:
        role = {config.reward.rpartition(":")[2]: "trained on", "s1": "sharpness of the reward"}.get(name, "held out")
        print(f"{name:>20}{before[name]:10.3f}{after[name]:10.3f}{after[name] - before[name]:+10.3f}  {role}")
    print(f"nothing was held out\n" * (not rewards) + f"adapter, log.jsonl, config.json and samples/ are in {out}")


# ---- Command line --------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse(argv=None):
    """The Config of a command line. --tiny replaces defaults, and what is given wins. Raises UserError."""
    parser = Parser(description="Reward Sharpness-Aware Fine-Tuning of text-to-image diffusion models.",
                    argument_default=argparse.SUPPRESS, allow_abbrev=False, usage="python rsaft.py [FLAGS]",
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=118))
    for setting in fields(Config):
        options = {"type": setting.type, "metavar": {int: "N", float: "X"}.get(setting.type), **setting.metadata}
        if setting.type is bool:
            options = {"action": "store_true", **setting.metadata}
        elif setting.default not in (None, ()):
            options["help"] += f" (default: {setting.default})".replace(f"{HERE}{os.sep}", "")
        parser.add_argument("--" + setting.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    return Config(**{**(TINY if "tiny" in given else {}), **given})


def main(argv=None):
    """Run a command line. Returns the exit code: 0, 2 for what the user can put right, 1 for a run that stopped."""
    try:
        train(parse(argv))
        return 0
    except (UserError, RunStopped) as error:
        print(f"rsaft.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except torch.OutOfMemoryError:
        print("rsaft.py: out of memory; try a smaller --micro-batch-size, or --dtype bfloat16", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
