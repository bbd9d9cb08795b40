"""Questions from the sample to features: the library call behind `qf extract … --questions`."""

import json

import pytest
from qf.data.scenes import write_sample
from qf.pipeline.config import EncoderOptions, ExtractOptions, ReadOptions
from qf.pipeline.errors import ArtifactError
from qf.pipeline.extract.estimate import Estimated
from qf.pipeline.extract.extract import extract_source
from qf.pipeline.features.reader import Features
from qf.pipeline.schema import Question

TYPES = {"count", "colour", "presence", "background", "relation"}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("sample"), train=5, val=2, test=2)


@pytest.mark.parametrize("form", ["arrow", "webdataset"])
def test_the_questions_of_the_sample_lie_beside_its_captions(sample, clip_folder, tmp_path, form):
    encoder, questions = EncoderOptions(str(clip_folder)), ReadOptions(questions=[sample.parent / "questions.jsonl"])
    folder, said = tmp_path / "features", []
    rows = [json.loads(line) for line in questions.questions[0].read_text().splitlines()]
    options = ExtractOptions(shard_format=form, shard_size=4)
    made = extract_source(str(sample), folder, encoder, questions, options, say=said.append)
    assert f"45 captions, {len(rows)} questions, 0 rejected" in str(made)
    assert f"45 captions, {len(rows)} questions; 9 images" in said[1]
    features = Features(folder)
    for image, asked in zip(features.table.column("image").to_pylist(), features.questions, strict=True):
        about = [row for row in rows if row["image"] == image]
        assert asked == [Question(row["question"], (row["answer"],), row["type"]) for row in about]
        assert {one.type for one in asked} <= TYPES
    assert [len(captions) for captions in features.captions] == [5] * 9
    assert len(features.rows("val", asked=True)) == 2
    with pytest.raises(ArtifactError, match="gives other records: it has changed, or the options"):
        extract_source(str(sample), folder, encoder, options=options)  # without questions
    estimated = extract_source(str(sample), folder, encoder, questions, ExtractOptions(dry_run=True))
    assert isinstance(estimated, Estimated)
    assert f"45 captions, {len(rows)} questions" in str(estimated)


def test_questions_alone_are_features_to_train_on(sample, clip_folder, tmp_path):
    said = []
    made = extract_source(
        str(sample.parent / "questions.jsonl"), tmp_path / "features", EncoderOptions(str(clip_folder)), say=said.append
    )
    assert (made.captions, made.rejected, made.records) == (0, 0, 9)
    assert "questions, 0 rejected" in str(made)
    assert not any("no captions to train on" in line for line in said)
