"""Questions of research datasets, one JSON document or two: VQAv2 and OK-VQA, whose questions and annotations are two files,
and GQA. They name images by ids.

Documents are read whole: memory is about ten times a file's size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from ..config import ReadOptions
from ..errors import DatasetError
from .names import image_folder, images_below, names_in
from .records import Record, splits_in_names
from .tables import Table, read_joined

LOOKED_AT = 20  # ids that tell how the files of the images are named
ASKED = rb'"(question_id|imageId)"'  # stands in such documents, and in no other
PARTS = ("questions", "annotations")


def is_asked(document: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a document is one of VQAv2, OK-VQA or GQA."""
    return _is_gqa(document) or (isinstance(document, dict) and any(_of(document, part) for part in PARTS))


def _of(document: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """The questions or the annotations of a VQA document; none of any other."""
    rows = document.get(part)
    if not isinstance(rows, list) or not rows or "images" in document:
        return []
    whole = all(isinstance(row, dict) and "question_id" in row and "image_id" in row for row in rows)
    return rows if whole else []


def _is_gqa(document: Any) -> bool:
    if not isinstance(document, dict) or not document:
        return False
    return all(isinstance(row, dict) and "imageId" in row and "question" in row for row in document.values())


def asked_tables(documents: Sequence[dict[str, Any]], paths: Sequence[Path]) -> list[Table]:
    """The questions of the documents as rows with `image` (an id), `question`, `answers` and `type`, a table a document of
    questions. DatasetError if answers or questions are missing."""
    notes: dict[tuple[str, str], dict[str, Any]] = {}
    kinds: dict[str, Any] = {}
    for document in documents:
        notes.update({_key(row): row for row in _of(document, "annotations")})
        if isinstance(named := document.get("question_types"), dict):  # OK-VQA's kinds of knowledge
            kinds.update(named)
    tables = []
    for document, path in zip(documents, paths, strict=True):
        if _is_gqa(document):
            tables.append(Table(path, partial(_gqa_rows, document), splits_in_names([path.name])[0]))
        elif questions := _of(document, "questions"):
            subtype = str(document.get("data_subtype") or path.stem)
            tables.append(Table(path, partial(_vqa_rows, questions, notes, kinds), splits_in_names([subtype])[0]))
            if not any(_key(row) in notes or "answers" in row for row in questions):
                raise DatasetError(
                    f"{path} holds questions without their answers; give the file of annotations beside it, too"
                )
    if not tables:
        raise DatasetError(
            f"{paths[0]} holds answers without their questions; give the file of questions beside it, too"
        )
    return tables


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    """Ids of questions repeat between VQAv2 and OK-VQA, those of one image do not."""
    return str(row["image_id"]), str(row["question_id"])


def _vqa_rows(
    questions: Sequence[dict[str, Any]], notes: Mapping[tuple[str, str], dict[str, Any]], kinds: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    for row in questions:
        note = notes.get(_key(row), row)
        answers = note.get("answers") or note.get("multiple_choice_answer")
        kind = kinds.get(str(note.get("question_type"))) or note.get("answer_type") or note.get("question_type")
        yield {"image": str(row["image_id"]), "question": row.get("question"), "answers": answers, "type": kind}


def _gqa_rows(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for row in document.values():
        types = row.get("types")
        kind = types.get("structural") if isinstance(types, dict) else None
        yield {"image": str(row["imageId"]), "question": row["question"], "answers": row.get("answer"), "type": kind}


def read_asked(
    documents: Sequence[dict[str, Any]], paths: Sequence[Path], options: ReadOptions
) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and a record for each image that the questions are about. Its file is that of COCO, or
    one that the id names."""
    options = replace(
        options, image_column=None, caption_column=None, split_column=None, key_column=None, question_column=None,
        answer_column=None, type_column=None, conversation_column=None,
    )  # fmt: skip
    subtypes = {path: str(document.get("data_subtype") or "") for document, path in zip(documents, paths, strict=True)}
    tables = []
    for table in asked_tables(documents, paths):
        name = _naming(table, subtypes[table.path], options)
        tables.append(replace(table, open=partial(_named, table.open, name)))
    _, records = read_joined(tables, options)
    files = f"{len(paths)} files" if len(paths) > 1 else paths[0].name
    return f"questions about images by their ids, {files}", records


def _named(rows: Callable[[], Iterator[dict[str, Any]]], name: Callable[[str], str]) -> Iterator[dict[str, Any]]:
    return ({**row, "image": name(row["image"])} for row in rows())


def _naming(table: Table, subtype: str, options: ReadOptions) -> Callable[[str], str]:
    """How ids name files: the first way in which one of the first images is there."""
    padded: list[Callable[[str], str]] = [
        lambda image: f"COCO_{subtype}_{image:0>12}.jpg",
        lambda image: f"{image:0>12}.jpg",
        lambda image: f"{image}.jpg",
    ]
    below: list[Callable[[str], str]] = [partial(_below, subtype, way) for way in padded] if subtype else []
    ids = [row["image"] for row, _ in zip(table.open(), range(LOOKED_AT), strict=False)]
    top = options.images
    for way in (*below, *padded) if top else ():
        if any(names_in(str(top)).find(way(image)).found for image in ids):
            return way
    for way in padded:
        names = [way(image) for image in ids]
        folder = images_below(top, names) if top else image_folder(table.path, names)
        if any(names_in(str(folder)).find(name).found for name in names):
            return way
    return padded[0] if subtype else padded[2]


def _below(folder: str, way: Callable[[str], str], image: str) -> str:
    return f"{folder}/{way(image)}"
