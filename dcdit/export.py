"""Export a trained network: ``python -m dcdit.export checkpoint=runs/b_n4 out=exported/b_n4``.

Writes a folder with ``model.safetensors``, ``config.json`` and a model card, which ``DCDiT.from_pretrained`` and every
command of dcdit load, and which ``push=<owner>/<repository>`` uploads to the Hugging Face hub. With
``format=reference`` it writes a file for the authors' own implementation.
"""

from pathlib import Path
from typing import Annotated, Literal

from dcdit.checkpoints.settings import AssumeSettings, Paths, WeightsKind
from dcdit.checks import FLOAT_NAMES, Matches, config
from dcdit.errors import UserError
from dcdit.sampling.settings import ExamplesSettings
from dcdit.settings.command import command


@config
class ExportConfig:
    """The configuration of ``dcdit.export``; ``configs/export.yaml`` describes each key."""

    checkpoint: str
    assume: AssumeSettings
    weights: WeightsKind
    out: str
    format: Literal["dcdit", "space", "reference"]
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], FLOAT_NAMES]
    license: str | None
    note: str | None
    push: Annotated[str, Matches(r"[\w.-]+/[\w.-]+", "a repository, such as me/dcdit-b")] | None
    private: bool
    examples: ExamplesSettings
    paths: Paths

    def __post_init__(self) -> None:
        if self.format == "reference" and (self.push or self.dtype != "fp32"):
            key, value = ("push", self.push) if self.push else ("dtype", self.dtype)
            raise UserError(f"{key}={value} is for format=dcdit, leave it out")
        if self.format == "reference" and self.examples.columns:
            raise UserError(f"examples.columns={self.examples.columns} is for format=dcdit, leave it out")


@command("export")
def export(config: ExportConfig) -> Path:
    """Export a network as ``config`` says; returns the folder or file."""
    from dcdit.checkpoints.resolve import resolve_checkpoint

    source, out = resolve_checkpoint(config.checkpoint, config.paths.runs), Path(config.out)
    from dcdit.checkpoints.export import Card, check_new_file, check_replaceable, push, write_exported, write_reference
    from dcdit.checkpoints.load import read_weights
    from dcdit.explorer.space import MODEL, check_new_folder, write_space
    from dcdit.reporting.collect import figures_of_checkpoint
    from dcdit.runs.state import command_of
    from dcdit.runtime.files import replacing_folder
    from dcdit.sampling.exported import pipeline_files

    {"reference": check_new_file, "space": check_new_folder, "dcdit": check_replaceable}[config.format](out)
    weights = read_weights(source, config.assume)
    if config.format == "reference":
        print(write_reference(out, weights, config.weights))
        return out
    figures = figures_of_checkpoint(source.home, weights.step, config.weights)
    examples = None
    if config.examples.columns:
        from dcdit.sampling.examples import sample_examples

        examples = sample_examples(config.checkpoint, config.weights, config.assume, config.examples)
    notes = (config.license, config.note, command_of(source.home))
    repository = config.push if config.format == "dcdit" else None
    card = Card(*notes, figures, repository, pipeline_files(weights), examples)
    if config.format == "space":
        with replacing_folder(out) as draft:
            said = write_exported(draft / MODEL, weights, config.weights, config.dtype, card)
            write_space(draft, f"{out.resolve().name}: the budget of a DC-DiT", config.license)
        print(said.replace(str(draft), str(out)))
        print(f"{out}: a Space with the explorer; python {out / 'app.py'} runs it here")
    else:
        print(write_exported(out, weights, config.weights, config.dtype, card))
    if config.push:
        print(f"{config.push}: {push(out, config.push, config.private, config.format == 'space')}")
    return out


if __name__ == "__main__":
    export.main()
