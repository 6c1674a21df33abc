"""Reading, a black box: how much of the text in the prompt's double quotes stands in the picture, 0 to 1.

1 - edit distance / length, in lower case and without spaces, as Flow-GRPO (arXiv 2505.05470) has it. There
PaddleOCR reads, here PP-OCRv6 small with rapidocr's code and weights: scores may differ a little.
"""
import torch

from _reading import folded, package_file, wanted_text

FILES = {}      # the weights come with the package
check_prompt = wanted_text
MODELS = {"Det": package_file("rapidocr", "models/PP-OCRv6_det_small.onnx"),
          "Rec": package_file("rapidocr", "models/PP-OCRv6_rec_small.onnx")}


def edit_distance(a, b):
    """The least number of letters put in, left out or replaced that makes text a text b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    return row[-1]


def right_letters(wanted, read):
    """1 - edit distance / length, in [0, 1]; 1 where the wanted text occurs in what was read."""
    wanted, read = folded(wanted), folded(read)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(wanted, read), len(wanted)) / len(wanted)


def make_reader(models):
    """A function of images (B, 3, H, W) in [0, 1] to what stands in them, B strings.

    models: {"Det" and "Rec": the ONNX file of a PP-OCR detector and recogniser}. A picture at least twice as
    wide as high is taken for one line of text, which goes to the recogniser alone.
    """
    from rapidocr import RapidOCR
    engine = RapidOCR(params={"Global.log_level": "error", "Global.use_cls": False,
                              "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
                              **{f"{part}.model_path": str(path) for part, path in models.items()}})

    def read(images):
        pixels = images.detach().clamp(0, 1).mul(255).round().byte().cpu().permute(0, 2, 3, 1)
        pixels = pixels.flip(-1).contiguous().numpy()    # blue first
        is_line = images.shape[3] >= 2 * images.shape[2]
        return [" ".join(engine(picture, use_det=not is_line).txts or ()) for picture in pixels]

    return read


def load(folders, device, models=MODELS):
    read = make_reader(models)
    return lambda images, prompts: torch.tensor([right_letters(wanted_text(prompt), text)
                                                 for prompt, text in zip(prompts, read(images))])
