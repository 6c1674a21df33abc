"""Draws decays.png: how far CRD's two copies lag behind the trained adapter. `python related/plot_decays.py`

The decays of crd.py's default run and of its --tiny run, as its flags give them. Guard 1 acts from where the
sampling copy's is above 0: until then pictures come from the adapter as it was trained last.
"""
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, needs the backend chosen before

import crd  # noqa: E402, crd.py lies in this file's folder


def main():
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for axis, flags in zip(axes, ([], ["--tiny"])):
        settings = crd.parse(flags)
        moved = range(settings.epoch_updates, settings.train_steps + 1, settings.epoch_updates)
        for label, schedule in ("old", settings.old_decay), ("sampling", settings.sampling_decay):
            axis.step(moved, [crd.decay(n, *schedule) for n in moved], where="post", label=f"{label} copy")
        axis.set(title=f"crd.py {' '.join(flags)}", xlabel="optimizer step", ylim=(0, 1))
    axes[0].set_ylabel("decay d")
    axes[0].legend()
    figure.savefig(Path(__file__).with_name("decays.png"), dpi=100)


if __name__ == "__main__":
    main()
