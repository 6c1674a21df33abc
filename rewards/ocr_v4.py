"""ocr by another reader, PP-OCRv4 out of rapidocr-onnxruntime: a judge of what ocr_likelihood has tuned."""
from pathlib import Path

from _reading import package_file
from rsaft import import_file

ocr = import_file(Path(__file__).with_name("ocr.py"))
FILES, check_prompt = ocr.FILES, ocr.check_prompt
MODELS = {"Det": package_file("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx"),
          "Rec": package_file("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx")}


def load(folders, device):
    return ocr.load(folders, device, MODELS)
