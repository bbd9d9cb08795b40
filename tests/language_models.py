"""Small random language models, saved by transformers, and a BLIP-2 of transformers around one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from blip2 import BLIP_2
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(f"w{n}" for n in range(30)), "a", "photo", "of"]
OPT = {
    "model_type": "opt", "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 32, "num_attention_heads": 2,
    "word_embed_proj_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip

BART = {
    "model_type": "bart", "vocab_size": len(WORDS), "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip


def write_tokenizer(folder: Path, encoder_decoder: bool, words: Sequence[str] = tuple(WORDS)) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = "$A </s>" if encoder_decoder else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def random_blip2_with(settings: dict):
    """A Blip2ForConditionalGeneration whose parameters are all drawn, in float32."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    qformer = BLIP_2["qformer_config"] | {"vocab_size": 20, "use_qformer_text_input": False}
    config = Blip2Config(**BLIP_2 | {"qformer_config": qformer, "text_config": settings}, image_token_index=4)
    torch.manual_seed(3)
    model = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.language_model.tie_weights()
    return model


def save_language_model(model, folder: Path) -> Path:
    """The language model of a BLIP-2 as a folder of its own, with a tokenizer."""
    model.language_model.save_pretrained(folder)
    write_tokenizer(folder, bool(model.language_model.config.is_encoder_decoder))
    return folder
