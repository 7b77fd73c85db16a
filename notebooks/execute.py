"""Runs the notebooks in place and makes their pictures small enough to commit.

Run:     python notebooks/execute.py              (all of them, about a minute)
         python notebooks/execute.py step_loss    (one)

A picture keeps 96 colours and a third of its bytes. Each notebook stays under 500 kB.
"""

import argparse
import base64
import io
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def squeeze(png):
    """A base64 png -> the same picture with a palette of 96 colours."""
    from PIL import Image
    image, small = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    image.quantize(96, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def run(name):
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    ExecutePreprocessor(timeout=300).preprocess(notebook, {"metadata": {"path": str(FOLDER)}})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = squeeze(output["data"]["image/png"])
    nbformat.write(notebook, path)
    print(f"{name}: {path.stat().st_size // 1000} kB")


def main():
    names = [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of them")
    chosen = parser.parse_args().names or names
    for name in chosen:
        if name not in names:
            parser.error(f"no notebook {name}; there are {', '.join(names)}")
    for name in chosen:
        run(name)


if __name__ == "__main__":
    main()
