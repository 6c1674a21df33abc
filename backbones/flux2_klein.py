"""FLUX.2 [klein] (published without a paper): a transformer and flow matching, sampled by Euler.

Trained are the attention projections of the picture's tokens, and the single blocks' fused projections, which
serve all tokens and the feed-forward part too. Defaults: 1024 px, 50 steps, guidance 4, for the base models;
distilled ones take no guidance: --sampling-steps 4 --guidance-scale 1. A latent here is a square of 2x2 of
the VAE's, its channels outermost, normalised by the statistics that the VAE comes with.
"""
import torch
import torch.nn.functional as F

from rsaft import Backbone, UserError, flow_steps


class Flux2Klein(Backbone):
    pipeline = "Flux2KleinPipeline"
    network_name, network_class = "transformer", "Flux2Transformer2DModel"
    vae_class = "AutoencoderKLFlux2"
    lora_targets = (*Backbone.lora_targets, "to_qkv_mlp_proj", "to_out")
    guidance_scale = 4.0

    @classmethod
    def geometry(cls, network, vae):
        return (network["in_channels"], 64, 64), 2 ** len(vae["block_out_channels"])

    def step_table(self, sampling_steps):
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
        _, h, w = self.latent_shape
        mu = compute_empirical_mu(h * w, sampling_steps)
        return flow_steps(self.pipe.scheduler, sampling_steps, h * w, even=True, mu=mu)

    def branches_at(self, guidance_scale):
        if guidance_scale > 1 and self.pipe.config.is_distilled:
            raise UserError("this FLUX.2 is distilled and takes no guidance: the scale must be 1, not "
                            f"{guidance_scale:g} (--guidance-scale, and --anchor-scale of CRD)")
        return super().branches_at(guidance_scale)

    def encode(self, prompt):
        return [self.pipe.encode_prompt(prompt, device=self.device)[0]]

    def predict(self, x, t, embeds):
        (B, _, h, w), words = x.shape, embeds.shape[1]
        # Where a token is: number of the picture, row, column, place in the text.
        picture, text = (torch.cartesian_prod(*map(torch.arange, sizes)).to(x.device)
                         for sizes in ((1, h, w, 1), (1, 1, 1, words)))
        f = self.network(hidden_states=x.flatten(2).transpose(1, 2).to(embeds.dtype), img_ids=picture,
                         encoder_hidden_states=embeds, txt_ids=text, timestep=x.new_full((B,), t / 1000))
        return f.sample.transpose(1, 2).unflatten(2, (h, w))

    def to_vae(self, latents):
        bn = self.vae.bn
        mean, std = bn.running_mean.float(), (bn.running_var.float() + bn.eps).sqrt()
        return F.pixel_shuffle(latents * std[:, None, None] + mean[:, None, None], 2)

    def from_vae(self, encoded):
        mean, variance = self.vae.bn.running_mean.float(), self.vae.bn.running_var.float()
        return F.batch_norm(F.pixel_unshuffle(encoded, 2), mean, variance, eps=self.vae.bn.eps)


FAMILY = Flux2Klein
