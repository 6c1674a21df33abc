"""Z-Image (arXiv 2511.22699): a transformer on picture and text tokens, and flow matching, sampled by Euler.

Trained are all attention projections. Defaults: 1024 px, 50 steps, guidance 5. The pipeline of diffusers
counts its guidance from 0: what is 5 here, and everywhere else, is 4 there. Z-Image-Turbo is distilled, and
takes --sampling-steps 9 --guidance-scale 1.
"""
import torch
import torch.nn.functional as F

from rsaft import Backbone, flow_steps

LONGEST = 512    # tokens of a prompt, as the pipeline truncates it


class ZImage(Backbone):
    pipeline = "ZImagePipeline"
    network_name, network_class = "transformer", "ZImageTransformer2DModel"
    patch_size = 2
    guidance_scale = 5.0

    @classmethod
    def geometry(cls, network, vae):
        return super().geometry({"in_channels": network["in_channels"], "sample_size": 128}, vae)

    def pipeline_arguments(self, latents, guidance_scale):
        return {"latents": latents, "guidance_scale": guidance_scale - 1}

    def step_table(self, sampling_steps):
        _, h, w = self.latent_shape
        return flow_steps(self.pipe.scheduler, sampling_steps, h // 2 * (w // 2), even=True)

    def encode(self, prompt):
        (embeds,), _ = self.pipe.encode_prompt(prompt, self.device, do_classifier_free_guidance=False)
        # Prompts have their own lengths here, (L, C); filled up, so that they make a batch.
        return [F.pad(embeds, (0, 0, 0, LONGEST - len(embeds)))[None], torch.tensor([len(embeds)])]

    def predict(self, x, t, embeds, lengths):
        texts = [text[:length] for text, length in zip(embeds, lengths.tolist())]
        f = self.network(list(x.to(embeds.dtype)[:, :, None]), x.new_full((len(x),), 1 - t / 1000), texts,
                         return_dict=False)[0]
        return -torch.stack(f)[:, :, 0]    # it answers with x0 - noise


FAMILY = ZImage
