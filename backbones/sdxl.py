"""Stable Diffusion XL (arXiv 2307.01952): a UNet that attends to two text encoders, sampled by DDIM.

Trained are the UNet's attention projections. Defaults: 1024 px, 50 steps, guidance 5; paper: 1024 px, 50
steps. The hub's copy comes with Euler's scheduler; its noise levels are taken over by DDIM. Its VAE overflows
in float16, which --dtype doesn't offer.
"""
from rsaft import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    pipeline, pipeline_options = "StableDiffusionXLPipeline", {"add_watermarker": False}
    encoder_names = ("text_encoder", "text_encoder_2")
    guidance_scale = 5.0

    def step_table(self, sampling_steps):
        if not hasattr(self.pipe.scheduler, "alphas_cumprod"):    # EDM's, of Playground v2.5
            raise ValueError(f"DDIM can't take over the noise levels of {type(self.pipe.scheduler).__name__}")
        return super().step_table(sampling_steps)

    def encode(self, prompt):
        embeds, no_embeds, pooled, no_pooled = self.pipe.encode_prompt(prompt, device=self.device)
        # Without a prompt, zeros where force_zeros_for_empty_prompt says so, and not what "" is encoded as.
        return [embeds, pooled] if prompt else [no_embeds, no_pooled]

    def predict(self, x, t, embeds, pooled):
        _, h, w = self.latent_shape
        height, width = h * self.pipe.vae_scale_factor, w * self.pipe.vae_scale_factor
        # Original size, upper left corner of the crop, size: an uncropped picture of this one.
        time_ids = pooled.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)
        return self.network(x.to(embeds.dtype), t, encoder_hidden_states=embeds,
                            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}).sample


FAMILY = StableDiffusionXL
