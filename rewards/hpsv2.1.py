"""HPSv2.1: HPSv2 with other weights; about 14 to 32."""
from pathlib import Path

from rsaft import import_file

hpsv2 = import_file(Path(__file__).with_name("hpsv2.py"))    # by its path: there is a package of that name
load = hpsv2.load
FILES = {"HPS_v2.1_compressed.pt": "xswu/HPSv2",
         "tokenizer_config.json": hpsv2.FILES["tokenizer_config.json"]}
