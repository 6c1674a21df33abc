"""A control for --noise: the mean over random directions takes the place of the worst one.

    python experiments/random_directions.py --tiny --reward pickscore --noise 0.1

Plain training by rsaft.py, with its flags, but at each picture the reward's gradient is the mean of those at
DRAWS pictures, the same one moved by the radius of --noise in random directions. `reward` in the log is that
of the first of them.
"""
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rsaft  # noqa: E402, found through the line above

DRAWS = 4


def plain_gradient(settings, model, scores, prompts, params, step, make_images=None):
    """An update's gradient as rsaft.train has it without perturbations, in `params`. Returns what is logged.

    make_images(plan, batch, start) draws the last steps, to (images, prompts); if None, rsaft.sample_images.
    """
    plan = rsaft.make_plan(settings, step)
    chosen = rsaft.training_prompts(prompts, settings.seed, step, settings.batch_size)
    batches = rsaft.my_share(rsaft.micro_batches(chosen, (settings.seed, step), settings.micro_batch_size))
    make_starts = partial(rsaft.sample_starts, model, plan, size=settings.sampling_batch_size)
    make_images = partial(make_images or partial(rsaft.sample_images, model), plan)
    return rsaft.rsaft_gradient(batches, make_starts, make_images, scores.total, params)


def moved_images(model, rho, plan, batch, start):
    """What rsaft.sample_images makes of a Batch, moved in DRAWS ways by the distance rho.

    Returns (images, prompts), with images (DRAWS B, 3, H, W), with a graph: rsaft_gradient takes the mean
    over all pictures of a prompt, and logs the reward of the first B.
    """
    images, prompts = rsaft.sample_images(model, plan, batch, start)
    directions = [batch.noise(f"gaussian {i}", images.shape[1:]).to(images.device) for i in range(DRAWS)]
    moved = [images + rsaft.sample_perturbation(direction, rho) for direction in directions]
    return torch.cat(moved), prompts * DRAWS


def train(settings):
    """Tune a model; settings: from rsaft.parse. Raises UserError, RunStopped."""
    settings = rsaft.check(settings)
    if settings.sam or not settings.noise or settings.method == "draft-lv":
        raise rsaft.UserError("random directions need --noise, and go neither with --sam nor with draft-lv")
    model, scores, prompts, evaluation = rsaft.load(settings)
    params = model.add_adapter(settings.rank, rsaft.named_generator(settings.seed, "lora"))
    optimizer = torch.optim.AdamW(params, lr=settings.learning_rate, weight_decay=settings.weight_decay,
                                  maximize=True)
    make_images = partial(moved_images, model, settings.noise)
    with rsaft.Run(settings, model.adapter(), optimizer, evaluation) as run:
        for step in run.steps():
            log = plain_gradient(settings, model, scores, prompts, params, step, make_images)
            grad_norm = nn.utils.clip_grad_norm_(params, settings.max_grad_norm)
            optimizer.step()
            run.record(**log, grad_norm=grad_norm.item())


def parse(argv=None):
    """rsaft.py's settings under this program's name, so that neither goes on with a run of the other."""
    settings = rsaft.parse(argv)
    settings.program = "experiments/random_directions.py"
    return settings


main = partial(rsaft.main, parse=parse, train=train, program="experiments/random_directions.py")

if __name__ == "__main__":
    sys.exit(main())
