"""Make every model of the small world: `python tiny/build.py`, about half an hour on two CPU cores.

Parts that are there already are kept, so a stopped build goes on with the part it was in; delete a folder to
make it anew. Each part has its own seed. At the end, or at once when nothing is missing, all are measured.

    pickscore/           CLIPModel, the proxy reward: accurate and brittle (no augmentation)
    judge/               CLIPModel, held out: another seed, and trained under noise, blur and contrast
    stable-diffusion/    StableDiffusionPipeline: CLIPTokenizer, CLIPTextModel, UNet2DConditionModel,
                         AutoencoderKL
    stable-diffusion-3/  StableDiffusion3Pipeline, flow matching: two CLIPTextModelWithProjection, no T5,
                         SD3Transformer2DModel, and the autoencoder of stable-diffusion/

`python tiny/build.py words` makes the world of words instead, see build_words.py.
"""
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import (CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection,
                          CLIPTokenizer)

transformers.logging.set_verbosity_error()    # before diffusers, which would have it warn about torchvision
transformers.logging.disable_progress_bar()
import diffusers
from diffusers import (AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel)

diffusers.logging.disable_progress_bar()

from world import CAPTIONS, SIZE, oracle, sample

HERE = Path(__file__).parent
TOKENS = 16                                       # length of a padded prompt
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)   # CLIP's normalisation
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
UNET_STEPS, UNET_STOP = 3000, 1300    # stopped early on purpose: a base model with room to improve
FLOW_STEPS, FLOW_STOP = 4000, 1850                # the same for the flow model


def train(name, parameters, steps, peak, loss, stop=None, average=0.0):
    """AdamW under a one-cycle schedule of `steps` steps, ended after `stop`.

    loss: a function of the step's number that returns a scalar tensor.
    average: the rate of a moving average of the parameters, which takes their place at the end; 0: none.
    """
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps)
    means = [p.detach().clone() for p in parameters] if average else []
    progress = tqdm(range(stop or steps), desc=name, file=sys.stdout, mininterval=5)
    for step in progress:
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if average:
            torch._foreach_lerp_(means, [p.detach() for p in parameters], average)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{value.item():.4f}")
    with torch.no_grad():
        for p, mean in zip(parameters, means):
            p.copy_(mean)


def tokenizer():
    """A CLIPTokenizer over a byte-pair encoding of the captions: every word of theirs is one token."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,'!?-") | set("".join(words)))
    vocabulary, merges = letters + [letter + "</w>" for letter in letters], []
    for word in words:
        pieces = list(word[:-1]) + [word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1]] + pieces[2:]
            vocabulary.append(pieces[0])
    vocabulary = list(dict.fromkeys(vocabulary)) + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)},
                         merges=list(dict.fromkeys(merges)), model_max_length=TOKENS)


def tokens(tokenizer, prompts):
    return tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                     return_tensors="pt").input_ids


def text_config(tokenizer, width=64):
    # eos_token_id must be the real one: CLIPTextModel pools at its first occurrence (2 means an older rule).
    return dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
                num_hidden_layers=2, num_attention_heads=4, hidden_act="gelu",
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)


def augment(images, generator):
    """Noise, blur and contrast of random strength, for the judge: what must not change its mind."""
    n = len(images)
    strength = torch.rand(4, n, 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, strength[0])
    images = (images - 0.5) * (0.7 + 0.6 * strength[1]) + 0.5 + 0.2 * (strength[2] - 0.5)
    return (images + 0.15 * strength[3] * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def clip_scores(model, ids, images):
    """exp(logit_scale) * cosine of every image with every text, (images, texts)."""
    image = model.visual_projection(model.vision_model(pixel_values=(images - MEAN) / STD).pooler_output)
    text = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    return model.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def build_clip(folder, name, seed, steps, augmented=False, pictures=None):
    """A contrastive model of pictures and captions. One batch holds each caption exactly once.

    pictures: train on so many of each caption, drawn once and used over and over; without it all are new.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    words = tokenizer()
    vision = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                  image_size=SIZE, patch_size=4, hidden_act="gelu")
    config = CLIPConfig(text_config=text_config(words), vision_config=vision, projection_dim=64)
    model = CLIPModel(config).train()
    ids, target = tokens(words, CAPTIONS), torch.arange(len(CAPTIONS))
    drawn = [sample(target, generator) for _ in range(pictures or 0)]

    def loss(step):
        images = drawn[step % pictures] if drawn else sample(target, generator)
        scores = clip_scores(model, ids, augment(images, generator) if augmented else images)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2

    train(name, list(model.parameters()), steps, 2e-3, loss)
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)


def build_vae(folder, sample=sample, kinds=len(CAPTIONS), size=SIZE, seed=2, steps=3000, batch=16):
    """AutoencoderKL with 4 channels and a quarter of the side; scaling_factor makes the latents' deviation 1.

    sample: a function of numbers below `kinds`, (B,), and a generator to pictures of `size`.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKL(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8,
                        latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 3,
                        up_block_types=("UpDecoderBlock2D",) * 3,
                        sample_size=size).train()

    def loss(step):
        images = 2 * sample(torch.randint(kinds, (batch,), generator=generator), generator) - 1
        latents = vae.encode(images).latent_dist
        error = vae.decode(latents.sample(generator)).sample - images
        return error.square().mean() + 0.1 * error.abs().mean() + 1e-6 * latents.kl().mean()

    train("vae", list(vae.parameters()), steps, 2e-3, loss)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(2 * sample(torch.arange(kinds), generator) - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(folder)


def load_vae(folder):
    vae = AutoencoderKL.from_pretrained(folder).eval()
    vae.register_to_config(_name_or_path="vae")                # else this machine's path would be saved
    return vae


def encode_pictures(vae, generator, sample=sample, kinds=len(CAPTIONS), each=200, batch=288):
    """The data set of a diffusion model: `each` pictures of every kind, encoded, not yet scaled.

    Returns the numbers of their kinds, (kinds each,), and the latents, (kinds each, 4, h, w).
    """
    numbers = torch.arange(kinds).repeat(each)
    with torch.no_grad():
        parts = tqdm(numbers.split(batch), desc="encode", file=sys.stdout, mininterval=5)
        return numbers, torch.cat([vae.encode(2 * sample(part, generator) - 1).latent_dist.mode()
                                   for part in parts])


def make_scheduler():
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing")


def build_unet(folder, vae_folder, stop=UNET_STOP):
    """UNet and text encoder, trained together to predict the noise; saved is a moving average."""
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(3)
    words, vae = tokenizer(), load_vae(vae_folder)
    text = CLIPTextModel(CLIPTextConfig(**text_config(words), projection_dim=64))
    unet = UNet2DConditionModel(sample_size=SIZE // 4, block_out_channels=(32, 64), layers_per_block=1,
                                cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8,
                                down_block_types=("CrossAttnDownBlock2D",) * 2,
                                up_block_types=("CrossAttnUpBlock2D",) * 2)
    scheduler = make_scheduler()
    captions, latents = encode_pictures(vae, generator)
    latents = latents * vae.config.scaling_factor
    ids, empty = tokens(words, CAPTIONS), tokens(words, [""])
    parameters = list(unet.parameters()) + list(text.parameters())

    def loss(step):
        pick = torch.randint(len(latents), (48,), generator=generator)
        x, noise = latents[pick], torch.randn(48, *latents.shape[1:], generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (48,), generator=generator)
        drop = torch.rand(48, 1, generator=generator) < 0.1            # for classifier-free guidance
        embeds = text(torch.where(drop, empty, ids[captions[pick]])).last_hidden_state
        return F.mse_loss(unet(scheduler.add_noise(x, noise, t), t, embeds).sample, noise)

    train("unet", parameters, UNET_STEPS, 2.5e-3, loss, stop, average=0.01)
    StableDiffusionPipeline(vae=vae, text_encoder=text.eval(), tokenizer=words, unet=unet.eval(),
                            scheduler=scheduler, safety_checker=None, feature_extractor=None,
                            requires_safety_checker=False).save_pretrained(folder)


def build_flow(folder, vae_folder, stop=FLOW_STOP):
    """SD3Transformer2DModel and both text encoders, trained together to predict the velocity noise - x.

    The text is what the pipeline's own encode_prompt gives: the tokens of both encoders side by side, then as
    many zeros for the T5 that isn't there.
    """
    torch.manual_seed(4)
    generator = torch.Generator().manual_seed(4)
    words, vae = tokenizer(), load_vae(vae_folder)
    # The second encoder is there because the pipeline wants two, so it is the smaller.
    texts = [CLIPTextModelWithProjection(CLIPTextConfig(**text_config(words, width), projection_dim=width))
             for width in (64, 32)]
    transformer = SD3Transformer2DModel(sample_size=SIZE // 4, patch_size=2, in_channels=4, out_channels=4,
                                        num_layers=3, num_attention_heads=5, attention_head_dim=16,
                                        caption_projection_dim=80, joint_attention_dim=64 + 32,
                                        pooled_projection_dim=64 + 32, qk_norm="rms_norm",
                                        pos_embed_max_size=SIZE // 4)  # room for pictures of twice the size
    captions, latents = encode_pictures(vae, generator)
    vae.register_to_config(shift_factor=latents.mean().item())         # SD3's pipeline can't do without one
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    pipe = StableDiffusion3Pipeline(vae=vae, text_encoder=texts[0], tokenizer=words, text_encoder_2=texts[1],
                                    tokenizer_2=words, text_encoder_3=None, tokenizer_3=None,
                                    transformer=transformer,
                                    scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    parameters = [p for model in (transformer, *texts) for p in model.parameters()]

    def loss(step):
        pick = torch.randint(len(latents), (48,), generator=generator)
        x, noise = latents[pick], torch.randn(48, *latents.shape[1:], generator=generator)
        sigma = torch.randn(48, generator=generator).sigmoid()     # logit-normal, as SD3: less of both ends
        drop = torch.rand(48, generator=generator) < 0.1           # for classifier-free guidance
        prompts = ["" if dropped else CAPTIONS[i] for i, dropped in zip(captions[pick], drop)]
        noisy = torch.lerp(x, noise, sigma[:, None, None, None])
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False,
                                                  max_sequence_length=TOKENS)
        return F.mse_loss(transformer(noisy, embeds, pooled, 1000 * sigma).sample, noise - x)

    train("flow", parameters, FLOW_STEPS, 4e-3, loss, stop, average=0.01)
    pipe.save_pretrained(folder)


@torch.no_grad()
def measure(root=HERE):
    """Print how good the models are. Nothing here decides anything: it is what tiny/README.md quotes."""
    generator = torch.Generator().manual_seed(1000)
    captions = torch.arange(len(CAPTIONS)).repeat(4)
    prompts, words = [CAPTIONS[i] for i in captions], tokenizer()
    pipe = StableDiffusionPipeline.from_pretrained(root / "stable-diffusion", safety_checker=None)
    # Without the two Nones diffusers refuses a folder that has no T5.
    flow = StableDiffusion3Pipeline.from_pretrained(root / "stable-diffusion-3", text_encoder_3=None,
                                                    tokenizer_3=None)

    def draw(pipe, **length):
        pipe.set_progress_bar_config(disable=True)
        return pipe(prompts, num_inference_steps=10, guidance_scale=3.0, height=SIZE, width=SIZE,
                    output_type="pt", generator=generator, **length).images

    real = sample(captions, generator)
    code = pipe.vae.encode(2 * real - 1).latent_dist.mode()
    decoded = (pipe.vae.decode(code).sample / 2 + 0.5).clamp(0, 1)
    base = draw(pipe)
    noisy = (real + 0.1 * torch.randn(real.shape, generator=generator)).clamp(0, 1)
    print(f"autoencoder: {-10 * F.mse_loss(decoded, real).log10():.1f} dB")
    for name, images in {"real": real, "real + noise 0.1": noisy, "autoencoded": decoded, "base model": base,
                         "flow model": draw(flow, max_sequence_length=TOKENS)}.items():
        verdict = oracle(images, prompts)
        row = [f"oracle rmse {verdict['rmse'].mean():.3f} accuracy {verdict['accuracy'].mean():.2f}"]
        for model in "pickscore", "judge":
            scores = clip_scores(CLIPModel.from_pretrained(root / model), tokens(words, CAPTIONS), images)
            row.append(f"{model} {scores[torch.arange(len(captions)), captions].mean():.2f} "
                       f"accuracy {(scores.argmax(1) == captions).float().mean():.2f}")
        print(f"{name:>18}: " + ", ".join(row))


def main():
    """Build what is missing, each part into a temporary folder that is renamed when it is whole."""
    vae = HERE / "stable-diffusion.vae"           # kept apart until the pipeline is whole
    parts = {HERE / "pickscore": lambda f: build_clip(f, "pickscore", seed=0, steps=2000),
             HERE / "judge": lambda f: build_clip(f, "judge", seed=1, steps=2000, augmented=True),
             HERE / "stable-diffusion": lambda f: build_unet(f, vae),
             HERE / "stable-diffusion-3": lambda f: build_flow(f, HERE / "stable-diffusion" / "vae")}
    if not (HERE / "stable-diffusion").exists():
        parts = {vae: build_vae, **parts}
    for folder, build in parts.items():
        if folder.exists():
            print(f"{folder.name}: there already")
            continue
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        build(partial)
        partial.rename(folder)
    shutil.rmtree(vae, ignore_errors=True)
    measure()


if __name__ == "__main__":
    if sys.argv[1:] == ["words"]:                 # the other small world
        from build_words import main
    main()
