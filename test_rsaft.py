"""What rsaft.py claims, claim by claim, in its own order: `pytest`. About four minutes on two CPU cores.

The models are the trained ones of tiny/; where a closed form exists, it is the judge. The tests that load an adapter
into diffusers need peft, which rsaft.py itself does not.
"""
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
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
        images = generate(rsaft.evaluation_batches(PROMPTS, 4, 4)[0], sampling(10))
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


def test_the_gradient_goes_through_both_branches_of_the_guidance(pipe):
    params = rsaft.add_lora(pipe.unet, 2, torch.Generator().manual_seed(0))
    x, embeds = normal(1, *LATENT), normal(2, 1, 16, 64)

    def gradient(prompt_embeds, negative_embeds, scale):
        f = rsaft.make_denoise(pipe.unet, prompt_embeds, negative_embeds, scale)(x, 500)
        return torch.cat([g.flatten() for g in torch.autograd.grad(f.sum(), params)])

    conditional, unconditional = gradient(embeds[0], embeds[1], 1.0), gradient(embeds[1], embeds[0], 1.0)
    assert unconditional.norm() > 0
    assert_close(gradient(embeds[0], embeds[1], 3.0), 3 * conditional - 2 * unconditional, rtol=1e-3, atol=1e-4)


# ---- Rewards -------------------------------------------------------------------------------------------------------

def test_pixels_are_resized_as_clip_resizes_8_bit_pictures():
    from PIL import Image
    coarse = torch.nn.functional.interpolate(normal(1, 3, 20, 30).sigmoid(), (300, 450), mode="bicubic").clamp(0, 1)
    picture = Image.fromarray((coarse[0].permute(1, 2, 0) * 255).round().byte().numpy())
    resized = picture.resize((336, 224), Image.BICUBIC).crop((56, 0, 280, 224))
    expected = torch.tensor(list(resized.tobytes())).view(224, 224, 3).permute(2, 0, 1) / 255
    mean, std = torch.tensor([rsaft.CLIP_MEAN, rsaft.CLIP_STD])[..., None, None]
    assert_close(rsaft.clip_pixels(coarse, 224)[0] * std + mean, expected, rtol=0, atol=1.5 / 255)


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

    def generate(self, batch):
        return self.theta * batch.noise("xT", (3, 4, 4)).double()

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


def test_both_passes_see_the_same_noise_prompts_and_plan(pipe, pickscore):
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    generate, seen = rsaft.make_generate(pipe, 4, 3.0, LATENT), []

    def watched(batch):
        with torch.no_grad():
            seen.append((batch.prompts, batch.noise("xT", LATENT)))
        return generate(batch, rsaft.draft(4, None, 1))

    rsaft.rsaft_gradient(rsaft.micro_batches(PROMPTS[:4], (0, 0), 2), watched, pickscore, params, 0.01, 0.01)
    assert len(seen) == 4                                                         # two micro-batches, two passes
    for first, second in zip(seen[:2], seen[2:]):
        assert first[0] == second[0] and torch.equal(first[1], second[1])


def test_radius_0_is_the_plain_gradient_bit_for_bit(pipe, pickscore):
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    generate = rsaft.make_generate(pipe, 4, 3.0, LATENT)
    batch, = rsaft.micro_batches(PROMPTS[:4], (0, 0), 4)
    rsaft.rsaft_gradient([batch], lambda b: generate(b, rsaft.draft(4, None, 1)), pickscore, params, rho=0.0, rho_w=0.0)
    mean_reward = pickscore(generate(batch, rsaft.draft(4, None, 1)), batch.prompts).mean()
    for p, plain in zip(params, torch.autograd.grad(mean_reward, params)):
        assert torch.equal(p.grad, plain)


@pytest.mark.parametrize("rho, rho_w", [(0.0, 0.0), (0.01, 0.01)])
def test_splitting_the_batch_changes_nothing_but_rounding(pipe, pickscore, rho, rho_w):
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    generate, results = rsaft.make_generate(pipe, 4, 3.0, LATENT), []
    for size in 1, 2, 4:
        batches = rsaft.micro_batches(PROMPTS[:4], (0, 0), size)
        log = rsaft.rsaft_gradient(batches, lambda b: generate(b, rsaft.draft(4, None, 1)), pickscore, params, rho, rho_w)
        results.append((log, torch.cat([p.grad.flatten() for p in params])))
    for log, gradient in results[1:]:
        assert (gradient - results[0][1]).norm() < 1e-3 * results[0][1].norm()
        assert log == {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in results[0][0].items()}


def test_with_all_steps_differentiated_the_fall_under_sam_is_as_predicted(pipe, pickscore):
    """With K < T the second rollout moves the first T - K steps too, and the reward falls further than predicted."""
    params = rsaft.add_lora(pipe.unet, 4, torch.Generator().manual_seed(0))
    generate = rsaft.make_generate(pipe, 4, 3.0, LATENT)
    log = rsaft.rsaft_gradient(rsaft.micro_batches(PROMPTS[:8], (0, 0), 8), lambda b: generate(b, rsaft.draft(4, None, 4)),
                               pickscore, params, rho_w=0.01)
    assert log["sam_norm"] == pytest.approx(0.01, rel=1e-4)
    assert log["sam_fall_measured"] == pytest.approx(log["sam_fall_predicted"], rel=0.2)


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
        rsaft.rsaft_gradient(batches, lambda b: generate(b, rsaft.draft(4, None, 1)), pickscore, params, rho, rho_w)
        if update == 0 and rho_w == 0:       # B starts at 0, so A's first gradient is 0 (unless sam has moved B)
            assert all((p.grad != 0).any() == (i % 2 == 1) for i, p in enumerate(params))
        optimizer.step()
    assert all((p.grad != 0).any() for p in params)


# ---- Random numbers by name ----------------------------------------------------------------------------------------

def test_the_noise_of_a_sample_depends_on_its_name_alone():
    whole, = rsaft.micro_batches(PROMPTS[:6], (7, 3), 6)
    parts = rsaft.micro_batches(PROMPTS[:6], (7, 3), 2)
    xT = whole.noise("xT", LATENT)
    assert torch.equal(torch.cat([part.noise("xT", LATENT) for part in parts]), xT)
    assert sum((part.prompts for part in parts), []) == whole.prompts
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

    files = {"config.json", "log.jsonl", "samples", "best", "pytorch_lora_weights.safetensors"}
    assert {path.name for path in out.iterdir()} == files
    config = json.loads((out / "config.json").read_text())
    assert config["noise"] == config["sam"] == 0.01 and config["torch"] == torch.__version__
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
                                      "    return images.mean((1, 2, 3)) * (float('nan') if calls > 3 else 1)\n")
    assert small(tmp_path / "out", "--reward", f"{tmp_path}/mine.py:fragile", "--eval-every", "0") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("rsaft.py: update 3 has no finite gradient")
    adapter = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values()) and len(records(tmp_path / "out")) == 2
    assert any((tensor != 0).any() for name, tensor in adapter.items() if "lora_B" in name)


OWN = {"none.py": "x = 1\n", "broken.py": "import nothing_of_that_name\n",
       "shape.py": "def f(images, prompts):\n    return images.mean()\n",
       "nan.py": "def f(images, prompts):\n    return images.mean((1, 2, 3)) * float('nan')\n",
       "hard.py": "def f(images, prompts):\n    return (images > 0.5).float().mean((1, 2, 3))\n",
       "raises.py": "def f(images, prompts):\n    raise RuntimeError('no pictures today')\n"}


@pytest.mark.parametrize("flags, words", [
    (["--bogus"], "--bogus"),
    (["--train-steps", "many"], "--train-steps"),
    (["--noise", "-1"], "--noise"),
    (["--sam", "nan"], "--sam"),
    (["--grad-steps", "11"], "--grad-steps 11"),
    (["--grad-steps", "0"], "--grad-steps"),
    (["--micro-batch-size", "5"], "--micro-batch-size 5"),
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
    (["--eval-reward", "beauty"], "beauty"),
    (["--models", "nowhere"], "nowhere"),
    (["--models", "."], "pickscore"),
    (["--model", "."], "model_index.json"),
    (["--model", "./nowhere"], "nowhere"),
    (["--model", str(TINY / "pickscore")], "model_index.json"),
    (["--out", "full"], "not empty"),
    (["--out", "empty.txt/out"], "empty.txt"),
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
    before = sorted(str(p) for p in Path().rglob("*") if "__pycache__" not in str(p))
    assert rsaft.main(["--tiny", *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.startswith("rsaft.py: ") and len(error.splitlines()) == 1, error
    assert sorted(str(p) for p in Path().rglob("*") if "__pycache__" not in str(p)) == before


def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_ways_out():
    """The address is one that answers nothing, so that this holds with and without a network."""
    result = subprocess.run([sys.executable, str(HERE / "rsaft.py"), "--reward", "pickscore"], text=True,
                            capture_output=True, env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "--tiny" in result.stderr and "--models DIR" in result.stderr


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

    params, batch = [toy.theta], toy.batches[0]
    exec(patch, dict(reward=toy.reward, params=params, prompts=batch.prompts, optimizer=Optimizer(params, maximize=True),
                     generate=lambda prompts: toy.generate(batch)))
    assert_close(updates, [expected], rtol=1e-9, atol=1e-9)
