"""Pages that show the notebooks, with the pictures that their cells have drawn."""

from links import ROOT, place_of, rewritten
from nbconvert import MarkdownExporter


def notebook_files() -> dict[str, str | bytes]:
    """The page of each notebook, its pictures, and the notebook itself, by their places on the site."""
    files: dict[str, str | bytes] = {}
    exporter = MarkdownExporter()  # type: ignore[no-untyped-call]
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        path = f"notebooks/{notebook.name}"
        body, made = exporter.from_filename(str(notebook), {"unique_key": notebook.stem})
        title, text = rewritten(body, path, place_of(path)).split("\n", 1)
        download = f"[`{notebook.name}`]({notebook.name})"
        about = (
            f"This page shows a notebook. To run it, open {download} in Jupyter, or on Colab once dcdit is released."
        )
        files[place_of(path)] = f"{title}\n\n{about}\n{text}"
        files[path] = notebook.read_bytes()
        files |= {f"notebooks/{name}": content for name, content in made["outputs"].items()}
    return files
