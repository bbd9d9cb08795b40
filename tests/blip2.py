"""A small random BLIP-2 of transformers, and scores by it and by qf of the same pictures and texts."""

import numpy as np
import torch
from qf.pipeline.encoders.load import load_encoder
from qf.trainer.objectives import similarities

BLIP_2 = {  # small sizes of transformers' Blip2Config
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    },
    "qformer_config": {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 40,
        "use_qformer_text_input": True,
    },
    "text_config": {
        "model_type": "opt", "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16, "num_attention_heads": 2,
        "word_embed_proj_dim": 16, "max_position_embeddings": 16,
    },
    "num_query_tokens": 4,
    "image_text_hidden_size": 24,
}  # fmt: skip


def random_blip2(name: str, words: int):
    """A random BLIP-2 of transformers, every parameter drawn, so that no bias and no query is zero."""
    import transformers

    qformer = BLIP_2["qformer_config"] | {"vocab_size": words, "use_qformer_text_input": name.endswith("Retrieval")}
    torch.manual_seed(2)
    model = getattr(transformers, name)(transformers.Blip2Config(**BLIP_2 | {"qformer_config": qformer})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


CPU = torch.device("cpu")
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)
IDS = torch.tensor([[2, 7, 8, 3, 0], [2, 9, 10, 11, 3], [2, 12, 3, 0, 0]])
MASK = (IDS != 0).long()


def scores_from_features(model, folder):
    """(B, M) contrastive and matching scores of qf, from the features that its encoder makes."""
    tokens, _ = load_encoder(str(folder), CPU, torch.float32).encode(PIXELS)
    with torch.no_grad():
        image = model.encode_image(tokens)
        itc = similarities(image.features, model.encode_text(IDS, MASK).features)
        rows, texts = torch.arange(5).repeat_interleave(3), torch.arange(3).repeat(5)
        itm = model.match(image, rows, IDS[texts], MASK[texts])
    return itc, itm.view(5, 3, 2)


def scores_from_pixels(model, folder):
    """The same of transformers."""
    preprocessing = load_encoder(str(folder), CPU, torch.float32).preprocessing
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    values = (torch.from_numpy(PIXELS).float() / 255 - mean) / std
    with torch.no_grad():
        itc = model(values, input_ids=IDS, attention_mask=MASK).logits_per_image
        itm = [
            model(
                values,
                input_ids=IDS[m].expand(5, -1),
                attention_mask=MASK[m].expand(5, -1),
                use_image_text_matching_head=True,
            ).logits_per_image
            for m in range(3)
        ]
    return itc, torch.stack(itm, 1)
