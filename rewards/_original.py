"""What the rewards need whose authors published a .pt file in a layout of their own."""
import re
from pathlib import Path

from torch import nn

from rsaft import load_tensors


def load_original(folders, name):
    """The tensors of the file `name` of a reward; never a pickle that could run code. Raises UserError."""
    return load_tensors(Path(folders[name], name))


def renamed(state, rules):
    """A checkpoint under new names: each of the (pattern, replacement) rules applied to each key in turn."""
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, key): tensor for key, tensor in state.items()}
    return state


def linear_head(state):
    """The five linear layers, with nothing between them, that end ImageReward and the aesthetic predictor."""
    layers = nn.ModuleDict({i: nn.Linear(*state[f"layers.{i}.weight"].shape[::-1]) for i in "02467"})
    nn.ModuleDict({"layers": layers}).load_state_dict(state)
    return nn.Sequential(*layers.values())
