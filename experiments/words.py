"""Words before and after tuning: what one published reader rewards, and what another one then reads.

    pip install -r experiments/requirements.txt -r rewards/requirements.txt
    python experiments/words.py        # three runs of rsaft.py, seed 0, about 25 minutes of CPU time

Each run is kept in runs/words/, goes on where it was stopped, and isn't made again. words.png has the first
pictures of each run's last evaluation, the same prompts and noise in all of them, and under each what the
second reader makes of it.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "rewards")]
import ocr  # noqa: E402, found through the line above, as the next two are
import ocr_v4  # noqa: E402
import rsaft  # noqa: E402
import study  # noqa: E402

WORLD, FLOOR = HERE.parent / "tiny/words", f"{HERE.parent}/rewards/ocr_likelihood.py:ocr_floor"
COMMON = ["--tiny", "--model", str(WORLD), "--prompts", str(WORLD / "prompts.txt"), "--batch-size", "16",
          "--train-steps", "40", "--eval-every", "10", "--eval-images", "60", "--eval-reward", "ocr_v4",
          f"{WORLD / 'world.py'}:oracle_accuracy", f"{WORLD / 'world.py'}:oracle_correlation"]
# 0.03: where the reward falls by 5 to 10 percent. K = 10 and the floor: from earlier trials.
RUNS = {"plain": ["--reward", "ocr_likelihood"],
        "RSA-FT": ["--reward", "ocr_likelihood", "--noise", "0.03", "--sam"],
        "floor": ["--reward", FLOOR, "--grad-steps", "10"]}
TITLES = {"base": "base model", "plain": "tuned on the likelihood, plain",
          "RSA-FT": "tuned on the likelihood, RSA-FT (--noise 0.03 --sam)",
          "floor": "tuned on log(p + exp(-3)), plain, through all steps"}
SHOWN, COLUMNS = 8, 4


def last_line(folder, first=False):
    """The last evaluation of a run, or the first."""
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "eval" in line][0 if first else -1]


def draw(folders, path):
    """A block of pictures for the base model and for each run in {name: folder}, with what is read below."""
    from matplotlib import pyplot
    read = ocr.make_reader(ocr_v4.MODELS)
    folder = folders["plain"]
    blocks = [("base", folder, last_line(folder, first=True))]
    blocks += [(name, folder, last_line(folder)) for name, folder in folders.items()]
    figure = pyplot.figure(figsize=(11, 3.9), layout="constrained")
    for part, (name, folder, line) in zip(figure.subfigures(2, 2, wspace=0.03, hspace=0.03).flat, blocks):
        pictures = study.read_grid(folder / f"samples/step_{line['step']:06d}.png", 32, 96)[:SHOWN]
        prompts = (folder / "samples/prompts.txt").read_text(encoding="utf-8").splitlines()[:SHOWN]
        score = f", likelihood {line['ocr_likelihood']:.2f}" if "ocr_likelihood" in line else ""
        part.suptitle(f"{TITLES[name]}\nletters read {line['ocr_v4']:.2f}{score}", fontsize=10)
        axes = part.subplots(SHOWN // COLUMNS, COLUMNS).flat
        for axis, picture, prompt, text in zip(axes, pictures, prompts, read(pictures)):
            axis.imshow(picture.permute(1, 2, 0))
            axis.set_title(prompt.split('"')[1], fontsize=8, color="#777777", pad=2)
            axis.set_xlabel(text or "(nothing)", fontsize=9, fontweight="bold", labelpad=1)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main():
    folders = {name: Path("runs/words") / name.lower() for name in RUNS}
    for name, flags in RUNS.items():
        code = rsaft.main([*COMMON, *flags, "--out", str(folders[name])])
        if code:
            return code
    draw(folders, HERE / "words.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
