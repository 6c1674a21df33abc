"""Judge saved adapters: all make pictures of the same prompts and noise, which are scored and compared.

    python tools/evaluate.py runs/000 runs/000/best
    python tools/evaluate.py A B --eval-reward judge pickscore --lora-scale 0.5 1 --out DIR
    python tools/evaluate.py runs/000 --eval-reward ocr quality.py:marks --corrected ocr marks

An adapter is a folder with pytorch_lora_weights.safetensors or such a file, of rsaft.py or of any trainer
whose file diffusers loads. Model, prompts and sampling are those of the run, from the config.json beside the
first adapter or one folder up. A flag comes before it; where there is neither, the defaults of rsaft.py hold.
The pictures are made by diffusers alone, in float32. Needs peft.
"""
import contextlib
import csv
import io
import json
import sys
import textwrap
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # rsaft.py lies one folder up

import rsaft
from rsaft import UserError, explained

COLUMNS = 8      # pictures per row of the grid
INHERITED = ("model", "models", "reward", "eval_reward", "prompts", "eval_prompts", "sampling_steps",
             "guidance_scale", "height", "width", "eval_images")

# An adapter at a strength: scores is {score: (N,) float64}, pictures (n, 3, H, W) in [0, 1] on the CPU.
Row = namedtuple("Row", "name adapter scale scores pictures")


def parse(argv=None):
    """The flags as given, an argparse.Namespace; None where the run decides. Raises UserError."""
    parser = rsaft.Parser("tools/evaluate.py ADAPTER [ADAPTER ...]", "Judge saved adapters side by side.")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a run's folder, its best/, or a file")
    name, file, folder = ({"metavar": kind} for kind in ("NAME", "FILE", "DIR"))
    parser.flags("without the flag: as in the run", [
        ("--eval-reward", None, "the scores; in the run: trained on and held out", {"nargs": "+", **name}),
        ("--model", None, "a diffusers folder or an id on the hub", folder),
        ("--models", None, "a folder with a folder per reward", folder),
        ("--tiny", False, "the small models of tiny/, if no config.json names others", rsaft.SWITCH),
        ("--prompts", None, "a text file, one prompt a line", file),
        ("--eval-prompts", None, "is used instead where both are given", file),
        ("--eval-images", None, "pictures per adapter, two or more", rsaft.number(int, 2, 10 ** 6)),
        ("--sampling-steps", None, "steps of a rollout", rsaft.COUNT),
        ("--guidance-scale", None, "classifier-free guidance; 1 turns it off", rsaft.AMOUNT_OR_0),
        ("--height", None, "of the pictures, in pixels", rsaft.PIXELS),
        ("--width", None, "of the pictures, in pixels", rsaft.PIXELS)])
    parser.flags("of this program", [
        ("--lora-scale", [1.0], "strengths of each adapter; 1 is as trained",
         {**rsaft.number(float, -100, 100), "nargs": "+"}),
        ("--corrected", None, "GDRO's corrected score too, REWARD (QUALITY - 3) + 0.2, of two scores: a "
         "reward from 0 to 1, a quality from 1 to 5", {"nargs": 2, "metavar": ("REWARD", "QUALITY")}),
        ("--sampling-batch-size", None, "pictures at a time", rsaft.COUNT),
        ("--device", None, "cuda, mps or cpu; without the flag the first of them that is there", name),
        ("--out", None, "a new folder; without the flag evaluation/ beside the first adapter", folder)])
    return parser.parse_args(argv)


def find_adapter(path):
    """The file of an adapter, a Path. Raises UserError where it isn't there, is damaged or not finite."""
    from safetensors.torch import load_file
    file = Path(path, rsaft.ADAPTER) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"there is no adapter {file}")
    with explained(f"{file} can't be read as safetensors; is it damaged?"):
        tensors = load_file(file)
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise UserError(f"{file} is broken: {name} has values that are not finite")
    return file


def read_config(file):
    """The settings of the run that an adapter's file belongs to, a dict; empty where there is no run."""
    for folder in file.absolute().parents[:2]:
        if (folder / "config.json").is_file():
            with explained(f"{folder / 'config.json'} can't be read"):
                config = json.loads((folder / "config.json").read_text())
            if "prompts_sha256" in config:    # other programs' files have that name too
                return config
    return {}


def make_settings(given, files):
    """Checked settings as rsaft.py has them: as given, else the first adapter's run's, else the defaults."""
    runs = [read_config(file) for file in files]
    models = {run["model"] for run in runs if run}
    if len(models) > 1 and not given.model:
        raise UserError(f"these are adapters of different models, {', '.join(sorted(models))}; see --model")
    settings = rsaft.parse(["--tiny"] if given.tiny or runs[0].get("tiny") else [])
    for name in INHERITED:
        setattr(settings, name, runs[0].get(name, getattr(settings, name)))
    settings.sampling_steps = runs[0].get("eval_sampling_steps", settings.sampling_steps)    # of crd.py
    trained_on = [rsaft.split_weight(text)[0] for text in settings.reward]
    settings.reward, settings.eval_reward = [], trained_on + settings.eval_reward
    for name, value in vars(given).items():
        if value is not None:
            setattr(settings, name, value)
    if given.prompts:
        settings.eval_prompts = given.eval_prompts
    named = [rsaft.short_name(name) for name in settings.eval_reward]
    for name in given.corrected or []:
        if name not in named:
            raise UserError(f"--corrected {' '.join(given.corrected)}: {name} is none of the scores, "
                            f"{', '.join(named)}; see --eval-reward")
    if settings.eval_images < 2:
        raise UserError("one picture has no interval; see --eval-images")
    out = Path(given.out or files[0].parent / "evaluation")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} is there, and is no empty folder; name another")
    settings.out = str(out)
    settings = rsaft.check(settings)
    if not (given.prompts or given.eval_prompts) and runs[0].get("prompts_sha256") not in (
            None, settings.prompts_sha256):
        rsaft.say("the prompt files have changed since the run: these are not the prompts that it had")
    return settings


def load_model(settings):
    """The base model, an rsaft.Backbone; its `pipe` is diffusers' own, with its sampler. Raises UserError."""
    rsaft.quiet_libraries()
    import diffusers
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)    # it also logs the errors that it raises
    model = rsaft.load_model(settings.model, settings.sampling_steps, settings.guidance_scale,
                             settings.height, settings.width, device=settings.device)
    model.pipe.set_progress_bar_config(disable=True)
    return model


@contextlib.contextmanager
def adapted(pipe, file):
    """Inside the with block the pipeline has an adapter. Raises UserError where not all of it arrives.

    Trap: diffusers passes over names that it doesn't know and makes up tensors that it misses, and raises
    nothing. So what has arrived is counted.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open
    with safe_open(file, "pt") as content:
        names = [name for name in content.keys() if not name.endswith(".alpha")]    # alphas arrive as scales
    with explained(f"{file} doesn't fit the model"):
        pipe.load_lora_weights(str(file), adapter_name="judged")
        parts = [part for part in pipe.components.values() if hasattr(part, "peft_config")]
        arrived = sum(len(get_peft_model_state_dict(part, adapter_name="judged")) for part in parts)
        if arrived == 0 or arrived != len(names):
            raise ValueError(f"its {len(names)} tensors, {', '.join(names[:1])} ..., arrived as {arrived}")
    try:
        yield
    finally:
        pipe.unload_lora_weights()


@torch.no_grad()
def sample(model, settings, prompts, latents, rewards, bar):
    """Make and score the pictures. Returns the `scores` and `pictures` of a Row."""
    scores, pictures, size = {name: [] for name in rewards}, [], settings.sampling_batch_size
    for i in range(0, len(prompts), size):
        asked, noise = prompts[i:i + size], latents[i:i + size].to(settings.device)
        how = model.pipeline_arguments(noise, settings.guidance_scale)
        images = model.pipe(prompt=asked, num_inference_steps=settings.sampling_steps, height=settings.height,
                            width=settings.width, output_type="pt", **how).images
        for name, reward in rewards.items():
            scores[name].append(reward(images, asked).cpu().double())
        pictures.append(images[:max(0, COLUMNS - i)].cpu())
        bar.update(len(asked))
    return {name: torch.cat(parts) for name, parts in scores.items()}, torch.cat(pictures)


def evaluate(given):
    """Judge the adapters of a command line from `parse`: the table, the folder. Raises UserError."""
    files = [find_adapter(path) for path in given.adapters]
    settings = make_settings(given, files)
    with explained("tools/evaluate.py needs a package that isn't here, pip install peft"):
        import peft  # noqa: F401
    from tqdm import tqdm
    prompts = rsaft.read_prompts(settings.eval_prompts or settings.prompts)
    prompts = [prompts[i % len(prompts)] for i in range(settings.eval_images)]
    model = load_model(settings)
    latents, pipe = rsaft.evaluation_latents(len(prompts), model.latent_shape), model.pipe
    for file in files:      # before any picture is made, so that what is wrong shows soon
        with adapted(pipe, file):
            pass
    rewards = {rsaft.short_name(name): rsaft.make_reward(name, settings.models, settings.device)
               for name in settings.eval_reward}
    total = (1 + len(files) * len(settings.lora_scale)) * len(prompts)
    with tqdm(total=total, unit="picture") as bar:
        judge = partial(sample, model, settings, prompts, latents, rewards, bar)
        rows = [Row("base model", "base model", 0.0, *judge())]
        for adapter, file in zip(given.adapters, files):
            with adapted(pipe, file):
                for scale in settings.lora_scale:
                    pipe.set_adapters("judged", scale)
                    name = adapter if scale == 1 else f"{adapter} x {scale:g}"
                    rows.append(Row(name, adapter, scale, *judge()))
    if given.corrected:
        reward, quality = given.corrected
        corrected_score = rsaft.import_file(Path(rsaft.HERE, "related/gdro.py")).corrected_score
        for row in rows:
            row.scores[f"corrected {reward}"] = corrected_score(row.scores[reward], row.scores[quality])
    table, out = make_table(rows), Path(settings.out)
    rsaft.say(f"\n{table}")
    rsaft.write_atomic(out / "table.txt", f"{table}\n".encode())
    rsaft.write_atomic(out / "scores.csv", make_csv(rows, prompts).encode())
    rsaft.write_atomic(out / "grid.png", draw_grid(rows, prompts))
    rsaft.say(f"table.txt, scores.csv and grid.png are in {out}")


# ---- What is shown -----------------------------------------------------------------------------------------

def interval(differences):
    """The mean of (N,) differences and half the length of its 95 percent interval, 1.96 standard errors."""
    return differences.mean().item(), 1.96 * differences.std().item() / len(differences) ** 0.5


def make_table(rows):
    """Means, and differences to the base model and, where there are more rows, to the first adapter: text."""
    lines, references = [], {f"minus {row.name}": row for row in rows[:2 if len(rows) > 2 else 1]}
    width = 2 + max(len(name) for name in [row.name for row in rows] + [*rows[0].scores])
    cell = max(len(text) for text in [*references, "+00.0000 [+00.0000, +00.0000]"])
    for score, values in rows[0].scores.items():
        lines.append(f"{score:{width}}{'mean':>10}" + "".join(f"   {text:>{cell}}" for text in references))
        for i, row in enumerate(rows):
            lines.append(f"{row.name:{width}}{row.scores[score].mean():10.4f}")
            for of in [*references.values()][:i]:
                mean, half = interval(row.scores[score] - of.scores[score])
                lines[-1] += f"   {f'{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]':>{cell}}"
        lines.append("")
    lines.append(f"{len(values)} pictures a row, of the same prompts and noise. In brackets: 95 percent "
                 "intervals over pictures,\npaired, the mean of the differences picture by picture +- 1.96 "
                 "standard errors.")
    return "\n".join(lines)


def make_csv(rows, prompts):
    """All scores as text: a line per row and picture, counted from 0; the base model's scale is 0."""
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerow(["adapter", "scale", "picture", "prompt", *rows[0].scores])
    for row in rows:
        for i, (prompt, *scores) in enumerate(zip(prompts, *row.scores.values())):
            writer.writerow([row.adapter, row.scale, i, prompt, *map(float, scores)])
    return content.getvalue()


def draw_grid(rows, prompts):
    """The first pictures as the bytes of a PNG file: each row a row, a column per prompt, both with names."""
    from PIL import Image, ImageDraw, ImageFont
    tiles = [[Image.open(io.BytesIO(rsaft.make_grid(picture[None], 1))) for picture in row.pictures]
             for row in rows]
    width, height = tiles[0][0].size
    size, gap = max(12, width // 24), max(4, width // 64)
    wrap = partial(textwrap.fill, width=int(width / size / 0.55), max_lines=5, placeholder=" ...")
    captions = [wrap(prompt) for prompt in prompts[:COLUMNS]]
    top = int(1.3 * size * max(text.count("\n") + 1 for text in captions)) + 2 * gap
    area = (width + gap) * (1 + len(captions)), top + (height + gap) * len(rows)
    canvas = Image.new("RGB", area, "white")
    write = partial(ImageDraw.Draw(canvas).multiline_text, fill="black", font=ImageFont.load_default(size))
    for column, text in enumerate(captions, 1):
        write((column * (width + gap), top - gap), text, anchor="ld")
    for i, row in enumerate(rows):
        y = top + i * (height + gap)
        write((gap, y + height // 2), wrap(row.name), anchor="lm")
        for column, tile in enumerate(tiles[i], 1):
            canvas.paste(tile, (column * (width + gap), y))
    content = io.BytesIO()
    canvas.save(content, "PNG")
    return content.getvalue()


main = partial(rsaft.main, parse=parse, train=evaluate, program="tools/evaluate.py")

if __name__ == "__main__":
    sys.exit(main())
