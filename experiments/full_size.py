"""Models of full size and random weights, for measuring what they cost on a machine without a hub.

    python experiments/full_size.py DIR
    python rsaft.py --model DIR/stable-diffusion --models DIR --reward pickscore --sam --noise

makes Stable Diffusion 1.5 and PickScore (CLIP ViT-H/14) in their own shapes, 7.5 GB. The pictures are noise;
time, memory and the flow of the gradient are those of the real models. The tokenizers are those of tiny/.

    python experiments/full_size.py DIR sdxl              # or sd3.5-medium, flux.1-dev

makes one of these and PickScore. Its weights are bfloat16: 10, 10 and 28 GB, PickScore included; in
float32 FLUX.1-dev alone would be 48. Its text encoders have the published widths and two layers, T5 one, as
they are let go before the first update: what they take until then is not measured.
"""
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rsaft  # noqa: E402, found through the line above

rsaft.quiet_libraries()                           # before diffusers' models are imported, which would warn
from diffusers import (AutoencoderKL, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline,
                       FluxTransformer2DModel, PNDMScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline,
                       StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel)
from transformers import (CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection,
                          CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer)

TINY = rsaft.HERE / "tiny"
NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def on_cpu(scheduler, **config):
    """Its numbers are there also where the models are made without storage (counted.py)."""
    with torch.device("cpu"):
        return scheduler(**config)


def clip(kind, width, layers, heads=12):
    """A text encoder of transformers, and the tokenizer of tiny/."""
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "pickscore", model_max_length=77)
    return kind(CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                               num_attention_heads=heads, projection_dim=width,
                               eos_token_id=tokenizer.eos_token_id)), tokenizer


def t5():
    """One thin layer of T5-XXL's width, and a tokenizer of tiny/'s words."""
    words = sorted(set((TINY / "prompts.txt").read_text().split()))
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    return T5EncoderModel(T5Config(vocab_size=len(vocabulary), d_model=4096, d_ff=1024, num_layers=1,
                                   num_heads=8)), T5Tokenizer(vocab=vocabulary)


def vae(**config):
    return AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                         down_block_types=("DownEncoderBlock2D",) * 4,
                         up_block_types=("UpDecoderBlock2D",) * 4, **config)


def stable_diffusion():
    """The shapes of stable-diffusion-v1-5, with the PNDM scheduler that the hub's copy comes with."""
    text, tokenizer = clip(CLIPTextModel, 768, 12)
    scheduler = on_cpu(PNDMScheduler, **NOISE, skip_prk_steps=True)
    scheduler.register_to_config(clip_sample=False)   # not PNDM's own, but the hub's file has it, for DDIM
    return StableDiffusionPipeline(
        vae=vae(sample_size=512), text_encoder=text, tokenizer=tokenizer, scheduler=scheduler,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def sdxl():
    """The shapes of stable-diffusion-xl-base-1.0: a UNet of 2.57 billion parameters."""
    first, tokenizer = clip(CLIPTextModel, 768, 2)
    second, _ = clip(CLIPTextModelWithProjection, 1280, 2, 20)
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=1280 + 6 * 256)
    return StableDiffusionXLPipeline(
        vae=vae(sample_size=1024, scaling_factor=0.13025), text_encoder=first, tokenizer=tokenizer, unet=unet,
        text_encoder_2=second, tokenizer_2=tokenizer, scheduler=on_cpu(EulerDiscreteScheduler, **NOISE),
        add_watermarker=False)


def sd3():
    """The shapes of stable-diffusion-3.5-medium: a transformer of 2.24 billion parameters."""
    kind = CLIPTextModelWithProjection
    (first, tokenizer), (second, _), (third, tokenizer_3) = clip(kind, 768, 2), clip(kind, 1280, 2, 20), t5()
    transformer = SD3Transformer2DModel(
        sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64,
        caption_projection_dim=1536, joint_attention_dim=4096, pooled_projection_dim=768 + 1280,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
    return StableDiffusion3Pipeline(
        vae=vae(sample_size=1024, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
                use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=first, tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer,
        text_encoder_3=third, tokenizer_3=tokenizer_3, transformer=transformer,
        scheduler=on_cpu(FlowMatchEulerDiscreteScheduler, shift=3.0))


def flux():
    """The shapes of FLUX.1-dev: a transformer of 11.9 billion parameters."""
    (first, tokenizer), (second, tokenizer_2) = clip(CLIPTextModel, 768, 2), t5()
    return FluxPipeline(
        vae=vae(sample_size=1024, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159,
                use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=first, tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=on_cpu(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True))


def pickscore():
    """The shapes of PickScore_v1, a CLIP ViT-H/14."""
    shape = rsaft.import_file(rsaft.HERE / "rewards" / "hpsv2.py").VIT_H
    return CLIPModel(CLIPConfig(**shape, logit_scale_init_value=4.6))


MODELS = {"stable-diffusion": stable_diffusion, "sdxl": sdxl, "sd3.5-medium": sd3, "flux.1-dev": flux}

if __name__ == "__main__":
    name = sys.argv[2] if len(sys.argv) == 3 else "stable-diffusion"
    if len(sys.argv) not in (2, 3) or name not in MODELS or Path(sys.argv[1]).exists():
        sys.exit(f"python experiments/full_size.py DIR [{' | '.join(MODELS)}], where DIR is a new folder")
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if name == "stable-diffusion" else torch.bfloat16)
    MODELS[name]().save_pretrained(folder / name)
    torch.set_default_dtype(torch.float32)
    pickscore().save_pretrained(folder / "pickscore")
    for file in "tokenizer.json", "tokenizer_config.json":
        shutil.copy(TINY / "pickscore" / file, folder / "pickscore" / file)
    print(f"made {folder / name} and {folder / 'pickscore'}")
