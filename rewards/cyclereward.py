"""CycleReward-Combo (arXiv 2506.02095), BLIP and a head: cycle consistency was learnt, not people's taste."""
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from rsaft import import_file

imagereward = import_file(Path(__file__).with_name("imagereward.py"))
FILES = {"model.safetensors": "NagaSaiAbhinay/CycleReward-Combo",
         "tokenizer_config.json": imagereward.FILES["tokenizer_config.json"]}


def load(folders, device):
    state = load_file(Path(folders["model.safetensors"], "model.safetensors"))
    features = imagereward.load_blip(state, folders["tokenizer_config.json"], 128, device)
    layers = []
    for i in "02468":
        layers += [nn.Linear(*state[f"mlp.layers.{i}.weight"].shape[::-1]), nn.GELU()]
    head = nn.Sequential(*layers[:-1])
    head.load_state_dict(imagereward.take(state, "mlp.layers."))
    if state:
        raise ValueError(f"unexpected keys {list(state)}")
    head.to(device).requires_grad_(False)
    return lambda images, prompts: head(features(images, prompts))[:, 0]
