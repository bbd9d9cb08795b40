"""Weights of every layout are read to the bit, and errors name what is wrong with them."""

import json
import logging
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qf.pipeline.errors import ArtifactError
from qf.trainer.qformer import QFormer
from qf.trainer.tokens import read_tokenizer
from qf.trainer.weights.names import LAVIS_NAMES
from qf.trainer.weights.read import read_weights
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from blip2 import random_blip2, scores_from_features, scores_from_pixels  # isort: skip


def without_vision(key):
    return "post_layernorm" in key or not key.startswith(("vision_model.", "language_"))


def test_hugging_face_weights_give_its_own_scores(blip2_folder, caplog):
    from transformers import Blip2ForImageTextRetrieval

    theirs = Blip2ForImageTextRetrieval.from_pretrained(blip2_folder).eval()
    model = QFormer.from_pretrained(blip2_folder)
    assert caplog.messages == [f"{blip2_folder} has no language head, temperature: these start afresh"]
    state = model.state_dict()
    for key, value in theirs.state_dict().items():
        if without_vision(key):
            assert torch.equal(state[key.removeprefix("vision_model.")], value), key
    assert (model.config.ln_vision_eps, model.config.bos_token_id) == (1e-6, model.config.vocab_size - 1)
    for ours, other in zip(
        scores_from_features(model, blip2_folder), scores_from_pixels(theirs, blip2_folder), strict=True
    ):
        assert other.std() > 0.01
        assert_close(ours, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float16, "5GB"), (torch.float32, "60KB")])
def test_half_precision_and_shards(blip2_folder, tmp_path, dtype, shards):
    from transformers import Blip2ForImageTextRetrieval

    model = Blip2ForImageTextRetrieval.from_pretrained(blip2_folder).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "60KB")
    state = QFormer.from_pretrained(tmp_path).state_dict()
    for key, value in model.state_dict().items():
        if without_vision(key):
            assert torch.equal(state[key.removeprefix("vision_model.")], value.float())
            assert state[key.removeprefix("vision_model.")].dtype == torch.float32
    if shards == "60KB":
        next(tmp_path.glob("*-of-*")).unlink()
        with pytest.raises(ArtifactError, match="of-.*does not exist"):
            QFormer.from_pretrained(tmp_path)


def test_a_captioning_blip2_has_no_text_side(tmp_path, caplog):
    theirs = random_blip2("Blip2ForConditionalGeneration", 30)
    theirs.save_pretrained(tmp_path)
    state = QFormer.from_pretrained(tmp_path).state_dict()
    assert caplog.messages == [
        f"{tmp_path} has no text embeddings, text feed-forward, image projection, text projection, matching head, "
        "language head, temperature: these start afresh"
    ]
    for key, value in theirs.state_dict().items():
        if without_vision(key):
            assert torch.equal(state[key.removeprefix("vision_model.")], value), key


@pytest.fixture(scope="module")
def lavis(trained, tmp_path_factory):
    """The trained run as a .pth of LAVIS, which also holds a frozen encoder, buffers and tied weights."""
    state = load_file(trained / "runs" / "stage1" / "model.safetensors")
    renamed = {LAVIS_NAMES.theirs(key): value for key, value in state.items()}
    assert {"query_tokens", "temp", "itm_head.weight", "ln_vision.bias"} <= renamed.keys()
    assert "Qformer.bert.encoder.layer.0.crossattention.self.query.weight" in renamed
    assert "Qformer.cls.predictions.transform.LayerNorm.weight" in renamed
    renamed |= {
        "visual_encoder.cls_token": torch.zeros(1, 1, 4, dtype=torch.float16),
        "Qformer.bert.embeddings.position_ids": torch.arange(512)[None],
        "Qformer.cls.predictions.decoder.weight": state["embeddings.word_embeddings.weight"],
        "Qformer.cls.predictions.decoder.bias": state["cls.predictions.bias"],
    }
    path = tmp_path_factory.mktemp("lavis") / "blip2_pretrained.pth"
    torch.save({"model": renamed, "epoch": 9, "config": {"run": {"task": "image_text_pretrain"}}}, path)
    return path


def test_lavis_weights_keep_every_bit(lavis, trained):
    model = QFormer.from_pretrained(lavis, num_attention_heads=4)
    state = load_file(trained / "runs" / "stage1" / "model.safetensors")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (model.config.num_attention_heads, model.config.bos_token_id) == (4, model.config.vocab_size - 1)


def copies(folder, tmp_path):
    """A fresh copy of a folder or file of weights, and its file with the tensors."""
    if folder.is_dir():
        copy = shutil.copytree(folder, tmp_path / "model", dirs_exist_ok=True)
        return copy, copy / "model.safetensors"
    return tmp_path / "w.safetensors", tmp_path / "w.safetensors"


@pytest.mark.parametrize("layout", ["lavis", "huggingface", "bert"])
def test_each_missing_or_unexpected_key_is_named(layout, lavis, blip2_folder, bert_folder, tmp_path):
    folder = {"lavis": lavis, "huggingface": blip2_folder, "bert": bert_folder}[layout]
    state = torch.load(lavis)["model"] if layout == "lavis" else load_file(folder / "model.safetensors")
    needed = [
        key
        for key in state
        if without_vision(key)
        and not any(
            word in key
            for word in ("visual_", "position_ids", "decoder", "pooler", "token_type", "word_embeddings.weight")
        )
    ]
    copy, file = copies(folder, tmp_path)
    sizes = {"lavis": {"num_attention_heads": 4}, "bert": {"encoder_hidden_size": 8}}.get(layout, {})

    @settings(max_examples=10, deadline=None)
    @given(st.sampled_from(needed))
    def named(key):
        save_file({k: v.clone() for k, v in state.items() if k != key} | {"extra.weight": torch.zeros(1)}, file)
        with pytest.raises(ArtifactError) as error:
            QFormer.from_pretrained(copy, **sizes)
        assert f"missing {key}" in str(error.value).replace("missing bert.", "missing ")
        assert "unexpected " in str(error.value)
        assert "extra.weight" in str(error.value)

    named()
    key = next(key for key in needed if key.endswith("output.dense.bias"))
    save_file({k: v.clone() for k, v in state.items()} | {key: torch.zeros(3)}, file)
    with pytest.raises(ArtifactError, match=r"output\.dense\.bias is \(3,\), not \(\d+,\)"):
        QFormer.from_pretrained(copy, **sizes)


def edited(change):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | change)
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edited({"hidden_size": None}), "has a size that is not a number"),
        (edited({"layer_norm_eps": "a"}), "has a size that is not a number"),
        (edited({"num_attention_heads": 0}), "has impossible sizes"),
        (edited({"num_attention_heads": 5}), "has impossible sizes"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "cannot be read as a tokenizer"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be read as weights"),
    ],
)
def test_a_malformed_bert_is_refused(bert_folder, tmp_path, spoil, message):
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    spoil(folder)
    with pytest.raises(ArtifactError, match=message):
        QFormer.from_pretrained(folder, encoder_hidden_size=8)


def test_malformed_weights_are_refused(tmp_path):
    (tmp_path / "a.pth").write_text("hello world")
    with pytest.raises(ArtifactError, match=r"a\.pth cannot be read as weights"):
        QFormer.from_pretrained(tmp_path / "a.pth")
    flat = {"Qformer.bert.embeddings.word_embeddings.weight": torch.zeros(7)}
    for metadata, message in (({"qf": "[]"}, "is damaged"), ({"qf": "{"}, "is damaged"), (None, "dimensions")):
        save_file(flat, tmp_path / "b.safetensors", metadata)
        with pytest.raises(ArtifactError, match=message):
            QFormer.from_pretrained(tmp_path / "b.safetensors")


def test_a_vocabulary_that_repeats_a_line_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\na\n")
    with pytest.raises(ArtifactError, match="repeats a line"):
        read_tokenizer(tmp_path)


def test_a_bert_needs_the_width_of_the_features(bert_folder):
    model = QFormer.from_pretrained(bert_folder, encoder_hidden_size=40, num_query_tokens=5)
    assert (model.config.encoder_hidden_size, model.config.num_query_tokens) == (40, 5)
    with pytest.raises(ArtifactError, match="give encoder_hidden_size"):
        QFormer.from_pretrained(bert_folder)


def test_a_path_without_weights_is_refused(tmp_path, trained, clip_folder, blip2_folder, bert_folder):
    with pytest.raises(ArtifactError, match="no such weights; give a run, a BLIP-2 or BERT folder"):
        read_weights(str(tmp_path / "nothing.pth"))
    with pytest.raises(ArtifactError, match="holds no finished run and no model"):
        read_weights(str(tmp_path))
    with pytest.raises(ArtifactError, match="a model of type 'clip'"):
        read_weights(str(clip_folder))
    with pytest.raises(ArtifactError, match="under LAVIS's names.*give the folder"):
        read_weights(str(trained / "runs" / "stage1" / "model.safetensors"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ArtifactError, match="it holds a list"):
        read_weights(str(tmp_path / "list.pth"))
    (tmp_path / "cut.safetensors").write_bytes((blip2_folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="cannot be read as weights"):
        read_weights(str(tmp_path / "cut.safetensors"))
    relu = shutil.copytree(bert_folder, tmp_path / "relu")
    config = json.loads((relu / "config.json").read_text()) | {"hidden_act": "relu"}
    (relu / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="uses the activation 'relu'"):
        read_weights(str(relu))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 300\n"


@pytest.mark.parametrize(
    "name", ["w.pth", "w.safetensors", "bert/model.safetensors", "bert/tokenizer.json", "bert/config.json"]
)
def test_a_git_lfs_pointer_is_called_that(bert_folder, tmp_path, name):
    shutil.copytree(bert_folder, tmp_path / "bert")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ArtifactError, match=r"is a Git LFS pointer.*git lfs pull"):
        read_weights(str(tmp_path / name.split("/")[0]))


@pytest.mark.parametrize(
    "key", ["opt_proj.weight", "t5_proj.bias", "t5_model.shared.weight", "language_projection.weight"]
)
def test_a_checkpoint_of_stage_2_is_called_that(tmp_path, key):
    state = {
        "query_tokens": torch.zeros(1, 4, 8),
        "Qformer.bert.encoder.layer.0.x": torch.zeros(1),
        key: torch.zeros(2),
    }
    torch.save({"model": state}, tmp_path / "a.pth")
    save_file(state, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        with pytest.raises(ArtifactError, match="is a BLIP-2 checkpoint of stage 2.*give LAVIS's stage-1 weights"):
            read_weights(str(tmp_path / name))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"]), st.booleans())
def test_no_librarys_own_sentence_is_handed_on(tmp_path, rest, magic, pickled):
    """Nor its advice to load a pickle with all that it holds."""
    path = tmp_path / ("w.pth" if pickled else "w.safetensors")
    path.write_bytes(magic + rest)
    with pytest.raises(ArtifactError, match=r"cannot be read as weights: (it|the file) \w+") as caught:
        read_weights(str(path))
    for words in ("weights_only", "deserializ", "Header", "PytorchStreamReader", "\n"):
        assert words not in str(caught.value)


def test_no_pickle_is_executed(tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Trap()}, protocol=2))
    with pytest.raises(ArtifactError, match="cannot be read as weights: it holds pickled objects besides tensors"):
        QFormer.from_pretrained(tmp_path / "evil.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_run_is_read_without_a_warning(trained, caplog):
    caplog.set_level(logging.INFO)
    QFormer.from_pretrained(trained / "runs" / "stage1")
    assert not caplog.messages
