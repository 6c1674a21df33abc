"""What the rewards claim that test_rsaft.py doesn't test: `pytest rewards`. The detector needs scipy."""
import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import rsaft  # noqa: E402, found through the line above
from test_rsaft import blip_by_hand, imagereward_state  # noqa: E402

TINY = HERE.parent / "tiny"
PROMPTS = (TINY / "prompts.txt").read_text().splitlines()[:6]
geneval, mps, cyclereward = (
    rsaft.import_file(HERE / f"{name}.py") for name in ("geneval", "mps", "cyclereward"))
rsaft.quiet_libraries()


# ---- GenEval: the prompts ----------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, things, relation", [
    ("a photo of a bench", [("bench", 1, None)], None),
    ("a photo of an apple and a hot dog", [("apple", 1, None), ("hot dog", 1, None)], None),
    ("a photo of three buses", [("bus", 3, None)], None),
    ("a photo of a purple wine glass", [("wine glass", 1, "purple")], None),
    ("a photo of a bird left of a couch", [("bird", 1, None), ("couch", 1, None)], "left of"),
    ("a photo of a tv remote below a dog", [("tv remote", 1, None), ("dog", 1, None)], "below"),
    ("a photo of a white dog and a blue cup", [("dog", 1, "white"), ("cup", 1, "blue")], None),
    ("a photo of an orange", [("orange", 1, None)], None),
    ("a photo of an orange orange and a black skis", [("orange", 1, "orange"), ("skis", 1, "black")], None),
    ("A photo of  scissors.", [("scissors", 1, None)], None),
])
def test_the_six_forms_of_prompts_say_what_is_wanted(prompt, things, relation):
    assert geneval.parse(prompt) == (things, relation)


@pytest.mark.parametrize("plural, name", [
    ("people", "person"), ("persons", "person"), ("knives", "knife"), ("knifes", "knife"), ("sheep", "sheep"),
    ("sheeps", "sheep"), ("computer mice", "computer mouse"), ("benches", "bench"), ("benchs", "bench"),
    ("skis", "skis"), ("scissors", "scissors"), ("wine glasses", "wine glass"), ("couches", "couch")])
def test_plurals_are_known_as_people_write_them_and_as_geneval_does(plural, name):
    assert geneval.parse(f"a photo of four {plural}").things == [(name, 4, None)]


@pytest.mark.parametrize("prompt", [
    "a red cross on a white background", "a photo of a unicorn", "a photo of a mauve dog", "a dog", "",
    "a photo of a dog and a dog", "a photo of a dog behind a car", "a photo of a dog and a car and a cup",
    "a photo of two dog"])
def test_a_prompt_of_another_form_is_refused_by_name(prompt):
    with pytest.raises(rsaft.UserError, match=re.escape(repr(prompt))):
        geneval.parse(prompt)


@pytest.mark.parametrize("name", ["geneval", "geneval_graded"])
def test_prompts_are_checked_before_anything_loads_or_is_written(name, tmp_path, capsys):
    out = tmp_path / "out"
    assert rsaft.main(["--tiny", "--eval-reward", name, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "geneval can't judge" in error and not out.exists()


def test_the_tests_of_this_folder_are_no_reward():
    with pytest.raises(rsaft.UserError, match="there are pickscore, ") as error:
        rsaft.find_reward("test_rewards")
    assert "geneval, geneval_graded" in str(error.value) and "test_" not in str(error.value).partition(";")[2]


# ---- GenEval: the rules, on detections given here ----------------------------------------------------------

def found(*objects):
    """Detections (name, colour, box, confidence) as a list of Found, the colour in the place of the mask."""
    return [geneval.Found(name, score, box, color) for name, color, box, score in objects]


def scores(prompt, *objects):
    """All-or-nothing, and graded."""
    wanted = geneval.parse(f"a photo of {prompt}")
    return tuple(geneval.judge(wanted, found(*objects), lambda thing: thing.mask, graded)
                 for graded in (False, True))


LEFT, RIGHT, LOW = (0, 0, 20, 20), (60, 0, 80, 20), (0, 60, 20, 80)
DOG, CAR, CUP = ("dog", "red", LEFT, 0.5), ("car", "blue", RIGHT, 0.6), ("cup", "red", LOW, 0.95)


@pytest.mark.parametrize("prompt, objects, strict, graded", [
    ("a dog", [DOG], 1, 1), ("a dog", [CAR], 0, 0), ("a dog", [], 0, 0), ("a dog", [DOG, CAR, CUP], 1, 1),
    ("a dog", [DOG, DOG], 1, 0),                                      # graded is strict about a surplus
    ("a dog and a car", [DOG, CAR], 1, 1), ("a dog and a car", [CAR, CAR], 0, 0),
    ("a dog and a car", [DOG], 0, 1 / 2),
    ("two cups", [CUP, CUP], 1, 1), ("two cups", [CUP], 0, 1 / 2), ("two cups", [CUP] * 3, 0, 1 / 2),
    ("two cups", [CUP] * 5, 0, 0), ("four cups", [CUP] * 3, 0, 3 / 4), ("four cups", [CUP] * 5, 0, 3 / 4),
    ("a red dog", [DOG], 1, 1), ("a blue dog", [DOG], 0, 1 / 2), ("a red dog", [], 0, 0),
    ("a red dog", [DOG, ("dog", "blue", LOW, 0.9)], 0, 0),            # the more confident one is blue
    ("a dog left of a car", [DOG, CAR], 1, 1), ("a dog right of a car", [DOG, CAR], 0, 2 / 3),
    ("a car right of a dog", [DOG, CAR], 1, 1), ("a dog above a cup", [DOG, CUP], 1, 1),
    ("a cup below a dog", [DOG, CUP], 1, 1), ("a cup above a dog", [DOG, CUP], 0, 2 / 3),
    ("a dog left of a car", [DOG], 0, 1 / 3), ("a dog left of a car", [CAR], 0, 1 / 3),
    ("a red dog and a blue car", [DOG, CAR], 1, 1), ("a blue dog and a red car", [DOG, CAR], 0, 1 / 2),
    ("a red dog and a red car", [DOG, CAR], 0, 3 / 4), ("a red dog and a blue car", [DOG], 0, 1 / 2)])
def test_the_rules(prompt, objects, strict, graded):
    assert scores(prompt, *objects) == pytest.approx((strict, graded))


@pytest.mark.parametrize("prompt, least", [("a dog", 0.3), ("two dogs", 0.9)])
def test_where_objects_are_counted_the_detector_must_be_surer(prompt, least):
    count = geneval.parse(f"a photo of {prompt}").things[0][1]
    for confidence, score in (least + 0.01, 1), (least - 0.01, 0):
        assert scores(prompt, *[("dog", "red", LEFT, confidence)] * count) == (score, score)


def test_a_place_is_within_60_degrees_of_its_direction():
    """For points. So at 45 degrees something is both above and right, and never both left and right."""
    for degrees in torch.arange(2.5, 360, 5).tolist():
        x, y = math.cos(math.radians(degrees)), -math.sin(math.radians(degrees))      # y points down
        for relation, center in ("right of", 0), ("above", 90), ("left of", 180), ("below", 270):
            apart = abs((degrees - center + 180) % 360 - 180)
            assert geneval.lies(relation, (x, y, x, y), (0, 0, 0, 0)) == (apart < 60)


def test_boxes_side_by_side_must_be_a_fifth_of_their_sizes_apart():
    """The rule distance - (a + b) / 10 > distance / 2, solved for the distance of the centres."""
    for a, b, factor in itertools.product((10, 40), (20, 30), (0.99, 1.01)):
        x = factor * 0.2 * (a + b)
        boxes = (x - a / 2, 0, x + a / 2, 8), (-b / 2, 0, b / 2, 8)
        assert geneval.lies("right of", *boxes) == geneval.lies("left of", *boxes[::-1]) == (factor > 1)


# ---- GenEval: detector and colours, on small models --------------------------------------------------------

def test_objects_are_read_from_class_and_mask_logits():
    """Boxes end behind their last pixel; the confidence is the class's times the mask's mean inside."""
    logits, masks = torch.full((4, 81), -9.0), torch.full((4, 24, 32), -2.0)
    logits[range(4), [16, 2, 80, 15]] = 9.0               # a dog, a car, nothing, and a cat without a mask
    logits[1, 5] = 9.0 + math.log(1 / 2)                  # or a bus, with half of the car's probability
    masks[0, 3:10, 5:30], masks[0, 0, 0] = 1.0, 3.0
    masks[1, 20:, :4] = 4.0
    masks[2] = 5.0
    dog, car, bus = geneval.objects(logits, masks)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert (dog.name, car.name, bus.name) == ("dog", "car", "bus")
    assert dog.box == (0, 0, 30, 10) and car.box == bus.box == (0, 20, 4, 24)
    assert dog.mask.sum() == 7 * 25 + 1 and torch.equal(car.mask, masks[1] == 4)
    assert dog.score == pytest.approx((175 * sigmoid(1) + sigmoid(3)) / 176, rel=1e-4)
    assert car.score == pytest.approx(2 / 3 * sigmoid(4), rel=1e-4)
    assert bus.score == pytest.approx(car.score / 2, rel=1e-4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A --models folder with geneval in it: a random Mask2Former, sure of itself, and the CLIP of tiny/."""
    pytest.importorskip("scipy")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, dim_feedforward=16,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12,
        num_labels=80))
    model.class_predictor.weight.data *= 60
    for name in "geneval", "geneval_graded":
        (folder / name).mkdir()
        model.save_pretrained(folder / name / "detector")
        (folder / name / "clip").symlink_to(TINY / "pickscore")
    return folder


def coarse(*size):
    return F.interpolate(torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(1)), size)[0]


@pytest.fixture(scope="module")
def detect(models):
    return torch.no_grad()(geneval.mask2former(models / "geneval" / "detector", "cpu"))


@pytest.mark.parametrize("size", [64, 1280])
def test_the_detector_sees_a_picture_as_transformers_own_processor_shows_it(size):
    """Square ones: others it stretches, where GenEval's own detector pads."""
    from PIL import Image
    from transformers import Mask2FormerImageProcessorPil
    image = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
    process = Mask2FormerImageProcessorPil(size={"shortest_edge": 800, "longest_edge": 1333}, size_divisor=32,
                                           image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    pixels, *inside = geneval.detector_pixels(image)
    assert inside == [800, 800]
    assert_close(pixels, process(picture, return_tensors="pt").pixel_values, rtol=0, atol=2 / 255 / 0.224)


@pytest.mark.parametrize("H, W, h, w, rows, columns", [(48, 64, 800, 1067, 800, 1088),
                                                       (64, 32, 1333, 666, 1344, 672)])
def test_other_pictures_are_padded_and_masks_know_nothing_of_it(models, detect, H, W, h, w, rows, columns):
    from transformers import Mask2FormerForUniversalSegmentation
    model = Mask2FormerForUniversalSegmentation.from_pretrained(models / "geneval" / "detector").eval()
    image = coarse(H, W)
    canvas = torch.zeros(1, 3, rows, columns)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    canvas[..., :h, :w] = (F.interpolate(image[None], (h, w), mode="bilinear") - mean) / std
    with torch.no_grad():
        output = model(pixel_values=canvas)
    masks = F.interpolate(output.masks_queries_logits, (rows, columns), mode="bilinear")[..., :h, :w]
    masks = F.interpolate(masks, (H, W), mode="bilinear")[0]
    expected, got = geneval.objects(output.class_queries_logits[0], masks), detect(image)
    assert [thing.name for thing in got] == [thing.name for thing in expected] and len(got) > 4
    for ours, theirs in zip(got, expected):
        assert ours.score == pytest.approx(theirs.score, abs=1e-3)
        assert torch.equal(ours.mask, theirs.mask)


def test_a_detector_of_other_kinds_is_refused(models, tmp_path):
    from transformers import Mask2FormerForUniversalSegmentation
    model = Mask2FormerForUniversalSegmentation.from_pretrained(
        models / "geneval" / "detector", num_labels=133, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(rsaft.UserError, match="133 kinds of objects, not COCO's 80"):
        geneval.mask2former(tmp_path, "cpu")


SHAPE = torch.zeros(32, 32, dtype=torch.bool)
SHAPE[8:24, 6:20] = True
SHAPE[8:14, 6:12] = False
THING = geneval.Found("stop sign", 0.9, (6, 8, 20, 24), SHAPE)
RGB = (0, 0.6, 0), (0, 0, 1), (1, 1, 0), (1, 0.5, 0), (0.5, 0, 0.5)


@pytest.fixture(scope="module")
def color_of():
    return torch.no_grad()(geneval.clip_colors(TINY / "pickscore", "cpu"))


def painted(color, outside=0.0):
    return torch.tensor(color).view(3, 1, 1).where(SHAPE, torch.full((3, 32, 32), outside))


@pytest.mark.parametrize("name", ["stop sign", "dog", "cup", "tv"])
def test_a_colour_is_that_of_the_nearest_text_to_the_greyed_crop(color_of, name):
    """By transformers' own CLIPModel; a colour's text is the mean of three, and grey is #999."""
    from transformers import CLIPModel, CLIPTokenizer
    clip, tokenizer = (kind.from_pretrained(TINY / "pickscore") for kind in (CLIPModel, CLIPTokenizer))
    texts = [f"a photo of a {color}{ending}" for color in geneval.COLORS
             for ending in (f" {name}", f"-colored {name}", " object")]
    ids = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    torch.manual_seed(0)
    images = torch.stack([painted(color) for color in RGB] + [torch.rand(3, 1, 1).expand(3, 32, 32)
                                                              for _ in range(40)])
    crops = torch.full((len(images), 3, 32, 32), 153 / 255)
    crops[..., SHAPE] = images[..., SHAPE]
    with torch.no_grad():
        output = clip(input_ids=ids.input_ids, pixel_values=rsaft.clip_pixels(crops[:, :, 8:24, 6:20], 32))
    means = output.text_embeds.view(10, 3, -1).mean(1)
    nearest = (output.image_embeds @ (means / means.norm(dim=1, keepdim=True)).T).argmax(1)
    expected = [geneval.COLORS[i] for i in nearest]
    assert [color_of(image, THING._replace(name=name)) for image in images] == expected
    assert len(set(expected)) > 4


def test_what_is_outside_the_mask_has_no_colour(color_of):
    for color in RGB:
        assert color_of(painted(color), THING) == color_of(painted(color, outside=1.0), THING)


def test_geneval_from_its_folders_judges_what_its_detector_finds(models, detect, color_of):
    images = torch.stack([coarse(64, 64), coarse(64, 64).flip(1)])
    things = [thing for thing in detect(images[0]) if thing.score > 0.3]
    first, *_, last = dict.fromkeys(thing.name for thing in sorted(things, key=lambda thing: -thing.score))
    best = max((thing for thing in things if thing.name == first), key=lambda thing: thing.score)
    color = color_of(images[0], best)
    others = [color for color in geneval.COLORS if color != color_of(images[0], best)]
    prompts = [f"a photo of a {color} {first}", f"a photo of a {others[0]} {first}",
               "a photo of a toothbrush", f"a photo of a {first} and a {last}"]
    reward, graded = (rsaft.make_reward(name, models) for name in ("geneval", "geneval_graded"))
    assert reward(images[:1].repeat(4, 1, 1, 1), prompts).tolist() == [1, 0, 0, 1]
    seen = detect(images[1])
    expected = [geneval.judge(geneval.parse(prompt), seen, lambda thing: color_of(images[1], thing), True)
                for prompt in prompts[:2]]
    assert graded(images.requires_grad_()[[1, 1]], prompts[:2]).tolist() == pytest.approx(expected)
    assert not graded(images[:1], prompts[:1]).requires_grad


def test_each_model_of_a_reward_has_a_folder_below_models_and_is_found_on_the_hub(models):
    files = rsaft.find_reward("geneval", models)[1]
    assert files == {"detector/config.json": str(models / "geneval/detector"),
                     "clip/config.json": str(models / "geneval/clip"),
                     "clip/tokenizer_config.json": str(models / "geneval/clip")}
    from collections import defaultdict
    wanted = rsaft.add_patterns(defaultdict(list), rsaft.find_reward("geneval")[1])
    assert wanted == {geneval.DETECTOR: rsaft.WEIGHTS, geneval.CLIP: rsaft.WEIGHTS + rsaft.TOKENIZER}
    with pytest.raises(rsaft.UserError, match="there is no .*detector.config.json and no .*clip.config.json"):
        rsaft.find_reward("geneval", TINY)


# ---- MPS and CycleReward, from their original layout -------------------------------------------------------

def mps_cross(width, heads=2):
    """What mpsv1 has beside its CLIP: random weights under the original names."""
    d, inner = 64, 4 * width
    shapes = {"0.fn.to_q": (heads * d, width), "0.fn.to_kv": (2 * d, width),
              "0.fn.to_out": (width, heads * d), "0.fn.ff.0": (2 * inner, width), "0.fn.ff.2": (width, inner),
              "1.fn.fused_attn_ff_proj": (heads * d + 2 * d + 2 * inner, width),
              "1.fn.attn_out": (width, heads * d), "1.fn.ff_out.1": (width, inner)}
    state = {}
    for i in range(4):
        layer = f"mps.cross_model.layers.{i}."
        for name, shape in shapes.items():
            state[f"{layer}{name}.weight"] = 2 * torch.randn(*shape) * shape[1] ** -0.5
        for j in 0, 1:
            state[f"{layer}{j}.fn.norm.weight"] = 1 + 0.3 * torch.randn(width)
            state[f"{layer}{j}.fn.norm.bias"] = 0.3 * torch.randn(width)
        state[f"{layer}1.fn.rotary_emb.inv_freq"] = 10000 ** -(torch.arange(0, d, 2) / d)
    return state


def cross_by_hand(state, x, text, kept):
    """MPS's four layers for one picture, x (n, d), and its prompt, text (m, d), head by head; the rotary
    embedding as a product of complex numbers."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])

    def line(x, name):
        return x @ state[f"{name}.weight"].T

    def swiglu(x):
        return x[:, :x.shape[1] // 2] * F.silu(x[:, x.shape[1] // 2:])

    def turn(x):
        angles = torch.arange(len(x))[:, None] * 10000 ** -(torch.arange(32) / 32)
        turned = torch.complex(x[:, :32], x[:, 32:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], 1)

    def attention(queries, key, value):
        return torch.cat([((q @ key.T) / 8).softmax(1) @ value for q in queries], 1)

    for i in range(4):
        layer = f"mps.cross_model.layers.{i}.0.fn"
        y = norm(x, layer)
        key, value = line(text[kept], f"{layer}.to_kv").chunk(2, 1)
        out = attention(line(y, f"{layer}.to_q").split(64, 1), key, value)
        x = x + line(out, f"{layer}.to_out") + line(swiglu(line(y, f"{layer}.ff.0")), f"{layer}.ff.2")
        layer = f"mps.cross_model.layers.{i}.1.fn"
        *queries, key, value = line(norm(x, layer), f"{layer}.fused_attn_ff_proj")[:, :4 * 64].split(64, 1)
        hidden = line(norm(x, layer), f"{layer}.fused_attn_ff_proj")[:, 4 * 64:]
        out = attention([turn(q) for q in queries], turn(key), value)
        x = x + line(out, f"{layer}.attn_out") + line(swiglu(hidden), f"{layer}.ff_out.1")
    return x


def small_mps(folder, monkeypatch):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    torch.manual_seed(2)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "pickscore")
    tower = dict(num_hidden_layers=2, num_attention_heads=4, hidden_act="gelu")
    monkeypatch.setattr(mps.hpsv2, "VIT_H", dict(
        text_config=dict(hidden_size=32, intermediate_size=64, vocab_size=len(tokenizer),
                         max_position_embeddings=16, **tower),
        vision_config=dict(hidden_size=48, intermediate_size=96, patch_size=8, image_size=32,
                           initializer_factor=8.0, **tower), projection_dim=3))
    config = CLIPConfig(**mps.hpsv2.VIT_H)
    config.text_config.eos_token_id = tokenizer.eos_token_id
    clip = CLIPModel(config).eval()
    for parameter in clip.parameters():
        if parameter.dim() > 0:
            parameter.data += 0.1 * torch.randn_like(parameter)
    state = mps_cross(3)
    tokenizer.save_pretrained(folder)
    save_file(state | {f"mps.model.{name}": tensor for name, tensor in clip.state_dict().items()},
              folder / "model.safetensors")

    def ids(prompts):
        return tokenizer(prompts, padding="max_length", truncation=True, max_length=16,
                         return_tensors="pt").input_ids

    @torch.no_grad()
    def by_hand(images, prompts):
        scores, masked = [], 0
        project = clip.text_projection
        about = project(clip.text_model(input_ids=ids([mps.QUALITIES])).last_hidden_state)[0]
        for image, prompt in zip(rsaft.clip_pixels(images, 32), prompts):
            read = clip.text_model(input_ids=ids([prompt]))
            text = project(read.last_hidden_state)[0]
            close = torch.stack([max(token @ other for other in about) for token in text])
            kept = close / close.max() > 0.01
            masked += (~kept).sum().item()
            x = clip.visual_projection(clip.vision_model(pixel_values=image[None]).last_hidden_state)[0]
            x = cross_by_hand(state, x, text, kept)
            cosine = torch.cosine_similarity(project(read.pooler_output)[0], x[0], 0)
            scores.append(clip.logit_scale.exp() * cosine)
        assert 0 < masked < 16 * len(prompts)                 # the mask acts
        return torch.stack(scores)

    return by_hand


def small_cyclereward(folder, monkeypatch):
    from transformers import BertTokenizer
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(PROMPTS).split()))]
    bert = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    bert.save_pretrained(folder)
    blip = cyclereward.imagereward
    monkeypatch.setattr(blip, "BLIP_LARGE", blip.BLIP_LARGE | dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, image_size=32, patch_size=8))
    monkeypatch.setattr(blip, "BLIP_TEXT", blip.BLIP_TEXT | dict(
        vocab_size=len(words), hidden_size=24, encoder_hidden_size=32, intermediate_size=48,
        num_hidden_layers=1, max_position_embeddings=140))
    state = {key: value for key, value in imagereward_state(len(words)).items() if not key.startswith("mlp.")}
    state["blip.text_encoder.embeddings.position_embeddings.weight"] = 0.3 * torch.randn(140, 24)
    sizes = 24, 16, 8, 8, 4, 1
    for i in range(5):
        state[f"mlp.layers.{2 * i}.weight"] = 0.6 * torch.randn(sizes[i + 1], sizes[i])
        state[f"mlp.layers.{2 * i}.bias"] = 0.3 * torch.randn(sizes[i + 1])
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")

    def by_hand(images, prompts):
        tokens = bert(prompts, padding="max_length", max_length=128, return_tensors="pt")
        x = blip_by_hand(state, tokens.input_ids, tokens.attention_mask, rsaft.clip_pixels(images, 32))
        for i in range(5):
            weight, bias = (state[f"mlp.layers.{2 * i}.{part}"] for part in ("weight", "bias"))
            x = (F.gelu(x) if i else x) @ weight.T + bias
        return x[:, 0]

    return by_hand


@pytest.fixture(params=["mps", "cyclereward"])
def original(request, tmp_path, monkeypatch):
    """The name, the --models folder with small files in the original layout, and the formula of a reward."""
    (tmp_path / request.param).mkdir()
    return request.param, tmp_path, globals()[f"small_{request.param}"](tmp_path / request.param, monkeypatch)


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
def test_a_reward_from_its_original_files_agrees_with_its_formula(original, size):
    """One picture's score doesn't depend on the others beside it, and the gradient is that of the score."""
    name, folder, by_hand = original
    images = torch.rand(6, 3, *size)
    reward = rsaft.make_reward(name, folder)
    expected = by_hand(images, PROMPTS)
    assert_close(reward(images, PROMPTS), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 1e-2 * expected.abs().mean()
    assert_close(reward(images[2:4], PROMPTS[2:4]), expected[2:4], rtol=1e-4, atol=1e-4)
    _, gradient = rsaft.reward_gradient(reward, images, PROMPTS)
    step = rsaft.sample_perturbation(gradient, 5e-4)
    difference = (reward(images + step, PROMPTS) - reward(images - step, PROMPTS)) / 2
    assert_close((gradient * step).flatten(1).sum(1), difference, rtol=0.05, atol=1e-3)


KEYS = {
    "mps": ["mps.cross_model.layers.2.1.fn.attn_out.weight", "mps.model.text_model.final_layer_norm.bias"],
    "cyclereward": ["mlp.layers.8.bias", "blip.text_encoder.encoder.layer.0.output.dense.weight"]}


def test_missing_and_surplus_keys_are_refused_by_name(original):
    name, folder, _ = original
    file = folder / name / "model.safetensors"
    whole = load_file(file)
    for key in KEYS[name]:
        save_file({other: tensor for other, tensor in whole.items() if other != key}, file)
        with pytest.raises(rsaft.UserError, match=re.escape(key.split(".", 3 if name == "mps" else 2)[-1])):
            rsaft.make_reward(name, folder)
        save_file(whole | {key + "_too_many": whole[key].clone()}, file)
        with pytest.raises(rsaft.UserError, match="too_many"):
            rsaft.make_reward(name, folder)
