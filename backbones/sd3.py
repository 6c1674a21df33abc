"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer (MMDiT) and flow matching, sampled by Euler.

Trained are the attention projections of the picture's tokens (also those of SD3.5's second attention); those
of the text's, add_q_proj to to_add_out, stay frozen. Defaults: 1024 px, 28 steps, guidance 7; paper: 1024
px, 28 steps; usual for SD3.5 is guidance 4.5. The third text encoder, T5-XXL, may be null in
model_index.json: zeros take its place, as many as a prompt has CLIP tokens. diffusers has 256 by default; for
the same pictures give its pipeline max_sequence_length=pipe.tokenizer_max_length.
"""
from rsaft import Backbone, flow_steps


class StableDiffusion3(Backbone):
    pipeline = "StableDiffusion3Pipeline"
    network_name, network_class = "transformer", "SD3Transformer2DModel"
    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    may_be_null = ("text_encoder_3", "tokenizer_3")
    patch_size = 2
    sampling_steps, guidance_scale = 28, 7.0

    @property
    def t5_length(self):    # told by the tokenizer, as the text encoder is let go
        return 256 if self.pipe.tokenizer_3 else self.pipe.tokenizer_max_length

    def step_table(self, sampling_steps):
        _, h, w = self.latent_shape
        return flow_steps(self.pipe.scheduler, sampling_steps, h // 2 * (w // 2))

    def pipeline_arguments(self, latents, guidance_scale):
        return super().pipeline_arguments(latents, guidance_scale) | {"max_sequence_length": self.t5_length}

    def encode(self, prompt):
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt, None, None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.t5_length)
        return [embeds, pooled]

    def predict(self, x, t, embeds, pooled):
        # By name: unlike a UNet's, its second argument is the text. The timestep is in the scheduler's unit.
        return self.network(hidden_states=x.to(embeds.dtype), timestep=x.new_full((len(x),), t),
                            encoder_hidden_states=embeds, pooled_projections=pooled).sample


FAMILY = StableDiffusion3
