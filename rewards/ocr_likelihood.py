"""How likely a text recogniser thinks the wanted text, with gradients: PP-OCRv6 small out of rapidocr, in torch.

The picture is taken for one line of text. What the prompt has in double quotes is wanted, in lower case and without
spaces, as in ocr.py. Three scores of one likelihood p, the recogniser's (by CTC), a geometric mean per letter:

    --reward ocr_likelihood                              log p: 0 where it reads right, less by 2 to 3 for each wrong
                                                         one of four letters. Easily hacked: it pays for being
                                                         illegible, as an unsure reader beats one that is surely wrong
    --reward rewards/ocr_likelihood.py:ocr_floor         log(p + e^-3), -3 to 0.05: beyond recognition all is alike
    --reward rewards/ocr_likelihood.py:ocr_views         log p, its mean over random views of the picture
"""
import functools
import math

import torch
import torch.nn.functional as F

from _onnx import OnnxModule
from _reading import folded, package_file, wanted_text
from rsaft import named_generator

FILES = {}      # the weights come with the package
check_prompt = wanted_text
MODEL = package_file("rapidocr", "models/PP-OCRv6_rec_small.onnx")
HEIGHT = 48     # of a line of text, in pixels
VIEWS = 4       # of each picture


@functools.cache
def recogniser(device):
    """The network to its logits, the number of the letter that each class counts for, and {letter: number}.

    Capitals count for small letters and the space for CTC's blank, which has number 0. Without that, a word with
    margins that the reader takes for spaces would count as wrong.
    """
    network = OnnxModule(MODEL, logits=True).to(device)
    classes = ["", *network.metadata["character"].split("\n"), " "]
    numbers = {letter: i for i, letter in enumerate(dict.fromkeys(map(folded, classes)))}
    return network, torch.tensor([numbers[folded(letter)] for letter in classes], device=device), numbers


def as_line(images):
    """Pictures (B, 3, H, W) in [0, 1] as the recogniser takes them: (B, 3, 48, w) in [-1, 1], blue first."""
    H, W = images.shape[-2:]
    line = F.interpolate(images, (HEIGHT, math.ceil(HEIGHT * W / H)), mode="bilinear", antialias=True)
    return 2 * line.flip(1) - 1


def ctc_log_likelihood(logits, counts_for, targets):
    """The log-likelihood of each target by CTC, over its length, (B,).

    logits: (B, T, classes); counts_for: (classes,), the number of the letter that a class counts for, 0 for the
    blank; targets: B lists of such numbers. Minus infinity where T has no room for a target.
    """
    letters = logits.new_zeros(*logits.shape[:2], counts_for.max() + 1)
    letters = letters.index_add(2, counts_for, logits.softmax(-1))
    log_p = letters.clamp_min(torch.finfo(letters.dtype).tiny).log()
    B, T, _ = log_p.shape
    lengths = torch.tensor([len(target) for target in targets])
    # Trap: the gradient of torch's CTC is right only where the log-probabilities are normalised, as they are here.
    loss = F.ctc_loss(log_p.transpose(0, 1), torch.tensor(sum(targets, [])).to(log_p.device),
                      torch.full((B,), T), lengths, reduction="none")
    return -loss / lengths.to(loss)


def log_likelihood(images, prompts):
    """log p of the wanted texts, (B,); images: (B, 3, H, W) in [0, 1]. Raises ValueError where they can't be read."""
    network, counts_for, numbers = recogniser(images.device)
    texts = [folded(wanted_text(prompt)) for prompt in prompts]
    unknown = sorted(set("".join(texts)) - numbers.keys())
    if unknown:
        raise ValueError(f"the recogniser doesn't know the letters {' '.join(unknown)}")
    line = as_line(images)
    scores = ctc_log_likelihood(network(line), counts_for, [[numbers[letter] for letter in text] for text in texts])
    if scores.isinf().any():
        raise ValueError(f"the pictures are too narrow: as a line of text {tuple(line.shape[2:])} pixels in size "
                         f"they have no room for {max(texts, key=len)!r}")
    return scores


def ocr_floor(images, prompts):
    """log(p + e^-3), (B,)."""
    return torch.logaddexp(log_likelihood(images, prompts), images.new_tensor(-3.0))


def ocr_views(images, prompts):
    """log p, its mean over random views of each picture, (B,)."""
    scores = log_likelihood(random_views(images, prompts), VIEWS * prompts)
    return scores.view(VIEWS, len(prompts)).mean(0)


def random_views(images, prompts):
    """VIEWS pictures of each: zoomed by 0.9 to 1.05, shifted, other contrast and brightness, and noise up to 0.1.

    Returns (VIEWS * B, 3, H, W), all first views first. They are seeded by the prompt and the view's number, so
    that a score is a function: the same for both passes of an update, in any micro-batch, and after a resume.
    """
    generators = [named_generator("ocr view", k, prompt) for k in range(VIEWS) for prompt in prompts]
    draws = torch.stack([torch.rand(6, generator=generator) for generator in generators])
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
    zoom, x, y, contrast, brightness, strength = draws.to(images)[..., None, None].unbind(1)     # each (n, 1, 1)
    zero, zoom = torch.zeros_like(zoom), 1 / (0.9 + 0.15 * zoom)
    place = torch.cat([torch.cat([zoom, zero, 0.1 * x - 0.05], 2), torch.cat([zero, zoom, 0.2 * y - 0.1], 2)], 1)
    views = images.repeat(VIEWS, 1, 1, 1)
    grid = F.affine_grid(place, views.shape, align_corners=False)
    views = F.grid_sample(views, grid, padding_mode="border", align_corners=False)
    contrast, brightness, strength = (value[..., None] for value in (contrast, brightness, strength))
    views = (views - 0.5) * (0.7 + 0.5 * contrast) + 0.5 + 0.2 * brightness - 0.1
    return views + 0.1 * strength * noise.to(images)


def load(sources, device):
    recogniser(torch.device(device))
    return log_likelihood
