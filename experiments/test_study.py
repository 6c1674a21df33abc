"""The arithmetic of study.py, held to formulas written out another way, and what is reported of its runs,
held to their rows. One test, that of learning_rate.py, loads small models."""
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for package in "matplotlib", "scipy":       # in experiments/requirements.txt, not in the main one
    pytest.importorskip(package)
sys.path.insert(0, str(Path(__file__).resolve().parent))
import learning_rate  # noqa: E402, found through the line above
import study  # noqa: E402


def test_equal_proxy_is_interpolated_at_the_first_crossing():
    proxy, judge = [24.0, 25.0, 27.0, 26.0, 28.0], [10.0, 11.0, 13.0, 5.0, 4.0]
    assert study.at_level(proxy, judge, 24.0) == 10.0
    assert study.at_level(proxy, judge, 26.0) == 12.0          # half way up to 27, not on the way down again
    assert study.at_level(proxy, judge, 27.5) == 4.25
    assert study.at_level(proxy, judge, 28.5) is None


def test_paired_interval_is_that_of_the_textbook():
    # Student's own sleep data (1908), differences of ten patients: mean 1.58, interval 0.70 to 2.46.
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert [round(x, 2) for x in study.mean_interval(differences)] == [1.58, 0.70, 2.46]
    assert study.mean_interval([3.0])[0] == 3.0 and math.isnan(study.mean_interval([3.0])[1])
    assert math.isnan(study.mean_interval([])[0])


def test_share_interval_solves_wilsons_equation():
    for k, n in (0, 16), (3, 16), (16, 16):
        share, low, high = study.share_interval(k, n)
        for p in low, high:
            assert abs(abs(share - p) - 1.95996 * (p * (1 - p) / n) ** 0.5) < 1e-6


def test_falling_back_is_measured_from_the_best_to_the_last():
    assert study.falls_back([24.0, 26.0, 25.4], by=0.5)
    assert not study.falls_back([24.0, 26.0, 25.6], by=0.5)
    assert not study.falls_back([26.0, 24.0, 26.5], by=0.5)    # it came back
    runs = {study.PARTS["fast"].job("draft", 206 + i, "plain"):
            [{"judge": 26.0}, {"judge": 26.0 - 2 * (i < 3) + i / 100}] for i in range(16)}
    fast = study.steadiness(runs, study.PARTS["fast"])
    assert "| 3 of 16 |" in fast


def test_ratio_of_spreads_is_exact_and_its_interval_holds_it():
    a = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio, low, high = study.spread_interval((2 * a).tolist(), a.tolist())
    assert abs(ratio - 2) < 1e-9 and abs(low - 2) < 1e-6 and abs(high - 2) < 1e-6    # no uncertainty is left
    b = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratio, low, high = study.spread_interval(a.tolist(), b.tolist())
    assert low < ratio < high and abs(ratio - (a.std() / b.std()).item()) < 1e-9


def test_correlation_interval_is_fishers():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [2.0, 1.0, 4.0, 3.0, 7.0, 5.0, 6.0]
    r, low, high = study.correlation_interval(x, y)
    assert abs(r - 23 / 28) < 1e-9
    assert abs(math.atanh(high) + math.atanh(low) - 2 * math.atanh(r)) < 1e-9
    assert abs(math.atanh(high) - math.atanh(low) - 1.95996) < 1e-5          # 2 z / sqrt(7 - 3)


def test_the_alarms_worth_is_that_of_the_best_adapter_before_it():
    def rows(accuracy, judge, alarms):
        return [{"step": 10 * i, "oracle_accuracy": a, "judge": j, "alarm": alarm}
                for i, (a, j, alarm) in enumerate(zip(accuracy, judge, alarms))]

    fooled = rows([0.5, 0.7, 0.6, 0.5, 0.4], [1, 3, 2.9, 2.8, 4], [None, None, None, "hacking", None])
    verdict = study.alarm_verdict(fooled)       # its judge was best at step 40, which was still to come
    assert verdict == {"hacked": True, "broken": False, "early": 10, "gain": pytest.approx(0.3)}
    broken = rows([0.5, 0.5, 0.5], [1, 3, 2], [None] * 3)
    assert study.alarm_verdict(broken) == {"hacked": False, "broken": True, "early": None}
    part = study.PARTS["alarm"]
    runs = {part.job("draft", 500 + i, "plain"): fooled if i < 3 else broken for i in range(4)}
    line = study.alarms(runs, [part]).splitlines()[2]
    assert "| 3 of 3, " in line and "| 0 of 1, " in line and "| 0 of 0 | 10 (10 to 10) |" in line


def test_kid_is_the_double_sum_written_out():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    prompts = torch.tensor([0, 1, 2, 0, 1, 2])

    def mean(a, b, itself):
        total = 0.0
        for p in range(3):
            for q in range(3):
                pairs = [(i, j) for i in range(6) for j in range(6)
                         if prompts[i] == p and prompts[j] == q and (itself or i != j)]
                kernel = [(torch.dot(a[i], b[j]) / a[i].norm() / b[j].norm() + 1).item() ** 3
                          for i, j in pairs]
                total += sum(kernel) / len(kernel) / 9
        return total

    expected = mean(x, x, False) + mean(y, y, False) - 2 * mean(x, y, True)
    assert abs(study.kid(x, y, prompts) - expected) < 1e-9


def test_kid_of_two_draws_from_one_model_is_0_on_average_and_not_of_two():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.arange(24) % 12
    centres = torch.randn(12, 8, generator=generator)[prompts]
    same, moved = [], []
    for _ in range(400):
        x, y = centres + torch.randn(2, 24, 8, generator=generator)
        same.append(study.kid(x, y, prompts))
        moved.append(study.kid(x + 0.5, y, prompts))
    mean, low, high = study.mean_interval(same[:30])
    assert low < 0 < high and abs(sum(same) / 400) < 0.01 and sum(moved) / 400 > 0.05


def test_diversity_compares_pictures_of_one_prompt_alone():
    embeddings = torch.tensor([[1.0, 0], [0, 3], [0, 2], [0, 5]])
    prompts = torch.tensor([0, 1, 0, 1])
    assert abs(study.diversity(embeddings, prompts) - 2 ** 0.5 / 2) < 1e-6    # the mean of sqrt 2 and 0


def test_random_directions_move_each_picture_by_the_radius():
    start, batch = torch.rand(2, 3, 4, 4), study.rsaft.micro_batches(["a", "b"], ("a test",), 2)[0]
    model = SimpleNamespace(denoiser=lambda prompts: None, steps=[], decode=lambda latents: latents)
    images, prompts = study.random_directions.moved_images(model, 0.1, study.rsaft.Plan(()), batch, start)
    moves = (images - start.repeat(4, 1, 1, 1)).flatten(1)
    assert prompts == ["a", "b"] * 4 and torch.allclose(moves.norm(dim=1), torch.tensor(0.1))
    assert torch.linalg.matrix_rank(moves, tol=1e-2) == 8     # no two of them the same way


def test_what_is_averaged_is_the_adapter_of_plain_training(tmp_path):
    flags = ["--tiny", "--sampling-steps", "2", "--batch-size", "2", "--eval-every", "0", "--eval-reward"]
    saved = []
    for program, steps in (study.rsaft, 1), (study.rsaft, 2), (study.averaged, 1), (study.averaged, 2):
        out = tmp_path / f"{program.__name__} {steps}"
        assert program.main([*flags, "--train-steps", str(steps), "--out", str(out)]) == 0
        saved.append(study.load_file(out / study.rsaft.ADAPTER))
    plain, again, once, twice = ([tensors[name] for name in sorted(saved[0]) if "lora_B" in name]
                                 for tensors in saved)
    for B, then, average, last in zip(plain, again, once, twice):     # B is 0 at first
        assert torch.allclose(average, 0.9 * B) and B.norm() > 0
        assert torch.allclose(last, 2 / 11 * average + 9 / 11 * then, atol=1e-6)


def test_a_cap_takes_the_gradient_of_pictures_above_it_and_leaves_the_others():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    prompts = ["a red circle"] * 3
    score = study.rsaft.make_reward("pickscore", study.rsaft.TINY["models"])(images, prompts)
    cap = score.detach().sort().values[1:].mean().item()            # between the second and the best
    for values in score, study.study_rewards.capped(cap, images, prompts):
        gradient, = torch.autograd.grad(values.sum(), images)
        below = score < cap
        assert torch.equal(values[below], score[below]) and gradient[below].abs().amax((1, 2, 3)).min() > 0
    assert below.sum() == 2 and torch.equal(values[~below], torch.tensor([cap]))
    assert gradient[~below].count_nonzero() == 0


def test_an_adapter_moves_the_weights_as_much_less_than_trained_weights_as_its_width_says():
    def measure(trained):
        flags = ["--sampling-steps", "3", "--batch-size", "4"]
        return learning_rate.measure("small world", flags, trained, rate=2e-4, updates=2)

    (weights, one), (adapter, expected) = measure(learning_rate.ATTENTION), measure(16)
    numbers = 161_792                                           # in the attention projections
    assert one == 1 and weights[0]["dW"] == adapter[0]["dW"] == 0
    assert abs(weights[1]["dW"] / (2e-4 * numbers ** 0.5) - 1) < 0.01      # AdamW: each moved by the rate
    assert (16 / 3 / 64) ** 0.5 < expected < (16 / 3 / 32) ** 0.5          # layers read 32 or 64 numbers
    for step in 1, 2:
        assert abs(adapter[step]["dW"] / weights[step]["dW"] / expected - 1) < 0.2
        assert adapter[step]["reward"] > adapter[0]["reward"]
        assert abs(weights[step]["e moves"] / 0.01 - 1) < 1e-3 and adapter[step]["e moves"] < 0.01


def test_a_table_of_rows_survives_its_file(tmp_path):
    job = study.Job("tiny", "draft", "4e-3", 200, "noise 0.01")
    row = {**dict.fromkeys(("price", "proxy", *study.MEASURES, "seconds"), 0.5), "network_evaluations": 640}
    study.write_rows(tmp_path / "study.csv", {job: [{**row, "step": 0, "alarm": None},
                                                    {**row, "step": 10, "alarm": "hacking"}]})
    runs = study.read_rows(tmp_path / "study.csv")
    assert runs == {job: [{**row, "step": 0, "alarm": None}, {**row, "step": 10, "alarm": "hacking"}]}
    before = (tmp_path / "study.csv").read_bytes()
    study.write_rows(tmp_path / "study.csv", runs)
    assert (tmp_path / "study.csv").read_bytes() == before


def test_the_table_of_the_front_page_has_the_rows_of_study_md():
    text, page = ((folder / name).read_text() for folder, name in (
        (study.HERE, "study.md"), (study.HERE.parent, "README.md")))
    number = re.compile(r"[+-]?\d+\.\d+")

    def cells(part, minus, configuration, at):
        table = text.split(f"\n## {part}: ")[1].split(f"\nMinus {minus}")[1].split("\n\n")[1].splitlines()
        header, *rows = ([word.strip() for word in line.split("|")[1:-1]] for line in table)
        return next(dict(zip(header, row)) for row in rows if row[:3] == ["draft", configuration, at])

    for line, part, minus, configuration, cost in (
            ("plain, minus the base model", "price", "the base model", "plain", "the last update"),
            ("`--noise 0.1`", "price", "plain", "noise", "updates"),
            ("`--noise 0.1 --sam 0.1 --sam-rollout window`", "price", "plain", "both window", "price"),
            ("`--noise 0.1 --sam 0.1`", "primary", "plain", "both", "network evaluations"),
            ("`--method alignprop`", "price", "plain", "alignprop", "price"),
            ("`--method alignprop --noise 0.1`", "price", "plain", "alignprop noise", "price")):
        told = page.split(f"| {line} |")[1].splitlines()[0].split("|")[1:-1]
        level, end = (cells(part, minus, configuration, at) for at in ("proxy +2.0", cost))
        there = [(level["updates"], 1), (level["oracle accuracy"], 100), (level["judge"], 1),
                 (end["oracle accuracy"], 100), (end["judge"], 1)]
        for cell, (row, scale) in zip(told, there, strict=True):
            for a, b in zip(number.findall(cell), number.findall(row), strict=True):
                assert abs(float(a) - scale * float(b)) <= 0.51 * 10.0 ** -len(a.partition(".")[2]), cell


def test_a_grid_is_read_back_as_its_pictures(tmp_path):
    for height, width in (32, 32), (32, 96):
        pictures = torch.randint(256, (8, 3, height, width), generator=torch.Generator().manual_seed(0)) / 255
        (tmp_path / "grid.png").write_bytes(study.rsaft.make_grid(pictures))
        assert torch.allclose(study.read_grid(tmp_path / "grid.png", height, width), pictures, atol=1e-6)


def test_parts_are_paired_and_none_is_reported_from_a_pilot_seed():
    pilot, named = {seed for part in study.PILOTS.values() for seed in part.seeds}, set()
    for part in study.PARTS.values():
        assert "plain" in part.configurations and len(set(part.jobs())) == len(part.jobs())
        assert not pilot & set(part.seeds)
    assert len(study.PARTS["primary"].seeds) >= 16
    for part in (study.PARTS | study.PILOTS).values():
        named |= {(job.world, job.method, job.configuration) for job in part.jobs()}
    for kind, what in enumerate((study.WORLDS, study.rsaft.METHODS, study.CONFIGURATIONS)):
        assert {names[kind] for names in named} == set(what)             # nothing is named and never run


def test_the_flags_of_every_run_are_a_command_line_of_its_program(tmp_path):
    for part in (study.PARTS | study.PILOTS).values():
        for job in part.jobs():
            settings = job.program.parse(job.flags(study.SETTINGS, tmp_path))
            words, others = job.configuration.split(), {"gaussian": "random_directions"}
            others |= {"gdro": "gdro", "crd": "crd", "averaged": "averaged"}
            assert job.program.__name__ == others.get(words[0], "rsaft")
            assert (settings.seed, settings.learning_rate) == (job.seed, float(job.learning_rate))
            usual = {"often": 80, "words": 40}.get(job.world, 60)
            assert settings.train_steps == {"twice": 120, "gdro": 100, "crd": 150}.get(words[0], usual)
            held_out = [*map(study.rsaft.short_name, settings.eval_reward)]
            if job.world == "words":
                assert held_out[:3] == ["ocr_v4", "oracle_accuracy", "oracle_correlation"]
                assert [*map(study.rsaft.short_name, settings.reward), *held_out[3:]] in (
                    [["ocr_floor", "ocr_likelihood"]] if words[0] == "floor" else [["ocr_likelihood"]])
            else:
                assert held_out == ["judge", "oracle_accuracy", "oracle_rmse",
                                    *["pickscore"] * (words[0] == "capped")]
                assert settings.reward == ["pickscore"] or words[0] in ("two", "capped")
            if words[0] not in ("gdro", "crd"):
                assert settings.method == job.method
                assert bool(settings.noise) == any(word in words for word in ("noise", "both", "gaussian"))
                assert bool(settings.sam) == any(word in words for word in ("sam", "both", "window"))
            else:
                own = job.program.parse(["--tiny", "--reward", "pickscore", "--seed", str(job.seed),
                                         *study.CONFIGURATIONS[job.configuration].split()])
                own.eval_every, own.eval_reward = 10, study.SETTINGS[-3:]
                assert settings == own, "their own defaults"


def test_differences_are_taken_pair_by_pair_at_equal_proxy_cost_and_updates():
    part = study.PARTS["brittle"]

    def rows(seed, ahead, cost):
        return [{"proxy": 20 + part.gains[0] * step / 20, "step": step, "network_evaluations": step * cost,
                 "price": 4.0 * step * cost, **dict.fromkeys(study.MEASURES, 10.0 * seed + ahead * step)}
                for step in (0, 10, 20, 30)]

    runs = {part.job("draft", seed, name): rows(seed, ahead, cost) for seed in part.seeds[:4]
            for name, ahead, cost in (("plain", 0.1, 1), ("both", 0.2 + seed / 1e9, 2))}
    runs[part.job("draft", part.seeds[0], "both")].pop()         # this one ends at the level
    del runs[part.job("draft", part.seeds[1], "plain")][2:]      # and this one before
    text = study.differences(runs, part)
    # At the level all have made 20 updates. At equal cost plain has made 30, 10, 30, 30 and the other half as
    # many, and the judge ties. At equal updates they have made 20, 10, 30, 30.
    assert f"| both | proxy +{part.gains[0]} | 3 of 4 |  | +2.0000 [+2.0000, +2.0000] |" in text
    assert f"| both | network evaluations | 4 of 4 | {-part.gains[0] * 12.5 / 20:+.4f} [" in text
    assert "| both | updates | 4 of 4 | +0.0000 [+0.0000, +0.0000] | +2.2500 [" in text
    network, price = (next(line for line in text.splitlines() if f"| both | {axis} |" in line)
                      for axis in ("network evaluations", "price"))
    assert "] | +0.0000 [" in network and price == network.replace("network evaluations", "price")
    runs[part.job("draft", part.seeds[0], "both")][-1]["price"] = math.nan       # of an older run
    assert "| price |" not in study.differences(runs, part)


def test_what_is_reported_is_what_the_rows_say():
    text = (study.HERE / "study.md").read_text()
    assert text == study.report(study.read_rows(study.HERE / "study.csv"), study.PARTS, study.PILOTS)
    interval = re.compile(r"([+-]?\d+\.\d+) \[([+-]?\d+\.\d+), ([+-]?\d+\.\d+)\]")
    there = torch.tensor([[*map(float, found)] for found in interval.findall(text)], dtype=torch.float64)
    there = torch.cat([there, 100 * there])                            # "of a hundred"
    either = torch.cat([there, -there[:, [0, 2, 1]]])                  # a text says "lower by"
    root = study.HERE.parent
    for page, least in (root / "experiments", 50), (root, 15), (root / "related", 0):
        page /= "README.md"
        told = [(numbers, there if line.startswith("|") else either) for line in page.read_text().splitlines()
                for numbers in interval.findall(line)]
        assert sum(found is there for _, found in told) >= least
        for numbers, found in told:
            unit = 10.0 ** -len(numbers[0].partition(".")[2])
            off = (found - torch.tensor([*map(float, numbers)], dtype=torch.float64)).abs().amax(1).min()
            assert off <= 0.51 * unit, (page, numbers)
    page = (study.HERE / "README.md").read_text()
    assert f"study.md has {text.count('['):,} intervals" in page
