"""Models of full size and random weights, for measuring what they cost on a machine without a hub.

    python experiments/full_size.py DIR
    python rsaft.py --model DIR/stable-diffusion --models DIR --reward pickscore --sam --noise

makes Stable Diffusion 1.5 and PickScore (CLIP ViT-H/14) in their own shapes, 7.5 GB. The pictures are noise;
time, memory and the flow of the gradient are those of the real models. The tokenizers are those of tiny/.
"""
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rsaft  # noqa: E402, found through the line above

rsaft.quiet_libraries()                           # before diffusers' models are imported, which would warn
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TINY = rsaft.HERE / "tiny"


def stable_diffusion():
    """The shapes of stable-diffusion-v1-5, with the PNDM scheduler that the hub's copy comes with."""
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "pickscore", model_max_length=77)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                        num_attention_heads=12, eos_token_id=tokenizer.eos_token_id))
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
                        down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              steps_offset=1, skip_prk_steps=True)
    scheduler.register_to_config(clip_sample=False)   # not PNDM's own, but the hub's file has it, for DDIM
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)


def pickscore():
    """The shapes of PickScore_v1, a CLIP ViT-H/14."""
    shape = rsaft.import_file(rsaft.HERE / "rewards" / "hpsv2.py").VIT_H
    return CLIPModel(CLIPConfig(**shape, logit_scale_init_value=4.6))


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("python experiments/full_size.py DIR, where DIR is a new folder")
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    stable_diffusion().save_pretrained(folder / "stable-diffusion")
    pickscore().save_pretrained(folder / "pickscore")
    for name in "tokenizer.json", "tokenizer_config.json":
        shutil.copy(TINY / "pickscore" / name, folder / "pickscore" / name)
    print(f"made {folder / 'stable-diffusion'} and {folder / 'pickscore'}")
