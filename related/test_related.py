"""What gdro.py and crd.py claim, claim by claim: `pytest related`. About a minute on two CPU cores.

The models are the trained ones of tiny/, the reward of the runs is a black box: no gradient passes through it.
"""
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import crd
import gdro
import rsaft

HERE = Path(__file__).resolve().parent
TINY, ACCURACY = HERE.parent / "tiny", f"{HERE.parent / 'tiny' / 'world.py'}:accuracy"
MODEL, BRIGHT = TINY / "stable-diffusion", f"{Path(__file__).resolve()}:bright"
LATENT, PROMPTS = (4, 8, 8), (TINY / "prompts.txt").read_text().splitlines()

rsaft.quiet_libraries()


def bright(images, prompts):
    """The black box: the share of values above one half, a hard decision through which no gradient passes."""
    return (images > 0.5).float().mean((1, 2, 3))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def differences(function, x, h=1e-6):
    """The gradient of a scalar function by central differences, in float64."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x).flatten()
        shift[i] = h
        shift = shift.view_as(x)
        gradient.view(-1)[i] = (function(x + shift) - function(x - shift)) / (2 * h)
    return gradient


# ---- The forward process -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_sampler_needs_to_get_back_to_the_picture(prediction_type):
    """With f = y a DDIM step leads from x_t to the same picture under the same noise at t', and x0 is the picture."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler.from_pretrained(MODEL / "scheduler", prediction_type=prediction_type)
    x0, noise = normal(2, *LATENT), normal(2, *LATENT, seed=1)
    steps = rsaft.ddim_steps(scheduler, 10)
    for step, after in zip(steps, steps[1:]):
        x, y = gdro.forward_process(x0, noise, step.alpha, step.sigma, prediction_type)
        assert_close(step.c * x + step.d * y, x0, rtol=1e-5, atol=1e-5)
        expected, _ = gdro.forward_process(x0, noise, after.alpha, after.sigma, prediction_type)
        assert_close(step.a * x + step.b * y, expected, rtol=1e-5, atol=1e-5)
        t = torch.tensor([step.t])
        assert_close(x, scheduler.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5)
        if prediction_type == "v_prediction":
            assert_close(y, scheduler.get_velocity(x0, noise, t), rtol=1e-5, atol=1e-5)


def test_the_target_of_flow_matching_is_the_velocity_of_the_straight_line_from_picture_to_noise():
    x0, noise = normal(2, *LATENT), normal(2, *LATENT, seed=1)
    for sigma in 0.0, 0.3, 1.0:
        x, y = gdro.forward_process(x0, noise, 1 - sigma, sigma, "flow")
        later, _ = gdro.forward_process(x0, noise, 0.9 - sigma, sigma + 0.1, "flow")
        assert_close(later, x + 0.1 * y)                                                 # one Euler step
        assert_close(x - sigma * y, x0)
    with pytest.raises(KeyError):
        gdro.forward_process(x0, noise, 0.5, 0.5, "sample")


# ---- GDRO's loss ---------------------------------------------------------------------------------------------------

COLD = 1e-6                                                                              # tau -> 0


def test_with_two_pictures_and_a_small_tau_the_loss_is_that_of_dpo():
    s, r = normal(20, 2), normal(20, 2, seed=1)
    won, lost = s.gather(1, r.argmax(1, keepdim=True)), s.gather(1, r.argmin(1, keepdim=True))
    assert_close(gdro.gdro_loss(s, r, COLD), -torch.nn.functional.logsigmoid(won - lost)[:, 0])


def test_with_a_small_tau_the_loss_is_minus_the_log_of_the_plackett_luce_likelihood():
    """By brute force: draw without replacement with weights exp s, over all orders of four pictures."""
    s = normal(4)

    def likelihood(order):
        left, p = list(range(4)), 1.0
        for i in order:
            p *= math.exp(s[i]) / sum(math.exp(s[j]) for j in left)
            left.remove(i)
        return p

    total = 0
    for order in itertools.permutations(range(4)):
        r = torch.zeros(4, dtype=torch.float64)
        r[list(order)] = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)         # the first is the best
        loss = gdro.gdro_loss(s, r, COLD).item()
        assert loss == pytest.approx(-math.log(likelihood(order)), rel=1e-9)
        total += math.exp(-loss)
    assert total == pytest.approx(1, rel=1e-9)


def test_with_soft_targets_the_loss_is_the_sum_in_the_docstring():
    s, r, tau = normal(5).tolist(), normal(5, seed=1).sort(descending=True).values.tolist(), 0.7
    expected = 0
    for i in range(4):
        z = sum(math.exp(r[j] / tau) for j in range(i, 5))
        expected += math.log(sum(math.exp(s[m]) for m in range(i, 5)))
        expected -= sum(math.exp(r[j] / tau) / z * s[j] for j in range(i, 5))
    s, r, shuffled = torch.tensor(s), torch.tensor(r), torch.tensor([3, 0, 4, 2, 1])
    assert gdro.gdro_loss(s, r, tau).item() == pytest.approx(expected, rel=1e-5)
    assert gdro.gdro_loss(s[shuffled], r[shuffled], tau).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tau", [COLD, 0.5])
def test_a_constant_added_to_all_of_a_group_changes_nothing(tau):
    s, r, constants = normal(3, 6), normal(3, 6, seed=1), torch.tensor([[-7.0], [0.0], [30.0]], dtype=torch.float64)
    expected = gdro.gdro_loss(s, r, tau)
    assert expected.shape == (3,)
    assert_close(gdro.gdro_loss(s + constants, r, tau), expected, rtol=1e-6, atol=1e-9)
    assert_close(gdro.gdro_loss(s, r + constants, tau), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tau", [COLD, 0.5])
def test_the_gradient_of_the_loss_agrees_with_finite_differences_and_is_zero_where_s_is_r_over_tau(tau):
    s, r = normal(6).requires_grad_(), normal(6, seed=1)
    gradient, = torch.autograd.grad(gdro.gdro_loss(s, r, tau), s)
    assert_close(gradient, differences(lambda s: gdro.gdro_loss(s, r, tau), s.detach()), rtol=1e-6, atol=1e-8)
    assert gradient.abs().max() > 0.1
    matched = (r / tau + 3).requires_grad_()
    assert_close(torch.autograd.grad(gdro.gdro_loss(matched, r, tau), matched)[0], torch.zeros_like(r))


def test_the_implicit_reward_is_the_fall_of_the_mean_squared_error_times_beta():
    f, f_ref, y = normal(3, *LATENT), normal(3, *LATENT, seed=1), normal(3, *LATENT, seed=2)
    expected = [-12 * (((y[i] - f[i]) ** 2).mean() - ((y[i] - f_ref[i]) ** 2).mean()).item() for i in range(3)]
    s = gdro.implicit_reward(gdro.squared_error(f, y), gdro.squared_error(f_ref, y), 12.0)
    assert s.tolist() == pytest.approx(expected)


# ---- CRD's loss ----------------------------------------------------------------------------------------------------

def test_the_advantage_is_clipped_and_scaled_and_zero_where_there_is_no_spread():
    reward = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.1]])
    a = (reward[0] - 3) / 3.5 ** 0.5
    assert_close(crd.scaled_advantage(reward)[0], a / 10 + 0.5)
    assert (crd.scaled_advantage(reward)[1] == 0.5).all()
    equal = torch.full((24,), 0.1)
    assert equal.std(correction=0) > 0                                                   # rounding: it isn't quite 0
    assert (crd.scaled_advantage(equal) == 0.5).all()
    outlier = torch.zeros(100)
    outlier[0] = 1.0                                                                     # 9.9 standard deviations
    assert crd.scaled_advantage(outlier)[0] == 1 and crd.scaled_advantage(-outlier)[0] == 0


FORMS = [("square", None), ("square", 0.7), ("bce", None), ("bce", 0.7)]


@pytest.mark.parametrize("form, temperature", FORMS)
def test_a_constant_added_to_the_rewards_of_a_prompt_changes_nothing(form, temperature):
    r, reward, constants = normal(3, 8), normal(3, 8, seed=1), torch.tensor([[-7.0], [0.0], [30.0]]).double()
    settings = dict(beta=0.5, form=form, temperature=temperature)
    expected = crd.crd_loss(r, crd.scaled_advantage(reward), **settings)
    assert expected.shape == (3,)
    assert_close(crd.crd_loss(r, crd.scaled_advantage(reward + constants), **settings), expected)
    assert_close(crd.crd_loss(r + constants, crd.scaled_advantage(reward), **settings), expected)


def test_the_loss_is_the_formula_in_the_docstring():
    r, R, beta, a_max = normal(6), normal(6, seed=1).sigmoid(), 0.5, 3.0
    expected = sum((beta * (r[i] - r.mean()) - (R[i] - R.mean())) ** 2 for i in range(6)) / 6 * a_max / beta
    assert_close(crd.crd_loss(r, R, beta, a_max), expected)
    total = 0
    for sign in 1, -1:
        w = torch.softmax(sign * (2 * R - 1) * a_max / 0.7, 0)
        total += ((beta * (r - (w * r).sum()) - (R - (w * R).sum())) ** 2).mean() * a_max / beta / 2
    assert_close(crd.crd_loss(r, R, beta, a_max, temperature=0.7), total)
    p, q = torch.sigmoid(beta * (r - r.mean())), torch.sigmoid(R - R.mean())
    bce = -(q * p.log() + (1 - q) * (1 - p).log()).mean() * a_max / beta
    assert_close(crd.crd_loss(r, R, beta, a_max, form="bce"), bce)


@pytest.mark.parametrize("form, temperature", FORMS)
def test_nothing_is_left_to_learn_where_the_implicit_reward_matches(form, temperature):
    R = crd.scaled_advantage(normal(6))
    r = (R / 0.5 + 11).requires_grad_()
    loss = crd.crd_loss(r, R, beta=0.5, form=form, temperature=temperature)
    assert_close(torch.autograd.grad(loss, r)[0], torch.zeros_like(r))
    if form == "square":
        assert_close(loss, torch.zeros_like(loss))


@pytest.mark.parametrize("form, temperature", FORMS)
def test_no_gradient_goes_through_the_mean(form, temperature):
    """By finite differences: the loss of picture i with the mean of the others' and its own r held fixed."""
    r, R, n = normal(6), crd.scaled_advantage(normal(6, seed=1)), 6
    settings = dict(beta=0.5, form=form, temperature=temperature)
    leaf = r.clone().requires_grad_()
    gradient, = torch.autograd.grad(crd.crd_loss(leaf, R, **settings), leaf)
    a = (2 * R - 1) * 5
    weights = [torch.full((n,), 1 / n)] if temperature is None else [(a / 0.7).softmax(0), (-a / 0.7).softmax(0)]

    def with_fixed_means(x):
        loss = 0
        for w in weights:
            predicted, wanted = 0.5 * (x - (w * r).sum()), R - (w * R).sum()
            p, q = predicted.sigmoid(), wanted.sigmoid()
            each = (predicted - wanted) ** 2 if form == "square" else -q * p.log() - (1 - q) * (1 - p).log()
            loss = loss + each.mean() / len(weights) * 5 / 0.5
        return loss

    assert_close(gradient, differences(with_fixed_means, r), rtol=1e-5, atol=1e-8)


def test_the_implicit_reward_weighs_each_error_and_passes_no_gradient_to_the_old_model_or_the_weight():
    f, f_old, y = normal(3, *LATENT), normal(3, *LATENT, seed=1).requires_grad_(), normal(3, *LATENT, seed=2)
    f.requires_grad_()
    for adaptive in True, False:
        r = crd.implicit_reward(f, f_old, y, adaptive)
        for i in range(3):
            w, w_old = ((g[i] - y[i]).abs().mean() if adaptive else 1 for g in (f, f_old))
            assert_close(r[i], -(((f[i] - y[i]) ** 2).mean() / w - ((f_old[i] - y[i]) ** 2).mean() / w_old))
        gradient, none = torch.autograd.grad(r.sum(), (f, f_old), allow_unused=True)
        w = (f - y).abs().mean((1, 2, 3), keepdim=True) if adaptive else 1
        assert none is None
        assert_close(gradient, -2 * (f - y) / y[0].numel() / w)
    perfect = crd.implicit_reward(y, y, y)
    assert (perfect == 0).all() and perfect.isfinite().all()


def test_the_anchor_holds_fast_where_the_reward_is_high():
    f, f_ref = normal(4, *LATENT).requires_grad_(), normal(4, *LATENT, seed=1).requires_grad_()
    R, error = torch.tensor([0.0, 0.25, 0.5, 1.0]).double(), (normal(4, *LATENT) - normal(4, *LATENT, seed=1)) ** 2
    error = error.mean((1, 2, 3))
    assert_close(crd.anchor_loss(f, f_ref, R, 0.1), 0.1 * ((1e-3 + R * (1 - 1e-3)) * error).mean())
    assert_close(crd.anchor_loss(f, f_ref, R, 0.1, by_reward=False), 0.1 * error.mean())
    assert_close(crd.anchor_loss(f, f_ref, R, 1e-5), 1e-5 * error.mean())                # m is at most 1
    gradient, none = torch.autograd.grad(crd.anchor_loss(f, f_ref, R, 0.1), (f, f_ref), allow_unused=True)
    assert none is None and gradient[3].norm() > 100 * gradient[0].norm() > 0


def test_the_schedules_of_the_copies_are_those_of_the_publication():
    assert [crd.old_decay(n) for n in (0, 1, 100, 10 ** 6)] == pytest.approx([0.25, 0.255, 0.75, 0.999])
    assert [crd.sampling_decay(n) for n in (0, 75, 76, 175, 10 ** 6)] == pytest.approx([0, 0, 0.0075, 0.75, 0.999])


# ---- Copies of one adapter in one network --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def unet():
    unet = rsaft.load_pipeline(str(MODEL)).unet
    for p in rsaft.add_lora(unet, 4, rsaft.named_generator("unet")):
        torch.nn.init.normal_(p, std=0.1, generator=rsaft.named_generator("unet", tuple(p.shape)))
    return unet


def test_with_the_adapter_off_all_differences_are_exactly_0(unet):
    base = rsaft.load_pipeline(str(MODEL)).unet
    x, embeds, y = (normal(*shape, dtype=torch.float32) for shape in ((2, *LATENT), (2, 16, 64), (2, *LATENT)))
    with torch.no_grad():
        f_ref, tuned = base(x, 500, embeds).sample, unet(x, 500, embeds).sample
        with rsaft.lora_scale(unet, 0):
            f = unet(x, 500, embeds).sample
    error, error_ref = gdro.squared_error(f, y), gdro.squared_error(f_ref, y)
    assert (gdro.implicit_reward(error, error_ref, 12.0) == 0).all()
    assert (crd.implicit_reward(f, f_ref, y) == 0).all()
    assert crd.anchor_loss(f, f_ref, torch.ones(2), 0.1) == 0
    assert (crd.implicit_reward(tuned, f_ref, y) != 0).all()


def test_a_network_holds_other_weights_for_a_while_and_then_its_own_bits_again(unet):
    params = [p for p in unet.parameters() if p.requires_grad]
    before, other = [p.detach().clone() for p in params], [torch.full_like(p, 0.3) for p in params]
    with pytest.raises(RuntimeError):
        with gdro.holding(params, other):
            assert all(map(torch.equal, params, other))
            raise RuntimeError
    assert all(map(torch.equal, params, before)) and all((p == 0.3).all() for p in other)


def test_an_average_moves_towards_the_current_weights():
    average, current = [torch.tensor([0.0, 8.0])], [torch.tensor([4.0, 0.0])]
    gdro.update_average(average, current, 0.75)
    assert_close(average, [torch.tensor([1.0, 6.0])])
    gdro.update_average(average, current, 0)
    assert torch.equal(average[0], current[0]) and current[0].tolist() == [4.0, 0.0]


# ---- Runs on the small world ---------------------------------------------------------------------------------------

SMALL = ["--tiny", "--reward", BRIGHT, "--sampling-steps", 4, "--eval-images", 4, "--rank", 4, "--eval-every", 0]
GDRO = [*SMALL, "--pictures", 4, "--group-size", 3, "--batch-size", 6]
CRD = [*SMALL, "--group-size", 3, "--batch-size", 6, "--epoch-updates", 2]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Five prompts, one of them not the first of the small world's."""
    path = tmp_path_factory.mktemp("prompts") / "five.txt"
    path.write_text("\n".join(PROMPTS[10:15]))
    return path


def call(main, *arguments):
    return main(list(map(str, arguments)))


def records(out, evaluations=False):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("eval", False) == evaluations]


def checkpoint(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def story(out):
    """The log without what a clock or the machine says."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "peak_gb")} for line in lines]


def pixels(path):
    """A PNG file as (3, H, W) in 0..255."""
    import numpy
    from PIL import Image
    return torch.from_numpy(numpy.array(Image.open(path))).permute(2, 0, 1).int()


@pytest.mark.parametrize("module, guidance_scale, rise, flags", [
    (gdro, 3.0, 0.005, ["--pictures", 8, "--ema-decay", 0.5, "--tau", 0.005]),
    (crd, 1.0, 0.05, ["--group-size", 6, "--epoch-updates", 4])])
def test_a_short_run_raises_a_reward_without_gradient_and_plain_diffusers_loads_the_adapter(
        tmp_path, capsys, module, guidance_scale, rise, flags):
    (tmp_path / "six.txt").write_text("\n".join(PROMPTS[:6]))
    data = ["--data", tmp_path / "data"] if module is gdro else []
    assert call(module.main, "--tiny", "--reward", BRIGHT, "--eval-reward", "judge", "--prompts", tmp_path / "six.txt",
                "--eval-images", 24, "--rank", 4, "--batch-size", 12, "--train-steps", 16, "--eval-every", 16,
                "--out", tmp_path / "out", *data, *flags) == 0
    before, after = records(tmp_path / "out", evaluations=True)
    assert after["bright"] > before["bright"] + rise
    assert "s1" not in before                                     # there is no gradient that it could be measured by
    table = capsys.readouterr().out
    assert "bright (trained on)" in table and "judge (held out)" in table and "sharpness" not in table

    from diffusers import DDIMScheduler, StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    prompts = [PROMPTS[i % 6] for i in range(16)]
    images = pipe(prompts, latents=rsaft.evaluation_latents(16, LATENT), num_inference_steps=10, height=32, width=32,
                  guidance_scale=guidance_scale, output_type="pt").images
    rsaft.save_grid(images, tmp_path / "diffusers.png")
    begin, end = sorted((tmp_path / "out" / "samples").iterdir())
    assert (pixels(end) - pixels(tmp_path / "diffusers.png")).abs().max() <= 2
    assert (pixels(end) - pixels(begin)).abs().max() > 20


def test_the_pictures_are_drawn_once_and_an_interrupted_drawing_goes_on(tmp_path, few, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = [*GDRO, "--prompts", few, "--draw"]
    assert call(gdro.main, *flags, "--data", whole) == 0
    lines = [json.loads(line) for line in (whole / "pictures.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS[10:15] for _ in range(4)]
    assert len({line["reward"] for line in lines}) > 5 and len({str(line["seed"]) for line in lines}) == 20
    reward, line = rsaft.make_reward(BRIGHT), lines[7]            # picture 7 can be made again from its line
    pipe = rsaft.load_pipeline(str(MODEL))
    latents = torch.randn(LATENT, generator=rsaft.named_generator(*line["seed"]))[None]
    batch = rsaft.Batch([line["prompt"]], lambda purpose, shape: latents)
    with torch.no_grad():
        image, end = rsaft.make_generate(pipe, 4, 3.0, LATENT)(batch, plan=rsaft.Plan((False,) * 4))
    from safetensors.torch import load_file
    assert_close(load_file(whole / "000007.safetensors")["latents"], end[0], rtol=1e-3, atol=1e-3)
    assert (pixels(whole / line["file"]) - 255 * image[0]).abs().max() <= 1
    assert reward(image, [line["prompt"]]).item() == pytest.approx(line["reward"], abs=5e-3)

    shutil.copytree(whole, broken)                                # as after a power cut, in the middle of a line
    text = (whole / "pictures.jsonl").read_text()
    (broken / "pictures.jsonl").write_text(text[:len(text) * 11 // 20])
    for path in broken.glob("00001[0-9].*"):
        path.unlink()
    capsys.readouterr()
    assert call(gdro.main, *flags[:-1], "--train", "--data", broken) == 2
    assert "is drawn in part" in capsys.readouterr().err
    drawn = []
    draw, gdro.rsaft.Run.reward = rsaft.Run.reward, lambda *arguments: drawn.append(1) or draw(*arguments)
    try:
        assert call(gdro.main, *flags, "--data", broken) == 0
        first = len(drawn)
        assert call(gdro.main, *flags, "--data", broken) == 0     # nothing is left to do
    finally:
        rsaft.Run.reward = draw
    assert 0 < first == len(drawn) < 4
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert all((broken / path.name).read_bytes() == path.read_bytes() for path in whole.iterdir())
    capsys.readouterr()
    assert call(gdro.main, *flags, "--data", broken, "--seed", 1) == 2
    assert "with another seed" in capsys.readouterr().err


def test_training_takes_your_own_scored_pictures(tmp_path, few, capsys):
    """PNG files and a JSONL with file, prompt, reward; no latents, no reward function."""
    from PIL import Image
    sys.path.insert(0, str(TINY))
    import world
    data = tmp_path / "mine"
    data.mkdir()
    images = world.sample(torch.arange(12) % 4, torch.Generator().manual_seed(0))
    lines = []
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).mul(255).round().byte().numpy()).save(data / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "prompt": world.CAPTIONS[i % 4], "reward": i}))
    (data / "pictures.jsonl").write_text("\n".join(lines))
    flags = [*GDRO, "--data", data, "--train", "--reward", "--eval-every", 2, "--train-steps", 2]
    assert call(gdro.main, *flags, "--out", tmp_path / "out") == 0
    table = capsys.readouterr().out
    assert "judge (held out)" in table and "trained on" not in table
    assert [record["reward"] for record in records(tmp_path / "out")] == pytest.approx([5.5, 5.5], abs=2)
    run = rsaft.Run(rsaft.parse(list(map(str, flags)), gdro.Config, gdro.TINY), differentiable=False)
    groups = gdro.read_pictures(run, data)                        # what was encoded is the picture again
    latents, rewards = groups[world.CAPTIONS[1]]
    assert rewards.tolist() == [1, 5, 9]
    assert (rsaft.decode(run.pipe.vae, latents) - images[1::4]).square().mean() < 5e-3
    for line, words in (json.dumps({"file": "0.png", "prompt": "x"}), "line 13"), (
            json.dumps({"file": "0.png", "prompt": "x", "reward": math.nan}), "line 13"), (
            json.dumps({"file": "12.png", "prompt": "x", "reward": 1}), "line 13"), (
            json.dumps({"file": "0.png", "prompt": "x", "reward": 1}), "fewer than"), ("{", "can't be read"):
        (data / "pictures.jsonl").write_text("\n".join([*lines, line]))
        assert call(gdro.main, *flags, "--out", tmp_path / "none") == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("related/gdro.py: ") and len(error.splitlines()) == 1
    Image.new("RGB", (48, 32)).save(data / "0.png")
    (data / "pictures.jsonl").write_text("\n".join(lines))
    assert call(gdro.main, *flags, "--out", tmp_path / "none") == 2
    assert "48x32 pixels, not 32x32" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_gdro_saves_and_evaluates_the_average_and_goes_on_with_the_same_bits(tmp_path, few):
    flags = [*GDRO, "--prompts", few, "--data", tmp_path / "data", "--eval-every", 1, "--ema-decay", 0.15]
    assert call(gdro.main, *flags, "--train-steps", 3, "--out", tmp_path / "whole") == 0
    average = [p.clone() for p in checkpoint_after_nothing(4)]
    for n in 1, 2, 3:
        assert call(gdro.main, *flags, "--train-steps", n, "--out", tmp_path / "parts", "--resume") == 0
        state = checkpoint(tmp_path / "parts")
        decay = min(0.15, n / (9 + n))                                                   # 0.1, 0.15, 0.15
        average = [decay * old + (1 - decay) * new for old, new in zip(average, state["copies"])]
        assert_close(list(state["adapter"].values()), average, rtol=1e-4, atol=1e-7)
        assert any(not torch.equal(a, b) for a, b in zip(state["adapter"].values(), state["copies"]))
    assert story(tmp_path / "parts") == story(tmp_path / "whole")
    assert call(gdro.main, *flags, "--train-steps", 3, "--ema-decay", 0, "--out", tmp_path / "own") == 0
    own = checkpoint(tmp_path / "own")                            # the average is followed by nothing in the training
    assert all(map(torch.equal, own["copies"], state["copies"]))
    assert all(map(torch.equal, own["adapter"].values(), own["copies"]))
    whole, name = checkpoint(tmp_path / "whole"), "pytorch_lora_weights.safetensors"
    assert all(map(torch.equal, whole["copies"], state["copies"]))
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    from safetensors.torch import load_file
    saved = load_file(tmp_path / "whole" / name)
    assert all(torch.equal(tensor, saved[key]) for key, tensor in whole["adapter"].items())
    assert call(rsaft.main, "--evaluate", tmp_path / "whole", "--eval-reward", "judge", "--out", tmp_path / "e") == 0
    judged, last = records(tmp_path / "e", evaluations=True)[-1], records(tmp_path / "whole", evaluations=True)[-1]
    assert judged["judge"] == pytest.approx(last["judge"], abs=1e-4)


def checkpoint_after_nothing(rank):
    """The adapter that a run with seed 0 begins with."""
    return rsaft.add_lora(rsaft.load_pipeline(str(MODEL)).unet, rank, rsaft.named_generator(0, "lora"))


@pytest.mark.parametrize("sampler", ["own", "old"])
def test_crds_copies_follow_their_schedules_draw_the_pictures_and_survive_a_resume(tmp_path, few, monkeypatch, sampler):
    """Two updates an epoch. Interrupted at the end of an epoch and in the middle of one."""
    monkeypatch.setattr(crd, "sampling_decay", lambda epoch: 0.5 + 0.1 * epoch)          # the true one begins at 75
    flags = [*CRD, "--prompts", few, "--sampler", sampler]
    assert call(crd.main, *flags, "--train-steps", 5, "--out", tmp_path / "whole") == 0
    states = {}
    for n in 2, 3, 4, 5:
        assert call(crd.main, *flags, "--train-steps", n, "--out", tmp_path / "parts", "--resume") == 0
        states[n] = checkpoint(tmp_path / "parts")
    assert story(tmp_path / "parts") == story(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(checkpoint(tmp_path / "whole")["copies"], states[5]["copies"]))
    begin, after = list(checkpoint_after_nothing(4)), lambda n: list(states[n]["adapter"].values())
    count = len(begin)
    olds = [begin, [0.25 * x + 0.75 * p for x, p in zip(begin, after(2))]]
    samplings = [begin, [0.5 * x + 0.5 * p for x, p in zip(begin, after(2))]]
    olds.append([0.255 * x + 0.745 * p for x, p in zip(olds[1], after(4))])
    samplings.append([0.6 * x + 0.4 * p for x, p in zip(samplings[1], after(4))])
    for n, epoch in (2, 1), (3, 1), (4, 2), (5, 2):
        assert_close(states[n]["copies"][:count], [p.detach() for p in olds[epoch]], rtol=1e-4, atol=1e-7)
        assert_close(states[n]["copies"][count:-2], [p.detach() for p in samplings[epoch]], rtol=1e-4, atol=1e-7)

    pipe = rsaft.load_pipeline(str(MODEL))                        # the pictures of epoch 2, by hand
    params = rsaft.add_lora(pipe.unet, 4, rsaft.named_generator("other"))
    prompts = [p for p in rsaft.training_prompts(PROMPTS[10:15], 0, 2, 2) for _ in range(3)]
    batch, = rsaft.micro_batches(prompts, (0, "epoch", 2), 6)
    with torch.no_grad(), gdro.holding(params, (samplings if sampler == "own" else olds)[2]):
        images, _ = rsaft.make_generate(pipe, 4, 1.0, LATENT)(batch, plan=rsaft.Plan((False,) * 4))
    expected = rsaft.make_reward(BRIGHT)(images, prompts).mean().item()
    assert records(tmp_path / "whole")[4]["reward"] == pytest.approx(expected, abs=1e-4)


def test_crds_guards_are_what_their_flags_say(tmp_path, few, monkeypatch):
    logs, timesteps, draw = {}, set(), rsaft.draw
    monkeypatch.setattr(rsaft, "draw", lambda rng, low, high: timesteps.add((low, high)) or draw(rng, low, high))
    for name, flags in {"all": [], "unguided": ["--anchor-scale", 1], "constant": ["--anchor-weight", "constant"],
                        "none": ["--kl", 0], "bce": ["--loss", "bce"], "one": ["--error-weight", "one"],
                        "warm": ["--temperature", 0.5]}.items():
        assert call(crd.main, *CRD, "--prompts", few, "--train-steps", 2, "--out", tmp_path / name, *flags) == 0
        logs[name] = records(tmp_path / name)
    first = {name: log[0] for name, log in logs.items()}
    assert first["unguided"]["anchor"] == 0 < first["all"]["anchor"] < first["constant"]["anchor"]   # R is below 1
    assert "anchor" not in first["none"]
    assert logs["unguided"][1]["anchor"] > 0                      # the anchor is the frozen model, not the tuned one
    assert abs(logs["all"][1]["regression"] - first["all"]["regression"]) > 1e-5         # and r has moved from OLD
    assert timesteps == {(10, 999)}                               # the noisiest 99 percent
    evaluations = {name: log[1]["network_evaluations_without_gradient"] for name, log in logs.items()}
    assert (evaluations["all"], evaluations["unguided"], evaluations["none"]) == (6 * 3, 6 * 2, 6)
    assert first["all"]["network_evaluations_without_gradient"] == 6 * 3 + 6 * 4                     # and the drawing
    assert all(log["network_evaluations_with_gradient"] == 6 for log in first.values())
    assert first["all"]["regression"] != first["bce"]["regression"]
    assert first["all"]["regression"] != first["warm"]["regression"]
    assert logs["all"][1]["regression"] != logs["one"][1]["regression"]
    assert first["all"]["reward"] == first["none"]["reward"]


def test_an_update_of_gdro_costs_one_evaluation_without_and_one_with_gradient_and_draws_nothing(tmp_path, few):
    flags = [*GDRO, "--prompts", few, "--data", tmp_path / "data"]
    assert call(gdro.main, *flags, "--train-steps", 2, "--out", tmp_path / "out") == 0
    for record in records(tmp_path / "out"):
        assert record["network_evaluations_without_gradient"] == record["network_evaluations_with_gradient"] == 6
        assert "reward_evaluations" not in record
    first, second = records(tmp_path / "out")
    assert first["best_error"] == pytest.approx(first["best_error_ref"], rel=1e-6)       # a new adapter changes nothing
    assert second["best_error"] != pytest.approx(second["best_error_ref"], rel=1e-6)     # the reference stays behind


def test_gdros_first_update_is_the_gradient_of_its_loss_on_groups_of_scored_pictures(tmp_path, few, monkeypatch):
    from safetensors.torch import load_file
    data, timesteps, draw = tmp_path / "data", set(), rsaft.draw
    monkeypatch.setattr(rsaft, "draw", lambda rng, low, high: timesteps.add((low, high)) or draw(rng, low, high))
    assert call(gdro.main, *GDRO, "--prompts", few, "--data", data, "--beta", 1, "--tau", 0.2, "--gamma", 0.7,
                "--train-steps", 1, "--out", tmp_path / "out") == 0
    record, = records(tmp_path / "out")
    lines = [json.loads(line) for line in (data / "pictures.jsonl").read_text().splitlines()]
    pipe = rsaft.load_pipeline(str(MODEL))
    params = rsaft.add_lora(pipe.unet, 4, rsaft.named_generator(0, "lora"))
    loss, best, rewards = 0, [], []
    for number, prompt in enumerate(rsaft.training_prompts(PROMPTS[10:15], 0, 0, 2)):
        rng = rsaft.named_generator(0, 0, number, "group")
        drawn = [line for line in lines if line["prompt"] == prompt]
        group = [drawn[i] for i in torch.randperm(4, generator=rng)[:3]]
        x0 = torch.stack([load_file(data / line["file"].replace(".png", ".safetensors"))["latents"] for line in group])
        r, t = torch.tensor([line["reward"] for line in group]), draw(rng, 0, 999)
        noise, squared_alpha = torch.randn(x0.shape, generator=rng), pipe.scheduler.alphas_cumprod[t]
        f = pipe.unet(squared_alpha.sqrt() * x0 + (1 - squared_alpha).sqrt() * noise, t,
                      encoder_hidden_states=pipe.encode_prompt([prompt] * 3, "cpu", 1, False)[0]).sample
        error = (noise - f).square().mean((1, 2, 3))
        s = error.detach() - error                     # beta is 1, and a new adapter is the reference
        loss = loss + (gdro.gdro_loss(s, r, 0.2) + 0.7 * error[r.argmax()]) / 2
        best.append(error[r.argmax()].item())
        rewards.append(r.mean().item())
    loss.backward()
    assert timesteps == {(0, 999)}
    assert record["reward"] == pytest.approx(sum(rewards) / 2)
    assert record["best_error"] == pytest.approx(sum(best) / 2, rel=1e-4)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params]).item()
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_a_differentiable_reward_has_its_sharpness_measured_here_too(tmp_path, few):
    assert call(crd.main, *CRD, "--prompts", few, "--reward", "pickscore", "--eval-every", 1, "--train-steps", 1,
                "--out", tmp_path / "out") == 0
    assert [record["s1"] > 0 for record in records(tmp_path / "out", evaluations=True)] == [True, True]


def test_a_black_box_is_refused_where_its_gradient_is_needed_and_several_scores_everywhere(capsys):
    assert call(rsaft.main, "--tiny", "--reward", BRIGHT) == 2
    assert "not differentiable" in capsys.readouterr().err
    for main in rsaft.main, gdro.main, crd.main:
        assert call(main, "--tiny", "--reward", f"{TINY / 'world.py'}:oracle", "--eval-reward", "judge") == 2
        assert "several scores" in capsys.readouterr().err


def test_the_example_of_a_black_box_is_the_accuracy_of_the_oracle():
    sys.path.insert(0, str(TINY))
    import world
    images = world.sample(torch.arange(3), torch.Generator().manual_seed(0)).requires_grad_()
    score = rsaft.make_reward(ACCURACY)(images, [world.CAPTIONS[i] for i in (0, 1, 5)])
    assert score.tolist() == [1, 1, 0] and not score.requires_grad


@pytest.mark.parametrize("main, flags, words", [
    (gdro.main, ["--group-size", "1"], "--group-size"),
    (gdro.main, ["--group-size", "17"], "--group-size"),
    (gdro.main, ["--batch-size", "20", "--micro-batch-size", "20"], "--batch-size 20"),
    (gdro.main, ["--ema-decay", "1"], "--ema-decay"),
    (gdro.main, ["--draw", "--train"], "exclude"),
    (gdro.main, ["--reward"], "--reward"),
    (gdro.main, ["--train", "--data", "nowhere"], "nowhere"),
    (gdro.main, ["--data", "full"], "not drawn here"),
    (gdro.main, ["--sam"], "--sam"),
    (gdro.main, ["--tau", "0"], "--tau"),
    (crd.main, ["--group-size", "1"], "--group-size"),
    (crd.main, ["--group-size", "7"], "--group-size"),
    (crd.main, ["--loss", "l1"], "--loss"),
    (crd.main, ["--evaluate", "."], "--evaluate"),
    (crd.main, ["--temperature", "0"], "--temperature"),
    (crd.main, ["--reward", "beauty"], "beauty"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys, main, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full", "thesis.txt").write_text("years of work")
    before = sorted(Path().rglob("*"))
    assert main(["--tiny", *flags]) == 2
    error = capsys.readouterr().err
    program = "related/gdro.py: " if main is gdro.main else "related/crd.py: "
    assert words in error and error.startswith(program) and len(error.splitlines()) == 1, error
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("main", [gdro.main, crd.main])
def test_several_processes_are_refused(monkeypatch, capsys, main):
    monkeypatch.setattr(rsaft, "PROCESSES", 2)
    assert main(["--tiny"]) == 2 and "one process" in capsys.readouterr().err


@pytest.mark.parametrize("module", [gdro, crd])
def test_help_gives_every_flag_and_none_of_rsafts_own(module, tmp_path):
    command = [sys.executable, module.__file__, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout
    assert f"python related/{module.__name__}.py" in text
    for setting in rsaft.fields(module.Config):
        assert f"--{setting.name.replace('_', '-')} " in text
    assert not any(f"--{name} " in text for name in ("sam", "noise", "method", "grad-steps", "evaluate"))
