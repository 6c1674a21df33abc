"""A small world of drawn words, and an oracle that can't be fooled: it compares pictures with renderings.

A picture is 32x96 RGB and shows a word of four letters, dark on a light ground, in one of three bold fonts
and three sizes. Its prompt is `the word "SALE"`. The letters' masks are in glyphs.safetensors, so no font is
needed.
"""
import functools
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

HEIGHT, WIDTH = 32, 96
SHIFT_Y, SHIFT_X = 2, 4      # a word lies up to so many pixels off the middle
BEARING = 2                  # where in its mask a letter begins, in pixels: some reach left of it
LETTERS = "AEILNOPRST"
WORDS = ("AREA EARN EAST EASE ELSE IRIS IRON ISLE LANE LAST LATE LINE LION LIST LOAN LOOP LOSE NAIL NEAR "
         "NEST NINE NOON NOSE NOTE OATS OPAL OPEN ORAL PAIR PALE PART PEAR PINE POET PORT POST RAIL RAIN "
         "REST RISE ROOT ROSE SAIL SALT SEAL SENT SOIL SOLO SPIN STAR STEP STOP TAIL TENT TILE TOES TONE "
         "TRAP TREE TRIO").split()
PROMPTS = [f'the word "{word}"' for word in WORDS]


@functools.cache
def glyphs():
    """masks (fonts, sizes, letters, h, w) in [0, 1]; advances (fonts, sizes, letters), in whole pixels."""
    tensors = load_file(Path(__file__).with_name("glyphs.safetensors"))
    return tensors["masks"].float() / 255, tensors["advances"]


@functools.cache
def renderings(word):
    """The coverage of each pixel by a word in every font and size, (9, 36, 104) in [0, 1].

    The word is in the middle, and around the 32x96 of a picture there is room to shift it: a window of that
    size shows the word anywhere it may be.
    """
    masks, advances = glyphs()
    masks, index = masks.flatten(0, 1), [LETTERS.index(letter) for letter in word]    # (9, 10, h, w)
    advances = advances.flatten(0, 1)[:, index]                                       # (9, 4)
    h, w = masks.shape[-2:]
    canvas = torch.zeros(len(masks), HEIGHT + 2 * SHIFT_Y, WIDTH + 2 * SHIFT_X)
    top = (canvas.shape[1] - h) // 2
    for page, of_letters, steps in zip(canvas, masks[:, index], advances.tolist()):
        x = (canvas.shape[2] - sum(steps)) // 2 - BEARING
        for mask, step in zip(of_letters, steps):
            page[top:top + h, x:x + w] += mask
            x += step
    return canvas.clamp(max=1)


def sample(words, generator):
    """Pictures as a data set would have them: font, size, place and tints vary, there is a little noise.

    words: (B,) long tensor of indices into WORDS; generator: a torch.Generator.
    Returns (B, 3, 32, 96) in [0, 1].
    """
    n = len(words)
    which = torch.randint(9, (n,), generator=generator).tolist()
    y = torch.randint(2 * SHIFT_Y + 1, (n,), generator=generator).tolist()
    x = torch.randint(2 * SHIFT_X + 1, (n,), generator=generator).tolist()
    mask = torch.stack([renderings(WORDS[word])[i, dy:dy + HEIGHT, dx:dx + WIDTH]
                        for word, i, dy, dx in zip(words.tolist(), which, y, x)])[:, None]
    ground = 0.70 + 0.22 * torch.rand(n, 3, 1, 1, generator=generator)
    ink = 0.08 + 0.30 * torch.rand(n, 3, 1, 1, generator=generator)
    noise = 0.02 * torch.randn(n, 3, HEIGHT, WIDTH, generator=generator)
    return (ground + (ink - ground) * mask + noise).clamp(0, 1)


def wanted_word(prompt):
    """The word that a prompt of this world asks for. Raises ValueError for another prompt."""
    match = re.fullmatch(f'the word "([{LETTERS}]{{4}})"', prompt)
    if not match:
        raise ValueError(f"the oracle of the words can't judge the prompt {prompt!r}; it knows prompts like "
                         f"{PROMPTS[0]!r}, of the letters {LETTERS}")
    return match[1]


def rivals(word):
    """What a word must not be taken for: the 36 words with one letter changed, and all others of WORDS."""
    changed = [word[:i] + letter + word[i + 1:] for i in range(len(word)) for letter in LETTERS]
    return list(dict.fromkeys(other for other in [*changed, *WORDS] if other != word))


def correlations(image, words):
    """How well each of `words` explains a picture, at best over fonts, sizes, places and colours.

    image: (3, 32, 96) in [0, 1]. Returns (len(words),), in [0, 1]: the multiple correlation of the picture
    with ground + (ink - ground) * rendering, where each channel has the ground and the ink that fit it best.
    """
    # It is the picture that is shifted, in a frame of zeros: all inner products with words are then one
    # product of matrices. A word's own sums don't depend on its place, as it stays within the picture.
    mask = torch.cat([renderings(word) for word in words]).flatten(1)             # (9 n, 36 * 104)
    centred = image - image.mean((1, 2), keepdim=True)
    shifted = torch.stack([F.pad(centred, (x, 2 * SHIFT_X - x, y, 2 * SHIFT_Y - y))
                           for y in range(2 * SHIFT_Y + 1) for x in range(2 * SHIFT_X + 1)])
    covariance = shifted.flatten(2) @ mask.T                                      # (45, 3, 9 n)
    spread = mask.square().sum(1) - mask.sum(1).square() / (HEIGHT * WIDTH)       # (9 n,)
    explained = covariance.square().sum(1) / (spread * centred.square().sum()).clamp_min(1e-12)
    return explained.amax(0).view(len(words), -1).amax(1).clamp(0, 1).sqrt()


def oracle(images, prompts):
    """What pictures are truly worth for their prompts. Not differentiable: it judges, it can't be trained on.

    images: (B, 3, 32, 96) in [0, 1]; prompts: B prompts of this world, for any four of its letters.
    Returns {"accuracy": (B,), "correlation": (B,)}: 1 where no rival is nearer than the wanted word, else 0;
    the correlation with the nearest rendering of the wanted word. Raises ValueError for a prompt or a size
    that is not of this world.
    """
    if images.shape[1:] != (3, HEIGHT, WIDTH):
        raise ValueError(f"the oracle of the words judges pictures of 3x{HEIGHT}x{WIDTH}, not "
                         f"{'x'.join(map(str, images.shape[1:]))}")
    asked = [wanted_word(prompt) for prompt in prompts]
    found = [correlations(image, [word, *rivals(word)])
             for image, word in zip(images.detach().float().cpu(), asked)]
    return {"accuracy": torch.tensor([float(values.argmax() == 0) for values in found]),
            "correlation": torch.stack([values[0] for values in found])}


def oracle_accuracy(images, prompts):
    """The oracle's accuracy alone, (B,). As a reward it is a black box: no gradient passes through it."""
    return oracle(images, prompts)["accuracy"]


def oracle_correlation(images, prompts):
    """The oracle's correlation alone, (B,)."""
    return oracle(images, prompts)["correlation"]
