"""BLIP-2's first stage put together from transformers' modules: what stage1_step.py compares qf with."""

import torch
import torch.nn.functional as F
from qf.trainer.config import QFormerConfig
from qf.trainer.objectives import hard_negatives, itc_loss, itm_pairs, similarities
from torch import Tensor, nn
from transformers import BertConfig, Blip2QFormerConfig
from transformers.models.bert.modeling_bert import BertOnlyMLMHead
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

# image_embeds (B, T, W), input_ids, attention_mask (M, L), image_rows (M,)
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Plain(nn.Module):
    """BLIP-2's first stage in LAVIS's arrangement, built from transformers' modules."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        sizes = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size,
            "hidden_dropout_prob": config.hidden_dropout_prob,
            "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
            "max_position_embeddings": config.max_position_embeddings,
            "layer_norm_eps": config.layer_norm_eps,
        }
        self.bos_token_id = config.bos_token_id
        self.post_layernorm = nn.LayerNorm(config.encoder_hidden_size, eps=config.ln_vision_eps)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        qformer = Blip2QFormerConfig(
            **sizes,
            encoder_hidden_size=config.encoder_hidden_size,
            cross_attention_frequency=config.cross_attention_frequency,
            use_qformer_text_input=True,
        )
        self.embeddings = Blip2TextEmbeddings(qformer)
        self.qformer = Blip2QFormerModel(qformer)
        self.vision_projection = nn.Linear(config.hidden_size, config.embed_dim)
        self.text_projection = nn.Linear(config.hidden_size, config.embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.cls = BertOnlyMLMHead(BertConfig(**sizes))
        self.cls.predictions.decoder.weight = self.embeddings.word_embeddings.weight
        self.cls.predictions.decoder.bias = self.cls.predictions.bias
        self.temp = nn.Parameter(torch.tensor(0.07))

    def losses(self, batch: Batch, negatives: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns the three losses of N pairs and their `similarity` (N, N).

        `batch` has N images (repeated), N texts and the image number of each pair. `negatives` are rows of images and rows of
        texts, both among the N pairs. Without them, hard negatives are drawn."""
        embeds, input_ids, attention_mask, picture = batch
        image = self.post_layernorm(embeds)
        queries = self.query_tokens.expand(len(image), -1, -1)
        query_output = self.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        image_features = F.normalize(self.vision_projection(query_output), dim=-1)
        text = self.qformer(
            query_embeds=self.embeddings(input_ids=input_ids), query_length=0, attention_mask=attention_mask
        ).last_hidden_state
        text_features = F.normalize(self.text_projection(text[:, 0]), dim=-1)
        similarity = similarities(image_features, text_features) / self.temp
        positive = picture[:, None] == picture[None]

        rows = torch.arange(len(image), device=image.device)
        if negatives is None:
            negatives = hard_negatives(similarity, positive, rows, rows)
        pair_images, pair_texts, matches = itm_pairs(positive, rows, rows, negatives)
        ids, mask = input_ids[pair_texts], attention_mask[pair_texts]
        queries = self.query_tokens.expand(len(ids), -1, -1)
        seen = mask.new_ones(queries.shape[:2])
        matched = self.qformer(
            query_embeds=self.embeddings(input_ids=ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=torch.cat([seen, mask], 1),
            encoder_hidden_states=image[pair_images],
        ).last_hidden_state
        logits = self.itm_head(matched[:, : queries.shape[1]]).mean(1)

        ids = input_ids.clone()
        ids[:, 0] = self.bos_token_id
        queries = self.query_tokens.expand(len(image), -1, -1)
        spoken = self.qformer(
            query_embeds=self.embeddings(input_ids=ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=causal_mask(queries.shape[1], attention_mask),
            encoder_hidden_states=image,
        ).last_hidden_state
        words = self.cls(spoken[:, queries.shape[1] :])[:, :-1]
        labels = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
        return {
            "loss_itc": itc_loss(similarity, positive),
            "loss_itm": F.cross_entropy(logits, matches.long()),
            "loss_itg": F.cross_entropy(words.flatten(0, 1), labels.flatten(), label_smoothing=0.1),
            "similarity": similarity,
        }


def causal_mask(queries: int, attention_mask: Tensor) -> Tensor:
    """Returns (N, 1, Q + L, Q + L) from (N, L): queries attend to queries, text attends to queries and earlier text."""
    length = queries + attention_mask.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    mask[:queries, :queries] = True
    return mask[None, None] & F.pad(attention_mask.bool(), (queries, 0), value=True)[:, None, None]
