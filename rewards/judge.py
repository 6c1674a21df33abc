"""A second model of PickScore's form, never trained on. There is one in tiny/, and none on any hub."""
from rsaft import load_pickscore as load  # noqa: F401, what rsaft.py looks for

FILES = {"config.json": None, "tokenizer_config.json": None}
