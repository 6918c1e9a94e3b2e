"""Files that are written whole or not at all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write plain values, all at once or not at all."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(values, indent=1) + "\n")
    draft.replace(path)
