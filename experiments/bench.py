"""What an update costs: RSA-FT's variants beside plain fine-tuning, diffusers' own sampling, and TRL.

    python experiments/bench.py --trl trl/bin/python        # the small world; 20 minutes on 2 CPU cores
    python experiments/bench.py --growth                    # how time grows with batch, steps, processes
    python experiments/bench.py --size sd15 --models full --batch-size 32 --micro-batch-size 4    # for a GPU

Sizes other than tiny are the models of full_size.py in the folder --models. DRaFT-1 in 50 sampling steps,
rank 4, the same model, prompts, batch, guidance and reward for all; flags that aren't this program's go to
rsaft.py. The first row is what nobody can avoid: diffusers draws and decodes as many pictures, and neither
scores nor learns. Each row is a process of its own, so that its peak memory is its own: on CUDA what torch
took there, elsewhere the process's. All rows are run in turn, --rounds times, so that a change in the
machine's speed meets all of them. Of each process the median over its updates counts, without the first one;
printed is the median over the rounds, and the range. An update's checkpoint is not in it.

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
ROWS = {"diffusers": ["diffusers"], "plain": [], "noise": ["--noise"], "sam, full": ["--sam"],
        "sam, window": ["--sam", *WINDOW], "both, full": BOTH, "both, window": [*BOTH, *WINDOW],
        "plain, micro-batch 1": ["--micro-batch-size", "1"],
        "TRL": ["trl"], "TRL, no checkpointing": ["trl", "off"]}
MODELS = {"tiny": None, "sd15": "stable-diffusion", "sdxl": "sdxl", "sd3": "sd3.5-medium",
          "flux": "flux.1-dev"}
GROWTH = [{f"{case} {n}": [*case.split(), str(n)] for n in numbers} for case, numbers in (
    ("--batch-size", (8, 32, 128, 256)), ("--sampling-steps", (10, 20, 50)),
    ("--sampling-steps 10 --grad-steps", (1, 2, 5, 10)))]
GROWTH.append({"1 process": [], "2 processes": ["2 processes"]})


def flags(options):
    """The command line of rsaft.py that all rows share."""
    size = ["--tiny"] if options.size == "tiny" else [
        "--model", str(Path(options.models, MODELS[options.size])), "--models", options.models,
        "--batch-size", "4", "--micro-batch-size", "4"]
    return [*size, "--sampling-steps", str(T), "--rank", "4", "--train-steps", str(options.updates),
            "--eval-every", "0", "--eval-reward", *options.more]


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
    program = [sys.executable, HERE / "rsaft.py"]
    if "2 processes" in row:
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", program[1]]
        row = [word for word in row if word != "2 processes"]
    with tempfile.TemporaryDirectory() as out:
        _, peak = child(*program, *flags(options), *row, "--out", out)
        log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    evaluations = [log[-1].get(f"network_evaluations_{kind}_gradient", 0) for kind in ("without", "with")]
    return [record["seconds"] for record in log], log[-1].get("peak_gb", peak), evaluations


def others(options, row):
    """The same of diffusers' sampling, or of TRL's trainer in its own environment."""
    python = options.trl if "trl" in row else sys.executable
    printed, peak = child(python, __file__, "--size", options.size, "--models", options.models,
                          "--updates", str(options.updates), "--as", *row, *options.more)
    seconds, peak_gb, evaluations = json.loads(printed.splitlines()[-1])
    return seconds, peak_gb or peak, evaluations


def as_diffusers(options):
    """A process of the first row: batches drawn by the model's own pipeline."""
    settings = rsaft.check(rsaft.parse(flags(options)))
    steps, scale, seconds = settings.sampling_steps, settings.guidance_scale, []
    model = rsaft.load_model(settings.model, steps, scale, settings.height, settings.width,
                             getattr(torch, settings.dtype), settings.device)
    prompts, on_gpu = rsaft.read_prompts(settings.prompts), settings.device.startswith("cuda")
    model.pipe.set_progress_bar_config(disable=True)
    for update in range(options.updates):
        drawn = rsaft.training_prompts(prompts, settings.seed, update, settings.batch_size)
        began = time.perf_counter()
        for batch in rsaft.micro_batches(drawn, (settings.seed, update), settings.sampling_batch_size):
            latents = batch.noise("xT", model.latent_shape).to(model.device, model.network.dtype)
            model.pipe(batch.prompts, num_inference_steps=steps, height=settings.height, width=settings.width,
                       output_type="pt", **model.pipeline_arguments(latents, scale))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak_gb = torch.cuda.max_memory_allocated() / 2 ** 30 if on_gpu else None
    print(json.dumps([seconds, peak_gb, [steps * model.branches * settings.batch_size, 0]]))


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
    if "off" in options.as_other:
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


def measure(options, rows):
    """{name: [seconds in each round], [peak GiB in each round], evaluations} of {name: what it adds}."""
    found = {name: ([], [], []) for name in rows}
    for number in range(options.rounds):
        for name, row in rows.items():
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            one = others if row[:1] in (["diffusers"], ["trl"]) else ours
            times, peak, evaluations = one(options, row)
            seconds, memory, counted = found[name]
            seconds.append(statistics.median(times[1:]))
            memory.append(peak)
            counted[:] = evaluations
    return found


def print_prices(options):
    found = measure(options, {name: row for name, row in ROWS.items() if options.trl or "TRL" not in name})
    plain, drawing = found["plain"], found["diffusers"][0]
    print("| | diffusers' sampling = 1 | range | plain = 1 | memory, plain = 1 | seconds | peak GiB | "
          "network evaluations without, with gradient |\n" + "| --- " * 8 + "|")
    for name, (seconds, memory, counted) in found.items():
        times = [a / b for a, b in zip(seconds, drawing)]
        over_plain = statistics.median([a / b for a, b in zip(seconds, plain[0])])
        peak, base = statistics.median(memory), statistics.median(plain[1])
        print(f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} to {max(times):.2f} | "
              f"{over_plain:.2f} | {peak / base:.2f} | {statistics.median(seconds):.2f} | {peak:.2f} | "
              f"{', '.join(map(str, counted))} |")
    if not options.trl:
        print("\nTRL: not run, --trl needs the python of an environment with it; --help gives the commands")


def print_growth(options):
    """Each case's time over that of the first of its kind, and what the count of evaluations says."""
    found = measure(options, {name: row for rows in GROWTH for name, row in rows.items()})
    print("| | updates a minute | time, the first of its kind = 1 | by network evaluations |\n"
          + "| --- " * 4 + "|")
    for rows in GROWTH:
        first = None
        for name in rows:
            times, _, (without, with_gradient) = found[name]
            seconds = statistics.median(times)
            # With a gradient an evaluation counts three times: the backward pass costs two forward ones.
            work = (without + 3 * with_gradient) / (2 if name == "2 processes" else 1)
            first = first or (seconds, work)
            print(f"| {name} | {60 / seconds:.1f} | {seconds / first[0]:.2f} | {work / first[1]:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=MODELS, default="tiny")
    parser.add_argument("--models", default="full", help="the folder that full_size.py made")
    parser.add_argument("--trl", help="the python of an environment with TRL")
    parser.add_argument("--growth", action="store_true", help="how time grows, instead of the rows")
    parser.add_argument("--updates", type=int, default=4, help="of each process; the first doesn't count")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--as", nargs="+", dest="as_other", help=argparse.SUPPRESS)
    options, options.more = parser.parse_known_args()
    if options.as_other:
        return as_diffusers(options) if options.as_other == ["diffusers"] else as_trl(options)
    print(f"{machine()}; --size {options.size}, {options.rounds} rounds of {options.updates} updates\n")
    (print_growth if options.growth else print_prices)(options)


if __name__ == "__main__":
    main()
