"""What each file of backbones/ claims, on small random models made here; diffusers' pipelines are the judges.

`pytest backbones`. Needs peft, as the adapters are loaded into plain diffusers.
"""
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))    # rsaft.py lies one folder up
import rsaft  # noqa: E402

rsaft.quiet_libraries()
import diffusers  # noqa: E402
import transformers  # noqa: E402
from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: E402

TINY = HERE.parent / "tiny"
PROMPTS = (TINY / "prompts.txt").read_text().splitlines()
SIZE = 32    # pixels; each VAE here has a factor of 4
FAMILIES = ["sdxl", "sd3", "flux", "flux2_klein", "z_image"]
GUIDANCE = {"sdxl": 5.0, "sdxl without zeros": 5.0, "sd3": 7.0, "sd3 without T5": 4.5, "flux": 3.5,
            "schnell": 1.0, "flux2_klein": 4.0, "z_image": 5.0}


# ---- Small models: the published classes, a few thousand weights ------------------------------------------

def clip(kind, width, **config):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TINY / "stable-diffusion" / "tokenizer")
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=width, max_position_embeddings=16, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, **config)
    return kind(config).eval(), tokenizer


def t5(width):
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    encoder = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    return encoder.eval(), transformers.T5Tokenizer(vocab=vocabulary)


def vae(channels, **config):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16), latent_channels=channels, norm_num_groups=4, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.7, **config).eval()


def sdxl(zeros=True):
    first, tokenizer = clip(transformers.CLIPTextModel, 16)
    second, _ = clip(transformers.CLIPTextModelWithProjection, 32)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=48,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        use_linear_projection=True, transformer_layers_per_block=(1, 2), addition_time_embed_dim=8,
        addition_embed_type="text_time", projection_class_embeddings_input_dim=32 + 6 * 8)
    scheduler = diffusers.EulerDiscreteScheduler(    # as on the hub, where nothing says clip_sample
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading")
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(4), text_encoder=first, tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer,
        unet=unet, scheduler=scheduler, force_zeros_for_empty_prompt=zeros, add_watermarker=False)


def sd3(third=True):
    kind = transformers.CLIPTextModelWithProjection
    (first, tokenizer), (second, _), (encoder, tokenizer_3) = clip(kind, 16), clip(kind, 16), t5(32)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm")    # as SD3.5-medium's
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(4, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False), text_encoder=first,
        tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer, transformer=transformer,
        text_encoder_3=encoder if third else None, tokenizer_3=tokenizer_3 if third else None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


def flux(guidance_embeds=True):
    (first, tokenizer), (second, tokenizer_2) = clip(transformers.CLIPTextModel, 16), t5(32)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds)
    shift = {"use_dynamic_shifting": True, "shift": 3.0} if guidance_embeds else {"shift": 1.0}
    return diffusers.FluxPipeline(
        vae=vae(4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False), text_encoder=first,
        tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer_2, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift))


def qwen3(kind, width, layers):
    """Bytes are its tokens."""
    characters = {character: i for i, character in enumerate(["<|endoftext|>", *bytes_to_unicode().values()])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=characters, merges=[])
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}: {% endfor %}"
    encoder = kind(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, initializer_range=0.2))
    return encoder.eval(), tokenizer


def flux2_klein():
    encoder, tokenizer = qwen3(transformers.Qwen3ForCausalLM, 8, 27)    # its layers 9, 18, 27 are read
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).eval()
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False)
    return diffusers.Flux2KleinPipeline(
        vae=autoencoder, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0))


def z_image():
    encoder, tokenizer = qwen3(transformers.Qwen3Model, 16, 2)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=(4, 6, 6), axes_lens=(256, 32, 32))
    return diffusers.ZImagePipeline(
        vae=vae(4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False), text_encoder=encoder,
        tokenizer=tokenizer, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


MAKERS = {"sdxl": sdxl, "sd3": sd3, "flux": flux, "flux2_klein": flux2_klein, "z_image": z_image,
          "sdxl without zeros": partial(sdxl, zeros=False), "sd3 without T5": partial(sd3, third=False),
          "schnell": partial(flux, guidance_embeds=False)}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{family: the folder of its small model}."""
    folders = {}
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("models") / name
        make().save_pretrained(folders[name])
    return folders


def load(folder, T=4, guidance_scale=None, height=SIZE, width=SIZE, **how):
    return rsaft.load_model(str(folder), T, guidance_scale, height, width, **how)


@pytest.fixture
def model(folders, request):
    """A small model at its family's usual guidance, with an adapter that acts, `params`."""
    model = load(folders[request.param])
    model.params = adapt(model)
    return model


def adapt(model):
    """A new adapter, moved away from where it does nothing. Returns its parameters."""
    params = model.add_adapter(4, rsaft.named_generator("adapter"))
    for i, p in enumerate(params):
        p.data += 0.1 * torch.randn(p.shape, generator=rsaft.named_generator("trained", i))
    return params


every_family = pytest.mark.parametrize("model", FAMILIES, indirect=True)


def diffusers_pipe(folder):
    """As users load it: DDIM where the family samples by DDIM, else as it comes."""
    index = json.loads((folder / "model_index.json").read_text())
    left_out = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **left_out)
    if hasattr(pipe.scheduler, "alphas_cumprod"):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(model, plan=None, count=2):
    """The first pictures of the evaluation, (count, 3, H, W)."""
    plan, batch = plan or rsaft.Plan((False,) * len(model.steps)), rsaft.Batch(
        PROMPTS[:count], [("evaluation", i) for i in range(count)])
    start, = rsaft.sample_starts(model, plan, [batch], count)
    return rsaft.sample_images(model, plan, batch, start)[0]


def ask(pipe, model, T, guidance_scale, call=None, count=2):
    """The same pictures by the pipeline."""
    how = model.pipeline_arguments(rsaft.evaluation_latents(count, model.latent_shape), guidance_scale)
    with torch.no_grad():
        height, width = model.decode(torch.zeros(1, *model.latent_shape)).shape[2:]
    return (call or pipe)(prompt=PROMPTS[:count], num_inference_steps=T, height=height, width=width,
                          output_type="pt", **how).images


# ---- Pictures and gradients are the pipelines' ------------------------------------------------------------

@pytest.mark.parametrize("name", MAKERS)
def test_the_rollout_makes_the_pictures_of_the_diffusers_pipeline(folders, name):
    pipe, usual = diffusers_pipe(folders[name]), GUIDANCE[name]
    for T, guidance_scale, height in (4, usual, 32), (10, usual, 48), (28, usual, 32), (10, 1.0, 32):
        model = load(folders[name], T, guidance_scale, height)
        with torch.no_grad():
            images = sample(model)
        assert images.shape == (2, 3, height, 32) and images.std() > 0.01
        assert (images[0] - images[1]).abs().max() > 0.01     # the prompts and the noise matter
        assert_close(images, ask(pipe, model, T, guidance_scale), rtol=0, atol=1e-5)


@every_family
def test_the_gradient_is_that_through_the_pipelines_own_scheduler(model):
    """Of all four steps: the pipeline's call, without its no_grad, is differentiated by autograd."""
    weight = torch.randn(2, 3, SIZE, SIZE, generator=rsaft.named_generator("weight"))
    (sample(model, rsaft.alignprop(4, None, 4)) * weight).sum().backward()
    ours = [p.grad for p in model.params]
    pipe = model.pipe
    pipe.set_progress_bar_config(disable=True)
    call = partial(type(pipe).__call__.__wrapped__, pipe)
    images = ask(pipe, model, 4, model.guidance_scale, call)
    theirs = torch.autograd.grad((images * weight).sum(), model.params)
    for mine, expected in zip(ours, theirs, strict=True):
        assert expected.norm() > 0
        assert (mine - expected).norm() < 1e-4 * expected.norm()


def test_a_flow_step_is_the_step_of_diffusers():
    """Its prediction of x0 and its noising too, with and without the shift that depends on the size."""
    x, f = (torch.randn(2, 4, 8, 8, generator=rsaft.named_generator(name)) for name in "xf")
    for config in ({"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift": 1.0, "use_karras_sigmas": True}):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
        for T in 4, 10, 28:
            steps = rsaft.flow_steps(scheduler, T, tokens=1024)
            assert [step.t for step in steps] == scheduler.timesteps.tolist() and len(steps) == T
            for step in steps:
                t = scheduler.timesteps[steps.index(step)]
                assert torch.equal(step.next(x, f), scheduler.step(f, t, x).prev_sample)
                noised = step.alpha * x + step.sigma * f
                assert_close(noised, scheduler.scale_noise(x, torch.tensor([step.t, step.t]), f))
                assert_close(step.x0(noised, f - x), x)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    small, large = (rsaft.flow_steps(scheduler, 4, tokens) for tokens in (256, 4096))
    assert small[1].sigma < large[1].sigma      # a larger picture stays noisy for longer


# ---- Training ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def pickscore():
    return rsaft.make_reward("pickscore", TINY)


def algorithm_1(model, plan, reward, **how):
    """One update's gradient, of two pictures. Returns the log and the gradients."""
    batches = rsaft.micro_batches(PROMPTS[:2], (0, 0), 1)
    log = rsaft.rsaft_gradient(batches, partial(rsaft.sample_starts, model, plan, size=2),
                               partial(rsaft.sample_images, model, plan), reward, model.params, **how)
    return log, [p.grad.clone() for p in model.params]


@every_family
@pytest.mark.parametrize("method", rsaft.METHODS)
def test_every_method_with_both_perturbations_reaches_every_layer(model, method, pickscore):
    plan = rsaft.METHODS[method](4, rsaft.named_generator(1))
    log, gradients = algorithm_1(model, plan, pickscore, rho=0.01, rho_w=0.01)
    assert len(gradients) == 2 * sum(isinstance(layer, rsaft.LoRALinear) for layer in model.network.modules())
    assert all(gradient.isfinite().all() and gradient.norm() > 0 for gradient in gradients)
    assert log["noise_norm"] == pytest.approx(0.01, rel=1e-3) == log["sam_norm"]
    assert log["fall_measured"] == pytest.approx(log["fall_predicted"], rel=0.5) and log["fall_predicted"] > 0


@every_family
def test_checkpointing_changes_nothing_and_the_window_moves_the_last_steps_alone(model, pickscore):
    plan, how = rsaft.draft(4, None), {"rho": 0.01, "rho_w": 0.01}
    _, expected = algorithm_1(model, plan, pickscore, **how)
    _, window = algorithm_1(model, plan, pickscore, reuse_starts=True, **how)
    model.network.enable_gradient_checkpointing()
    model.vae.enable_gradient_checkpointing()
    calls = []
    for block in model.network.modules():
        if getattr(block, "gradient_checkpointing", False):
            block._gradient_checkpointing_func = watched(block._gradient_checkpointing_func, calls)
    _, checkpointed = algorithm_1(model, plan, pickscore, **how)
    assert calls                                             # else nothing was recomputed
    for a, b, c in zip(expected, checkpointed, window, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-6 * a.abs().max().item())
        assert 0 < (a - c).norm() < a.norm()


def watched(function, calls):
    def call(*args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)
    return call


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_fetched_from_a_hub_is_what_loads(folders, name, tmp_path):
    patterns = rsaft.find_families()[json.loads((folders[name] / "model_index.json").read_text())
                                     ["_class_name"]].files()
    for path in folders[name].rglob("*.*"):
        file = path.relative_to(folders[name])
        if any(fnmatch.fnmatch(str(file), pattern) for pattern in patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).hardlink_to(path)
    with torch.no_grad():
        made = [sample(load(folder, guidance_scale=1.0)) for folder in (tmp_path, folders[name])]
        assert torch.equal(*made)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_makes_nearly_the_same_pictures_and_what_overflows_in_float16_is_decoded(folders, name):
    """The published VAE of SDXL overflows in float16 (force_upcast); bfloat16 has float32's range."""
    half, whole = load(folders[name], dtype=torch.bfloat16), load(folders[name])
    with torch.no_grad():
        assert (sample(half) - sample(whole)).abs().mean() < 0.02
        images = half.decode(1e6 * torch.randn(1, *half.latent_shape))
    assert images.dtype == torch.float32 and images.isfinite().all()


@every_family
def test_the_text_encoders_are_let_go_and_what_was_encoded_stays(model):
    with torch.no_grad():
        model.encode_prompts(["", *PROMPTS[:2]])
        before = sample(model)
        model.drop_encoders()
        held = [module for module in model.pipe.components.values() if isinstance(module, torch.nn.Module)]
        assert {id(module) for module in held} == {id(model.network), id(model.vae)}
        assert torch.equal(sample(model), before)


# ---- Runs -------------------------------------------------------------------------------------------------

def flags(folder, out, *more):
    """A run of a few updates on a small model."""
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:4]))
    return ["--model", str(folder), "--models", str(TINY), "--prompts", str(prompts), "--height", "32",
            "--width", "32", "--out", str(out), "--sampling-steps", "4", "--batch-size", "2", "--rank", "4",
            "--eval-images", "2", "--learning-rate", "1", "--eval-every", "1", "--train-steps", "2", *more]


RSAFT = ["--reward", "pickscore", "--eval-reward", "judge", "--noise", "--sam", "--sam-rollout", "window"]


def log_lines(out, evaluations=False):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("eval", False) == evaluations]


def story(out):
    """What a run came to, without its clock: the log, and the adapter's bits."""
    lines = log_lines(out) + log_lines(out, evaluations=True)
    return [{**line, "seconds": 0} for line in lines], (out / rsaft.ADAPTER).read_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_says_what_it_costs_goes_on_after_a_kill_and_its_adapter_works_in_plain_diffusers(
        folders, name, tmp_path, monkeypatch, capsys):
    from PIL import Image
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert rsaft.main(flags(folders[name], whole, *RSAFT)) == 0

    # T = 4, two pictures, a second rollout of the last step alone: 3 steps without gradient, then 1 + 1 with.
    branches = 1 if name == "flux" else 2
    costs = 2 * 3 * branches, 2 * 2 * branches
    printed = capsys.readouterr().out
    assert f"takes {costs[0]} network evaluations without gradient, {costs[1]} with\n" in printed
    for line in log_lines(whole):
        assert costs == tuple(line[f"network_evaluations_{kind}_gradient"] for kind in ("without", "with"))

    record = rsaft.Run.record

    def killed_in_the_second(run, *args, **kwargs):
        if run.updates:
            raise KeyboardInterrupt
        record(run, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(rsaft.Run, "record", killed_in_the_second)
        assert rsaft.main(flags(folders[name], killed, *RSAFT)) == 1
    assert len(log_lines(killed)) == 1
    assert rsaft.main(flags(folders[name], killed, *RSAFT)) == 0 and story(killed) == story(whole)

    pipe = diffusers_pipe(folders[name])
    assert type(pipe).__name__ == rsaft.find_families()[type(pipe).__name__].pipeline
    model = load(folders[name])
    base = ask(pipe, model, 4, model.guidance_scale)
    pipe.load_lora_weights(str(whole))
    images = ask(pipe, model, 4, model.guidance_scale)
    grid = Image.open(whole / "samples" / "step_000002.png")
    for number, image in enumerate(images):        # in the grid they are four times as large
        tile = torch.tensor([[grid.getpixel((128 * number + 4 * column, 4 * row)) for column in range(32)]
                             for row in range(32)]).permute(2, 0, 1)
        assert (image * 255 - tile).abs().max() < 2 and (image - base[number]).abs().max() > 0.02

    evaluate = rsaft.import_file(HERE.parent / "tools" / "evaluate.py")
    assert evaluate.main([str(whole)]) == 0
    last, table = log_lines(whole, evaluations=True)[-1], (whole / "evaluation" / "scores.csv").read_text()
    scores = [float(line.split(",")[4]) for line in table.splitlines() if line.startswith(str(whole))]
    assert scores == pytest.approx(last["pictures"]["pickscore"], abs=1e-3)


UPDATE = """
import sys, torch
root, out, *folders = sys.argv[1:]
sys.path[:0] = [root, root + "/backbones"]
import rsaft, test_backbones as small
torch.distributed.init_process_group()
for i, folder in enumerate(folders):
    model = small.load(folder)
    model.params = small.adapt(model)
    batches = rsaft.my_share(rsaft.micro_batches(small.PROMPTS[:2], (0, 0), 1))
    plan = rsaft.draft(4, None)
    rsaft.rsaft_gradient(batches, small.partial(rsaft.sample_starts, model, plan, size=1),
                         small.partial(rsaft.sample_images, model, plan),
                         rsaft.make_reward("pickscore", small.TINY), model.params, 0.01, 0.01)
    torch.save([p.grad for p in model.params], f"{out}/{i}-{rsaft.process_index()}.pt")
"""


def test_two_processes_make_the_update_of_one(folders, tmp_path, pickscore):
    (tmp_path / "update.py").write_text(UPDATE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [tmp_path / "update.py", HERE.parent, tmp_path, *(folders[name] for name in FAMILIES)]
    result = subprocess.run([*torchrun, *map(str, arguments)], capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    for i, name in enumerate(FAMILIES):
        model = load(folders[name])
        model.params = adapt(model)
        _, expected = algorithm_1(model, rsaft.draft(4, None), pickscore, rho=0.01, rho_w=0.01)
        for rank in 0, 1:
            for mine, theirs in zip(torch.load(tmp_path / f"{i}-{rank}.pt"), expected, strict=True):
                assert (mine - theirs).norm() < 1e-3 * theirs.norm()


# ---- CRD and GDRO -----------------------------------------------------------------------------------------

crd, gdro = (rsaft.import_file(HERE.parent / "related" / f"{name}.py") for name in ("crd", "gdro"))


@every_family
def test_a_picture_is_noised_to_where_the_sampler_starts_from_and_the_target_leads_back(model):
    x0, noise = (torch.randn(1, *model.latent_shape, generator=rsaft.named_generator(name)) for name in "xn")
    levels, prediction_type = gdro.noise_levels(model)
    assert [sigma for _, _, sigma in levels] == sorted(sigma for _, _, sigma in levels)
    for step in model.steps:
        assert pytest.approx((step.t, step.alpha, step.sigma), abs=1e-6) in levels
        x, y = gdro.forward_process(x0, noise, step.alpha, step.sigma, prediction_type)
        assert_close(step.x0(x, y), x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("module", [crd, gdro])
def test_crd_and_gdro_make_an_update(folders, name, module, tmp_path, monkeypatch):
    """With guidance as an input CRD's anchor is given its scale, 4.5, and what is regressed the run's."""
    out, given, predict = tmp_path / "out", [], rsaft.find_families
    more = ["--reward", "judge", "--train-steps", "1", "--batch-size", "2", "--group-size", "2"]
    if module is crd:
        more += ["--noise-levels", "2", "--eval-sampling-steps", "4"]
    else:
        more += ["--pictures", "2", "--data", str(tmp_path / "data")]
    if name == "flux":
        family = rsaft.find_families()["FluxPipeline"]
        predict = family.predict
        monkeypatch.setattr(family, "predict", lambda self, x, t, *conditions: (
            given.append(conditions[-1].unique().item()), predict(self, x, t, *conditions))[1])
    assert module.main(flags(folders[name], out, *more)) == 0
    assert log_lines(out)[0]["grad_norm"] > 0 and len(log_lines(out, evaluations=True)) == 2
    if name == "flux":
        assert {*given} == ({1.0, 4.5} if module is crd else {3.5})


def test_a_guided_anchor_of_a_distilled_model_is_refused_before_anything_is_there(folders, tmp_path, capsys):
    out, more = tmp_path / "out", ["--reward", "judge", "--group-size", "2", "--train-steps", "1",
                                   "--noise-levels", "1", "--eval-sampling-steps", "4"]
    assert crd.main(flags(folders["schnell"], out, *more)) == 2
    assert "must be 1, not 4.5 (--guidance-scale, and --anchor-scale of CRD)" in capsys.readouterr().err
    assert not out.exists() and crd.main(flags(folders["schnell"], out, *more, "--anchor-scale", "1")) == 0


@every_family
def test_latents_go_to_the_vae_and_back(model):
    latents = torch.randn(2, *model.latent_shape)
    encoded = model.to_vae(latents)
    assert (latents.numel(), 4) == (encoded.numel(), encoded.shape[1]) and encoded.std() != latents.std()
    assert_close(model.from_vae(encoded), latents)


# ---- What is wrong is one line ----------------------------------------------------------------------------

def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


INDEX = "model_index.json"
WRONG = {
    "another family": ("sd3", lambda path: edit(path / INDEX, _class_name="SanaSprintPipeline"), [],
                       "is a SanaSprintPipeline; supported are StableDiffusionPipeline, FluxPipeline"),
    "a refiner": ("sdxl", lambda path: edit(path / INDEX, _class_name="StableDiffusionXLImg2ImgPipeline"), [],
                  "StableDiffusionXLImg2ImgPipeline; supported are"),
    "inpainting": ("sdxl", lambda path: edit(path / "unet/config.json", in_channels=9), [],
                   "unet takes 9 channels, its latents have 4; is it for inpainting"),
    "another network": ("sd3", lambda path: edit(path / "transformer/config.json", _class_name="Other"), [],
                        "a Other where a SD3Transformer2DModel should be"),
    "no transformer": ("flux", lambda path: shutil.rmtree(path / "transformer"), [],
                       "transformer/config.json"),
    "no encoder": ("sdxl", lambda path: shutil.rmtree(path / "text_encoder_2"), [], "as a CLIPTextModelW.*"),
    "null encoder": ("sdxl", lambda path: edit(path / INDEX, text_encoder_2=[None, None]), [],
                     "its text_encoder_2 doesn't load"),
    "another library": ("flux", lambda path: edit(path / INDEX, text_encoder_2=["os", "system"]), [],
                        "its text_encoder_2 doesn't load"),
    "weights": ("sd3", lambda path: (path / "transformer/diffusion_pytorch_model.safetensors").unlink(), [],
                "its transformer doesn't|as a SD3Transformer2DModel"),
    "size": ("sd3", None, ["--height", "36"], "--height 36 and --width 32 must be multiples of 8"),
    "noise": ("flux", lambda path: edit(path / "scheduler/scheduler_config.json", stochastic_sampling=True),
              [], "can't be sampled.*FlowMatchEulerDiscreteScheduler"),
    "EDM": ("sdxl", lambda path: diffusers.EDMEulerScheduler().save_pretrained(path / "scheduler") or edit(
        path / INDEX, scheduler=["diffusers", "EDMEulerScheduler"]), [], "noise levels of EDMEulerScheduler"),
    "guidance": ("schnell", None, [], "takes no guidance.*must be 1, not 3.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_model_is_one_line_and_nothing_is_written(folders, tmp_path, case, capsys):
    name, spoil, more, words = WRONG[case]
    folder = tmp_path / "model"
    shutil.copytree(folders[name], folder)
    if spoil:
        spoil(folder)
    assert rsaft.main(flags(folder, tmp_path / "out", *RSAFT, *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(words, error), error
    assert not (tmp_path / "out").exists()
