"""The tokenizer of a text model: one that knows nothing is refused, and unknown words are found."""

import json
import shutil

import pytest
import torch
from qf.pipeline.encoders.identity import BUILTIN
from qf.pipeline.encoders.load import load_encoder
from qf.pipeline.encoders.text import TextModel
from qf.pipeline.errors import EncoderError

CPU = torch.device("cpu")


def text_model(folder):
    return TextModel(load_encoder(str(folder), CPU, torch.float32).identity, CPU)


@pytest.fixture(params=["builtin", "clip"])
def folder(request, clip_folder, tmp_path):
    """A copy of an encoder. transformers makes an empty tokenizer for the first one, once its tokenizer is gone."""
    return shutil.copytree(BUILTIN if request.param == "builtin" else clip_folder, tmp_path / "encoder")


def test_a_folder_without_tokenizer_files_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EncoderError, match=r"tokenizer of encoder .* cannot be loaded: .* has no tokenizer\.json"):
        text_model(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(EncoderError, match=r"copy it from the model's page"):
        text_model(folder)


@pytest.mark.parametrize("kept", [0.0, 0.4, 3.0])
def test_a_tokenizer_of_another_size_is_refused(clip_folder, tmp_path, kept):
    folder = shutil.copytree(clip_folder, tmp_path / "encoder")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    words = {**vocabulary, **{f"word{n}": n + len(vocabulary) for n in range(40)}}
    count = max(4, round(kept * len(vocabulary)))
    tokenizer["model"]["vocab"] = dict(list(words.items())[:count])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(EncoderError, match=rf"has {count} words and its text model embeds {len(vocabulary)}"):
        text_model(folder)


def test_the_page_of_the_model_is_named_where_its_configuration_tells_it(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": "openai/clip-vit-base-patch32"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EncoderError, match="copy it from https://huggingface.co/openai/clip-vit-base-patch32"):
        text_model(folder)


def test_unknown_words_are_found(clip_folder):
    model = text_model(clip_folder)
    assert model.unknown("a red bar") == ([], False)
    assert model.unknown("a purple bar") == (["purple"], False)
    assert model.unknown("purple elephants") == (["purple", "elephants"], True)


def test_a_vocabulary_of_bytes_knows_every_word():
    model = text_model(BUILTIN)
    assert model.unknown("two blue rings, ёжик 猫 🐶") == ([], False)
