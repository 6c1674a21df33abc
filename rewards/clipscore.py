"""CLIPScore (arXiv 2104.08718) as 100 * cosine under CLIP ViT-L/14."""
from rsaft import clip_reward, load_complete

CLIP_L = "openai/clip-vit-large-patch14"
FILES = {"config.json": CLIP_L, "tokenizer_config.json": CLIP_L}


def load(folders, device):
    from transformers import CLIPModel
    model = load_complete(CLIPModel, folders["config.json"])
    return clip_reward(model, folders["tokenizer_config.json"], device, 100.0)
