"""An update's gradient by the settings of rsaft.py: what its training loop does, for the experiments here."""
from functools import partial

import rsaft


def update_gradient(settings, model, reward, prompts, params, step, make_images=None, **perturbations):
    """The gradient of update `step`, from 0, in `params`. Returns what is logged.

    make_images(plan, batch, start) draws the last steps, to (images, prompts); if None, rsaft.sample_images.
    perturbations: rho, rho_w, reuse_starts of rsaft.rsaft_gradient; without them it is the plain gradient.
    """
    plan = rsaft.make_plan(settings, step)
    chosen = rsaft.training_prompts(prompts, settings.seed, step, settings.batch_size)
    batches = rsaft.my_share(rsaft.micro_batches(chosen, (settings.seed, step), settings.micro_batch_size))
    make_starts = partial(rsaft.sample_starts, model, plan, size=settings.sampling_batch_size)
    make_images = partial(make_images or partial(rsaft.sample_images, model), plan)
    return rsaft.rsaft_gradient(batches, make_starts, make_images, reward, params, **perturbations)
