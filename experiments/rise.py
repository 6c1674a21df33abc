"""Does every method raise its training reward, plain and with each perturbation? `python experiments/rise.py`

20 short runs on the small world with one seed, about five minutes on 2 CPU cores. Prints the training reward
(pickscore) of the fixed evaluation pictures before and after each, and ends with exit code 1 unless all have
risen. This shows that the gradients point uphill, not that one method is better than another: the runs are
short and there is one seed.
"""
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rsaft  # noqa: E402, found through the line above

SETTINGS = ["--tiny", "--reward", "pickscore", "--sampling-steps", "6", "--batch-size", "16", "--train-steps",
            "14", "--eval-every", "14", "--eval-images", "72", "--learning-rate", "4e-3", "--eval-reward"]
PERTURBATIONS = {"plain": [], "noise": ["--noise"], "sam": ["--sam"], "both": ["--noise", "--sam"]}


def main():
    """Run all and return the exit code."""
    fell = []
    for method in rsaft.METHODS:
        for name, flags in PERTURBATIONS.items():
            with tempfile.TemporaryDirectory() as out:
                errors = io.StringIO()
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
                    code = rsaft.main([*SETTINGS, *flags, "--method", method, "--out", out])
                if code:
                    print(errors.getvalue())
                    return code
                log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
            before, after = [record["pickscore"] for record in log if "eval" in record]
            print(f"{method:>10} {name:>6}: {before:.3f} to {after:.3f}, {after - before:+.3f}", flush=True)
            if not after > before:
                fell.append(f"{method} {name}")
    print(f"not risen: {', '.join(fell)}" if fell else "all have risen")
    return 1 if fell else 0


if __name__ == "__main__":
    sys.exit(main())
