"""What an update costs: seconds and peak memory, RSA-FT's variants beside plain fine-tuning and beside TRL.

    python experiments/bench.py --trl trl/bin/python        # the small world; 12 minutes on 2 CPU cores
    python experiments/bench.py --size sd15 --models full   # Stable Diffusion 1.5 of full_size.py: for a GPU

DRaFT-1 in 50 sampling steps, rank 4, the same model, prompts, batch, guidance and reward for all. Each row is
a process of its own, so that its peak memory is its own: on CUDA what torch took there, elsewhere the
process's. All rows are run in turn, --rounds times, so that a change in the machine's speed meets all of
them. Of each process the median over its updates counts, without the first one; printed is the median over
the rounds, and the range.

TRL's AlignPropTrainer (trl 0.23.1 is the last release that has it) needs an environment of its own:

    python -m venv trl
    trl/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
    trl/bin/pip install peft==0.21.2 accelerate==1.15.0 trl==0.23.1

It runs with eta 0 and without mixed precision, as rsaft.py does; its LoRA rank is 4, which can't be set. It
checkpoints the gradient of the UNet, which its configuration can't turn off either: a second row does that
from outside.
"""
import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import rsaft  # noqa: E402, found through the line above

T, BOTH, WINDOW = 50, ["--sam", "--noise"], ["--sam-rollout", "window"]
ROWS = {"plain": [], "noise": ["--noise"], "sam, full": ["--sam"], "sam, window": ["--sam", *WINDOW],
        "both, full": BOTH, "both, window": [*BOTH, *WINDOW], "TRL": ["trl"],
        "TRL, no checkpointing": ["trl", "off"]}


def flags(options):
    """The command line of rsaft.py that all rows share."""
    size = ["--tiny"] if options.size == "tiny" else [
        "--model", str(Path(options.models, "stable-diffusion")), "--models", options.models,
        "--batch-size", "4", "--micro-batch-size", "4"]
    return [*size, "--sampling-steps", str(T), "--rank", "4", "--train-steps", str(options.updates),
            "--eval-every", "0", "--eval-reward"]


def child(*command):
    """Run a command as a process of its own. Returns what it printed, and its peak memory in GiB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return printed, usage.ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def ours(options, row):
    """One run of rsaft.py. Returns (seconds of each update, peak GiB, network evaluations of the last)."""
    with tempfile.TemporaryDirectory() as out:
        _, peak = child(sys.executable, HERE / "rsaft.py", *flags(options), *ROWS[row], "--out", out)
        log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    evaluations = [log[-1][f"network_evaluations_{kind}_gradient"] for kind in ("without", "with")]
    return [record["seconds"] for record in log], log[-1].get("peak_gb", peak), evaluations


def trl(options, row):
    """The same of TRL's trainer, in its own environment."""
    printed, peak = child(options.trl, __file__, "--size", options.size, "--models", options.models,
                          "--updates", str(options.updates), "--as-trl", row)
    seconds, peak_gb, evaluations = json.loads(printed.splitlines()[-1])
    return seconds, peak_gb or peak, evaluations


def as_trl(options):
    """What runs in TRL's environment: the trainer, update by update."""
    import accelerate
    accelerate.PartialState()  # trap: its pipeline logs before the trainer makes this
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
    settings = rsaft.parse(flags(options))
    prompts, evaluations = iter(rsaft.read_prompts(settings.prompts) * 100), [0, 0]
    device = next(d for d in ("cuda", "mps", "cpu") if getattr(torch, d).is_available())
    reward = rsaft.make_reward(settings.reward[0], settings.models, device)
    micro_batch_size = settings.micro_batch_size or settings.batch_size
    config = AlignPropConfig(
        sample_num_steps=T, sample_eta=0.0, sample_guidance_scale=settings.guidance_scale,
        mixed_precision="no", allow_tf32=False, save_freq=10 ** 9, train_batch_size=micro_batch_size,
        train_gradient_accumulation_steps=settings.batch_size // micro_batch_size,
        train_learning_rate=settings.learning_rate, train_max_grad_norm=settings.max_grad_norm,
        truncated_backprop_rand=False, truncated_backprop_timestep=T - 1)
    pipeline = DefaultDDPOStableDiffusionPipeline(settings.model, use_lora=True)
    if ROWS[options.as_trl][-1] == "off":
        pipeline.rgb_with_grad = functools.partial(pipeline.rgb_with_grad, gradient_checkpoint=False)
    trainer = AlignPropTrainer(config, lambda images, prompts, _: (reward(images, prompts), {}),
                               lambda: (next(prompts), {}), pipeline)

    def count(unet, inputs):
        evaluations[torch.is_grad_enabled()] += len(inputs[0])

    pipeline.unet.register_forward_pre_hook(count)
    before, seconds = [p.detach().clone() for p in trainer.trainable_layers], []
    for update in range(options.updates):
        evaluations[:] = 0, 0
        began = time.perf_counter()
        trainer.step(update, update)
        seconds.append(time.perf_counter() - began)
    assert not any(map(torch.equal, before, trainer.trainable_layers)), "TRL trained nothing"
    peak_gb = torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else None
    print(json.dumps([seconds, peak_gb, evaluations]))


def machine():
    """The machine in words."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                     if line.startswith("model name")), name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, {os.cpu_count()} cores, {gpu}, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "sd15"], default="tiny")
    parser.add_argument("--models", default="full", help="for sd15: the folder that full_size.py made")
    parser.add_argument("--trl", help="the python of an environment with TRL")
    parser.add_argument("--updates", type=int, default=4, help="of each process; the first doesn't count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--as-trl", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_trl:
        return as_trl(options)

    rows = [row for row in ROWS if options.trl or "TRL" not in row]
    seconds, memory, evaluations = {row: [] for row in rows}, {row: [] for row in rows}, {}
    for number in range(options.rounds):
        for row in rows:
            print(f"round {number + 1} of {options.rounds}: {row}", file=sys.stderr, flush=True)
            times, peak, evaluations[row] = (trl if "TRL" in row else ours)(options, row)
            seconds[row].append(statistics.median(times[1:]))
            memory[row].append(peak)

    plain = seconds["plain"]
    print(f"{machine()}; --size {options.size}, {options.rounds} rounds of {options.updates} updates\n")
    print("| | seconds, plain = 1 | range | memory, plain = 1 | seconds an update | peak GiB | network "
          "evaluations without, with gradient |\n" + "| --- " * 7 + "|")
    for row in rows:
        ratios = [a / b for a, b in zip(seconds[row], plain)]
        peak, base = statistics.median(memory[row]), statistics.median(memory["plain"])
        print(f"| {row} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | "
              f"{peak / base:.2f} | {statistics.median(seconds[row]):.2f} | {peak:.2f} | "
              f"{', '.join(map(str, evaluations[row]))} |")
    if not options.trl:
        print("\nTRL: not run, --trl needs the python of an environment with it; --help gives the commands")


if __name__ == "__main__":
    main()
