"""A folder that a Hugging Face Space runs as it is: the explorer, on a network that lies beside it."""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import dcdit
from dcdit.errors import UserError
from dcdit.runtime.files import make_writable_folder, write_text
from dcdit.settings.published import CONFIG_DIR

MODEL = "model"
"""The folder of the exported network."""

_NEEDED = (
    *("torch", "diffusers", "gradio", "numpy", "safetensors", "huggingface-hub", "hydra-core", "omegaconf"),
    *("matplotlib", "pillow", "rich", "filelock", "typing-extensions"),
)
"""The packages that the explorer imports, without those that training and evaluation need."""

_APP = '''"""The explorer of dcdit, on the network in the folder `model`. Written by `dcdit export format=space`."""

import os
import sys
from pathlib import Path

folder = Path(__file__).resolve().parent
os.chdir(folder)
sys.path.insert(0, str(folder))  # the dcdit beside this file

from dcdit.explore import explore  # noqa: E402

# A Space is reached by a name of its own, through a proxy that asks at port 7860.
names = os.environ.get("SPACE_HOST", "")
sys.argv[1:] = ["checkpoint=model", "host=0.0.0.0", "port=7860", "browser=false", f"names=[{names}]", *sys.argv[1:]]
explore.main()
'''
_README = """---
{values}
---

# {title}

Move a compute budget and see what it does to an image, its cost and the tokens that the router keeps. This Space runs
the explorer of dcdit {version} on the network in [`model`]({model}/README.md). `python app.py` runs it elsewhere, with
the packages of `requirements.txt`.
"""


def check_new_folder(out: Path) -> None:
    """Check that a Space can be written into the folder ``out``; UserError unless it is new or empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out={out} is there: a Space is written into a new or empty folder, choose another")
    make_writable_folder(out.resolve().parent, f"out={out}")


def write_space(out: Path, title: str, license_name: str | None) -> None:
    """Write everything of a Space but the folder :data:`MODEL` into the folder ``out``.

    dcdit itself is copied beside the page: a Space installs packages of the index alone.

    Args:
        out: the folder, which exists.
        title: of the Space.
        license_name: the hub's identifier of a license; None for none.
    """
    values = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        **({"license": license_name} if license_name else {}),
    }
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items())
    write_text(out / "README.md", _README.format(values=head, title=title, version=dcdit.__version__, model=MODEL))
    write_text(out / "app.py", _APP)
    # A version such as 2.15.0+cu130 names a build of one machine, which the index may not have.
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in _NEEDED]
    write_text(out / "requirements.txt", "\n".join(pins) + "\n")
    package, unwanted = Path(dcdit.__file__).parent, shutil.ignore_patterns("__pycache__", "local")
    shutil.copytree(package, out / "dcdit", ignore=unwanted)
    shutil.copytree(CONFIG_DIR, out / "dcdit" / "configs", ignore=unwanted, dirs_exist_ok=True)
