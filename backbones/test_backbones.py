"""What each file of backbones/ claims, on small random models made here; diffusers' pipelines are the judges.

`pytest backbones`. Needs peft, as the adapters are loaded into plain diffusers.
"""
import copy
import json
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

TINY = HERE.parent / "tiny"
PROMPTS = (TINY / "prompts.txt").read_text().splitlines()
SIZE = 32    # pixels; each VAE here has a factor of 4
FAMILIES = ["sdxl", "sd3", "flux"]
GUIDANCE = {"sdxl": 5.0, "sd3": 7.0, "sd3 without T5": 4.5, "flux": 3.5, "schnell": 1.0}


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


def sdxl():
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
        unet=unet, scheduler=scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False)


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


MAKERS = {"sdxl": sdxl, "sd3": sd3, "flux": flux, "sd3 without T5": partial(sd3, third=False),
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
    model.params = model.add_adapter(4, rsaft.named_generator("adapter"))
    for i, p in enumerate(model.params):
        p.data += 0.1 * torch.randn(p.shape, generator=rsaft.named_generator("trained", i))
    return model


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
    _, h, w = model.latent_shape
    latents = model.pack(rsaft.evaluation_latents(count, model.latent_shape))
    return (call or pipe)(PROMPTS[:count], latents=latents, num_inference_steps=T, height=4 * h, width=4 * w,
                          guidance_scale=guidance_scale, output_type="pt").images


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
    if hasattr(pipe.scheduler, "alphas_cumprod"):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    call = partial(type(pipe).__call__.__wrapped__, pipe)
    images = ask(pipe, model, 4, model.guidance_scale, call)
    theirs = torch.autograd.grad((images * weight).sum(), model.params)
    for mine, expected in zip(ours, theirs, strict=True):
        assert expected.norm() > 0
        assert (mine - expected).norm() < 1e-4 * expected.norm()
