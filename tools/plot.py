"""Draw how runs went, from their log.jsonl and config.json. Needs matplotlib.

    python tools/plot.py runs/000 runs/001 --out curves.png

Over the updates: the training reward, faint for each batch and full for a running mean, then of the
evaluations each held-out score, and S1. At last each held-out score against what was trained on, as both were
at the same evaluation: where a curve turns down on its way to the right, the reward is being hacked. A square
is the last evaluation.
"""
import io
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # rsaft.py lies one folder up

import rsaft
from rsaft import UserError, explained


def parse(argv=None):
    """The flags, an argparse.Namespace. Raises UserError."""
    parser = rsaft.Parser("tools/plot.py RUN [RUN ...]", "Draw how runs went.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.flags("result", [("--out", None, "a PNG file; without the flag curves.png in the first RUN",
                             {"metavar": "FILE"})])
    return parser.parse_args(argv)


def read_run(folder):
    """A run's updates and its evaluations, lists of dicts, and the names of what it trained on.

    An evaluation gets an entry more, `trained_on`: the weighted sum of those scores. Raises UserError.
    """
    with explained(f"{folder} is no folder of a run"):
        weights = dict(map(rsaft.split_weight, json.loads(Path(folder, "config.json").read_text())["reward"]))
        lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        evaluations = [line for line in lines if "eval" in line]
        for line in evaluations:
            line["trained_on"] = sum(weights[name] * line[rsaft.short_name(name)] for name in weights)
    if not lines:
        raise UserError(f"{folder} has logged nothing yet")
    return [line for line in lines if "eval" not in line], evaluations, [*map(rsaft.short_name, weights)]


def running_mean(values):
    """The mean over a tenth of all values, around each: a list as long."""
    reach = len(values) // 20
    near = [values[max(0, i - reach):i + reach + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in near]


def draw(figure, names, runs):
    """Put the panels on a matplotlib Figure. names: what each run is called; runs: of each its `read_run`."""
    scores = dict.fromkeys(name for _, evaluations, trained_on in runs for line in evaluations
                           for name in line["pictures"] if name not in trained_on)    # s1 is the last
    trained_on = dict.fromkeys(" + ".join(trained_on) for *_, trained_on in runs)
    words = {"reward": "training reward", "s1": "S1 (sharpness)", "step": "updates",
             "trained_on": f"{' or '.join(trained_on)} (trained on)"}
    panels = [("step", y) for y in ("reward", *scores)] + [("trained_on", y) for y in scores if y != "s1"]
    rows = -(-len(panels) // 3)
    figure.set_size_inches(10, 2.6 * rows + 0.3 * len(runs))
    for number, (x, y) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 3, number, xlabel=words[x], ylabel=words.get(y, y))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        for i, (name, (updates, evaluations, _)) in enumerate(zip(names, runs)):
            lines = [line for line in (updates if y == "reward" else evaluations) if y in line]
            xs, ys, color = [line[x] for line in lines], [line[y] for line in lines], f"C{i}"
            if y == "reward":
                axes.plot(xs, ys, color=color, alpha=0.25, linewidth=0.8)
                axes.plot(xs, running_mean(ys), color=color, label=name)
            else:
                axes.plot(xs, ys, color=color, marker="o", markersize=3)
            if x == "trained_on":
                axes.plot(xs[-1:], ys[-1:], color=color, marker="s")
    figure.legend(loc="outside lower left", frameon=False)


def plot(settings):
    """Draw the runs of a command line from `parse`, and write the PNG. Raises UserError."""
    with explained("tools/plot.py needs a package that isn't here, pip install matplotlib"):
        from matplotlib.figure import Figure
    out = Path(settings.out or Path(settings.runs[0], "curves.png"))
    if out.suffix != ".png" or out.is_dir():
        raise UserError(f"--out {out} must be the name of a file that ends in .png")
    figure, content = Figure(dpi=100, layout="constrained"), io.BytesIO()
    draw(figure, settings.runs, [read_run(folder) for folder in settings.runs])
    figure.savefig(content, format="png")
    rsaft.write_atomic(out, content.getvalue())
    rsaft.say(f"the curves are in {out}")


main = partial(rsaft.main, parse=parse, train=plot, program="tools/plot.py")

if __name__ == "__main__":
    sys.exit(main())
