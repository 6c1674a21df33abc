"""A small world in which the true preference is known: drawn shapes, their captions, and an oracle.

A picture is 32x32 RGB: a circle, square, triangle or cross in one of six colours on one of three plain
grounds. That makes 72 captions, "a red circle on a white background" and so on. `sample` draws pictures as a
data set would have them (jittered colours, a little noise); `oracle` says what a picture is truly worth for
its caption, by comparing it with clean renderings. No network is involved, so no optimiser can fool it.
"""
import functools
import itertools

import torch

SIZE = 32
# Everything stays inside 0.1..0.9, so that clipping at 0 and 1 is no feature of the data.
COLORS = {"red": (0.85, 0.15, 0.15), "green": (0.15, 0.70, 0.20), "blue": (0.15, 0.25, 0.85),
          "yellow": (0.88, 0.80, 0.15), "purple": (0.55, 0.15, 0.70), "orange": (0.88, 0.50, 0.12)}
GROUNDS = {"white": (0.88, 0.88, 0.88), "grey": (0.50, 0.50, 0.50), "black": (0.12, 0.12, 0.12)}
SHAPES = ("circle", "square", "triangle", "cross")
CAPTIONS = [f"a {color} {shape} on a {ground} background"
            for shape, color, ground in itertools.product(SHAPES, COLORS, GROUNDS)]
PALETTE = torch.tensor([(COLORS[c], GROUNDS[g]) for c, g in itertools.product(COLORS, GROUNDS)])  # (18, 2, 3)


def masks(shape, centre, radius):
    """Coverage of each pixel by a shape, with one pixel of anti-aliasing.

    shape: one of SHAPES; centre: (N, 2) x and y in pixels; radius: (N,) in pixels.
    Returns (N, 32, 32) in [0, 1]. Raises ValueError for an unknown shape.
    """
    axis = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x, y = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    r = radius[:, None, None]
    if shape == "circle":
        distance = (x ** 2 + y ** 2).sqrt() - r
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 0.85 * r
    elif shape == "triangle":  # apex up; the three half planes of an equilateral triangle
        y = y - 0.15 * r
        distance = torch.maximum(0.75 ** 0.5 * x.abs() - 0.5 * y, y) - 0.6 * r
    elif shape == "cross":
        distance = torch.minimum(torch.maximum(x.abs() - r, y.abs() - 0.35 * r),
                                 torch.maximum(y.abs() - r, x.abs() - 0.35 * r))
    else:
        raise ValueError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")
    return (0.5 - distance).clamp(0, 1)


def sample(captions, generator):
    """Pictures as a data set would have them: place, size and colours vary, and there is a little noise.

    captions: (B,) long tensor of indices into CAPTIONS; generator: a torch.Generator.
    Returns (B, 3, 32, 32) in [0, 1].
    """
    n = len(captions)
    centre = 11 + 10 * torch.rand(n, 2, generator=generator)
    radius = 6 + 4 * torch.rand(n, generator=generator)
    jitter = 0.08 * torch.rand(n, 2, 3, generator=generator) - 0.04
    noise = 0.02 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    shape, pair = captions // len(PALETTE), captions % len(PALETTE)
    mask = torch.empty(n, SIZE, SIZE)
    for i, name in enumerate(SHAPES):
        mask[shape == i] = masks(name, centre[shape == i], radius[shape == i])
    color, ground = (PALETTE[pair] + jitter)[..., None, None].unbind(1)  # each (B, 3, 1, 1)
    return (ground + (color - ground) * mask[:, None] + noise).clamp(0, 1)


def parse(prompts):
    """Indices into CAPTIONS, (B,) long, of prompts of this world. Raises ValueError for another."""
    for prompt in prompts:
        if prompt not in CAPTIONS:
            raise ValueError(f"the oracle of the small world can't judge the prompt {prompt!r}; "
                             f"it knows captions like {CAPTIONS[0]!r}")
    return torch.tensor([CAPTIONS.index(prompt) for prompt in prompts])


@functools.cache
def templates():
    """Clean coverage masks of every shape at 11x11 places and 5 sizes: (4, 605, 1024)."""
    places = itertools.product(range(11, 22), range(11, 22), range(6, 11))
    grid = torch.tensor(list(places), dtype=torch.float32)
    return torch.stack([masks(shape, grid[:, :2], grid[:, 2]).flatten(1) for shape in SHAPES])


def distances(images):
    """Root mean square error of each picture to the nearest clean rendering of every caption.

    images: (B, 3, 32, 32) in [0, 1]. Returns (B, 72), in units of pixel values. Another size: ValueError.
    """
    if images.shape[1:] != (3, SIZE, SIZE):
        given = "x".join(map(str, images.shape[1:]))
        raise ValueError(f"the oracle judges pictures of 3x{SIZE}x{SIZE}, not {given}")
    # A rendering is ground + (color - ground) * mask, so |image - rendering|^2 needs three inner products:
    # <image, mask>, <image, 1> and <mask, mask>, whatever the colours.
    pixels, mask = images.detach().float().cpu().flatten(2), templates()   # (B, 3, P), (4, 605, P)
    color, ground = PALETTE.unbind(1)                                      # each (18, 3)
    contrast = color - ground
    image_mask = torch.einsum("bcp,skp->bskc", pixels, mask)
    image_one, mask_one, mask_mask = pixels.sum(-1), mask.sum(-1), mask.square().sum(-1)
    cross = (image_one @ ground.T)[:, None, None] + image_mask @ contrast.T               # (B, 4, 605, 18)
    square = (SIZE ** 2 * ground.square().sum(-1) + 2 * mask_one[..., None] * (ground * contrast).sum(-1)
              + mask_mask[..., None] * contrast.square().sum(-1))                         # (4, 605, 18)
    error = pixels.square().sum((1, 2))[:, None, None, None] - 2 * cross + square
    return (error.amin(2).clamp_min(0) / (3 * SIZE ** 2)).sqrt().flatten(1)


def oracle(images, prompts):
    """What pictures are truly worth for their prompts. Not differentiable: it judges, it can't be trained on.

    images: (B, 3, 32, 32) in [0, 1]; prompts: B captions of this world.
    Returns {"accuracy": (B,), "rmse": (B,)}: 1 where no other caption is nearer than the prompted one, else
    0, and the distance to the nearest clean rendering of the prompted caption (lower is better; `sample`'s
    have about 0.045). Raises ValueError for a prompt or a size that is not of this world.
    """
    captions, error = parse(prompts), distances(images)
    return {"accuracy": (error.argmin(1) == captions).float(),
            "rmse": error[torch.arange(len(captions)), captions]}


def oracle_accuracy(images, prompts):
    """The oracle's accuracy alone, (B,). As a reward it is a black box: no gradient passes through it."""
    return oracle(images, prompts)["accuracy"]


def oracle_rmse(images, prompts):
    """The oracle's error alone, (B,); lower is better."""
    return oracle(images, prompts)["rmse"]
