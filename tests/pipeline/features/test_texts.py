"""Questions and conversations beside captions: in shards of both formats, in the manifest, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.artifacts import described, read_manifest, write_manifest
from qf.pipeline.config import ExtractOptions
from qf.pipeline.datasets.catalogue import Catalogue
from qf.pipeline.datasets.read import Dataset, read
from qf.pipeline.encoders.load import load_encoder
from qf.pipeline.errors import ArtifactError
from qf.pipeline.extract.extract import extract
from qf.pipeline.features.arrow_shards import schema, write_arrow_shard
from qf.pipeline.features.codecs import columns, encode
from qf.pipeline.features.manifest import FEATURES
from qf.pipeline.features.reader import Features
from qf.pipeline.features.tar_shards import write_tar_shard
from qf.pipeline.results import no_status
from qf.pipeline.schema import OPTIONAL_COLUMNS, Question
from qf.retrieval.info import info
from qf.retrieval.verify import verify

from conftest import features_manifest, make_pictures, reseal  # isort: skip

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
QUESTIONS = st.lists(st.builds(Question, TEXT, TEXTS, st.none() | TEXT), max_size=3)
ROWS = st.lists(st.tuples(QUESTIONS, st.lists(TEXTS, max_size=2)), min_size=1, max_size=7)
FORMATS = {"arrow": "arrow", "webdataset": "tar"}


@given(ROWS, st.sets(st.sampled_from(OPTIONAL_COLUMNS)), st.sampled_from(sorted(FORMATS)), st.integers(1, 4))
def test_questions_and_conversations_that_are_written_are_read(tmp_path_factory, rows, optional, form, size):
    """Any texts, none too, in two shards and in blocks of `size`; a column that is not asked for is not written."""
    folder = tmp_path_factory.mktemp("features")
    encoded = encode("float16", torch.zeros(1, 2, 3))
    layout, shards = columns("float16", 2, 3), []

    def block(part):
        return {
            "key": [str(n) for n in part],
            "split": ["train"] * len(part),
            "image": ["it"] * len(part),
            "captions": [[]] * len(part),
            "thumbnail": [b"x"] * len(part),
            "width": [1] * len(part),
            "height": [1] * len(part),
            "views": [[]] * len(part),
            "questions": [[question.to_row() for question in rows[n][0]] for n in part],
            "conversations": [[list(turns) for turns in rows[n][1]] for n in part],
            **{name: np.repeat(values.numpy(), len(part), 0) for name, values in encoded.items()},
        }

    for number, part in enumerate((range(0, len(rows), 2), range(1, len(rows), 2))):
        path = folder / f"shard-{number:05d}.{FORMATS[form]}"
        blocks = [block(part[start : start + size]) for start in range(0, len(part), size)]
        with open(path, "wb") as file:
            if form == "arrow":
                write_arrow_shard(file, schema(layout, None, False, optional), blocks)
            else:
                write_tar_shard(file, blocks, optional)
        shards += [{**described(path), "records": len(part)}] * bool(part)
    order = [*range(0, len(rows), 2), *range(1, len(rows), 2)]
    counts = {name: sum(len(row[n]) for row in rows) for n, name in enumerate(OPTIONAL_COLUMNS) if name in optional}
    about = features_manifest({"tokens": 2, "width": 3}, shards, format=form, records=len(rows), **counts)
    write_manifest(folder, FEATURES, about)
    features = Features(folder)
    assert features.questions == [rows[n][0] if "questions" in optional else [] for n in order]
    assert features.conversations == [rows[n][1] if "conversations" in optional else [] for n in order]
    assert features.rows(asked=True).tolist() == [n for n, some in enumerate(features.questions) if some]
    assert features.rows(conversing=True).tolist() == [n for n, some in enumerate(features.conversations) if some]
    assert features.rows("val", asked=True).tolist() == features.rows(captioned=True).tolist() == []


HOW_MANY = Question("How many?", ("2", "two", "2"), "number")
TALK = ("What is it?", "A shape.", "Which colour?", "Red — “rouge”.")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A dataset of 12 pictures, made in code: the second has a question, the third a conversation and no caption."""
    records = list(read(make_pictures(tmp_path_factory.mktemp("asked"), copies=1)).records)
    records[1] = replace(records[1], questions=(HOW_MANY, Question("Is it red?", ("yes",))))
    records[2] = replace(records[2], captions=(), conversations=(TALK,))
    records[3] = replace(records[3], problem="broken", questions=(HOW_MANY,))
    return Dataset("csv", "", Catalogue(records))


def extracted(dataset, encoder, folder, progress=no_status, **options):
    frozen = load_encoder(str(encoder), torch.device("cpu"), torch.float32, None)
    options = ExtractOptions(shard_size=5, max_rejects=0.5, **options)
    return extract(dataset, "here", frozen, folder, options, progress)


@pytest.mark.parametrize("form", FORMATS)
def test_the_manifest_counts_them_and_every_command_says_so(asked, clip_folder, tmp_path, form):
    folder = tmp_path / "features"
    made = extracted(asked, clip_folder, folder, shard_format=form)
    assert "11 images (11 train), 20 captions, 2 questions, 1 conversation, 1 rejected" in str(made)
    assert (made.to_json()["questions"], made.to_json()["conversations"]) == (2, 1)
    features = Features(folder)
    assert (features.manifest["questions"], features.manifest["conversations"]) == (2, 1)
    assert features.questions[:3] == [[], [HOW_MANY, Question("Is it red?", ("yes",))], []]
    assert features.conversations[:3] == [[], [], [TALK]]
    assert "20 captions, 2 questions, 1 conversation" in str(info(folder))
    assert verify(folder).problems == []
    reseal(folder / "manifest.json", questions=3)
    assert verify(folder).problems == ["questions: the manifest says 3, there are 2"]
    manifest = read_manifest(folder, FEATURES)
    write_manifest(folder, FEATURES, {name: manifest[name] for name in manifest if name != "conversations"})
    with pytest.raises(ArtifactError, match="column conversations was False and is now True"):
        Features(folder)


def test_rejects_are_not_counted(asked, clip_folder, tmp_path):
    records = list(asked.records)
    records[1] = replace(records[1], source=replace(records[1].source, name="nowhere.png"))
    made = extracted(Dataset("csv", "", Catalogue(records)), clip_folder, tmp_path / "features")
    assert (made.records, made.captions, made.questions, made.conversations, made.rejected) == (10, 18, 0, 1, 2)
    assert verify(tmp_path / "features").problems == []
    assert Features(tmp_path / "features").manifest["questions"] == 0


def test_shards_of_captions_alone_hold_nothing_of_them(features):
    assert not {*OPTIONAL_COLUMNS} & {*features.manifest, *features.table.column_names}
    assert features.questions == features.conversations == [[]] * len(features)
    assert len(features.rows(asked=True)) == len(features.rows(conversing=True)) == 0


@pytest.mark.parametrize("form", FORMATS)
def test_an_interrupted_extraction_resumes_to_the_same_bytes(asked, clip_folder, tmp_path, form):
    def stop(status):
        if status.done > 10:
            raise KeyboardInterrupt

    whole, part = tmp_path / "whole", tmp_path / "part"
    extracted(asked, clip_folder, whole, shard_format=form)
    with pytest.raises(KeyboardInterrupt):
        extracted(asked, clip_folder, part, stop, shard_format=form)
    assert (part / "plan.json").exists()
    assert (part / f"shard-00000.{FORMATS[form]}").exists()
    extracted(asked, clip_folder, part, shard_format=form)
    assert read_manifest(part) == read_manifest(whole)
    for shard in read_manifest(whole)["shards"]:
        assert (part / shard["file"]).read_bytes() == (whole / shard["file"]).read_bytes()


def test_other_answers_are_another_dataset(asked):
    records = list(asked.records)
    records[1] = replace(records[1], questions=(replace(HOW_MANY, answers=("3",)), records[1].questions[1]))
    assert Catalogue(records).sha256 != asked.records.sha256
