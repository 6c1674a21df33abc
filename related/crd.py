"""CRD: Centered Reward Distillation, online tuning of text-to-image diffusion models without the reward's gradient.

The method of arXiv 2603.14128, from its published description. Maximising a reward R under a KL penalty makes R equal
to the implicit reward plus a constant of the prompt that can't be computed; subtracting the mean over the n pictures of
one prompt removes it. So the two centred quantities are matched by regression. R may be a black box, and no gradient
goes through the sampler: a finished picture is noised to x_t, and y is what the network should answer, e.g. the noise.

    r_i  = -( |f_theta - y|^2 / w_theta  -  |f_old - y|^2 / w_old )        w: the mean absolute error, or 1
    loss = mean_i ( beta (r_i - mean_j r_j) - (R_i - mean_j R_j) )^2 a_max / beta
           + kl mean_i ( m + R_i (1 - m) ) |f_theta - f_ref|^2             m = 1e-4 / kl;  no gradient through mean_j

R_i is the reward's advantage within its prompt, scaled to [0, 1]. An epoch draws pictures, scores them, and regresses.
Three guards keep the model from drifting, each with a flag that turns it off:

    1. pictures come from a SAMPLING copy of the adapter, r is taken against an OLD copy     --sampler old
    2. the anchor f_ref is the frozen model WITH guidance, the tuned one is run without      --anchor-scale 1
    3. the anchor holds fast where the reward is high, and weakly where it is low            --anchor-weight constant

Models, sampling, LoRA, rewards, evaluation and the training loop are rsaft.py's. Try it:

    python related/crd.py --tiny --reward pickscore
    python related/crd.py --tiny --reward tiny/world.py:accuracy
"""
import functools
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # rsaft.py is no package; it lies one folder up
import rsaft
from gdro import Settings, forward_process, holding, squared_error, update_average
from rsaft import UserError, named_generator, option


# ---- Settings ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config(Settings):
    """All settings; the command line is made of these fields. README says which defaults are the paper's."""
    program, title = "related/crd.py", "Centered Reward Distillation of text-to-image diffusion models."
    may_be_zero = *Settings.may_be_zero, "kl"
    guidance_scale: float = option(1.0, "of sampling and evaluation; the tuned model needs none, so 1, which is off")
    group_size: int = option(24, "n, pictures of a prompt")
    batch_size: int = option(96, "pictures per epoch, in groups; every update takes them all, each time at a new t")
    epoch_updates: int = option(20, "updates on the pictures of one epoch")
    learning_rate: float = option(1e-4, "of AdamW")
    beta: float = option(1.0, "strength of the implicit reward")
    max_advantage: float = option(5.0, "a_max: advantages are clipped to +- this many standard deviations")
    error_weight: str = option("adaptive", "w: each picture's mean absolute error, or 1", choices=("adaptive", "one"))
    loss: str = option("square", "square, or binary cross entropy with sigmoid(centred R)", choices=("square", "bce"))
    temperature: float = option(None, "centre at means weighted by softmax(+-advantage / T) (default: plain means)")
    sampler: str = option("own", "guard 1: draw with a copy of the adapter of its own, or with the old one",
                          choices=("own", "old"))
    kl: float = option(0.1, "strength of the anchor; 0: none")
    anchor_scale: float = option(4.5, "guard 2: guidance of the anchor, the frozen model; 1 turns it off")
    anchor_weight: str = option("reward", "guard 3: the anchor's strength follows the reward, or is constant",
                                choices=("reward", "constant"))


TINY = {**rsaft.TINY, "guidance_scale": 1.0, "group_size": 12, "batch_size": 72, "epoch_updates": 5,
        "train_steps": 150, "eval_every": 30}  # chosen on seed 1


def check(config):
    """Raise UserError for settings that can't work, as rsaft.check does for the others."""
    if config.group_size < 2 or config.batch_size % config.group_size:
        raise UserError(f"--group-size must be at least 2 and divide --batch-size {config.batch_size}, not "
                        f"{config.group_size}")


# ---- The method: tensors in, tensors out ---------------------------------------------------------------------------

def scaled_advantage(reward, a_max=5.0):
    """R: the rewards of the n pictures of a prompt, (..., n), as advantages in [0, 1] of the same shape.

    a = (reward - mean) / standard deviation, clipped to +- a_max; R = (a / a_max) / 2 + 1/2. Where all n rewards are
    equal a is 0. (Told by the rewards themselves: rounding gives equal ones a standard deviation that isn't quite 0.)
    """
    spread = reward.amax(-1, keepdim=True) > reward.amin(-1, keepdim=True)
    a = (reward - reward.mean(-1, keepdim=True)) / reward.std(-1, keepdim=True, correction=0)
    return a.where(spread, 0).clamp(-a_max, a_max) / a_max / 2 + 0.5


def implicit_reward(f, f_old, y, adaptive=True):
    """r = -( |f - y|^2 / w - |f_old - y|^2 / w_old ), (B, C, h, w) each, to (B,); differentiable in f alone.

    |.|^2 is a mean over elements; w is the mean absolute error of that picture, detached and at least 1e-5, or 1.
    """
    def weighted(f):
        w = (f - y).abs().flatten(1).mean(1).detach().clamp_min(1e-5) if adaptive else 1
        return squared_error(f, y) / w

    return weighted(f_old).detach() - weighted(f)


def crd_loss(r, R, beta=1.0, a_max=5.0, form="square", temperature=None):
    """mean_i ( beta (r_i - mean_j r_j) - (R_i - mean_j R_j) )^2 a_max / beta, without gradient through mean_j.

    r: (..., n) implicit rewards of the pictures of one prompt; R: (..., n) from `scaled_advantage`. Returns (...,).
    form "bce" puts BCE(beta (r_i - mean_j r_j), sigmoid(R_i - mean_j R_j)), the first in logits, in the square's place.
    With a temperature T the loss is half one with means weighted by softmax(a / T), half one by softmax(-a / T).
    """
    r_fixed, a = r.detach(), (2 * R - 1) * a_max
    weights = [torch.full_like(R, 1 / R.shape[-1])]
    if temperature is not None:
        weights = [(a / temperature).softmax(-1), (-a / temperature).softmax(-1)]
    loss = 0
    for w in weights:
        predicted = beta * (r - (w * r_fixed).sum(-1, keepdim=True))
        wanted = R - (w * R).sum(-1, keepdim=True)
        loss = loss + ((predicted - wanted).square() if form == "square" else
                       F.binary_cross_entropy_with_logits(predicted, wanted.sigmoid(), reduction="none")).mean(-1)
    return loss / len(weights) * a_max / beta


def anchor_loss(f, f_ref, R, kl, by_reward=True):
    """kl mean_i ( m + R_i (1 - m) ) |f - f_ref|^2 with m = 1e-4 / kl, or, not by reward, kl mean_i |f - f_ref|^2.

    f, f_ref: (n, C, h, w); R: (n,) in [0, 1]; kl: positive. |.|^2 is a mean over elements. Returns a scalar.
    """
    m = min(1.0, 1e-4 / kl) if by_reward else 1.0
    return kl * ((m + R * (1 - m)) * squared_error(f, f_ref.detach())).mean()


def old_decay(epoch):
    """d of the OLD copy after epoch 0, 1, ...: copy = d copy + (1 - d) current."""
    return min(0.25 + 0.005 * epoch, 0.999)


def sampling_decay(epoch):
    """d of the SAMPLING copy: the current adapter itself up to epoch 75, from then on ever slower."""
    return min(max(0.0, 0.0075 * (epoch - 75)), 0.999)


# ---- Training ------------------------------------------------------------------------------------------------------

def train(config):
    """Epochs of draw, score and regress. Raises UserError, then RunStopped."""
    check(config)
    run = rsaft.Run(config, differentiable=False)
    unet, n, device = run.pipe.unet, config.group_size, run.device
    alphas = run.pipe.scheduler.alphas_cumprod.sqrt().tolist()
    prediction_type, embed = run.pipe.scheduler.config.prediction_type, rsaft.make_embed(run.pipe)
    params = rsaft.add_lora(unet, config.rank, named_generator(config.seed, "lora"))
    old, sampling = ([p.detach().clone() for p in params] for _ in range(2))
    latents = torch.zeros(config.batch_size // n, n, *run.latent_shape, device=device)      # of the epoch's pictures
    rewards = torch.zeros(config.batch_size // n, n, device=device)
    optimizer = torch.optim.AdamW(params, lr=config.learning_rate, weight_decay=config.weight_decay)

    @torch.no_grad()
    def draw_and_score(prompts, epoch):
        repeated, pictures, scores = [prompt for prompt in prompts for _ in range(n)], [], []
        with holding(params, old if config.sampler == "old" else sampling):
            for batch in rsaft.micro_batches(repeated, (config.seed, "epoch", epoch), run.micro_batch_size, device):
                images, end = run.generate(batch, plan=rsaft.Plan((False,) * config.sampling_steps))
                pictures.append(end)                         # no step has a gradient: the last latents
                scores.append(run.reward(images, batch.prompts))
        latents.copy_(torch.cat(pictures).view_as(latents))
        rewards.copy_(torch.cat(scores).view_as(rewards))

    def move_copies(*_):                                     # with the update itself, so that no crash parts the two
        epochs, updates = divmod(int(optimizer.state[params[0]]["step"]), config.epoch_updates)
        if updates == 0:
            update_average(old, params, old_decay(epochs - 1))
            update_average(sampling, params, sampling_decay(epochs - 1))

    optimizer.register_step_post_hook(move_copies)

    def gradient(step):
        epoch, update = divmod(step, config.epoch_updates)
        prompts = rsaft.training_prompts(run.prompts, config.seed, epoch, config.batch_size // n)
        if update == 0:
            draw_and_score(prompts, epoch)
        optimizer.zero_grad()
        log = defaultdict(float, {"epoch": epoch, "reward": rewards.mean().item()})
        advantages = scaled_advantage(rewards, config.max_advantage)
        for number, (prompt, x0, R) in enumerate(zip(prompts, latents, advantages)):
            rng = named_generator(config.seed, step, number, "regression")
            t = rsaft.draw(rng, len(alphas) // 100, len(alphas) - 1)   # one t for the group, of the noisiest 99 percent
            noise = torch.randn(x0.shape, generator=rng).to(device)
            x, y = forward_process(x0, noise, alphas[t], (1 - alphas[t] ** 2) ** 0.5, prediction_type)
            embeds, empty = embed([prompt] * n), embed([""] * n)
            denoise = rsaft.make_denoise(unet, embeds, empty, guidance_scale=1)
            with torch.no_grad(), holding(params, old):
                f_old = denoise(x, t)
            f = denoise(x, t)
            r = implicit_reward(f, f_old, y, config.error_weight == "adaptive")
            regression, anchor = crd_loss(r, R, config.beta, config.max_advantage, config.loss, config.temperature), 0
            if config.kl > 0:
                with torch.no_grad(), rsaft.lora_scale(unet, 0):
                    f_ref = rsaft.make_denoise(unet, embeds, empty, config.anchor_scale)(x, t)
                anchor = anchor_loss(f, f_ref, R, config.kl, config.anchor_weight == "reward")
                log["anchor"] += anchor.item() / len(prompts)
            log["regression"] += regression.item() / len(prompts)
            ((regression + anchor) / len(prompts)).backward()
        return log

    free = 1 + (config.kl > 0) * (1 + (config.anchor_scale > 1))
    drawn = config.sampling_steps * (1 + (config.guidance_scale > 1))
    print(f"{device}, {config.dtype}, {sum(p.numel() for p in params):,} trained parameters; an update takes "
          f"{config.batch_size * free} network evaluations without gradient and {config.batch_size} with, and every "
          f"{config.epoch_updates} updates {config.batch_size * drawn} without go into new pictures")
    run.fit(optimizer, gradient, copies=[*old, *sampling, latents, rewards])


main = functools.partial(rsaft.main, train=train, kind=Config, tiny=TINY)

if __name__ == "__main__":
    sys.exit(main())
