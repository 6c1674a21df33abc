"""What gdro.py and crd.py claim, claim by claim: `pytest related`. About half a minute on one CPU core.

The models are the trained ones of tiny/; the reward of the runs is a black box, without a gradient.
"""
import contextlib
import gc
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import sys
from collections import namedtuple
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import crd
import gdro
import rsaft
import scored

HERE = Path(__file__).resolve().parent
TINY, BRIGHT = HERE.parent / "tiny", f"{Path(__file__).resolve()}:bright"
MODEL, LATENT, ADAPTER = TINY / "stable-diffusion", (4, 8, 8), "pytorch_lora_weights.safetensors"
PROMPTS = (TINY / "prompts.txt").read_text().splitlines()
FIVE = PROMPTS[10:15]    # what the small runs are trained on: not the first, so that an index shows
PLAN = rsaft.Plan((False,) * 2)    # how they draw: two steps, none with gradient


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """All are imported, and kept from the garbage collector: each run calls it, and it would take long."""
    rsaft.quiet_libraries()
    rsaft.load_model(str(MODEL))
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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


# ---- The forward process -----------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_sampler_needs_to_get_back_to_the_picture(prediction_type):
    """With f = y a DDIM step leads from x_t to the same picture and noise at t', and x0 is the picture."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler.from_pretrained(MODEL / "scheduler", prediction_type=prediction_type)
    x0, noise = normal(2, *LATENT), normal(2, *LATENT, seed=1)
    steps = rsaft.ddim_steps(scheduler, 10)
    for step, after in zip(steps, steps[1:]):
        x, y = gdro.forward_process(x0, noise, step.alpha, step.sigma, prediction_type)
        assert_close(step.x0(x, y), x0, rtol=1e-5, atol=1e-5)
        expected, _ = gdro.forward_process(x0, noise, after.alpha, after.sigma, prediction_type)
        assert_close(step.next(x, y), expected, rtol=1e-5, atol=1e-5)
        t = torch.tensor([step.t])
        assert_close(x, scheduler.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5)
        if prediction_type == "v_prediction":
            assert_close(y, scheduler.get_velocity(x0, noise, t), rtol=1e-5, atol=1e-5)


def test_the_target_of_flow_matching_is_the_velocity_of_the_straight_line_from_picture_to_noise():
    x0, noise = normal(2, *LATENT), normal(2, *LATENT, seed=1)
    for sigma in 0.0, 0.3, 1.0:
        x, y = gdro.forward_process(x0, noise, 1 - sigma, sigma, "flow")
        later, _ = gdro.forward_process(x0, noise, 0.9 - sigma, sigma + 0.1, "flow")
        assert_close(later, x + 0.1 * y)    # one Euler step
        assert_close(x - sigma * y, x0)
    with pytest.raises(KeyError):
        gdro.forward_process(x0, noise, 0.5, 0.5, "sample")


# ---- GDRO's loss -------------------------------------------------------------------------------------------

COLD = 1e-6    # tau -> 0


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
        r[list(order)] = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)    # the first is the best
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
    s, r, constants = normal(3, 6), normal(3, 6, seed=1), torch.tensor([[-7.0], [0.0], [30.0]]).double()
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


@pytest.mark.parametrize("tau", [COLD, 0.5])
def test_a_group_of_equal_rewards_gives_no_gradient(tau):
    s, r = normal(2, 6).requires_grad_(), torch.stack([torch.full((6,), 0.7).double(), normal(6, seed=1)])
    loss = gdro.gdro_loss(s, r, tau)
    equal, other = torch.autograd.grad(loss.sum(), s)[0]
    assert loss[0] == 0 and (equal == 0).all() and other.abs().max() > 0.1


def test_a_group_is_drawn_at_random_among_those_with_different_rewards():
    r, rng = torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 0]), torch.Generator().manual_seed(0)
    groups = [gdro.draw_group(r, 2, rng).tolist() for _ in range(200)]
    assert all(sorted(r[group].tolist()) == [0, 1] for group in groups)
    assert {i for group in groups for i in group} == set(range(8))


def test_combined_advantages_are_each_normalised_within_the_prompt_and_then_weighted():
    """By the textbook; a reward a thousand times as large, or moved, changes nothing; equal ones are 0."""
    import statistics
    rewards = normal(2, 3, 5)
    advantages = gdro.combined_advantages(rewards, [1.0, -0.5])
    for prompt in range(3):
        a, b = ([(x - statistics.mean(row)) / statistics.pstdev(row) for x in row]
                for row in rewards[:, prompt].tolist())
        assert advantages[prompt].tolist() == pytest.approx([x - 0.5 * y for x, y in zip(a, b)])
    assert_close(gdro.combined_advantages(torch.stack([1000 * rewards[0] + 7, rewards[1]]), [1.0, -0.5]),
                 advantages)
    equal = torch.stack([rewards[0], torch.full((3, 5), 0.1).double()])
    assert_close(gdro.combined_advantages(equal, [1.0, 9.0]), gdro.combined_advantages(rewards[:1], [1.0]))
    assert (gdro.combined_advantages(equal[1:].float(), [1.0]) == 0).all()
    with pytest.raises(ValueError):
        gdro.combined_advantages(rewards, [1.0])


def test_the_corrected_score_is_the_papers():
    r, u = torch.tensor([0.0, 0.5, 1.0, 1.0]), torch.tensor([1.0, 5.0, 3.0, 1.0])
    assert gdro.corrected_score(r, u).tolist() == pytest.approx([0.2, 1.2, 0.2, -1.8])


def test_the_implicit_reward_is_the_fall_of_the_mean_squared_error_times_beta():
    f, f_ref, y = normal(3, *LATENT), normal(3, *LATENT, seed=1), normal(3, *LATENT, seed=2)
    expected = [-12 * ((y[i] - f[i]) ** 2 - (y[i] - f_ref[i]) ** 2).mean().item() for i in range(3)]
    s = gdro.implicit_reward(gdro.squared_error(f, y), gdro.squared_error(f_ref, y), 12.0)
    assert s.tolist() == pytest.approx(expected)


# ---- CRD's loss --------------------------------------------------------------------------------------------

def test_the_advantage_is_clipped_and_scaled_and_zero_where_there_is_no_spread():
    reward = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.1]])
    deviations = {"prompt": 3.5 ** 0.5, "epoch": reward.square().mean().sub(reward.mean() ** 2).sqrt()}
    for std, deviation in deviations.items():
        R = crd.scaled_advantage(reward, std=std)
        assert_close(R[0], (reward[0] - 3) / deviation / 10 + 0.5)
        assert (R[1] == 0.5).all()
    assert torch.equal(crd.scaled_advantage(reward), R)    # the epoch's is the default
    equal = torch.full((24,), 0.1)
    assert equal.std(correction=0) > 0    # rounding: it isn't quite 0
    assert (crd.scaled_advantage(equal) == 0.5).all()
    outlier = torch.zeros(100)
    outlier[0] = 1.0                      # 9.9 standard deviations
    assert crd.scaled_advantage(outlier)[0] == 1 and crd.scaled_advantage(-outlier)[0] == 0


FORMS = [("square", math.inf), ("square", 0.7), ("bce", math.inf), ("bce", 0.7)]


@pytest.mark.parametrize("form, temperature", FORMS)
def test_a_constant_added_to_the_rewards_of_a_prompt_changes_nothing(form, temperature):
    r, reward, constants = normal(3, 8), normal(3, 8, seed=1), torch.tensor([[-7.0], [0.0], [30.0]]).double()
    settings = dict(beta=0.5, form=form, temperature=temperature)
    R = crd.scaled_advantage(reward, std="prompt")
    expected = crd.crd_loss(r, R, **settings)
    assert expected.shape == (3,)
    assert_close(crd.crd_loss(r + constants, R, **settings), expected)
    assert_close(crd.scaled_advantage(reward + constants, std="prompt"), R)
    assert_close(crd.scaled_advantage(reward + 30), crd.scaled_advantage(reward))    # one for all prompts


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
    weights = [torch.full((n,), 1 / n)]
    if temperature < math.inf:
        weights = [(a / 0.7).softmax(0), (-a / 0.7).softmax(0)]

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
    f, f_old, y = normal(3, *LATENT), normal(3, *LATENT, seed=1), normal(3, *LATENT, seed=2)
    f.requires_grad_()
    f_old.requires_grad_()
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
    R = torch.tensor([0.0, 0.25, 0.5, 1.0]).double()
    error = (normal(4, *LATENT) - normal(4, *LATENT, seed=1)).square().mean((1, 2, 3))
    assert_close(crd.anchor_loss(f, f_ref, R, 0.1), 0.1 * ((1e-3 + R * (1 - 1e-3)) * error).mean())
    assert_close(crd.anchor_loss(f, f_ref, R, 0.1, by_reward=False), 0.1 * error.mean())
    assert_close(crd.anchor_loss(f, f_ref, R, 1e-5), 1e-5 * error.mean())    # m is at most 1
    gradient, none = torch.autograd.grad(crd.anchor_loss(f, f_ref, R, 0.1), (f, f_ref), allow_unused=True)
    assert none is None and gradient[3].norm() > 100 * gradient[0].norm() > 0


def test_the_schedules_of_the_copies_are_those_of_the_port():
    settings = crd.parse([])
    old, sampling = ([crd.decay(n, *schedule) for n in (0, 2, 75, 76, 175, 10 ** 6)]
                     for schedule in (settings.old_decay, settings.sampling_decay))
    assert old == pytest.approx([0.25, 0.26, 0.625, 0.63, 0.999, 0.999])
    assert sampling == pytest.approx([0, 0, 0, 0.0075, 0.75, 0.999])
    given = crd.parse("--old-decay 0 0.25 0.001 0.5 --sampling-decay 0 0 0.001 0.5".split())
    assert [crd.decay(n, *given.old_decay) for n in (0, 100, 300)] == pytest.approx([0.25, 0.35, 0.5])
    assert [crd.decay(n, *given.sampling_decay) for n in (0, 100, 600)] == pytest.approx([0, 0.1, 0.5])


@pytest.mark.parametrize("count, positions", [(1, 9), (3, 9), (9, 9), (20, 9), (4, 9), (2, 1)])
def test_noise_levels_are_drawn_one_from_each_stratum_and_all_alike_often(count, positions):
    """In 4000 draws; 0.02 is more than twice the standard error of a share."""
    rng, shares = rsaft.named_generator("strata"), torch.zeros(positions)
    for _ in range(4000):
        drawn = [crd.stratum(i, count, positions, rng) for i in range(count)]
        for i, level in enumerate(drawn):
            assert math.floor(i * positions / count) <= level <= math.ceil((i + 1) * positions / count) - 1
            shares[level] += 1 / count / 4000
    assert (shares - 1 / positions).abs().max() < 0.02


# ---- Copies of one adapter in one network ------------------------------------------------------------------

def new_model(guidance_scale=1.0, weights=None):
    """The model and its adapter as seed 0 and rank 4 make them, or with other weights in the adapter."""
    model = rsaft.load_model(str(MODEL), len(PLAN.grad), guidance_scale)
    params = model.add_adapter(4, rsaft.named_generator(0, "lora"))
    for p, value in zip(params, weights or params, strict=True):
        p.data.copy_(value)
    return model, params


def test_with_b_at_zero_the_network_is_the_frozen_one_to_the_bit_and_all_differences_are_exactly_0():
    base, (model, params) = rsaft.load_model(str(MODEL)), new_model()
    begin, (x, y) = [p.detach().clone() for p in params], normal(2, 2, *LATENT, dtype=torch.float32)
    for p in params:
        torch.nn.init.normal_(p, std=0.1, generator=rsaft.named_generator("moved", tuple(p.shape)))
    for guidance_scale in 1, 4.5:
        with torch.no_grad():
            f_ref = base.denoiser(PROMPTS[:2], guidance_scale)(x, 500)
            denoise = model.denoiser(PROMPTS[:2], guidance_scale)
            tuned = denoise(x, 500)
            with gdro.holding(params, begin):
                f = denoise(x, 500)
        assert torch.equal(f, f_ref)
        error, error_ref = gdro.squared_error(f, y), gdro.squared_error(f_ref, y)
        assert (gdro.implicit_reward(error, error_ref, 12.0) == 0).all()
        assert (crd.implicit_reward(f, f_ref, y) == 0).all()
        assert crd.anchor_loss(f, f_ref, torch.ones(2), 0.1) == 0
        assert (crd.implicit_reward(tuned, f_ref, y) != 0).all()


def test_a_network_holds_other_weights_for_a_while_and_then_its_own_bits_again():
    params = new_model()[1]
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


# ---- Runs on the small world -------------------------------------------------------------------------------
# The small runs have five prompts, two sampling steps and six pictures an update. Several tests look at the
# same two, `small_gdro` and `small_crd`.

SMALL = ["--tiny", "--reward", BRIGHT, "--eval-reward", "judge", "--sampling-steps", 2, "--eval-images", 4,
         "--eval-every", 1, "--rank", 4, "--group-size", 3, "--batch-size", 6]
Small = namedtuple("Small", "run flags updates out")    # out: where run(*flags) has made that many updates


def call(main, *arguments):
    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The flags of a small run of either method."""
    path = tmp_path_factory.mktemp("prompts") / "five.txt"
    path.write_text("\n".join(FIVE))
    return [*SMALL, "--prompts", path]


@pytest.fixture(scope="module")
def drawn(small, tmp_path_factory):
    """The folder with the pictures of the small runs of GDRO, four of each prompt."""
    folder = tmp_path_factory.mktemp("data") / "drawn"
    assert call(gdro.main, *small, "--pictures", 4, "--draw", "--data", folder) == 0
    return folder


@pytest.fixture(scope="module")
def small_gdro(small, drawn, tmp_path_factory):
    flags = [*small, "--pictures", 4, "--data", drawn, "--beta", 1, "--tau", 0.2, "--gamma", 0.7,
             "--ema-decay", 0.15, "--learning-rate", 1e-2]
    run = Small(partial(call, gdro.main), flags, 3, tmp_path_factory.mktemp("gdro") / "out")
    assert run.run(*run.flags, "--train-steps", run.updates, "--out", run.out) == 0
    return run


@pytest.fixture(scope="module")
def small_crd(small, tmp_path_factory):
    """Two updates an epoch, so that it ends in the middle of one. Without evaluations.

    It draws in four steps, of which three are noise levels; its sampling copy lags from the first epoch on.
    """
    flags = [*small, "--sampling-steps", 4, "--noise-levels", 2, "--sampling-decay", 0, 0.5, 0.05, 0.9,
             "--eval-reward", "--eval-every", 0]
    run = Small(partial(call, crd.main), flags, 5, tmp_path_factory.mktemp("crd") / "out")
    assert run.run(*run.flags, "--train-steps", run.updates, "--out", run.out) == 0
    return run


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def records(out, evaluations=False):
    return [line for line in log_of(out) if line.get("eval", False) == evaluations]


def checkpoint(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_same_run(a, b):
    """Two folders with the same bits, but for what a clock or the machine says."""
    clocks, state, other = {"seconds", "peak_gb"}, checkpoint(a), checkpoint(b)
    assert {path.relative_to(a) for path in files(a)} == {path.relative_to(b) for path in files(b)}
    for line, same in zip(log_of(a), log_of(b), strict=True):
        assert {name: line[name] for name in line if name not in clocks} == {
            name: same[name] for name in same if name not in clocks}
    for path in [*Path(a).glob("samples/*"), *Path(a).rglob(ADAPTER)]:
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes()
    for name in "adapter", "extra", "optimizer":
        assert_close(state[name], other[name], rtol=0, atol=0)


def die_in_step(patch):
    """In the second update of the call: the weights have moved."""
    step, steps = torch.optim.AdamW.step, itertools.count(1)

    def step_and_die(optimizer):
        step(optimizer)
        if next(steps) == 2:
            raise KeyboardInterrupt

    patch.setattr(torch.optim.AdamW, "step", step_and_die)


def die_in_write(patch):
    """After the first update of the call: half of its checkpoint is written."""
    step, write, steps = torch.optim.AdamW.step, rsaft.write_atomic, []

    def write_half_and_die(path, content):
        if steps and path.name == "checkpoint.pt":
            Path(f"{path}.new").write_bytes(content[:len(content) // 2])
            raise KeyboardInterrupt
        write(path, content)

    patch.setattr(torch.optim.AdamW, "step", lambda optimizer: steps.append(step(optimizer)))
    patch.setattr(rsaft, "write_atomic", write_half_and_die)


DEATHS = {"step": die_in_step, "write": die_in_write}
Life = namedtuple("Life", "death code error updates state out")


def live(small, out, *plan):
    """A small run by several calls, (--train-steps, how it dies if it does) each: a list of Life."""
    lives = []
    for train_steps, death in plan:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as error:
            if death:
                DEATHS[death](patch)
            code = small.run(*small.flags, "--train-steps", train_steps, "--out", out)
        lives.append(Life(death, code, error.getvalue(), len(records(out)), checkpoint(out), out))
    return lives


@pytest.fixture(scope="module")
def gdro_lives(small_gdro, tmp_path_factory):
    """`small_gdro` again, but prolonged after update 1 and killed in update 3."""
    return live(small_gdro, tmp_path_factory.mktemp("gdro") / "lives", (1, None), (3, "step"), (3, None))


@pytest.fixture(scope="module")
def crd_lives(small_crd, tmp_path_factory):
    """`small_crd` again, but stopped at the end of an epoch and in the middle, killed twice in update 4."""
    plan = (2, None), (5, "step"), (5, "write"), (4, None), (5, None)
    return live(small_crd, tmp_path_factory.mktemp("crd") / "lives", *plan)


def pixels(path):
    """A PNG file as (3, H, W) in 0..255."""
    import numpy
    from PIL import Image
    return torch.from_numpy(numpy.array(Image.open(path))).permute(2, 0, 1).int()


@pytest.mark.parametrize("module, guidance_scale, rise, flags", [
    (gdro, 3.0, 0.015, ["--pictures", 6, "--ema-decay", 0.5]),
    (crd, 1.0, 0.07, ["--group-size", 6, "--eval-sampling-steps", 6])])
def test_a_short_run_raises_a_reward_without_gradient_and_plain_diffusers_loads_the_adapter(
        tmp_path, capsys, module, guidance_scale, rise, flags):
    """By more than `rise`, half of the least that seeds 0, 1 and 2 gave when this was written, or less."""
    (tmp_path / "six.txt").write_text("\n".join(PROMPTS[:6]))
    data = ["--data", tmp_path / "data"] if module is gdro else []
    assert call(module.main, "--tiny", "--reward", BRIGHT, "--eval-reward", "judge", "--rank", 4, "--prompts",
                tmp_path / "six.txt", "--sampling-steps", 4, "--eval-images", 12, "--eval-every", 8,
                "--train-steps", 8, "--batch-size", 12, "--learning-rate", 1e-2, "--out", tmp_path / "out",
                *data, *flags) == 0
    before, after = records(tmp_path / "out", evaluations=True)
    assert after["bright"] > before["bright"] + rise
    assert "s1" not in before    # there is no gradient that it could be measured by
    table = capsys.readouterr().out
    assert "bright (trained on)" in table and "judge (held out)" in table and "sharpness" not in table

    from diffusers import DDIMScheduler, StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(PROMPTS[:6] * 2, latents=rsaft.evaluation_latents(12, LATENT), height=32, width=32,
                  num_inference_steps=6 if module is crd else 4, guidance_scale=guidance_scale,
                  output_type="pt").images
    (tmp_path / "diffusers.png").write_bytes(rsaft.make_grid(images))
    begin, end = sorted((tmp_path / "out" / "samples").glob("*.png"))
    assert (pixels(end) - pixels(tmp_path / "diffusers.png")).abs().max() <= 2
    assert (pixels(end) - pixels(begin)).abs().max() > 20


@pytest.mark.parametrize("name", ["gdro", "crd"])
def test_a_run_that_dies_in_an_update_or_in_a_write_goes_on_with_the_same_bits(name, request):
    small, lives = request.getfixturevalue(f"small_{name}"), request.getfixturevalue(f"{name}_lives")
    for life in lives:
        assert life.code == (1 if life.death else 0)
        assert ("by hand; the same command with --out" in life.error) == bool(life.death)
        assert life.state["optimizer"]["state"][0]["step"] == life.updates
    assert [life.updates for life in lives] == ([1, 2, 3] if name == "gdro" else [2, 3, 3, 4, 5])
    assert_same_run(lives[-1].out, small.out)


@pytest.mark.parametrize("name, flag, words", [
    ("small_gdro", ["--beta", 3], "beta 1.0, not 3.0"), ("small_crd", ["--kl", 0], "kl 0.1, not 0.0")])
def test_a_finished_run_says_so_and_refuses_other_settings_by_name(
        name, flag, words, request, tmp_path, capsys):
    small, out = request.getfixturevalue(name), tmp_path / "out"
    shutil.copytree(small.out, out)
    command = [*small.flags, "--out", out, "--train-steps"]
    assert small.run(*command, small.updates) == 0
    assert "a larger --train-steps goes further" in capsys.readouterr().out
    assert_same_run(out, small.out)
    before = files(out)
    for more, named in ([small.updates, *flag], words), ([small.updates - 1], "past update"):
        assert small.run(*command, *more) == 2
        error = capsys.readouterr().err
        assert named in error and len(error.splitlines()) == 1
    assert files(out) == before


# ---- GDRO's pictures ---------------------------------------------------------------------------------------

def test_the_pictures_are_drawn_once_and_an_interrupted_drawing_goes_on(
        tmp_path, small, drawn, monkeypatch, capsys):
    from safetensors.torch import load_file
    lines = [json.loads(line) for line in (drawn / "pictures.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt in FIVE for _ in range(4)]
    assert len({line["reward"] for line in lines}) > 5 and len({str(line["seed"]) for line in lines}) == 20
    line, (model, _) = lines[7], new_model(3.0)    # picture 7 can be made again from its line
    noise = torch.randn(LATENT, generator=rsaft.named_generator(*line["seed"]))[None]
    with torch.no_grad():
        end = rsaft.rollout(model.denoiser([line["prompt"]]), noise, model.steps, PLAN)
        image = model.decode(end)
    assert_close(load_file(drawn / "000007.safetensors")["latents"], end[0], rtol=1e-3, atol=1e-3)
    assert (pixels(drawn / line["file"]) - 255 * image[0]).abs().max() <= 1
    score = rsaft.make_reward(BRIGHT)(image, [line["prompt"]]).item()
    assert [score] == pytest.approx(line["rewards"], abs=5e-3) and line["reward"] == line["rewards"][0]

    broken, flags = tmp_path / "broken", [*small, "--pictures", 4]
    shutil.copytree(drawn, broken)                 # as after a power cut, in the middle of a line
    text = (drawn / "pictures.jsonl").read_text()
    (broken / "pictures.jsonl").write_text(text[:len(text) * 11 // 20])
    for path in broken.glob("00001[0-9].*"):
        path.unlink()
    capsys.readouterr()
    assert call(gdro.main, *flags, "--train", "--data", broken) == 2
    assert "is drawn in part" in capsys.readouterr().err
    for path in broken.glob("*.png"):
        os.utime(path, (0, 0))
    sample, calls = rsaft.sample_images, itertools.count(1)

    def die_in_the_second_batch(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(rsaft, "sample_images", die_in_the_second_batch)
    assert call(gdro.main, *flags, "--draw", "--data", broken) == 1
    assert f"with --data {broken} goes on" in capsys.readouterr().err
    monkeypatch.undo()
    for new in range(6, 20), ():                   # all but the batch that was whole; then nothing is left
        assert call(gdro.main, *flags, "--draw", "--data", broken) == 0
        pictures = sorted(broken.glob("*.png"))
        assert [path.name for path in pictures if path.stat().st_mtime] == [f"{i:06d}.png" for i in new]
        for path in pictures:
            os.utime(path, (0, 0))
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in drawn.iterdir())
    assert all((broken / path.name).read_bytes() == path.read_bytes() for path in drawn.iterdir())
    capsys.readouterr()
    assert call(gdro.main, *flags, "--draw", "--data", broken, "--seed", 1) == 2
    assert "with another seed" in capsys.readouterr().err


def test_training_takes_your_own_scored_pictures(tmp_path, small, capsys):
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
    flags = [*small, "--data", data, "--train", "--reward", "--eval-every", 2, "--train-steps", 2]
    assert call(gdro.main, *flags, "--out", tmp_path / "out") == 0
    table = capsys.readouterr().out
    assert "judge (held out)" in table and "trained on" not in table
    assert [record["reward"] for record in records(tmp_path / "out")] == pytest.approx([5.5, 5.5], abs=2)

    settings, (model, _) = gdro.check(gdro.parse(list(map(str, flags)))), new_model()
    names, rewards = scored.read_groups(settings, None)[world.CAPTIONS[1]]
    assert rewards.tolist() == [1, 5, 9]
    latents = scored.read_latents(settings, model, names)
    with torch.no_grad():        # what was encoded is the picture again
        assert (model.decode(latents) - images[1::4]).square().mean() < 5e-3
    for line, words in (json.dumps({"file": "0.png", "prompt": "x"}), "line 13"), (
            json.dumps({"file": "0.png", "prompt": "x", "reward": math.nan}), "line 13"), (
            json.dumps({"file": "0.png", "prompt": "x", "reward": 1}), "fewer than"), ("{", "line 13"):
        (data / "pictures.jsonl").write_text("\n".join([*lines, line]))
        with pytest.raises(rsaft.UserError, match=words):
            scored.read_groups(settings, None)
    with pytest.raises(rsaft.UserError, match="12.png won't do"):
        scored.read_latents(settings, model, ["12.png"])
    Image.new("RGB", (48, 32)).save(data / "0.png")
    (data / "pictures.jsonl").write_text("\n".join(lines))
    assert call(gdro.main, *flags, "--out", tmp_path / "none") == 2
    error = capsys.readouterr().err
    assert "0.png won't do" in error and "48x32 pixels, not 32x32" in error
    assert not (tmp_path / "none").exists()
    assert error.startswith("related/gdro.py: ") and len(error.splitlines()) == 1


# ---- GDRO's training ---------------------------------------------------------------------------------------

def test_gdro_trains_on_its_own_and_saves_and_evaluates_the_average(tmp_path, small_gdro, gdro_lives):
    from safetensors.torch import load_file
    (model, params), states = new_model(3.0), {life.updates: life.state for life in gdro_lives}
    average = [p.detach().clone() for p in params]
    for n in 1, 2, 3:
        adapter, trained = list(states[n]["adapter"].values()), states[n]["extra"]
        decay = min(0.15, n / (9 + n))    # 0.1, 0.15, 0.15
        average = [decay * old + (1 - decay) * new for old, new in zip(average, trained)]
        assert_close(adapter, average, rtol=1e-4, atol=1e-7)
        assert any(not torch.equal(a, b) for a, b in zip(adapter, trained))
    own = ["--train-steps", 2, "--ema-decay", 0, "--eval-every", 0, "--out", tmp_path / "own"]
    assert small_gdro.run(*small_gdro.flags, *own) == 0    # nothing in the training follows the average
    assert_close(checkpoint(tmp_path / "own")["extra"], states[2]["extra"], rtol=0, atol=0)
    assert_close([*checkpoint(tmp_path / "own")["adapter"].values()], states[2]["extra"], rtol=0, atol=0)
    saved = load_file(small_gdro.out / ADAPTER)
    assert_close(saved, states[3]["adapter"], rtol=0, atol=0)

    judge, judged = rsaft.make_reward("judge", str(TINY)), []
    for weights in [saved[name] for name in model.adapter()], trained:
        with torch.no_grad(), gdro.holding(params, weights):
            latents = rsaft.rollout(model.denoiser(FIVE[:4]), rsaft.evaluation_latents(4, LATENT),
                                    model.steps, PLAN)
            judged.append(judge(model.decode(latents), FIVE[:4]).mean().item())
    last = records(small_gdro.out, evaluations=True)[-1]
    assert last["judge"] == pytest.approx(judged[0], abs=1e-3)
    assert last["judge"] != pytest.approx(judged[1], abs=1e-2)


def test_an_update_of_gdro_costs_one_evaluation_without_and_one_with_gradient_and_draws_nothing(small_gdro):
    for record in records(small_gdro.out):
        assert record["network_evaluations_without_gradient"] == 6
        assert record["network_evaluations_with_gradient"] == 6
        assert "reward_evaluations" not in record
    first, second, _ = records(small_gdro.out)
    assert first["best_error"] == pytest.approx(first["best_error_ref"], rel=1e-6)      # no change yet
    assert second["best_error"] != pytest.approx(second["best_error_ref"], rel=1e-6)    # the reference stays


def noised(model, x0, noise, t):
    squared_alpha = model.pipe.scheduler.alphas_cumprod[t]
    return squared_alpha.sqrt() * x0 + (1 - squared_alpha).sqrt() * noise


def predict(model, x, t, prompt):
    """What diffusers' own network says of x, without guidance."""
    embeds, _ = model.pipe.encode_prompt([prompt] * len(x), "cpu", 1, False)
    return model.network(x, t, encoder_hidden_states=embeds).sample


@pytest.mark.parametrize("made", [0, 2])
def test_gdros_update_is_the_gradient_of_its_loss_on_groups_of_scored_pictures(
        made, small_gdro, gdro_lives, drawn):
    """By hand, the update after `made`. t is uniform over 0..999; other bounds would give other t."""
    from safetensors.torch import load_file
    lines = [json.loads(line) for line in (drawn / "pictures.jsonl").read_text().splitlines()]
    trained = {life.updates: life.state["extra"] for life in gdro_lives}.get(made)
    (model, params), (frozen, _), loss, best, rewards = new_model(weights=trained), new_model(), 0, [], []
    scores = [[line["reward"] for line in lines if line["prompt"] == prompt] for prompt in FIVE]
    tau = 0.2 * max(max(of_prompt) - min(of_prompt) for of_prompt in scores)
    for number, prompt in enumerate(rsaft.training_prompts(FIVE, 0, made, 2)):
        rng = rsaft.named_generator(0, made, number, "group")
        pictures = [line for line in lines if line["prompt"] == prompt]
        group = [pictures[i] for i in torch.randperm(4, generator=rng)[:3]]
        stems, r = [line["file"][:6] for line in group], torch.tensor([line["reward"] for line in group])
        x0 = torch.stack([load_file(drawn / f"{stem}.safetensors")["latents"] for stem in stems])
        t = torch.randint(1000, (), generator=rng).item()
        y = torch.randn(LATENT, generator=rng).expand_as(x0)
        x = noised(model, x0, y, t)
        error, error_ref = ((y - predict(each, x, t, prompt)).square().mean((1, 2, 3))
                            for each in (model, frozen))
        s = error_ref.detach() - error    # beta is 1
        loss = loss + (gdro.gdro_loss(s, r, tau) + 0.7 * error[r.argmax()]) / 2
        best.append(error[r.argmax()].item())
        rewards.append(r.mean().item())
    loss.backward()
    record = records(small_gdro.out)[made]
    assert record["reward"] == pytest.approx(sum(rewards) / 2)
    assert record["best_error"] == pytest.approx(sum(best) / 2, rel=1e-4)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params]).item()
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-3)


def rescored(drawn, folder, change):
    """A copy of the folder of pictures, in which change(number, line) has put other rewards in the lines."""
    shutil.copytree(drawn, folder)
    lines = [json.loads(line) for line in (drawn / "pictures.jsonl").read_text().splitlines()]
    changed = [json.dumps({**line, **change(number, line)}) + "\n" for number, line in enumerate(lines)]
    (folder / "pictures.jsonl").write_text("".join(changed))
    return folder


def test_the_rewards_scale_is_taken_out_of_tau_and_tau_unit_1_leaves_it_in(tmp_path, small_gdro, drawn):
    data = rescored(drawn, tmp_path / "data", lambda number, line: {"reward": 4096 * line["reward"]})
    more, larger = ["--eval-every", 0, "--train-steps", 2, "--train"], ["--data", data]
    weights = {}
    for name, flags in {"as drawn": [], "larger": larger, "1": [*larger, "--tau-unit", 1]}.items():
        assert small_gdro.run(*small_gdro.flags, *more, *flags, "--out", tmp_path / name) == 0
        weights[name] = checkpoint(tmp_path / name)["extra"]
    assert_close(weights["larger"], weights["as drawn"], rtol=0, atol=0)
    assert any(not torch.equal(a, b) for a, b in zip(weights["1"], weights["as drawn"]))


def test_prompts_whose_pictures_have_equal_rewards_are_left_out(tmp_path, small_gdro, drawn, capsys):
    """Of the others no group of equal rewards is ranked, so that each update has a gradient."""
    data = rescored(drawn, tmp_path / "data", lambda number, line: {"reward": float(number == 6)})
    capsys.readouterr()
    flags = [*small_gdro.flags, "--eval-every", 0, "--train", "--data", data, "--train-steps", 3]
    assert small_gdro.run(*flags, "--out", tmp_path / "out") == 0
    assert "4 of 5 prompts are left out" in capsys.readouterr().out
    assert [record["reward"] for record in records(tmp_path / "out")] == pytest.approx([1 / 3] * 3)

    data = rescored(drawn, tmp_path / "equal", lambda number, line: {"reward": 0.5})
    assert small_gdro.run(*flags, "--data", data, "--out", tmp_path / "none") == 2
    out, error = capsys.readouterr()
    assert "there is nothing to rank" in error and "loading" not in out and not (tmp_path / "none").exists()


def dark_left(images, prompts):
    """A second black box, of a larger spread."""
    return 1000 - 100 * (images[..., :16] > 0.5).float().mean((1, 2, 3))


def dark_left_in_tenths(images, prompts):
    return 10 * dark_left(images, prompts)


def test_several_rewards_are_drawn_once_and_combined_when_they_are_read(tmp_path, small, capsys):
    two = ["--reward", BRIGHT, f"{BRIGHT.rpartition(':')[0]}:dark_left=0.5"]
    flags = [*small, *two, "--pictures", 4, "--eval-every", 0, "--train-steps", 1, "--data", tmp_path / "two"]
    assert call(gdro.main, *flags, "--draw") == 0
    lines = [json.loads(line) for line in (tmp_path / "two" / "pictures.jsonl").read_text().splitlines()]
    each = torch.tensor([line["rewards"] for line in lines]).T.view(2, 5, 4)
    totals = torch.tensor([line["reward"] for line in lines]).view(5, 4)
    assert_close(totals, each[0] + 0.5 * each[1])
    advantages = gdro.combined_advantages(each, [1.0, 0.5])
    for how, expected in ("sum", totals), ("advantages", advantages):
        out = tmp_path / how
        assert call(gdro.main, *flags, "--combine", how, "--out", out) == 0    # the pictures serve both
        prompts, ranked = rsaft.training_prompts(FIVE, 0, 0, 2), []
        for number, prompt in enumerate(prompts):
            rng = rsaft.named_generator(0, 0, number, "group")
            r = expected[FIVE.index(prompt)]
            ranked.append(r[gdro.draw_group(r, 3, rng)].mean().item())
        assert records(out)[0]["reward"] == pytest.approx(sum(ranked) / 2, abs=1e-5)
    assert not torch.equal(totals.argmax(1), advantages.argmax(1))

    data = rescored(tmp_path / "two", tmp_path / "one", lambda _, line: {"rewards": line["rewards"][:1]})
    assert call(gdro.main, *flags, "--data", data, "--train", "--combine", "advantages") == 2
    error = capsys.readouterr().err
    assert "line 1 of pictures.jsonl" in error and "must be 2 finite" in error


# ---- CRD's training ----------------------------------------------------------------------------------------

def crds_tensors(state):
    """Of a checkpoint: the average, the trained weights, the OLD and the SAMPLING copy; latents; rewards."""
    average, (*copies, latents, rewards) = list(state["adapter"].values()), state["extra"]
    n = len(average)
    return average, copies[:n], copies[n:2 * n], copies[2 * n:], latents, rewards[0]


def test_crds_copies_follow_their_schedules_and_the_saved_adapter_is_the_average(crd_lives):
    tensors = {life.updates: crds_tensors(life.state) for life in crd_lives}
    begin = [p.detach() for p in new_model()[1]]

    def mean(d, copies, current):
        return [d * a + (1 - d) * b for a, b in zip(copies, current)]

    olds, samplings = ([begin, mean(d, begin, tensors[2][1])] for d in (0.26, 0.6))
    olds.append(mean(0.27, olds[1], tensors[4][1]))
    samplings.append(mean(0.7, samplings[1], tensors[4][1]))
    for n, epoch in (2, 1), (3, 1), (4, 2), (5, 2):
        _, _, old, sampling, _, _ = tensors[n]
        assert_close(old + sampling, olds[epoch] + samplings[epoch], rtol=1e-4, atol=1e-7)
    for n in 3, 4, 5:
        average, trained, *_ = tensors[n]
        assert_close(average, mean(n / (9 + n), tensors[n - 1][0], trained), rtol=1e-4, atol=1e-7)
        assert any(not torch.equal(a, b) for a, b in zip(average, trained))


def test_crds_average_has_a_ceiling_and_nothing_in_the_training_follows_it(tmp_path, small_crd, crd_lives):
    out = tmp_path / "out"
    assert small_crd.run(*small_crd.flags, "--ema-decay", 0, "--train-steps", 2, "--out", out) == 0
    average, *others = crds_tensors(checkpoint(out))
    assert_close(others, list(crds_tensors(crd_lives[0].state)[1:]), rtol=0, atol=0)
    assert_close(average, others[0], rtol=0, atol=0)


@pytest.mark.parametrize("sampler", ["own", "old"])
def test_crds_sampling_copy_or_its_old_one_draws_the_pictures_also_after_a_stop(
        tmp_path, small_crd, crd_lives, sampler):
    """Those of epoch 2, by hand."""
    lives = crd_lives
    if sampler == "old":
        small = small_crd._replace(flags=[*small_crd.flags, "--sampler", "old"], out=tmp_path / "whole")
        assert small.run(*small.flags, "--train-steps", small.updates, "--out", small.out) == 0
        lives = live(small, tmp_path / "out", (3, None), (5, None))
        assert_same_run(lives[-1].out, small.out)
    (model, params), plan = new_model(), rsaft.Plan((False,) * 4)
    model.steps = model.step_table(4)
    _, _, old, own, latents, rewards = crds_tensors(lives[-1].state)
    prompts = [prompt for prompt in rsaft.training_prompts(FIVE, 0, 2, 2) for _ in range(3)]
    batch, = rsaft.micro_batches(prompts, (0, "epoch", 2), 6)
    with torch.no_grad(), gdro.holding(params, own if sampler == "own" else old):
        expected, = rsaft.sample_starts(model, plan, [batch], 6)
        scores = rsaft.make_reward(BRIGHT)(model.decode(expected), prompts)
    assert_close(latents.flatten(0, 1), expected, rtol=1e-3, atol=1e-3)
    assert_close(rewards.flatten(), scores, rtol=0, atol=1e-3)
    assert records(lives[-1].out)[4]["reward"] == pytest.approx(scores.mean().item(), abs=1e-4)


def test_a_reward_in_a_larger_unit_rules_crds_sum_and_not_its_advantages(tmp_path, small):
    """dark_left is in hundreds. One in thousands, weighted as much, gives the same update by advantages."""
    file, adapters = BRIGHT.rpartition(":")[0], {}
    for name, how in product(("dark_left", "dark_left_in_tenths"), ("sum", "advantages")):
        out = tmp_path / name / how
        flags = ["--reward", BRIGHT, f"{file}:{name}=0.5", "--combine", how, "--learning-rate", 1e-2]
        assert call(crd.main, *small, *flags, "--train-steps", 1, "--eval-every", 0, "--out", out) == 0
        adapters[name, how] = torch.cat([p.flatten() for p in checkpoint(out)["adapter"].values()])
    once, again = (adapters[name, "advantages"] for name in ("dark_left", "dark_left_in_tenths"))
    assert_close(once, again, rtol=0, atol=1e-4)
    assert (adapters["dark_left", "sum"] - adapters["dark_left_in_tenths", "sum"]).abs().max() > 1e-3
    assert (once - adapters["dark_left", "sum"]).abs().max() > 1e-3


def update_by_hand(made, drawn, before=None, form="square", temperature=math.inf, adaptive=True, kl=0.1,
                   scale=4.5, by_reward=True, std="epoch"):
    """Regression, anchor and gradient norm of the update after `made`.

    drawn: a checkpoint with the pictures; before: the one that the update goes on from. Both of a picture's
    noise levels, one of each half, are among the three noisiest of four steps.
    """
    (frozen, params), regression, anchor = new_model(), torch.tensor(0.0), torch.tensor(0.0)
    model = old = frozen
    if before:
        _, trained, copies, *_ = crds_tensors(before)
        (old, _), (model, params) = new_model(weights=copies), new_model(weights=trained)
    *_, latents, rewards = crds_tensors(drawn)
    advantages = crd.scaled_advantage(rewards, std=std)
    for number, prompt in enumerate(rsaft.training_prompts(FIVE, 0, made // 2, 2)):
        R = advantages[number]
        for half in 0, 1:
            rng = rsaft.named_generator(0, made, number, half, "regression")
            t = frozen.step_table(4)[int(1.5 * (half + torch.rand((), generator=rng).item()))].t
            y = torch.randn(latents[number].shape, generator=rng)
            x = noised(model, latents[number], y, t)
            f = predict(model, x, t, prompt)
            with torch.no_grad():
                f_old, f_ref, unconditional = (predict(old, x, t, prompt), predict(frozen, x, t, prompt),
                                               predict(frozen, x, t, ""))
                f_ref = unconditional + scale * (f_ref - unconditional)
            r = crd.implicit_reward(f, f_old, y, adaptive)
            regression = regression + crd.crd_loss(r, R, form=form, temperature=temperature) / 4
            anchor = anchor + crd.anchor_loss(f, f_ref, R, kl, by_reward) / 4 if kl else anchor
    (regression + anchor).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    return [regression.item(), anchor.item(), norm.item()]


def logged(record):
    return [record["regression"], record.get("anchor", 0), record["grad_norm"]]


def test_crds_update_is_the_gradient_of_its_loss(small_crd, crd_lives):
    """The last, alone in its epoch: OLD has moved away from the frozen model, and the adapter from OLD."""
    before, after = crd_lives[-2].state, crd_lives[-1].state
    expected = update_by_hand(4, drawn=after, before=before)
    assert logged(records(small_crd.out)[4]) == pytest.approx(expected, rel=1e-3)


def test_crds_guards_are_what_their_flags_say(tmp_path, small_crd, crd_lives):
    """By update 1, where nothing has moved yet."""
    first = {}
    for name, flags, settings, without in [
            ("all", [], {}, 3),
            ("unguided", ["--anchor-scale", 1], {"scale": 1}, 2),
            ("constant", ["--anchor-weight", "constant", "--temperature", 0.5],
             {"by_reward": False, "temperature": 0.5}, 3),
            ("none", ["--kl", 0, "--loss", "bce", "--error-weight", "one", "--advantage-std", "prompt"],
             {"kl": 0, "form": "bce", "adaptive": False, "std": "prompt"}, 1)]:
        out, state = small_crd.out, crd_lives[0].state
        if flags:
            out = tmp_path / name
            assert small_crd.run(*small_crd.flags, *flags, "--train-steps", 1, "--out", out) == 0
            state = checkpoint(out)
        first[name] = records(out)[0]
        assert logged(first[name]) == pytest.approx(update_by_hand(0, state, **settings), rel=1e-3, abs=1e-6)
        assert ("anchor" in first[name]) == (settings.get("kl") != 0)
        assert first[name]["network_evaluations_with_gradient"] == 12
        assert first[name]["network_evaluations_without_gradient"] == 12 * without + 6 * 4    # the drawing
    second = records(small_crd.out)[1]
    assert second["network_evaluations_with_gradient"] == 12
    assert second["network_evaluations_without_gradient"] == 12 * 3    # the same pictures
    assert first["unguided"]["anchor"] == 0 < first["all"]["anchor"] < first["constant"]["anchor"]
    assert len({record["regression"] for record in first.values()}) == 3    # square, bce, with a temperature
    assert len({record["reward"] for record in first.values()}) == 1


def test_a_differentiable_reward_has_its_sharpness_measured_here_too(tmp_path, small):
    assert call(crd.main, *small, "--reward", "pickscore", "--train-steps", 1, "--out", tmp_path / "out") == 0
    assert [record["s1"] > 0 for record in records(tmp_path / "out", evaluations=True)] == [True, True]


# ---- What is refused ---------------------------------------------------------------------------------------

def test_a_black_box_is_refused_where_its_gradient_is_needed_and_several_scores_everywhere(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(rsaft.main, "--tiny", "--reward", BRIGHT) == 2
    assert "not differentiable" in capsys.readouterr().err
    for main in rsaft.main, gdro.main, crd.main:
        assert call(main, "--tiny", "--reward", f"{TINY / 'world.py'}:oracle", "--eval-reward", "judge") == 2
        assert "oracle returned a dict, not a tensor" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_example_of_a_black_box_is_the_accuracy_of_the_oracle():
    sys.path.insert(0, str(TINY))
    import world
    images = world.sample(torch.arange(3), torch.Generator().manual_seed(0)).requires_grad_()
    reward = rsaft.make_reward(f"{TINY / 'world.py'}:oracle_accuracy")
    score = reward(images, [world.CAPTIONS[i] for i in (0, 1, 5)])
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
    (gdro.main, ["--out", "full"], "holds no run"),
    (gdro.main, ["--sam"], "--sam"),
    (gdro.main, ["--tau", "0"], "--tau"),
    (gdro.main, ["--combine", "product"], "--combine"),
    (crd.main, ["--group-size", "1"], "--group-size"),
    (crd.main, ["--group-size", "7"], "--group-size"),
    (crd.main, ["--loss", "l1"], "--loss"),
    (crd.main, ["--resume"], "--resume"),
    (crd.main, ["--temperature", "0"], "--temperature"),
    (crd.main, ["--noise-levels", "0"], "--noise-levels"),
    (crd.main, ["--ema-decay", "1"], "--ema-decay"),
    (crd.main, ["--old-decay", "0", "0.25"], "--old-decay"),
    (crd.main, ["--sampling-decay", "0", "0", "0.1", "2"], "--sampling-decay"),
    (crd.main, ["--reward", "beauty"], "beauty"),
    (crd.main, ["--reward"], "--reward"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(
        tmp_path, monkeypatch, capsys, main, flags, words):
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
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--tiny"]) == 2 and "one process" in capsys.readouterr().err


@pytest.mark.parametrize("module", [gdro, crd])
def test_help_gives_every_flag_and_none_of_rsafts_own(module, tmp_path, monkeypatch, capsys):
    """Of the script, started from another folder, where it finds its neighbours by itself."""
    monkeypatch.chdir(tmp_path)
    for name in "rsaft", "gdro", "crd":
        monkeypatch.delitem(sys.modules, name)
    others = [path for path in sys.path if Path(path).resolve() not in (HERE, HERE.parent, tmp_path)]
    monkeypatch.setattr(sys, "path", [str(HERE), *others])
    monkeypatch.setattr(sys, "argv", [module.__file__, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(module.__file__, run_name="__main__")
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"python related/{module.__name__}.py" in text
    flags, mine, rsafts = re.findall(r"(?m)^  --([a-z-]+)", text), module.parse([]), rsaft.parse([])
    assert sorted(flags) == sorted(name.replace("_", "-") for name in vars(mine).keys() - {"program"})
    assert vars(rsafts).keys() - vars(mine) == {"sam", "sam_rollout", "noise", "method", "grad_steps"}
