"""What users of tools/ see. All tests share one small run of two updates; `pytest tools`."""
import csv
import importlib.util
import json
import shutil
import statistics
import sys
from pathlib import Path

import evaluate
import plot
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import rsaft

TOOLS = Path(__file__).resolve().parent
tensorboard = rsaft.import_file(TOOLS / "tensorboard.py")
sys.path.remove(str(TOOLS))    # pytest has put it there; below, "tensorboard" is the package of that name

needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = "--tiny --train-steps 2 --sampling-steps 4 --batch-size 4 --eval-images 8 --eval-every 1 --rank 4"
    assert rsaft.main([*flags.split(), "--learning-rate", "1e-2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def judged(run):
    """The folder of an evaluation of the run at two strengths, by both of its adapters."""
    assert evaluate.main([str(run), str(run / "best"), "--lora-scale", "1", "0.5"]) == 0
    return run / "evaluation"


def scores(folder):
    """{(adapter, scale): {score: its values}} of scores.csv."""
    rows = {}
    for line in csv.DictReader((folder / "scores.csv").read_text().splitlines()):
        line.pop("picture"), line.pop("prompt")
        row = rows.setdefault((line.pop("adapter"), float(line.pop("scale"))), {})
        for name, value in line.items():
            row.setdefault(name, []).append(float(value))
    return rows


def refused(capsys, main, *argv):
    """The one line with which a program refuses."""
    capsys.readouterr()
    assert main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and not out
    return err


# ---- evaluate.py -------------------------------------------------------------------------------------------

@needs_peft
def test_its_scores_are_those_of_the_runs_evaluations(run, judged):
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first, *_, last = [line["pictures"] for line in log if "eval" in line]
    found = scores(judged)
    for then, now in (first, found["base model", 0]), (last, found[str(run), 1]):
        assert [*now] == ["pickscore", "judge", "oracle_accuracy", "oracle_rmse"]
        for name in now:
            assert now[name] == pytest.approx(then[name], abs=1e-3)
    assert found[str(run), 1]["judge"] != pytest.approx(found["base model", 0]["judge"], abs=0.1)


@needs_peft
def test_half_an_adapter_is_something_between(run, judged):
    base, half, whole = (torch.tensor(row["judge"]) for row in (
        scores(judged)["base model", 0], scores(judged)[str(run), 0.5], scores(judged)[str(run), 1]))
    assert 0.1 < (half - base).norm() / (whole - base).norm() < 0.9


def test_the_interval_is_the_textbooks():
    differences = [0.3, -0.1, 0.8, 0.4, 0.25]
    mean, half = evaluate.interval(torch.tensor(differences, dtype=torch.float64))
    assert mean == pytest.approx(statistics.mean(differences))
    assert half == pytest.approx(1.96 * statistics.stdev(differences) / 5 ** 0.5)


@needs_peft
def test_the_table_compares_with_the_base_model_and_the_first_adapter(run, judged):
    found, blocks = scores(judged), (judged / "table.txt").read_text().split("\n\n")
    base, whole, half = found["base model", 0], found[str(run), 1], found[str(run), 0.5]
    assert "   minus base model   " in blocks[1] and f"   minus {run}\n" in blocks[1]
    assert "1.96 standard errors" in blocks[-1]
    _, of_base, of_whole, of_half, *_ = blocks[1].splitlines()                     # of the judge
    assert of_base.split()[-1] == f"{statistics.mean(base['judge']):.4f}"
    for line, row, reference in (of_whole, whole, base), (of_half, half, whole):
        mean, half_length = evaluate.interval(torch.tensor(row["judge"]) - torch.tensor(reference["judge"]))
        assert line.endswith(f"{mean:+.4f} [{mean - half_length:+.4f}, {mean + half_length:+.4f}]")


@needs_peft
def test_the_grid_has_a_row_per_adapter_and_strength(judged):
    width, height = Image.open(judged / "grid.png").size
    assert 9 * 128 < width < 9.5 * 128 and 5 * 128 < height < 6 * 128


@needs_peft
def test_flags_come_before_the_run_and_a_file_is_as_good_as_a_folder(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square\na blue cross\n")
    (tmp_path / "reward.py").write_text("def redness(images, prompts): return images[:, 0].mean((1, 2))")
    argv = [run / "best" / rsaft.ADAPTER, "--eval-reward", f"{tmp_path / 'reward.py'}:redness",
            "--eval-images", "3", "--prompts", tmp_path / "prompts.txt", "--sampling-steps", "2",
            "--sampling-batch-size", "2", "--out", tmp_path / "out"]
    assert evaluate.main([str(arg) for arg in argv]) == 0
    lines = [*csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines())]
    assert [line["prompt"] for line in lines] == 2 * ["a red square", "a blue cross", "a red square"]
    assert [*lines[0]] == ["adapter", "scale", "picture", "prompt", "redness"]


@needs_peft
def test_a_run_that_evaluates_in_steps_of_its_own_is_judged_in_them(run, judged, tmp_path):
    """As CRD's do, which draw in fewer."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    config = json.loads((run / "config.json").read_text()) | {"sampling_steps": 2, "eval_sampling_steps": 4}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert evaluate.main([str(tmp_path / "run")]) == 0
    now, then = scores(tmp_path / "run" / "evaluation")[str(tmp_path / "run"), 1], scores(judged)[str(run), 1]
    assert now["judge"] == pytest.approx(then["judge"], abs=1e-3)


@needs_peft
def test_the_corrected_score_is_of_two_of_the_scores_picture_by_picture(run, tmp_path, capsys):
    (tmp_path / "marks.py").write_text("def quality(images, prompts): return 1 + 4 * images.mean((1, 2, 3))")
    rewards = f"{rsaft.HERE / 'tiny/world.py'}:oracle_accuracy", f"{tmp_path / 'marks.py'}:quality"
    argv = [str(run), "--eval-reward", *rewards, "--eval-images", "6", "--corrected", "oracle_accuracy",
            "quality", "--out", str(tmp_path / "out")]
    assert evaluate.main(argv) == 0
    for row in scores(tmp_path / "out").values():
        expected = [r * (u - 3) + 0.2 for r, u in zip(row["oracle_accuracy"], row["quality"])]
        assert row["corrected oracle_accuracy"] == pytest.approx(expected) and len(expected) == 6
    assert "corrected oracle_accuracy" in (tmp_path / "out" / "table.txt").read_text()
    argv = [*argv[:-1], tmp_path / "none", "--corrected", "judge", "quality"]
    assert "judge is none of the scores" in refused(capsys, evaluate.main, *argv)
    assert not (tmp_path / "none").exists()


@needs_peft
def test_an_adapter_of_another_trainer_needs_no_run(run, tmp_path):
    """kohya's names, which diffusers knows."""
    tensors = {}
    for name, tensor in load_file(run / rsaft.ADAPTER).items():
        module, part = name.removeprefix("unet.").split(".lora_")
        module = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{module}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = tensor
        tensors[f"{module}.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "other.safetensors")
    argv = ["--tiny", "--sampling-steps", "4", "--eval-images", "8", "--eval-reward", "judge"]
    assert evaluate.main([str(tmp_path / "other.safetensors"), *argv, "--out", str(tmp_path / "out")]) == 0
    now = scores(tmp_path / "out")[str(tmp_path / "other.safetensors"), 1]["judge"]
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert now == pytest.approx(last["pictures"]["judge"], abs=1e-3)


def broken(tensors):
    """{what is wrong: (tensors, a word of the refusal)}"""
    first = next(iter(tensors))
    return {"not finite": ({**tensors, first: tensors[first] * torch.nan}, "not finite"),
            "odd shape": ({**tensors, first: torch.zeros(3, 5)}, "size mismatch"),
            "a foreign prefix": ({f"x{name}": value for name, value in tensors.items()}, "arrived as 0"),
            "some foreign names": ({**tensors, "unet.x.lora_A.weight": torch.zeros(4, 8),
                                    "unet.x.lora_B.weight": torch.zeros(8, 4)}, "arrived as 112"),
            "a missing half": ({name: tensors[name] for name in tensors.keys() - {first}}, "arrived as 112"),
            "another model": ({name: value.repeat(2, 2) for name, value in tensors.items()}, "size mismatch"),
            "no tensors": ({}, "arrived as 0")}


@needs_peft
@pytest.mark.parametrize("what", ["not finite", "odd shape", "a foreign prefix", "some foreign names",
                                  "a missing half", "another model", "no tensors"])
def test_an_adapter_that_is_not_whole_is_refused(run, tmp_path, capsys, what):
    tensors, word = broken(load_file(run / rsaft.ADAPTER))[what]
    shutil.copy(run / "config.json", tmp_path)
    save_file(tensors, tmp_path / rsaft.ADAPTER)
    assert word in refused(capsys, evaluate.main, run, tmp_path, "--out", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", rsaft.ADAPTER}


@needs_peft
def test_what_is_wrong_is_one_line_and_leaves_nothing_behind(run, judged, tmp_path, capsys):
    assert "no adapter" in refused(capsys, evaluate.main, tmp_path)
    assert "required: ADAPTER" in refused(capsys, evaluate.main)
    assert "no reward" in refused(capsys, evaluate.main, run, "--eval-reward", "x", "--out", tmp_path / "x")
    assert "name another" in refused(capsys, evaluate.main, run)                    # evaluation/ is there
    assert "name another" in refused(capsys, evaluate.main, run, "--out", run)
    assert "at least 2" in refused(capsys, evaluate.main, run, "--eval-images", 1, "--out", tmp_path / "x")
    (tmp_path / rsaft.ADAPTER).write_bytes((run / rsaft.ADAPTER).read_bytes()[:5000])
    assert "damaged" in refused(capsys, evaluate.main, tmp_path, "--tiny")
    (tmp_path / rsaft.ADAPTER).write_bytes((run / rsaft.ADAPTER).read_bytes())
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": "another"}))
    assert "different models" in refused(capsys, evaluate.main, run, tmp_path, "--out", tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {rsaft.ADAPTER, "config.json"}


# ---- plot.py -----------------------------------------------------------------------------------------------

def test_plot_draws_one_run_or_several(run, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(run, tmp_path / "other")
    assert plot.main([str(tmp_path / "other")]) == 0
    assert plot.main([str(run), str(tmp_path / "other"), "--out", str(tmp_path / "both.png")]) == 0
    for file in tmp_path / "other" / "curves.png", tmp_path / "both.png":
        with Image.open(file) as picture:
            assert picture.format == "PNG" and picture.width == 1000


def test_plot_refuses_what_is_no_run(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert "no folder of a run" in refused(capsys, plot.main, tmp_path)
    assert "ends in .png" in refused(capsys, plot.main, run, "--out", tmp_path / "curves.pdf")
    assert not [*tmp_path.iterdir()]


def test_the_running_mean_keeps_its_place():
    assert plot.running_mean([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert plot.running_mean([float(i) for i in range(40)])[20] == 20.0


# ---- tensorboard.py ----------------------------------------------------------------------------------------

def test_tensorboard_has_each_number_once(run, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shutil.copy(run / "log.jsonl", tmp_path)
    for _ in range(2):                                                              # twice: it begins anew
        assert tensorboard.main([str(tmp_path)]) == 0
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for kind, name in ("train", "reward"), ("eval", "judge"), ("eval", "s1"):
        lines = [line for line in log if ("eval" in line) == (kind == "eval")]
        assert [(event.step, event.value) for event in found.Scalars(f"{kind}/{name}")] == [
            (line["step"], pytest.approx(line[name])) for line in lines]
    assert not [tag for tag in found.Tags()["scalars"] if "pictures" in tag]


def test_tensorboard_follows_until_ctrl_c(run, tmp_path, monkeypatch):
    """At the first wait the run goes on, at the second the user has had enough."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt
        (tmp_path / "log.jsonl").write_text("".join(lines))

    (tmp_path / "log.jsonl").write_text("".join(lines[:2]))
    monkeypatch.setattr(tensorboard.time, "sleep", wait)
    assert tensorboard.main([str(tmp_path), "--follow"]) == 0
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("eval/judge")] == [0, 1, 2]


def test_tensorboard_refuses_what_is_no_run(tmp_path, capsys):
    pytest.importorskip("tensorboard.backend")
    assert "no folder of a run" in refused(capsys, tensorboard.main, tmp_path)


# ---- All of them -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("main, package", [(evaluate.main, "peft"), (plot.main, "matplotlib"),
                                           (tensorboard.main, "tensorboard")])
def test_a_missing_package_is_named(run, tmp_path, capsys, monkeypatch, main, package):
    for name in [*sys.modules]:
        if name.split(".")[0] == package or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    argv = [run, "--out", tmp_path / "out.png"] if package != "tensorboard" else [tmp_path]
    assert f"pip install {package}" in refused(capsys, main, *argv)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("tool, usage", [(evaluate, "evaluate.py ADAPTER [ADAPTER ...] [FLAGS]"),
                                         (plot, "plot.py RUN [RUN ...] [FLAGS]"),
                                         (tensorboard, "tensorboard.py RUN [FLAGS]")])
def test_help_shows_the_command(tool, usage, capsys):
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: python tools/{usage}\n")
