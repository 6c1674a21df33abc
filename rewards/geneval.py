"""GenEval (arXiv 2310.11513): 1 for a picture that shows what its prompt names, else 0. Not differentiable.

A detector finds COCO's 80 kinds of objects, CLIP names their colours, and rules decide. The forms of prompts:
"a photo of" a dog, a dog and a car, three dogs, a red car, a dog left of a car, a red dog and a blue car.
"""
import math
import re
from collections import defaultdict, namedtuple
from functools import cache, partial

import torch
import torch.nn.functional as F

from rsaft import UserError, embed_images, load_complete, make_tokenize

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
FILES = {"detector/config.json": DETECTOR, "clip/config.json": CLIP, "clip/tokenizer_config.json": CLIP}

NAMES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack,
umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple,
sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining
table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster,
sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
NAMES = NAMES.replace("\n", " ").split(", ")
COLORS = "red orange yellow green blue purple pink brown black white".split()
NUMBERS = {word: 2 + i for i, word in enumerate("two three four five six seven eight nine ten".split())}
# GenEval itself writes "benchs", "knifes", "sheeps"; people don't.
PLURALS = {name + ending: name for name in NAMES for ending in ("s", "es")} | {
    "people": "person", "knives": "knife", "computer mice": "computer mouse",
    **{name: name for name in ("sheep", "skis", "broccoli", "scissors")}}
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}    # axis, sign

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9    # of the detector's confidence
TEMPLATES = [f"a photo of a {{color}}{end}" for end in (" {name}", "-colored {name}", " object")]

Wanted = namedtuple("Wanted", "things relation")       # things: [(name, count, colour or None)]
Found = namedtuple("Found", "name score box mask")     # box: left, top, right, bottom; mask: (H, W), bool

either = "|".join
THING = f"(?:an? )?(?:({either(COLORS)}) )?({either(NAMES)})"
FORM = re.compile(f"a photo of (?:({either(NUMBERS)}) ({either(PLURALS)})|"
                  f"{THING}(?: (and|{either(DIRECTIONS)}) {THING})?)")


def parse(prompt):
    """What a prompt wants, as Wanted. Raises UserError for one of another form, or with one kind twice."""
    match = FORM.fullmatch(" ".join(prompt.lower().split()).removesuffix("."))
    number, plural, color, name, relation, other_color, other = match.groups() if match else [None] * 7
    if number:
        return Wanted([(PLURALS[plural], NUMBERS[number], None)], None)
    if not match or name == other:
        raise UserError(f"geneval can't judge {prompt!r}: it needs COCO's objects, in a form such as "
                        "'a photo of two dogs' or 'a photo of a dog left of a car' or 'a photo of a red dog'")
    things = [(name, 1, color)] + ([(other, 1, other_color)] if other else [])
    return Wanted(things, relation if relation in DIRECTIONS else None)


check_prompt = parse


def lies(relation, box, other):
    """Whether a box is left of, right of, above or below another: with a tenth of both sizes taken off, the
    distance of the centres in that direction is more than half of the whole."""
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sizes = [box[i + 2] - box[i] + other[i + 2] - other[i] for i in (0, 1)]
    axis, sign = DIRECTIONS[relation]
    return sign * offset[axis] - 0.1 * sizes[axis] > 0.5 * math.hypot(*offset)


def judge(wanted, found, color_of, graded=False):
    """The score of one picture, in [0, 1].

    wanted: of `parse`; found: a list of Found; color_of: a function of a Found to one of COLORS. Colour and
    place are those of the most confident object. Too many are wrong only where the prompt has a number.
    graded: the mean over number, colour and place, a number being worth its relative error less than 1, as
    in Flow-GRPO (arXiv 2505.05470); there it may fall below 0, and a wrong place costs less.
    """
    kinds, parts, counting = defaultdict(list), [], wanted.things[0][1] > 1
    for thing in sorted(found, key=lambda thing: -thing.score):
        if thing.score > (COUNTING_THRESHOLD if counting else THRESHOLD):
            kinds[thing.name].append(thing)
    for name, count, color in wanted.things:
        surplus = len(kinds[name]) - count
        wrong = abs(surplus) if graded or counting else max(0, -surplus)
        parts.append(max(0.0, 1 - wrong / count))
        if color:
            parts.append(float(wrong == 0 and color_of(kinds[name][0]) == color))
    if wanted.relation:
        parts.append(float(min(parts) == 1 and lies(
            wanted.relation, *(kinds[name][0].box for name, _, _ in wanted.things))))
    return sum(parts) / len(parts) if graded else float(min(parts) == 1)


def objects(class_logits, masks):
    """What a picture holds, as a list of Found. class_logits: (Q, 81), of which the last is nothing; masks:
    (Q, H, W), logits too. The confidence is that of the class times the mean of the mask's."""
    scores, found = class_logits.softmax(-1)[:, :-1], []
    for query, label in (scores > THRESHOLD).nonzero().tolist():
        mask = masks[query] > 0
        if mask.any():
            score = scores[query, label] * masks[query][mask].sigmoid().mean()
            (top, left), (bottom, right) = (corner.tolist() for corner in mask.nonzero().aminmax(dim=0))
            found.append(Found(NAMES[label], score.item(), (left, top, right + 1, bottom + 1), mask))
    return found


def detector_pixels(image):
    """An image (3, H, W) in [0, 1] as the detector wants it, (1, 3, rows, columns): the short side 800 or the
    long one 1333, then zeros up to a multiple of 32. Returns also height and width without these."""
    H, W = image.shape[1:]
    scale = min(800 / min(H, W), 1333 / max(H, W))
    h, w = round(H * scale), round(W * scale)
    mean, std = image.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    pixels = (F.interpolate(image[None], (h, w), mode="bilinear", antialias=True) - mean) / std
    return F.pad(pixels, (0, -w % 32, 0, -h % 32)), h, w


def mask2former(folder, device):
    """A function of an image (3, H, W) in [0, 1] to its list of Found."""
    from transformers import Mask2FormerForUniversalSegmentation
    model = load_complete(Mask2FormerForUniversalSegmentation, folder).to(device)
    if model.config.num_labels != len(NAMES):    # they go by number: its own names differ, as "tvmonitor"
        raise UserError(f"{folder} knows {model.config.num_labels} kinds of objects, not COCO's {len(NAMES)}")

    def detect(image):
        pixels, h, w = detector_pixels(image)
        output = model(pixel_values=pixels)
        masks = F.interpolate(output.masks_queries_logits, pixels.shape[2:], mode="bilinear")[..., :h, :w]
        masks = F.interpolate(masks, image.shape[1:], mode="bilinear")[0]
        return objects(output.class_queries_logits[0], masks)

    return detect


def clip_colors(folder, device):
    """A function of an image (3, H, W) and a Found to one of COLORS, by CLIP on its box, the rest greyed."""
    from transformers import CLIPModel
    model = load_complete(CLIPModel, folder).to(device)
    tokenize = make_tokenize(folder, model.config.text_config.max_position_embeddings, device)

    @cache
    def texts(name):
        prompts = [text.format(color=color, name=name) for text in TEMPLATES for color in COLORS]
        embeds = model.text_projection(model.text_model(input_ids=tokenize(prompts).input_ids).pooler_output)
        return F.normalize(F.normalize(embeds, dim=-1).unflatten(0, (len(TEMPLATES), -1)).mean(0), dim=-1)

    def color_of(image, thing):
        left, top, right, bottom = thing.box
        crop = image.where(thing.mask, 0x99 / 255)[None, :, top:bottom, left:right]
        return COLORS[(texts(thing.name) @ embed_images(model, crop)[0]).argmax()]

    return color_of


def load(folders, device, graded=False):
    detect = mask2former(folders["detector/config.json"], device)
    color_of = clip_colors(folders["clip/config.json"], device)

    @torch.no_grad()
    def reward(images, prompts):
        return torch.tensor([judge(parse(prompt), detect(image), partial(color_of, image), graded)
                             for image, prompt in zip(images, prompts)])

    return reward
