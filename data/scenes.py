"""The built-in sample: small rendered scenes with five captions and a few questions each. With it qf runs offline.

write_sample(Path("sample"))      # sample/images/*.png, sample/captions.csv, sample/questions.jsonl
"""

import csv
import io
import json
import os
from pathlib import Path

from .scene_drawing import render
from .scene_language import Meaning, Part, captions, captions_with_meaning, fits, questions, unique_share
from .scene_model import Scene, Thing, holds, make_scene, scene_named
from .scene_queries import QUERIES, Query, answerable

__all__ = [
    "QUERIES",
    "Meaning",
    "Part",
    "Query",
    "Scene",
    "Thing",
    "answerable",
    "captions",
    "captions_with_meaning",
    "fits",
    "holds",
    "make_scene",
    "questions",
    "render",
    "scene_named",
    "unique_share",
    "write_sample",
]


def write_sample(folder: Path, *, train: int = 4000, val: int = 250, test: int = 500, seed: int = 0) -> Path:
    """Write the sample; returns the path of its captions.csv (columns image, caption, split; a row for each caption).

    The same arguments give the same bytes. captions.csv is written last: if it exists, the sample is complete.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, asked = io.StringIO(newline=""), io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(("image", "caption", "split"))
    for split, count in (("train", train), ("val", val), ("test", test)):
        for index in range(count):
            scene = make_scene(seed, split, index)
            image = f"images/{scene.name}.png"
            picture = io.BytesIO()
            render(scene).save(picture, "PNG")
            _replace(folder / image, picture.getvalue())
            table.writerows((image, caption, split) for caption in captions(scene))
            for question, answer, kind in questions(scene):
                row = {"image": image, "question": question, "answer": answer, "type": kind, "split": split}
                asked.write(json.dumps(row) + "\n")
    _replace(folder / "questions.jsonl", asked.getvalue().encode())
    _replace(folder / "captions.csv", rows.getvalue().encode())
    return folder / "captions.csv"


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
