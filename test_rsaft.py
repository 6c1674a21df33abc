"""What rsaft.py claims, claim by claim, in its own order: `pytest`.

The models are the trained ones of tiny/; where a closed form exists, it is the judge. The tests that load an adapter
into diffusers need peft, which rsaft.py itself does not.
"""
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import rsaft

HERE = Path(__file__).resolve().parent
TINY, MODEL = HERE / "tiny", HERE / "tiny" / "stable-diffusion"
LATENT, PROMPTS = (4, 8, 8), (TINY / "prompts.txt").read_text().splitlines()

rsaft.quiet_libraries()


@pytest.fixture
def pipe():
    return rsaft.load_pipeline(str(MODEL))


@pytest.fixture(scope="session")
def pickscore():
    return rsaft.make_reward("pickscore", TINY)


@pytest.fixture(scope="session")
def pictures():
    """Eight pictures of the small world and their captions."""
    sys.path.insert(0, str(TINY))
    import world
    generator = torch.Generator().manual_seed(0)
    captions = torch.randint(len(world.CAPTIONS), (8,), generator=generator)
    return world.sample(captions, generator), [world.CAPTIONS[i] for i in captions]


def sampling(T):
    """The plan of plain sampling, without gradient."""
    return rsaft.Plan((False,) * T)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- One sampling step ---------------------------------------------------------------------------------------------

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
        assert_close(step.a * x + step.b * f, expected.prev_sample, rtol=1e-5, atol=1e-5)
        assert_close(step.c * x + step.d * f, expected.pred_original_sample, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("change, message", [
    (dict(clip_sample=True), "clip"), (dict(thresholding=True), "clip"),
    (dict(prediction_type="sample"), "prediction_type"),
    (dict(rescale_betas_zero_snr=True), "alpha is 0"),
])
def test_a_scheduler_whose_step_is_not_linear_is_refused(change, message):
    from diffusers import DDIMScheduler
    with pytest.raises(ValueError, match=message):
        rsaft.ddim_steps(DDIMScheduler.from_pretrained(MODEL / "scheduler", **change), 10)


# ---- The rollout ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("guidance_scale, height, width", [(3.0, 32, 32), (1.0, 32, 32), (7.5, 48, 32)])
def test_the_rollout_makes_the_pictures_of_the_diffusers_pipeline(pipe, guidance_scale, height, width):
    from diffusers import DDIMScheduler
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    shape = rsaft.model_size(str(MODEL), height, width)[0]
    latents = rsaft.evaluation_latents(4, shape)
    expected = pipe(PROMPTS[:4], latents=latents, num_inference_steps=10, guidance_scale=guidance_scale,
                    height=height, width=width, output_type="pt").images
    generate = rsaft.make_generate(pipe, 10, guidance_scale, shape)
    with torch.no_grad():
        images = generate(rsaft.evaluation_batches(PROMPTS, 4, 4)[0], plan=sampling(10))[0]
    assert images.dtype == torch.float32 and images.shape == (4, 3, height, width)
    assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("K", [1, 3, 6])
def test_draft_k_differentiates_the_last_k_network_calls(K):
    carried = []

    def denoise(x, t):
        carried.append(torch.is_grad_enabled())
        return x

    rsaft.rollout(denoise, normal(1, *LATENT), toy_steps(6), rsaft.draft(6, None, K))
    assert carried == [False] * (6 - K) + [True] * K


def toy_steps(T):
    from diffusers import DDIMScheduler
    return rsaft.ddim_steps(DDIMScheduler.from_pretrained(MODEL / "scheduler"), T)


def toy_denoise(theta, frozen=None):
    """A nonlinear network of two parameters, in float64; `frozen` takes their place where no gradient is wanted."""
    def denoise(x, t):
        a, b = theta if torch.is_grad_enabled() or frozen is None else frozen
        return torch.tanh(a * x + b * t / 1000)
    return denoise


@pytest.mark.parametrize("K", [1, 2, 5])
def test_the_gradient_of_the_rollout_agrees_with_finite_differences(K):
    """For K < T: the derivative with the parameters of the first T - K steps held fixed."""
    steps, xT = toy_steps(5), normal(2, *LATENT, dtype=torch.float64)
    start = torch.tensor([0.7, 0.3], dtype=torch.float64)

    def score(theta):
        return rsaft.rollout(toy_denoise(theta, frozen=start), xT, steps, rsaft.draft(5, None, K)).sin().sum()

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
        assert len({b - a for a, b in zip(steps, steps[1:])}) == 1 and steps[1] - steps[0] == len(plan.grad) // 5
        chosen.add((len(plan.grad) - 1, steps[0]))
    assert {stop for stop, _ in chosen} == set(range(30, 50)) and {offset for _, offset in chosen} == set(range(10))

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
    """By finite differences in float64 of an expression written out by hand: where the plan wants no gradient the
    parameters are held fixed, and with detach_input the network's inputs are the constants of the first rollout."""
    T = 10
    K = 3 if method == "drtune" else None              # with its own K = 1 there would be no chain to detach
    steps, plan = toy_steps(T), rsaft.METHODS[method](T, rsaft.named_generator(method, draw), K)
    xT, start = normal(1, *LATENT, dtype=torch.float64), torch.tensor([0.7, 0.3], dtype=torch.float64)

    def by_hand(theta, inputs=None):
        x, seen = xT, []
        for i, step in enumerate(steps[:len(plan.grad)]):
            a, b = theta if plan.grad[i] else start
            seen.append(x)
            f = torch.tanh(a * (inputs[i] if inputs else x) + b * step.t / 1000)
            last = plan.predict_x0 and i == len(plan.grad) - 1
            x = step.c * x + step.d * f if last else step.a * x + step.b * f
        return x.sin().sum(), seen

    constants = by_hand(start)[1] if plan.detach_input else None
    theta = start.clone().requires_grad_()
    x0 = rsaft.rollout(toy_denoise(theta), xT, steps, plan)
    gradient, = torch.autograd.grad(x0.sin().sum(), theta)
    shifts = 1e-6 * torch.eye(2, dtype=torch.float64)
    differences = [(by_hand(start + h, constants)[0] - by_hand(start - h, constants)[0]) / 2e-6 for h in shifts]
    assert_close(x0.sin().sum(), by_hand(start)[0])
    assert_close(gradient, torch.stack(differences), rtol=1e-5, atol=1e-6)


def test_renoising_undoes_itself_when_the_noise_is_known_and_gives_x0_no_gradient():
    step, noise = toy_steps(10)[-1], normal(2, *LATENT, seed=1)
    x0 = normal(2, *LATENT).requires_grad_()
    theta = torch.ones((), requires_grad=True)
    again = rsaft.renoise(lambda x, t: theta * noise, x0, step, noise)
    assert_close(again, x0)
    again.sum().backward()
    assert x0.grad is None and theta.grad != 0


@pytest.mark.parametrize("method", ["draft-lv", "alignprop", "refl", "drtune"])
def test_both_passes_of_an_update_take_the_same_plan_and_every_update_its_own(tmp_path, monkeypatch, method):
    taken, rollout = [], rsaft.rollout

    def watched(denoise, x, steps, plan, first=0, stop=None):
        if first == 0 and stop is not None:                                       # from xT to the first gradient step
            taken.append((plan, x))
        return rollout(denoise, x, steps, plan, first, stop)

    monkeypatch.setattr(rsaft, "rollout", watched)
    assert small(tmp_path / "out", "--method", method, "--sam", "--eval-every", "0", "--sampling-steps", "12",
                 "--train-steps", "6") == 0
    assert len(taken) == 12
    for (first, x), (second, y) in zip(taken[::2], taken[1::2]):
        assert first == second and torch.equal(x, y)
    if method != "draft-lv":
        assert len({plan for plan, _ in taken}) > 1


@pytest.mark.parametrize("method", ["draft", "draft-lv", "alignprop", "refl", "drtune"])
def test_an_update_takes_the_network_evaluations_that_the_formula_gives(tmp_path, method):
    T, B = 12, 4
    for update in range(3):                               # the formula, against a look at each step of the plan
        plan = rsaft.METHODS[method](T, rsaft.named_generator(0, update, "plan"))
        free = [i for i, carries_grad in enumerate(plan.grad) if not carries_grad]
        held = sum(plan.grad) + plan.renoised
        assert rsaft.network_evaluations(plan, guided=False) == (len(free), held)
        assert rsaft.network_evaluations(plan) == (2 * len(free), 2 * held)
        assert rsaft.network_evaluations(plan, second_rollout=True) == (4 * len(free), 4 * held)
        again = [i for i in free if any(plan.grad[:i])]
        expected = 2 * (len(free) + len(again)), 4 * held
        assert rsaft.network_evaluations(plan, second_rollout=True, window=True) == expected
    common = ["--method", method, "--eval-every", "0", "--sampling-steps", T, "--micro-batch-size", 2]
    for name, flags, second, window in ("plain", [], False, False), ("full", ["--sam", "--noise"], True, False), (
            "window", ["--sam", "--noise", "--sam-rollout", "window"], True, True):
        assert small(tmp_path / name, *common, *flags) == 0
        for update, record in enumerate(records(tmp_path / name)):
            plan = rsaft.METHODS[method](T, rsaft.named_generator(0, update, "plan"))
            counted = [record[f"network_evaluations_{kind}_gradient"] for kind in ("without", "with")]
            assert counted == [B * n for n in rsaft.network_evaluations(plan, True, second, window)]
            # Of the reward: r and g; the noise's fall and the sam's; r and g at the worst place.
            assert record["reward_evaluations"] == B * (1 + plan.renoised) * (4 if second else 1)


@pytest.mark.parametrize("flags", [[], ["--noise"], ["--sam"], ["--noise", "--sam"]])
@pytest.mark.parametrize("method", ["draft", "draft-lv", "alignprop", "refl", "drtune"])
def test_every_method_runs_with_every_perturbation(tmp_path, method, flags):
    assert small(tmp_path / "out", "--method", method, "--eval-every", "0", "--train-steps", "2", *flags) == 0
    for record in records(tmp_path / "out"):
        assert record["grad_norm"] > 0
        assert ("noise_norm" in record, "sam_norm" in record) == ("--noise" in flags, "--sam" in flags)
        if "--noise" in flags:
            assert record["noise_fall_measured"] == pytest.approx(record["noise_fall_predicted"], rel=0.2)


def test_the_gradient_goes_through_both_branches_of_the_guidance(pipe):
    params = rsaft.add_lora(pipe.unet, 2, torch.Generator().manual_seed(0))
    x, embeds = normal(1, *LATENT), normal(2, 1, 16, 64)

    def gradient(prompt_embeds, negative_embeds, scale):
        f = rsaft.make_denoise(pipe.unet, prompt_embeds, negative_embeds, scale)(x, 500)
        return torch.cat([g.flatten() for g in torch.autograd.grad(f.sum(), params)])

    conditional, unconditional = gradient(embeds[0], embeds[1], 1.0), gradient(embeds[1], embeds[0], 1.0)
    assert unconditional.norm() > 0
    assert_close(gradient(embeds[0], embeds[1], 3.0), 3 * conditional - 2 * unconditional, rtol=1e-3, atol=1e-4)


# ---- The perturbations ---------------------------------------------------------------------------------------------

def test_the_sample_perturbation_has_norm_rho_for_every_picture_and_points_downhill():
    g = normal(5, 3, 8, 8) * torch.tensor([1e-9, 1e-3, 1.0, 1e3, 1e9]).view(5, 1, 1, 1)
    d = rsaft.sample_perturbation(g, 0.01)
    assert_close(d.flatten(1).norm(dim=1), torch.full((5,), 0.01))
    assert_close(torch.cosine_similarity(d.flatten(1), g.flatten(1)), -torch.ones(5))


def test_the_parameter_perturbation_has_norm_rho_over_all_weights_and_points_downhill():
    grads = [normal(4, 7), 100 * normal(3, seed=1), normal(2, 2, 2, seed=2)]
    e = rsaft.parameter_perturbation(grads, 0.5)
    flat_e, flat_g = (torch.cat([t.flatten() for t in tensors]) for tensors in (e, grads))
    assert_close(flat_e.norm(), torch.tensor(0.5))
    assert_close(torch.cosine_similarity(flat_e, flat_g, dim=0), torch.tensor(-1.0))


def test_a_zero_gradient_gives_a_zero_perturbation():
    g = normal(2, 3, 4, 4)
    g[0] = 0
    d = rsaft.sample_perturbation(g, 0.01)
    assert (d[0] == 0).all() and (d[1] != 0).all()
    assert all((e == 0).all() for e in rsaft.parameter_perturbation([torch.zeros(3), torch.zeros(2, 2)], 0.01))


def test_the_weights_are_the_same_bits_after_the_perturbation_also_after_an_exception():
    params = [torch.nn.Parameter(normal(50, 50)), torch.nn.Parameter(1e-6 * normal(10, seed=1))]
    epsilons = [normal(50, 50, seed=2), normal(10, seed=3)]
    before = [p.detach().clone() for p in params]
    with pytest.raises(KeyError):
        with rsaft.perturbed(params, epsilons) as reached:
            for p, old, epsilon, displacement in zip(params, before, epsilons, reached):
                assert torch.equal(p, old + epsilon) and torch.equal(displacement, p - old)
            (params[0].sum() * params[1].sum()).backward()           # the weights can be differentiated in here
            raise KeyError
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    assert any(not torch.equal(old + e - e, old) for old, e in zip(before, epsilons))    # why a copy is needed
    assert all(p.requires_grad and p.grad is not None for p in params)


def test_the_reward_of_every_picture_falls_and_for_a_small_radius_as_the_first_order_predicts(pickscore, pictures):
    images, prompts = pictures
    _, gradient = rsaft.reward_gradient(pickscore, images, prompts)
    for rho in 0.01, 0.1, 1.0:
        assert (rsaft.reward_sharpness(pickscore, images, prompts, rho) > 0).all()
    predicted = 1e-3 * gradient.flatten(1).norm(dim=1)
    assert_close(rsaft.reward_sharpness(pickscore, images, prompts, 1e-3), predicted, rtol=0.05, atol=0)


def test_the_sharpness_of_a_quadratic_reward_has_its_closed_form():
    """r(x) = -|x|^2 / 2 falls by rho |x| + rho^2 / 2."""
    x = normal(3, 3, 4, 4)
    sharpness = rsaft.reward_sharpness(lambda images, _: -images.flatten(1).square().sum(1) / 2, x, [""] * 3, 0.3)
    assert_close(sharpness, 0.3 * x.flatten(1).norm(dim=1) + 0.3 ** 2 / 2, rtol=1e-4, atol=1e-4)


# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------

class Toy:
    """Pictures x0 = theta * xT with a reward -|x0 - target|^2 / 2, in float64: all of Algorithm 1 by hand."""

    def __init__(self, micro_batch_size=4):
        self.theta = torch.nn.Parameter(normal(3, 4, 4, seed=1, dtype=torch.float64))
        self.target = normal(3, 4, 4, seed=2, dtype=torch.float64)
        self.batches = rsaft.micro_batches(["a", "b", "c", "d"], ("toy",), micro_batch_size)
        self.xT = rsaft.micro_batches(["a", "b", "c", "d"], ("toy",), 4)[0].noise("xT", (3, 4, 4)).double()

    def generate(self, batch, start=None):
        return self.theta * batch.noise("xT", (3, 4, 4)).double(), None

    def reward(self, images, prompts):
        return -(images - self.target).flatten(1).square().sum(1) / 2

    def by_hand(self, rho, rho_w):
        theta = self.theta.detach()
        g = self.target - theta * self.xT                                         # grad_x0 r
        d = -rho * g / g.flatten(1).norm(dim=1).view(4, 1, 1, 1)
        gradient = (g * self.xT).mean(0)                                          # grad_theta of the mean reward
        e = -rho_w * gradient / gradient.norm()
        return ((self.target - (theta + e) * self.xT - d) * self.xT).mean(0)

    def __call__(self, **settings):
        log = rsaft.rsaft_gradient(self.batches, self.generate, self.reward, [self.theta], **settings)
        return log, self.theta.grad.clone()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("rho, rho_w", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.1, 0.2)])
def test_the_update_is_the_gradient_of_the_joint_objective(rho, rho_w, micro_batch_size):
    toy = Toy(micro_batch_size)
    before = toy.theta.detach().clone()
    log, gradient = toy(rho=rho, rho_w=rho_w)
    assert_close(gradient, toy.by_hand(rho, rho_w), rtol=1e-9, atol=1e-9)
    assert torch.equal(toy.theta, before)
    assert ("noise_norm" in log) == (rho > 0) and ("sam_norm" in log) == (rho_w > 0)


def test_the_logged_figures_have_their_closed_forms():
    toy = Toy(micro_batch_size=2)
    r = toy.reward(toy.theta * toy.xT, None).mean().item()
    g = (toy.target - toy.theta * toy.xT).detach()
    norms, gradient = g.flatten(1).norm(dim=1), (g * toy.xT).mean(0)
    log, _ = toy(rho=0.1, rho_w=0.2)
    e = -0.2 * gradient / gradient.norm()
    fall = r - toy.reward((toy.theta + e) * toy.xT, None).mean().item()
    expected = {"reward": r, "noise_norm": 0.1, "noise_fall_predicted": 0.1 * norms.mean().item(),
                "noise_fall_measured": 0.1 * norms.mean().item() + 0.1 ** 2 / 2, "sam_norm": 0.2,
                "sam_fall_predicted": 0.2 * gradient.norm().item(), "sam_fall_measured": fall}
    assert log.keys() == expected.keys()
    for name, value in expected.items():
        assert log[name] == pytest.approx(value, rel=1e-9), name


def test_gaussian_draws_take_the_mean_gradient_over_random_directions_of_norm_rho():
    """The reward is quadratic, so its gradient at x0 + d is g - d, and that of the mean needs only the mean of d."""
    toy = Toy(micro_batch_size=2)
    log, gradient = toy(rho=0.5, gaussian_draws=3)
    full = rsaft.micro_batches(["a", "b", "c", "d"], ("toy",), 4)[0]
    draws = torch.stack([full.noise(f"gaussian {i}", (3, 4, 4)) for i in range(3)]).double()
    d = 0.5 * draws / draws.flatten(2).norm(dim=2).view(3, 4, 1, 1, 1)
    assert log["noise_norm"] == pytest.approx(0.5, rel=1e-6)
    assert_close(gradient, toy.by_hand(0, 0) + (d.mean(0) * toy.xT).mean(0), rtol=1e-6, atol=1e-6)


def test_with_several_pictures_of_a_prompt_each_has_its_own_d_and_the_gradient_is_the_mean_over_all():
    """As in DRaFT-LV. The logged reward is that of the first picture of each prompt."""
    toy, factors = Toy(micro_batch_size=2), (1.0, 0.5, 2.0)

    def three(batch, start):
        return torch.cat([factor * toy.generate(batch)[0] for factor in factors]), None

    log = rsaft.rsaft_gradient(toy.batches, three, toy.reward, [toy.theta], rho=0.1)
    theta, expected, fall = toy.theta.detach(), 0, 0
    for factor in factors:
        g = toy.target - factor * theta * toy.xT
        d = -0.1 * g / g.flatten(1).norm(dim=1).view(4, 1, 1, 1)
        expected = expected + ((g - d) * factor * toy.xT).mean(0) / 3
        fall += 0.1 * g.flatten(1).norm(dim=1).mean().item() / 3
    assert_close(toy.theta.grad, expected, rtol=1e-9, atol=1e-9)
    assert log["noise_fall_predicted"] == pytest.approx(fall) and log["noise_norm"] == pytest.approx(0.1)
    assert log["reward"] == pytest.approx(toy.reward(theta * toy.xT, None).mean().item())


def test_both_passes_see_the_same_noise_prompts_and_plan(pipe, pickscore):
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    generate, seen = rsaft.make_generate(pipe, 4, 3.0, LATENT), []

    def watched(batch, start):
        with torch.no_grad():
            seen.append((batch.prompts, batch.noise("xT", LATENT)))
        return generate(batch, start, plan=rsaft.draft(4, None))

    rsaft.rsaft_gradient(rsaft.micro_batches(PROMPTS[:4], (0, 0), 2), watched, pickscore, params, 0.01, 0.01)
    assert len(seen) == 4                                                         # two micro-batches, two passes
    for first, second in zip(seen[:2], seen[2:]):
        assert first[0] == second[0] and torch.equal(first[1], second[1])


def test_radius_0_is_the_plain_gradient_bit_for_bit(pipe, pickscore):
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    generate = rsaft.make_generate(pipe, 4, 3.0, LATENT)
    batch, = rsaft.micro_batches(PROMPTS[:4], (0, 0), 4)
    rsaft.rsaft_gradient([batch], partial(generate, plan=rsaft.draft(4, None)), pickscore, params, rho=0.0, rho_w=0.0)
    mean_reward = pickscore(generate(batch, plan=rsaft.draft(4, None))[0], batch.prompts).mean()
    for p, plain in zip(params, torch.autograd.grad(mean_reward, params)):
        assert torch.equal(p.grad, plain)


def test_a_prompt_goes_through_the_text_encoder_once_and_comes_out_as_the_pipeline_embeds_it(pipe):
    calls = []
    pipe.text_encoder.register_forward_hook(lambda module, inputs, output: calls.append(1))
    embed = rsaft.make_embed(pipe)
    first, second = embed(PROMPTS[:2]), embed([PROMPTS[1], "", PROMPTS[0]])
    assert len(calls) == 3 and not second.requires_grad
    assert torch.equal(second[[2, 0]], first)
    assert_close(second, pipe.encode_prompt([PROMPTS[1], "", PROMPTS[0]], "cpu", 1, False)[0])


@pytest.mark.parametrize("rho, rho_w", [(0.0, 0.0), (0.01, 0.01)])
def test_splitting_the_batch_changes_nothing_but_rounding(pipe, pickscore, rho, rho_w):
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    generate, results = rsaft.make_generate(pipe, 4, 3.0, LATENT), []
    for size in 1, 2, 4:
        batches = rsaft.micro_batches(PROMPTS[:4], (0, 0), size)
        log = rsaft.rsaft_gradient(batches, partial(generate, plan=rsaft.draft(4, None)), pickscore, params, rho, rho_w)
        results.append((log, torch.cat([p.grad.flatten() for p in params])))
    for log, gradient in results[1:]:
        assert (gradient - results[0][1]).norm() < 1e-3 * results[0][1].norm()
        assert log == {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in results[0][0].items()}


def test_the_window_repeats_the_second_rollout_from_the_first_step_with_gradient_on(pipe, pickscore):
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(params[1], std=0.1, generator=torch.Generator().manual_seed(1))
    generate, plan = rsaft.make_generate(pipe, 4, 3.0, LATENT), rsaft.draft(4, None, K=2)
    batch, = rsaft.micro_batches(PROMPTS[:4], (0, 0), 4)

    def gradient(window, plan=plan):
        rsaft.rsaft_gradient([batch], partial(generate, plan=plan), pickscore, params, rho_w=0.5, window=window)
        return [p.grad.clone() for p in params]

    x0, start = generate(batch, plan=plan)                 # by hand: the latents before the window, at theta
    plain = torch.autograd.grad(pickscore(x0, batch.prompts).mean(), params)
    with rsaft.perturbed(params, rsaft.parameter_perturbation(plain, 0.5)):
        moved, _ = generate(batch, start, plan=plan)
        expected = torch.autograd.grad(pickscore(moved, batch.prompts).mean(), params)
    assert_close(gradient(True), list(expected), rtol=1e-4, atol=1e-7)
    difference = sum((a - b).square().sum() for a, b in zip(gradient(False), expected)) ** 0.5
    assert difference > 0.01 * sum(b.square().sum() for b in expected) ** 0.5      # the full rollout is another update
    everything = rsaft.draft(4, None, K=4)                                         # nothing is left out: the same
    assert all(map(torch.equal, gradient(True, everything), gradient(False, everything)))


@pytest.mark.parametrize("method", ["draft", "drtune"])
def test_a_checkpointed_gradient_is_the_plain_one(pipe, pickscore, method):
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    generate, results = rsaft.make_generate(pipe, 4, 3.0, LATENT), []
    plan = rsaft.METHODS[method](4, torch.Generator().manual_seed(0), 2)
    batch, = rsaft.micro_batches(PROMPTS[:4], (0, 0), 4)
    forwards = []
    pipe.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda *_: forwards.append(1))
    for checkpointed in False, True:
        if checkpointed:
            rsaft.checkpoint_gradients(pipe)
        forwards.clear()
        log = rsaft.rsaft_gradient([batch], partial(generate, plan=plan), pickscore, params, 0.01, 0.01)
        results.append((log, [p.grad.clone() for p in params], len(forwards)))
    assert results[0][0] == {name: pytest.approx(value, rel=1e-5) for name, value in results[1][0].items()}
    assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-8)
    assert results[1][2] > results[0][2]                                           # it did recompute


def test_with_all_steps_differentiated_the_fall_under_sam_is_as_predicted(pipe, pickscore):
    """With K < T the second rollout moves the first T - K steps too, and the reward falls further than predicted."""
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    generate = rsaft.make_generate(pipe, 4, 3.0, LATENT)
    log = rsaft.rsaft_gradient(rsaft.micro_batches(PROMPTS[:8], (0, 0), 8),
                               partial(generate, plan=rsaft.draft(4, None, K=4)), pickscore, params, rho_w=0.01)
    assert log["sam_norm"] == pytest.approx(0.01, rel=1e-4)
    assert log["sam_fall_measured"] == pytest.approx(log["sam_fall_predicted"], rel=0.2)


def test_in_bf16_the_fall_under_sam_is_as_predicted_where_it_stands_above_the_rounding(pickscore):
    """The rounding: how far the reward in bf16 is from that in float32. At the default radius it hides the fall."""
    logs = []
    for dtype in torch.float32, torch.bfloat16:
        pipe = rsaft.load_pipeline(str(MODEL), dtype)
        params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
        for B in params[1::2]:
            torch.nn.init.normal_(B, std=0.02, generator=torch.Generator().manual_seed(1))
        generate = partial(rsaft.make_generate(pipe, 4, 3.0, LATENT), plan=rsaft.draft(4, None, K=4))
        batches = rsaft.micro_batches(PROMPTS[:16], (0, 0), 16)
        logs.append(rsaft.rsaft_gradient(batches, generate, pickscore, params, rho_w=0.3))
    exact, rounded = logs
    assert rounded["sam_fall_predicted"] > 10 * abs(rounded["reward"] - exact["reward"]) > 0
    assert rounded["sam_fall_measured"] == pytest.approx(rounded["sam_fall_predicted"], rel=0.2)


# ---- LoRA ----------------------------------------------------------------------------------------------------------

def test_a_new_adapter_changes_no_bit_and_only_the_adapter_is_trained(pipe):
    x, embeds = normal(2, *LATENT), normal(2, 16, 64)
    before = pipe.unet(x, 500, embeds).sample
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    assert torch.equal(pipe.unet(x, 500, embeds).sample, before)
    attention = [m for m in pipe.unet.modules() if type(m).__name__ == "Attention"]
    assert len(params) == 2 * 4 * len(attention) > 0                              # A and B of q, k, v and out
    assert {id(p) for p in params} == {id(p) for p in pipe.unet.parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in params)


def test_a_lora_layer_adds_b_a(pipe):
    layer = rsaft.LoRALinear(torch.nn.Linear(6, 5), 3, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.B)
    x = normal(2, 6)
    assert_close(layer(x), layer.linear(x) + x @ (layer.B @ layer.A).T)
    half = rsaft.LoRALinear(torch.nn.Linear(6, 5).bfloat16(), 3, torch.Generator().manual_seed(0))
    assert half.A.dtype == torch.float32 and half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("rho, rho_w", [(0.0, 0.0), (0.01, 0.01)])
def test_every_adapter_receives_gradient_after_the_second_update(pipe, pickscore, rho, rho_w):
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    generate = rsaft.make_generate(pipe, 4, 3.0, LATENT)
    optimizer = torch.optim.AdamW(params, lr=1e-3, maximize=True)
    for update in range(2):
        batches = rsaft.micro_batches(PROMPTS[:4], (0, update), 4)
        rsaft.rsaft_gradient(batches, partial(generate, plan=rsaft.draft(4, None)), pickscore, params, rho, rho_w)
        if update == 0 and rho_w == 0:       # B starts at 0, so A's first gradient is 0 (unless sam has moved B)
            assert all((p.grad != 0).any() == (i % 2 == 1) for i, p in enumerate(params))
        optimizer.step()
    assert all((p.grad != 0).any() for p in params)


# ---- Rewards -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("edges", ["soft", "hard"])                             # hard ones overshoot, hence the clamp
def test_pixels_are_resized_as_clip_resizes_8_bit_pictures(edges):
    from PIL import Image
    coarse = normal(1, 3, 20, 30).sigmoid() if edges == "soft" else (normal(1, 3, 20, 30) > 0).float()
    coarse = F.interpolate(coarse, (300, 450), mode="bicubic" if edges == "soft" else "nearest").clamp(0, 1)
    picture = Image.fromarray((coarse[0].permute(1, 2, 0) * 255).round().byte().numpy())
    resized = picture.resize((336, 224), Image.BICUBIC).crop((56, 0, 280, 224))
    expected = torch.tensor(list(resized.tobytes())).view(224, 224, 3).permute(2, 0, 1) / 255
    mean, std = torch.tensor([rsaft.CLIP_MEAN, rsaft.CLIP_STD])[..., None, None]
    error = (rsaft.clip_pixels(coarse, 224)[0] * std + mean - expected).abs()
    off = (error > 1.5 / 255).float().mean()
    assert off == 0 if edges == "soft" else off < 0.01      # PIL clips between its two passes too: a few pixels differ


def test_pixels_of_the_right_size_are_only_normalised_so_that_every_one_carries_gradient():
    images = (1.5 * normal(1, 3, 32, 32)).requires_grad_()           # also far outside [0, 1]
    gradient, = torch.autograd.grad(rsaft.clip_pixels(images, 32).sum(), images)
    assert_close(gradient, (1 / torch.tensor(rsaft.CLIP_STD)).view(1, 3, 1, 1).expand_as(images))


def test_pickscore_is_the_logit_of_transformers_own_clip(pickscore, pictures):
    from transformers import CLIPModel, CLIPTokenizer
    images, prompts = pictures
    model, tokenizer = CLIPModel.from_pretrained(TINY / "pickscore"), CLIPTokenizer.from_pretrained(TINY / "pickscore")
    tokens = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=tokens.input_ids, pixel_values=rsaft.clip_pixels(images, 32)).logits_per_image
    assert_close(pickscore(images, prompts), logits.diagonal(), rtol=1e-4, atol=1e-3)


def test_the_rewards_know_what_they_are_shown(pickscore, pictures):
    images, prompts = pictures
    judge = rsaft.make_reward("judge", TINY)
    for reward in pickscore, judge:
        assert (reward(images, prompts) > reward(images, prompts[1:] + prompts[:1])).all()


def test_the_gradient_of_the_reward_agrees_with_finite_differences(pickscore, pictures):
    images, prompts = pictures
    value, gradient = rsaft.reward_gradient(pickscore, images, prompts)
    assert not value.requires_grad and not gradient.requires_grad and gradient.shape == images.shape
    direction = rsaft.sample_perturbation(gradient, 0.005)
    difference = (pickscore(images + direction, prompts) - pickscore(images - direction, prompts)) / 2
    assert_close((gradient * direction).flatten(1).sum(1), difference, rtol=0.02, atol=1e-3)


def test_the_weights_of_a_reward_are_frozen(pickscore, pictures):
    images, prompts = pictures
    assert not pickscore(images, prompts).requires_grad


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
              "visual_encoder.patch_embed.proj.weight": (image, 3, patch, patch), "vision_proj.weight": (8, image),
              "text_proj.weight": (8, width), "text_encoder.embeddings.word_embeddings.weight": (words, width),
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
             "text_encoder.embeddings.LayerNorm": width, "text_encoder.encoder.layer.0.output.LayerNorm": width,
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


def imagereward_by_hand(state, ids, attention_mask, pixels):
    """BLIP's two towers and ImageReward's head, written out on the original names."""
    def line(x, name):
        return x @ state[f"blip.{name}.weight"].T + state[f"blip.{name}.bias"]

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"blip.{name}.weight"], state[f"blip.{name}.bias"], eps)

    gelu, v, t = F.gelu, "visual_encoder", "text_encoder"
    x = F.conv2d(pixels, state[f"blip.{v}.patch_embed.proj.weight"], state[f"blip.{v}.patch_embed.proj.bias"], stride=8)
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
        h = norm(h + line(attend(q, k, w, 12, mask), f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
    layer = f"{t}.encoder.layer.0"
    inner = gelu(line(h, f"{layer}.intermediate.dense"))
    h = norm(h + line(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
    return (apply_head(state, h[:, 0], "mlp.") - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def originals(tmp_path, monkeypatch):
    """A --models folder with every reward in its original layout, small, and the formula that each must agree with."""
    import shutil
    from transformers import BertTokenizer, CLIPModel, CLIPTokenizer
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "pickscore")
    for name in "pickscore", "clipscore", "aesthetic":
        shutil.copytree(TINY / "pickscore", tmp_path / name)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16, hidden_act="gelu")
    monkeypatch.setattr(rsaft, "VIT_H", dict(
        text_config={**text, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**text, "hidden_size": 48, "intermediate_size": 96, "patch_size": 8, "image_size": 32},
        projection_dim=24))
    monkeypatch.setattr(rsaft, "BLIP_LARGE", {**rsaft.BLIP_LARGE, "hidden_size": 32, "intermediate_size": 64,
                                              "num_hidden_layers": 1, "image_size": 32, "patch_size": 8})
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
                                               *sorted(set(" ".join(PROMPTS).split()))])}
    monkeypatch.setattr(rsaft, "BLIP_TEXT", {**rsaft.BLIP_TEXT, "vocab_size": len(words), "hidden_size": 24,
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
        return imagereward_by_hand(blip, tokens.input_ids, tokens.attention_mask, pixels)

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


def test_a_wide_picture_is_padded_for_hpsv2_and_cropped_for_clip():
    wide = 0.2 + 0.6 * normal(1, 3, 16, 32).sigmoid()
    mean, std = torch.tensor([rsaft.CLIP_MEAN, rsaft.CLIP_STD])[..., None, None]
    padded = (rsaft.clip_pixels(wide, 32, pad=True) * std + mean)[0]
    cropped = (rsaft.clip_pixels(wide, 16) * std + mean)[0]
    assert_close(padded[:, 8:24], wide[0])
    assert padded[:, :8].abs().max() < 1e-6 and padded[:, 24:].abs().max() < 1e-6
    assert_close(cropped, wide[0, :, :, 8:24])


# ---- Random numbers by name ----------------------------------------------------------------------------------------

def test_the_noise_of_a_sample_depends_on_its_name_alone():
    whole, = rsaft.micro_batches(PROMPTS[:6], (7, 3), 6)
    parts = rsaft.micro_batches(PROMPTS[:6], (7, 3), 2)
    xT = whole.noise("xT", LATENT)
    assert torch.equal(torch.cat([part.noise("xT", LATENT) for part in parts]), xT)
    assert sum((part.prompts for part in parts), []) == whole.prompts
    assert len({tuple(sample.flatten().tolist()) for sample in xT}) == 6               # each sample has its own
    others = [whole.noise("gaussian 0", LATENT), rsaft.micro_batches(PROMPTS[:6], (7, 4), 6)[0].noise("xT", LATENT),
              rsaft.micro_batches(PROMPTS[:6], (8, 3), 6)[0].noise("xT", LATENT), xT.roll(1, 0)]
    assert not any(torch.equal(other, xT) for other in others)


def test_every_prompt_is_used_once_before_any_comes_again():
    drawn = [rsaft.training_prompts(PROMPTS, 0, update, 24) for update in range(6)]
    for epoch in sum(drawn[:3], []), sum(drawn[3:], []):
        assert sorted(epoch) == sorted(PROMPTS)
    assert sum(drawn[:3], []) != sum(drawn[3:], [])
    assert drawn[0] == rsaft.training_prompts(PROMPTS, 0, 0, 24) != rsaft.training_prompts(PROMPTS, 1, 0, 24)


# ---- The small world -----------------------------------------------------------------------------------------------

def test_the_oracle_knows_real_pictures_from_others(pictures):
    import world
    images, prompts = pictures
    real, wrong = world.oracle(images, prompts), world.oracle(images, prompts[1:] + prompts[:1])
    assert (real["accuracy"] == 1).all() and (real["rmse"] < 0.07).all() and (wrong["rmse"] > real["rmse"]).all()
    assert (world.oracle(0.8 * images, prompts)["rmse"] > real["rmse"]).all()     # paler is worse


def test_the_oracle_measures_the_distance_to_the_nearest_clean_rendering(pictures):
    import world
    images, _ = pictures
    distances = world.distances(images[:2])
    for caption in 0, 29, 71:
        shape, pair = divmod(caption, 18)
        color, ground = world.PALETTE[pair][..., None, None, None].movedim(1, -3).unbind(0)
        clean = ground + (color - ground) * world.templates()[shape].view(-1, 1, 32, 32)
        for image, distance in zip(images, distances[:, caption]):
            assert_close(distance, (clean - image).square().mean((1, 2, 3)).sqrt().min(), rtol=1e-3, atol=1e-4)


# ---- What a user sees ----------------------------------------------------------------------------------------------

def run(*arguments):
    """rsaft.py in a process of its own, as a user has it."""
    command = [sys.executable, str(HERE / "rsaft.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def records(out, evaluations=False):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("eval", False) == evaluations]


def small(out, *arguments):
    """A run of a few updates on small batches, in this process. Returns its exit code."""
    return rsaft.main(["--tiny", "--train-steps", "3", "--sampling-steps", "4", "--batch-size", "4", "--eval-images",
                       "4", "--micro-batch-size", "4", "--eval-every", "2", "--rank", "4", "--out", str(out),
                       *map(str, arguments)])


def test_the_command_of_the_readme_runs_and_its_adapter_gives_the_last_grid_in_plain_diffusers(tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from PIL import Image
    command = "python rsaft.py --tiny --reward pickscore --sam --noise"
    readme = (HERE / "README.md").read_text()
    assert f"pip install -r requirements.txt && {command}\n" in readme
    out = tmp_path / "out"
    result = run(*command.split()[2:], "--train-steps", 3, "--eval-every", 2, "--eval-images", 16, "--out", out)
    assert result.returncode == 0, result.stderr
    for word in "before", "after", "pickscore", "judge", "oracle_rmse", "oracle_accuracy", "s1", str(out):
        assert word in result.stdout
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr and "torchvision" not in result.stderr

    files = {"config.json", "log.jsonl", "samples", "best", "pytorch_lora_weights.safetensors",
             "checkpoint.pt"}
    assert {path.name for path in out.iterdir()} == files
    config = json.loads((out / "config.json").read_text())
    assert config["noise"] == config["sam"] == 0.01 and config["versions"]["torch"] == torch.__version__
    assert [record["step"] for record in records(out)] == [1, 2, 3]
    for record in records(out):
        assert record.keys() >= {"reward", "grad_norm", "seconds", "peak_gb"}
        assert record["noise_norm"] == pytest.approx(0.01, rel=1e-3) == record["sam_norm"]
        assert record["noise_fall_measured"] == pytest.approx(record["noise_fall_predicted"], rel=0.1)
        assert record["sam_fall_measured"] > 0.5 * record["sam_fall_predicted"] > 0
    evaluations = records(out, evaluations=True)
    assert [record["step"] for record in evaluations] == [0, 2, 3]
    assert evaluations[0].keys() == {"eval", "step", "alarm", "pickscore", "judge", "oracle_rmse",
                                     "oracle_accuracy", "s1"}

    # What README tells the user to do with the adapter: the pipeline of diffusers, and nothing of ours but the noise.
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def grid():
        latents = rsaft.evaluation_latents(16, LATENT)
        images = pipe(PROMPTS[:16], latents=latents, num_inference_steps=10, guidance_scale=3.0, height=32, width=32,
                      output_type="pt").images
        return (255 * images.unflatten(0, (4, 4)).permute(0, 3, 1, 4, 2).reshape(128, 128, 3)).round()

    def saved(step):
        picture = Image.open(out / "samples" / f"step_{step:06d}.png")
        assert picture.size == (512, 512)
        return torch.tensor(list(picture.resize((128, 128), Image.NEAREST).tobytes())).view(128, 128, 3).float()

    assert (grid() - saved(0)).abs().max() <= 2
    assert (grid() - saved(3)).abs().max() > 2
    pipe.load_lora_weights(out)
    assert (grid() - saved(3)).abs().max() <= 2


def test_radius_0_gives_the_log_and_the_adapter_of_the_plain_method_bit_for_bit(tmp_path):
    assert small(tmp_path / "plain") == 0 == small(tmp_path / "zero", "--sam", "0", "--noise", "0")
    assert small(tmp_path / "sam", "--sam", "0.1") == 0
    plain, zero, sam = ([{**record, "seconds": 0, "peak_gb": 0} for record in records(tmp_path / name)]
                        for name in ("plain", "zero", "sam"))
    assert plain == zero and plain != sam
    weights = [(tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes() for name in ("plain", "zero", "sam")]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("flags", [[], ["--sam", "--noise"]])
def test_the_training_reward_rises(tmp_path, flags):
    assert rsaft.main(["--tiny", "--train-steps", "25", "--batch-size", "16", "--eval-images", "72", "--eval-every",
                       "25", "--learning-rate", "4e-3", "--out", str(tmp_path / "out"), *flags]) == 0
    before, after = records(tmp_path / "out", evaluations=True)
    assert after["pickscore"] > before["pickscore"] + 0.5


def test_another_seed_is_another_run_and_the_same_seed_the_same_one(tmp_path):
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        assert small(tmp_path / name, "--seed", seed, "--noise", "--noise-type", "gaussian") == 0
    a, b, c = ((tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_reward_of_ones_own_is_trained_on_and_named_in_the_log(tmp_path):
    (tmp_path / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    assert small(tmp_path / "out", "--reward", f"{tmp_path}/mine.py:brightness", "--eval-reward", "pickscore") == 0
    assert records(tmp_path / "out", evaluations=True)[0].keys() == {"eval", "step", "alarm", "brightness",
                                                                           "pickscore", "s1"}


def test_without_a_held_out_score_the_run_says_so(tmp_path, capsys):
    assert small(tmp_path / "out", "--eval-reward") == 0
    assert capsys.readouterr().out.count("nothing") >= 2


def test_two_rewards_are_mixed_as_a_weighted_sum_and_both_are_logged(tmp_path):
    (tmp_path / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    mixture = ["pickscore=0.5", f"{tmp_path}/mine.py:brightness=-3"]
    assert small(tmp_path / "mixed", "--reward", *mixture, "--eval-every", "1", "--learning-rate", "1e-9") == 0
    assert small(tmp_path / "one", "--reward", "pickscore", "--eval-every", "0", "--learning-rate", "1e-9") == 0
    assert small(tmp_path / "two", "--reward", mixture[1][:-3], "--eval-every", "0", "--learning-rate", "1e-9") == 0
    assert {"pickscore", "brightness"} <= records(tmp_path / "mixed", evaluations=True)[0].keys()
    mixed, one, two = (records(tmp_path / name)[0]["reward"] for name in ("mixed", "one", "two"))
    assert mixed == pytest.approx(0.5 * one - 3 * two, rel=1e-5)


def test_the_alarm_needs_three_evaluations_in_a_row_with_the_reward_up_and_the_judge_down():
    rising = [1, 2, 3, 4, 5]
    assert rsaft.is_hacking(rising, [9, 9, 8, 7, 6]) and rsaft.is_hacking(rising[:4], [4, 3, 2, 1])
    assert not rsaft.is_hacking(rising[:3], [4, 3, 2])                             # too early to tell
    assert not rsaft.is_hacking(rising, [9, 8, 7, 6, 7])                           # the judge recovered
    assert not rsaft.is_hacking(rising, [5, 6, 7, 6, 5])                           # only two in a row
    assert not rsaft.is_hacking([1, 2, 3, 2, 5], [9, 8, 7, 6, 5])                  # the reward fell as well
    assert not rsaft.is_hacking(rising, [1, 2, 3, 4, 5]) and not rsaft.is_hacking([], [])


def test_the_judge_is_found_by_its_whole_name(tmp_path):
    """Not by the name of a training reward that begins alike, as hpsv2 and hpsv2.1 do."""
    (tmp_path / "mine.py").write_text("def grey(images, prompts):\n    return images.mean((1, 2, 3))\n\n\n"
                                      "def grey2(images, prompts):\n    return -images.square().mean((1, 2, 3))\n")
    mine = f"{tmp_path}/mine.py"
    assert small(tmp_path / "out", "--reward", f"{mine}:grey2", "--eval-reward", f"{mine}:grey") == 0
    assert json.loads((tmp_path / "out" / "best" / "best.json").read_text()).keys() == {"step", "grey"}


JUDGED = ["--tiny", "--batch-size", "16", "--eval-images", "36", "--eval-every", "3", "--sampling-steps", "5"]


def test_a_run_made_to_be_fooled_raises_the_alarm_and_stops_and_keeps_its_best_adapter(tmp_path, capsys):
    from safetensors.torch import load_file
    (tmp_path / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    assert rsaft.main([*JUDGED, "--train-steps", "40", "--learning-rate", "5e-3", "--stop-on-hacking", "--reward",
                       f"{tmp_path}/mine.py:brightness", "--out", str(tmp_path / "out")]) == 0
    evaluations = records(tmp_path / "out", evaluations=True)
    assert [record["alarm"] for record in evaluations] == [False] * (len(evaluations) - 1) + [True]
    assert len(records(tmp_path / "out")) == evaluations[-1]["step"] < 40
    assert "ALARM" in capsys.readouterr().out
    best = json.loads((tmp_path / "out" / "best" / "best.json").read_text())
    assert best["judge"] == max(record["judge"] for record in evaluations)
    assert {record["step"]: record["judge"] for record in evaluations}[best["step"]] == best["judge"]
    name = "pytorch_lora_weights.safetensors"
    last, kept = load_file(tmp_path / "out" / name), load_file(tmp_path / "out" / "best" / name)
    assert last.keys() == kept.keys() and any(not torch.equal(last[key], kept[key]) for key in last)


def test_a_healthy_run_raises_no_alarm(tmp_path, capsys):
    assert rsaft.main([*JUDGED, "--train-steps", "18", "--out", str(tmp_path / "out")]) == 0
    evaluations = records(tmp_path / "out", evaluations=True)
    assert len(evaluations) == 7 and not any(record["alarm"] for record in evaluations)
    assert "no alarm" in capsys.readouterr().out


def test_a_saved_adapter_is_judged_at_several_scales_beside_the_base_model(tmp_path, capsys):
    assert small(tmp_path / "run", "--learning-rate", "1e-2") == 0
    before, *_, after = records(tmp_path / "run", evaluations=True)
    capsys.readouterr()
    assert rsaft.main(["--evaluate", str(tmp_path / "run"), "--eval-reward", "judge", "pickscore", "--lora-scale",
                       "0.5", "1.0", "--out", str(tmp_path / "judged")]) == 0
    base, half, full = records(tmp_path / "judged", evaluations=True)
    for name in "judge", "pickscore":
        assert base[name] == pytest.approx(before[name], abs=1e-4)
        assert full[name] == pytest.approx(after[name], abs=1e-4)
        assert half[name] != base[name] != full[name]
    table = capsys.readouterr().out
    assert all(word in table for word in ("base model", "scale 0.5", "scale 1", f"{full['judge']:.3f}"))
    grids = {path.name for path in (tmp_path / "judged" / "samples").iterdir()}
    assert grids == {"scale_0.png", "scale_0.5.png", "scale_1.png"}
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())["judge"]
    assert rsaft.main(["--evaluate", str(tmp_path / "run" / "best"), "--eval-reward", "judge", "--out",
                       str(tmp_path / "best")]) == 0
    assert records(tmp_path / "best", evaluations=True)[-1]["judge"] == pytest.approx(best, abs=1e-4)
    saved = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    saved.write_bytes(saved.read_bytes()[:1000])
    assert rsaft.main(["--evaluate", str(tmp_path / "run"), "--eval-reward", "judge"]) == 2
    assert "doesn't fit" in capsys.readouterr().err


def test_evaluations_can_have_prompts_of_their_own(tmp_path):
    (tmp_path / "four.txt").write_text("\n".join(PROMPTS[-4:]))
    assert small(tmp_path / "a") == 0 == small(tmp_path / "b", "--eval-prompts", tmp_path / "four.txt")
    (a, b), (c, d) = ([records(tmp_path / name, evaluations=kind)[0] for name in "ab"] for kind in (False, True))
    assert a["reward"] == b["reward"] and c["pickscore"] != d["pickscore"]


def test_bf16_weights_train_a_float32_adapter(tmp_path):
    from safetensors.torch import load_file
    assert small(tmp_path / "out", "--dtype", "bfloat16", "--noise", "--sam") == 0
    adapter = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
    for record in records(tmp_path / "out"):
        assert record["noise_fall_measured"] == pytest.approx(record["noise_fall_predicted"], rel=0.1)


def test_a_reward_that_turns_nan_stops_the_run_and_the_last_good_adapter_is_saved(tmp_path, capsys):
    from safetensors.torch import load_file
    (tmp_path / "mine.py").write_text("calls = 0\ndef fragile(images, prompts):\n    global calls\n    calls += 1\n"
                                      "    return images.mean((1, 2, 3)) * (float('nan') if calls > 5 else 1)\n")
    assert small(tmp_path / "out", "--reward", f"{tmp_path}/mine.py:fragile", "--eval-every", "0") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("rsaft.py: update 3 has no finite gradient")
    adapter = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values()) and len(records(tmp_path / "out")) == 2
    assert any((tensor != 0).any() for name, tensor in adapter.items() if "lora_B" in name)


# ---- Several processes, killed runs ---------------------------------------------------------------------------------

def adapter(out):
    return (Path(out) / "pytorch_lora_weights.safetensors").read_bytes()


def story(out):
    """The log without what a clock or the machine says."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "peak_gb")} for line in lines]


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


UPDATE = """
import sys
from functools import partial
import torch
import rsaft

if rsaft.PROCESSES > 1:
    torch.distributed.init_process_group()
rsaft.quiet_libraries()
pipe = rsaft.load_pipeline("tiny/stable-diffusion")
params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
prompts = open("tiny/prompts.txt").read().splitlines()[:4]
batches = rsaft.micro_batches(prompts, (0, 0), 1)[rsaft.RANK::rsaft.PROCESSES]
generate, perturbation, seen = rsaft.make_generate(pipe, 4, 3.0, (4, 8, 8)), rsaft.parameter_perturbation, []

def watched(grads, rho):
    seen.append(perturbation(grads, rho))
    return seen[-1]

rsaft.parameter_perturbation = watched
log = rsaft.rsaft_gradient(batches, partial(generate, plan=rsaft.draft(4, None)),
                           rsaft.make_reward("pickscore", "tiny"), params, 0.01, 0.01)
torch.save({"e": seen[0], "gradient": [p.grad for p in params], "log": log}, f"{sys.argv[1]}-{rsaft.RANK}.pt")
"""


def test_two_processes_make_the_update_of_one(tmp_path):
    (tmp_path / "update.py").write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n" + UPDATE)
    alone = subprocess.run([sys.executable, tmp_path / "update.py", tmp_path / "alone"], cwd=HERE, capture_output=True)
    assert alone.returncode == 0, alone.stderr
    together = torchrun(tmp_path / "update.py", tmp_path / "together")
    assert together.returncode == 0, together.stderr
    expected = torch.load(tmp_path / "alone-0.pt")
    for rank in 0, 1:                                       # both have the sum, and so make the same step
        update = torch.load(tmp_path / f"together-{rank}.pt")
        for name in "e", "gradient":
            a, b = (torch.cat([tensor.detach().flatten() for tensor in x[name]]) for x in (update, expected))
            assert (a - b).norm() < 1e-3 * b.norm() and b.norm() > 0
        assert update["log"] == {name: pytest.approx(value, rel=1e-3) for name, value in expected["log"].items()}


def test_two_processes_write_the_log_of_one(tmp_path):
    flags = ["--tiny", "--noise", "--sam", "--train-steps", 2, "--sampling-steps", 4, "--batch-size", 4,
             "--micro-batch-size", 2, "--eval-images", 6, "--eval-every", 1]
    assert rsaft.main([*map(str, flags), "--out", str(tmp_path / "one")]) == 0
    result = torchrun("rsaft.py", *flags, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("adapter, log.jsonl") == 1 and "cpu x 2" in result.stdout
    one, two = story(tmp_path / "one"), story(tmp_path / "two")
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for a, b in zip(one, two):
        assert b == {name: pytest.approx(value, rel=2e-2, abs=1e-5) for name, value in a.items()}
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}


LONG = ["--tiny", "--noise", "--sam", "--method", "drtune", "--train-steps", "12", "--sampling-steps", "5", "--batch-size",
        "4", "--eval-images", "4", "--eval-every", "2", "--checkpoint-every", "3", "--rank", "4"]


def wait_for_updates(process, out, count):
    """Wait until the log of a run in another process has so many updates, or the process has ended."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):      # there is none yet, or the run just removed an older one
            if (Path(out) / "log.jsonl").read_text().count("grad_norm") >= count:
                return
        time.sleep(0.01)


def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_that_was_not(tmp_path):
    import random
    whole, killed, kills = tmp_path / "whole", tmp_path / "killed", 0
    assert run(*LONG, "--out", whole).returncode == 0
    moments = random.Random(0)
    for target in 1, 4, 6, 10:                              # killed a moment after that many updates are in the log
        process = subprocess.Popen([sys.executable, str(HERE / "rsaft.py"), *LONG, "--resume", "--out", str(killed)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_updates(process, killed, target)
        time.sleep(moments.random() * 0.3)
        process.kill()
        kills += process.wait() == -9
    assert kills == 4
    result = run(*LONG, "--resume", "--out", killed)
    assert result.returncode == 0, result.stderr
    assert story(killed) == story(whole) and adapter(killed) == adapter(whole)
    assert adapter(killed / "best") == adapter(whole / "best")
    names = [sorted(str(path.relative_to(out)) for path in out.rglob("*")) for out in (whole, killed)]
    assert names[0] == names[1]
    for picture in (whole / "samples").iterdir():
        assert picture.read_bytes() == (killed / "samples" / picture.name).read_bytes()


def test_ctrl_c_finishes_the_update_saves_and_says_how_to_go_on(tmp_path):
    import signal
    process = subprocess.Popen([sys.executable, str(HERE / "rsaft.py"), *LONG, "--out", str(tmp_path / "run")], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_updates(process, tmp_path / "run", 1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    done = records(tmp_path / "run")[-1]["step"]
    assert process.returncode == 1 and done < 12 and "Traceback" not in error
    assert f"stopped after update {done}; the same flags and --resume --out {tmp_path / 'run'} go on" in error
    assert rsaft.main([*LONG, "--resume", "--out", str(tmp_path / "run")]) == 0
    assert rsaft.main([*LONG, "--out", str(tmp_path / "whole")]) == 0
    assert story(tmp_path / "run") == story(tmp_path / "whole") and adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_a_finished_run_can_be_prolonged_and_then_is_the_long_run(tmp_path):
    flags = ["--checkpoint-every", "0", "--eval-every", "1"]
    assert small(tmp_path / "run", *flags) == 0 == small(tmp_path / "long", *flags, "--train-steps", "5")
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert small(tmp_path / "run", *flags, "--resume") == 0                       # nothing left to do, nothing changed
    assert len(records(tmp_path / "run")) == 3
    assert best == json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert small(tmp_path / "run", *flags, "--resume", "--train-steps", "5") == 0
    assert story(tmp_path / "run") == story(tmp_path / "long") and adapter(tmp_path / "run") == adapter(tmp_path / "long")


def test_overwrite_leaves_nothing_of_the_earlier_run_and_nothing_else_undone(tmp_path):
    assert small(tmp_path / "run", "--train-steps", "4") == 0
    (tmp_path / "run" / "notes.txt").write_text("years of work")
    assert small(tmp_path / "run", "--overwrite", "--eval-every", "0") == 0 == small(tmp_path / "new", "--eval-every", "0")
    names = [{str(path.relative_to(out)) for path in out.rglob("*")} for out in (tmp_path / "run", tmp_path / "new")]
    assert names[0] == names[1] | {"notes.txt"} and story(tmp_path / "run") == story(tmp_path / "new")


@pytest.mark.parametrize("failing", ["checkpoint.pt", "pytorch_lora_weights.safetensors"])
def test_a_full_disk_ends_the_run_in_one_line_and_loses_nothing_that_was_there(tmp_path, monkeypatch, capsys, failing):
    assert small(tmp_path / "run") == 0
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.suffix in (".pt", ".safetensors")}
    fsync, new = os.fsync, tmp_path / "run" / f"{failing}.new"

    def full(descriptor):
        if new.exists() and os.fstat(descriptor).st_ino == new.stat().st_ino:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert small(tmp_path / "run", "--resume", "--train-steps", "5") == 1
    assert "No space left" in (error := capsys.readouterr().err.splitlines()[-1]) and error.startswith("rsaft.py: ")
    for path, content in files.items():
        assert path.read_bytes() == content or failing == "checkpoint.pt" and path.name != failing, path
    assert small(tmp_path / "run", "--resume", "--train-steps", "5") == 0 == small(tmp_path / "whole", "--train-steps", "5")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A small finished run, to be copied before it is spoilt."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert small(out, "--eval-every", "0") == 0
    return out


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("run-by-a-pickle",)


def with_other_shapes(out):
    saved = torch.load(out / "checkpoint.pt")
    saved["adapter"] = {key: tensor[:, :-1].clone() for key, tensor in saved["adapter"].items()}
    torch.save(saved, out / "checkpoint.pt")


def with_other_names(out):
    saved = torch.load(out / "checkpoint.pt")
    saved["adapter"] = {key.replace("attn1", "attention"): tensor for key, tensor in saved["adapter"].items()}
    torch.save(saved, out / "checkpoint.pt")


@pytest.mark.parametrize("spoil, flags, words", [
    (None, [], "not empty.*--resume"),
    (None, ["--resume", "--overwrite"], "exclude each other"),
    (None, ["--resume", "--learning-rate", "0.5"], "learning_rate 0.002, not 0.5"),
    (None, ["--resume", "--rank", "8"], "rank 4, not 8"),
    (None, ["--resume", "--sam"], "sam 0.0, not 0.01"),
    (None, ["--resume", "--seed", "1"], "seed 0, not 1"),
    (None, ["--resume", "--method", "refl"], "method draft, not refl"),
    (None, ["--resume", "--height", "64"], "height 32, not 64"),
    (None, ["--resume", "--prompts", "ten.txt"], "prompts"),
    (None, ["--resume", "--train-steps", "2"], "past update 2"),
    (lambda out: (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:5000]), ["--resume"], "read"),
    (lambda out: (out / "checkpoint.pt").write_bytes(b""), ["--resume"], "read"),
    (lambda out: torch.save(Malicious(), out / "checkpoint.pt"), ["--resume"], "can't be read"),
    (lambda out: torch.save({"step": 1}, out / "checkpoint.pt"), ["--resume"], "doesn't fit"),
    (with_other_shapes, ["--resume"], "doesn't fit"),
    (with_other_names, ["--resume"], "doesn't fit"),
    (lambda out: (out / "config.json").write_text("{"), ["--resume"], "read"),
    (lambda out: (out / "config.json").unlink(), ["--resume"], "holds no run"),
    (lambda out: (out / "config.json").unlink(), ["--overwrite"], "holds no run"),
])
def test_a_run_that_cannot_be_resumed_is_left_as_it_is(finished, tmp_path, monkeypatch, capsys, spoil, flags, words):
    import shutil
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    Path("ten.txt").write_text("\n".join(PROMPTS[:10]))
    if spoil:
        spoil(Path("run"))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert small("run", "--eval-every", "0", *flags) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.startswith("rsaft.py: ") and len(error.splitlines()) == 1, error
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert not Path("run-by-a-pickle").exists()


OWN = {"none.py": "x = 1\n", "broken.py": "import nothing_of_that_name\n",
       "shape.py": "def f(images, prompts):\n    return images.mean()\n",
       "nan.py": "def f(images, prompts):\n    return images.mean((1, 2, 3)) * float('nan')\n",
       "hard.py": "def f(images, prompts):\n    return (images > 0.5).float().mean((1, 2, 3))\n",
       "raises.py": "def f(images, prompts):\n    raise RuntimeError('no pictures today')\n"}


def model_with(folder, file, **changes):
    """The tiny model with other entries in one of its files; with no entry, the first half of that file."""
    import shutil
    shutil.copytree(MODEL, folder)
    path = Path(folder, file)
    if changes:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    else:
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


MODELS = {"sdxl": dict(file="model_index.json", _class_name="StableDiffusionXLPipeline"),
          "unconditional": dict(file="unet/config.json", _class_name="UNet2DModel"),
          "sample": dict(file="scheduler/scheduler_config.json", prediction_type="sample"),
          "clipped": dict(file="scheduler/scheduler_config.json", thresholding=True),
          "bitten": dict(file="unet/diffusion_pytorch_model.safetensors")}


@pytest.mark.parametrize("flags, words", [
    (["--bogus"], "--bogus"),
    (["--train-steps", "many"], "--train-steps"),
    (["--noise", "-1"], "--noise"),
    (["--sam", "nan"], "--sam"),
    (["--grad-steps", "11"], "--grad-steps 11"),
    (["--grad-steps", "0"], "--grad-steps"),
    (["--micro-batch-size", "5"], "--micro-batch-size 5 "),
    (["--learning-rate", "0"], "--learning-rate"),
    (["--sampling-steps", "1001"], "1001"),
    (["--noise-type", "best"], "--noise-type"),
    (["--device", "tpu"], "--device"),
    (["--height", "33"], "multiples of 4"),
    (["--prompts", "missing.txt"], "missing.txt"),
    (["--prompts", "empty.txt"], "empty.txt"),
    (["--prompts", "."], "--prompts .|prompt file ."),
    (["--prompts", "latin1.txt"], "latin1.txt"),
    (["--prompts", "dogs.txt"], "a dog"),
    (["--reward", "beauty"], "beauty"),
    (["--reward", "missing.py:f"], "missing.py"),
    (["--reward", "none.py:f"], "no attribute 'f'"),
    (["--reward", "broken.py:f"], "nothing_of_that_name"),
    (["--reward", "shape.py:f"], "shape"),
    (["--reward", "nan.py:f"], "not finite"),
    (["--reward", "hard.py:f"], "not differentiable"),
    (["--reward", "raises.py:f"], "no pictures today"),
    (["--reward", "judge"], "held out"),
    (["--method", "dpo"], "--method"),
    (["--method", "refl", "--grad-steps", "10"], "--grad-steps 10"),
    (["--method", "drtune", "--grad-steps", "8"], "--grad-steps 8"),
    (["--evaluate", "."], "no pytorch_lora_weights"),
    (["--stop-on-hacking", "--eval-every", "0"], "--eval-every"),
    (["--eval-prompts", "missing.txt"], "missing.txt"),
    (["--reward", "pickscore", "pickscore=2"], "twice"),
    (["--reward", "pickscore=nan"], "finite"),
    (["--reward", "pickscore=much"], "pickscore=much"),
    (["--eval-reward", "beauty"], "beauty"),
    (["--models", "nowhere"], "nowhere"),
    (["--models", "."], "pickscore"),
    (["--model", "."], "model_index.json"),
    (["--model", "./nowhere"], "nowhere"),
    (["--model", str(TINY / "pickscore")], "model_index.json"),
    (["--out", "full"], "not empty"),
    (["--out", "full", "--resume"], "holds no run"),
    (["--out", "full", "--overwrite"], "holds no run"),
    (["--out", "empty.txt/out"], "empty.txt"),
    (["--resume"], "--out"),
    (["--overwrite"], "--out"),
    (["--evaluate", "run", "--overwrite", "--out", "run"], "exclude each other"),
    (["--evaluate", "run"], "doesn't fit"),
    (["--sam-rollout", "half"], "--sam-rollout"),
    (["--checkpoint-every", "-1"], "--checkpoint-every"),
    (["--eval-images", "0"], "--eval-images"),
    (["--seed", "1.5"], "--seed"),
    (["--dtype", "float16"], "--dtype"),
    (["--model", "sdxl"], "StableDiffusionXLPipeline"),
    (["--model", "unconditional"], "UNet2DModel"),
    (["--model", "sample"], "prediction_type"),
    (["--model", "clipped"], "clip"),
    (["--model", "bitten"], "bitten doesn't load"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    for name, text in OWN.items():
        Path(name).write_text(text)
    Path("empty.txt").write_text("\n  \n")
    Path("dogs.txt").write_text(PROMPTS[0] + "\na dog\n")
    Path("latin1.txt").write_bytes("déjà vu".encode("latin1"))
    Path("full").mkdir()
    Path("full", "thesis.txt").write_text("years of work")
    Path("run").mkdir()
    Path("run", "pytorch_lora_weights.safetensors").write_bytes(b"no adapter")
    if "--model" in flags and (changes := MODELS.get(flags[-1])):
        model_with(flags[-1], **changes)
    before = sorted(str(p) for p in Path().rglob("*") if "__pycache__" not in str(p))
    assert rsaft.main(["--tiny", *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.startswith("rsaft.py: ") and len(error.splitlines()) == 1, error
    assert sorted(str(p) for p in Path().rglob("*") if "__pycache__" not in str(p)) == before


def test_a_model_that_predicts_v_is_trained_as_well(tmp_path):
    """Its weights predict epsilon, so the pictures are nothing; that the step is v's is tested above."""
    model_with(tmp_path / "v", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert small(tmp_path / "out", "--model", tmp_path / "v", "--noise", "--sam") == 0
    assert all(record["grad_norm"] > 0 for record in records(tmp_path / "out"))


def test_prompt_files_of_every_make_are_read(tmp_path):
    text = "\ufeffa red circle\r\n\r\n   \r\na blue square  \r\n" + "very " * 2000 + "long\r\nun cercle déjà vu"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    prompts = rsaft.read_prompts(tmp_path / "prompts.txt")
    assert prompts == ["a red circle", "a blue square", "very " * 2000 + "long", "un cercle déjà vu"]
    assert small(tmp_path / "out", "--prompts", tmp_path / "prompts.txt", "--eval-reward", "judge") == 0


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(rsaft, "PROCESSES", 3)
    assert rsaft.main(["--tiny", "--batch-size", "32"]) == 2
    assert "--batch-size 32 can't be divided by 3" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_ways_out():
    """The address is one that answers nothing, so that this holds with and without a network."""
    result = subprocess.run([sys.executable, str(HERE / "rsaft.py"), "--reward", "pickscore"], text=True,
                            capture_output=True, env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "--tiny" in result.stderr and "--models DIR" in result.stderr


def test_tensorboard_is_asked_for_only_where_it_is_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)              # as if it were not
    assert rsaft.main(["--tiny", "--tensorboard"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err


def test_help_gives_every_flag_with_its_default_on_two_screens():
    text = run("--help").stdout
    assert len(text.splitlines()) <= 80
    for setting in rsaft.fields(rsaft.Config):
        assert "--" + setting.name.replace("_", "-") in text
    assert "(default: 2e-05)" in text


def test_the_patch_in_the_readme_is_algorithm_1():
    """Its code is run as it stands there, inside a reader's loop, and must give the update of rsaft_gradient."""
    patch = next(block for block in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
                 if "perturbed(" in block)
    reference, toy = Toy(), Toy()
    _, expected = reference(rho=1e-2, rho_w=1e-2)
    updates = []

    class Optimizer(torch.optim.SGD):
        def step(self):
            updates.append(self.param_groups[0]["params"][0].grad.clone())

    batch, optimizer = toy.batches[0], Optimizer([toy.theta], maximize=True)
    exec(patch, dict(reward=toy.reward, params=[toy.theta], prompts=batch.prompts, optimizer=optimizer,
                     generate=lambda prompts: toy.generate(batch)[0]))
    assert_close(updates, [expected], rtol=1e-9, atol=1e-9)
