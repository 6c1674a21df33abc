"""What `python tiny/build.py words` makes, in the folder words/: under 45 minutes on two CPU cores.

    glyphs.safetensors    masks of the letters, drawn from the DejaVu fonts of matplotlib
    prompts.txt           the prompts of all words, shuffled
    model_index.json ...  StableDiffusionPipeline of 32x96 pictures

As in build.py, what is there is kept; delete it to make it anew. Then the pipeline is measured, with the
readers of rewards/ (`pip install -r rewards/requirements.txt`).
"""
import random
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
# First, as it quiets the libraries.
from build import build_vae, encode_pictures, load_vae, make_scheduler, text_config, tokens, train
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from words import world

HERE = Path(__file__).parent / "words"
FONTS, SIZES = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold"), (20, 22, 24)
TOKENS = 12                           # length of a padded prompt
UNET_STEPS, UNET_STOP = 3000, 1700    # stopped early on purpose: a base model that leaves room to improve


def build_glyphs(path):
    """Draw each letter in each font and size, in the middle of its mask's height; a safetensors file."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    height, width = 24, 28
    masks = torch.zeros(len(FONTS), len(SIZES), len(world.LETTERS), height, width, dtype=torch.uint8)
    advances = torch.zeros(masks.shape[:3], dtype=torch.long)
    for f, name in enumerate(FONTS):
        for s, size in enumerate(SIZES):
            font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf", f"{name}.ttf")), size)
            _, top, _, bottom = font.getbbox("E", anchor="ls")
            origin = world.BEARING, (height - top - bottom) // 2
            for i, letter in enumerate(world.LETTERS):
                canvas = Image.new("L", (width, height))
                ImageDraw.Draw(canvas).text(origin, letter, 255, font, anchor="ls")
                pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
                masks[f, s, i], advances[f, s, i] = pixels.view(height, width), round(font.getlength(letter))
    save_file({"masks": masks, "advances": advances}, path)


def tokenizer():
    """A CLIPTokenizer with a token for each letter; "the" and "word" are one token each. It lower-cases."""
    letters = sorted("abcdefghijklmnopqrstuvwxyz0123456789.,'!?-\"")
    merges = [("t", "h"), ("th", "e</w>"), ("w", "o"), ("wo", "r"), ("wor", "d</w>")]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges),
                  "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges,
                         model_max_length=TOKENS)


def build_pipeline(folder, vae_folder, stop=UNET_STOP):
    """UNet and text encoder, trained together to predict the noise; a moving average is saved."""
    torch.manual_seed(11)
    generator = torch.Generator().manual_seed(11)
    words, vae = tokenizer(), load_vae(vae_folder)
    text = CLIPTextModel(CLIPTextConfig(**text_config(words), projection_dim=64))
    unet = UNet2DConditionModel(
        sample_size=[world.HEIGHT // 4, world.WIDTH // 4], block_out_channels=(48, 96), layers_per_block=1,
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2)
    scheduler = make_scheduler()
    drawn, latents = encode_pictures(vae, generator, world.sample, len(world.WORDS), each=150, batch=100)
    latents = latents * vae.config.scaling_factor
    ids, empty = tokens(words, world.PROMPTS), tokens(words, [""])
    parameters = list(unet.parameters()) + list(text.parameters())
    # Min-SNR weighting (arXiv 2303.09556): else what little noise the last steps have outweighs the letters.
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = snr.clamp(max=5) / snr

    def loss(step):
        pick = torch.randint(len(latents), (32,), generator=generator)
        x, noise = latents[pick], torch.randn(32, *latents.shape[1:], generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (32,), generator=generator)
        drop = torch.rand(32, 1, generator=generator) < 0.1    # for classifier-free guidance
        embeds = text(torch.where(drop, empty, ids[drawn[pick]])).last_hidden_state
        error = unet(scheduler.add_noise(x, noise, t), t, embeds).sample - noise
        return (weight[t] * error.square().mean((1, 2, 3))).mean()

    train("unet", parameters, UNET_STEPS, 2e-3, loss, stop, average=0.01)
    # Half precision on disk, for its size. diffusers loads it as float32 again; transformers would not.
    StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text.eval(), tokenizer=words, unet=unet.eval().half(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).save_pretrained(folder)


@torch.no_grad()
def measure():
    """Print how good the pipeline is. Nothing here decides anything: it is what tiny/README.md quotes."""
    sys.path.insert(0, str(HERE.parent.parent))
    import rsaft
    generator = torch.Generator().manual_seed(1000)
    words = torch.arange(len(world.WORDS)).repeat(4)
    prompts = [world.PROMPTS[word] for word in words]
    pipe = StableDiffusionPipeline.from_pretrained(HERE, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    real = world.sample(words, generator)
    latents = pipe.vae.encode(2 * real - 1).latent_dist.mode()
    decoded = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    base = pipe(prompts, num_inference_steps=10, guidance_scale=3.0, output_type="pt",
                generator=generator).images
    print(f"autoencoder: {-10 * F.mse_loss(decoded, real).log10():.1f} dB")
    rewards = {name: rsaft.make_reward(name) for name in ("ocr_likelihood", "ocr", "ocr_v4")}
    for name, images in {"real": real, "autoencoded": decoded, "base model": base}.items():
        verdict = world.oracle(images, prompts)
        row = [f"oracle {key} {value.mean():.3f}" for key, value in verdict.items()]
        for reader, reward in rewards.items():
            scores = torch.cat([reward(images[i:i + 20], prompts[i:i + 20])
                                for i in range(0, len(prompts), 20)])
            row.append(f"{reader} {scores.mean():.3f}")
            if reader != "ocr_likelihood":
                row[-1] += f" of the letters, {(scores == 1).float().mean():.2f} of the words"
        print(f"{name:>12}: " + ", ".join(row))


def main():
    """Build what is missing. The pipeline is made in a folder apart and moved when whole, its index last."""
    if not (HERE / "glyphs.safetensors").exists():
        build_glyphs(HERE / "glyphs.safetensors")
    if not (HERE / "prompts.txt").exists():
        shuffled = random.Random(0).sample(world.PROMPTS, len(world.PROMPTS))
        (HERE / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in shuffled))
    vae, pipeline = HERE.with_name("words.vae"), HERE.with_name("words.partial")
    if (HERE / "model_index.json").exists():
        print("words: there already")
    else:
        if not vae.exists():
            partial = HERE.with_name("words.vae.partial")
            size = [world.HEIGHT, world.WIDTH]
            build_vae(partial, world.sample, len(world.WORDS), size, seed=10, steps=1600, batch=8)
            partial.rename(vae)
        build_pipeline(pipeline, vae)
        for part in sorted(pipeline.iterdir(), key=lambda part: part.name == "model_index.json"):
            shutil.rmtree(HERE / part.name, ignore_errors=True)
            part.rename(HERE / part.name)
        pipeline.rmdir()
    shutil.rmtree(vae, ignore_errors=True)
    measure()
