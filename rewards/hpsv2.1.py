"""HPSv2.1: HPSv2 with other weights; about 14 to 32."""
from hpsv2 import FILES as HPSV2_FILES, load  # noqa: F401, load is what rsaft.py looks for

FILES = {"HPS_v2.1_compressed.pt": "xswu/HPSv2", "tokenizer_config.json": HPSV2_FILES["tokenizer_config.json"]}
