"""Captions by the generation head: the keys and values that are kept change nothing."""

import torch
from qf.trainer.config import QFormerConfig
from qf.trainer.decoding import Decoding
from qf.trainer.qformer import QFormer
from qf.trainer.stage1.captioner import Captioner
from qf.trainer.stage1.embedder import Embedder
from qf.trainer.tokens import Tokens

CPU = torch.device("cpu")


def model_and_tokens():
    tokens = Tokens.train(["a red square on a green bar", "the blue pole is yellow"] * 3, 60)
    config = QFormerConfig(
        vocab_size=len(tokens), encoder_hidden_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_query_tokens=3, bos_token_id=tokens.bos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = QFormer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval(), tokens


def test_greedy_captions_equal_those_without_a_cache():
    model, tokens = model_and_tokens()
    embeds = torch.randn(5, 7, 12)
    captions = Captioner(Embedder(model, tokens, CPU, torch.float32, 32)).texts(
        embeds, [""] * 5, Decoding(max_length=9)
    )
    with torch.no_grad():
        image = model.encode_image(embeds)
        for n, caption in enumerate(captions):
            ids = [tokens.bos_token_id]
            while len(ids) <= 9:
                text = torch.tensor([ids])
                logits = model.caption_logits(image, torch.tensor([n]), text, torch.ones_like(text))
                ids.append(int(logits[0, -1].argmax()))
                if ids[-1] == tokens.sep_token_id:
                    break
            assert tokens.tokenizer.decode(ids[1:], skip_special_tokens=True).strip() == caption


def test_beams_of_one_equal_greedy_and_a_batch_equals_singles():
    model, tokens = model_and_tokens()
    captioner = Captioner(Embedder(model, tokens, CPU, torch.float32, 32))
    embeds = torch.randn(4, 7, 12)
    for beams in (1, 4):
        how = Decoding(beams=beams, max_length=8, min_length=2)
        singles = [captioner.texts(embeds[n : n + 1], [""], how)[0] for n in range(4)]
        assert captioner.texts(embeds, [""] * 4, how) == singles
