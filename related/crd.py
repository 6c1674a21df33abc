"""CRD: Centered Reward Distillation, online tuning of text-to-image models without the reward's gradient.

The method of arXiv 2603.14128; "port" is X-GenGroup/Flow-Factory, trainers/crd.py, pull request 121, by its
first author. Maximising a reward R under a KL penalty makes R equal to the implicit reward plus a constant of
the prompt that can't be computed; subtracting the mean over the prompt's n pictures removes it. So the two
centred quantities are matched by regression. R may be a black box, and no gradient goes through the sampler:
a finished picture is noised to x_t, and y is what the network should answer, e.g. the noise.

    r_i  = -( |f_theta - y|^2 / w_theta  -  |f_old - y|^2 / w_old )        w: the mean absolute error, or 1
    loss = mean_i ( beta (r_i - mean_j r_j) - (R_i - mean_j R_j) )^2 a_max / beta
           + kl mean_i ( m + R_i (1 - m) ) |f_theta - f_ref|^2      m = 1e-4 / kl;  no gradient through mean_j

R_i is the reward's advantage over its prompt's mean, in [0, 1]. An epoch draws pictures, scores them, and
regresses. Three guards keep the model from drifting, each with a flag that turns it off:

    1. pictures come from a SAMPLING copy of the adapter, r is against an OLD copy    --sampler old
    2. the anchor f_ref is the frozen model WITH guidance, the tuned one runs without --anchor-scale 1
    3. the anchor holds fast where the reward is high, and weakly where it is low     --anchor-weight constant

Defaults are the paper's or the port's but for what --help calls ours. All else is rsaft.py's. Try it:

    python related/crd.py --tiny --reward pickscore
    python related/crd.py --tiny --reward tiny/world.py:oracle_accuracy
"""
import copy
import functools
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # rsaft.py lies one folder up
import rsaft
from gdro import (COMBINATIONS, COMBINE, advantage, check_alone, forward_process, holding, noise_levels,
                  own_scale, squared_error, step_copies, update_average, weighted_sum)
from scored import each_reward
from rsaft import AMOUNT, AMOUNT_OR_0, COUNT, UserError, explained, named_generator


# ---- The method: tensors in, tensors out -------------------------------------------------------------------

def scaled_advantage(reward, a_max=5.0, std="epoch"):
    """R: the rewards of an epoch, (..., n) with n pictures a prompt, as advantages in [0, 1], of that shape.

    a = (reward - the prompt's mean) / standard deviation, of all rewards or (std "prompt") of the prompt's,
    clipped to +- a_max; R = (a / a_max) / 2 + 1/2. Where a prompt's n rewards are equal a is 0.
    """
    a = advantage(reward, whole=std == "epoch")
    return a.clamp(-a_max, a_max) / a_max / 2 + 0.5


def implicit_reward(f, f_old, y, adaptive=True):
    """r = -( |f - y|^2 / w - |f_old - y|^2 / w_old ), (B, C, h, w) each, to (B,); differentiable in f alone.

    |.|^2 is a mean over elements; w is 1, or the picture's mean absolute error, detached and at least 1e-5.
    """
    w, w_old = ((g - y).abs().flatten(1).mean(1).detach().clamp_min(1e-5) if adaptive else 1
                for g in (f, f_old))
    return (squared_error(f_old, y) / w_old).detach() - squared_error(f, y) / w


def crd_loss(r, R, beta=1.0, a_max=5.0, form="square", temperature=math.inf):
    """mean_i ( beta (r_i - mean_j r_j) - (R_i - mean_j R_j) )^2 a_max / beta; no gradient through mean_j.

    r: (..., n) implicit rewards of a prompt's pictures; R: (..., n) from `scaled_advantage`. Returns (...,).
    form "bce" puts BCE(beta (r_i - mean_j r_j), sigmoid(R_i - mean_j R_j)), the first in logits, in the
    square's place. With a temperature T half the loss has means weighted by softmax(a / T), half by -a / T.
    """
    a, loss = (2 * R - 1) * a_max, 0
    for w in (a / temperature).softmax(-1), (-a / temperature).softmax(-1):
        predicted = beta * (r - (w * r.detach()).sum(-1, keepdim=True))
        wanted = R - (w * R).sum(-1, keepdim=True)
        each = (predicted - wanted).square()
        if form == "bce":
            each = nn.BCEWithLogitsLoss(reduction="none")(predicted, wanted.sigmoid())
        loss = loss + each.mean(-1) / 2
    return loss * a_max / beta


def anchor_loss(f, f_ref, R, kl, by_reward=True):
    """kl mean_i ( m + R_i (1 - m) ) |f - f_ref|^2 with m = 1e-4 / kl; not by reward m is 1.

    f, f_ref: (n, C, h, w); R: (n,) in [0, 1]; kl: positive. |.|^2 is a mean over elements. Returns a scalar.
    """
    m = min(1.0, 1e-4 / kl) if by_reward else 1.0
    return kl * ((m + R * (1 - m)) * squared_error(f, f_ref.detach())).mean()


def decay(step, start, offset, slope, ceiling):
    """d of a copy after `step` optimizer steps, copy = d copy + (1 - d) current: a ramp from `start` on."""
    return min(offset + slope * max(0, step - start), ceiling)


def stratum(i, count, positions, rng):
    """One of 0, 1, ... positions - 1: a uniform real of [i, i + 1) positions / count, rounded down."""
    return min(math.floor((i + torch.rand((), generator=rng).item()) * positions / count), positions - 1)


# ---- Training ----------------------------------------------------------------------------------------------

def check(settings):
    """gdro.check_alone, and what is CRD's own; raises UserError."""
    if settings.group_size < 2 or settings.batch_size % settings.group_size:
        raise UserError(f"--group-size must be at least 2 and divide --batch-size {settings.batch_size}")
    if not settings.reward:
        raise UserError("--reward needs a name")
    if max(settings.old_decay[-1], settings.sampling_decay[-1]) > 1:
        raise UserError("--old-decay and --sampling-decay need ceilings of at most 1")
    return check_alone(settings)


def train(settings):
    """Epochs of draw, score and regress. Raises UserError, then RunStopped."""
    settings, n = check(settings), settings.group_size
    model, scores, prompts, evaluation = rsaft.load(settings, must_have_gradient=False)
    groups, steps, prediction_type = settings.batch_size // n, model.steps, noise_levels(model)[1]
    with explained("--eval-sampling-steps won't do"):
        model.steps = model.step_table(settings.eval_sampling_steps)
    # The network's own adapter is the average, as in gdro.py; where LoRA's B is 0 it is the frozen model.
    average = model.add_adapter(settings.rank, named_generator(settings.seed, "lora"))
    reference, old, sampling = ([p.detach().clone() for p in average] for _ in range(3))
    params = [nn.Parameter(p.detach().clone()) for p in average]
    latents = torch.zeros(groups, n, *model.latent_shape, device=model.device)    # of the epoch's pictures
    rewards = torch.zeros(len(scores.weights), groups, n, device=model.device)
    optimizer = torch.optim.AdamW(params, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    @torch.no_grad()
    def draw_and_score(prompts, epoch):
        sampler, plan = copy.copy(model), rsaft.Plan((False,) * len(steps))
        sampler.steps = steps          # the model's own are those of the evaluation
        batches = rsaft.micro_batches(prompts, (settings.seed, "epoch", epoch), settings.micro_batch_size)
        with holding(average, old if settings.sampler == "old" else sampling):
            ends = rsaft.sample_starts(sampler, plan, batches, settings.sampling_batch_size)
        latents.copy_(torch.cat(ends).view_as(latents))        # finished, as no step is kept for a gradient
        scored = [each_reward(scores, model.decode(end), batch.prompts) for end, batch in zip(ends, batches)]
        rewards.copy_(torch.cat(scored, 1).view_as(rewards))

    parts = groups * settings.noise_levels          # of an update's loss: one group at one level each
    free = 1 + (model.branches_at(settings.anchor_scale) if settings.kl > 0 else 0)
    print(f"{sum(p.numel() for p in params):,} trained parameters; an update takes {parts * n * free} "
          f"evaluations of the network without gradient, {parts * n} with, and an epoch its drawing")

    state = [*params, *old, *sampling, latents, rewards]
    with rsaft.Run(settings, model.adapter(), optimizer, evaluation, extra_state=state) as run:
        for step in run.steps():
            epoch, update = divmod(step, settings.epoch_updates)
            chosen = rsaft.training_prompts(prompts, settings.seed, epoch, groups)
            if update == 0:
                draw_and_score([prompt for prompt in chosen for _ in range(n)], epoch)
            total = weighted_sum(rewards, scores.weights.values())
            combined = COMBINATIONS[settings.combine](rewards, scores.weights.values())
            log = defaultdict(float, {"epoch": epoch, "reward": total.mean().item()})
            advantages = scaled_advantage(combined, settings.max_advantage, settings.advantage_std)
            for part in range(parts):    # one backward each: so memory doesn't grow with the levels
                number, i = divmod(part, settings.noise_levels)
                prompt, x0, R = chosen[number], latents[number], advantages[number]
                rng = named_generator(settings.seed, step, number, i, "regression")
                # One level for the group, so like is compared with like; the least noisy is never drawn.
                level = steps[stratum(i, settings.noise_levels, max(1, len(steps) - 1), rng)]
                noise = torch.randn(x0.shape, generator=rng).to(model.device)
                x, y = forward_process(x0, noise, level.alpha, level.sigma, prediction_type)
                denoise = model.denoiser([prompt] * n, own_scale(model))
                with torch.no_grad(), holding(average, old):
                    f_old = denoise(x, level.t)
                if settings.kl > 0:
                    with torch.no_grad(), holding(average, reference):
                        f_ref = model.denoiser([prompt] * n, settings.anchor_scale)(x, level.t)
                with holding(average, params):
                    f = denoise(x, level.t)
                    r = implicit_reward(f, f_old, y, settings.error_weight == "adaptive")
                    loss = {"regression": crd_loss(r, R, settings.beta, settings.max_advantage, settings.loss,
                                                   settings.temperature or math.inf)}
                    if settings.kl > 0:
                        by_reward = settings.anchor_weight == "reward"
                        loss["anchor"] = anchor_loss(f, f_ref, R, settings.kl, by_reward)
                    (sum(loss.values()) / parts).backward()
                for name, value in loss.items():
                    log[name] += value.item() / parts
            grad_norm = step_copies(optimizer, params, average, step, settings.ema_decay,
                                    settings.max_grad_norm)
            if update == settings.epoch_updates - 1:
                update_average(old, params, decay(step + 1, *settings.old_decay))
                update_average(sampling, params, decay(step + 1, *settings.sampling_decay))
            run.record(**log, grad_norm=grad_norm)


# ---- Flags -------------------------------------------------------------------------------------------------

TINY = {**rsaft.TINY, "guidance_scale": 1.0, "group_size": 12, "batch_size": 48, "learning_rate": 4e-3,
        "noise_levels": 2, "eval_sampling_steps": 10, "train_steps": 150, "eval_every": 30}  # from seed 1
DECAY = rsaft.number(float, 0, 1e6, nargs=4, metavar=("START", "OFFSET", "SLOPE", "CEILING"))


def parse(argv=None):
    """The settings of the command line, an argparse.Namespace. Raises UserError."""
    parser = rsaft.Parser("related/crd.py", "Centered Reward Distillation of text-to-image diffusion models.")
    parser.flags("method (defaults: the paper's or the port's, but for what is ours)", [
        ("--group-size", 24, "n, pictures of a prompt", COUNT),
        COMBINE,
        ("--epoch-updates", 2, "updates on an epoch's --batch-size pictures; ours: each on all", COUNT),
        ("--noise-levels", 20, "of a picture in an update, from the sampling steps, in strata", COUNT),
        ("--beta", 1.0, "strength of the implicit reward", AMOUNT),
        ("--max-advantage", 5.0, "a_max: advantages are clipped to +- this many standard deviations", AMOUNT),
        ("--advantage-std", "epoch", "whose deviations these are", {"choices": ("epoch", "prompt")}),
        ("--error-weight", "adaptive", "w: the mean absolute error, or 1", {"choices": ("adaptive", "one")}),
        ("--loss", "square", "or binary cross entropy, see crd_loss", {"choices": ("square", "bce")}),
        ("--temperature", None, "T, see crd_loss; ten times the port's, as that divides R", AMOUNT),
        ("--sampler", "own", "guard 1: the copy that draws the pictures", {"choices": ("own", "old")}),
        ("--old-decay", [0, 0.25, 0.005, 0.999], "by updates; the original also has 0 0.25 0.001 0.5", DECAY),
        ("--sampling-decay", [75, 0, 0.0075, 0.999], "the same of guard 1's own; also 0 0 0.001 0.5", DECAY),
        ("--ema-decay", 0.995, "of the average, which is evaluated, saved", rsaft.number(float, 0, 0.9999)),
        ("--kl", 0.1, "strength of the anchor; 0: none", AMOUNT_OR_0),
        ("--anchor-scale", 4.5, "guard 2: guidance of the frozen model; 1 turns it off", AMOUNT_OR_0),
        ("--anchor-weight", "reward", "guard 3: what its strength is", {"choices": ("reward", "constant")}),
        ("--eval-sampling-steps", 40, "steps of a rollout in evaluation; in training 10, see below", COUNT)])
    rsaft.add_common_flags(parser)
    parser.set_defaults(guidance_scale=1.0, batch_size=1152, learning_rate=3e-4, rank=32, sampling_steps=10)
    return rsaft.parse_with(parser, argv, TINY)


main = functools.partial(rsaft.main, parse=parse, train=train, program="related/crd.py")

if __name__ == "__main__":
    sys.exit(main())
