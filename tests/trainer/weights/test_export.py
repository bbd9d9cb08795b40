"""Exports: transformers computes the same scores with them as qf, and qf reads them back to the bit."""

import shutil
from dataclasses import replace

import pytest
import torch
from qf.pipeline.artifacts import read_manifest
from qf.pipeline.errors import ArtifactError, EncoderError
from qf.trainer.config import Stage1Config
from qf.trainer.qformer import QFormer
from qf.trainer.stage1.stage import train
from qf.trainer.tokens import Tokens
from qf.trainer.weights.export import export
from qf.trainer.weights.start import find_start
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from conftest import reseal, run_extract  # isort: skip
from blip2 import PIXELS, scores_from_features, scores_from_pixels  # isort: skip

CPU = torch.device("cpu")
UNTRAINED = Stage1Config(epochs=0, precision="float32")


@pytest.fixture(scope="module")
def run(blip2_features, blip2_folder, tmp_path_factory):
    """A run with the weights of a Hugging Face BLIP-2, untrained."""
    folder = tmp_path_factory.mktemp("runs") / "blip2"
    summary = train(blip2_features, folder, replace(UNTRAINED, init=str(blip2_folder)), CPU)
    assert (summary.steps, summary.epochs, summary.loss, summary.best) == (0, 0.0, None, {})
    return folder


def hugging_face(folder):
    """The model that transformers loads from the folder, in evaluation mode, with no key missing or left over."""
    from transformers import Blip2ForImageTextRetrieval

    model, info = Blip2ForImageTextRetrieval.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_hugging_face_to_qf_and_back(run, blip2_folder, tmp_path, caplog):
    out = tmp_path / "out"
    summary = export(run, out, "huggingface")
    assert not caplog.messages
    assert (summary.vision, summary.files) == (True, len(list(out.iterdir())))
    equal(load_file(out / "model.safetensors"), load_file(blip2_folder / "model.safetensors"))
    model = hugging_face(out)
    again = QFormer.from_pretrained(out)
    equal(again.state_dict(), load_file(run / "model.safetensors"))  # temperature and language head as well
    assert again.config == QFormer.from_pretrained(run).config
    assert not caplog.messages
    for ours, theirs in zip(scores_from_features(again, blip2_folder), scores_from_pixels(model, out), strict=True):
        assert theirs.std() > 0.01
        assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_processor_feeds_the_exported_model(run, tmp_path):
    from PIL import Image
    from transformers import AutoProcessor

    out = tmp_path / "out"
    export(run, out, "huggingface")
    model, processor = hugging_face(out), AutoProcessor.from_pretrained(out)
    texts = ["a red bar", "the square is blue"]
    inputs = processor(images=[Image.new("RGB", (50, 40), "red")] * 2, text=texts, padding=True, return_tensors="pt")
    ids, _ = Tokens.load(run / "tokenizer.json")(texts, 32)
    assert torch.equal(inputs["input_ids"], ids)
    assert model(**inputs, use_image_text_matching_head=True).logits_per_image.shape == (2, 2)


def test_an_earlier_layer_is_the_last_of_the_export(pictures, blip2_folder, tmp_path):
    from qf.pipeline.encoders.load import load_encoder

    features = run_extract(pictures, blip2_folder, tmp_path / "features", codec="float32", layer=-2)
    train(features, tmp_path / "run", UNTRAINED, CPU)
    export(tmp_path / "run", tmp_path / "out", "huggingface")
    model = hugging_face(tmp_path / "out")
    assert len(model.vision_model.encoder.layers) == 2
    ours = QFormer.from_pretrained(tmp_path / "out")
    assert load_encoder(str(tmp_path / "out"), CPU, torch.float32).identity["tokens"] == features.encoder["tokens"]
    for a, b in zip(
        scores_from_features(ours, tmp_path / "out"), scores_from_pixels(model, tmp_path / "out"), strict=True
    ):
        assert_close(a, b, atol=1e-5, rtol=1e-5)
    shown = load_encoder(str(blip2_folder), CPU, torch.float32, -2).encode(PIXELS)[0]
    assert_close(load_encoder(str(tmp_path / "out"), CPU, torch.float32).encode(PIXELS)[0], shown)


def test_lavis_and_back(run, trained, blip2_features, tmp_path):
    for source, out in ((run, tmp_path / "blip2.safetensors"), (trained / "runs" / "stage1", tmp_path / "folder")):
        export(source, out, "lavis")
        state = load_file(out if out.is_file() else out / "model.safetensors")
        assert {"temp", "ln_vision.weight", "vision_proj.bias", "Qformer.cls.predictions.bias"} <= state.keys()
        assert "Qformer.bert.encoder.layer.0.attention.self.query.weight" in state
        again = QFormer.from_pretrained(out)  # the file also holds the number of heads
        equal(again.state_dict(), load_file(source / "model.safetensors"))
        assert again.config == QFormer.from_pretrained(source).config
    start = find_start(Stage1Config(init=str(tmp_path / "blip2.safetensors")), blip2_features, [])
    equal(QFormer.from_weights(start.model, start.weights).state_dict(), load_file(run / "model.safetensors"))
    assert start.tokens.tokenizer.to_str() == Tokens.load(run / "tokenizer.json").tokenizer.to_str()


def test_the_q_former_alone_is_exported_for_other_encoders(trained, tmp_path, caplog):
    source = trained / "runs" / "stage1"
    summary = export(source, tmp_path / "out", "huggingface")
    assert not summary.vision
    assert "is no BLIP-2 vision model: the export holds the Q-Former alone" in caplog.messages[0]
    equal(QFormer.from_pretrained(tmp_path / "out").state_dict(), load_file(source / "model.safetensors"))
    from transformers import Blip2ForImageTextRetrieval

    _, info = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert all(key.startswith("vision_model.embeddings.") for key in info["missing_keys"])


def test_exports_that_cannot_be_made_are_refused(run, lavis_eps, tmp_path, caplog):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="is there already; .* --overwrite"):
        export(run, tmp_path / "taken", "huggingface")
    export(run, tmp_path / "taken", "huggingface", overwrite=True)
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    with pytest.raises(ArtifactError, match="use huggingface or lavis"):
        export(run, tmp_path / "out", "onnx")
    with pytest.raises(ArtifactError, match="make it with `qf train`"):
        export(tmp_path / "none", tmp_path / "out", "lavis")
    caplog.clear()
    export(lavis_eps, tmp_path / "eps", "huggingface")
    assert "has epsilon 1e-05; Hugging Face's layout uses the vision model's, 1e-06" in caplog.messages[0]
    encoder = read_manifest(lavis_eps)["encoder"]
    reseal(lavis_eps / "manifest.json", encoder=encoder | {"sha256": "0" * 64})
    with pytest.raises(EncoderError, match="no longer the one that made the features"):
        export(lavis_eps, tmp_path / "out", "huggingface")


def test_weights_that_changed_after_training_are_not_exported(trained, tmp_path):
    source = shutil.copytree(trained / "runs" / "stage1", tmp_path / "run")
    weights = source / "model.safetensors"
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
    with pytest.raises(ArtifactError, match=r"model\.safetensors has .*; train again with --overwrite"):
        export(source, tmp_path / "out", "lavis")
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors is missing"):
        export(source, tmp_path / "out", "lavis")


@pytest.fixture
def lavis_eps(run, blip2_features, tmp_path):
    """A run whose LayerNorm over the features has LAVIS's epsilon."""
    export(run, tmp_path / "lavis.safetensors", "lavis")
    train(blip2_features, tmp_path / "run", replace(UNTRAINED, init=str(tmp_path / "lavis.safetensors")), CPU)
    model = read_manifest(tmp_path / "run")["model"]
    reseal(tmp_path / "run" / "manifest.json", model=model | {"ln_vision_eps": 1e-5})
    return tmp_path / "run"
