"""GenEval, graded: the share of what a prompt names that its picture shows, 0 to 1. Not differentiable."""
from functools import partial
from pathlib import Path

from rsaft import import_file

geneval = import_file(Path(__file__).with_name("geneval.py"))    # by its path, as there may be a package
FILES, check_prompt, load = geneval.FILES, geneval.check_prompt, partial(geneval.load, graded=True)
