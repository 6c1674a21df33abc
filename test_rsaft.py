"""What rsaft.py claims, claim by claim, in its own order: `pytest`.

The models are the trained ones of tiny/; where a closed form exists, it is the judge. The tests that load an
adapter into diffusers need peft, which rsaft.py itself does not.
"""
import argparse
import copy
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import rsaft

HERE = Path(__file__).resolve().parent
TINY, MODEL = HERE / "tiny", HERE / "tiny" / "stable-diffusion"
LATENT, PROMPTS = (4, 8, 8), (TINY / "prompts.txt").read_text().splitlines()
PERTURBATIONS = [(0.0, 0.0), (0.01, 0.0), (0.0, 0.01), (0.01, 0.01)]        # the two radii, rho and rho_w

rsaft.quiet_libraries()


@pytest.fixture(scope="session")
def loaded():
    return rsaft.load_model(str(MODEL))


@pytest.fixture
def model(loaded):
    """The small model, a copy of its own for each test: 4 sampling steps under guidance."""
    return rsaft.StableDiffusion(copy.deepcopy(loaded.pipe), 4, 3.0, LATENT, "cpu")


@pytest.fixture
def params(model):
    """A new adapter in `model`."""
    return model.add_adapter(4, rsaft.named_generator("adapter"))


@pytest.fixture(scope="session")
def pickscore():
    return rsaft.make_reward("pickscore", TINY)


@pytest.fixture(scope="session")
def world():
    """tiny/world.py."""
    return rsaft.import_file(TINY / "world.py")


@pytest.fixture(scope="session")
def pictures(world):
    """Eight pictures of the small world and their captions."""
    generator = torch.Generator().manual_seed(0)
    captions = torch.randint(len(world.CAPTIONS), (8,), generator=generator)
    return world.sample(captions, generator), [world.CAPTIONS[i] for i in captions]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(out, *arguments):
    """A run of a few updates on small batches, in this process. Returns its exit code."""
    return rsaft.main(["--tiny", "--train-steps", "3", "--sampling-steps", "4", "--batch-size", "4",
                       "--eval-images", "4", "--micro-batch-size", "4", "--eval-every", "2", "--rank", "4",
                       "--out", str(out), *map(str, arguments)])


def log_lines(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def records(out, evaluations=False):
    """The lines of a run's log that are updates, or those that are evaluations."""
    return [line for line in log_lines(out) if line.get("eval", False) == evaluations]


def plain(T):
    """The plan of plain sampling: no step carries a gradient."""
    return rsaft.Plan((False,) * T)


def step_of_algorithm_1(model, params, plan, reward, prompts=PROMPTS[:4], size=4, **how):
    """`rsaft_gradient` on the small model, `size` pictures at a time. Returns its log and the gradients."""
    make_starts = partial(rsaft.sample_starts, model, plan, size=size)
    make_images = partial(rsaft.sample_images, model, plan)
    log = rsaft.rsaft_gradient(rsaft.micro_batches(prompts, (0, 0), size), make_starts, make_images, reward,
                               params, **how)
    return log, [p.grad for p in params]


def total_norm(tensors):
    return torch.nn.utils.get_total_norm(list(tensors)).item()


# ---- One sampling step -------------------------------------------------------------------------------------

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("T", [10, 28, 30, 50])
def test_a_step_is_the_step_of_diffusers(T, spacing, prediction_type):
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler.from_pretrained(MODEL / "scheduler", timestep_spacing=spacing,
                                              prediction_type=prediction_type)
    steps = rsaft.ddim_steps(scheduler, T)
    assert [step.t for step in steps] == scheduler.timesteps.tolist()
    x, f = normal(2, *LATENT), normal(2, *LATENT, seed=1)
    for step in steps:
        expected = scheduler.step(f, step.t, x)
        assert_close(step.next(x, f), expected.prev_sample, rtol=1e-5, atol=1e-5)
        assert_close(step.x0(x, f), expected.pred_original_sample, rtol=1e-5, atol=2e-5)
        noised = scheduler.add_noise(x, f, torch.tensor([step.t]))
        assert_close(step.alpha * x + step.sigma * f, noised, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change, T, message", [
    (dict(clip_sample=True), 10, "clip"), (dict(thresholding=True), 10, "clip"),
    (dict(prediction_type="sample"), 10, "prediction_type"),
    (dict(rescale_betas_zero_snr=True), 10, "alpha is 0"),
    (dict(timestep_spacing="trailing"), 61, "61 steps"),        # its rounding makes 62
    (dict(timestep_spacing="leading"), 1000, "1000 steps"),     # the first would be at timestep 1000
])
def test_a_scheduler_whose_step_is_not_linear_or_not_defined_is_refused(change, T, message):
    from diffusers import DDIMScheduler
    with pytest.raises(ValueError, match=message):
        rsaft.ddim_steps(DDIMScheduler.from_pretrained(MODEL / "scheduler", **change), T)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_scheduler_that_is_silent_on_clip_sample_does_not_clip(model, kind):
    """DDIM's own default would be to clip."""
    import diffusers
    model.pipe.scheduler = getattr(diffusers, kind)(**SCHEDULE, timestep_spacing="trailing")
    assert "clip_sample" not in model.pipe.scheduler.config and diffusers.DDIMScheduler().config.clip_sample
    expected = diffusers.DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=False)
    assert model.step_table(10) == rsaft.ddim_steps(expected, 10)


def test_a_model_whose_scheduler_clips_is_refused(model):
    from diffusers import DDIMScheduler
    model.pipe.scheduler = DDIMScheduler(**SCHEDULE, clip_sample=True)
    with pytest.raises(ValueError, match="clip_sample"):
        model.step_table(10)
    with pytest.raises(rsaft.UserError, match="can't be sampled.*clip_sample"):
        rsaft.StableDiffusion(model.pipe, 10, 3.0, LATENT, "cpu")


# ---- The rollout -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("guidance_scale, height, width", [(3.0, 32, 32), (1.0, 32, 32), (7.5, 48, 32)])
def test_the_rollout_makes_the_pictures_of_the_diffusers_pipeline(guidance_scale, height, width):
    from diffusers import DDIMScheduler
    model = rsaft.load_model(str(MODEL), 10, guidance_scale, height, width)
    batch, = rsaft.micro_batches(PROMPTS[:4], ("evaluation",), 4)
    start, = rsaft.sample_starts(model, plain(10), [batch], 4)
    images, prompts = rsaft.sample_images(model, plain(10), batch, start)
    assert images.dtype == torch.float32 and images.shape == (4, 3, height, width) and prompts == PROMPTS[:4]
    pipe = model.pipe
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(PROMPTS[:4], latents=rsaft.evaluation_latents(4, model.latent_shape),
                    num_inference_steps=10, guidance_scale=guidance_scale, height=height, width=width,
                    output_type="pt").images
    assert_close(images, expected, rtol=0, atol=1e-4)


def toy_steps(T):
    from diffusers import DDIMScheduler
    return rsaft.ddim_steps(DDIMScheduler.from_pretrained(MODEL / "scheduler"), T)


def toy_denoise(theta, frozen=None):
    """A nonlinear network of two parameters; `frozen` takes their place where no gradient is wanted."""
    def denoise(x, t):
        a, b = theta if torch.is_grad_enabled() or frozen is None else frozen
        return torch.tanh(a * x + b * t / 1000)
    return denoise


@pytest.mark.parametrize("K", [1, 3, 6])
def test_draft_k_differentiates_the_last_k_network_calls(K):
    carried = []

    def denoise(x, t):
        carried.append(torch.is_grad_enabled())
        return x

    rsaft.rollout(denoise, normal(1, *LATENT), toy_steps(6), rsaft.draft(6, None, K))
    assert carried == [False] * (6 - K) + [True] * K


@pytest.mark.parametrize("K", [1, 2, 5])
def test_the_gradient_of_the_rollout_agrees_with_finite_differences(K):
    """For K < T: the derivative with the parameters of the first T - K steps held fixed."""
    steps, xT = toy_steps(5), normal(2, *LATENT, dtype=torch.float64)
    start = torch.tensor([0.7, 0.3], dtype=torch.float64)

    def score(theta):
        x0 = rsaft.rollout(toy_denoise(theta, frozen=start), xT, steps, rsaft.draft(5, None, K))
        return x0.sin().sum()

    theta = start.clone().requires_grad_()
    gradient, = torch.autograd.grad(score(theta), theta)
    step = 1e-6 * torch.eye(2, dtype=torch.float64)
    differences = torch.stack([(score(start + h) - score(start - h)) / 2e-6 for h in step])
    assert_close(gradient, differences, rtol=1e-6, atol=1e-6)


def plans(method, T, K=None, count=300):
    return [rsaft.METHODS[method](T, rsaft.named_generator(i), K) for i in range(count)]


def test_the_plans_are_those_of_the_publications():
    """T = 20. Which network calls carry a gradient, and where the rollout stops, over many draws."""
    on = [[i for i, carries in enumerate(plan.grad) if carries] for plan in plans("alignprop", 20)]
    assert {len(steps) for steps in on} == set(range(1, 21)) and all(steps[-1] == 19 for steps in on)

    for plan in plans("refl", 20):
        assert plan.predict_x0 and plan.grad == (False,) * (len(plan.grad) - 1) + (True,)
    assert {len(plan.grad) - 1 for plan in plans("refl", 20)} == {15, 16, 17, 18, 19}

    chosen = set()
    for plan in plans("drtune", 50):
        steps = [i for i, carries in enumerate(plan.grad) if carries]
        assert plan.predict_x0 and plan.detach_input and len(steps) == 5
        gaps = {b - a for a, b in zip(steps, steps[1:])}
        assert gaps == {len(plan.grad) // 5}
        chosen.add((len(plan.grad) - 1, steps[0]))
    assert {stop for stop, _ in chosen} == set(range(30, 50))
    assert {offset for _, offset in chosen} == set(range(10))

    lv, = {*plans("draft-lv", 20)}
    assert lv == rsaft.Plan((False,) * 19 + (True,), renoised=2)
    assert {*plans("draft", 20)} == {rsaft.Plan((False,) * 19 + (True,))}
    for method in rsaft.METHODS:                                       # --grad-steps overrides K
        assert {sum(plan.grad) for plan in plans(method, 20, K=3)} == {3}
        with pytest.raises(ValueError):
            plans(method, 20, K=21)
        assert all(any(plan.grad) for T in range(1, 12) for plan in plans(method, T, count=20))


@pytest.mark.parametrize("method", ["alignprop", "refl", "drtune"])
@pytest.mark.parametrize("draw", range(3))
def test_the_gradient_of_every_plan_is_the_derivative_of_its_detached_expression(method, draw):
    """By finite differences in float64 of an expression written out by hand.

    Where the plan wants no gradient the parameters are held fixed, and with detach_input the network's inputs
    are the constants of the first rollout. In two halves, as an update takes it, the rollout is the same.
    """
    T = 10
    K = 3 if method == "drtune" else None              # with its own K = 1 there would be no chain to detach
    steps, plan = toy_steps(T), rsaft.METHODS[method](T, rsaft.named_generator(method, draw), K)
    xT = normal(1, *LATENT, dtype=torch.float64)
    start = torch.tensor([0.7, 0.3], dtype=torch.float64)

    def by_hand(theta, inputs=None):
        x, seen = xT, []
        for i, step in enumerate(steps[:len(plan.grad)]):
            a, b = theta if plan.grad[i] else start
            seen.append(x)
            f = torch.tanh(a * (inputs[i] if inputs else x) + b * step.t / 1000)
            last = plan.predict_x0 and i == len(plan.grad) - 1
            x = step.x0(x, f) if last else step.next(x, f)
        return x.sin().sum(), seen

    constants = by_hand(start)[1] if plan.detach_input else None
    theta = start.clone().requires_grad_()
    x0 = rsaft.rollout(toy_denoise(theta), xT, steps, plan)
    gradient, = torch.autograd.grad(x0.sin().sum(), theta)
    assert_close(x0.sin().sum(), by_hand(start)[0])
    for h, derivative in zip(1e-6 * torch.eye(2, dtype=torch.float64), gradient):
        difference = by_hand(start + h, constants)[0] - by_hand(start - h, constants)[0]
        assert_close(derivative, difference / 2e-6, rtol=1e-5, atol=1e-6)
    half = rsaft.rollout(toy_denoise(theta), xT, steps, plan, stop=plan.first_grad_step)
    assert not half.requires_grad
    rest = rsaft.rollout(toy_denoise(theta), half, steps, plan, first=plan.first_grad_step)
    assert torch.equal(rest, x0)
    assert torch.equal(torch.autograd.grad(rest.sin().sum(), theta)[0], gradient)


def test_renoising_undoes_itself_when_the_noise_is_known_and_gives_x0_no_gradient():
    step, noise = toy_steps(10)[-1], normal(2, *LATENT, seed=1)
    x0 = normal(2, *LATENT).requires_grad_()
    theta = torch.ones((), requires_grad=True)
    again = rsaft.renoise(lambda x, t: theta * noise, x0, step, noise)
    assert_close(again, x0)
    again.sum().backward()
    assert x0.grad is None and theta.grad != 0


def test_pictures_are_made_by_anything_with_the_five_members_and_the_batchs_own_come_first():
    """DRaFT-LV's: the pictures of the rollout, then twice the same prompts, noised and predicted again."""
    denoise, steps = toy_denoise(torch.tensor([0.7, 0.3], requires_grad=True)), toy_steps(5)
    model = types.SimpleNamespace(steps=steps, latent_shape=LATENT, device="cpu",
                                  denoiser=lambda prompts: denoise, decode=torch.sigmoid)
    batches, plan = rsaft.micro_batches(["a", "b", "c"], ("toy",), 2), rsaft.draft_lv(5, None)
    for batch, start in zip(batches, rsaft.sample_starts(model, plan, batches, 3), strict=True):
        images, prompts = rsaft.sample_images(model, plan, batch, start)
        x0 = rsaft.rollout(denoise, batch.noise("xT", LATENT), steps, plan)
        again = [rsaft.renoise(denoise, x0, steps[-1], batch.noise(f"renoise {k}", LATENT)) for k in range(2)]
        assert prompts == batch.prompts * 3 and images.requires_grad and not start.requires_grad
        assert_close(images, torch.cat([x0, *again]).sigmoid())


def test_starts_are_drawn_in_pieces_of_any_size(model):
    """Nothing changes but rounding; in pieces as large as the micro-batches no bit does."""
    batches, plan = rsaft.micro_batches(PROMPTS[:5], (0, 0), 2), rsaft.draft(4, None, K=2)
    alone = [rsaft.sample_starts(model, plan, [batch], 2)[0] for batch in batches]
    assert [len(start) for start in alone] == [2, 2, 1]
    images = [rsaft.sample_images(model, plan, *pair)[0] for pair in zip(batches, alone)]
    for size in 1, 2, 3, 5, 8:
        starts = rsaft.sample_starts(model, plan, batches, size)
        assert_close(list(starts), alone, rtol=0, atol=1e-4)
        others = [rsaft.sample_images(model, plan, *pair)[0] for pair in zip(batches, starts, strict=True)]
        assert_close(others, images, rtol=0, atol=1e-4)
        assert size != 2 or all(map(torch.equal, starts, alone))
    xT = batches[0].noise("xT", LATENT)
    by_hand = rsaft.rollout(model.denoiser(PROMPTS[:2]), xT, model.steps, plain(4), stop=2)
    assert torch.equal(alone[0], by_hand)


def test_where_no_step_carries_a_gradient_the_starts_are_the_final_latents(model):
    batch, = rsaft.micro_batches(PROMPTS[:2], (0, 0), 2)
    start, = rsaft.sample_starts(model, plain(4), [batch], 2)
    x0 = rsaft.rollout(model.denoiser(PROMPTS[:2]), batch.noise("xT", LATENT), model.steps, plain(4))
    assert torch.equal(start, x0)
    images, _ = rsaft.sample_images(model, plain(4), batch, start)
    assert torch.equal(images, model.decode(x0)) and not images.requires_grad


@pytest.mark.parametrize("method", rsaft.METHODS)
def test_the_formula_counts_the_network_evaluations_of_every_plan(method):
    """Against a look at each step."""
    for plan in plans(method, 12, count=20):
        free = [i for i, carries_grad in enumerate(plan.grad) if not carries_grad]
        held = sum(plan.grad) + plan.renoised
        assert rsaft.network_evaluations(plan, branches=1) == (len(free), held)
        assert rsaft.network_evaluations(plan) == (2 * len(free), 2 * held)
        assert rsaft.network_evaluations(plan, second_rollout=True) == (4 * len(free), 4 * held)
        again = [i for i in free if any(plan.grad[:i])]
        expected = 2 * (len(free) + len(again)), 4 * held
        assert rsaft.network_evaluations(plan, second_rollout=True, reuse_starts=True) == expected


@pytest.mark.parametrize("method", rsaft.METHODS)
def test_every_method_runs_with_every_perturbation_and_takes_the_evaluations_of_the_formula(
        model, params, pickscore, method):
    """T = 6, K = 2, with guidance: what the model counts, and the pictures that the reward has seen."""
    judged, plan, B = [], rsaft.METHODS[method](6, rsaft.named_generator(method), 2), 2
    model.steps = model.step_table(6)

    def reward(images, prompts):
        judged.extend(prompts)
        return pickscore(images, prompts)

    variants = [(rho, rho_w, False) for rho, rho_w in PERTURBATIONS]
    for rho, rho_w, reuse_starts in [*variants, (0.01, 0.01, True)]:
        model.counts.clear()
        judged.clear()
        log, gradients = step_of_algorithm_1(model, params, plan, reward, PROMPTS[:B], B, rho=rho,
                                             rho_w=rho_w, reuse_starts=reuse_starts)
        assert total_norm(gradients) > 0
        assert ("noise_norm" in log, "sam_norm" in log) == (rho > 0, rho_w > 0)
        assert ("worst_reward" in log) == (rho + rho_w > 0)
        if rho > 0 and rho_w == 0:
            assert log["fall_measured"] == pytest.approx(log["fall_predicted"], rel=0.2)
        elif rho_w > 0:      # where K < T the weights also move steps that the prediction knows nothing of
            assert log["fall_measured"] > 0 < log["fall_predicted"]
        counted = tuple(model.counts[f"network_evaluations_{kind}_gradient"] for kind in ("without", "with"))
        assert counted == tuple(B * n for n in rsaft.network_evaluations(plan, 2, rho_w > 0, reuse_starts))
        # Of the reward: r and its gradient at theta, and where there is a perturbation at the worst place.
        assert len(judged) == B * (1 + plan.renoised) * (2 if rho + rho_w > 0 else 1)


@pytest.mark.parametrize("method", ["draft-lv", "alignprop", "refl", "drtune"])
def test_both_passes_of_an_update_take_the_same_plan_and_every_update_its_own(tmp_path, monkeypatch, method):
    taken, rollout = [], rsaft.rollout

    def watched(denoise, x, steps, plan, first=0, stop=None):
        if first == 0 and stop is not None:                        # from xT to the first step with gradient
            taken.append((plan, x))
        return rollout(denoise, x, steps, plan, first, stop)

    monkeypatch.setattr(rsaft, "rollout", watched)
    assert small(tmp_path / "out", "--method", method, "--sam", "--noise", "--eval-every", "0",
                 "--sampling-steps", "8", "--batch-size", "2", "--micro-batch-size", "2") == 0
    settings = argparse.Namespace(seed=0, method=method, sampling_steps=8, grad_steps=None)
    drawn = [rsaft.make_plan(settings, step) for step in range(20)]
    assert drawn == [rsaft.make_plan(settings, step) for step in range(20)]
    assert len({*drawn}) > (1 if method != "draft-lv" else 0)
    assert [plan for plan, _ in taken] == [plan for plan in drawn[:3] for _ in range(2)]
    for (_, x), (_, again), plan, line in zip(taken[::2], taken[1::2], drawn, records(tmp_path / "out")):
        assert torch.equal(x, again)
        counted = tuple(line[f"network_evaluations_{kind}_gradient"] for kind in ("without", "with"))
        assert counted == tuple(2 * n for n in rsaft.network_evaluations(plan, 2, True))
        assert line["reward_evaluations"] == 2 * (1 + plan.renoised) * 2


def test_the_flags_for_the_window_and_for_k_reach_the_update(tmp_path):
    assert small(tmp_path / "out", "--sam", "--sam-rollout", "window", "--grad-steps", "2", "--train-steps",
                 "1", "--eval-every", "0") == 0
    line, = records(tmp_path / "out")
    counted = tuple(line[f"network_evaluations_{kind}_gradient"] for kind in ("without", "with"))
    assert counted == (4 * 2 * 2, 4 * 2 * 4)       # 4 pictures, 2 branches; 2 steps without, 2 twice with


def test_the_gradient_goes_through_both_branches_of_the_guidance(model):
    params = model.add_adapter(2, torch.Generator().manual_seed(0))
    x = normal(1, *LATENT)

    def gradient(prompt, scale):
        f = model.denoiser([prompt], scale)(x, 500)
        return torch.cat([g.flatten() for g in torch.autograd.grad(f.sum(), params)])

    conditional, unconditional = gradient(PROMPTS[0], 1.0), gradient("", 1.0)
    assert unconditional.norm() > 0
    assert_close(gradient(PROMPTS[0], 3.0), 3 * conditional - 2 * unconditional, rtol=1e-3, atol=1e-4)


def test_a_prompt_goes_through_the_text_encoder_once_and_comes_out_as_the_pipeline_embeds_it(model):
    calls = []
    model.pipe.text_encoder.register_forward_hook(lambda module, inputs, output: calls.append(1))
    model.encode_prompts(["", *PROMPTS[:2]])
    model.denoiser([PROMPTS[1], PROMPTS[0]])
    model.encode_prompts(PROMPTS[:2])
    assert len(calls) == 3
    encoded = torch.cat([model.encoded[prompt][0] for prompt in (PROMPTS[1], "", PROMPTS[0])])
    assert not encoded.requires_grad
    assert_close(encoded, model.pipe.encode_prompt([PROMPTS[1], "", PROMPTS[0]], "cpu", 1, False)[0])


def test_the_text_encoder_can_be_dropped_once_the_prompts_are_encoded():
    model, x = rsaft.load_model(str(MODEL), 4, 3.0), normal(2, *LATENT)
    before, encoder = model.denoiser(PROMPTS[:2])(x, 500), weakref.ref(model.pipe.text_encoder)
    model.drop_encoders()
    assert model.pipe.text_encoder is None and encoder() is None                   # its memory is free again
    assert torch.equal(model.denoiser(PROMPTS[:2])(x, 500), before)


# ---- The perturbations -------------------------------------------------------------------------------------

def test_the_sample_perturbation_has_norm_rho_for_every_picture_and_points_downhill():
    g = normal(5, 3, 8, 8) * torch.tensor([1e-9, 1e-3, 1.0, 1e3, 1e9]).view(5, 1, 1, 1)
    d = rsaft.sample_perturbation(g, 0.01)
    assert_close(d.flatten(1).norm(dim=1), torch.full((5,), 0.01))
    assert_close(torch.cosine_similarity(d.flatten(1), g.flatten(1)), -torch.ones(5))


def test_the_parameter_perturbation_has_norm_rho_over_all_weights_and_points_downhill():
    gradients = [normal(4, 7), 100 * normal(3, seed=1), normal(2, 2, 2, seed=2)]
    e = rsaft.parameter_perturbation(gradients, 0.5)
    flat_e, flat_g = (torch.cat([t.flatten() for t in tensors]) for tensors in (e, gradients))
    assert_close(flat_e.norm(), torch.tensor(0.5))
    assert_close(torch.cosine_similarity(flat_e, flat_g, dim=0), torch.tensor(-1.0))


def test_a_zero_gradient_gives_a_zero_perturbation():
    g = normal(2, 3, 4, 4)
    g[0] = 0
    d = rsaft.sample_perturbation(g, 0.01)
    assert (d[0] == 0).all() and (d[1] != 0).all()
    e = rsaft.parameter_perturbation([torch.zeros(3), torch.zeros(2, 2)], 0.01)
    assert [tensor.tolist() for tensor in e] == [[0, 0, 0], [[0, 0], [0, 0]]]


def test_a_parameter_without_gradient_is_named():
    with pytest.raises(ValueError, match=r"\[1, 3\] of 4"):
        rsaft.parameter_perturbation([normal(2), None, normal(3), None], 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_perturbed_in_float32(pickscore, pictures, dtype):
    """The norm is rho within a thousandth, also over the 786,432 values of a picture of 512x512."""
    images, prompts = pictures
    seen = []

    def reward(images, prompts):
        seen.append(images.dtype)
        return pickscore(images, prompts)

    _, gradient = rsaft.reward_gradient(reward, images.to(dtype), prompts)
    _, expected = rsaft.reward_gradient(pickscore, images.to(dtype).float(), prompts)
    assert seen == [torch.float32] and torch.equal(gradient, expected) and gradient.dtype == torch.float32
    d = rsaft.sample_perturbation(1e-3 * normal(2, 3, 512, 512).to(dtype), 0.01)
    assert d.dtype == torch.float32
    assert_close(d.flatten(1).norm(dim=1), torch.full((2,), 0.01), rtol=1e-3, atol=0)
    assert rsaft.sample_perturbation(normal(2, 3, dtype=torch.float64), 1.0).dtype == torch.float64


def test_the_weights_are_the_same_bits_after_the_perturbation_also_after_an_exception():
    params = [torch.nn.Parameter(normal(50, 50)), torch.nn.Parameter(1e-6 * normal(10, seed=1))]
    epsilons = [normal(50, 50, seed=2), normal(10, seed=3)]
    before = [p.detach().clone() for p in params]
    with pytest.raises(KeyError):
        with rsaft.perturbed(params, epsilons) as reached:
            for p, old, epsilon, displacement in zip(params, before, epsilons, reached):
                assert torch.equal(p, old + epsilon) and torch.equal(displacement, p - old)
            raise KeyError
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    assert any(not torch.equal(old + e - e, old) for old, e in zip(before, epsilons))   # why a copy is needed
    assert all(p.requires_grad for p in params)


def test_backward_inside_gives_the_gradient_at_the_perturbed_weights_and_a_step_inside_is_undone():
    params = [torch.nn.Parameter(normal(5)), torch.nn.Parameter(normal(5, seed=1))]
    epsilons, before = [normal(5, seed=2), normal(5, seed=3)], [p.detach().clone() for p in params]
    with rsaft.perturbed(params, epsilons):
        (params[0] * params[1]).sum().backward()              # the gradient of each is the other
        torch.optim.SGD(params, lr=1.0).step()
    assert torch.equal(params[0].grad, before[1] + epsilons[1])
    assert torch.equal(params[1].grad, before[0] + epsilons[0])
    assert all(map(torch.equal, params, before))


def test_the_reward_of_every_picture_falls_and_for_a_small_radius_as_the_first_order_predicts(
        pickscore, pictures):
    images, prompts = pictures
    _, gradient = rsaft.reward_gradient(pickscore, images, prompts)
    for rho in 0.01, 0.1, 1.0:
        assert (rsaft.reward_sharpness(pickscore, images, prompts, rho) > 0).all()
    predicted = 1e-3 * gradient.flatten(1).norm(dim=1)
    assert_close(rsaft.reward_sharpness(pickscore, images, prompts, 1e-3), predicted, rtol=0.05, atol=0)


def test_the_sharpness_of_a_quadratic_reward_has_its_closed_form():
    """r(x) = -|x|^2 / 2 falls by rho |x| + rho^2 / 2."""
    x = normal(3, 3, 4, 4)

    def reward(images, prompts):
        return -images.flatten(1).square().sum(1) / 2

    sharpness = rsaft.reward_sharpness(reward, x, [""] * 3, 0.3)
    assert_close(sharpness, 0.3 * x.flatten(1).norm(dim=1) + 0.3 ** 2 / 2, rtol=1e-4, atol=1e-4)


# ---- Algorithm 1 -------------------------------------------------------------------------------------------

class Toy:
    """All of Algorithm 1 by hand, in float64: pictures x0 = factor theta xT, reward -|x0 - target|^2 / 2.

    factors: a picture of every prompt for each of them; code: where rsaft_gradient comes from.
    """

    def __init__(self, micro_batch_size=4, factors=(1.0,), code=rsaft):
        self.theta = torch.nn.Parameter(normal(3, 4, 4, seed=1, dtype=torch.float64))
        self.target = normal(3, 4, 4, seed=2, dtype=torch.float64)
        self.batches = code.micro_batches(["a", "b", "c", "d"], ("toy",), micro_batch_size)
        self.xT = code.micro_batches(["a", "b", "c", "d"], ("toy",), 4)[0].noise("xT", (3, 4, 4)).double()
        self.factors, self.code = factors, code

    def make_starts(self, batches):
        return [None] * len(batches)              # a loop of one's own may have nothing to give here

    def make_images(self, batch, start):
        x0 = self.theta * batch.noise("xT", (3, 4, 4)).double()
        return torch.cat([factor * x0 for factor in self.factors]), batch.prompts * len(self.factors)

    def reward(self, images, prompts):
        assert len(images) == len(prompts)
        return -(images - self.target).flatten(1).square().sum(1) / 2

    def __call__(self, **settings):
        log = self.code.rsaft_gradient(self.batches, self.make_starts, self.make_images, self.reward,
                                       [self.theta], **settings)
        return log, self.theta.grad

    def by_hand(self, rho, rho_w):
        """The log and the gradient."""
        theta, by_theta = self.theta.detach(), torch.stack([factor * self.xT for factor in self.factors])

        def reward(x):
            return -(x - self.target).flatten(2).square().sum(2) / 2

        x0 = theta * by_theta                                # (pictures of a prompt, prompts, 3, 4, 4)
        g = self.target - x0                                 # grad_x0 r
        norms = g.flatten(2).norm(dim=2)
        d = -rho * g / norms[..., None, None, None]
        gradient = (g * by_theta).mean((0, 1))               # grad_theta of the mean reward
        e = -rho_w * gradient / gradient.norm()
        worst = (theta + e) * by_theta + d
        log = {"reward": reward(x0)[0].mean()}
        if rho > 0 or rho_w > 0:
            log |= {"worst_reward": reward(worst)[0].mean(),
                    "fall_measured": (reward(x0) - reward(worst)).mean(),
                    "fall_predicted": rho * norms.mean() + rho_w * gradient.norm()}
        log |= {"noise_norm": rho} if rho > 0 else {}
        log |= {"sam_norm": rho_w} if rho_w > 0 else {}
        return log, ((self.target - worst) * by_theta).mean((0, 1))


@pytest.mark.parametrize("factors", [(1.0,), (1.0, 0.5, 2.0)])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("rho, rho_w", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.1, 0.2)])
def test_the_update_is_the_gradient_of_the_joint_objective_and_its_log_has_closed_forms(
        rho, rho_w, micro_batch_size, factors):
    """With several pictures of a prompt, as in DRaFT-LV, each has its own d, and gradient and falls are means
    over all of them; `reward` and `worst_reward` are of the first."""
    toy = Toy(micro_batch_size, factors)
    before, (expected, by_hand) = toy.theta.detach().clone(), toy.by_hand(rho, rho_w)
    log, gradient = toy(rho=rho, rho_w=rho_w)
    assert_close(gradient, by_hand, rtol=1e-9, atol=1e-9)
    assert torch.equal(toy.theta, before)
    assert log.keys() == expected.keys()
    for name, value in expected.items():
        assert log[name] == pytest.approx(float(value), rel=1e-9), name


def test_the_code_before_lora_runs_without_the_rest_of_the_file():
    code = types.ModuleType("lifted")
    code.__file__ = "lifted.py"
    exec((HERE / "rsaft.py").read_text().split("\nclass LoRALinear")[0], code.__dict__)
    assert not hasattr(code, "train")
    log, gradient = Toy(2, code=code)(rho=0.1, rho_w=0.2)
    expected, by_hand = Toy(2).by_hand(0.1, 0.2)
    assert_close(gradient, by_hand, rtol=1e-9, atol=1e-9)
    assert log.keys() == expected.keys()


def test_the_pictures_of_a_loop_of_ones_own_may_be_halves():
    toy = Toy()
    toy.theta = torch.nn.Parameter(toy.theta.detach().float())

    def make_images(batch, start):
        return (toy.theta * batch.noise("xT", (3, 4, 4))).bfloat16(), batch.prompts

    log = rsaft.rsaft_gradient(toy.batches, toy.make_starts, make_images, toy.reward, [toy.theta], rho=0.1)
    assert log["noise_norm"] == pytest.approx(0.1, rel=1e-3)
    assert_close(toy.theta.grad.double(), toy.by_hand(0.1, 0.0)[1], rtol=0.03, atol=0.03)


def test_both_passes_see_the_same_batches_and_the_second_its_own_starts_unless_they_are_reused():
    for reuse_starts in False, True:
        toy, seen, starts = Toy(micro_batch_size=2), [], iter("abcd")

        def make_starts(batches):
            assert batches == toy.batches
            return [next(starts) for _ in batches]

        def make_images(batch, start):
            seen.append((batch, start))
            return toy.make_images(batch, start)

        rsaft.rsaft_gradient(toy.batches, make_starts, make_images, toy.reward, [toy.theta], 0.1, 0.1,
                             reuse_starts)
        first, second = toy.batches
        assert seen == [*zip([first, second, first, second], "abab" if reuse_starts else "abcd")]


def test_radius_0_is_the_plain_gradient_bit_for_bit(model, params, pickscore):
    plan = rsaft.draft(4, None)
    _, gradients = step_of_algorithm_1(model, params, plan, pickscore, rho=0.0, rho_w=0.0)
    batch, = rsaft.micro_batches(PROMPTS[:4], (0, 0), 4)
    xT = batch.noise("xT", LATENT)
    x0 = model.decode(rsaft.rollout(model.denoiser(batch.prompts), xT, model.steps, plan))
    expected = torch.autograd.grad(pickscore(x0, batch.prompts).mean(), params)
    assert total_norm(expected) > 0 and all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("rho, rho_w", [(0.0, 0.0), (0.01, 0.01)])
def test_splitting_the_batch_changes_nothing_but_rounding(model, params, pickscore, rho, rho_w):
    results = [step_of_algorithm_1(model, params, rsaft.draft(4, None), pickscore, size=size, rho=rho,
                                   rho_w=rho_w) for size in (1, 2, 4)]
    log, gradients = results[0]
    for other, others in results[1:]:
        assert total_norm(a - b for a, b in zip(gradients, others)) < 1e-3 * total_norm(gradients)
        assert other == {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in log.items()}


def test_with_reuse_starts_the_second_rollout_begins_with_the_latents_of_the_first(model, params, pickscore):
    torch.nn.init.normal_(params[1], std=0.1, generator=torch.Generator().manual_seed(1))
    plan = rsaft.draft(4, None, K=2)
    batch, = rsaft.micro_batches(PROMPTS[:4], (0, 0), 4)

    def gradients(reuse_starts, plan=plan):
        return step_of_algorithm_1(model, params, plan, pickscore, rho_w=0.5, reuse_starts=reuse_starts)[1]

    start, = rsaft.sample_starts(model, plan, [batch], 4)             # by hand: at theta
    x0, prompts = rsaft.sample_images(model, plan, batch, start)
    at_theta = torch.autograd.grad(pickscore(x0, prompts).mean(), params)
    with rsaft.perturbed(params, rsaft.parameter_perturbation(at_theta, 0.5)):
        moved, _ = rsaft.sample_images(model, plan, batch, start)
        expected = torch.autograd.grad(pickscore(moved, prompts).mean(), params)
    assert_close(gradients(True), list(expected), rtol=1e-4, atol=1e-7)
    difference = total_norm(a - b for a, b in zip(gradients(False), expected))
    assert difference > 0.01 * total_norm(expected)                   # the full rollout is another update
    everything = rsaft.draft(4, None, K=4)                            # nothing is left out: the same
    assert all(map(torch.equal, gradients(True, everything), gradients(False, everything)))


@pytest.mark.parametrize("method", ["draft", "drtune"])
def test_a_checkpointed_gradient_is_the_plain_one(model, params, pickscore, method):
    plan = rsaft.METHODS[method](4, torch.Generator().manual_seed(0), 2)
    forwards, results = [], []
    model.network.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda *_: forwards.append(1))
    for checkpointed in False, True:
        if checkpointed:
            model.network.enable_gradient_checkpointing()
            model.vae.enable_gradient_checkpointing()
        forwards.clear()
        log, gradients = step_of_algorithm_1(model, params, plan, pickscore, rho=0.01, rho_w=0.01)
        results.append((log, gradients, len(forwards)))
    (log, gradients, count), (other, others, recomputed) = results
    assert log == {name: pytest.approx(value, rel=1e-5) for name, value in other.items()}
    assert_close(gradients, others, rtol=1e-5, atol=1e-8)
    assert recomputed > count                                         # it did recompute


def test_with_all_steps_differentiated_the_fall_under_sam_is_as_predicted(model, params, pickscore):
    """With K < T the second rollout moves the first T - K steps too, and the reward falls further."""
    plan = rsaft.draft(4, None, K=4)
    log, _ = step_of_algorithm_1(model, params, plan, pickscore, PROMPTS[:8], 8, rho_w=0.01)
    assert log["sam_norm"] == pytest.approx(0.01, rel=1e-4)
    assert log["fall_measured"] == pytest.approx(log["fall_predicted"], rel=0.2)


def test_in_bf16_the_fall_under_sam_is_as_predicted_where_it_stands_above_the_rounding(pickscore):
    """The rounding: how far the reward in bf16 is from that in float32. At radius 0.01 it hides the fall."""
    logs = []
    for dtype in torch.float32, torch.bfloat16:
        model = rsaft.load_model(str(MODEL), 4, 3.0, dtype=dtype)
        params = model.add_adapter(4, torch.Generator().manual_seed(0))
        for B in params[1::2]:
            torch.nn.init.normal_(B, std=0.02, generator=torch.Generator().manual_seed(1))
        plan = rsaft.draft(4, None, K=4)
        logs.append(step_of_algorithm_1(model, params, plan, pickscore, PROMPTS[:16], 16, rho_w=0.3)[0])
    exact, rounded = logs
    assert rounded["fall_predicted"] > 10 * abs(rounded["reward"] - exact["reward"]) > 0
    assert rounded["fall_measured"] == pytest.approx(rounded["fall_predicted"], rel=0.2)


# ---- LoRA --------------------------------------------------------------------------------------------------

def test_a_new_adapter_changes_no_bit_and_only_the_adapter_is_trained(model):
    x, embeds = normal(2, *LATENT), normal(2, 16, 64)
    before = model.network(x, 500, embeds).sample
    params = model.add_adapter(4, torch.Generator().manual_seed(0))
    assert torch.equal(model.network(x, 500, embeds).sample, before)
    attention = [m for m in model.network.modules() if type(m).__name__ == "Attention"]
    assert len(params) == 2 * 4 * len(attention) > 0                  # A and B of q, k, v and out
    assert {id(p) for p in params} == {id(p) for p in model.network.parameters() if p.requires_grad}
    assert [id(p) for p in params] == [id(p) for p in model.adapter().values()]
    assert all(p.dtype == torch.float32 for p in params)


def test_a_lora_layer_adds_b_a():
    layer = rsaft.LoRALinear(torch.nn.Linear(6, 5), 3, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.B)
    x = normal(2, 6)
    assert_close(layer(x), layer.linear(x) + x @ (layer.B @ layer.A).T)
    half = rsaft.LoRALinear(torch.nn.Linear(6, 5).bfloat16(), 3, torch.Generator().manual_seed(0))
    assert half.A.dtype == torch.float32 and half(x.bfloat16()).dtype == torch.bfloat16


def test_an_adapter_that_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="no linear layer is named to_q, to_k"):
        rsaft.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), 4)
    with pytest.raises(ValueError, match="rank 33 is above 32"):
        rsaft.add_lora(model.network, 33)
    with pytest.raises(rsaft.UserError, match="rank 33"):
        model.add_adapter(33, None)
    assert not any(isinstance(module, rsaft.LoRALinear) for module in model.network.modules())
    assert len(rsaft.add_lora(model.network, 32)) > 0


@pytest.mark.parametrize("rho, rho_w", [(0.0, 0.0), (0.01, 0.01)])
def test_every_adapter_receives_gradient_after_the_second_update(model, params, pickscore, rho, rho_w):
    optimizer = torch.optim.AdamW(params, lr=1e-3, maximize=True)
    for update in range(2):
        step_of_algorithm_1(model, params, rsaft.draft(4, None), pickscore, rho=rho, rho_w=rho_w)
        if update == 0 and rho_w == 0:       # B starts at 0, so A's first gradient is 0 (sam moves B)
            assert all((p.grad != 0).any() == (i % 2 == 1) for i, p in enumerate(params))
        optimizer.step()
    assert all((p.grad != 0).any() for p in params)


# ---- Loading: whole, or refused ----------------------------------------------------------------------------

@pytest.fixture
def tiny(tmp_path):
    """A copy of tiny/ to damage."""
    return shutil.copytree(TINY, tmp_path / "tiny")


@pytest.mark.parametrize("part, tensor", [
    ("stable-diffusion/text_encoder", "final_layer_norm.bias"),
    ("stable-diffusion/unet", "mid_block.attentions.0.proj_out.weight"),
    ("stable-diffusion/vae", "decoder.conv_out.bias"),
    ("pickscore", "logit_scale"), ("pickscore", "visual_projection.weight")])
def test_a_missing_weight_is_refused_by_name_and_a_surplus_one_is_not(tiny, part, tensor):
    from safetensors.torch import load_file, save_file
    file, = (tiny / part).glob("*.safetensors")
    state = load_file(file)
    name, = [key for key in state if key.endswith(tensor)]

    def save_and_load():
        save_file(state, file, metadata={"format": "pt"})
        rsaft.load_model(str(tiny / "stable-diffusion"))
        rsaft.make_reward("pickscore", tiny)

    state["of_another_time"] = state[name].clone()
    save_and_load()
    del state[name]
    with pytest.raises(rsaft.UserError, match=re.escape(tensor)):
        save_and_load()


@pytest.mark.parametrize("part", ["stable-diffusion/tokenizer", "pickscore"])
def test_a_tokenizer_without_its_vocabulary_is_refused(tiny, part):
    """transformers makes an empty one, to which all prompts are alike."""
    (tiny / part / "tokenizer.json").unlink()
    with pytest.raises(rsaft.UserError, match="vocabulary"):
        rsaft.load_model(str(tiny / "stable-diffusion"))
        rsaft.make_reward("pickscore", tiny)


def test_a_model_may_have_a_size_of_its_own_that_is_no_square(tiny):
    config = tiny / "stable-diffusion" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": [8, 16]}))
    folder = str(tiny / "stable-diffusion")
    assert rsaft.inspect_model(folder) == (rsaft.StableDiffusion, (4, 8, 16), 32, 64)
    model, (batch,) = rsaft.load_model(folder, 2, 1.0), rsaft.micro_batches(PROMPTS[:1], (0, 0), 1)
    start, = rsaft.sample_starts(model, plain(2), [batch], 1)
    assert rsaft.sample_images(model, plain(2), batch, start)[0].shape == (1, 3, 32, 64)


# ---- The hub -----------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
UNET = "unet/diffusion_pytorch_model.safetensors"
SURPLUS = [UNET.replace("model", "model.fp16"), UNET.replace("model", "model.non_ema"), "unet/model.bin",
           "safety_checker/config.json", "safety_checker/model.safetensors", "v1-5-pruned.safetensors"]


def names(folder):
    """Of the files in a folder and below."""
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*.*")}


class Hub(ThreadingHTTPServer):
    """A small model hub on 127.0.0.1. `asked`: the requests, each METHOD PATH; `fault`: request -> None, or
    the status and the code that it is answered with."""
    repositories = {"a/model": MODEL, "yuvalkirstain/PickScore_v1": TINY / "pickscore",
                    LAION: TINY / "pickscore"}

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.asked, self.fault = [], lambda request: None
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def fetched(self, repository):
        start = f"GET /{repository}/resolve/{COMMIT}/"
        return {request.removeprefix(start) for request in self.asked if request.startswith(start)}


class HubRequest(BaseHTTPRequestHandler):
    def do_HEAD(self):
        request = f"{self.command} {self.path}"
        self.server.asked.append(request)
        if wrong := self.server.fault(request):
            return self.answer(b"", *wrong)
        folder = next((folder for name, folder in Hub.repositories.items() if f"/{name}/" in self.path), None)
        if folder is None:
            return self.answer(b"", 401, "RepoNotFound")
        listed = [*(SURPLUS if folder == MODEL else []), *names(folder)]
        if "/revision/" in self.path:
            return self.answer(json.dumps({"id": "a", "sha": COMMIT, "siblings": []}).encode())
        if "/tree/" in self.path:
            entries = [{"type": "file", "path": name, "size": 9, "oid": name} for name in listed]
            return self.answer(json.dumps(entries).encode())
        self.answer((folder / re.split("/resolve/[^/]*/", self.path)[1]).read_bytes())

    do_GET = do_HEAD

    def answer(self, body, status=200, code=""):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, "X-Error-Code": code,
                            "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Retry-After": 0}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the small models on it, and an empty cache."""
    from huggingface_hub import constants
    server = Hub()
    pages = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"ENDPOINT": server.address, "HUGGINGFACE_CO_URL_TEMPLATE": pages,
                        "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    yield server
    server.shutdown()
    server.server_close()


FROM_HUB = ["--model", "a/model", "--prompts", TINY / "prompts.txt", "--batch-size", "2", "--rank", "2",
            "--sampling-steps", "2", "--train-steps", "1", "--eval-every", "0"]


def from_hub(out, *arguments):
    return rsaft.main([*map(str, [*FROM_HUB, "--out", out, *arguments])])


def test_a_first_run_fetches_what_it_needs_and_the_next_one_asks_nobody(hub, tmp_path, monkeypatch, capsys):
    """So without a network, with a slow hub, or one that answers 429 or 500, what ran before runs again."""
    from huggingface_hub import constants
    assert from_hub(tmp_path / "cold") == 0
    said = capsys.readouterr().out
    assert re.search(r"fetching 0\.0\d GB from the hub: a/model, yuvalkirstain/PickScore_v1, laion/", said)
    assert hub.fetched("a/model") == names(MODEL)
    assert hub.fetched("yuvalkirstain/PickScore_v1") == {"config.json", "model.safetensors"}
    assert hub.fetched(LAION) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    hub.asked.clear()
    assert from_hub(tmp_path / "cached") == 0 and hub.asked == []
    assert "fetching" not in capsys.readouterr().out
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert from_hub(tmp_path / "offline") == 0 and hub.asked == []
    assert adapter(tmp_path / "cold") == adapter(tmp_path / "cached") == adapter(tmp_path / "offline")


def test_a_cache_that_another_program_filled_in_part_is_completed(hub):
    from huggingface_hub import hf_hub_download
    hf_hub_download("a/model", "vae/config.json")
    folder = rsaft.fetch({"a/model": rsaft.StableDiffusion.files()})["a/model"]
    assert names(folder) == names(MODEL)


def test_without_a_network_a_cache_that_has_no_list_of_files_will_do(hub, tmp_path):
    """As older versions of huggingface_hub filled it. What it lacks, if anything, the load says."""
    assert from_hub(tmp_path / "cold") == 0
    for lists in (tmp_path / "cache").glob("*/trees"):
        shutil.rmtree(lists)
    hub.fault = lambda request: (500, "")
    assert from_hub(tmp_path / "out") == 0
    assert adapter(tmp_path / "cold") == adapter(tmp_path / "out")


def test_the_hub_has_a_second_try_and_then_its_status_is_named(hub, tmp_path, capsys):
    faults = [(429, "")]
    hub.fault = lambda request: faults.pop() if faults and "/revision/" in request else None
    assert rsaft.fetch({"a/model": rsaft.CONFIGS})
    assert "can't be had from the hub (status 429); once more in 0 s\n" in capsys.readouterr().out
    hub.fault = lambda request: (503, "")
    assert from_hub(tmp_path / "out") == 1
    assert_one_line(last_line(capsys), r"a/model .*\(status 503\); try again")


@pytest.mark.parametrize("fault, offline, words", [
    (lambda request: (403, "GatedRepo") if "resolve" in request else None, False, "gated: .*hf auth login"),
    (lambda request: (401, "RepoNotFound"), False, "not on the hub; if private: `hf auth login`"),
    (lambda request: None, True, "nor whole in the hub's cache; HF_HUB_OFFLINE"),
    (lambda request: None, False, "can't be a name on the hub")])
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(
        hub, tmp_path, fault, offline, words, monkeypatch, capsys):
    from huggingface_hub import constants
    hub.fault = fault
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    model = "a/b/c" if "name" in words else "a/model"
    assert from_hub(tmp_path / "out", "--model", model) == 2
    assert_one_line(capsys.readouterr().err, words)


@pytest.mark.parametrize("name", [UNET, "tokenizer/tokenizer.json", "model_index.json"])
def test_a_file_that_was_cut_short_is_named_and_can_be_fetched_again(hub, tmp_path, name, capsys):
    wanted = {"a/model": rsaft.StableDiffusion.files()}
    path = Path(rsaft.fetch(wanted)["a/model"], name).resolve()
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    assert from_hub(tmp_path / "out") == 2
    assert_one_line(last_line(capsys), f"{re.escape(str(path))} can't be read; was it cut short, delete it")
    path.unlink()
    assert Path(rsaft.fetch(wanted)["a/model"], name).read_bytes() == whole


def test_ctrl_c_while_downloading_says_that_nothing_was_written(hub, tmp_path):
    hub.fault = lambda request: time.sleep(20) if request.startswith("GET") and UNET in request else None
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    process = subprocess.Popen([*RSAFT, *map(str, FROM_HUB), "--out", str(tmp_path / "out")],
                               stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    while not hub.fetched("a/model") >= {UNET}:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 1 and not (tmp_path / "out").exists()
    assert_one_line(error, "stopped by hand, before the run began or went on")


# ---- Rewards -----------------------------------------------------------------------------------------------

def pixels(images, size, **how):
    """What a vision tower is given, in [0, 1] again."""
    mean, std = torch.tensor([rsaft.CLIP_MEAN, rsaft.CLIP_STD])[..., None, None]
    return rsaft.clip_pixels(images, size, **how) * std + mean


@pytest.mark.parametrize("size", [(300, 401), (768, 1024), (1024, 768)])
@pytest.mark.parametrize("edges", ["soft", "hard"])                 # hard ones overshoot, hence the clamp
def test_pixels_are_resized_as_clip_resizes_8_bit_pictures(edges, size):
    """By transformers' own processor. At 4:3 the long side is 298.67 pixels, and CLIP cuts it off to 298."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil
    coarse = normal(1, 3, 24, 32).sigmoid() if edges == "soft" else (normal(1, 3, 24, 32) > 0).float()
    coarse = F.interpolate(coarse, size, mode="bicubic" if edges == "soft" else "nearest").clamp(0, 1)
    picture = Image.fromarray((coarse[0].permute(1, 2, 0) * 255).round().byte().numpy())
    expected = CLIPImageProcessorPil(do_normalize=False)(picture, return_tensors="pt").pixel_values
    off = ((pixels(coarse, 224) - expected).abs() > 1.5 / 255).float().mean()
    assert off == 0 if edges == "soft" else off < 0.01   # PIL clips between its two passes too: a few differ


@pytest.mark.parametrize("H, W, size", [(16, 32, 32), (32, 41, 32), (77, 48, 32), (768, 1024, 224)])
def test_a_picture_is_padded_for_hpsv2_as_open_clip_pads_it(H, W, size):
    """By one scale, rounded, then zeros on both sides, the smaller half first. Nothing is clamped."""
    images = F.interpolate((normal(1, 3, 8, 8) > 0).float(), (H, W))        # hard edges, which overshoot
    scale = size / max(H, W)
    h, w = round(H * scale), round(W * scale)
    resized = F.interpolate(images, (h, w), mode="bicubic", antialias=True)
    top, left = (size - h) // 2, (size - w) // 2
    expected = torch.zeros(1, 3, size, size)
    expected[:, :, top:top + h, left:left + w] = resized
    assert_close(pixels(images, size, pad=True), expected, rtol=0, atol=1e-5)


def test_pixels_of_the_right_size_are_only_normalised_so_that_every_one_carries_gradient():
    images = (1.5 * normal(1, 3, 32, 32)).requires_grad_()           # also far outside [0, 1]
    for pad in False, True:
        gradient, = torch.autograd.grad(rsaft.clip_pixels(images, 32, pad).sum(), images)
        assert_close(gradient, (1 / torch.tensor(rsaft.CLIP_STD)).view(1, 3, 1, 1).expand_as(images))


def test_pickscore_is_the_logit_of_transformers_own_clip(pickscore, pictures):
    from transformers import CLIPModel, CLIPTokenizer
    images, prompts = pictures
    model = CLIPModel.from_pretrained(TINY / "pickscore")
    tokens = CLIPTokenizer.from_pretrained(TINY / "pickscore")(prompts, padding="max_length", max_length=16,
                                                               return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, pixel_values=rsaft.clip_pixels(images, 32))
    assert_close(pickscore(images, prompts), output.logits_per_image.diagonal(), rtol=1e-4, atol=1e-3)


def test_the_rewards_know_what_they_are_shown(pickscore, pictures):
    images, prompts = pictures
    for reward in pickscore, rsaft.make_reward("judge", TINY):
        assert (reward(images, prompts) > reward(images, prompts[1:] + prompts[:1])).all()


def test_the_gradient_of_the_reward_agrees_with_finite_differences_and_its_weights_are_frozen(
        pickscore, pictures):
    images, prompts = pictures
    assert not pickscore(images, prompts).requires_grad
    value, gradient = rsaft.reward_gradient(pickscore, images, prompts)
    assert not value.requires_grad and not gradient.requires_grad and gradient.shape == images.shape
    direction = rsaft.sample_perturbation(gradient, 0.005)
    difference = (pickscore(images + direction, prompts) - pickscore(images - direction, prompts)) / 2
    assert_close((gradient * direction).flatten(1).sum(1), difference, rtol=0.02, atol=1e-3)


class Block(torch.nn.Module):
    """A transformer block under open_clip's names."""

    def __init__(self, width, hidden):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, 16, batch_first=True)
        self.mlp = torch.nn.Sequential()
        self.mlp.add_module("c_fc", torch.nn.Linear(width, hidden))
        self.mlp.add_module("gelu", torch.nn.GELU())
        self.mlp.add_module("c_proj", torch.nn.Linear(hidden, width))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def blocks(count, width, hidden):
    tower = torch.nn.Module()
    tower.resblocks = torch.nn.ModuleList(Block(width, hidden) for _ in range(count))
    return tower


class OpenClip(torch.nn.Module):
    """CLIP as open_clip has it, in names and formula: its state_dict is the original layout of HPSv2."""

    def __init__(self, words, tokens, size=32, patch=8, text=32, image=48, joint=24):
        super().__init__()
        self.patch = patch
        parameter = lambda *shape: torch.nn.Parameter(0.1 * torch.randn(shape))
        self.positional_embedding, self.text_projection = parameter(tokens, text), parameter(text, joint)
        self.logit_scale, self.token_embedding = parameter(), torch.nn.Embedding(words, text)
        self.transformer, self.ln_final = blocks(2, text, 64), torch.nn.LayerNorm(text)
        self.visual = torch.nn.Module()
        self.visual.class_embedding, self.visual.proj = parameter(image), parameter(image, joint)
        self.visual.positional_embedding = parameter((size // patch) ** 2 + 1, image)
        self.visual.conv1 = torch.nn.Conv2d(3, image, patch, patch, bias=False)
        self.visual.ln_pre, self.visual.ln_post = torch.nn.LayerNorm(image), torch.nn.LayerNorm(image)
        self.visual.transformer = blocks(2, image, 96)

    def forward(self, ids, pixels):
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        x = v.ln_pre(x)
        for block in v.transformer.resblocks:
            x = block(x)
        image = v.ln_post(x[:, 0]) @ v.proj
        y = self.token_embedding(ids) + self.positional_embedding
        causal = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
        for block in self.transformer.resblocks:
            y = block(y, causal)
        text = self.ln_final(y)[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection
        return torch.cosine_similarity(text, image)


def linear_layers(sizes, prefix=""):
    """The flat dictionary of ImageReward's and the aesthetic predictor's heads."""
    return {f"{prefix}layers.{i}.{part}": 0.3 * torch.randn(*([b, a] if part == "weight" else [b]))
            for i, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:]) for part in ("weight", "bias")}


def apply_head(state, x, prefix=""):
    for i in 0, 2, 4, 6, 7:
        x = x @ state[f"{prefix}layers.{i}.weight"].T + state[f"{prefix}layers.{i}.bias"]
    return x[:, 0]


def imagereward_state(words, width=24, image=32, patch=8):
    """A flat dictionary with the names of ImageReward.pt, one layer in each tower."""
    shapes = {"visual_encoder.cls_token": (1, 1, image), "visual_encoder.pos_embed": (1, 17, image),
              "visual_encoder.patch_embed.proj.weight": (image, 3, patch, patch),
              "vision_proj.weight": (8, image), "text_proj.weight": (8, width),
              "text_encoder.embeddings.word_embeddings.weight": (words, width),
              "text_encoder.embeddings.position_embeddings.weight": (40, width)}
    linear = {"visual_encoder.blocks.0.attn.qkv": (3 * image, image),
              "visual_encoder.blocks.0.attn.proj": (image, image),
              "visual_encoder.blocks.0.mlp.fc1": (64, image), "visual_encoder.blocks.0.mlp.fc2": (image, 64),
              "text_encoder.encoder.layer.0.intermediate.dense": (48, width),
              "text_encoder.encoder.layer.0.output.dense": (width, 48)}
    for attention, inner in ("attention", width), ("crossattention", image):
        for part in "query", "key", "value":
            columns = width if part == "query" else inner
            linear[f"text_encoder.encoder.layer.0.{attention}.self.{part}"] = (width, columns)
        linear[f"text_encoder.encoder.layer.0.{attention}.output.dense"] = (width, width)
    norms = {"visual_encoder.norm": image, "visual_encoder.blocks.0.norm1": image,
             "visual_encoder.blocks.0.norm2": image,
             "text_encoder.embeddings.LayerNorm": width,
             "text_encoder.encoder.layer.0.output.LayerNorm": width,
             "text_encoder.encoder.layer.0.attention.output.LayerNorm": width,
             "text_encoder.encoder.layer.0.crossattention.output.LayerNorm": width}
    shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    shapes |= {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}
    shapes |= {"visual_encoder.patch_embed.proj.bias": (image,)}
    state = {f"blip.{name}": 0.3 * torch.randn(*shape) for name, shape in shapes.items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return state | linear_layers((width, 16, 8, 8, 4, 1), "mlp.")


def attend(q, k, v, heads, mask=0):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)


def blip_by_hand(state, ids, attention_mask, pixels):
    """BLIP's two towers, written out on the original names: what ImageReward's head is applied to."""
    def line(x, name):
        return x @ state[f"blip.{name}.weight"].T + state[f"blip.{name}.bias"]

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"blip.{name}.weight"], state[f"blip.{name}.bias"], eps)

    gelu, v, t = F.gelu, "visual_encoder", "text_encoder"
    weight, bias = (state[f"blip.{v}.patch_embed.proj.{part}"] for part in ("weight", "bias"))
    x = F.conv2d(pixels, weight, bias, stride=8)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state[f"blip.{v}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"blip.{v}.pos_embed"]
    y = norm(x, f"{v}.blocks.0.norm1", 1e-6)
    x = x + line(attend(*line(y, f"{v}.blocks.0.attn.qkv").chunk(3, -1), heads=16), f"{v}.blocks.0.attn.proj")
    y = norm(x, f"{v}.blocks.0.norm2", 1e-6)
    x = norm(x + line(gelu(line(y, f"{v}.blocks.0.mlp.fc1")), f"{v}.blocks.0.mlp.fc2"), f"{v}.norm", 1e-6)

    h = (state[f"blip.{t}.embeddings.word_embeddings.weight"][ids]
         + state[f"blip.{t}.embeddings.position_embeddings.weight"][:ids.shape[1]])
    h = norm(h, f"{t}.embeddings.LayerNorm", 1e-12)
    padding = torch.where(attention_mask.bool(), 0.0, float("-inf"))[:, None, None]
    for name, keys, mask in ("attention", None, padding), ("crossattention", x, 0):
        layer = f"{t}.encoder.layer.0.{name}"
        q, k, w = (line(h if part == "query" or keys is None else keys, f"{layer}.self.{part}")
                   for part in ("query", "key", "value"))
        h = h + line(attend(q, k, w, 12, mask), f"{layer}.output.dense")
        h = norm(h, f"{layer}.output.LayerNorm", 1e-12)
    layer = f"{t}.encoder.layer.0"
    inner = gelu(line(h, f"{layer}.intermediate.dense"))
    h = norm(h + line(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
    return h[:, 0]


@pytest.fixture
def originals(tmp_path, monkeypatch):
    """A --models folder with every reward in its original layout, small, and the formula that each must agree
    with."""
    from transformers import BertTokenizer, CLIPModel, CLIPTokenizer
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "pickscore")
    for name in "pickscore", "clipscore", "aesthetic":
        shutil.copytree(TINY / "pickscore", tmp_path / name)
    loaders = {name: rsaft.import_file(HERE / "rewards" / f"{name}.py").load.__globals__
               for name in ("hpsv2", "hpsv2.1", "imagereward")}
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
                                               *sorted(set(" ".join(PROMPTS).split()))])}
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16,
                hidden_act="gelu")
    vision = dict(hidden_size=48, intermediate_size=96, patch_size=8, image_size=32)
    for name in "hpsv2", "hpsv2.1":
        monkeypatch.setitem(loaders[name], "VIT_H", dict(
            text_config={**text, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
            vision_config={**text, **vision}, projection_dim=24))
    monkeypatch.setitem(loaders["imagereward"], "BLIP_LARGE", {
        **loaders["imagereward"]["BLIP_LARGE"], "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "image_size": 32, "patch_size": 8})
    monkeypatch.setitem(loaders["imagereward"], "BLIP_TEXT", {
        **loaders["imagereward"]["BLIP_TEXT"], "vocab_size": len(words), "hidden_size": 24,
        "encoder_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "max_position_embeddings": 40})
    clips = {}
    for name, file in ("hpsv2", "HPS_v2_compressed.pt"), ("hpsv2.1", "HPS_v2.1_compressed.pt"):
        clips[name] = OpenClip(len(tokenizer), 16).eval()
        tokenizer.save_pretrained(tmp_path / name)
        torch.save({"epoch": 1, "state_dict": clips[name].state_dict()}, tmp_path / name / file)
    blip, head = imagereward_state(len(words)), linear_layers((64, 16, 8, 8, 4, 1))
    bert = BertTokenizer(vocab=words)
    bert.save_pretrained(tmp_path / "imagereward")
    torch.save(blip, tmp_path / "imagereward" / "ImageReward.pt")
    torch.save(head, tmp_path / "aesthetic" / "aesthetic-model.pth")
    clip = CLIPModel.from_pretrained(TINY / "pickscore")

    def ids(prompts):
        return tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids

    def aesthetic(pixels, prompts):
        image = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        return apply_head(head, image / image.norm(dim=-1, keepdim=True))

    def imagereward(pixels, prompts):
        tokens = bert(prompts, padding="max_length", max_length=35, return_tensors="pt")
        features = blip_by_hand(blip, tokens.input_ids, tokens.attention_mask, pixels)
        return (apply_head(blip, features, "mlp.") - 0.16717362830052426) / 1.0333394966054072

    def cosine(pixels, prompts):
        output = clip(input_ids=ids(prompts), pixel_values=pixels)
        return torch.cosine_similarity(output.text_embeds, output.image_embeds)

    return tmp_path, {"hpsv2": lambda pixels, prompts: 100 * clips["hpsv2"](ids(prompts), pixels),
                      "hpsv2.1": lambda pixels, prompts: 100 * clips["hpsv2.1"](ids(prompts), pixels),
                      "imagereward": imagereward, "aesthetic": aesthetic,
                      "clipscore": lambda pixels, prompts: 100 * cosine(pixels, prompts),
                      "pickscore": lambda pixels, prompts: clip.logit_scale.exp() * cosine(pixels, prompts)}


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "hpsv2.1", "imagereward", "aesthetic", "clipscore"])
def test_every_reward_loads_from_its_original_files_and_agrees_with_its_formula(originals, pictures, name):
    folder, formulas = originals
    images, prompts = pictures
    reward = rsaft.make_reward(name, folder)
    with torch.no_grad():
        expected = formulas[name](rsaft.clip_pixels(images, 32), prompts)
    assert_close(reward(images, prompts), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 1e-3 * expected.abs().mean()                           # it tells pictures apart
    _, gradient = rsaft.reward_gradient(reward, images, prompts)
    step = rsaft.sample_perturbation(gradient, 0.005)
    difference = (reward(images + step, prompts) - reward(images - step, prompts)) / 2
    assert_close((gradient * step).flatten(1).sum(1), difference, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("name, file, key, named", [
    ("hpsv2", "HPS_v2_compressed.pt", "visual.transformer.resblocks.1.ln_2.bias",
     "vision_model.encoder.layers.1.layer_norm2.bias"),
    ("imagereward", "ImageReward.pt", "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
     "encoder.layer.0.crossattention.self.key.weight"),
    ("imagereward", "ImageReward.pt", "mlp.layers.6.bias", "layers.6.bias"),
    ("aesthetic", "aesthetic-model.pth", "layers.4.weight", "layers.4.weight"),
])
def test_missing_and_surplus_keys_are_refused_by_name(originals, name, file, key, named):
    folder, _ = originals
    whole = torch.load(folder / name / file, weights_only=True)
    state = whole.get("state_dict", whole)
    tensor = state.pop(key)
    torch.save(whole, folder / name / file)
    with pytest.raises(rsaft.UserError, match=re.escape(named)):
        rsaft.make_reward(name, folder)
    state[key] = tensor
    state[key + "_too_many"] = tensor
    torch.save(whole, folder / name / file)
    with pytest.raises(rsaft.UserError, match="too_many"):
        rsaft.make_reward(name, folder)


def test_a_checkpoint_that_would_run_code_is_refused(originals):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(originals[0] / "was_here"),)

    torch.save({"state_dict": Evil()}, originals[0] / "hpsv2" / "HPS_v2_compressed.pt")
    with pytest.raises(rsaft.UserError, match="hpsv2"):
        rsaft.make_reward("hpsv2", originals[0])
    assert not (originals[0] / "was_here").exists()


# ---- Random numbers by name --------------------------------------------------------------------------------

def test_the_noise_of_a_sample_depends_on_its_name_alone():
    whole, = rsaft.micro_batches(PROMPTS[:6], (7, 3), 6)
    parts = rsaft.micro_batches(PROMPTS[:6], (7, 3), 2)
    xT = whole.noise("xT", LATENT)
    assert torch.equal(torch.cat([part.noise("xT", LATENT) for part in parts]), xT)
    assert sum((part.prompts for part in parts), []) == whole.prompts
    assert len({tuple(sample.flatten().tolist()) for sample in xT}) == 6          # each sample has its own
    others = [rsaft.micro_batches(PROMPTS[:6], name, 6)[0].noise("xT", LATENT) for name in ((7, 4), (8, 3))]
    others += [whole.noise("renoise 0", LATENT), xT.roll(1, 0)]
    assert not any(torch.equal(other, xT) for other in others)


def test_every_prompt_is_used_once_before_any_comes_again():
    drawn = [rsaft.training_prompts(PROMPTS, 0, update, 24) for update in range(6)]
    for epoch in sum(drawn[:3], []), sum(drawn[3:], []):
        assert sorted(epoch) == sorted(PROMPTS)
    assert sum(drawn[:3], []) != sum(drawn[3:], [])
    assert drawn[0] == rsaft.training_prompts(PROMPTS, 0, 0, 24) != rsaft.training_prompts(PROMPTS, 1, 0, 24)


# ---- The small world ---------------------------------------------------------------------------------------

def test_the_oracle_knows_real_pictures_from_others(pictures, world):
    images, prompts = pictures
    real, wrong = world.oracle(images, prompts), world.oracle(images, prompts[1:] + prompts[:1])
    assert (real["accuracy"] == 1).all() and (real["rmse"] < 0.07).all()
    assert (wrong["rmse"] > real["rmse"]).all()
    assert (world.oracle(0.8 * images, prompts)["rmse"] > real["rmse"]).all()     # paler is worse


def test_the_oracle_measures_the_distance_to_the_nearest_clean_rendering(pictures, world):
    images, _ = pictures
    distances = world.distances(images[:2])
    for caption in 0, 29, 71:
        shape, pair = divmod(caption, 18)
        color, ground = world.PALETTE[pair][..., None, None, None].movedim(1, -3).unbind(0)
        clean = ground + (color - ground) * world.templates()[shape].view(-1, 1, 32, 32)
        for image, distance in zip(images, distances[:, caption]):
            nearest = (clean - image).square().mean((1, 2, 3)).min().sqrt()
            assert_close(distance, nearest, rtol=1e-3, atol=1e-4)


# ---- What a user sees --------------------------------------------------------------------------------------

ADAPTER, SCHEDULER = rsaft.ADAPTER, "scheduler/scheduler_config.json"
RSAFT = [sys.executable, str(HERE / "rsaft.py")]
FLAGS = ["--sam", "--noise", "--eval-every", "1"]                  # of the fixture `finished`
COMMAND = "python rsaft.py --tiny --reward pickscore --sam --noise"
MINE = '''
import torch

def brightness(images, prompts):
    return images.mean((1, 2, 3))

def darkness(images, prompts):
    return -images.mean((1, 2, 3))
'''


def run(*arguments, command=RSAFT, environment={}, **options):
    """rsaft.py, or another command, in a process of its own, as a user has it."""
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, **environment}, **options)


def assert_one_line(error, words=""):
    """`error` is one line of rsaft.py, with these words."""
    assert re.search(words, error) and error.startswith("rsaft.py: ") and len(error.splitlines()) == 1, error


def last_line(capsys):
    """Of what was said on stderr since."""
    return capsys.readouterr().err.splitlines()[-1]


def adapter(out):
    return (Path(out) / ADAPTER).read_bytes()


def tensors(out):
    """The adapter, {name: tensor}."""
    from safetensors.torch import load_file
    return load_file(Path(out) / ADAPTER)


def story(out):
    """The log without what a clock or the machine says."""
    return [{name: value for name, value in line.items() if name not in ("seconds", "peak_gb")}
            for line in log_lines(out)]


def assert_same_end(out, other):
    """Two runs have the same log and, bit for bit, the same adapter."""
    assert story(out) == story(other)
    assert adapter(out) == adapter(other)


def assert_saved(out, updates):
    """The log and the checkpoint of a run hold so many updates, and an adapter that is finite."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert len(records(out)) == len(state["updates"]) == updates
    assert all(tensor.isfinite().all() for tensor in state["adapter"].values())


def files(folder):
    """{path: content} of all files in a folder."""
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and "__pycache__" not in str(path)}


def model_with(folder, file, **changes):
    """The tiny model with other entries in one of its files; with no entry, the first half of that file."""
    shutil.copytree(MODEL, folder)
    path = Path(folder, file)
    if changes:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    else:
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small finished run with both perturbations, evaluated after every update. `copied` may be spoilt."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert small(out, *FLAGS) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of `finished` to go on with, or to spoil."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def test_the_command_of_the_readme_runs_and_its_adapter_gives_the_last_grid_in_plain_diffusers(tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from PIL import Image
    assert f"pip install -r requirements.txt && {COMMAND}\n" in (HERE / "README.md").read_text()
    out = tmp_path / "out"
    result = run(*COMMAND.split()[2:], "--train-steps", 3, "--eval-every", 2, "--eval-images", 16,
                 "--batch-size", 8, "--out", out)
    assert result.returncode == 0, result.stderr
    for word in ("cpu x 1, float32", "trained parameters", "network evaluations", "before", "after",
                 "standard error", "pickscore (trained on)", "judge (held out)", "oracle_rmse",
                 "oracle_accuracy", "s1 (sharpness)", "best judge", "no alarm",
                 f"python tools/evaluate.py {out}", f"python tools/plot.py {out}"):
        assert word in result.stdout, word
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["step", "pickscore", "judge", "oracle_accuracy", "oracle_rmse", "s1"] in rows
    assert [row[0] for row in rows if len(row) == 6 and row[0] in "0123"] == ["0", "2", "3"]
    assert "reward=" in result.stderr                 # in the bar
    for word in "Traceback", "Warning", "torchvision":
        assert word not in result.stderr

    assert {path.name for path in out.iterdir()} == {
        "config.json", "log.jsonl", "samples", "best", ADAPTER, "checkpoint.pt", ".lock"}
    config = json.loads((out / "config.json").read_text())
    assert config["noise"] == config["sam"] == 0.01 and config["versions"]["torch"] == torch.__version__
    assert (config["sampling_steps"], config["guidance_scale"], config["height"]) == (10, 3.0, 32)
    assert [record["step"] for record in records(out)] == [1, 2, 3]
    for record in records(out):
        assert record.keys() == {
            "step", "reward", "worst_reward", "fall_predicted", "fall_measured", "noise_norm", "sam_norm",
            "grad_norm", "seconds", "network_evaluations_without_gradient",
            "network_evaluations_with_gradient", "reward_evaluations"}
        assert record["noise_norm"] == pytest.approx(0.01, rel=1e-3) == record["sam_norm"]
        assert record["fall_measured"] == pytest.approx(record["reward"] - record["worst_reward"], abs=1e-5)
        assert record["fall_measured"] > 0.5 * record["fall_predicted"] > 0
    evaluations = records(out, evaluations=True)
    assert [record["step"] for record in evaluations] == [0, 2, 3]
    scores = {"pickscore", "judge", "oracle_rmse", "oracle_accuracy", "s1"}
    for record in evaluations:
        assert record.keys() - {"since_best"} == {"eval", "step", "alarm", "pictures"} | scores
        assert record["pictures"].keys() == scores
        for name in scores:
            assert len(record["pictures"][name]) == 16
            assert sum(record["pictures"][name]) / 16 == pytest.approx(record[name])
    assert (out / "samples" / "prompts.txt").read_text().splitlines() == PROMPTS[:16]

    # What README tells the user to do with the adapter: the pipeline of diffusers, and nothing of ours but
    # the noise.
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def grid():
        latents = rsaft.evaluation_latents(16, LATENT)
        images = pipe(PROMPTS[:16], latents=latents, num_inference_steps=10, guidance_scale=3.0, height=32,
                      width=32, output_type="pt").images
        return (255 * images.unflatten(0, (4, 4)).permute(0, 3, 1, 4, 2).reshape(128, 128, 3)).round()

    def saved(step):
        picture = Image.open(out / "samples" / f"step_{step:06d}.png")
        assert picture.size == (512, 512)
        values = list(picture.resize((128, 128), Image.NEAREST).tobytes())
        return torch.tensor(values).view(128, 128, 3).float()

    assert (grid() - saved(0)).abs().max() <= 2
    assert (grid() - saved(3)).abs().max() > 2
    pipe.load_lora_weights(out)
    assert (grid() - saved(3)).abs().max() <= 2


def test_radius_0_is_the_plain_method_bit_for_bit_and_another_seed_is_another_run(tmp_path):
    runs = {"plain": [], "zero": ["--sam", "0", "--noise", "0"], "seed": ["--seed", "1"]}
    for name, flags in runs.items():
        assert small(tmp_path / name, "--eval-every", "0", *flags) == 0
    assert story(tmp_path / "plain") == story(tmp_path / "zero") != story(tmp_path / "seed")
    assert adapter(tmp_path / "plain") == adapter(tmp_path / "zero") != adapter(tmp_path / "seed")
    assert not any("fall_predicted" in record for record in records(tmp_path / "plain"))


def test_the_training_reward_rises(tmp_path):
    assert small(tmp_path / "out", "--noise", "--train-steps", "8", "--sampling-steps", "6",
                 "--batch-size", "12", "--micro-batch-size", "12", "--eval-images", "36",
                 "--eval-every", "8", "--learning-rate", "4e-3") == 0
    before, after = records(tmp_path / "out", evaluations=True)
    assert after["pickscore"] > before["pickscore"] + 0.3


def test_rewards_are_mixed_as_a_weighted_sum_and_each_is_logged_by_its_name(tmp_path, mine):
    """Also one of weight 0, which is logged and nothing else."""
    mixture = ["pickscore=0.5", f"{mine}:brightness=-3", f"{mine}:darkness=0"]
    common = ["--learning-rate", "1e-9", "--train-steps", "1"]
    assert small(tmp_path / "mixed", "--reward", *mixture, "--eval-reward", "judge", *common) == 0
    assert records(tmp_path / "mixed", evaluations=True)[0].keys() == {
        "eval", "step", "alarm", "pictures", "pickscore", "brightness", "darkness", "judge", "s1"}
    assert small(tmp_path / "one", "--reward", "pickscore", "--eval-every", "0", *common) == 0
    assert small(tmp_path / "two", "--reward", f"{mine}:brightness", "--eval-every", "0", *common) == 0
    mixed, one, two = (records(tmp_path / name)[0]["reward"] for name in ("mixed", "one", "two"))
    assert mixed == pytest.approx(0.5 * one - 3 * two, rel=1e-5)


def test_the_alarm_compares_each_picture_with_itself_at_the_best_evaluation():
    base = 10 * torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wobble = torch.tensor([0.1, -0.1] * 25, dtype=torch.float64)
    history = torch.stack([base, base + 1 + wobble, base + 0.9])
    best, change, error, lowest = rsaft.change_since_best(history)
    assert best == 1 and change == pytest.approx(-0.1) and error == pytest.approx(wobble.std() / 50 ** 0.5)
    t = -lowest / error       # Student's quantile at 1 - 0.05 / (3 x 4), 49 degrees of freedom
    assert t == pytest.approx(2.7496, abs=0.01)
    assert change < lowest                          # the pictures differ by 10, but each fell by about 0.1
    assert rsaft.change_since_best(history[:2])[1] > 0
    again = rsaft.change_since_best(torch.stack([base, base]))
    assert again[1] == 0 and not again[1] < again[3]            # no change at all: no alarm


@pytest.mark.parametrize("walk", (False, True), ids=("ups and downs", "drift"))
def test_a_run_in_which_nothing_changes_rings_in_at_most_5_percent(walk):
    """2,000 runs of 11 evaluations of 32 pictures, the defaults: the mean stays, the pictures don't."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 11, 32, generator=rng, dtype=torch.float64)
    runs = noise.cumsum(1) if walk else noise
    rang = 0
    for run in runs:
        for k in range(2, 12):
            _, change, _, lowest = rsaft.change_since_best(run[:k])
            if change < lowest:
                rang += 1
                break
    assert 0.02 < rang / 2000 <= 0.05, rang
    falling = run - 2 * torch.arange(11)[:, None]              # and one that falls does
    _, change, _, lowest = rsaft.change_since_best(falling)
    assert change < lowest


def test_a_run_that_breaks_is_told_from_one_that_hacks(tmp_path, capsys):
    flags = ["--reward", "pickscore", "--eval-reward", "judge", "--eval-every", "1", "--eval-images", "24",
             "--learning-rate", "1", "--train-steps", "2"]
    assert small(tmp_path / "out", *flags) == 0
    last = records(tmp_path / "out", evaluations=True)[-1]
    assert last["alarm"] == "breaking" and last["since_best"]["reward"] < 0
    assert "the reward didn't rise; lower the learning rate" in capsys.readouterr().out


def test_a_run_made_to_be_fooled_raises_the_alarm_stops_and_keeps_its_best_adapter(tmp_path, mine, capsys):
    """What is held out is the opposite of what is trained on: the first adapter, doing nothing, is best."""
    flags = ["--reward", f"{mine}:brightness", "--eval-reward", f"{mine}:darkness", "--eval-every", "1",
             "--eval-images", "24", "--learning-rate", "1e-2", "--train-steps", "9", "--stop-on-alarm"]
    assert small(tmp_path / "out", *flags) == 0
    evaluations = records(tmp_path / "out", evaluations=True)
    assert [record["alarm"] for record in evaluations] == [None] * (len(evaluations) - 1) + ["hacking"]
    assert len(records(tmp_path / "out")) == evaluations[-1]["step"] < 9
    assert evaluations[-1]["since_best"]["held_out"] < evaluations[-1]["since_best"]["alarm_below"] < 0
    output = capsys.readouterr().out
    assert "ALARM, hacking: since step 0 darkness fell by" in output and "ALARM: hacking at step" in output
    best = json.loads((tmp_path / "out" / "best" / "best.json").read_text())
    assert best == {"step": 0, "darkness": evaluations[0]["darkness"]}
    kept = tensors(tmp_path / "out" / "best")
    assert all((tensor == 0).all() == ("lora_B" in name) for name, tensor in kept.items())
    assert all((tensor != 0).any() for tensor in tensors(tmp_path / "out").values())


def test_without_a_held_out_score_the_run_says_so_at_its_start_and_at_its_end(tmp_path, capsys):
    assert small(tmp_path / "out", "--eval-reward", "--train-steps", "1") == 0
    assert capsys.readouterr().out.count("nothing") == 2


def test_evaluations_can_have_prompts_of_their_own(tmp_path, finished):
    (tmp_path / "four.txt").write_text("\n".join(PROMPTS[-4:]))
    assert small(tmp_path / "b", "--sam", "--noise", "--train-steps", "1",
                 "--eval-prompts", tmp_path / "four.txt") == 0
    assert records(tmp_path / "b")[0]["reward"] == records(finished)[0]["reward"]
    assert (tmp_path / "b" / "samples" / "prompts.txt").read_text().splitlines() == PROMPTS[-4:]
    a, b = (records(out, evaluations=True)[0]["pickscore"] for out in (finished, tmp_path / "b"))
    assert a != b


def test_bf16_weights_train_a_float32_adapter(tmp_path):
    assert small(tmp_path / "out", "--dtype", "bfloat16", "--noise", "--train-steps", "1",
                 "--eval-every", "0") == 0
    assert all(tensor.dtype == torch.float32 for tensor in tensors(tmp_path / "out").values())
    record, = records(tmp_path / "out")
    assert record["fall_measured"] == pytest.approx(record["fall_predicted"], rel=0.1)


def test_a_model_that_predicts_v_is_trained_as_well(tmp_path):
    """Its weights predict epsilon, so the pictures are nothing; that the step is v's is tested above."""
    model_with(tmp_path / "v", SCHEDULER, prediction_type="v_prediction")
    assert small(tmp_path / "out", "--model", tmp_path / "v", "--noise", "--sam", "--train-steps", "1") == 0
    assert records(tmp_path / "out")[0]["grad_norm"] > 0


def test_in_a_terminal_something_moves_within_an_update_and_an_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(time, "perf_counter", lambda times=iter(range(10 ** 6)): 2 * next(times))
    assert small(tmp_path / "out", "--train-steps", "1", "--sam", "--micro-batch-size", "2") == 0
    shown, error = capsys.readouterr()
    evaluating = [int(count) for count in re.findall(r"evaluating, (\d+) network evaluations", error)]
    updating = [int(count) for count in re.findall(r"update 1, (\d+) network evaluations", error)]
    assert sorted(set(evaluating)) == [8, 16, 24, 32]
    assert sorted(set(updating)) == [8, 16, 24, 28, 32, 40, 48, 56, 60, 64]      # both passes, and in pieces
    assert shown.index("evaluating 4 pictures before the first update") < shown.index("  step")


def test_the_first_lines_warn_of_a_cpu_and_name_the_flag_that_holds_a_score_out(monkeypatch, capsys):
    """Before anything is downloaded or loaded, which is where this run is ended."""
    def ended(wanted):
        raise rsaft.UserError("here")

    settings = rsaft.check(rsaft.parse(["--model", str(MODEL), "--reward", "pickscore"]))
    monkeypatch.setattr(rsaft, "fetch", ended)
    for size, reward, held_out, warned in [(512, "pickscore", "clipscore", True),
                                           (32, "clipscore", "pickscore", False)]:
        settings.height, settings.width, settings.reward = size, size, [reward]
        with pytest.raises(rsaft.UserError, match="here"):
            rsaft.load(settings)
        said = capsys.readouterr().out
        assert "cpu x 1, float32" in said and f"add --eval-reward {held_out} (" in said
        assert ("on a CPU a picture of 512x512 takes minutes" in said) == warned


def test_frozen_weights_are_bfloat16_on_cuda_and_float32_elsewhere(monkeypatch):
    flags = ["--model", str(MODEL), "--reward", "pickscore"]
    assert rsaft.check(rsaft.parse(flags)).dtype == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert rsaft.check(rsaft.parse(flags)).dtype == "bfloat16"
    assert rsaft.check(rsaft.parse([*flags, "--dtype", "float32"])).dtype == "float32"


def test_prompt_files_of_every_make_are_read(tmp_path):
    long = "very " * 2000 + "long"
    text = f"\ufeffa red circle\r\n\r\n   \r\na blue square  \r\n{long}\r\nun cercle déjà vu"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    prompts = rsaft.read_prompts(tmp_path / "prompts.txt")
    assert prompts == ["a red circle", "a blue square", long, "un cercle déjà vu"]
    assert small(tmp_path / "out", "--prompts", tmp_path / "prompts.txt", "--eval-reward", "judge",
                 "--train-steps", "1") == 0


def test_help_gives_every_flag_with_its_default_and_the_papers_on_two_screens():
    text = run("--help").stdout
    assert len(text.splitlines()) <= 75 and "(default: 0.0003)" in text and "paper: 32" in text
    for name in vars(rsaft.parse([])).keys() - {"program"}:
        assert "--" + name.replace("_", "-") in text


def test_copied_alone_into_an_empty_folder_it_still_runs(tmp_path):
    shutil.copy(HERE / "rsaft.py", tmp_path)
    result = run("--model", MODEL, "--models", TINY, "--prompts", TINY / "prompts.txt", "--batch-size", 2,
                 "--sampling-steps", 2, "--train-steps", 1, "--eval-images", 2, "--sam", "--noise",
                 command=[sys.executable, "rsaft.py"], cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path / "runs" / "000" / ADAPTER).is_file(), result.stderr


# ---- A reward is a guest -----------------------------------------------------------------------------------

def returning(expression):
    """The text of a reward f that returns this."""
    return f"def f(images, prompts):\n    return {expression}\n"


RAISES = "def f(images, prompts):\n    raise RuntimeError('no pictures today')\n"
NEIGHBOUR = '''
from dataclasses import dataclass
import helper_of_a_guest
import rsaft

@dataclass
class Weight:
    value: 'float'

def f(images, prompts):
    assert rsaft.clip_pixels
    return Weight(helper_of_a_guest.half).value * images.mean((1, 2, 3))
'''
GUESTS = {"writes": "def f(images, prompts):\n    images *= 0.5\n    return images.mean((1, 2, 3))\n",
          "pure": returning("(0.5 * images).mean((1, 2, 3))"),
          "neighbour": NEIGHBOUR, "helper_of_a_guest": "half = 0.5\n"}


def test_a_guest_may_write_into_its_images_import_its_neighbour_and_use_dataclasses(tmp_path):
    """All three make the same run, bit for bit: what a guest does to its input stays with it."""
    for name, text in GUESTS.items():
        (tmp_path / f"{name}.py").write_text(text)
    results = []
    for name in "writes", "pure", "neighbour":
        out = tmp_path / name
        assert small(out, "--reward", f"{tmp_path}/{name}.py:f", "--eval-reward", "judge",
                     "--train-steps", "2", "--noise") == 0
        results.append((adapter(out), [record["judge"] for record in records(out, evaluations=True)]))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("returned, words", [
    ("images.mean()", r"shape \(\)"), ("images.mean((2, 3))", r"shape \(2, 3\)"),
    ("images.mean((1, 2, 3)).tolist()", "a list"), ("{'a': images.mean((1, 2, 3))}", "a dict"),
    ("None", "NoneType"), ("torch.complex(images, images).mean((1, 2, 3))", "complex64"),
    ("images.mean((1, 2, 3)) / 0", "not finite"), ("1 / 0", r"guest.py:5 .*ZeroDivisionError"),
    ("__import__('sys').exit(3)", r"guest.py:5 .*SystemExit: 3"),
    ("open('/nowhere')", r"guest.py:5 .*FileNotFound"),
    ("helper(images)", r"guest.py:9 .*RuntimeError: deep down"),
])
def test_what_a_guest_returns_is_checked_each_time_and_what_it_raises_is_one_line(tmp_path, returned, words):
    (tmp_path / "guest.py").write_text(
        "import torch\n"
        "fine = True\n\n"
        "def f(images, prompts):\n"
        f"    return images.mean((1, 2, 3)) if fine else {returned}\n\n\n"
        "def helper(images):\n"
        "    raise RuntimeError('deep\\ndown')\n")
    reward = rsaft.make_reward(f"{tmp_path}/guest.py:f")
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(reward(images, ["a", "b"]), images.mean((1, 2, 3)))
    rsaft.import_file(tmp_path / "guest.py").fine = False
    with pytest.raises(rsaft.UserError, match=words) as raised:
        reward(images, ["a", "b"])
    assert f"{tmp_path}/guest.py:f" in str(raised.value) and "\n" not in str(raised.value)


TIRED = '''\
calls = 0

def trained(images, prompts):
    global calls
    calls += 1
    if calls > 19:
        raise OSError('no pictures')
    return images.mean((1, 2, 3))

def held_out(images, prompts):
    global calls
    calls += 1
    return images.mean((1, 2, 3)) * (float('nan') if calls > 20 else 1)

def fragile(images, prompts):
    global calls
    calls += 1
    extra = (images * 0).sum((1, 2, 3)).sqrt() if calls > 20 else 0
    return images.mean((1, 2, 3)) + extra
'''


@pytest.mark.parametrize("flags, words", [
    (["--reward", "guest.py:trained", "--eval-every", "0"], "guest.py:7 .*OSError: no pictures"),
    (["--eval-reward", "guest.py:held_out", "--eval-every", "1"], "not fin")])
def test_a_guest_that_fails_in_mid_run_ends_it_in_one_line_and_what_was_saved_is_whole(
        tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("guest.py").write_text(TIRED)
    assert small(tmp_path / "out", *flags, "--train-steps", "9") == 2
    error = last_line(capsys)
    assert error.startswith("rsaft.py: the reward ") and re.search(words, error)
    made = len(records(tmp_path / "out"))
    assert made > 0 and "NaN" not in (tmp_path / "out" / "log.jsonl").read_text()
    assert_saved(tmp_path / "out", made)


def test_an_update_without_a_finite_gradient_ends_the_run_and_the_last_good_adapter_stays(tmp_path, capsys):
    """The reward is finite, but its gradient is not: sqrt at 0 of a term that counts for nothing."""
    (tmp_path / "guest.py").write_text(TIRED)
    assert small(tmp_path / "out", "--reward", f"{tmp_path}/guest.py:fragile", "--eval-every", "0") == 2
    error = last_line(capsys)
    assert error.startswith("rsaft.py: update 3 has grad_norm = nan") and str(tmp_path / "out") in error
    assert_saved(tmp_path / "out", 2)


def test_one_environment_variable_shows_the_whole_traceback(tmp_path, monkeypatch, capsys):
    """It is named in the line."""
    (tmp_path / "raises.py").write_text(RAISES)
    monkeypatch.setenv("RSAFT_TRACEBACK", "1")
    assert small(tmp_path / "never", "--reward", f"{tmp_path}/raises.py:f") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "RSAFT_TRACEBACK=1" in error and not (tmp_path / "never").exists()


# ---- A run is a function of its settings, and --out is where it is kept ------------------------------------

def test_a_killed_run_goes_on_by_the_same_command_and_ends_with_the_same_bits(finished, tmp_path):
    """By SIGKILL, at whatever moment; experiments/kills.py tries every file operation."""
    killed, log = tmp_path / "killed", tmp_path / "killed" / "log.jsonl"
    program = (f"import sys; sys.path.insert(0, {str(HERE)!r}); "
               "import test_rsaft; test_rsaft.small(*sys.argv[1:])")
    process = subprocess.Popen([sys.executable, "-c", program, str(killed), *FLAGS],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.is_file() and "grad_norm" in log.read_text()):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9 and not (killed / "samples" / "step_000003.png").exists()
    assert small(killed, *FLAGS) == 0 and story(killed) == story(finished)
    a, b = files(killed), files(finished)
    assert [path.removeprefix(str(killed)) for path in a] == [path.removeprefix(str(finished)) for path in b]
    for path, other in zip(a, b):
        if not path.endswith(("checkpoint.pt", "config.json", "log.jsonl")):       # a clock, and its own path
            assert a[path] == b[other], path


def test_a_finished_run_says_so_and_prolonged_it_is_the_long_run(finished, copied, tmp_path, capsys):
    assert small(copied, *FLAGS) == 0
    assert "has made all its updates" in capsys.readouterr().out
    assert_same_end(copied, finished)
    for out in copied, tmp_path / "long":
        assert small(out, *FLAGS, "--train-steps", "4") == 0
        assert capsys.readouterr().out.count("  step") == 1      # the rows have their names here too
    assert_same_end(copied, tmp_path / "long")


def test_a_second_run_on_the_same_folder_is_refused_and_the_lock_dies_with_its_process(copied, capsys):
    import fcntl
    before = files(copied)
    with open(copied / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert small(copied, *FLAGS, "--train-steps", "4") == 2
    assert "another run is writing" in capsys.readouterr().err
    assert files(copied) == before


def test_two_runs_that_begin_together_without_out_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--tiny", "--train-steps", "1", "--sampling-steps", "2", "--batch-size", "2", "--eval-every=0"]
    load, others = rsaft.load, iter([flags])

    def load_while_another_runs(settings):
        for other in others:
            assert rsaft.main(other) == 0
        return load(settings)

    monkeypatch.setattr(rsaft, "load", load_while_another_runs)
    assert rsaft.main(flags) == 0
    first, second = (Path(f"runs/{name}/{rsaft.ADAPTER}").read_bytes() for name in ("000", "001"))
    assert first == second and not Path("runs/002").exists()
    assert rsaft.main([*flags, "--out", ""]) == 0 and Path("runs/002", rsaft.ADAPTER).exists()


def test_ctrl_c_and_a_full_disk_end_the_run_in_one_line_that_says_how_to_go_on(
        finished, tmp_path, monkeypatch, capsys):
    fsync, calls = os.fsync, []
    for number, (what, words) in enumerate([(KeyboardInterrupt(), "by hand"),
                                            (OSError(28, "No space left on device"), "No space left")]):
        out = tmp_path / str(number)
        calls.clear()

        def failing(descriptor):
            calls.append(descriptor)
            if len(calls) > 12:
                raise what
            fsync(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", failing)
            assert small(out, *FLAGS) == 1
        error = last_line(capsys)
        assert words in error and f"the same command with --out {out} goes on" in error
        assert small(out, *FLAGS) == 0
        assert_same_end(out, finished)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("run-by-a-pickle",)


def changed(**changes):
    """What gives a checkpoint other entries: {entry: function of the old one}."""
    def change(file):
        state = torch.load(file, weights_only=True)
        torch.save({**state, **{name: function(state[name]) for name, function in changes.items()}}, file)

    return change


def changed_tensors(function):
    """The same for each tensor of the adapter."""
    return changed(adapter=lambda state: {name: function(tensor) for name, tensor in state.items()})


def renamed(state):
    return {name.replace("attn1", "attention"): tensor for name, tensor in state.items()}


SPOILT = [                                                         # what is done to the checkpoint
    (lambda file: file.write_bytes(file.read_bytes()[:5000]), "can't be read"),
    (lambda file: file.write_bytes(b""), "can't be read"),
    (lambda file: torch.save(Malicious(), file), "can't be read"),
    (lambda file: torch.save({"step": 1}, file), "not the checkpoint of a run"),
    (lambda file: torch.save([1, 2], file), "not the checkpoint of a run"),
    (changed(settings=lambda _: "all"), "not the checkpoint of a run"),
    (changed(updates=lambda _: 3), "not the checkpoint of a run"),
    (changed_tensors(lambda tensor: tensor[:, :-1]), "another shape"),
    (changed_tensors(lambda tensor: tensor[:1, :1]), "another shape"),
    (changed_tensors(lambda tensor: tensor / 0), "not finite"),
    (changed(adapter=renamed), "attention"),
    (changed(optimizer=lambda _: {}), "doesn't fit"),
    (lambda file: file.unlink(), "holds no run"),
]

CHANGED = [                                                        # other flags than the run began with
    (["--learning-rate", "0.5", "--seed", "1"], "learning_rate 0.002, not 0.5; seed 0, not 1"),
    (["--rank", "8"], "rank 4, not 8"),
    (["--method", "refl"], "method draft, not refl"),
    (["--height", "64"], "height 32, not 64"),
    (["--prompts", "ten.txt"], "prompts"),
    (["--train-steps", "2"], "past update 2"),
]


def test_a_run_that_cannot_go_on_is_left_as_it_is(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("ten.txt").write_text("\n".join(PROMPTS[:10]))

    def refused(words, *flags, spoil=None):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(finished, "run")
        if spoil:
            spoil(Path("run", "checkpoint.pt"))
        before = files("run")
        assert small("run", *FLAGS, *flags) == 2, words
        assert_one_line(capsys.readouterr().err, words)
        assert files("run") == before and not Path("run-by-a-pickle").exists(), words

    for spoil, words in SPOILT:
        refused(words, spoil=spoil)
    for flags, words in CHANGED:
        refused(words, *flags)


def test_what_is_made_from_the_checkpoint_is_made_again(finished, copied):
    """A kill between two files, a log cut short, a config spoilt: the checkpoint is the only truth."""
    (copied / "log.jsonl").write_text('{"step": 1')
    (copied / "config.json").write_text("[]")
    (copied / ADAPTER).unlink()
    assert small(copied, *FLAGS) == 0
    assert_same_end(copied, finished)
    assert json.loads((copied / "config.json").read_text())["rank"] == 4


UPDATE = """
import os, sys
from functools import partial
import torch
import rsaft

folder = sys.argv[1]
if "WORLD_SIZE" in os.environ:
    torch.distributed.init_process_group()
rsaft.quiet_libraries()
model = rsaft.load_model("tiny/stable-diffusion", 4, 3.0)
params = model.add_adapter(4, torch.Generator().manual_seed(0))
prompts = open("tiny/prompts.txt").read().splitlines()[:4]
batches = rsaft.micro_batches(prompts, (0, 0), 1)[rsaft.process_index()::rsaft.process_count()]
plan, perturbation, seen = rsaft.draft(4, None), rsaft.parameter_perturbation, []

def watched(gradients, rho):
    seen.append(perturbation(gradients, rho))
    return seen[-1]

rsaft.parameter_perturbation = watched
log = rsaft.rsaft_gradient(batches, partial(rsaft.sample_starts, model, plan, size=2),
                           partial(rsaft.sample_images, model, plan),
                           rsaft.make_reward("pickscore", "tiny"), params, 0.01, 0.01)
torch.save({"e": seen[0], "gradient": [p.grad for p in params], "log": log},
           f"{folder}/update-{rsaft.process_index()}.pt")
os.chdir(folder)
sys.exit(rsaft.main(["--tiny", "--noise", "--sam", "--train-steps", "2", "--sampling-steps", "4",
                     "--batch-size", "4", "--micro-batch-size", "2", "--eval-images", "6",
                     "--eval-every", "1"]))
"""


def test_two_processes_make_the_update_of_one_and_write_its_log(tmp_path, monkeypatch):
    """Within rounding: the gradient, e, the norms, then a whole run."""
    script = tmp_path / "update.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n" + UPDATE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="0"):
        patched.chdir(HERE)
        patched.setattr(rsaft, "parameter_perturbation", rsaft.parameter_perturbation)    # to be put back
        patched.setattr(sys, "argv", [str(script), str(tmp_path / "one")])
        runpy.run_path(str(script))
    result = run(script, tmp_path / "two", command=torchrun, environment={"OMP_NUM_THREADS": "1"}, cwd=HERE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("adapter, log.jsonl") == 1 and "cpu x 2" in result.stdout
    expected = torch.load(tmp_path / "one" / "update-0.pt")
    for rank in 0, 1:                                       # both have the sum, and so make the same step
        update = torch.load(tmp_path / "two" / f"update-{rank}.pt")
        for name in "e", "gradient":
            a, b = (torch.cat([tensor.detach().flatten() for tensor in x[name]]) for x in (update, expected))
            assert (a - b).norm() < 1e-3 * b.norm() and b.norm() > 0
        assert update["log"] == {name: pytest.approx(value, rel=1e-3)
                                 for name, value in expected["log"].items()}
    runs = [tmp_path / name / "runs/000" for name in ("one", "two")]
    assert [*(tmp_path / "two/runs").iterdir()] == [runs[1]]        # without --out, one folder for both
    one, two = map(story, runs)
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for a, b in zip(one, two):
        a, b = ({name: value for name, value in line.items() if isinstance(value, (int, float))}
                for line in (a, b))
        assert b == {name: pytest.approx(value, rel=2e-2, abs=1e-5) for name, value in a.items()}
    for a, b in zip(*(records(out, evaluations=True) for out in runs)):
        assert a["pictures"]["pickscore"] == pytest.approx(b["pictures"]["pickscore"], rel=2e-2)


def test_of_processes_that_fail_alike_one_speaks(monkeypatch, capsys):
    for number in "0", "1":
        monkeypatch.setenv("LOCAL_RANK", number)
        assert rsaft.main(["--bogus"]) == 2
    assert_one_line(capsys.readouterr().err, "--bogus")


# ---- One line, always --------------------------------------------------------------------------------------

OWN = {"none.py": "x = 1\n", "broken.py": "import nothing_of_that_name\n", "syntax.py": "def f(:\n",
       "shape.py": returning("images.mean()"),
       "two.py": returning("{'a': images.mean((1, 2, 3)), 'b': images.mean((1, 2, 3))}"),
       "nan.py": returning("images.mean((1, 2, 3)) * float('nan')"),
       "hard.py": returning("(images > 0.5).float().mean((1, 2, 3))"),
       "raises.py": RAISES,
       "names.py": returning("images.mean((1, 2, 3))") + "\n\nreward = s1 = pickscore = f\n",
       "leaves.py": "import sys\nsys.exit('enough')\n"}

MODELS = {"inpaint": dict(file="model_index.json", _class_name="StableDiffusionInpaintPipeline"),
          "foreign": dict(file="model_index.json", unet=["subprocess", "Popen"]),
          "unconditional": dict(file="unet/config.json", _class_name="UNet2DModel"),
          "sample": dict(file=SCHEDULER, prediction_type="sample"),
          "clipped": dict(file=SCHEDULER, thresholding=True),
          "bitten": dict(file="unet/diffusion_pytorch_model.safetensors")}

BAD = [
    (["--bogus"], "--bogus"), (["--train-steps", "many"], "--train-steps"), (["--noise", "-1"], "--noise"),
    (["--sam", "nan"], "--sam"), (["--sam", "inf"], "--sam"), (["--grad-steps", "11"], "--grad-steps 11"),
    (["--grad-steps", "0"], "--grad-steps"), (["--micro-batch-size", "5"], "--micro-batch-size 5 "),
    (["--sampling-batch-size", "0"], "--sampling-batch-size"), (["--learning-rate", "0"], "--learning-rate"),
    (["--eval-images", "1000000000000"], "--eval-images"), (["--batch-size", "9" * 30], "--batch-size"),
    (["--height", "1000000"], "--height"), (["--device", "tpu"], "--device"),
    (["--device", "cpu:abc"], "--device"),
    (["--sampling-steps", "20000"], "--sampling-steps"), (["--height", "33"], "multiples of 4"),
    (["--prompts", "missing.txt"], "missing.txt"), (["--prompts", "empty.txt"], "empty.txt"),
    (["--prompts", "."], r"prompt file \."), (["--prompts", "latin1.txt"], "latin1.txt"),
    (["--prompts", "p" * 5000], "File name too long"), (["--out", "o" * 5000], "File name too long"),
    (["--model", "m" * 5000], "File name too long"), (["--models", "m" * 5000], "File name too long"),
    (["--reward", "r" * 5000 + ".py:f"], "File name too long"),
    (["--prompts", "dogs.txt"], "a dog"), (["--reward", "beauty"], "beauty"),
    (["--reward", "_original"], "_original"), (["--reward", "../tiny/world"], "tiny/world"),
    (["--reward", "missing.py:f"], "missing.py"), (["--reward", "none.py:f"], "no attribute 'f'"),
    (["--reward", "broken.py:f"], "broken.py:1.*nothing_of_that_name"),
    (["--reward", "syntax.py:f"], "SyntaxError"), (["--reward", "leaves.py:f"], "leaves.py:2.*enough"),
    (["--reward", "shape.py:f"], "shape"), (["--reward", "nan.py:f"], "not finite"),
    (["--reward", "two.py:f"], "a dict"), (["--eval-reward", "two.py:f"], "a dict"),
    (["--reward", "hard.py:f"], "not differentiable"),
    (["--reward", "raises.py:f"], r"raises.py:2.*no pictures today"), (["--reward", "judge"], "held out"),
    (["--reward", "names.py:reward"], "log names"), (["--eval-reward", "names.py:s1"], "log names"),
    (["--eval-reward", "names.py:pickscore"], "named twice"),
    (["--reward", "pickscore", "pickscore=2"], "twice"),
    (["--reward", "pickscore=nan"], "finite"), (["--reward", "pickscore=0"], "not all of them 0"),
    (["--reward", "pickscore=much"], "pickscore=much"), (["--reward"], "--reward"),
    (["--method", "dpo"], "--method"),
    (["--method", "refl", "--grad-steps", "10"], "--grad-steps 10"),
    (["--method", "drtune", "--grad-steps", "8"], "--grad-steps 8"),
    (["--stop-on-alarm", "--eval-every", "0"], "--eval-every"),
    (["--eval-prompts", "missing.txt"], "missing.txt"), (["--eval-reward", "beauty"], "beauty"),
    (["--models", "nowhere"], "nowhere"), (["--models", "."], "pickscore"),
    (["--model", "."], "model_index.json"), (["--model", "./nowhere"], "nowhere"),
    (["--model", str(TINY / "pickscore")], "model_index.json"), (["--out", "full"], "not empty"),
    (["--out", str(MODEL)], "not empty"), (["--out", "empty.txt"], "empty.txt"),
    (["--out", "empty.txt/out"], "empty.txt"),
    (["--sam-rollout", "half"], "--sam-rollout"), (["--eval-images", "1"], "--eval-images"),
    (["--seed", "1.5"], "--seed"), (["--dtype", "float16"], "--dtype"), (["--resume"], "--resume"),
    (["--model", "inpaint"], "InpaintPipeline; supported are"), (["--model", "unconditional"], "UNet2DModel"),
    (["--model", "foreign"], "its unet doesn't load.*subprocess"),
    (["--rank", "100000"], "rank 100000 is above 32"),
    (["--model", "sample"], "prediction_type"), (["--model", "clipped"], "clip"),
    (["--model", "bitten"], "unet.*can.t be read; was it cut short"),
]


def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in OWN.items():
        Path(name).write_text(text)
    Path("empty.txt").write_text("\n  \n")
    Path("dogs.txt").write_text(PROMPTS[0] + "\na dog\n")
    Path("latin1.txt").write_bytes("déjà vu".encode("latin1"))
    Path("full").mkdir()
    Path("full", "thesis.txt").write_text("years of work")
    for name, changes in MODELS.items():
        model_with(name, **changes)
    before = sorted(str(path) for path in Path().rglob("*"))
    for flags, words in BAD:
        assert rsaft.main(["--tiny", *flags]) == 2, flags
        assert_one_line(capsys.readouterr().err, words)
    left = sorted(str(path) for path in Path().rglob("*") if "__pycache__" not in str(path))
    assert left == before


@pytest.mark.parametrize("environment, words", [
    ({"RANK": "0", "WORLD_SIZE": "3"}, "--batch-size 32 can't be divided .* 3 processes"),
    ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of 2"),
    ({"WORLD_SIZE": "-1"}, "RANK and WORLD_SIZE")])
def test_an_environment_that_is_not_torchruns_is_one_line(monkeypatch, capsys, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rsaft.main(["--tiny", "--micro-batch-size", "1"]) == 2
    assert_one_line(capsys.readouterr().err, words)


def test_out_of_memory_is_one_line_whatever_its_kind(tmp_path, monkeypatch, capsys):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")):
        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(rsaft, "load_model", fails)
        assert small(tmp_path / "out") == 1
        assert "out of memory; try --gradient-checkpointing" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_ways_out():
    """The address is one that answers nothing, so that this holds with and without a network."""
    result = run("--reward", "pickscore", environment={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert_one_line(result.stderr)
    assert result.returncode == 1 and "--tiny" in result.stderr and "--models" in result.stderr


def test_a_reader_that_leaves_ends_the_run_without_a_traceback(tmp_path):
    """As `| head -1` does."""
    flags = ["--tiny", "--sampling-steps", "2", "--batch-size", "2", "--eval-images", "2", "--rank", "2"]
    process = subprocess.Popen([*RSAFT, *flags, "--out", str(tmp_path / "out")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 1 and "Traceback" not in error and "Exception ignored" not in error, error


def test_a_closed_stdout_and_a_terminal_without_letters_cause_no_traceback(tmp_path, monkeypatch):
    """A closed stdout is nobody's loss, and a path may hold what the terminal can't show."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", None)
        assert small(tmp_path / "out", "--train-steps", "1") == 0
    result = run("--tiny", "--prompts", "d\xe9j\xe0.txt",
                 environment={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert_one_line(result.stderr)
    assert result.returncode == 2 and result.stderr.isascii()


def test_ctrl_c_during_the_imports_is_silent():
    process = subprocess.Popen([*RSAFT, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert b"Traceback" not in error


def run_patch(patch, maximize):
    """Run README's lines as they stand, in a reader's loop. Returns its last gradient, its deltas and e."""
    toy, updates = Toy(micro_batch_size=2), []
    noise = {tuple(batch.prompts): batch.noise("xT", (3, 4, 4)).double() for batch in toy.batches}
    before = toy.theta.detach().clone()

    class Optimizer(torch.optim.SGD):
        def step(self):
            assert torch.equal(toy.theta, before)
            updates.append(toy.theta.grad.clone())

    names = dict(micro_batches=[batch.prompts for batch in toy.batches], total=4, reward=toy.reward,
                 params=[toy.theta], optimizer=Optimizer([toy.theta], maximize=maximize),
                 generate=lambda prompts: toy.theta * noise[tuple(prompts)],
                 **{name: getattr(rsaft, name) for name in ("parameter_perturbation", "perturbed",
                                                            "reward_gradient", "sample_perturbation")})
    exec(patch, names)
    return updates[0], torch.cat(names["deltas"]), names["e"]


def test_the_loops_in_the_readme_are_algorithm_1_uphill_and_downhill():
    """And the test that README gives for them: radius 0 with both passes is the plain gradient to the bit,
    the norms reached are the radii, and the optimizer's step finds the weights of before."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    loops = [block for block in blocks if "perturbed(" in block]
    assert len(loops) == 2 and "import" in loops[0]
    _, expected = Toy(micro_batch_size=2)(rho=1e-2, rho_w=1e-2)
    _, plain = Toy(micro_batch_size=2)()
    for patch, sign in zip(loops, (1, -1)):
        gradient, d, e = run_patch(patch, maximize=sign > 0)
        assert_close(gradient, sign * expected, rtol=1e-9, atol=1e-9)
        assert_close(d.flatten(1).norm(dim=1), torch.full((4,), 1e-2, dtype=torch.float64))
        assert_close(e[0].norm(), torch.tensor(1e-2, dtype=torch.float64))
        gradient, _, _ = run_patch(patch.replace("1e-2", "0.0"), maximize=sign > 0)
        assert_close(gradient, sign * plain, rtol=1e-12, atol=1e-12)
        assert patch.count("1e-2") == 2
