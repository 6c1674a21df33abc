"""How likely a text recogniser finds the wanted text, with gradients: PP-OCRv6 small of rapidocr, in torch.

The picture is taken for one line of text. What the prompt has in double quotes is wanted, in lower case and
without spaces, as in ocr.py. Three scores are made of p, the likelihood by CTC, a geometric mean per letter:

    ocr_likelihood                          log p: about 0 where it reads right, 4 less for each wrong one of
                                            four letters. It pays for being illegible, as an unsure reader
                                            beats one that is surely wrong, so it is easily hacked
    rewards/ocr_likelihood.py:ocr_floor     log(p + e^-3), -3 to 0.05: beyond recognition all is alike
    rewards/ocr_likelihood.py:ocr_views     log p, its mean over random views of the picture
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
    """The network to its logits; the number of the letter that each class counts for; {letter: number}.

    Capitals count for small letters, and the space for CTC's blank, which has number 0: a word with margins
    that a reader takes for spaces isn't wrong.
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

    logits: (B, T, classes); counts_for: (classes,), the number of the letter that a class counts for, 0 for
    the blank; targets: B lists of such numbers. Minus infinity where T has no room for a target.
    """
    letters = logits.new_zeros(*logits.shape[:2], counts_for.max() + 1)
    letters = letters.index_add(2, counts_for, logits.softmax(-1))
    log_p = letters.clamp_min(torch.finfo(letters.dtype).tiny).log()
    B, T, _ = log_p.shape
    lengths = torch.tensor([len(target) for target in targets])
    # Trap: the gradient of torch's CTC is right only for normalised log-probabilities. They are: all classes
    # are there.
    loss = F.ctc_loss(log_p.transpose(0, 1), torch.tensor(sum(targets, [])).to(log_p.device),
                      torch.full((B,), T), lengths, reduction="none")
    return -loss / lengths.to(loss)


def log_likelihood(images, prompts):
    """log p of the wanted texts, (B,); images: (B, 3, H, W) in [0, 1].

    Raises ValueError for letters that the recogniser doesn't know, and for a text with more than there is
    room for.
    """
    network, counts_for, numbers = recogniser(images.device)
    texts = [folded(wanted_text(prompt)) for prompt in prompts]
    unknown = sorted(set("".join(texts)) - numbers.keys())
    if unknown:
        raise ValueError(f"the recogniser doesn't know the letters {' '.join(unknown)}")
    line = as_line(images)
    targets = [[numbers[letter] for letter in text] for text in texts]
    scores = ctc_log_likelihood(network(line), counts_for, targets)
    if scores.isinf().any():
        raise ValueError(f"the pictures are too narrow: a line of text of {line.shape[2]}x{line.shape[3]} "
                         f"pixels has no room for {max(texts, key=len)!r}")
    return scores


def ocr_floor(images, prompts):
    """log(p + e^-3), (B,)."""
    return torch.logaddexp(log_likelihood(images, prompts), images.new_tensor(-3.0))


def ocr_views(images, prompts):
    """log p, its mean over random views of each picture, (B,)."""
    scores = log_likelihood(random_views(images, prompts), VIEWS * prompts)
    return scores.view(VIEWS, len(prompts)).mean(0)


def random_views(images, prompts):
    """VIEWS of each picture: zoomed by 0.9 to 1.05, shifted, in other contrast and brightness, under noise.

    Returns (VIEWS * B, 3, H, W), all first views first. They are seeded by the prompt and the view's number,
    so that the score is a function: the same in both passes of an update, in any micro-batch, after a resume.
    """
    generators = [named_generator("ocr view", k, prompt) for k in range(VIEWS) for prompt in prompts]
    drawn = torch.stack([torch.rand(6, generator=generator) for generator in generators]).to(images)
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
    place = images.new_zeros(len(generators), 2, 3)                   # affine maps, in units of half a side
    place[:, 0, 0] = place[:, 1, 1] = 1 / (0.9 + 0.15 * drawn[:, 0])
    place[:, 0, 2], place[:, 1, 2] = 0.1 * drawn[:, 1] - 0.05, 0.2 * drawn[:, 2] - 0.1
    grid = F.affine_grid(place, (len(generators), *images.shape[1:]), align_corners=False)
    views = F.grid_sample(images.repeat(VIEWS, 1, 1, 1), grid, padding_mode="border", align_corners=False)
    contrast, brightness, strength = drawn[:, 3:, None, None, None].unbind(1)
    views = (views - 0.5) * (0.7 + 0.5 * contrast) + 0.4 + 0.2 * brightness
    return views + 0.1 * strength * noise.to(images)


def load(folders, device):
    recogniser(torch.device(device))
    return log_likelihood
