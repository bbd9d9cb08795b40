"""The three objectives of BLIP-2's first stage, as pure functions (Li et al. 2023, section 3.2; targets as in ALBEF).

Letters as in qformer.py. M texts belong to B images; without `image_rows`, text m belongs to image m."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .qformer import ImageEncoding, QFormer

LOSSES = ("loss_itc", "loss_itm", "loss_itg")
LABEL_SMOOTHING = 0.1
HARDNESS_FLOOR = 1e-4  # every negative keeps a little probability


def similarities(image_features: Tensor, text_features: Tensor) -> Tensor:
    """(B, Q, E), (M, E) -> (B, M): the maximum over queries of the dot product."""
    return torch.einsum("bqe,me->bqm", image_features, text_features).amax(1)


def itc_loss(similarity: Tensor, positive: Tensor) -> Tensor:
    """Image-text contrast. `similarity` (B, M), divided by the temperature; `positive` (B, M) bool: the same picture.

    Targets are 0.9 spread over the positives plus 0.1 spread over all, in both directions."""
    return (_soft_cross_entropy(similarity, positive) + _soft_cross_entropy(similarity.T, positive.T)) / 2


def _soft_cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    target = positive.float() / positive.sum(1, keepdim=True)
    return F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING)


@torch.no_grad()
def hard_negatives(similarity: Tensor, positive: Tensor, image_rows: Tensor) -> tuple[Tensor, Tensor]:
    """For every text an image, and for every text's image a text, that do not belong together: (M,), (M,) rows.

    Drawn with the probabilities that the contrast gives them: the more alike, the more often. `similarity`, `positive` (B, M)."""

    def weights(logits: Tensor, forbidden: Tensor) -> Tensor:  # of a diverged run too: its loss will tell
        return (logits.nan_to_num().softmax(1) + HARDNESS_FLOOR).masked_fill(forbidden, 0)

    images = torch.multinomial(weights(similarity.T, positive.T), 1).squeeze(1)  # (M,)
    texts = torch.multinomial(weights(similarity[image_rows], positive[image_rows]), 1).squeeze(1)  # (M,)
    return images, texts


def itm_pairs(image_rows: Tensor, negatives: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Image rows and text rows (3M,) of the pairs to match: positives, negative images, negative texts."""
    negative_image, negative_text = negatives
    texts = torch.arange(len(image_rows), device=image_rows.device)
    return torch.cat([image_rows, negative_image, image_rows]), torch.cat([texts, texts, negative_text])


def itm_loss(logits: Tensor) -> Tensor:
    """Matching. `logits` (3M, 2): M pairs that match, then 2M that do not."""
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[: len(logits) // 3] = 1
    return F.cross_entropy(logits, labels)


def itg_loss(
    model: QFormer, image: ImageEncoding, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """Image-grounded generation: the next token of each caption, which starts with [DEC]. Padding does not count."""
    inputs = torch.cat([torch.full_like(input_ids[:, :1], model.config.bos_token_id), input_ids[:, 1:]], 1)
    logits = model.caption_logits(image, image_rows, inputs[:, :-1], attention_mask[:, :-1])  # (M, L - 1, V)
    labels = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=LABEL_SMOOTHING)


def stage1_losses(
    model: QFormer,
    image_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    image_id: Tensor | None = None,
    negatives: tuple[Tensor, Tensor] | None = None,
    image_rows: Tensor | None = None,
    losses: Sequence[str] = LOSSES,
) -> dict[str, Tensor]:
    """The losses of one step: {"loss_itc", "loss_itm", "loss_itg"}, scalars; only those named in `losses` are computed.

    image_embeds (B, T, W); input_ids, attention_mask (M, L); image_rows (M,): the image of each text, m itself unless given;
    image_id (B,): equal for rows that show the same picture: their captions are all positives and never negatives;
    negatives: (negative image row of each text, negative text row of each text's image), drawn by `hard_negatives` unless given.
    At least two different pictures are needed."""
    if image_rows is None:
        image_rows = torch.arange(len(input_ids), device=input_ids.device)
    if image_id is None:
        image_id = torch.arange(len(image_embeds), device=input_ids.device)
    positive = image_id[:, None] == image_id[image_rows][None, :]  # (B, M)

    image = model.encode_image(image_embeds)
    text = model.encode_text(input_ids, attention_mask)
    similarity = similarities(image.features, text.features) / model.temp  # (B, M)
    out = {}
    if "loss_itc" in losses:
        out["loss_itc"] = itc_loss(similarity, positive)
    if "loss_itm" in losses:
        if negatives is None:
            negatives = hard_negatives(similarity, positive, image_rows)
        pair_images, pair_texts = itm_pairs(image_rows, negatives)
        out["loss_itm"] = itm_loss(model.match(image, pair_images, input_ids[pair_texts], attention_mask[pair_texts]))
    if "loss_itg" in losses:
        out["loss_itg"] = itg_loss(model, image, image_rows, input_ids, attention_mask)
    return out
