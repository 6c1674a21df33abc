"""The LAION aesthetic predictor, a linear head on CLIP ViT-L/14: about 1 to 10. It ignores the prompt."""
import torch.nn.functional as F

from _original import linear_head, load_original
from rsaft import embed_images, load_complete

FILES = {"config.json": "openai/clip-vit-large-patch14",
         "aesthetic-model.pth": "trl-lib/ddpo-aesthetic-predictor"}


def load(folders, device):
    from transformers import CLIPModel
    clip = load_complete(CLIPModel, folders["config.json"]).to(device)
    head = linear_head(load_original(folders, "aesthetic-model.pth")).to(device).requires_grad_(False)
    return lambda images, prompts: head(F.normalize(embed_images(clip, images), dim=-1))[:, 0]
