"""A description of an artifact, from its manifest. Nothing heavy is imported."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..pipeline.artifacts import Kind, read_manifest
from ..pipeline.errors import ArtifactError
from ..pipeline.features.manifest import FEATURES
from ..pipeline.formatting import by_split, counted, duration, size, texts_held
from ..pipeline.results import Result
from ..trainer.manifest import RUN
from ..trainer.runs.panel import validation_of
from .index.manifest import INDEX
from .mix_file import Mix, load_mix

KINDS = {kind.name: kind for kind in (FEATURES, RUN, INDEX)}


def read_known(folder: Path) -> tuple[Kind, dict[str, Any]]:
    """The kind and the manifest of an artifact. ArtifactError if it is unfinished, or of no kind that qf knows."""
    name = read_manifest(folder)["kind"]
    if name not in KINDS:
        raise ArtifactError(
            f"{folder} holds {name!r}, which this version of qf does not know; make it again with --overwrite"
        )
    return KINDS[name], read_manifest(folder, KINDS[name])


@dataclass(frozen=True)
class Info(Result):
    """An artifact's manifest, and the mix of a run that has one."""

    path: str
    manifest: dict[str, Any]
    mix: tuple[Mix, dict[str, Any]] | None = None  # and the content of its file

    def to_json(self) -> dict[str, Any]:
        """The manifest, with the content of mix.json as `mix` if there is one."""
        return self.manifest if self.mix is None else {**self.manifest, "mix": self.mix[1]}

    def __str__(self) -> str:
        lines = {"features": _features, "run": _run, "index": _index}[self.manifest["kind"]](self.manifest)
        if self.mix is not None:
            lines = chain(lines, [("mix", str(self.mix[0]))])
        return "\n".join([f"{self.path}: {self.manifest['kind']}", *(f"  {name:<9} {text}" for name, text in lines)])


def info(folder: Path) -> Info:
    """The manifest of the artifact in `folder`. ArtifactError as of `read_known`, and of `load_mix`."""
    kind, manifest = read_known(folder)
    return Info(str(folder), manifest, load_mix(folder, manifest["sha256"]) if kind is RUN else None)


def _features(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    encoder, source = manifest["encoder"], manifest["source"]
    yield "from", f"{source['path']} ({source['kind']}), {manifest['rejected']:,} records rejected"
    joint = f"joint space of {encoder['joint']}" if encoder["joint"] else "no joint space"
    shape = f"{encoder['tokens']} tokens x {encoder['width']}, {joint}, {encoder['precision']}"
    yield "encoder", f"{encoder['id']}, layer {encoder['layer']}, {shape}"
    views = f", {counted(manifest['views'], 'view')} of each training image" if manifest["views"] else ""
    images = f"{manifest['records']:,} images ({by_split(manifest['splits'])})"
    texts = texts_held(manifest["captions"], manifest.get("questions", 0), manifest.get("conversations", 0))
    yield "holds", f"{images}, {texts}{views}"
    weight = size(sum(shard["bytes"] for shard in manifest["shards"]))
    yield "on disk", f"{counted(len(manifest['shards']), 'shard')}, {weight}, {manifest['codec']}, {manifest['format']}"


def _run(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    model, best = manifest["model"], manifest["best"]
    shape = f"{model['num_hidden_layers']} layers x {model['hidden_size']}, {model['num_query_tokens']} queries"
    if "language_model" in manifest:
        speaker = manifest["language_model"]
        yield (
            "stage 2",
            f"{speaker['id']} ({speaker['sha256'][:12]}) in {speaker['precision']}, prompt {manifest['prompt']!r}",
        )
    yield "model", f"{shape}, from {manifest['train']['init'] or 'scratch'}"
    steps = counted(manifest["steps"], "step")
    yield "trained", f"{manifest['epochs']:g} epochs, {steps}, {duration(manifest['seconds'])}"
    if manifest["stopped"]:
        yield "stopped", f"of {manifest['planned_steps']:,} steps planned: {manifest['stopped']}"
    if manifest["steps"]:
        yield "losses", f"{manifest['train'].get('losses', 'language model')}, {manifest['loss']:.3f} at the end"
    yield "features", f"{manifest['features']['path']} ({manifest['encoder']['id']})"
    if best:
        yield "best", f"step {best['step']:,}: {validation_of(best)}"


def _index(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    vectors = f"{manifest['vectors']:,} vectors, {manifest['texts']:,} texts"
    yield "holds", f"{manifest['images']:,} images as {vectors}"
    spaces = {"itc": "the run's", "clip": "the encoder's"}
    found = " and ".join(
        f"{spaces[name]} ({counted(len(form['slots']), 'vector')} an image)"
        for name, form in manifest["spaces"].items()
    )
    yield "spaces", found
    first = manifest["spaces"].get("itc") or manifest["spaces"]["clip"]
    yield "stored", f"{first['type']}: {first['why']}"
    run = f"{manifest['run']['path']} and " if manifest["run"] else ""
    yield "from", f"{run}{manifest['features']['path']}; {size(manifest['bytes'])}"
