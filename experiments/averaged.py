"""A rival of RSA-FT: plain training of which not the adapter but a running average of it is kept.

    python experiments/averaged.py --tiny --reward pickscore

Training by rsaft.py, with its flags. The adapter that is evaluated and saved is the exponential moving
average of the one that is trained, with the decay min(0.995, (1 + t) / (10 + t)) after t updates, as CRD's.
"""
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "related")]
import rsaft  # noqa: E402, found through the line above, as gdro is
from gdro import holding, step_copies  # noqa: E402
from update import update_gradient  # noqa: E402


def train(settings):
    """Tune a model; settings: from rsaft.parse. Raises UserError, RunStopped."""
    settings = rsaft.check(settings)
    if settings.sam or settings.noise:
        raise rsaft.UserError("the average is of plain training; leave out --noise and --sam")
    model, scores, prompts, evaluation = rsaft.load(settings)
    # The model's own adapter is the average; while a gradient is taken it has the values of the trained copy.
    average = model.add_adapter(settings.rank, rsaft.named_generator(settings.seed, "lora"))
    trained = [nn.Parameter(p.detach().clone()) for p in average]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay,
                                  maximize=True)
    with rsaft.Run(settings, model.adapter(), optimizer, evaluation, extra_state=trained) as run:
        for step in run.steps():
            with holding(average, trained):
                log = update_gradient(settings, model, scores.total, prompts, average, step)
            grad_norm = step_copies(optimizer, trained, average, step, 0.995, settings.max_grad_norm)
            run.record(**log, grad_norm=grad_norm)


PROGRAM = "experiments/averaged.py"
parse = partial(rsaft.parse, program=PROGRAM)    # by its name no other program goes on with a run of this one
main = partial(rsaft.main, parse=parse, train=train, program=PROGRAM)

if __name__ == "__main__":
    sys.exit(main())
