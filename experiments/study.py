"""Is the picture truly better at the same training reward? The claim of RSA-FT, tested in the small world.

    pip install -r experiments/requirements.txt
    python experiments/study.py             # everything, about 16 hours on 2 CPU cores; or part by part:
    python experiments/study.py --part primary
    python experiments/study.py --report    # no runs: tables and figures from what study.csv has
    python experiments/study.py --quick     # the same in small, in a temporary folder: does it still work?

Every run is a command line, of rsaft.py but for PROGRAMS, so any row of study.csv can be made again by hand,
on one machine bit for bit ("gaussian" but for rounding: the runs there summed in another order). A study that
was killed goes on when its command is repeated: a run whose rows are in study.csv is not run again. What is
in the tables below was written down before the reported runs: parts, seeds, radii, rates, levels, measures.
(The levels of "brittle" while they ran, unseen; those of "breadth", which are the primary's, when its pilot
and two of its own runs had been seen; that "twice as long" is compared at equal proxy too with its runs
there. "again" and what follows it were added when the parts above were there.) They stand in the order of
importance.

THE PRIMARY COMPARISON is RSA-FT with both perturbations minus plain DRaFT-1 in the part "primary", at equal
proxy, at its first level: the judge's score and the oracle's accuracy, 16 paired seeds. A second hypothesis,
since an earlier prototype showed it unasked, is tried in the part "fast": RSA-FT steadies the run, so that
fewer runs fall back from their best judge score, and the last ones lie closer together. All else is
secondary, and the report says how many intervals it prints: one in twenty of them misses the truth by chance
alone.

Words. The proxy is the reward that is trained on (pickscore). The judge is a held-out network. The oracle
compares each picture with renderings of its caption: the share of right ones and an error. S1 is of what the
run itself trains on, so where that is a mean or has a cap it is another quantity. A pair is two runs with the
same seed: the same noise, prompts in the same order, the same initial adapter. Equal proxy: each run's
measures, interpolated linearly to where its proxy first reaches a level, the base model's plus one of the
part's `gains`; pairs in which a run never does are left out and counted. Equal network evaluations, equal
updates: as many as the shorter run of the pair has. Equal price: the same, where a network evaluation with a
gradient counts GRADIENT_PRICE times (not kept of older runs). Intervals are 95 percent: Student's t over the
pairs, for shares Wilson's, for ratios of standard deviations the percentiles of a bootstrap over the seeds,
for correlations Fisher's z.
"""
import argparse
import contextlib
import csv
import functools
import io
import json
import math
import multiprocessing
import shutil
import signal
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import stats

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / name) for name in ("", "tiny", "related")]
import averaged  # noqa: E402, beside this file, or found through the line above, as the next five are
import crd  # noqa: E402
import gdro  # noqa: E402
import random_directions  # noqa: E402
import rsaft  # noqa: E402
import world  # noqa: E402

study_rewards = rsaft.import_file(HERE / "study_rewards.py")    # the module that runs get by FILE.py:FUNCTION


# ---- What is run: all of it fixed before the reported runs -------------------------------------------------

# Rates and levels are from the pilots: at STABLE plain runs rise to the end, at FAST they tend to fall back,
# and the first level of "primary" and of "fast" is one that all pilot runs at that rate reach. (The seeds 200
# to 205 were to be reported first, with a higher level; half of their runs at FAST never got there, so they
# became a pilot.) Radii: from an earlier prototype of this world with other models, where 0.1 changed the
# runs and 1 kept them from learning. The number of seeds, updates and parts: what fits into a night.
SLOW, STABLE, FAST = "2e-3", "4e-3", "8e-3"
RHO, RHO_W = 0.1, 0.1
UPDATES, EVAL_EVERY, PICTURES = 60, 10, 144            # 144 pictures: two of each of the 72 captions
FALL_BACK = 0.5          # a run has fallen back if its last judge score is further than this below its best
HACKED = 0.05            # a run is hacked if its last oracle accuracy is further than this below its best
SCALES = (0.25, 0.5, 0.75)                             # of the adapter, after training
CAPS = (26, 27, 28)                                    # of the proxy, where one has a cap
# The price of a network evaluation with a gradient, one without = 1. From the times of an update in
# experiments/README.md, "How time grows": a straight line through those by K and one through those by T.
GRADIENT_PRICE = 2.4

WORDS = "{here}/../tiny/words"
WORDS_HELD_OUT = f"ocr_v4 {WORDS}/world.py:oracle_accuracy {WORDS}/world.py:oracle_correlation"
FLOOR = ("--reward {here}/../rewards/ocr_likelihood.py:ocr_floor --eval-reward "
         f"{WORDS_HELD_OUT} ocr_likelihood")
SETTINGS = ["--tiny", "--reward", "pickscore", "--eval-every", str(EVAL_EVERY), "--eval-images",
            str(PICTURES), "--train-steps", str(UPDATES), "--eval-reward",
            f"{HERE / 'study_rewards.py'}:judge", *rsaft.TINY["eval_reward"][1:]]    # --tiny's judge, watched

# At the paper's radii of 0.01 this reward falls by 1.5 percent (noise) and 0.3 percent (sam). A full-size one
# falls by about 0.3 percent under noise, by a rough estimate, as this one does at 0.002.
CONFIGURATIONS = {
    "plain": "", "noise": f"--noise {RHO}", "sam": f"--sam {RHO_W}", "both": f"--noise {RHO} --sam {RHO_W}",
    **{f"noise {rho}": f"--noise {rho}" for rho in (0.002, 0.01, 0.03, 0.3)},
    **{f"sam {rho}": f"--sam {rho}" for rho in (0.01, 0.03, 0.5)},
    "both 0.01": "--noise 0.01 --sam 0.01",            # the paper's radii
    "gaussian": f"--noise {RHO}", "window": f"--sam {RHO_W} --sam-rollout window",
    "two proxies": "--models {worlds}/second --reward pickscore=0.5 {here}/study_rewards.py:second=0.5",
    "twice as long": "", "gdro": "", "crd": "", "crd old": "--sampler old",      # guard 1 switched off
    "both window": f"--noise {RHO} --sam {RHO_W} --sam-rollout window", "alignprop": "", "averaged": "",
    "alignprop noise": f"--noise {RHO}",
    # The proxy up to a cap is trained on; the proxy itself is measured, as a held-out score.
    **{f"capped {cap}": f"--reward {{here}}/study_rewards.py:capped_{cap} --eval-reward "
       f"{' '.join(SETTINGS[-3:])} pickscore" for cap in CAPS},
    "3 steps": "--grad-steps 3", "10 steps": "--grad-steps 10",
    # Of words: the likelihood with its shape repaired is trained on, the likelihood is measured.
    "floor": FLOOR, "floor 10 steps": f"{FLOOR} --grad-steps 10",
    "floor 10 steps noise": f"{FLOOR} --grad-steps 10 --noise 0.1",
    "window 0.03": "--sam 0.03 --sam-rollout window",
    **{f"both window {rho}": f"--noise {rho} --sam {rho} --sam-rollout window" for rho in (0.03, 0.01)},
}
# Times UPDATES; gdro's and crd's are their own defaults.
LONGER = {"twice as long": 2, "gdro": 5 / 3, "crd": 5 / 2, "crd old": 5 / 2}
# GDRO's and CRD's are their defaults with --tiny.
OWN_RATE = {"twice as long": SLOW, "gdro": "2e-3", "crd": "4e-3", "crd old": "4e-3"}
OWN_METHOD = dict.fromkeys(("alignprop", "alignprop noise"), "alignprop")     # the others have their part's
# All others are runs of rsaft.py.
PROGRAMS = {"gdro": gdro, "crd": crd, "crd old": crd, "gaussian": random_directions, "averaged": averaged}
TWO, FOUR = ("plain", "both"), ("plain", "noise", "sam", "both")


@dataclass(frozen=True)
class World:
    """What the runs of a world have in common."""
    flags: str = ""
    longer: float = 1                   # times UPDATES
    often: int = 1                      # times as many evaluations
    pictures: float = 1                 # times PICTURES
    proxy: str = "pickscore"            # which score is the study's proxy, which one its judge
    judge: str = "judge"
    embedded: bool = True               # has the embeddings that diversity and KID need


WORLDS = {
    "tiny": World(), "again": World(), "often": World(longer=4 / 3, often=2),     # all three are one world
    "strong": World("--model {worlds}/strong/stable-diffusion"),
    "brittle": World("--models {worlds}/brittle"), "unguided": World("--guidance-scale 1"),
    "flow": World("--model {here}/../tiny/stable-diffusion-3 --rank 32"),
    "words": World(f"--model {WORDS} --prompts {WORDS}/prompts.txt --reward ocr_likelihood --eval-reward "
                   f"{WORDS_HELD_OUT}", longer=2 / 3, pictures=5 / 3,      # four of each of its 60 captions
                   proxy="ocr_likelihood", judge="ocr_v4", embedded=False)}


@dataclass(frozen=True)
class Part:
    """Runs: the product of methods, seeds and configurations. Each is compared with its seed's plain one."""
    question: str
    hours: float                        # on 2 CPU cores, estimated from the pilots; parts share runs
    gains: tuple                        # of the proxy over the base model's, for equal proxy
    seeds: range
    configurations: tuple = FOUR
    rate: str = STABLE
    methods: tuple = ("draft",)
    world: str = "tiny"

    def jobs(self):
        """All runs of a method's seed before the next seed's: what is there at any time is in pairs."""
        return [self.job(*choice) for choice in product(self.methods, self.seeds, self.configurations)]

    def job(self, method, seed, configuration):
        return Job(self.world, OWN_METHOD.get(configuration, method),
                   OWN_RATE.get(configuration, self.rate), seed, configuration)


PARTS = {  # nothing was chosen on these seeds
    "primary": Part("Is the picture truly better at the same reward?", 2.0, (2.0, 3.0), range(206, 222)),
    "fast": Part("And at twice the rate, where plain runs tend to fall back: is RSA-FT steadier?", 2.0,
                 (1.0, 2.0), range(206, 222), rate=FAST),
    "rivals": Part("Is it better than what costs less, or than half the rate for as long as it takes?", 0.6,
                   (2.0,), range(206, 214), ("plain", "both", "two proxies", "twice as long")),
    "radius": Part("Which radius? Worst case or Gaussian, full or window?", 2.3, (2.0, 3.0), range(206, 214),
                   (*FOUR, "noise 0.002", "noise 0.01", "noise 0.3", "sam 0.01", "sam 0.03", "sam 0.5",
                    "both 0.01", "gaussian", "window")),
    "strong": Part("Where the base model draws all right, so that all gain is hacking?", 0.7, (0.25, 0.4),
                   range(400, 408), TWO, world="strong"),
    "brittle": Part("With a proxy that saw four pictures of each caption?", 0.6, (1.0, 1.5), range(400, 408),
                    TWO, world="brittle"),
    "breadth": Part("With the other four methods?", 2.0, (2.0, 3.0), range(300, 304),
                    methods=("draft-lv", "alignprop", "refl", "drtune")),
    "gdro": Part("Than GDRO?", 0.4, (0.25,), range(206, 214), ("plain", "both", "gdro")),
    "crd": Part("Than CRD, in its own way of sampling, without guidance?", 0.8, (3.0, 4.0), range(206, 214),
                ("plain", "both", "crd", "crd old"), world="unguided"),
}
# On the machine that "fast" was run on, the same to the bit. Another processor, or another instruction set on
# the same one (ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2), rounds sums
# differently.
PARTS["again"] = replace(PARTS["fast"], world="again",
                         question="The runs of fast once more, rounded differently: how far does that carry?")
# For the alarm, whose rule and threshold were fixed before; evaluated twice as often.
PARTS["alarm"] = replace(PARTS["primary"], world="often", seeds=range(500, 516), configurations=TWO,
                         hours=1.0, question="What does the alarm catch, and what is it worth to stop there?")
PARTS["alarm-fast"] = replace(PARTS["alarm"], rate=FAST, gains=PARTS["fast"].gains,
                              question="And at twice the rate, where runs break?")
# Decided before it was run: the levels are the primary's, the cap is from pilots. "alignprop noise" was added
# when the others were there.
PARTS["price"] = replace(PARTS["primary"], seeds=range(600, 616), hours=2.0,
                         configurations=("plain", "noise", "both window", "alignprop", "alignprop noise",
                                         f"capped {CAPS[1]}", "averaged"),
                         question="What should somebody use, at one price?")
# Rate and levels are from its pilots: at 4e-3 all four gained 0.8 or more, at 8e-3 plain fell back in the
# judge's eyes, at 2e-3 plain gained 0.5 (the other two pilots there were still to come).
PARTS["flow"] = Part("Does it hold on flow matching?", 0.5, (0.5, 0.75), range(700, 712),
                     ("plain", "noise", "both"), world="flow")
# Decided before it is run: at 2e-3 the likelihood was hacked in the pilots with K = 1, the cheapest, and with
# K = 10, where the floor gained. The primary comparison is "noise 0.03" minus plain at the first level, in
# the letters that the second reader reads. At 0.03 the likelihood falls by 5 to 10 percent, at 0.1 the floor
# does; 0.01 is the paper's.
PARTS["words"] = Part("Does it hold words legible? Is the reward too sharp, or of a wrong shape?", 9.5,
                      (0.2, 0.35), range(800, 812), ("plain", "noise 0.03", "window 0.03", "both window 0.03",
                                                     "both window 0.01", "10 steps", "floor 10 steps",
                                                     "floor 10 steps noise"), rate="2e-3", world="words")
LEFT_OUT = ("again", "words")     # of what is run without --part: done twice; needs rewards/requirements.txt
PILOTS = {  # what rates and gains were chosen from
    **{f"pilot-{rate}": replace(PARTS["primary"], seeds=range(100, 102), configurations=TWO, rate=rate,
                                hours=0.2) for rate in (STABLE, FAST, SLOW)},
    "pilot-fast-200": replace(PARTS["fast"], seeds=range(200, 206), hours=0.8),
    **{f"pilot-{name}": replace(PARTS[name], seeds=range(100, 101), configurations=TWO, hours=0.2)
       for name in ("strong", "brittle", "breadth")},
    "pilot-capped": replace(PARTS["primary"], seeds=range(100, 102), hours=0.3,
                            configurations=("plain", *(f"capped {cap}" for cap in CAPS))),
    **{f"pilot-flow-{rate}": replace(PARTS["primary"], world="flow", rate=rate, seeds=range(100, 102),
                                     configurations=TWO, hours=0.2) for rate in (SLOW, STABLE, FAST)},
    **{f"pilot-words-{rate}": replace(PARTS["words"], seeds=range(100, 101), rate=rate, hours=hours,
                                      configurations=configurations) for rate, hours, configurations in (
        ("1e-3", 0.6, ("plain", "3 steps", "10 steps", "floor", "floor 10 steps")),
        ("2e-3", 0.4, ("plain", "10 steps", "floor 10 steps")), ("5e-4", 0.2, ("plain",)))},
    "pilot-crd": replace(PARTS["crd"], seeds=range(100, 101), configurations=TWO, hours=0.1),
}
# What else is compared in a part than each with plain: a title, which configurations, minus which one.
AGAINST = {"crd": [("Guard 1, acting minus switched off", ["crd"], "crd old")],
           "price": [("Plain AlignProp minus DRaFT-1 with noise", ["alignprop"], "noise"),
                     ("AlignProp with noise minus plain", ["alignprop noise"], "alignprop")],
           "words": [("The floor through all steps minus the likelihood through all steps",
                      ["floor 10 steps", "floor 10 steps noise"], "10 steps")]}
AXES = {"proxy": "proxy +{}", "network_evaluations": "network evaluations", "price": "price",
        "step": "updates"}
MEASURES = {"judge": "judge", "oracle_accuracy": "oracle accuracy", "oracle_rmse": "oracle error", "s1": "S1",
            "diversity": "diversity", "kid": "KID"}
COMPARED = {"proxy": "proxy", **MEASURES, "step": "updates"}
COLUMNS = ("world", "method", "configuration", "learning_rate", "seed", "step", "network_evaluations",
           "price", "proxy", *MEASURES, "seconds", "alarm")


def split_flags(text, worlds):
    """The flags of WORLDS or CONFIGURATIONS; `worlds` is the folder of the worlds that only the study has."""
    return [word.format(worlds=worlds, here=HERE) for word in text.split()]


@dataclass(frozen=True)
class Job:
    """One run. Its fields are columns of study.csv."""
    world: str
    method: str
    learning_rate: str
    seed: int
    configuration: str

    @property
    def program(self):
        """The module whose `main` does it, and whose `parse` has its settings."""
        return PROGRAMS.get(self.configuration, rsaft)

    def flags(self, settings, worlds):
        """The command line; what stands later wins."""
        own = split_flags(f"{WORLDS[self.world].flags} {CONFIGURATIONS[self.configuration]}", worlds)
        own += ["--method", self.method] if self.program is rsaft else []
        steps, every, pictures = self.budget(settings)
        return [*settings, "--learning-rate", self.learning_rate, "--seed", str(self.seed), "--train-steps",
                str(steps), "--eval-every", str(every), "--eval-images", str(pictures), *own]

    @property
    def longer(self):
        return LONGER.get(self.configuration, WORLDS[self.world].longer)

    def budget(self, settings):
        """Updates, how many between evaluations, and the pictures of one."""
        base, own = rsaft.parse(settings), WORLDS[self.world]
        return (round(self.longer * base.train_steps), base.eval_every // own.often,
                round(own.pictures * base.eval_images))

    @property
    def work(self):
        """Roughly, in plain runs: the second rollout of sam costs one more."""
        flags = CONFIGURATIONS[self.configuration]
        return round((1 + ("--sam" in flags and "window" not in flags)) * self.longer)


def jobs_of(parts):
    """The runs of {name: Part}, in order; those that parts share, once."""
    return list(dict.fromkeys(job for part in parts.values() for job in part.jobs()))


# ---- The worlds that only the study has --------------------------------------------------------------------

@contextlib.contextmanager
def quiet():
    """Inside the with block prints are kept, not shown; what went to stderr is yielded."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        yield errors


def build_world(name, folder, steps=None):
    """Make a folder of models, with `steps` in fewer training steps.

    strong: a base model trained to the end; brittle: a proxy that saw few pictures; second: a second proxy,
    the first one's recipe and another seed, beside the first.
    """
    import build
    partial, tiny = Path(folder, f"{name}.partial"), build.HERE
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with quiet():
        if name == "strong":
            build.build_unet(partial / "stable-diffusion", tiny / "stable-diffusion" / "vae",
                             steps or build.UNET_STEPS)
        else:
            shutil.copytree(tiny / "judge", partial / "judge")
        if name == "brittle":
            build.build_clip(partial / "pickscore", name, seed=0, steps=steps or 2000, pictures=4)
        if name == "second":
            shutil.copytree(tiny / "pickscore", partial / "pickscore")
            build.build_clip(partial / "second", name, seed=4, steps=steps or 2000)
    partial.rename(Path(folder, name))


# ---- One run, measured -------------------------------------------------------------------------------------

def load_watched(flags):
    """What rsaft.load makes of a command line, with no embeddings but of the picture it is tried out with."""
    study_rewards.EMBEDDINGS.clear()
    with quiet():
        return rsaft.load(rsaft.check(rsaft.parse([*flags, "--device", "cpu"])))


@functools.cache
def base_embeddings(flags):
    """Of as many pictures of the base model as an evaluation has, with the same prompts and other noise."""
    count = rsaft.parse(flags).eval_images
    load_watched([*flags, "--eval-images", str(2 * count)]).evaluation()
    return torch.cat(study_rewards.EMBEDDINGS)[-count:]


def measured(job, settings, evaluations, base):
    """Rows from evaluations as rsaft.py logs them, with `seconds`, and from the embeddings that they left.

    base: embeddings of pictures of the base model, None where the world has none.
    """
    named, rows = WORLDS[job.world], []
    for scores in evaluations:
        row = {"alarm": None, "diversity": math.nan, "kid": math.nan, **scores,
               "proxy": scores[named.proxy], "judge": scores[named.judge]}
        # The oracle of the words has a correlation; the error is what is missing to 1.
        row.setdefault("oracle_rmse", 1 - scores.get("oracle_correlation", math.nan))
        rows.append(row)
    if base is None:
        return rows
    prompts = torch.arange(len(base)) % len(rsaft.read_prompts(settings.eval_prompts or settings.prompts))
    # Before them are those of the random picture with which the judge was tried out, once per prompt.
    pictures = torch.cat(study_rewards.EMBEDDINGS)[-len(base) * len(evaluations):]
    return [{**row, "diversity": diversity(x, prompts), "kid": kid(x, base, prompts)}
            for row, x in zip(rows, pictures.split(len(base)), strict=True)]


def scaled_evaluations(flags, folder):
    """Scores without S1, {name: mean}, of the base model, then of the adapter in `folder` at all SCALES."""
    loaded, saved, evaluations = load_watched(flags), load_file(Path(folder, rsaft.ADAPTER)), []
    loaded.model.add_adapter(rsaft.parse(flags).rank, None)
    loaded.evaluation.s1_radius = None
    for scale in 0.0, *SCALES:
        with torch.no_grad():
            for name, p in loaded.model.adapter().items():      # its change of the weights is linear in B
                p.copy_(scale * saved[name] if ".lora_B." in name else saved[name])
        values, _ = loaded.evaluation()
        evaluations.append({name: value.mean().item() for name, value in values.items()})
    return evaluations


def perform(job, settings, worlds, out):
    """Do a run in the folder `out`. Returns {configuration: its rows}. Raises RuntimeError.

    After a plain DRaFT-1 run in `tiny` its adapter is also judged at the other SCALES, as the configuration
    "scaled" (by hand: tools/evaluate.py --lora-scale); the step of such a row is the scale's share of the
    updates, and the run's own last row completes them.
    """
    study_rewards.WORLDS = worlds
    flags = job.flags(settings, worlds)
    parsed = job.program.parse(flags)
    of_world = *settings, *split_flags(WORLDS[job.world].flags, worlds)
    base = base_embeddings(of_world) if WORLDS[job.world].embedded else None
    drawn = 0
    if job.program is gdro:      # its pictures are drawn before the log begins, with guidance
        flags += ["--data", f"{out}/groups"]
        drawn = len(rsaft.read_prompts(parsed.prompts)) * parsed.pictures * 2 * parsed.sampling_steps
    spent = {"seconds": 0.0, "network_evaluations": drawn, "price": float(drawn)}
    study_rewards.EMBEDDINGS.clear()
    with quiet() as errors:
        code = job.program.main([*flags, "--device", "cpu", "--out", f"{out}/run"])
    if code:
        raise RuntimeError(errors.getvalue().strip()[-300:])
    evaluations = []
    for record in map(json.loads, Path(out, "run", "log.jsonl").read_text().splitlines()):
        spent["seconds"] += record.get("seconds", 0)
        free, dear = (record.get(f"network_evaluations_{kind}_gradient", 0) for kind in ("without", "with"))
        spent["network_evaluations"] += free + dear
        spent["price"] += free + GRADIENT_PRICE * dear
        if "eval" in record:
            evaluations.append({**record, **spent})
    rows = {job.configuration: measured(job, parsed, evaluations, base)}
    if (job.world, job.method, job.configuration) == ("tiny", "draft", "plain"):
        scores = scaled_evaluations(flags, f"{out}/run")
        scaled = [{**score, "step": round(scale * parsed.train_steps), **spent}
                  for scale, score in zip((0.0, *SCALES), scores, strict=True)]
        rows["scaled"] = [*measured(job, parsed, scaled, base), rows["plain"][-1]]
    return rows


def attempt(job, settings, worlds, scratch):
    """For a worker process: (job, what `perform` returns, None), or (job, {}, the error in a line)."""
    try:
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            return job, perform(job, settings, worlds, out), None
    except Exception as error:
        return job, {}, f"{job}: {type(error).__name__}: {error}"


# ---- All runs ----------------------------------------------------------------------------------------------

def read_rows(path):
    """{Job: its rows in order of step, with numbers}, from a CSV file that may not exist yet."""
    runs = {}
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                job = Job(row["world"], row["method"], row["learning_rate"], int(row["seed"]),
                          row["configuration"])
                numbers = {name: float(row[name] or "nan")
                           for name in ("price", "proxy", *MEASURES, "seconds")}
                numbers |= {name: int(row[name]) for name in ("step", "network_evaluations")}
                runs.setdefault(job, []).append({**numbers, "alarm": row["alarm"] or None})
    return runs


def write_rows(path, runs):
    """The whole file anew, in a fixed order: at no moment is half a run in it."""
    writer = csv.DictWriter(text := io.StringIO(), COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for job in sorted(runs, key=lambda job: tuple(vars(job).values())):
        for row in runs[job]:
            cells = {name: f"{value:.6g}".replace("nan", "") for name, value in row.items()
                     if isinstance(value, float)}
            writer.writerow({**row, **cells, **vars(job)})
    rsaft.write_atomic(path, text.getvalue().encode())


def start_worker():
    torch.set_num_threads(1)      # two processes share two cores, and the bits don't depend on their number


def run_parts(parts, settings, folder, workers=2, build_steps=None):
    """Do what is missing in the folder's study.csv. Returns the errors, a line each."""
    from tqdm import tqdm
    path, worlds, errors = folder / "study.csv", folder / "worlds", []
    runs = read_rows(path)
    missing = [job for job in jobs_of(parts) if job not in runs]
    if not missing:
        return errors
    needed = " ".join(word for job in missing for word in job.flags(settings, worlds))
    unbuilt = [name for name in ("strong", "brittle", "second") if f"{worlds / name}" in needed
               and not (worlds / name).exists()]
    # A fresh interpreter for each worker: torch's threads don't survive a fork. A killed one leaves files.
    with tempfile.TemporaryDirectory() as scratch, multiprocessing.get_context("spawn").Pool(
            workers, start_worker) as pool:
        if unbuilt:
            print(f"building {', '.join(unbuilt)}", flush=True)
            pool.starmap(build_world, [(name, worlds, build_steps) for name in unbuilt], chunksize=1)
        one = functools.partial(attempt, settings=settings, worlds=worlds, scratch=scratch)
        work = sum(job.work for job in missing)
        with tqdm(total=work, unit="run", smoothing=0, mininterval=10) as progress:
            for job, rows, error in pool.imap_unordered(one, missing):
                runs |= {replace(job, configuration=name): rows[name] for name in rows}
                write_rows(path, runs)
                errors += [error] if error else []
                progress.update(job.work)
        pool.close()
        pool.join()      # at the end of the block they would be terminated, semaphores in hand
    return errors


# ---- Statistics --------------------------------------------------------------------------------------------

def diversity(embeddings, prompts):
    """Mean distance between the embeddings, scaled to length 1, of two pictures of one prompt.

    embeddings: (N, D); prompts: (N,), equal numbers for equal prompts, at least one of them twice.
    """
    pairs = (prompts[:, None] == prompts).triu(1)
    unit = F.normalize(embeddings, dim=-1)
    return (unit[:, None] - unit).norm(dim=-1)[pairs].mean().item()


def kid(x, y, prompts):
    """KID (arXiv 1801.01401): the squared MMD of two sets of embeddings under the kernel (cosine + 1)^3.

    Unbiased: 0 on average for two sets from one model. No picture is compared with itself, and since every
    prompt has equally many pictures, unlike in a random draw, pairs of one prompt count as often as they
    would there: 1 in P. x, y: (N, D) each; prompts: (N,), the same for both sets, with equally many pictures
    of each of P prompts, at least two.
    """
    same, P = prompts[:, None] == prompts, len(prompts.unique())

    def mean(a, b, counted):
        kernel = (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T + 1) ** 3
        return kernel[counted].mean() / P + kernel[~same].mean() * (1 - 1 / P)

    others = same & ~torch.eye(len(x), dtype=torch.bool)
    return (mean(x, x, others) + mean(y, y, others) - 2 * mean(x, y, same)).item()


def at_level(proxy, values, level):
    """`values` interpolated linearly to where `proxy` first reaches `level`, or None. Lists by step."""
    for i, reached in enumerate(proxy):
        if reached >= level:
            if i == 0:
                return values[0]
            share = (level - proxy[i - 1]) / (reached - proxy[i - 1])
            return values[i - 1] + share * (values[i] - values[i - 1])
    return None


def mean_interval(values):
    """(mean, low, high): Student's t; no interval (nan) from less than two values."""
    if len(values) < 2:
        return (values or [math.nan])[0], math.nan, math.nan
    mean = statistics.mean(values)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def share_interval(k, n):
    """(k / n, low, high): Wilson's interval for a share."""
    return k / n, *stats.binomtest(k, n).proportion_ci(method="wilson")


def spread_interval(a, b):
    """(ratio of two paired samples' standard deviations, low, high): a bootstrap of 5 or more pairs."""
    a, b = numpy.array([a, b])
    again = numpy.random.default_rng(0).integers(len(a), size=(10_000, len(a)))
    with numpy.errstate(invalid="ignore", divide="ignore"):        # where all draws are one pair
        ratio, ratios = (x.std(-1, ddof=1) / y.std(-1, ddof=1) for x, y in ((a, b), (a[again], b[again])))
    return ratio, *(numpy.nanpercentile(ratios, (2.5, 97.5)) if len(a) >= 5 else (math.nan, math.nan))


def correlation_interval(x, y):
    """(Pearson's correlation, low, high): Fisher's z; nan where there is none, or from too few pairs."""
    if min(len(set(x)), len(set(y))) < 2 or len(x) < 4:
        return math.nan, math.nan, math.nan
    r = stats.pearsonr(x, y)
    return r.statistic, *r.confidence_interval()


def falls_back(judge, by=FALL_BACK):
    """Whether a run's last judge score is more than `by` below its best."""
    return max(judge) - judge[-1] > by


def alarm_verdict(rows):
    """What the alarm was worth in a run, a dict.

    hacked: the last oracle accuracy is more than HACKED below the best; broken: the judge fell back; early:
    how many updates before the end the alarm rang first, None if it didn't; gain: the oracle accuracy at the
    judge's best evaluation up to then minus the last one.
    """
    accuracy, judge = column(rows, "oracle_accuracy"), column(rows, "judge")
    verdict = {"hacked": max(accuracy) - accuracy[-1] > HACKED, "broken": falls_back(judge), "early": None}
    for i, row in enumerate(rows):
        if row["alarm"]:
            best = judge.index(max(judge[:i]))
            return verdict | {"early": rows[-1]["step"] - row["step"], "gain": accuracy[best] - accuracy[-1]}
    return verdict


# ---- What came out -----------------------------------------------------------------------------------------

def column(rows, name):
    return [row[name] for row in rows]


def outcome(rows, measure, gain=None):
    """A run's measure where its proxy has gained so much, None if it never does; without gain, at its end."""
    if gain is None:
        return rows[-1][measure]
    return at_level(column(rows, "proxy"), column(rows, measure), rows[0]["proxy"] + gain)


def at_equal(axis, gain, *pair):
    """Two runs' measures, {name: value}, at equal proxy, cost or updates; None if one lacks.

    Equal proxy is the base model's plus `gain`; of the others, as many as the shorter of the two runs has.
    """
    level = pair[0][0]["proxy"] + gain if axis == "proxy" else min(rows[-1][axis] for rows in pair)
    ends = [{name: at_level(column(rows, axis), column(rows, name), level) for name in COMPARED}
            for rows in pair]
    return None if None in (end["proxy"] for end in ends) else ends


def of_seeds(runs, part, configuration, method="draft"):
    """{seed: rows} of a part's finished runs."""
    jobs = {seed: part.job(method, seed, configuration) for seed in part.seeds}
    return {seed: runs[job] for seed, job in jobs.items() if job in runs}


def cell(estimate, low, high):
    """An estimate and its interval; the report counts the brackets."""
    return f"{estimate:+.4f} [{low:+.4f}, {high:+.4f}]".replace(" [+nan, +nan]", "").replace("+nan", "")


def table(header, rows):
    """Markdown."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows])


def subtracted(ends):
    """A cell for each measure: the mean of a's minus b's over those pairs (a, b) of dicts that have both."""
    return [cell(*mean_interval([a[name] - b[name] for a, b in ends if not math.isnan(a[name] - b[name])]))
            for name in COMPARED]


def gained(runs, part):
    """Each configuration minus the base model, at its end; plain also at the levels of equal proxy."""
    lines = []
    for method, configuration in product(part.methods, part.configurations):
        runs_of = of_seeds(runs, part, configuration, method).values()
        for gain in (*part.gains, None) if configuration == "plain" else (None,):
            ends = [({name: outcome(rows, name, gain) for name in COMPARED}, rows[0])
                    for rows in runs_of if outcome(rows, "proxy", gain) is not None]
            if ends:
                proxy, *others, updates = subtracted(ends)
                at = AXES["proxy"].format(gain) if gain else "the last update"
                lines.append([method, configuration, at, f"{len(ends)} of {len(runs_of)}",
                              "" if gain else proxy, *others, updates if gain else ""])
    return table(["method", "configuration", "at", "runs", *COMPARED.values()], lines)


def differences(runs, part, configurations=None, reference="plain"):
    """Each configuration minus the reference, pair by pair, at equal proxy, cost, updates."""
    lines = []
    for method, configuration in product(part.methods, configurations or (*part.configurations, "scaled")):
        tuned, plain = (of_seeds(runs, part, name, method) for name in (configuration, reference))
        pairs = [(tuned[seed], plain[seed]) for seed in tuned if seed in plain and configuration != reference]
        for axis, gain in *(("proxy", gain) for gain in part.gains), *product(list(AXES)[1:], (0,)):
            # A scaled adapter has no updates of its own; and where updates cost the same two lines are one.
            if not pairs or axis != "proxy" and configuration == "scaled":
                continue
            if axis in ("network_evaluations", "price") and all(a[1][axis] == b[1][axis] for a, b in pairs):
                continue
            if any(math.isnan(rows[-1][axis]) for pair in pairs for rows in pair):    # not kept at that time
                continue
            ends = [end for pair in pairs if (end := at_equal(axis, gain, *pair))]
            proxy, *others, updates = subtracted(ends)
            lines.append([method, configuration, AXES[axis].format(gain), f"{len(ends)} of {len(pairs)}",
                          "" if axis == "proxy" else proxy, *others,
                          updates if axis == "proxy" and configuration != "scaled" else ""])
    return table(["method", "configuration", "at equal", "pairs", *COMPARED.values()], lines)


def steadiness(runs, part):
    """How many runs fall back from their best judge score, and how far the last scores lie apart."""
    lines = []
    for configuration in part.configurations:
        tuned, plain = (of_seeds(runs, part, name) for name in (configuration, "plain"))
        both = [seed for seed in tuned if seed in plain]
        if len(both) > 1:
            judge, judge_plain = ([column(rows[seed], "judge") for seed in both] for rows in (tuned, plain))
            last, last_plain = ([scores[-1] for scores in judges] for judges in (judge, judge_plain))
            deeper = [(max(a) - a[-1]) - (max(b) - b[-1]) for a, b in zip(judge, judge_plain)]
            best = [max(a) - max(b) for a, b in zip(judge, judge_plain)]
            fell = sum(map(falls_back, judge))
            estimates = mean_interval(deeper), mean_interval(best), spread_interval(last, last_plain)
            lines.append([configuration, f"{fell} of {len(both)}", cell(*share_interval(fell, len(both))),
                          f"{statistics.mean(last):.2f}", f"{min(last):.2f}", f"{statistics.stdev(last):.3f}",
                          *("" if configuration == "plain" else cell(*estimate) for estimate in estimates)])
    return table(["configuration", f"fell back by {FALL_BACK}", "share", "mean of the last judge scores",
                  "lowest", "their standard deviation", "depth of the fall, minus plain's",
                  "best judge score, minus plain's", "standard deviation, over plain's"], lines)


def rounding(runs, part, again):
    """How far two runs of one seed come apart on two machines, whose processors round sums differently."""
    lines = []
    for configuration in part.configurations:
        here, there = (of_seeds(runs, each, configuration) for each in (part, again))
        apart = [[abs(a["judge"] - b["judge"]) for a, b in zip(here[seed], there[seed])]
                 for seed in here if seed in there]
        lines.append([configuration, len(apart), *(f"{statistics.median(step):.4f}, {max(step):.4f}"
                                                   for step in zip(*apart))])
    steps = (f"{step} updates" for step in range(0, UPDATES + 1, EVAL_EVERY))
    return table(["configuration", "pairs", *steps], lines)


def rivals(runs, part):
    """What a user would end with, each minus RSA-FT's last adapter, pair by pair. The oracle is the one to
    read: the judge has chosen some of these itself."""
    def last(rows):
        return rows[-1]

    def halfway(rows):
        return rows[len(rows) // 2]

    def stopped(rows):
        return max(rows, key=lambda row: row["judge"])

    ends = {"plain": ("plain", last), "plain, stopped at the judge's best": ("plain", stopped),
            "plain, scaled to the judge's best": ("scaled", stopped),
            "half the rate": ("twice as long", halfway),
            "half the rate, twice as long": ("twice as long", last),
            "mean of two proxies": ("two proxies", last),
            "RSA-FT, stopped at the judge's best": ("both", stopped)}
    measures = "proxy", "judge", "oracle_accuracy", "oracle_rmse"
    reference, lines = of_seeds(runs, part, "both"), []
    for name, (configuration, end) in ends.items():
        runs_of = of_seeds(runs, part, configuration)
        pairs = [(end(runs_of[seed]), reference[seed][-1]) for seed in runs_of if seed in reference]
        if pairs:
            minus = [[a[measure] - b[measure] for a, b in pairs] for measure in measures]
            lines.append([name, len(pairs), *(cell(*mean_interval(values)) for values in minus)])
    return table(["minus RSA-FT's last", "pairs", "proxy", "judge", "oracle accuracy", "oracle error"], lines)


def sharpness(runs, parts):
    """Pearson's correlation over runs of S1 with the judge (the paper: -0.80, -0.67) and with the oracle."""
    lines, gain = [], parts["primary"].gains[0]
    jobs = {job for job in jobs_of(parts) if job in runs and job.world == "tiny"
            and "--reward" not in CONFIGURATIONS[job.configuration]}     # its S1 is of another reward
    plain = {job for job in jobs if (job.method, job.configuration) == ("draft", "plain")}
    named = {"all methods and configurations": jobs, "plain DRaFT-1": plain}
    for (what, chosen), at in product(named.items(), (None, gain)):
        ends = [[outcome(runs[job], name, at) for name in ("s1", "judge", "oracle_accuracy")]
                for job in sorted(chosen, key=str)]
        s1, *held_out = list(zip(*(end for end in ends if None not in end))) or [()]
        if len(s1) > 2:
            lines.append([what, "the last update" if at is None else f"proxy +{gain}", len(s1),
                          *(cell(*correlation_interval(s1, end)) for end in held_out)])
    return table(["runs", "at", "number", "S1 with judge", "S1 with oracle accuracy"], lines)


def alarms(runs, parts):
    """What the alarm caught, how early, and what it was worth to stop there and take best/."""
    lines = []
    for part, configuration in product(parts, TWO):
        verdicts = [alarm_verdict(rows) for rows in of_seeds(runs, part, configuration).values()]
        rang = [verdict for verdict in verdicts if verdict["early"] is not None]
        of = {name: [verdict for verdict in verdicts if verdict[name]] for name in ("hacked", "broken")}
        of["neither"] = [verdict for verdict in verdicts if not (verdict["hacked"] or verdict["broken"])]
        shares = []
        for group in of.values():
            k, n = sum(verdict["early"] is not None for verdict in group), len(group)
            shares.append(f"{k} of {n}, {cell(*share_interval(k, n))}" if group else "0 of 0")
        early = [verdict["early"] for verdict in rang]
        lines.append([part.rate, configuration, len(verdicts), *shares,
                      f"{statistics.median(early):g} ({min(early)} to {max(early)})" if early else "",
                      cell(*mean_interval([verdict["gain"] for verdict in rang])) if rang else ""])
    return table(["rate", "configuration", "runs", "rang in hacked runs", "in broken ones",
                  "in those that are neither", "updates before the end",
                  "oracle accuracy of best/ at the alarm, minus the last"], lines)


def every_run(runs, parts):
    """A line for each run: what the pilots' choices are made from."""
    lines = []
    for job in jobs_of(parts):
        if rows := runs.get(job):
            lines.append([job.world, job.method, job.learning_rate, job.configuration, job.seed,
                          f"{max(column(rows, 'proxy')) - rows[0]['proxy']:.2f}",
                          *(f"{choose(column(rows, name)):.3f}, {rows[-1][name]:.3f}" for name, choose in
                            (("judge", max), ("oracle_accuracy", max), ("oracle_rmse", min)))])
    return table(["world", "method", "rate", "configuration", "seed", "best gain of the proxy",
                  "judge: best, last", "oracle accuracy: best, last", "oracle error: best, last"], lines)


def report(runs, parts, pilots):
    """All tables, as Markdown."""
    text = ["# What came out\n", "By `python experiments/study.py`, which says what the words mean. "
            "Estimates have 95 percent intervals in brackets."]
    for name, part in parts.items():
        done = sum(job in runs for job in part.jobs())
        text.append(f"\n## {name}: {part.question} ({done} of {len(part.jobs())} runs)\n")
        if done:
            there = {" ".join([job.method, job.configuration, str(job.seed)]): runs[job]
                     for job in part.jobs() if job in runs}
            never = {gain: [run for run, rows in there.items() if outcome(rows, "proxy", gain) is None]
                     for gain in part.gains}
            text += ["Minus the base model:\n", gained(runs, part), "\nMinus plain, pair by pair:\n",
                     differences(runs, part), *(f"\nNever at proxy +{gain}: {', '.join(names) or 'none'}."
                                                for gain, names in never.items())]
            for title, configurations, reference in AGAINST.get(name, ()):
                text += [f"\n{title}:\n", differences(runs, part, configurations, reference)]
        if name == "again":
            text += ["\nHow far the judge scores of two runs of one seed are apart (median, largest):\n",
                     rounding(runs, parts["fast"], part)]
        if name in ("primary", "fast", "again"):
            text += ["\nFalling back:\n", steadiness(runs, part)]
    text += ["\n## What would a user end with?\n", rivals(runs, parts["rivals"]),
             "\n## Does a sharp reward mean a low judge score?\n", sharpness(runs, parts),
             f"\n## What does the alarm catch?\n\nHacked: the oracle's accuracy ends more than {HACKED} "
             f"below its best; broken: the judge's score ends more than {FALL_BACK} below its best.\n",
             alarms(runs, [parts["alarm"], parts["alarm-fast"]]),
             "\n## The pilots, from which rates and levels were chosen\n", every_run(runs, pilots),
             *(f"\nFalling back in {name}:\n\n{steadiness(runs, part)}" for name, part in pilots.items()
               if len(part.seeds) > 2)]
    text = "\n".join(text)
    return f"{text}\n\nIntervals: {text.count('[')}. One in twenty misses the truth by chance alone.\n"


# ---- Figures -----------------------------------------------------------------------------------------------

COLOURS = {"plain": "#444444", "noise": "#1f77b4", "sam": "#2ca02c", "both": "#d62728", "gdro": "#9467bd",
           "crd": "#ff7f0e", "crd old": "#8c564b", "both window": "#d62728", "alignprop": "#9467bd",
           "alignprop noise": "#17becf",
           f"capped {CAPS[1]}": "#ff7f0e", "averaged": "#8c564b"}
LABELS = {"plain": "plain fine-tuning", "noise": "RSA-FT, pictures only", "sam": "RSA-FT, weights only",
          "both": "RSA-FT", "gdro": "GDRO", "crd": "CRD", "crd old": "CRD, guard 1 off",
          "both window": "RSA-FT, window", "alignprop": "plain AlignProp",
          "alignprop noise": "RSA-FT of AlignProp, pictures only",
          f"capped {CAPS[1]}": "plain, score capped", "averaged": "plain, adapter averaged"}
TITLES = {"unguided": "sampled without guidance", "flow": "a model of flow matching"}
FIGURES = {"study_curves.png": ("primary", "fast"), "study_related.png": ("gdro", "crd"),
           "study_flow.png": ("flow",), "study_price.png": ("price",)}
PANELS = {"judge": "score of a second reward model,\nnever trained on",
          "oracle_accuracy": "share of pictures that show\nwhat the caption says",
          "oracle_rmse": "distance to a clean drawing\nof the caption (less is better)"}


def draw_curves(runs, parts, path):
    """The held-out measures against the score that is trained on: the seeds' mean and its 95 percent band.

    At each score a run counts with its measure where it first reaches it. A curve ends where a quarter of its
    runs no longer get there. Dotted: the levels of equal proxy.
    """
    from matplotlib import pyplot
    parts = [part for part in parts if len(of_seeds(runs, part, "plain")) > 1] or parts[:1]
    alike = len({part.world for part in parts}) == 1      # another base model has its scores somewhere else
    figure, axes = pyplot.subplots(len(parts), len(PANELS), figsize=(11, 3.4 * len(parts)), squeeze=False,
                                   sharex=alike, sharey="col" if alike else False, layout="constrained")
    for (part, (measure, label)), axis in zip(product(parts, PANELS.items()), axes.flat):
        for configuration in part.configurations:
            runs_of = list(of_seeds(runs, part, configuration).values())
            gains = [max(column(rows, "proxy")) - rows[0]["proxy"] for rows in runs_of]
            points = []
            for gain in numpy.linspace(0, max(gains, default=0), 100 if runs_of else 0):
                values = [outcome(rows, measure, gain) for rows in runs_of]
                values = [value for value in values if value is not None]
                if len(values) < max(2, 0.75 * len(runs_of)):
                    break
                points.append((runs_of[0][0]["proxy"] + gain, *mean_interval(values)))
            if points:
                x, mean, low, high = zip(*points)
                axis.plot(x, mean, color=COLOURS[configuration], label=LABELS[configuration])
                axis.fill_between(x, low, high, color=COLOURS[configuration], alpha=0.15, linewidth=0)
                for gain in part.gains:
                    axis.axvline(x[0] + gain, color="#bbbbbb", linestyle=":", linewidth=1)
        axis.set_xlabel("score that is trained on")
        where = TITLES.get(part.world, f"learning rate {float(part.rate):g}")
        axis.set_title(f"{label}\n({where})", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    drawn = {line.get_label(): line for axis in axes[:, 0] for line in axis.lines}
    names = [label for label in LABELS.values() if label in drawn]
    figure.legend([drawn[name] for name in names], names, loc="outside lower center",
                  ncols=6 if len(names) < 7 else 4, frameon=False, fontsize=9, columnspacing=1)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def read_grid(path, height, width, columns=4):
    """The pictures of a grid that rsaft.make_grid made, not enlarged, (n, 3, height, width) in [0, 1]."""
    from matplotlib import pyplot
    grid = torch.from_numpy(pyplot.imread(path))
    factor = grid.shape[1] // columns // width
    small = grid[::factor, ::factor].permute(2, 0, 1)
    return torch.stack([picture for row in small.split(height, 1) for picture in row.split(width, 2)])


def draw_samples(runs, part, settings, folder, path):
    """Base, plain and RSA-FT at equal proxy: one pair of runs once more, for the pictures of the evaluation
    whose proxy is nearest to the level. It is the pair at the median (of an even number the upper one) of the
    difference in right pictures at that level. The same captions and noise in all three; a cross marks what
    the oracle takes for another caption."""
    from matplotlib import pyplot
    plain, both = ({seed: outcome(rows, "oracle_accuracy", part.gains[0]) for seed, rows in of_seeds(
        runs, part, configuration).items()} for configuration in TWO)
    seeds = [seed for seed in part.seeds if None not in (plain.get(seed), both.get(seed))]
    seed = sorted(seeds, key=lambda seed: both[seed] - plain[seed])[len(seeds) // 2]
    shown = {}
    for configuration in TWO:
        with tempfile.TemporaryDirectory() as out:
            job = part.job("draft", seed, configuration)
            rows = perform(job, settings, folder / "worlds", out)[configuration]
            near = min(rows, key=lambda row: abs(row["proxy"] - rows[0]["proxy"] - part.gains[0]))
            prompts = rsaft.read_prompts(Path(out, "run/samples/prompts.txt"))
            for row, label in (rows[0], "base model"), (near, LABELS[configuration]):
                pictures = read_grid(Path(out, "run/samples", f"step_{row['step']:06d}.png"), 32, 32)
                shown[label] = pictures, (f"{label}, {row['step']} updates\nscore trained on "
                                          f"{row['proxy']:.1f}, right pictures {row['oracle_accuracy']:.2f}")
    figure = pyplot.figure(figsize=(11, 4.9), layout="constrained")
    for panel, (pictures, title) in zip(figure.subfigures(1, 3, wspace=0.04), shown.values()):
        panel.suptitle(title, fontsize=10)
        right = world.oracle_accuracy(pictures[:len(prompts)], prompts)
        for axis, picture, prompt, good in zip(panel.subplots(4, 4).flat, pictures, prompts, right):
            axis.imshow(picture.permute(1, 2, 0))
            name = " ".join(prompt.split()[1:3])
            axis.set_xlabel(name if good else f"\N{BALLOT X} {name}", fontsize=7, labelpad=1,
                            color="#777777" if good else COLOURS["both"])
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


# ---- Command line ------------------------------------------------------------------------------------------

def quick(folder, workers):
    """Every part and all of the code, with next to no training, in `folder`. Raises AssertionError."""
    parts = {name: replace(part, seeds=part.seeds[:2], methods=part.methods[:1], gains=(0.01,),
                           configurations=TWO if part.configurations == FOUR else part.configurations)
             for name, part in PARTS.items()}
    parts["primary"] = replace(parts["primary"], configurations=FOUR)
    parts["radius"] = replace(parts["radius"], configurations=("plain", "gaussian"))
    parts["words"] = replace(parts["words"], seeds=range(800, 801), configurations=("plain", "floor"))
    (folder / "prompts.txt").write_text("\n".join(rsaft.read_prompts(rsaft.TINY["prompts"])[:8]))
    settings = [*SETTINGS, "--sampling-steps", "2", "--batch-size", "12", "--train-steps", "4",
                "--eval-every", "2", "--eval-images", "16", "--prompts", str(folder / "prompts.txt")]
    errors = run_parts({"primary": parts["primary"]}, settings, folder, workers)
    first = (folder / "study.csv").read_text()
    errors += run_parts(parts, settings, folder, workers, build_steps=3)
    assert not errors, errors
    runs, text = read_rows(folder / "study.csv"), (folder / "study.csv").read_text()
    assert set(first.splitlines()) < set(text.splitlines()), "what was there has changed"
    assert run_parts(parts, settings, folder, workers) == [] and (folder / "study.csv").read_text() == text
    assert {job.world for job in runs} == set(WORLDS)
    for job in jobs_of(parts):
        last, every, _ = job.budget(settings)
        assert column(runs[job], "step") == sorted({*range(0, last, every), last}), job
        names = {"proxy", *MEASURES} - (set() if WORLDS[job.world].embedded else {"diversity", "kid"})
        assert all(math.isfinite(row[name]) for row in runs[job] for name in names), job
    for job in parts["again"].jobs():
        once, again = ([{**row, "seconds": 0} for row in runs[replace(job, world=name)]]
                       for name in ("tiny", "again"))
        assert once == again, f"{job}: on one machine it should be the same"
    plain = parts["primary"].jobs()[0]
    base, end, scaled = runs[plain][0], runs[plain][-1], runs[replace(plain, configuration="scaled")]
    assert [scaled[0]["proxy"], scaled[-1]["proxy"]] == [base["proxy"], end["proxy"]], scaled
    assert len(scaled) == 5, scaled
    text = report(runs, parts, {"pilot": parts["rivals"]})
    assert text.count("[") > 100, text
    for name, of in FIGURES.items():
        draw_curves(runs, [parts[part] for part in of], folder / name)
    draw_samples(runs, parts["primary"], settings, folder, folder / "study_samples.png")
    for name in *FIGURES, "study_samples.png":
        assert 10_000 < (folder / name).stat().st_size < 400_000, name
    print(text, "quick: all pieces came out", sep="\n")
    return 0


def main():
    """Run what is asked for and report what there is. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--part", nargs="+", choices=PARTS | PILOTS, metavar="NAME",
                        default=[name for name in PARTS if name not in LEFT_OUT],
                        help=f"only these of {', '.join(PARTS | PILOTS)} (default: all but pilots and "
                        f"{', '.join(LEFT_OUT)})")
    parser.add_argument("--report", action="store_true", help="no runs: tables and curves of what is there")
    parser.add_argument("--quick", action="store_true", help="everything in small, in a temporary folder")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side (default: 2)")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # as Ctrl-C, else the workers would run on
    if given.quick:
        with tempfile.TemporaryDirectory() as folder:
            return quick(Path(folder), given.workers)
    parts = {name: (PARTS | PILOTS)[name] for name in given.part}
    errors, samples = [], HERE / "study_samples.png"
    if not given.report:
        print(f"about {sum(part.hours for part in parts.values()):.1f} hours, less what study.csv has")
        errors = run_parts(parts, SETTINGS, HERE, given.workers)
        if "primary" in parts and not samples.exists():
            draw_samples(read_rows(HERE / "study.csv"), PARTS["primary"], SETTINGS, HERE, samples)
    runs = read_rows(HERE / "study.csv")
    for name, of in FIGURES.items():
        draw_curves(runs, [PARTS[part] for part in of], HERE / name)
    text = report(runs, PARTS, PILOTS)
    (HERE / "study.md").write_text(text)
    print(text, *errors, sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("study.py: stopped; without --quick, finished runs are kept and the same command goes on")
