"""Bring a run's log into tensorboard's format, to RUN/tensorboard. Needs the package tensorboard.

    python tools/tensorboard.py runs/000 --follow
    tensorboard --logdir runs

Each number of an update becomes a scalar under train/, each mean of an evaluation one under eval/.
"""
import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # rsaft.py lies one folder up

import rsaft
from rsaft import UserError, explained


def parse(argv=None):
    """The flags, an argparse.Namespace. Raises UserError."""
    parser = rsaft.Parser("tools/tensorboard.py RUN", "Bring a run's log into tensorboard's format.")
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.flags("how long", [("--follow", False, "go on with the run, until Ctrl-C", rsaft.SWITCH)])
    return parser.parse_args(argv)


def import_writer():
    """torch's SummaryWriter. Trap: `import tensorboard` would find this very file; its folder comes first."""
    path, here = sys.path[:], Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != here]
    try:
        with explained("tools/tensorboard.py needs a package that isn't here, pip install tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter
    finally:
        sys.path[:] = path


def follow(settings):
    """Write what the log of a run holds and, with --follow, what comes. Raises UserError."""
    SummaryWriter, log, written = import_writer(), Path(settings.run, "log.jsonl"), []
    if not log.is_file():
        raise UserError(f"{settings.run} is no folder of a run: there is no {log}")
    rsaft.say(f"tensorboard --logdir {settings.run}" + ("    (Ctrl-C ends this)" if settings.follow else ""))
    # purge_step hides what an earlier call has written there; else each point would be there twice.
    writer = SummaryWriter(Path(settings.run, "tensorboard"), purge_step=0)
    with writer, contextlib.suppress(KeyboardInterrupt):
        while True:
            lines = log.read_text().splitlines()    # it is replaced after each update, so it is read anew
            if lines[:len(written)] != written:
                raise UserError(f"{log} is another run's by now; start again")
            for line in map(json.loads, lines[len(written):]):
                kind = "eval" if "eval" in line else "train"
                for name in line.keys() - {"eval", "step", "pictures"}:
                    writer.add_scalar(f"{kind}/{name}", line[name], line["step"])
            writer.flush()
            written = lines
            if not settings.follow:
                return
            time.sleep(2)


main = partial(rsaft.main, parse=parse, train=follow, program="tools/tensorboard.py")

if __name__ == "__main__":
    sys.exit(main())
