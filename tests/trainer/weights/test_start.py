"""Training starts from a BERT, BLIP-2 weights or a run, with its tokenizer; options that do not fit are refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from qf.pipeline.errors import ArtifactError, TrainingError
from qf.trainer.config import QFormerConfig, Stage1Config
from qf.trainer.qformer import QFormer
from qf.trainer.tokens import Tokens
from qf.trainer.weights.names import LAVIS_NAMES
from qf.trainer.weights.start import find_start
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from blip2 import random_blip2  # isort: skip


def make_model(config, features, captions):
    """The model that training starts with, and its tokenizer."""
    start = find_start(config, features, captions)
    return QFormer.from_weights(start.model, start.weights), start.tokens


def test_text_encoding_equals_the_bert_it_starts_from(features, bert_folder):
    from transformers import BertModel

    model, tokens = make_model(Stage1Config(init=str(bert_folder)), features, [])
    model.eval()
    assert model.config.hidden_size == 48
    assert model.config.vocab_size == len(tokens)
    bert = BertModel.from_pretrained(bert_folder).eval()
    input_ids, mask = tokens(["a red square", "the bar is blue"], 16)
    # a Q-Former has no token types, so remove BERT's
    bert.embeddings.token_type_embeddings.weight.data.zero_()
    expected = bert(input_ids=input_ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    assert_close(model.encode_text(input_ids, mask).output[real], expected[real], atol=1e-5, rtol=0)
    state = model.state_dict()
    for name in ("intermediate.dense.weight", "output.dense.weight", "output.LayerNorm.bias"):
        query = name.replace("intermediate", "intermediate_query").replace("output", "output_query")
        prefix = "qformer.encoder.layer.1."
        assert torch.equal(state[prefix + name], state[prefix + query])


def test_the_language_head_of_a_bert_comes_along_and_dec_is_new(features, tmp_path, caplog):
    from transformers import BertConfig, BertForMaskedLM

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "bar", "##s", "\u2028"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=20, **sizes))
    bert.save_pretrained(tmp_path)
    model, tokens = make_model(Stage1Config(init=str(tmp_path), max_text_length=20), features, [])
    assert tokens.ids(["RED bars"], 9) == [[2, 5, 6, 7, 3]]
    assert torch.equal(model.cls.predictions.transform.dense.weight, bert.cls.predictions.transform.dense.weight)
    assert torch.equal(model.cls.predictions.bias[:-1], bert.cls.predictions.bias)
    assert (model.config.vocab_size, model.config.bos_token_id) == (len(words) + 1, len(words))
    assert caplog.messages[0].endswith(
        "has no query tokens, LayerNorm over the features, cross-attention, image projection, text projection, matching head, "
        "temperature, word for [DEC]: these start afresh"
    )


def test_starting_from_a_run_keeps_its_weights(features, trained):
    run = trained / "runs" / "stage1"
    model, tokens = make_model(Stage1Config(init=str(run), dropout=0.3), features, [])
    assert torch.equal(model.state_dict()["query_tokens"], load_file(run / "model.safetensors")["query_tokens"])
    assert model.config.hidden_dropout_prob == 0.3
    assert len(tokens) == model.config.vocab_size
    with pytest.raises(ArtifactError, match="no such weights"):
        make_model(Stage1Config(init=str(run / "nothing")), features, [])


def test_starting_from_hugging_face(blip2_features, blip2_folder):
    model, tokens = make_model(Stage1Config(init=str(blip2_folder), dropout=0.2), blip2_features, [])
    state = load_file(blip2_folder / "model.safetensors")
    assert torch.equal(model.state_dict()["query_tokens"], state["query_tokens"])
    assert torch.equal(model.post_layernorm.weight, state["vision_model.post_layernorm.weight"])
    assert (model.config.vocab_size, model.config.hidden_dropout_prob) == (len(tokens), 0.2)
    # <image> has no embedding, so it is tokenised as words
    assert "<image>" not in tokens.tokenizer.get_vocab()
    assert max(tokens.ids(["<image> a red bar"], 16)[0]) < len(tokens)


def test_a_captioning_blip2_gets_a_vocabulary_of_the_captions(blip2_features, tmp_path):
    random_blip2("Blip2ForConditionalGeneration", 30).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("the language model's, which is none of the Q-Former's")
    model, tokens = make_model(Stage1Config(init=str(tmp_path)), blip2_features, ["a red bar", "a red pole"])
    assert "red" in tokens.tokenizer.get_vocab()
    assert model.config.vocab_size == len(tokens)


def test_lavis_weights_need_a_tokenizer(blip2_features, bert_folder, tmp_path):
    words = len(Tokens.load(bert_folder / "tokenizer.json"))
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 96}
    state = QFormer(QFormerConfig(vocab_size=words, encoder_hidden_size=32, **sizes)).state_dict()
    torch.save({"model": {LAVIS_NAMES.theirs(key): value for key, value in state.items()}}, tmp_path / "lavis.pth")
    config = Stage1Config(init=str(tmp_path / "lavis.pth"))
    with pytest.raises(TrainingError, match="brings no tokenizer.*--tokenizer FOLDER"):
        make_model(config, blip2_features, [])
    for tokenizer in (bert_folder, bert_folder / "tokenizer.json"):
        model, tokens = make_model(replace(config, tokenizer=str(tokenizer)), blip2_features, [])
        assert (model.config.bos_token_id, model.config.num_attention_heads) == (tokens.bos_token_id, 1)
        assert torch.equal(model.query_tokens, state["query_tokens"])
    Tokens.train(["a red bar"], 40).save(tmp_path / "tokenizer.json")
    with pytest.raises(TrainingError, match=r"the tokenizer has \d+ words and .* embeddings for \d+"):
        make_model(replace(config, tokenizer=str(tmp_path)), blip2_features, [])
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(TrainingError, match=r"holds no tokenizer\.json and no vocab\.txt"):
        make_model(replace(config, tokenizer=str(tmp_path)), blip2_features, [])


def test_weights_of_blip2s_vocabulary_size_get_its_tokenizer(blip2_features, tmp_path, monkeypatch):
    """It is bert-base-uncased, here from the local cache of Hugging Face."""
    from huggingface_hub import constants

    # a tiny model from the hub without tokenizer files, with BLIP-2's 30,523 words
    folder = tmp_path / "model"
    random_blip2("Blip2ForImageTextRetrieval", 30523).save_pretrained(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(TrainingError, match="bert-base-uncased cannot be fetched or read; .*--tokenizer FOLDER"):
        make_model(Stage1Config(init=str(folder)), blip2_features, [])
    cached = tmp_path / "hub" / "models--bert-base-uncased"
    (cached / "snapshots" / "0").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(30522 - 5))]
    (cached / "snapshots" / "0" / "vocab.txt").write_text("\n".join(words) + "\n")
    model, tokens = make_model(Stage1Config(init=str(folder)), blip2_features, [])
    assert (len(tokens), tokens.bos_token_id, model.config.vocab_size) == (30523, 30522, 30523)


def test_weights_that_do_not_fit_the_features_or_the_options_are_refused(
    features, blip2_features, blip2_folder, tmp_path
):
    with pytest.raises(TrainingError, match="--num-query-tokens 7: --init .* has 4"):
        make_model(Stage1Config(init=str(blip2_folder), num_query_tokens=7), blip2_features, [])
    wide = shutil.copytree(blip2_folder, tmp_path / "wide")
    state = load_file(wide / "model.safetensors")
    config = json.loads((wide / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 64
    (wide / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match="features 64 wide; these are 32 wide"):
        make_model(Stage1Config(init=str(wide)), features, [])
    state["query_tokens"] = torch.zeros(1, 5, 48)
    save_file(state, wide / "model.safetensors")
    config["vision_config"]["hidden_size"] = 32
    (wide / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"query_tokens is \(1, 5, 48\), not \(1, 4, 48\)"):
        make_model(Stage1Config(init=str(wide)), features, [])
