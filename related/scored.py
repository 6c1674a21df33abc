"""The scored pictures that gdro.py trains on: drawn, kept in a folder, read again.

Each is a NAME.png and a line in pictures.jsonl with file, prompt, reward. What is drawn here also has its
latents, in NAME.safetensors, and in its line `rewards`, those that are trained on, each apart and without its
weight; drawn.json says how it was drawn.
"""
import json
import math
from collections import defaultdict
from pathlib import Path

import torch

import rsaft
from rsaft import UserError, explained

LINES, SETTINGS = "pictures.jsonl", "drawn.json"


def check_drawn(folder, settings):
    """Raise UserError if the pictures in `folder` were drawn with other `settings`, {name: value}."""
    if (folder / SETTINGS).is_file():
        with explained(f"--data {folder}: {SETTINGS} can't be read"):
            then = json.loads((folder / SETTINGS).read_text())
        now = json.loads(json.dumps(settings))
        changed = [name for name in now if then.get(name) != now[name]]
        if changed:
            raise UserError(f"--data {folder} was drawn with another {', '.join(changed)}; name another "
                            "folder")


def each_reward(scores, images, prompts):
    """The rewards that are trained on, each apart and without its weight: (R, B). scores: rsaft.Scores."""
    scores.counts["reward_evaluations"] += len(images)
    return torch.stack([scores.rewards[name](images, prompts) for name in scores.weights])


def draw_pictures(settings, model, scores, all_prompts, folder):
    """Draw and score --pictures of every prompt into `folder`; what is there is kept. Raises UserError."""
    from PIL import Image
    from safetensors.torch import save_file
    from tqdm import tqdm
    drawn = {name: vars(settings)[name] for name in ("model", "dtype", "height", "width", "sampling_steps",
                                                     "guidance_scale", "reward", "pictures", "seed")}
    drawn["prompts"] = all_prompts
    check_drawn(folder, drawn)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SETTINGS).is_file():
        raise UserError(f"--data {folder} is not empty, and was not drawn here; --train takes what is there")
    prompts = [prompt for prompt in all_prompts for _ in range(settings.pictures)]
    size, sampling = settings.sampling_batch_size, rsaft.Plan((False,) * settings.sampling_steps)
    batches = rsaft.micro_batches(prompts, (settings.seed, "draw"), size)
    with explained(f"--data {folder} can't be written"):
        folder.mkdir(parents=True, exist_ok=True)
        rsaft.write_atomic(folder / SETTINGS, json.dumps(drawn, indent=1).encode())
        (folder / LINES).touch()
        lines = [line for line in (folder / LINES).read_text().splitlines(True) if line.endswith("\n")]
        # A batch is drawn again as a whole: so its pictures have the bits of a run that wasn't interrupted.
        first = len(batches) if len(lines) == len(prompts) else len(lines) // size
        rsaft.write_atomic(folder / LINES, "".join(lines[:first * size]).encode())
        for batch in tqdm(batches[first:], initial=first, total=len(batches), unit="batch"):
            with torch.no_grad():
                # No step has a gradient, so these are the last latents.
                latents, = rsaft.sample_starts(model, sampling, [batch], size)
                images, _ = rsaft.sample_images(model, sampling, batch, latents)
                rewards = each_reward(scores, images, batch.prompts).T.tolist()
            new, rows = [], zip(batch.names, batch.prompts, images, latents, rewards)
            for name, prompt, image, latent, each in rows:
                stem = f"{name[-1]:06d}"
                pixels = image.permute(1, 2, 0).mul(255).round().byte().cpu().numpy()
                Image.fromarray(pixels).save(folder / f"{stem}.png")
                save_file({"latents": latent.cpu().contiguous()}, folder / f"{stem}.safetensors")
                total = sum(w * score for w, score in zip(scores.weights.values(), each))
                new.append(json.dumps({"file": f"{stem}.png", "prompt": prompt, "reward": total,
                                       "rewards": each, "seed": [*name, "xT"]}) + "\n")  # of named_generator
            with open(folder / LINES, "a") as file:    # only now: what has a line is whole
                file.write("".join(new))


def read_groups(settings, combine):
    """The scored pictures in --data by prompt, {prompt: (files, rewards (n,))}. Raises UserError.

    Also if some are still to be drawn, a reward isn't finite, or a prompt has too few pictures. A prompt
    whose pictures all have equal rewards teaches nothing, and is left out. combine: with --combine advantages
    what makes the rewards of a prompt's pictures, (R, n), one, (n,).
    """
    folder, lines, groups = Path(settings.data), defaultdict(list), {}
    apart = settings.combine == "advantages"
    count = len(settings.reward) if apart else 1
    with explained(f"--data {folder}: {LINES} can't be read"):
        text = (folder / LINES).read_text()
        if (folder / SETTINGS).is_file():
            drawn = json.loads((folder / SETTINGS).read_text())
            if text.count("\n") < len(drawn["prompts"]) * drawn["pictures"]:
                raise UserError(f"--data {folder} is drawn in part; without --train the same flags draw the "
                                "rest")
    for number, line in enumerate(text.splitlines(), 1):
        with explained(f"--data {folder}: line {number} of {LINES} won't do"):
            line = json.loads(line)
            each = [float(r) for r in (line["rewards"] if apart else [line["reward"]])]
            if len(each) != count or not all(map(math.isfinite, each)):
                raise ValueError(f"its rewards {each} must be {count} finite")
            lines[str(line["prompt"])].append((line["file"], each))
    for prompt, group in lines.items():
        if len(group) < settings.group_size:
            raise UserError(f"--data {folder} has fewer than --group-size {settings.group_size} pictures of "
                            f"{prompt!r}")
        files, rewards = zip(*group)
        rewards = torch.tensor(rewards).T    # (R, n)
        r = combine(rewards) if apart else rewards[0]
        if r.min() < r.max():
            groups[prompt] = files, r
    if not groups:
        raise UserError(f"--data {folder} has no prompt with pictures of different rewards: there is nothing "
                        "to rank")
    if len(groups) < len(lines):
        print(f"{len(lines) - len(groups)} of {len(lines)} prompts are left out: their pictures have equal "
              "rewards")
    return groups


def read_latents(settings, model, files):
    """The latents of pictures in --data, (n, C, h, w), on the CPU. Raises UserError, e.g. for a wrong size.

    files: their names; a picture without a NAME.safetensors is encoded by the VAE.
    """
    import numpy
    from PIL import Image
    from safetensors.torch import load_file
    all_latents = []
    for file in files:
        path, size = Path(settings.data, file), (settings.height, settings.width)
        with explained(f"{path} won't do"):
            if path.with_suffix(".safetensors").is_file():
                latents = load_file(path.with_suffix(".safetensors"))["latents"]
            else:
                pixels = torch.from_numpy(numpy.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
                if pixels.shape[2:] != size:
                    raise ValueError(f"it has {pixels.shape[3]}x{pixels.shape[2]} pixels, not "
                                     f"{size[1]}x{size[0]}")
                pixels = (pixels.to(model.device) / 127.5 - 1).to(model.vae.dtype)
                with torch.no_grad():
                    latents = model.from_vae(model.vae.encode(pixels).latent_dist.mean.float())[0].cpu()
            if latents.shape != model.latent_shape:
                raise ValueError(f"latents {tuple(latents.shape)}, not {model.latent_shape}")
            all_latents.append(latents)
    return torch.stack(all_latents)
