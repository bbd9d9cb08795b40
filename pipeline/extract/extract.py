"""The stage: a caption dataset to cached features of a frozen encoder.

Shards hold the records in the order of the dataset. A shard's bytes depend only on its records and the options."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..artifacts import read_manifest, without
from ..config import ComputeOptions, EncoderOptions, ExtractOptions, ReadOptions
from ..datasets.read import Dataset, check_apart, read
from ..device import resolve_device, resolve_precision
from ..encoders.identity import FrozenEncoder
from ..encoders.load import load_encoder
from ..encoders.text import has_text_model
from ..errors import DatasetError, EncoderError
from ..features.manifest import FEATURES
from ..features.reader import Features
from ..files import locked
from ..formatting import by_split, counted, duration, size, texts_held
from ..replacement import place_to_write, settle
from ..results import OnStatus, Result, Status, no_status
from .captions import encoder_captions
from .estimate import Estimated, check_space, estimate
from .ledger import Ledger, recorded_precision, resumes
from .shard import SHARD_SUFFIXES, check_options, pieces, span, write_shard
from .stream import EncodedPiece, Stream


@dataclass(frozen=True)
class Extracted(Result):
    """Finished features. Rates are those of this call; `encoded` is 0 if nothing was left to do. `searchable`: whether
    `qf search` finds their pictures by the encoder itself."""

    records: int
    captions: int
    rejected: int
    shards: int
    bytes: int
    seconds: float
    images_per_second: float
    encoder_images_per_second: float
    waited: float
    features: str
    splits: dict[str, int]
    encoded: int
    searchable: bool
    questions: int = 0
    conversations: int = 0

    def to_json(self) -> dict[str, Any]:
        """All fields but `searchable`."""
        return without(super().to_json(), "searchable")

    def __str__(self) -> str:
        rate = f"{self.images_per_second:.0f} images/s" if self.encoded else "nothing new to encode"
        has_text = self.captions or self.questions or self.conversations
        texts = texts_held(self.captions, self.questions, self.conversations)
        held = f"({by_split(self.splits)}), {texts}" if has_text else "without captions"
        line = (
            f"features  {self.records:,} images {held}, {self.rejected:,} rejected; {size(self.bytes)} in "
            f"{counted(self.shards, 'shard')} at {self.features}  ({duration(self.seconds)}, {rate})"
        )
        return line if has_text else f"{line}\nnext      {_next(self.searchable)}"


def extract_source(
    source: str | Sequence[str],
    folder: Path,
    encoder: EncoderOptions = EncoderOptions(),
    reading: ReadOptions = ReadOptions(),
    options: ExtractOptions = ExtractOptions(),
    on: ComputeOptions = ComputeOptions(),
    say: Callable[[str], None] = lambda text: None,
    progress: OnStatus = no_status,
) -> Extracted | Estimated:
    """Extract the caption dataset at `source`, one path or pattern or several, into `folder`; with `options.dry_run` only
    estimate it.

    The encoder's text model, if it has one, embeds the captions too; one that cannot be loaded is passed over with a line.

    `say` gets what was found at the source. With the precision "auto", work that began in one precision goes on in it.
    DatasetError if the source cannot be read, EncoderError if the encoder cannot be loaded; others as of `extract`."""
    sources = [source] if isinstance(source, str) else list(source)
    name = sources[0] + (f" and {counted(len(sources) - 1, 'more file')}" if len(sources) > 1 else "")
    say(f"reading {name}")
    check_apart([*map(Path, sources), *(reading.questions or ())], folder)
    dataset = read([Path(path) for path in sources], reading)
    say(f"{name}: {dataset.kind}, {dataset.found}; {len(dataset.records):,} images")
    records = dataset.records
    device, precision = resolve_device(on.device), on.precision
    if precision == "auto":
        precision = recorded_precision(folder, options.overwrite) or precision
    frozen = load_encoder(encoder.encoder, device, resolve_precision(precision, device), encoder.layer)
    if not any((*records.captions.values(), *records.questions.values(), *records.conversations.values())):
        say(f"there are no captions to train on; next: {_next(bool(frozen.identity['joint']))}")
    if options.dry_run:
        return estimate(dataset, frozen, options, folder)
    extracted = extract(dataset, name, frozen, folder, options, progress)
    if options.texts and extracted.captions:
        try:
            if has_text_model(frozen.identity):
                encoder_captions(Features(folder), device, say, progress)
        except EncoderError as error:
            say(f"the captions are not embedded: {error}")
    return extracted


def extract(
    dataset: Dataset,
    source: str,
    encoder: FrozenEncoder,
    folder: Path,
    options: ExtractOptions,
    progress: OnStatus = no_status,
) -> Extracted:
    """Fill `folder` with features. Shards that are finished already are kept.

    With `options.overwrite` other features stay until the new ones are finished. ArtifactError if the folder holds features of
    something else; QfError if too many records are rejected, or if the features do not fit on the disk."""
    check_options(options)
    records, started = dataset.records, time.perf_counter()
    plan = {
        "encoder": encoder.identity,
        "codec": options.codec,
        "format": options.shard_format,
        "views": options.views,
        "augmentation": {"flip": options.flip, "seed": options.seed} if options.views else None,
        "source": {"path": source, "kind": dataset.kind, "records": len(records), "sha256": records.sha256},
        "shard_size": options.shard_size,
    }
    with locked(folder):
        place = place_to_write(folder, options.overwrite, lambda there: resumes(there, plan))
        ledger = Ledger(place, plan, SHARD_SUFFIXES[options.shard_format])
        state = ledger.state(replaces=place != folder)
        if state == "finished":
            ledger.sweep()
            settle(place, folder, FEATURES)
            return _result(read_manifest(folder, FEATURES), folder, time.perf_counter() - started)
        every = range(len(ledger.shards))
        todo = [number for number in every if state == "fresh" or ledger.noted(number) is None]
        _check_problems(dataset, options)
        check_space(dataset, encoder, options, folder, len(todo) / len(every))
        if state == "fresh":
            ledger.begin()
        rejected = sum(len(ledger.noted(number) or ()) for number in every)
        total, encoded = len(records), 0
        done = total - sum(len(span(number, total, options)) for number in todo)
        with Stream(encoder, options) as stream:

            def watched(some: Iterator[EncodedPiece]) -> Iterator[EncodedPiece]:
                nonlocal encoded, done
                for part in some:
                    encoded += len(part.block["key"])
                    done += len(part.piece.records)
                    seconds = time.perf_counter() - started
                    note = f"{encoded / seconds:.0f} images/s, encoder waited {stream.waited:.0%}"
                    progress(Status("extract", done, total, note))
                    yield part

            parts = stream.encoded(pieces(dataset, todo, stream.piece_size, options))
            for number, some in groupby(watched(parts), key=lambda part: part.piece.shard):
                rejected += write_shard(ledger, number, some, encoder, options, records.optional)
                if rejected > options.max_rejects * total:
                    raise ledger.too_many(options.max_rejects)
            encoder_seconds = stream.seconds / stream.streams.count
            waited = stream.waited
        if rejected == total or rejected > options.max_rejects * total:
            raise ledger.too_many(options.max_rejects)
        manifest = ledger.close(records)
        settle(place, folder, FEATURES)
    return _result(manifest, folder, time.perf_counter() - started, encoded, encoder_seconds, waited)


def _next(searchable: bool) -> str:
    """What to do with features that have no captions."""
    if searchable:
        return 'qf search "a dog on a beach"'
    return "extract with a CLIP or SigLIP: this encoder has no joint space with text, so a search needs a trained run"


def _check_problems(dataset: Dataset, options: ExtractOptions) -> None:
    """Fail early if the dataset itself marks too many records as unusable."""
    records = dataset.records
    problems = len(records) - sum(records.splits.values())
    if problems > options.max_rejects * len(records):
        raise DatasetError(
            f"{problems} of {len(records)} records cannot be used, more than --max-rejects {options.max_rejects:g} allows; the "
            f"first: {records.first_problem}{dataset.cure}"
        )


def _result(
    manifest: dict[str, Any],
    folder: Path,
    seconds: float,
    encoded: int = 0,
    encoder_seconds: float = 0.0,
    waited: float = 0.0,
) -> Extracted:
    return Extracted(
        records=manifest["records"],
        captions=manifest["captions"],
        rejected=manifest["rejected"],
        shards=len(manifest["shards"]),
        bytes=sum(shard["bytes"] for shard in manifest["shards"]),
        seconds=round(seconds, 3),
        images_per_second=round(encoded / seconds, 2) if seconds else 0.0,
        encoder_images_per_second=round(encoded / encoder_seconds, 2) if encoder_seconds else 0.0,
        waited=round(waited, 4),
        features=str(folder),
        splits=manifest["splits"],
        encoded=encoded,
        searchable=bool(manifest["encoder"]["joint"]),
        questions=manifest.get("questions", 0),
        conversations=manifest.get("conversations", 0),
    )
