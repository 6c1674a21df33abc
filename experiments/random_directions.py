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
from update import update_gradient  # noqa: E402

DRAWS = 4


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
            log = update_gradient(settings, model, scores.total, prompts, params, step, make_images)
            grad_norm = nn.utils.clip_grad_norm_(params, settings.max_grad_norm)
            optimizer.step()
            run.record(**log, grad_norm=grad_norm.item())


PROGRAM = "experiments/random_directions.py"
parse = partial(rsaft.parse, program=PROGRAM)    # by its name no other program goes on with a run of this one
main = partial(rsaft.main, parse=parse, train=train, program=PROGRAM)

if __name__ == "__main__":
    sys.exit(main())
