"""Caption annotations of research datasets: COCO captions JSON, Karpathy's split JSON, Flickr8k and Flickr30k tokens.

Each is read whole: memory is about ten times a JSON file's size, five times that of a token file."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, TypeGuard

from ..config import ReadOptions
from ..errors import DatasetError
from .captions import texts
from .columns import image_name
from .documents import document_rows
from .names import image_folder, images_below, names_in
from .records import Record, bounds_of, split_of, splits_in_names
from .rows import json_document, text_lines
from .sources import ImageFile
from .tables import Table, read_joined, splits_of_files
from .vqa import is_asked, read_asked

COCO = "name COCO's captions_*.json, not its boxes or key points"


def read_json(paths: Sequence[Path], options: ReadOptions) -> tuple[str, str, Iterator[Record]]:
    """Kind, a description, and the records of JSON documents: COCO captions, a Karpathy split, questions of VQAv2, OK-VQA or
    GQA, or documents that hold rows of a table. All but a Karpathy split may be several files. DatasetError if one is none of these."""
    documents = [json_document(path) for path in paths]
    first = documents[0]
    if all(_is_coco(document) for document in documents):
        return "coco", *_coco(documents, paths, options)
    if len(paths) == 1 and _is_karpathy(first):
        return "karpathy", *_karpathy(first["images"], paths[0], options)
    asked = list(map(is_asked, documents))
    if all(asked):
        return "vqa", *read_asked(documents, paths, options)
    if any(asked):
        raise DatasetError(f"{paths[asked.index(True)]} holds questions; give it with --questions, beside the captions")
    every = zip(paths, documents, splits_of_files(paths), strict=True)
    tables = [
        Table(path, partial(iter, document_rows(document, path, options)), split) for path, document, split in every
    ]
    return "json", *read_joined(tables, options)


def caption_document(document: Any, path: Path, options: ReadOptions) -> Sequence[Any] | None:
    """The rows of a JSON document that is a table; None for COCO captions and a Karpathy split. DatasetError if it is none
    of these."""
    if _is_coco(document):
        _check_captions(document, path, options)
        return None
    return None if _is_karpathy(document) else document_rows(document, path, options)


def _check_captions(document: dict[str, Any], path: Path, options: ReadOptions) -> list[dict[str, Any]]:
    """The annotations of a COCO document. DatasetError if they are no captions, and images need some."""
    annotations = document.get("annotations")
    captioned = _objects(annotations) and any("caption" in annotation for annotation in annotations)
    if not _objects(annotations) or not (captioned or options.allow_uncaptioned):
        raise DatasetError(f"{path} holds no captions; {COCO}")
    return annotations


def _is_coco(document: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a document has images with their ids, and annotations of these."""
    return isinstance(document, dict) and _objects(document.get("images")) and "annotations" in document


def _is_karpathy(document: Any) -> TypeGuard[dict[str, Any]]:
    if not isinstance(document, dict) or not _objects(document.get("images")):
        return False
    return any("sentences" in image for image in document["images"])


def _objects(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)


def _coco(
    documents: Sequence[dict[str, Any]], paths: Sequence[Path], options: ReadOptions
) -> tuple[str, Iterator[Record]]:
    """The records of COCO captions: `images` with `id` and `file_name`, `annotations` with `image_id` and `caption`."""
    entries: list[tuple[str, list[str], str | None, Path]] = []  # name, captions, split, folder
    orphans = 0
    for document, path, split in zip(documents, paths, splits_in_names([path.name for path in paths]), strict=True):
        annotations = _check_captions(document, path, options)
        captions: dict[str, list[str]] = {str(image.get("id")): [] for image in document["images"]}
        for annotation in annotations:
            if (belongs := captions.get(str(annotation.get("image_id")))) is None:
                orphans += 1
            else:
                belongs += texts(annotation.get("caption"))
        names = [str(image.get("file_name") or "") for image in document["images"]]
        words = path.stem.split("_")  # captions_val2017 may be the captions of val2017/
        folder = _folder(path, ["_".join(words[at:]) for at in range(len(words))], names, options)
        entries += [
            (name, captions[str(image.get("id"))], split, folder)
            for name, image in zip(names, document["images"], strict=True)
        ]
    found = f"COCO captions: {len(entries):,} images, {sum(len(entry[1]) for entry in entries):,} captions; images in "
    found += ", ".join(dict.fromkeys(str(folder) for *_, folder in entries))
    if orphans:
        found += f"; {orphans:,} captions of images that it does not list are left out"
    return found, (_record(number, *entry, options) for number, entry in enumerate(entries))


def _karpathy(images: Sequence[dict[str, Any]], path: Path, options: ReadOptions) -> tuple[str, Iterator[Record]]:
    """The records of a Karpathy split: `images` with `filename`, perhaps `filepath` (its folder), `sentences` and `split`."""
    names = ["/".join(str(image[part]) for part in ("filepath", "filename") if image.get(part)) for image in images]
    captions = [texts(image.get("sentences")) for image in images]
    folder = _folder(path, [], names, options)
    found = f"Karpathy split: {len(names):,} images, {sum(map(len, captions)):,} captions; images in {folder}"
    splits = [None if image.get("split") is None else str(image["split"]) for image in images]
    entries = zip(names, captions, splits, repeat(folder))
    return found, (_record(number, *entry, options) for number, entry in enumerate(entries))


def _folder(path: Path, parts: Sequence[str], names: Sequence[str], options: ReadOptions) -> Path:
    """Where the images are: --images, one of its folders `parts`, or a folder near the file."""
    if options.images:
        top = next((options.images / part for part in parts if (options.images / part).is_dir()), options.images)
        return images_below(top, names[:100])
    return image_folder(path, names[:100])


def _record(
    number: int, name: str, captions: list[str], split: str | None, folder: Path, options: ReadOptions
) -> Record:
    name = image_name(name) or ""
    if not name:
        return Record(f"image {number}", "", None, (), "train", f"image {number} has no file name")
    match = names_in(str(folder)).find(name)
    source = ImageFile(str(folder), match.name, bounds_of(options))
    return Record(name, name, source, tuple(captions), split_of(name, split, options), match.problem)


def read_flickr_tokens(path: Path, options: ReadOptions) -> tuple[str, Iterator[Record]]:
    """Records of lines `NAME.jpg#0<TAB>caption`. Official split lists beside the file are used if present."""
    splits: dict[str, str] = {}
    for name, split in (("train", "train"), ("dev", "val"), ("test", "test")):
        for file in sorted(path.parent.glob(f"*.{name}Images.txt")):
            splits.update({line.strip(): split for line in text_lines(file) if line.strip()})

    def records() -> Iterator[Record]:
        captions: dict[str, list[str]] = {}
        for number, line in enumerate(text_lines(path), start=1):
            if line.strip():
                name, tab, caption = line.partition("\t")
                if not tab or "#" not in name:
                    raise DatasetError(
                        f"{path}, line {number}: expected NAME.jpg#0, a tab and a caption, as Flickr8k.token.txt has"
                    )
                captions.setdefault(image_name(name.rsplit("#", 1)[0]) or "", []).extend(texts(caption))
        folder = _folder(path, [], list(captions)[:100], options)
        for number, (name, found) in enumerate(captions.items()):
            record = _record(number, name, found, splits.get(name) if splits else None, folder, options)
            if splits and name not in splits and not record.problem:
                record = replace(record, problem="in none of the split lists")
            yield record

    return "NAME#n<TAB>caption lines" + (", official splits" if splits else ""), records()
