"""Pictures without captions, from the folder to features."""

import pytest
from qf.pipeline.config import EncoderOptions, ExtractOptions, ReadOptions
from qf.pipeline.errors import DatasetError
from qf.pipeline.extract.extract import extract_source
from qf.pipeline.features.reader import Features

from conftest import COLOURS, SHAPES, draw, write_files  # isort: skip

NEXT = 'qf search "a dog on a beach"'


@pytest.fixture
def photographs(tmp_path):
    """Twelve pictures in albums, a video and a note; no captions."""
    folder = write_files(tmp_path / "photographs", {"2024/a.MOV": "x", "read me.txt": "x"})
    for colour in COLOURS:
        (folder / colour).mkdir()
        for shape in SHAPES:
            draw(colour, shape).save(folder / colour / f"{shape}.png")
    return folder


def test_extraction_says_that_there_are_no_captions_and_that_search_is_next(photographs, clip_folder, tmp_path):
    said = []
    encoder = EncoderOptions(str(clip_folder))
    for options in (
        ExtractOptions(shard_size=5),
        ExtractOptions(shard_size=5, shard_format="webdataset", overwrite=True),
    ):
        made = extract_source(str(photographs), tmp_path / "features", encoder, options=options, say=said.append)
        assert (made.records, made.captions, made.rejected, made.splits["train"], made.shards) == (12, 0, 0, 12, 3)
        assert str(made).startswith("features  12 images without captions, 0 rejected; ")
        assert str(made).endswith(f"\nnext      {NEXT}")
        assert "searchable" not in made.to_json()
        features = Features(tmp_path / "features")
        assert (len(features.rows()), len(features.rows(captioned=True))) == (12, 0)
        assert features.captions == [[]] * 12
    assert "pictures, 12 pictures without captions; not read: 1 .mov file (2024/a.MOV)" in said[1]
    assert said[2] == f"there are no captions to train on; next: {NEXT}"


def test_the_next_step_with_an_encoder_that_cannot_search_is_another_encoder(photographs, onnx_folder, tmp_path):
    made = extract_source(str(photographs), tmp_path / "features", EncoderOptions(str(onnx_folder)))
    assert "extract with a CLIP or SigLIP" in str(made)
    assert NEXT not in str(made)


def test_pictures_that_cannot_be_decoded_are_rejects(photographs, clip_folder, tmp_path):
    (photographs / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    encoder, folder = EncoderOptions(str(clip_folder)), tmp_path / "features"
    with pytest.raises(
        DatasetError, match=r"1 of 13 records were rejected, .*a\.HEIC: HEIC.*JPEG.*--max-rejects 1 leaves"
    ):
        extract_source(str(photographs), folder, encoder)
    made = extract_source(str(photographs), folder, encoder, options=ExtractOptions(max_rejects=1))
    assert (made.records, made.rejected) == (12, 1)


def test_features_that_left_images_out_are_not_taken_for_those_that_keep_them(photographs, clip_folder, tmp_path):
    write_files(photographs, {"red/bar.txt": "a red bar"})
    encoder, folder = EncoderOptions(str(clip_folder)), tmp_path / "features"
    with pytest.raises(
        DatasetError, match="11 of 12 records cannot be used.*11 have no caption: --allow-uncaptioned keeps"
    ):
        extract_source(str(photographs), folder, encoder)
    made = extract_source(str(photographs), folder, encoder, options=ExtractOptions(max_rejects=1))
    assert (made.records, made.captions, made.rejected) == (1, 1, 11)
    allowed = ReadOptions(allow_uncaptioned=True)
    kept = extract_source(str(photographs), folder, encoder, allowed, ExtractOptions(overwrite=True))
    assert (kept.records, kept.captions, kept.rejected, kept.encoded) == (12, 1, 0, 12)
    assert len(Features(folder).rows(captioned=True)) == 1
