"""Captions for pictures: by a run of stage 2 and its language model, or by the generation head of stage 1."""

import csv
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..pipeline.artifacts import read_manifest
from ..pipeline.config import ComputeOptions
from ..pipeline.datasets.records import IMAGE_SUFFIXES
from ..pipeline.device import resolve_device, resolve_precision
from ..pipeline.encoders.picture import same_encoder
from ..pipeline.errors import QfError
from ..pipeline.features.codecs import decode
from ..pipeline.features.reader import Features
from ..pipeline.files import atomic_file
from ..pipeline.images import UnreadableImage, load_image
from ..pipeline.results import OnStatus, Result, Status, no_status
from ..pipeline.workspace import Workspace
from ..trainer.config import GenerateOptions
from ..trainer.decoding import Decoding, OnText
from ..trainer.manifest import RUN
from ..trainer.stage1.captioner import Captioner
from ..trainer.stage2.generate import open_generator
from .config import CaptionOptions
from .encode.qformer import Run, check_features

log = logging.getLogger(__name__)
GROUP = 32  # pictures at once
CAPTION_LENGTH = 30  # most tokens
BEAMS = 5


class Speaker(Protocol):
    """A model that generates texts for pictures."""

    prompt: str  # with {} for the question where it answers some

    def texts(
        self, image_embeds: Tensor, questions: Sequence[str], how: Decoding, on_text: OnText | None = None
    ) -> list[str]:
        """A text for each of N pictures (N, T, W) and its question, "" for a caption."""


@dataclass(frozen=True)
class Caption(Result):
    """A picture with its text."""

    image: str  # a file, or a key of the features
    caption: str

    def __str__(self) -> str:
        return f"{self.image}\t{self.caption}"


def open_speaker(
    workspace: Workspace, name: str | None, stage: int | None, on: ComputeOptions, prompt: str | None = None
) -> tuple[Speaker, Run]:
    """The run of that name, or the latest of that stage, ready to generate; of stage 2, or else 1, without either.

    `prompt` takes the place of the run's own. QfError if there is no run, or if it is one of stage 1 that was trained without
    generation or is to read a prompt."""
    folder = workspace.run(name) if name else workspace.latest_run(stage or 2)
    if folder is None and stage is None:
        folder = workspace.latest_run(1)
    if folder is None:
        raise QfError(
            f"{workspace.folder} has no finished run of stage {stage or 2}; train one with `qf train --stage {stage or 2}`"
        )
    device = resolve_device(on.device)
    dtype = resolve_precision(on.precision, device)
    manifest = read_manifest(folder, RUN)
    if manifest["stage"] == 2:
        return open_generator(folder, device, dtype, prompt), Run(folder, device, on.precision, stage=2)
    if "itg" not in manifest["train"]["losses"]:
        raise QfError(
            f"run {folder} cannot write captions: its generation head was never trained (--losses {manifest['train']['losses']}); "
            "train one with itg, or a run of stage 2"
        )
    if prompt is not None:
        raise QfError(f"run {folder} reads no prompt, as none of stage 1 does; leave --prompt out")
    run = Run(folder, device, on.precision)
    return Captioner(run.embedder), run


def decoding(options: GenerateOptions, longest: int, length_penalty: float = 1.0, beams: int = BEAMS) -> Decoding:
    """How to generate texts of at most `longest` tokens, by so many beams, unless the options say otherwise."""
    options.check()
    beams = 1 if options.temperature else beams if options.beams is None else options.beams
    return Decoding(
        beams,
        options.min_length,
        longest if options.max_length is None else options.max_length,
        length_penalty if options.length_penalty is None else options.length_penalty,
        options.temperature,
        options.top_p,
        options.repetition_penalty,
        options.seed,
    )


def caption(
    workspace: Workspace,
    images: Sequence[str],
    options: CaptionOptions,
    generate: GenerateOptions,
    run: str | None,
    on: ComputeOptions,
    progress: OnStatus = no_status,
) -> Iterator[Caption]:
    """The captions of pictures: files, folders of them, keys of the features, or with `options.features` all images of these.

    With `options.out` they are also written there, whole, once all are done; the same call again goes on with a file that was
    begun. Pictures that cannot be read are left out with a warning. QfError if none is left."""
    speaker, opened = open_speaker(workspace, run, options.stage, on, generate.prompt)
    if "{}" in speaker.prompt:
        raise QfError(
            f"{speaker.prompt!r}, the prompt of run {opened.folder}, asks a question; ask one with `qf answer`, or give another --prompt"
        )
    names = named_pictures(images, options, workspace)
    how = decoding(generate, CAPTION_LENGTH)
    settings = {"run": opened.manifest["sha256"], "images": names, "how": asdict(how)}
    done = _begun(options.out, settings)
    yield from (Caption(name, text) for name, text in done.items())
    left = [name for name in names if name not in done]
    for some, embeds in open_pictures(left, workspace, opened):
        made = [
            Caption(name, text) for name, text in zip(some, speaker.texts(embeds, [""] * len(some), how), strict=True)
        ]
        done |= {one.image: one.caption for one in made}
        if options.out is not None:
            with open(_part(options.out), "a", encoding="utf-8") as file:
                file.writelines(json.dumps([one.image, one.caption]) + "\n" for one in made)
        progress(Status("caption", len(done), len(names), ""))
        yield from made
    if not done:
        raise QfError("none of the pictures can be read; give others")
    if options.out is not None:
        _write(options.out, [Caption(name, done[name]) for name in names if name in done])


def named_pictures(images: Sequence[str], options: CaptionOptions, workspace: Workspace) -> list[str]:
    """The pictures that are meant, in order, each once. QfError if there is none."""
    if options.features:
        features = Features(workspace.features)
        rows = features.rows(options.split)
        return [features.keys[row] for row in rows.tolist()]
    names: list[str] = []
    for image in images:
        if Path(image).is_dir():
            found = sorted(p for p in Path(image).rglob("*") if p.suffix[1:].lower() in IMAGE_SUFFIXES and p.is_file())
            if not found:
                raise QfError(f"{image} holds no pictures")
            names += map(str, found)
        else:
            names.append(image)
    if not names:
        raise QfError(
            "no picture to caption: give files, a folder, keys of the features, or --features for all of them"
        )
    return list(dict.fromkeys(names))


def open_pictures(names: Sequence[str], workspace: Workspace, run: Run) -> Iterator[tuple[list[str], Tensor]]:
    """The pictures in groups, with the frozen tokens (N, T, W) of each group. QfError for a name that is neither a file nor a key.

    Files that are no readable picture are left out, with a warning."""
    files = [name for name in names if Path(name).is_file()]
    keys = [name for name in names if name not in set(files)]
    if keys:
        if not workspace.features.is_dir():
            raise QfError(f"{keys[0]}: no such picture; give a file, a folder, or a key of extracted features")
        features = Features(workspace.features)
        check_features(run, features)
        places = {key: row for row, key in enumerate(features.keys)}
        if missing := [key for key in keys if key not in places]:
            raise QfError(f"{missing[0]}: no such picture, and no key of the features in {features.folder}")
        for start in range(0, len(keys), GROUP):
            some = keys[start : start + GROUP]
            columns = features.read(np.array([places[key] for key in some]))
            yield some, decode({name: column.to(run.device) for name, column in columns.items()})
    if files:
        encoder = same_encoder(run.manifest["encoder"], run.device)
        for start in range(0, len(files), GROUP):
            readable, pixels = [], []
            for name in files[start : start + GROUP]:
                try:
                    pixels.append(encoder.preprocessing(load_image(Path(name))))
                except UnreadableImage as error:
                    log.warning("%s is left out: %s", name, error)
                    continue
                readable.append(name)
            if readable:
                yield readable, encoder.encode(np.stack(pixels))[0]


def _part(out: Path) -> Path:
    """Where captions lie until all are done."""
    return out.with_name(f".{out.name}.part")


def _begun(out: Path | None, settings: dict[str, Any]) -> dict[str, str]:
    """The captions that an interrupted call with these settings made. Those of other settings are dropped."""
    if out is None:
        return {}
    part = _part(out)
    first = json.dumps(settings, sort_keys=True)
    if part.is_file():
        lines = part.read_text(encoding="utf-8").split("\n")
        if lines[0] == first:
            return dict(json.loads(line) for line in lines[1:-1])  # a line without an end was interrupted
    part.write_text(first + "\n", encoding="utf-8")
    return {}


def _write(out: Path, captions: Sequence[Caption]) -> None:
    """Write a CSV or JSON lines, atomically, and drop what was kept for an interruption."""
    text = io.StringIO(newline="")
    if out.suffix.lower() == ".csv":
        table = csv.writer(text, lineterminator="\n")
        table.writerows([("image", "caption"), *((one.image, one.caption) for one in captions)])
    else:
        text.writelines(json.dumps(one.to_json(), ensure_ascii=False) + "\n" for one in captions)
    with atomic_file(out) as file:
        file.write(text.getvalue().encode())
    _part(out).unlink(missing_ok=True)
