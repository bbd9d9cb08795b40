"""Sentence encoders give the embeddings that transformers computes."""

import json
import shutil

import pytest
import torch
import transformers
from numpy.testing import assert_allclose
from qf.pipeline.encoders.sentences import SentenceModel
from qf.pipeline.errors import EncoderError

CPU = torch.device("cpu")
TEXTS = ["a red bar", "the square is blue", "a " * 60]


@pytest.mark.parametrize("first", [False, True])
def test_a_sentence_is_the_mean_of_its_tokens_or_the_first_one(bert_folder, tmp_path, first):
    folder = shutil.copytree(bert_folder, tmp_path / "sentences")
    if first:
        modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 48}
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    model = SentenceModel(str(folder), CPU)
    assert (model.limit, model.width) == (40, 48)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bert = transformers.BertModel.from_pretrained(folder).eval()
    for text, ours in zip(TEXTS, model.encode(TEXTS, batch_size=2), strict=True):
        with torch.no_grad():
            hidden = bert(**tokenizer(text, truncation=True, max_length=40, return_tensors="pt")).last_hidden_state[0]
        theirs = torch.nn.functional.normalize(hidden[0] if first else hidden.mean(0), dim=0)
        assert_allclose(ours, theirs.numpy(), atol=1e-5)
    assert model.encode([]).shape == (0, 48)


def test_a_folder_without_a_sentence_encoder_is_refused(clip_folder, bert_folder, tmp_path):
    with pytest.raises(EncoderError, match="is of type 'clip'; a sentence encoder is one of bert"):
        SentenceModel(str(clip_folder), CPU)
    folder = shutil.copytree(bert_folder, tmp_path / "odd")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(EncoderError, match="pools its tokens by pooling_mode_max_tokens"):
        SentenceModel(str(folder), CPU)
