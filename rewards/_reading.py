"""What the rewards that read share: the wanted text of a prompt, and weights that come with a package."""
import importlib.util
from pathlib import Path

from rsaft import UserError


def package_file(package, name):
    """The path of a file of an installed package, which isn't imported. Raises UserError without it."""
    found = importlib.util.find_spec(package)
    path = found and Path(found.submodule_search_locations[0], name)
    if not path or not path.is_file():
        raise UserError(f"there is no {package} with {name}; pip install -r rewards/requirements.txt")
    return path


def wanted_text(prompt):
    """What a prompt wants to be written: the first text in double quotes. Raises UserError without one."""
    parts = prompt.split('"')
    if len(parts) < 3 or not folded(parts[1]):
        raise UserError("the rewards that read need a text in double quotes in each prompt; "
                        f"{prompt!r} has none")
    return parts[1]


def folded(text):
    """Lower case, without spaces: as texts are compared."""
    return "".join(text.lower().split())
