"""FLUX.1 (published without a paper): a transformer and flow matching, sampled by Euler.

Guidance is an input of the network and not a second branch, so a step is one evaluation. Trained are the
attention projections of the picture's tokens, and in the single blocks those of all tokens; those of the
text's, add_q_proj to to_add_out, stay frozen. Defaults: 1024 px, 28 steps, guidance 3.5, for FLUX.1-dev;
GDRO: 512 px. FLUX.1-schnell knows no guidance and takes --sampling-steps 4 --guidance-scale 1. At this size
--dtype bfloat16 and --gradient-checkpointing.
"""
import torch
import torch.nn.functional as F

from rsaft import Backbone, UserError, flow_steps


def to_tokens(latents):
    """(B, C, 2h, 2w) to (B, h w, 4 C): each token is a square of 2x2, its channels outermost."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


class Flux(Backbone):
    pipeline = "FluxPipeline"
    network_name, network_class = "transformer", "FluxTransformer2DModel"
    encoder_names = ("text_encoder", "text_encoder_2")
    patch_size = 2
    guidance_is_input = True
    sampling_steps, guidance_scale = 28, 3.5

    @classmethod
    def geometry(cls, network, vae):
        return super().geometry({"in_channels": network["in_channels"] // 4, "sample_size": 128}, vae)

    def pipeline_arguments(self, latents, guidance_scale):
        return {"latents": to_tokens(latents), "guidance_scale": guidance_scale}

    def step_table(self, sampling_steps):
        _, h, w = self.latent_shape
        return flow_steps(self.pipe.scheduler, sampling_steps, h // 2 * (w // 2), even=True)

    def encode(self, prompt):
        return list(self.pipe.encode_prompt(prompt, device=self.device)[:2])

    def branches_at(self, guidance_scale):
        if guidance_scale > 1 and not self.network.config.guidance_embeds:
            raise UserError("this FLUX.1 is distilled and takes no guidance: the scale must be 1, not "
                            f"{guidance_scale:g} (--guidance-scale, and --anchor-scale of CRD)")
        return 1

    def predict(self, x, t, embeds, pooled, guidance):
        h, w = x.shape[2] // 2, x.shape[3] // 2
        places = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(w)).to(x)    # (h w, 3)
        f = self.network(
            hidden_states=to_tokens(x).to(embeds.dtype), timestep=x.new_full((len(x),), t / 1000),
            guidance=guidance if self.network.config.guidance_embeds else None, pooled_projections=pooled,
            encoder_hidden_states=embeds, txt_ids=x.new_zeros(embeds.shape[1], 3), img_ids=places).sample
        return F.pixel_shuffle(f.transpose(1, 2).unflatten(2, (h, w)), 2)


FAMILY = Flux
