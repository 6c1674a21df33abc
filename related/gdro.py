"""GDRO: Group-level Direct Reward Optimization of text-to-image diffusion models, in one file.

The method of arXiv 2601.02036 (CVPR 2026), from its published description. The reward is never differentiated, so it
may be a black box, and nothing is sampled in training: k pictures of a prompt, drawn and scored beforehand, are noised
to the same t, and the model is tuned until its implicit reward (Diffusion-DPO, arXiv 2311.12908) ranks them as r does:

    s_i = -beta ( |y - f_theta(x_t, t, c)|^2  -  |y - f_ref(x_t, t, c)|^2 )      y: what f should say, e.g. the noise

    L = sum_{i<k} [ log sum_{m>=i} exp s_m  -  sum_{j>=i} q_i(j) s_j ]  +  gamma |y - f_theta|^2 of the best picture

with r_1 >= ... >= r_k and q_i(j) = softmax over j >= i of r_j / tau: a Plackett-Luce ranking with soft targets. The
last term keeps the likelihood of the best picture from falling while the ranking improves. |.|^2 is a mean over
elements, so that beta doesn't depend on the resolution.

Models, sampling, LoRA, rewards, evaluation and the training loop are rsaft.py's. Try it, in one go, or in two, of which
the second takes any folder of scored pictures:

    python related/gdro.py --tiny --reward pickscore
    python related/gdro.py --tiny --reward tiny/world.py:accuracy --data runs/scored --draw
    python related/gdro.py --tiny --reward tiny/world.py:accuracy --data runs/scored --train
"""
import contextlib
import functools
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # rsaft.py is no package; it lies one folder up
import rsaft
from rsaft import UserError, explained, named_generator, option


# ---- Settings ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings(rsaft.Config):
    """rsaft.py's settings without those that are its method's alone: a ClassVar is no field, and so no flag."""
    noise: ClassVar
    noise_type: ClassVar
    noise_draws: ClassVar
    sam: ClassVar
    sam_rollout: ClassVar
    method: ClassVar
    grad_steps: ClassVar
    evaluate: ClassVar  # rsaft.py --evaluate judges any adapter
    lora_scale: ClassVar
    micro_batch_size: int = option(1, "pictures in memory at a time when drawing; training takes a whole group")
    rank: int = option(32, "of the LoRA adapter")

    def __post_init__(self):
        if rsaft.PROCESSES > 1:
            raise UserError("torchrun is for rsaft.py; here there is one process only")


@dataclass(frozen=True)
class Config(Settings):
    """All settings; the command line is made of these fields. README says which defaults are the paper's."""
    program, title = "related/gdro.py", "Group-level Direct Reward Optimization of text-to-image diffusion models."
    may_be_zero = *Settings.may_be_zero, "gamma", "ema_decay"
    reward: tuple = option(("pickscore",), "what is maximised: names or FILE.py:FUNCTION, a weighted sum of several; "
                           "none with --train: only what --data says", nargs="*", type=str, metavar="NAME[=WEIGHT]")
    data: str = option("runs/groups", "the folder with the scored pictures")
    draw: bool = option(False, "draw and score the pictures, and stop there")
    train: bool = option(False, "draw nothing: train on what is in --data, your own scored pictures for instance")
    pictures: int = option(16, "pictures that are drawn of each prompt")
    group_size: int = option(6, "k, how many of them, chosen at random, are ranked in an update")
    batch_size: int = option(24, "pictures per update, in groups")
    learning_rate: float = option(1e-4, "of AdamW")
    beta: float = option(12.0, "strength of the implicit reward")
    tau: float = option(0.05, "temperature of the soft ranking, in units of the reward; small: only the order counts")
    gamma: float = option(0.5, "weight of the best picture's own error; 0 turns it off")
    ema_decay: float = option(0.99, "of the average of the weights, which is what is evaluated and saved")


# Beta and length are those of a run on seed 1, after seed 0 had shown that with the published beta, 12, the reward
# rises here for 40 updates and then falls.
TINY = {**rsaft.TINY, "batch_size": 48, "beta": 200.0, "train_steps": 100}


def check(config):
    """Raise UserError for settings that can't work, as rsaft.check does for the others."""
    k = config.group_size
    if k < 2 or k > config.pictures and not config.train:
        raise UserError(f"--group-size must be 2 to --pictures {config.pictures}, not {k}")
    if config.batch_size % k:
        raise UserError(f"--batch-size {config.batch_size} can't be divided by --group-size {k}")
    if config.ema_decay >= 1:
        raise UserError(f"--ema-decay must be below 1, not {config.ema_decay}: nothing would be learnt")
    if config.draw and config.train:
        raise UserError("--draw and --train exclude each other; leave both out to draw and then train")
    if not config.reward and not (config.train and config.eval_reward):
        raise UserError("--reward needs a name; only with --train and an --eval-reward there may be none")


# ---- The method: tensors in, tensors out ---------------------------------------------------------------------------

def forward_process(x0, noise, alpha, sigma, prediction_type):
    """A noised picture x_t = alpha x0 + sigma noise, and the y that the network should answer with.

    x0, noise: latents, (B, C, h, w); alpha, sigma: numbers or tensors that broadcast. y = p x0 + q noise with

        prediction_type    p        q
        epsilon            0        1        the noise
        v_prediction      -sigma    alpha    the velocity on the circle alpha^2 + sigma^2 = 1 (arXiv 2202.00512)
        flow              -1        1        the velocity on the line alpha + sigma = 1 (arXiv 2210.02747)

    Returns x_t and y, both (B, C, h, w). Raises KeyError for another prediction_type.
    """
    p, q = {"epsilon": (0, 1), "v_prediction": (-sigma, alpha), "flow": (-1, 1)}[prediction_type]
    return alpha * x0 + sigma * noise, p * x0 + q * noise


def squared_error(f, y):
    """|y - f|^2 of each picture, (B, C, h, w) to (B,): a mean over elements, in units of y squared."""
    return (y - f).square().flatten(1).mean(1)


def implicit_reward(error, error_ref, beta):
    """s = -beta (|y - f_theta|^2 - |y - f_ref|^2), of any shape: how much likelier a picture became by tuning."""
    return -beta * (error - error_ref)


def gdro_loss(s, r, tau):
    """Plackett-Luce ranking loss with soft targets: the first term of L in the docstring on top.

    s: (..., k) implicit rewards; r: (..., k) rewards, in any order; tau: in units of r. Returns (...,).
    With k = 2 and tau -> 0 it is the DPO loss, -log sigmoid(s_1 - s_2); with tau -> 0 it is minus the log of
    the probability that drawing without replacement, with weights exp s, gives the order of r.
    """
    order = r.argsort(-1, descending=True)
    s, r = s.gather(-1, order), r.gather(-1, order)
    loss = 0
    for i in range(s.shape[-1] - 1):
        q = (r[..., i:] / tau).softmax(-1)
        loss = loss + s[..., i:].logsumexp(-1) - (q * s[..., i:]).sum(-1)
    return loss


def update_average(average, current, decay):
    """average = decay average + (1 - decay) current, in place; both are lists of tensors of the same shapes."""
    with torch.no_grad():
        for mine, new in zip(average, current, strict=True):
            mine.lerp_(new, 1 - decay)


@contextlib.contextmanager
def holding(params, values):
    """Inside the with block `params` have other values; afterwards they are the same bits again, whatever happens.

    So one network serves for several copies of an adapter, which is small. Trap: call backward inside the block.
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


# ---- The scored pictures: NAME.png, its latents in NAME.safetensors, and a line in pictures.jsonl --------------------

LINES, SETTINGS = "pictures.jsonl", "drawn.json"


def check_settings(folder, settings):
    """Raise UserError if the pictures in `folder` were drawn with other `settings`, {name: value}."""
    if (folder / SETTINGS).is_file():
        with explained(f"--data {folder}: {SETTINGS} can't be read"):
            then = json.loads((folder / SETTINGS).read_text())
        if changed := [name for name, value in settings.items() if then.get(name) != json.loads(json.dumps(value))]:
            raise UserError(f"--data {folder} was drawn with another {', '.join(changed)}; name another folder")


def draw_pictures(run, folder):
    """Draw and score --pictures of every prompt into `folder`; what is there already is kept. Raises UserError."""
    from PIL import Image
    from safetensors.torch import save_file
    from tqdm import tqdm
    config, size, sampling = run.config, run.micro_batch_size, rsaft.Plan((False,) * run.config.sampling_steps)
    settings = {name: run.settings[name] for name in ("model", "dtype", "height", "width", "sampling_steps",
                                                      "guidance_scale", "reward", "pictures", "seed")}
    settings["prompts"] = run.prompts
    check_settings(folder, settings)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SETTINGS).is_file():
        raise UserError(f"--data {folder} is not empty, and was not drawn here; --train takes what is there")
    prompts = [prompt for prompt in run.prompts for _ in range(config.pictures)]
    batches = rsaft.micro_batches(prompts, (config.seed, "draw"), size, run.device)
    with explained(f"--data {folder} can't be written"):
        folder.mkdir(parents=True, exist_ok=True)
        rsaft.write_whole(folder / SETTINGS, json.dumps(settings, indent=1).encode())
        (folder / LINES).touch()
        lines = [line for line in (folder / LINES).read_text().splitlines(True) if line.endswith("\n")]
        # A batch is drawn again as a whole, so that its pictures have the bits of a run that wasn't interrupted.
        first = len(batches) if len(lines) == len(prompts) else len(lines) // size
        rsaft.write_whole(folder / LINES, "".join(lines[:first * size]).encode())
        for number in tqdm(range(first, len(batches)), initial=first, total=len(batches), unit="batch"):
            with torch.no_grad():
                images, latents = run.generate(batches[number], plan=sampling)   # no step has a gradient: the last ones
                rewards = run.reward(images, batches[number].prompts).tolist()
            new = []
            for i, (prompt, image) in enumerate(zip(batches[number].prompts, images)):
                index = number * size + i
                pixels = image.permute(1, 2, 0).mul(255).round().byte().cpu().numpy()
                Image.fromarray(pixels).save(folder / f"{index:06d}.png")
                save_file({"latents": latents[i].cpu().contiguous()}, folder / f"{index:06d}.safetensors")
                new.append(json.dumps({"file": f"{index:06d}.png", "prompt": prompt, "reward": rewards[i],
                                       "seed": [config.seed, "draw", index, "xT"]}) + "\n")   # of named_generator
            with open(folder / LINES, "a") as file:                            # only now: what has a line is whole
                file.write("".join(new))


def read_pictures(run, folder):
    """The scored pictures in `folder`: {prompt: (latents (n, C, h, w), rewards (n,))}, on the CPU.

    Of a line only file, prompt and reward are needed; pictures without a NAME.safetensors are encoded by the VAE.
    Raises UserError for what can't be read or isn't drawn to the end, a wrong size, a reward that isn't finite, too few
    pictures of a prompt.
    """
    import numpy
    from PIL import Image
    from safetensors.torch import load_file
    height, width, vae, groups = run.settings["height"], run.settings["width"], run.pipe.vae, defaultdict(list)
    if run.config.reward:
        check_settings(folder, {"reward": run.config.reward})
    with explained(f"--data {folder}: {LINES} can't be read"):
        text = (folder / LINES).read_text()
        if (folder / SETTINGS).is_file():
            drawn = json.loads((folder / SETTINGS).read_text())
            if text.count("\n") < len(drawn["prompts"]) * drawn["pictures"]:
                raise UserError(f"--data {folder} is drawn in part; without --train the same flags draw the rest")
        lines = [json.loads(line) for line in text.splitlines()]
    for number, line in enumerate(lines, 1):
        with explained(f"--data {folder}: line {number} of {LINES} won't do"):
            path = folder / line["file"]
            if path.with_suffix(".safetensors").is_file():
                latents = load_file(path.with_suffix(".safetensors"))["latents"]
            else:
                pixels = torch.from_numpy(numpy.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
                if pixels.shape[2:] != (height, width):
                    raise ValueError(f"it has {pixels.shape[3]}x{pixels.shape[2]} pixels, not {width}x{height}")
                with torch.no_grad():
                    encoded = vae.encode((pixels.to(run.device) / 127.5 - 1).to(vae.dtype)).latent_dist.mean
                latents = (encoded[0] * vae.config.scaling_factor).float().cpu()
            if latents.shape != run.latent_shape or not math.isfinite(line["reward"]):
                raise ValueError(f"latents {tuple(latents.shape)}, not {run.latent_shape}; reward {line['reward']}")
            groups[str(line["prompt"])].append((latents, float(line["reward"])))
    few = [prompt for prompt, group in groups.items() if len(group) < run.config.group_size]
    if few or not groups:
        raise UserError(f"--data {folder} has fewer than --group-size {run.config.group_size} pictures of "
                        f"{few[0] if few else 'any prompt'!r}")
    return {prompt: (torch.stack([latents for latents, _ in group]), torch.tensor([reward for _, reward in group]))
            for prompt, group in groups.items()}


# ---- Training ------------------------------------------------------------------------------------------------------

def train(config):
    """Draw and score the pictures, if that is still to be done, and tune the model on them. Raises UserError."""
    check(config)
    run = rsaft.Run(config, differentiable=False)
    unet, k, folder = run.pipe.unet, config.group_size, Path(config.data)
    if not config.train:
        draw_pictures(run, folder)
    if config.draw:
        print(f"pictures, latents and {LINES} are in {folder}")
        return
    groups = read_pictures(run, folder)
    alphas = run.pipe.scheduler.alphas_cumprod.sqrt().tolist()
    prediction_type, embed = run.pipe.scheduler.config.prediction_type, rsaft.make_embed(run.pipe)
    # The UNet's own adapter is the average: it is evaluated and saved. What is trained are copies of its tensors, put
    # into the UNet for the time of a gradient.
    average = rsaft.add_lora(unet, config.rank, named_generator(config.seed, "lora"))
    params = [nn.Parameter(p.detach().clone()) for p in average]
    optimizer = torch.optim.AdamW(params, lr=config.learning_rate, weight_decay=config.weight_decay)

    def average_weights(*_):
        done = optimizer.state[params[0]]["step"].item()      # the average of so few updates has no long memory
        update_average(average, params, min(config.ema_decay, done / (9 + done)))

    optimizer.register_step_post_hook(average_weights)

    def gradient(step):
        log = defaultdict(float)
        prompts = rsaft.training_prompts(list(groups), config.seed, step, config.batch_size // k)
        with holding(average, params):
            for p in average:
                p.grad = None
            for number, prompt in enumerate(prompts):
                rng = named_generator(config.seed, step, number, "group")
                chosen = torch.randperm(len(groups[prompt][1]), generator=rng)[:k]
                x0, r = (tensor[chosen].to(run.device) for tensor in groups[prompt])
                t = rsaft.draw(rng, 0, len(alphas) - 1)       # one t for the group: the ranking compares like with like
                noise = torch.randn(x0.shape, generator=rng).to(run.device)
                x, y = forward_process(x0, noise, alphas[t], (1 - alphas[t] ** 2) ** 0.5, prediction_type)
                denoise = rsaft.make_denoise(unet, embed([prompt] * k), None, guidance_scale=1)
                with torch.no_grad(), rsaft.lora_scale(unet, 0):
                    error_ref = squared_error(denoise(x, t), y)
                error = squared_error(denoise(x, t), y)
                ranking = gdro_loss(implicit_reward(error, error_ref, config.beta), r, config.tau)
                loss = (ranking + config.gamma * error[r.argmax()]) / len(prompts)
                loss.backward()
                for name, value in ("reward", r.mean()), ("ranking", ranking), ("best_error", error[r.argmax()]), (
                        "best_error_ref", error_ref[r.argmax()]):
                    log[name] += value.item() / len(prompts)
        for p, own in zip(params, average):
            p.grad, own.grad = own.grad, None
        return log

    print(f"{run.device}, {config.dtype}, {sum(p.numel() for p in params):,} trained parameters; an update takes "
          f"{config.batch_size} network evaluations without gradient, {config.batch_size} with")
    run.fit(optimizer, gradient, copies=params)


main = functools.partial(rsaft.main, train=train, kind=Config, tiny=TINY)

if __name__ == "__main__":
    sys.exit(main())
