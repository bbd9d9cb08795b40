"""Starting from a BERT, from a run, and refusing what does not fit."""

import pytest
import torch
from qf.pipeline.errors import ArtifactError, TrainingError
from qf.trainer.config import QFormerConfig, TrainConfig
from qf.trainer.qformer import QFormer
from qf.trainer.train import make_model
from qf.trainer.weights import load_bert
from safetensors.torch import load_file, save_file
from torch.testing import assert_close


def test_text_encoding_equals_the_bert_it_starts_from(features, bert_folder):
    from transformers import BertModel

    model, tokens = make_model(TrainConfig(init=str(bert_folder)), features, [])
    model.eval()
    assert model.config.hidden_size == 48
    assert model.config.vocab_size == len(tokens)
    bert = BertModel.from_pretrained(bert_folder).eval()
    input_ids, mask = tokens(["a red square", "the bar is blue"], 16)
    # a Q-Former has no token types: BERT's constant type 0 is added to none of its embeddings
    bert.embeddings.token_type_embeddings.weight.data.zero_()
    expected = bert(input_ids=input_ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    assert_close(model.encode_text(input_ids, mask).output[real], expected[real], atol=1e-5, rtol=0)
    state = model.state_dict()
    for name in ("intermediate.dense.weight", "output.dense.weight", "output.LayerNorm.bias"):
        query = name.replace("intermediate", "intermediate_query").replace("output", "output_query")
        prefix = "qformer.encoder.layer.1."
        assert torch.equal(state[prefix + name], state[prefix + query])


def test_the_language_head_of_a_bert_comes_along(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    bert = BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=20))
    bert.save_pretrained(tmp_path)
    model = QFormer(QFormerConfig(**{**sizes, "vocab_size": 31}, encoder_hidden_size=8, max_position_embeddings=20))
    load_bert(model, tmp_path)
    assert torch.equal(model.cls.predictions.transform.dense.weight, bert.cls.predictions.transform.dense.weight)
    assert torch.equal(model.cls.predictions.bias[:30], bert.cls.predictions.bias)


def test_weights_that_do_not_fit_are_named(bert_folder, tmp_path, trained):
    state = load_file(bert_folder / "model.safetensors")
    state.pop("encoder.layer.1.output.dense.bias")
    state["encoder.layer.0.extra.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    sizes = {
        "vocab_size": 200,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    with pytest.raises(ArtifactError, match=r"missing.*layer\.1\.output\.dense\.bias.*unexpected.*extra"):
        load_bert(QFormer(QFormerConfig(**sizes, encoder_hidden_size=8)), tmp_path)
    run = trained / "runs" / "stage1"
    state = load_file(run / "model.safetensors")
    state.pop("temp")
    for file in run.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="missing temp"):
        QFormer.from_pretrained(tmp_path)


def test_starting_from_a_run_keeps_its_weights(features, trained):
    run = trained / "runs" / "stage1"
    model, tokens = make_model(TrainConfig(init=str(run), dropout=0.3), features, [])
    assert torch.equal(model.state_dict()["query_tokens"], load_file(run / "model.safetensors")["query_tokens"])
    assert model.config.hidden_dropout_prob == 0.3
    assert len(tokens) == model.config.vocab_size
    with pytest.raises(TrainingError, match="no such run, BERT folder or id"):
        make_model(TrainConfig(init=str(run / "nothing")), features, [])


def test_no_pickle_is_executed(tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Trap()}, protocol=2))
    with pytest.raises(ArtifactError, match="cannot be read as weights"):
        QFormer.from_pretrained(tmp_path / "evil.pth")
    assert not (tmp_path / "sprung").exists()
