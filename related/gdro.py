"""GDRO: Group-level Direct Reward Optimization of text-to-image diffusion models.

The method of arXiv 2601.02036 (CVPR 2026), from its published description. The reward is never
differentiated, so it may be a black box, and nothing is sampled in training: k pictures of a prompt, drawn
and scored beforehand, are noised to the same t, and the model is tuned until its implicit reward
(Diffusion-DPO, arXiv 2311.12908) ranks them as r does:

    s_i = -beta ( |y - f_theta(x_t, t, c)|^2 - |y - f_ref(x_t, t, c)|^2 )   y: f's target, e.g. the noise

    L = sum_{i<k} [ log sum_{m>=i} exp s_m - sum_{j>=i} q_i(j) s_j ]  +  gamma |y - f_theta|^2 of picture 1

with r_1 >= ... >= r_k and q_i(j) = softmax over j >= i of r_j / tau: a Plackett-Luce ranking with soft
targets. The last term keeps the likelihood of the best picture from falling while the ranking improves. |.|^2
is a mean over elements, so that beta doesn't depend on the resolution. tau was published for r in [0, 1]; a
reward of another scale is divided by the widest range that it has over the pictures of one prompt.

Models, sampling, LoRA, rewards, evaluation and the training loop are rsaft.py's. Try it, in one go, or in
two, of which the second takes any folder of scored pictures:

    python related/gdro.py --tiny --reward pickscore
    python related/gdro.py --tiny --reward tiny/world.py:oracle_accuracy --data runs/scored --draw
    python related/gdro.py --tiny --reward tiny/world.py:oracle_accuracy --data runs/scored --train
"""
import contextlib
import functools
import os
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # rsaft.py lies one folder up
import rsaft
import scored
from rsaft import AMOUNT, AMOUNT_OR_0, COUNT, SWITCH, RunStopped, UserError, named_generator


# ---- The method: tensors in, tensors out -------------------------------------------------------------------

def forward_process(x0, noise, alpha, sigma, prediction_type):
    """A noised picture x_t = alpha x0 + sigma noise, and the y that the network should answer with.

    x0, noise: latents, (B, C, h, w); alpha, sigma: numbers or tensors that broadcast. y = p x0 + q noise with

        prediction_type   p       q
        epsilon           0       1       the noise
        v_prediction     -sigma   alpha   the velocity on the circle alpha^2 + sigma^2 = 1 (arXiv 2202.00512)
        flow             -1       1       the velocity on the line alpha + sigma = 1 (arXiv 2210.02747)

    Returns x_t and y, both (B, C, h, w). Raises KeyError for another prediction_type.
    """
    p, q = {"epsilon": (0, 1), "v_prediction": (-sigma, alpha), "flow": (-1, 1)}[prediction_type]
    return alpha * x0 + sigma * noise, p * x0 + q * noise


def noise_levels(model):
    """What a picture can be noised to, a list of (t, alpha, sigma), the least noisy first; prediction_type.

    model: an rsaft.Backbone. They are all of the scheduler's timesteps; with flow matching the sampler's own
    steps, as it shifts them.
    """
    scheduler = model.pipe.scheduler
    if hasattr(scheduler, "alphas_cumprod"):
        alphas = scheduler.alphas_cumprod.sqrt().tolist()
        levels = [(t, alpha, (1 - alpha ** 2) ** 0.5) for t, alpha in enumerate(alphas)]
        return levels, scheduler.config.prediction_type
    return [(step.t, step.alpha, step.sigma) for step in reversed(model.steps)], "flow"


def own_scale(model):
    """The guidance at which a network is regressed: none, or the run's where guidance is its input."""
    return model.guidance_scale if model.guidance_is_input else 1


def squared_error(f, y):
    """|y - f|^2 of each picture, (B, C, h, w) to (B,): a mean over elements, in units of y squared."""
    return (y - f).square().flatten(1).mean(1)


def implicit_reward(error, error_ref, beta):
    """s = -beta (|y - f_theta|^2 - |y - f_ref|^2), of any shape: how much likelier tuning made a picture."""
    return -beta * (error - error_ref)


def gdro_loss(s, r, tau):
    """Plackett-Luce ranking loss with soft targets: the first term of L in the docstring on top.

    s: (..., k) implicit rewards; r: (..., k) rewards, in any order; tau: in units of r. Returns (...,). With
    k = 2 and tau -> 0 it is the DPO loss, -log sigmoid(s_1 - s_2); with tau -> 0 it is minus the log of the
    probability that drawing without replacement, with weights exp s, gives the order of r. A group of equal
    rewards ranks nothing: 0, without gradient.
    """
    order = r.argsort(-1, descending=True)
    s, r = s.gather(-1, order), r.gather(-1, order)
    loss = 0
    for i in range(s.shape[-1] - 1):
        q = (r[..., i:] / tau).softmax(-1)
        loss = loss + s[..., i:].logsumexp(-1) - (q * s[..., i:]).sum(-1)
    return loss.where(r[..., 0] > r[..., -1], 0)


def draw_group(r, k, generator):
    """Which k of a prompt's pictures to rank, indices (k,), at random. Equal rewards are drawn again.

    r: (n,) rewards, not all equal, n >= k >= 2.
    """
    while True:
        chosen = torch.randperm(len(r), generator=generator)[:k]
        if r[chosen].min() < r[chosen].max():
            return chosen


def weighted_sum(rewards, weights):
    """R rewards as one: (R, ..., n) and R numbers to (..., n)."""
    return sum(weight * reward for weight, reward in zip(weights, rewards, strict=True))


def advantage(reward, whole=False):
    """(reward - mean) / standard deviation over a prompt's n pictures, (..., n); 0 where all n are equal.

    whole: the deviation, not the mean, is that of all the rewards given.
    """
    # Told by the rewards: rounding gives equal ones a standard deviation that isn't quite 0.
    spread = reward.amax(-1, keepdim=True) > reward.amin(-1, keepdim=True)
    deviation = reward.std(None if whole else -1, keepdim=True, correction=0)
    return ((reward - reward.mean(-1, keepdim=True)) / deviation).where(spread, 0)


def combined_advantages(rewards, weights):
    """R rewards as one, of which none rules by its larger spread: the weighted sum of their advantages.

    rewards: (R, ..., n), n pictures of each prompt; weights: R numbers. Returns (..., n).
    """
    return weighted_sum(advantage(rewards), weights)


COMBINATIONS = {"sum": weighted_sum, "advantages": combined_advantages}    # CRD has them too
COMBINE = ("--combine", "sum", "several rewards: their weighted sum, or that of their advantages, each minus "
           "its mean and over its standard deviation among a prompt's pictures", {"choices": [*COMBINATIONS]})


def corrected_score(r, u):
    """r (u - 3) + 0.2, the paper's guard against hacking in evaluation: r counts only in good pictures.

    r: rewards in [0, 1]; u: quality by a third model from 1 to 5, the mean of its marks; below 3 r counts
    against the picture. Both of any shape.
    """
    return r * (u - 3) + 0.2


def update_average(average, current, decay):
    """average = decay average + (1 - decay) current, in place; both are lists of tensors of equal shapes."""
    with torch.no_grad():
        for mine, new in zip(average, current, strict=True):
            mine.lerp_(new, 1 - decay)


@contextlib.contextmanager
def holding(params, values):
    """Inside the with block `params` have other values; afterwards the same bits again, whatever happens.

    So one network serves for several copies of an adapter, which is small. Trap: backward belongs inside.
    """
    originals = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for p, original in zip(params, originals):
                p.copy_(original)


def step_copies(optimizer, params, average, step, max_decay, max_grad_norm):
    """A step of `params`, copies that a backward inside `holding(average, params)` gave a gradient.

    `holding` lends values, so the gradient lies with `average`, which then moves towards them, after `step`
    earlier updates with the decay min(max_decay, (1 + step) / (10 + step)): of few updates, no long memory.
    Returns the gradient's norm before clipping.
    """
    for p, own in zip(params, average, strict=True):
        p.grad, own.grad = own.grad, None
    grad_norm = nn.utils.clip_grad_norm_(params, max_grad_norm)
    optimizer.step()
    update_average(average, params, min(max_decay, (1 + step) / (10 + step)))
    return grad_norm.item()


# ---- Training ----------------------------------------------------------------------------------------------

def check_alone(settings):
    """rsaft.check, where there is one process only; raises UserError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("torchrun is for rsaft.py; here there is one process only")
    return rsaft.check(settings)


def check(settings):
    """check_alone, and what is GDRO's own; raises UserError."""
    k = settings.group_size
    if k < 2 or k > settings.pictures and not settings.train:
        raise UserError(f"--group-size must be 2 to --pictures {settings.pictures}, not {k}")
    if settings.batch_size % k:
        raise UserError(f"--batch-size {settings.batch_size} can't be divided by --group-size {k}")
    if settings.ema_decay >= 1:
        raise UserError(f"--ema-decay must be below 1, not {settings.ema_decay}: nothing would be learnt")
    if settings.draw and settings.train:
        raise UserError("--draw and --train exclude each other; leave both out to draw and then train")
    if not settings.reward and not (settings.train and settings.eval_reward):
        raise UserError("--reward needs a name; only with --train and an --eval-reward there may be none")
    return check_alone(settings)


def train(settings):
    """Draw and score the pictures that are due, and tune the model on them. Raises UserError, RunStopped."""
    settings, k, folder = check(settings), settings.group_size, Path(settings.data)
    if settings.train and settings.reward:
        scored.check_drawn(folder, {"reward": settings.reward})
    weights = [weight for _, weight in map(rsaft.split_weight, settings.reward)]
    combine = functools.partial(combined_advantages, weights=weights)
    groups = scored.read_groups(settings, combine) if settings.train else {}
    model, scores, prompts, evaluation = rsaft.load(settings, must_have_gradient=False,
                                                    more_prompts=groups)
    if not settings.train:
        try:
            scored.draw_pictures(settings, model, scores, prompts, folder)
        except KeyboardInterrupt as stop:
            raise RunStopped(f"stopped by hand; the same command with --data {folder} goes on") from stop
        if settings.draw:
            print(f"pictures, latents and {scored.LINES} are in {folder}")
            return
        groups = scored.read_groups(settings, combine)
    latents = {prompt: scored.read_latents(settings, model, files) for prompt, (files, _) in groups.items()}
    # Not all rewards' range: what a prompt adds to all of its pictures ranks none of them.
    unit = settings.tau_unit or max((r.max() - r.min()).item() for _, r in groups.values())
    levels, prediction_type = noise_levels(model)
    # The network's own adapter is the average: it is evaluated and saved. What is trained are copies of its
    # tensors, put into the network for the time of a gradient. With B at 0 it is the reference.
    average = model.add_adapter(settings.rank, named_generator(settings.seed, "lora"))
    reference = [p.detach().clone() for p in average]
    params = [nn.Parameter(p.detach().clone()) for p in average]
    optimizer = torch.optim.AdamW(params, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    print(f"{sum(p.numel() for p in params):,} trained parameters; an update takes {settings.batch_size} "
          f"network evaluations without gradient, {settings.batch_size} with; tau's unit is {unit:g}")

    with rsaft.Run(settings, model.adapter(), optimizer, evaluation, extra_state=params) as run:
        for step in run.steps():
            log, chosen_prompts = defaultdict(float), rsaft.training_prompts(
                list(groups), settings.seed, step, settings.batch_size // k)
            for number, prompt in enumerate(chosen_prompts):
                rng = named_generator(settings.seed, step, number, "group")
                chosen = draw_group(groups[prompt][1], k, rng)
                x0, r = (x[chosen].to(model.device) for x in (latents[prompt], groups[prompt][1]))
                # One t and one noise for the group: so like is compared with like.
                t, alpha, sigma = levels[rsaft.draw(rng, 0, len(levels) - 1)]
                noise = torch.randn(x0.shape[1:], generator=rng).expand_as(x0).to(model.device)
                x, y = forward_process(x0, noise, alpha, sigma, prediction_type)
                denoise = model.denoiser([prompt] * k, own_scale(model))
                with torch.no_grad(), holding(average, reference):
                    error_ref = squared_error(denoise(x, t), y)
                with holding(average, params):
                    error = squared_error(denoise(x, t), y)
                    s = implicit_reward(error, error_ref, settings.beta)
                    ranking = gdro_loss(s, r, settings.tau * unit)
                    loss = (ranking + settings.gamma * error[r.argmax()]) / len(chosen_prompts)
                    loss.backward()
                for name, value in {"reward": r.mean(), "ranking": ranking, "best_error": error[r.argmax()],
                                    "best_error_ref": error_ref[r.argmax()]}.items():
                    log[name] += value.item() / len(chosen_prompts)
            grad_norm = step_copies(optimizer, params, average, step, settings.ema_decay,
                                    settings.max_grad_norm)
            run.record(**log, grad_norm=grad_norm)


# ---- Flags -------------------------------------------------------------------------------------------------

# Beta is by pilots on seed 1: with 50 the reward rises as far and falls from update 90 on.
TINY = {**rsaft.TINY, "batch_size": 48, "beta": 100.0, "train_steps": 100}


def parse(argv=None):
    """The settings of the command line, an argparse.Namespace. Raises UserError."""
    parser = rsaft.Parser("related/gdro.py",
                          "Group-level Direct Reward Optimization of text-to-image diffusion models.")
    parser.flags("method (defaults: as published for OCR, where it is known)", [
        ("--data", "runs/groups", "the folder with the scored pictures", {"metavar": "DIR"}),
        ("--draw", False, "draw and score the pictures, and stop there", SWITCH),
        ("--train", False, "draw nothing: train on what is in --data, your own scored pictures for instance; "
         "--reward may then be empty", SWITCH),
        ("--pictures", 16, "pictures that are drawn of each prompt", COUNT),
        ("--group-size", 6, "k, how many of them, chosen at random, are ranked in an update", COUNT),
        ("--beta", 12.0, "strength of the implicit reward", AMOUNT),
        ("--tau", 0.05, "temperature of the soft ranking; small: the order alone counts", AMOUNT),
        ("--tau-unit", None, "how much of the reward tau is measured in; published: 1, rewards in [0, 1]; "
         "without the flag the widest range over the pictures of one prompt, which is 1 where they go from 0 "
         "to 1", AMOUNT),
        COMBINE,
        ("--gamma", 0.5, "weight of the best picture's own error; 0 turns it off", AMOUNT_OR_0),
        ("--ema-decay", 0.99, "of the average of the weights, which is what is evaluated and saved",
         AMOUNT_OR_0)])
    rsaft.add_common_flags(parser)
    parser.set_defaults(batch_size=24, learning_rate=3e-4, rank=32, train_steps=300)
    return rsaft.parse_with(parser, argv, TINY)


main = functools.partial(rsaft.main, parse=parse, train=train, program="related/gdro.py")

if __name__ == "__main__":
    sys.exit(main())
