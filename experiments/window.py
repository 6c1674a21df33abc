"""How far the update of --sam-rollout window is from that of the full second rollout.

    python experiments/window.py        # about 20 minutes with one thread

In the small world, for each of the five methods: plain training (seed 0, the settings of --tiny), and after
0, 10, 20, 30 and 40 updates, from the same weights, prompts and noise, the three gradients of one update:
plain, --sam with the full second rollout, --sam with the window. Printed are, for each method and radius, the
lowest and the highest cosine

    of the two updates         full . window
    of the two corrections     (full - plain) . (window - plain)

A window leaves out what the moved weights do to the steps before the first one with gradient. Where all steps
carry a gradient, as in AlignProp with K = T, the two are the same update.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rsaft  # noqa: E402, found through the line above
from update import update_gradient  # noqa: E402

RADII, MEASURED_AT = (0.01, 0.1, 0.5), (0, 10, 20, 30, 40)


def cosines(method):
    """{radius: [(cosine of the updates, cosine of the corrections) at each point of the training]}."""
    settings = rsaft.check(rsaft.parse(["--tiny", "--device", "cpu", "--method", method, "--eval-reward"]))
    model, scores, prompts, _ = rsaft.load(settings)
    params = model.add_adapter(settings.rank, rsaft.named_generator(settings.seed, "lora"))
    optimizer = torch.optim.AdamW(params, lr=settings.learning_rate, weight_decay=settings.weight_decay,
                                  maximize=True)

    def gradient(step, rho_w=0.0, window=False):
        update_gradient(settings, model, scores.total, prompts, params, step, rho_w=rho_w,
                        reuse_starts=window)
        return torch.cat([p.grad.flatten() for p in params])

    measured = {rho_w: [] for rho_w in RADII}
    for step in range(MEASURED_AT[-1] + 1):
        if step in MEASURED_AT:
            plain = gradient(step)
            for rho_w, pairs in measured.items():
                full, window = gradient(step, rho_w), gradient(step, rho_w, window=True)
                pairs.append((F.cosine_similarity(full, window, dim=0).item(),
                              F.cosine_similarity(full - plain, window - plain, dim=0).item()))
        gradient(step)
        torch.nn.utils.clip_grad_norm_(params, settings.max_grad_norm)
        optimizer.step()
    return measured


def main():
    rows = []
    for method in rsaft.METHODS:
        for rho_w, pairs in cosines(method).items():
            columns = ["{:.3f} to {:.3f}".format(min(column), max(column)) for column in zip(*pairs)]
            rows.append(f"| `{method}` | {rho_w} | {columns[0]} | {columns[1]} |")
    print("\n| method | rho_w | cosine of the updates | cosine of the corrections |\n" + "| --- " * 4 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
