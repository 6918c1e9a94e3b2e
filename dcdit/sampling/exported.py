"""The files that make an exported folder a pipeline of diffusers, which needs no dcdit."""

import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

import dcdit
from dcdit.checkpoints.load import Weights
from dcdit.sampling.bundle import gather
from dcdit.settings.plugins import plugins_of

COMPONENT = "transformer"
"""The folder, and the argument of the pipeline, of the network."""

_TITLE = """The network of this folder and its sampling: code of dcdit {version} (Apache License 2.0), in one file.

Written by `dcdit export`, which gathers it from the modules that the comments name. It reads config.json and
model.safetensors of this folder, and runs without dcdit.
"""
_PRETRAINED = '''class Pretrained:
    """Stands for the part of dcdit that loads and saves networks, which this file does not need."""

    def __init_subclass__(cls, **ignored: object) -> None:
        super().__init_subclass__()'''


_AGAIN = """
# diffusers runs this file anew for each pipeline, in the same module. Two copies of a class are two classes, so the
# definitions of the first time stay, unless the file has changed.
_source = Path(__file__).read_bytes()
if globals().get("_first", (None,))[0] == _source:
    globals().update(_first[1])
else:
    _first = _source, dict(globals())
"""


@cache
def network_code() -> str:
    """The source of one file that defines :class:`dcdit.sampling.exported_model.ExportedModel`, without dcdit."""
    code = gather(
        {"ExportedModel": "dcdit.sampling.exported_model"},
        _TITLE.format(version=dcdit.__version__),
        {"dcdit.network.pretrained:Pretrained": _PRETRAINED},
    )
    return f"{code}\n{_AGAIN}"


def pipeline_files(weights: Weights) -> dict[str, bytes]:
    """The files of a pipeline of diffusers for a network of dcdit, by their names in the folder.

    They are the same for all networks. The file of the network has a digest of its code in its name: diffusers loads
    code by that name, and would otherwise mix the code of two folders in one process.

    Returns:
        None of them for weights whose latents are not known, and for those that need a plug-in, whose code is not ours.
    """
    if weights.latents is None or plugins_of({"model": weights.model, "diffusion": weights.process.spec}):
        return {}
    code = network_code().encode()
    module = f"dcdit_{hashlib.sha256(code).hexdigest()[:8]}"
    index = {
        "_class_name": ["pipeline", "DCDiTPipeline"],
        "_diffusers_version": version("diffusers"),
        COMPONENT: [module, "ExportedModel"],
        "vae": [None, None],
    }
    return {
        "model_index.json": (json.dumps(index, indent=2) + "\n").encode(),
        "pipeline.py": Path(__file__).with_name("exported_pipeline.py").read_bytes(),
        f"{COMPONENT}/{module}.py": code,
    }
