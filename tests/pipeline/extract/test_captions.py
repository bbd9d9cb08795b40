"""Embeddings of captions: made once, never trusted when they are damaged or of something else."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from qf.pipeline.config import EncoderOptions, ExtractOptions
from qf.pipeline.encoders.text import TextModel
from qf.pipeline.extract.captions import caption_embeds, encoder_captions
from qf.pipeline.extract.extract import extract_source
from qf.pipeline.features.reader import Features
from qf.retrieval.verify import verify

CPU = torch.device("cpu")


@pytest.fixture
def extracted(pictures, clip_folder, tmp_path):
    options = ExtractOptions(shard_size=7)
    extract_source(str(pictures), tmp_path / "features", EncoderOptions(str(clip_folder)), options=options)
    return Features(tmp_path / "features")


def never():
    raise AssertionError("everything is there already")


def test_extraction_caches_the_text_models_embedding_of_every_caption(extracted):
    model = extracted.encoder["sha256"]
    embeds = caption_embeds(extracted, model, never)
    captions = [caption for some in extracted.captions for caption in some]
    assert len(embeds) == len(captions) == 48
    wanted = TextModel(extracted.encoder, CPU).encode(captions)
    chosen = np.array([47, 0, 13, 14, 13])
    assert_allclose(embeds.read(chosen), wanted[chosen], atol=1e-3)
    assert_allclose(np.linalg.norm(embeds.read(chosen), axis=1), 1, atol=1e-6)
    assert [int(embeds.firsts[row + 1] - embeds.firsts[row]) for row in range(24)] == [2] * 24
    assert verify(extracted.folder).problems == []


def test_without_a_text_model_or_with_no_texts_nothing_is_embedded(pictures, clip_folder, onnx_folder, tmp_path):
    for name, encoder, options in (
        ("plain", clip_folder, ExtractOptions(texts=False)),
        ("onnx", onnx_folder, ExtractOptions()),
    ):
        extract_source(str(pictures), tmp_path / name, EncoderOptions(str(encoder)), options=options)
        assert not list((tmp_path / name).glob("texts-*"))


def test_a_damaged_file_and_one_of_other_features_are_made_again(extracted):
    first, second, *_ = sorted(extracted.folder.glob("texts-*"))
    good = first.read_bytes(), second.read_bytes()
    changed = bytearray(good[0])
    changed[-1] ^= 1
    first.write_bytes(changed)
    assert verify(extracted.folder).problems == [f"{first} is damaged: it is not what its checksum says"]
    second.write_bytes(good[0])  # sound, but of another shard
    said, reports = [], []
    encoder_captions(extracted, CPU, said.append, reports.append)
    assert (first.read_bytes(), second.read_bytes()) == good
    assert len(said) == 1
    assert (reports[-1].done, reports[-1].total) == (28, 28)


def test_a_new_extraction_leaves_no_embeddings_of_the_old_one(extracted, pictures, clip_folder):
    options = ExtractOptions(shard_size=100, texts=False, overwrite=True)
    extract_source(str(pictures), extracted.folder, EncoderOptions(str(clip_folder)), options=options)
    assert not list(extracted.folder.glob("texts-*"))
