"""CRD: Centered Reward Distillation, online tuning of text-to-image models without the reward's gradient.

The method of arXiv 2603.14128, from its published description; "port" is what its first author published as
code: X-GenGroup/Flow-Factory, trainers/crd.py, pull request 121. Maximising a reward R under a KL penalty
makes R equal to the implicit reward plus a constant of the prompt that can't be computed; subtracting the
mean over the n pictures of one prompt removes it. So the two centred quantities are matched by regression. R
may be a black box, and no gradient goes through the sampler: a finished picture is noised to x_t, and y is
what the network should answer, e.g. the noise.

    r_i  = -( |f_theta - y|^2 / w_theta  -  |f_old - y|^2 / w_old )        w: the mean absolute error, or 1
    loss = mean_i ( beta (r_i - mean_j r_j) - (R_i - mean_j R_j) )^2 a_max / beta
           + kl mean_i ( m + R_i (1 - m) ) |f_theta - f_ref|^2      m = 1e-4 / kl;  no gradient through mean_j

R_i is the reward's advantage over its prompt's mean, scaled to [0, 1]. An epoch draws pictures, scores them,
and regresses. Three guards keep the model from drifting, each with a flag that turns it off:

    1. pictures come from a SAMPLING copy of the adapter, r is against an OLD copy    --sampler old
    2. the anchor f_ref is the frozen model WITH guidance, the tuned one runs without --anchor-scale 1
    3. the anchor holds fast where the reward is high, and weakly where it is low     --anchor-weight constant

The defaults are the paper's or the port's where --help doesn't call them ours; README.md has all of them.
Models, sampling, LoRA, rewards, evaluation and the training loop are rsaft.py's. Try it:

    python related/crd.py --tiny --reward pickscore
    python related/crd.py --tiny --reward tiny/world.py:oracle_accuracy
"""
import copy
import functools
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # rsaft.py lies one folder up
import rsaft
from gdro import (check_alone, forward_process, holding, noise_levels, own_scale, squared_error,
                  update_average)
from rsaft import AMOUNT, AMOUNT_OR_0, COUNT, UserError, explained, named_generator


# ---- The method: tensors in, tensors out -------------------------------------------------------------------

def scaled_advantage(reward, a_max=5.0, std="epoch"):
    """R: the rewards of an epoch, (..., n) with n pictures a prompt, as advantages in [0, 1], same shape.

    a = (reward - the prompt's mean) / standard deviation, of all rewards or (std "prompt") of the prompt's,
    clipped to +- a_max; R = (a / a_max) / 2 + 1/2. Where a prompt's n rewards are equal a is 0. (Told by the
    rewards themselves: rounding gives equal ones a standard deviation that isn't quite 0.)
    """
    spread = reward.amax(-1, keepdim=True) > reward.amin(-1, keepdim=True)
    deviation = reward.std(None if std == "epoch" else -1, keepdim=True, correction=0)
    a = (reward - reward.mean(-1, keepdim=True)) / deviation
    return a.where(spread, 0).clamp(-a_max, a_max) / a_max / 2 + 0.5


def implicit_reward(f, f_old, y, adaptive=True):
    """r = -( |f - y|^2 / w - |f_old - y|^2 / w_old ), (B, C, h, w) each, to (B,); differentiable in f alone.

    |.|^2 is a mean over elements; w is 1, or the picture's mean absolute error, detached and at least 1e-5.
    """
    def weighted(f):
        w = (f - y).abs().flatten(1).mean(1).detach().clamp_min(1e-5) if adaptive else 1
        return squared_error(f, y) / w

    return weighted(f_old).detach() - weighted(f)


def crd_loss(r, R, beta=1.0, a_max=5.0, form="square", temperature=None):
    """mean_i ( beta (r_i - mean_j r_j) - (R_i - mean_j R_j) )^2 a_max / beta; no gradient through mean_j.

    r: (..., n) implicit rewards of the pictures of one prompt; R: (..., n) from `scaled_advantage`. Returns
    (...,). form "bce" puts BCE(beta (r_i - mean_j r_j), sigmoid(R_i - mean_j R_j)), the first in logits, in
    the square's place. With a temperature T the loss is half one with means weighted by softmax(a / T), half
    one by softmax(-a / T).
    """
    r_fixed, a = r.detach(), (2 * R - 1) * a_max
    weights = [torch.full_like(R, 1 / R.shape[-1])]
    if temperature is not None:
        weights = [(a / temperature).softmax(-1), (-a / temperature).softmax(-1)]
    loss = 0
    for w in weights:
        predicted = beta * (r - (w * r_fixed).sum(-1, keepdim=True))
        wanted = R - (w * R).sum(-1, keepdim=True)
        if form == "square":
            each = (predicted - wanted).square()
        else:
            each = F.binary_cross_entropy_with_logits(predicted, wanted.sigmoid(), reduction="none")
        loss = loss + each.mean(-1)
    return loss / len(weights) * a_max / beta


def anchor_loss(f, f_ref, R, kl, by_reward=True):
    """kl mean_i ( m + R_i (1 - m) ) |f - f_ref|^2 with m = 1e-4 / kl; not by reward m is 1.

    f, f_ref: (n, C, h, w); R: (n,) in [0, 1]; kl: positive. |.|^2 is a mean over elements. Returns a scalar.
    """
    m = min(1.0, 1e-4 / kl) if by_reward else 1.0
    return kl * ((m + R * (1 - m)) * squared_error(f, f_ref.detach())).mean()


def decay(step, start, offset, slope, ceiling):
    """d of a copy after `step` optimizer steps, copy = d copy + (1 - d) current: a ramp from `start` on."""
    return min(offset + slope * max(0, step - start), ceiling)


def strata(count, positions, rng):
    """`count` of the numbers 0, 1, ... positions - 1, ascending, a list: one drawn from each equal stratum.

    Number i is a uniform real from [i, i + 1) positions / count, rounded down: it repeats if count is larger.
    """
    places = torch.arange(count) + torch.rand(count, generator=rng, dtype=torch.float64)
    return (places * positions / count).long().clamp_max(positions - 1).tolist()    # it may round up


# ---- Training ----------------------------------------------------------------------------------------------

def check(settings):
    """gdro.check_alone, and what is CRD's own; raises UserError."""
    if settings.group_size < 2 or settings.batch_size % settings.group_size:
        raise UserError(f"--group-size must be at least 2 and divide --batch-size {settings.batch_size}, not "
                        f"{settings.group_size}")
    if not settings.reward:
        raise UserError("--reward needs a name")
    if max(settings.ema_decay, settings.old_decay[-1], settings.sampling_decay[-1]) >= 1:
        raise UserError("--ema-decay and the ceilings of --old-decay and --sampling-decay must be below 1: a "
                        "copy would stand still")
    settings = check_alone(settings)
    if settings.sampling_steps < 2:
        raise UserError("--sampling-steps must be at least 2: no picture is noised to the last one's level")
    return settings


def train(settings):
    """Epochs of draw, score and regress. Raises UserError, then RunStopped."""
    settings, n = check(settings), settings.group_size
    model, scores, prompts, evaluation = rsaft.load(settings, must_have_gradient=False)
    groups, steps, prediction_type = settings.batch_size // n, model.steps, noise_levels(model)[1]
    sampling_plan = rsaft.Plan((False,) * len(steps))
    with explained("--eval-sampling-steps won't do"):
        model.steps = model.step_table(settings.eval_sampling_steps)
    # As in gdro.py the network's own adapter is the average, which is evaluated and saved; what is trained are
    # copies of its tensors. B is 0 in the reference, so it is the frozen model.
    average = model.add_adapter(settings.rank, named_generator(settings.seed, "lora"))
    reference, old, sampling = ([p.detach().clone() for p in average] for _ in range(3))
    params = [nn.Parameter(p.detach().clone()) for p in average]
    latents = torch.zeros(groups, n, *model.latent_shape, device=model.device)    # of the epoch's pictures
    rewards = torch.zeros(groups, n, device=model.device)
    optimizer = torch.optim.AdamW(params, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    @torch.no_grad()
    def draw_and_score(prompts, epoch):
        sampler = copy.copy(model)    # the same network, with the steps of training
        sampler.steps = steps
        repeated = [prompt for prompt in prompts for _ in range(n)]
        batches = rsaft.micro_batches(repeated, (settings.seed, "epoch", epoch), settings.micro_batch_size)
        with holding(average, old if settings.sampler == "old" else sampling):
            ends = rsaft.sample_starts(sampler, sampling_plan, batches, settings.sampling_batch_size)
        pictures = [rsaft.sample_images(sampler, sampling_plan, *pair) for pair in zip(batches, ends)]
        latents.copy_(torch.cat(ends).view_as(latents))        # no step has a gradient: the last ones
        scored = [scores.total(images, prompts) for images, prompts in pictures]
        rewards.copy_(torch.cat(scored).view_as(rewards))

    noised, parts = settings.batch_size * settings.noise_levels, groups * settings.noise_levels
    free = 1 + (model.branches_at(settings.anchor_scale) if settings.kl > 0 else 0)
    drawing = settings.batch_size * len(steps) * model.branches
    print(f"{sum(p.numel() for p in params):,} trained parameters; an update takes {noised * free} network "
          f"evaluations without gradient, {noised} with; every {settings.epoch_updates} updates {drawing} "
          "without go into new pictures")

    state = [*params, *old, *sampling, latents, rewards]
    with rsaft.Run(settings, model.adapter(), optimizer, evaluation, extra_state=state) as run:
        for step in run.steps():
            epoch, update = divmod(step, settings.epoch_updates)
            chosen = rsaft.training_prompts(prompts, settings.seed, epoch, groups)
            if update == 0:
                draw_and_score(chosen, epoch)
            log = defaultdict(float, {"epoch": epoch, "reward": rewards.mean().item()})
            advantages = scaled_advantage(rewards, settings.max_advantage, settings.advantage_std)
            for number, (prompt, x0, R) in enumerate(zip(chosen, latents, advantages)):
                rng = named_generator(settings.seed, step, number, "regression")
                denoise = model.denoiser([prompt] * n, own_scale(model))
                # The group shares its levels: so like is compared with like. The least noisy is left out.
                for level in strata(settings.noise_levels, len(steps) - 1, rng):
                    t, alpha, sigma = steps[level].t, steps[level].alpha, steps[level].sigma
                    noise = torch.randn(x0.shape, generator=rng).to(model.device)
                    x, y = forward_process(x0, noise, alpha, sigma, prediction_type)
                    with torch.no_grad(), holding(average, old):
                        f_old = denoise(x, t)
                    if settings.kl > 0:
                        with torch.no_grad(), holding(average, reference):
                            f_ref = model.denoiser([prompt] * n, settings.anchor_scale)(x, t)
                    with holding(average, params):
                        f = denoise(x, t)
                        r = implicit_reward(f, f_old, y, settings.error_weight == "adaptive")
                        loss = crd_loss(r, R, settings.beta, settings.max_advantage, settings.loss,
                                        settings.temperature)
                        log["regression"] += loss.item() / parts
                        if settings.kl > 0:
                            anchor = anchor_loss(f, f_ref, R, settings.kl, settings.anchor_weight == "reward")
                            log["anchor"] += anchor.item() / parts
                            loss = loss + anchor
                        (loss / parts).backward()    # level by level: so memory doesn't grow with them
            for p, own in zip(params, average):
                p.grad, own.grad = own.grad, None
            grad_norm = nn.utils.clip_grad_norm_(params, settings.max_grad_norm)
            optimizer.step()
            update_average(average, params, min(settings.ema_decay, (step + 1) / (10 + step)))
            if update == settings.epoch_updates - 1:
                update_average(old, params, decay(step + 1, *settings.old_decay))
                update_average(sampling, params, decay(step + 1, *settings.sampling_decay))
            run.record(**log, grad_norm=grad_norm.item())


# ---- Flags -------------------------------------------------------------------------------------------------

TINY = {**rsaft.TINY, "guidance_scale": 1.0, "group_size": 12, "batch_size": 48, "noise_levels": 2,
        "eval_sampling_steps": 10, "train_steps": 150, "eval_every": 30}  # chosen on seed 1
DECAY = rsaft.number(float, 0, 1e6, nargs=4, metavar=("START", "OFFSET", "SLOPE", "CEILING"))


def parse(argv=None):
    """The settings of the command line, an argparse.Namespace. Raises UserError."""
    parser = rsaft.Parser("related/crd.py", "Centered Reward Distillation of text-to-image diffusion models. "
                          "The method's defaults, and batch size, learning rate, rank and sampling steps (10), "
                          "are the paper's or its author's port's, but for what is ours; further down 'paper' "
                          "is RSA-FT's.")
    parser.flags("method", [
        ("--group-size", 24, "n, pictures of a prompt", COUNT),
        ("--epoch-updates", 2, "updates on the --batch-size pictures of an epoch; ours: each on all of them",
         COUNT),
        ("--noise-levels", 20, "of each picture in an update, drawn from the sampling steps in strata", COUNT),
        ("--beta", 1.0, "strength of the implicit reward", AMOUNT),
        ("--max-advantage", 5.0, "a_max: advantages are clipped to +- this many standard deviations", AMOUNT),
        ("--advantage-std", "epoch", "standard deviation over the epoch or the prompt; the mean is always the "
         "prompt's", {"choices": ("epoch", "prompt")}),
        ("--error-weight", "adaptive", "w: each picture's mean absolute error, or 1",
         {"choices": ("adaptive", "one")}),
        ("--loss", "square", "square, or binary cross entropy with sigmoid(centred R)",
         {"choices": ("square", "bce")}),
        ("--temperature", None, "centre at means weighted by softmax(+-advantage / T), where T is 10 times the "
         "port's, which divides R; without the flag plain means", AMOUNT),
        ("--sampler", "own", "guard 1: draw with a copy of the adapter of its own, or with the old one",
         {"choices": ("own", "old")}),
        ("--old-decay", [0, 0.25, 0.005, 0.999], "of the old copy, moved after each epoch, in optimizer steps; "
         "the original has 0 0.25 0.001 0.5 too", DECAY),
        ("--sampling-decay", [75, 0, 0.0075, 0.999], "of the sampling copy; also 0 0 0.001 0.5", DECAY),
        ("--ema-decay", 0.995, "of the average of the weights, which is evaluated and saved", AMOUNT_OR_0),
        ("--kl", 0.1, "strength of the anchor; 0: none", AMOUNT_OR_0),
        ("--anchor-scale", 4.5, "guard 2: guidance of the anchor, the frozen model; 1 turns it off",
         AMOUNT_OR_0),
        ("--anchor-weight", "reward", "guard 3: the anchor's strength follows the reward, or is constant",
         {"choices": ("reward", "constant")}),
        ("--eval-sampling-steps", 40, "steps of a rollout in evaluation", COUNT)])
    rsaft.add_common_flags(parser)
    parser.set_defaults(guidance_scale=1.0, batch_size=1152, learning_rate=3e-4, rank=32, sampling_steps=10)
    return rsaft.parse_with(parser, argv, TINY)


main = functools.partial(rsaft.main, parse=parse, train=train, program="related/crd.py")

if __name__ == "__main__":
    sys.exit(main())
