"""The three objectives of BLIP-2's first stage, as pure functions (Li et al. 2023, section 3.2; targets as in ALBEF), and the
lessons of a teacher: an encoder whose joint space already holds images and texts.

Letters as in qformer.py. M texts belong to B images; without `image_rows`, text m belongs to image m."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .qformer import ImageEncoding, QFormer

LOSSES = ("loss_itc", "loss_itm", "loss_itg")
LOSS_TEACH = "loss_teach"  # beside these, where there is a teacher
LABEL_SMOOTHING = 0.1
TEACHER_TEMPERATURE = 0.02  # of the teacher's similarities
PROBABILITY_FLOOR = 1e-4  # added to the probability of every negative, as in ALBEF
MOST_PRODUCTS = 2**25  # dot products of queries and texts in memory at once


@dataclass(frozen=True)
class Lesson:
    """The teacher's embeddings of a batch's images and texts, of unit length. Their width is that of the shared space."""

    images: Tensor  # (B, E)
    texts: Tensor  # (M, E)


def similarities(image_features: Tensor, text_features: Tensor) -> Tensor:
    """(B, Q, E), (M, E) -> (B, M): the maximum over queries of the dot product.

    A large batch is computed in slices of images. Their dot products are computed again in the backward pass."""

    def compute(images: Tensor, texts: Tensor) -> Tensor:
        return torch.einsum("bqe,me->bqm", images, texts).amax(1)

    slices = image_features.split(max(1, MOST_PRODUCTS // (image_features.shape[1] * max(1, len(text_features)))))
    if len(slices) == 1:
        return compute(image_features, text_features)
    return torch.cat([checkpoint(compute, images, text_features, use_reentrant=False) for images in slices])


def positives(image_id: Tensor, image_rows: Tensor, text_id: Tensor) -> Tensor:
    """(B, M) bool: whether a text describes an image. It does if it, or a text that reads the same, belongs to the same picture.

    image_id (B,): equal for the same picture; image_rows (M,): the image of each text; text_id (M,): equal for texts that
    read the same."""
    order = text_id.argsort()
    number = torch.empty_like(order)  # the number of each text among the different ones, from 0
    number[order] = F.pad(text_id[order].diff().ne(0).cumsum(0), (1, 0))
    same = (image_id[:, None] == image_id[image_rows]).float()  # (B, M)
    return torch.zeros_like(same).index_add_(1, number, same)[:, number] > 0


def itc_loss(similarity: Tensor, positive: Tensor, lesson: Lesson | None = None, soft: float = 0.0) -> Tensor:
    """Image-text contrastive loss, a scalar. `similarity` (B, M) is divided by the temperature; `positive` (B, M) bool.

    Targets are 0.9 spread over the positives plus 0.1 spread over all, in both directions. A share `soft` of the 0.9 goes to the
    softmax of the teacher's similarities instead, as ALBEF takes that of its momentum model (Li et al. 2021,
    arXiv:2107.07651, section 3.4)."""
    taught = None if lesson is None else lesson.images @ lesson.texts.T / TEACHER_TEMPERATURE  # (B, M)
    to_texts = _soft_cross_entropy(similarity, positive, taught, soft)
    to_images = _soft_cross_entropy(similarity.T, positive.T, None if taught is None else taught.T, soft)
    return (to_texts + to_images) / 2


def _soft_cross_entropy(logits: Tensor, positive: Tensor, taught: Tensor | None, soft: float) -> Tensor:
    target = positive.float() / positive.sum(1, keepdim=True)
    if taught is not None:
        target = torch.lerp(target, taught.softmax(1), soft)
    return F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING)


def teach_loss(image_features: Tensor, text_features: Tensor, lesson: Lesson) -> Tensor:
    """The distance to the teacher, a scalar: 1 - cosine, of each text's feature and of each image's best query, both in the mean.

    image_features (B, Q, E), text_features (M, E)."""
    images = 1 - torch.einsum("bqe,be->bq", image_features, lesson.images).amax(1)
    texts = 1 - (text_features * lesson.texts).sum(1)
    return images.mean() + texts.mean()


@torch.no_grad()
def hard_negatives(
    similarity: Tensor,
    positive: Tensor,
    image_rows: Tensor,
    texts: Tensor,
    hardness: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A negative image for each of `texts` (m,), and a negative text for the image of each: rows (m,), (m,).

    A share `hardness` of them is drawn by the softmax of the similarities, as in BLIP-2: similar ones come more often. The others
    are drawn evenly. `similarity`, `positive` (B, M). If an image or a text has positives only, any of these is drawn."""

    def weights(logits: Tensor, forbidden: Tensor) -> Tensor:  # of NaN too: the loss will show that a run diverged
        forbidden = forbidden & ~forbidden.all(1, keepdim=True)
        hard = (logits.nan_to_num().softmax(1) + PROBABILITY_FLOOR).masked_fill(forbidden, 0)
        even = (~forbidden).to(hard.dtype)
        return torch.lerp(even / even.sum(1, keepdim=True), hard / hard.sum(1, keepdim=True), hardness)

    own = image_rows[texts]
    negative_image = torch.multinomial(weights(similarity.T[texts], positive.T[texts]), 1, generator=generator)
    negative_text = torch.multinomial(weights(similarity[own], positive[own]), 1, generator=generator)
    return negative_image.squeeze(1), negative_text.squeeze(1)


def itm_pairs(
    positive: Tensor, image_rows: Tensor, texts: Tensor, negatives: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Image rows (3m,) and text rows (3m,) of the pairs to match, and whether each pair matches (3m,).

    The pairs are `texts` (m,) with their images, `texts` with negative images, and negative texts with the images. `positive`
    (B, M)."""
    negative_image, negative_text = negatives
    own = image_rows[texts]
    images, texts = torch.cat([own, negative_image, own]), torch.cat([texts, texts, negative_text])
    return images, texts, positive[images, texts]


def itm_loss(
    model: QFormer,
    image: ImageEncoding,
    image_rows: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    matches: Tensor,
) -> Tensor:
    """Image-text matching loss of N pairs, a scalar: text n with image `image_rows[n]`; `matches` (N,) bool are the labels."""
    return F.cross_entropy(model.match(image, image_rows, input_ids, attention_mask), matches.long())


def itg_loss(
    model: QFormer, image: ImageEncoding, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """Image-grounded generation loss, a scalar: predict the next token of each caption, which starts with [DEC].

    Padding does not count."""
    inputs = torch.cat([torch.full_like(input_ids[:, :1], model.config.bos_token_id), input_ids[:, 1:]], 1)
    states = model.caption_states(image, image_rows, inputs[:, :-1], attention_mask[:, :-1])  # (M, L - 1, D)
    states = states.flatten(0, 1)
    labels = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100).flatten()
    if labels.device.type == "cpu":  # leave padding out of the large product; a CUDA device would wait here
        real = (labels >= 0).nonzero().squeeze(1)
        states, labels = states[real], labels[real]
    return F.cross_entropy(model.language_logits(states).float(), labels, label_smoothing=LABEL_SMOOTHING)


def stage1_losses(
    model: QFormer,
    image_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    image_id: Tensor | None = None,
    negatives: tuple[Tensor, Tensor] | None = None,
    image_rows: Tensor | None = None,
    losses: Sequence[str] = LOSSES,
    matched: Tensor | None = None,
    hardness: float = 1.0,
    text_id: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses of one batch, scalars: {"loss_itc", "loss_itm", "loss_itg"}, or those of them that `losses` lists.

    image_embeds (B, T, W); input_ids, attention_mask (M, L); image_rows (M,): the image of each text, m itself unless given;
    image_id (B,): equal for rows that show the same picture; their captions are positives of each other's rows;
    text_id (M,): equal for texts that read the same, which are positives of the same images;
    matched (m,): the texts that matching and generation see, all unless given; ITC sees all M, which costs far less;
    negatives: (a negative image for each matched text, a negative text for the image of each), drawn by `hard_negatives` unless
    given; given ones count as negatives even if image_id makes them positives.
    The batch needs at least two different pictures."""
    device = input_ids.device
    image_rows = torch.arange(len(input_ids), device=device) if image_rows is None else image_rows
    image_id = torch.arange(len(image_embeds), device=device) if image_id is None else image_id
    matched = torch.arange(len(input_ids), device=device) if matched is None else matched
    text_id = torch.arange(len(input_ids), device=device) if text_id is None else text_id
    positive = positives(image_id, image_rows, text_id)  # (B, M)

    image = model.encode_image(image_embeds)
    text_features = model.encode_text(input_ids, attention_mask, first_only=True).features
    similarity = similarities(image.features, text_features) / model.temp  # (B, M)
    out = {}
    if "loss_itc" in losses:
        out["loss_itc"] = itc_loss(similarity, positive)
    if "loss_itm" in losses:
        drawn = hard_negatives(similarity, positive, image_rows, matched, hardness) if negatives is None else negatives
        images, texts, matches = itm_pairs(positive, image_rows, matched, drawn)
        if negatives is not None:
            matches[len(matched) :] = False
        out["loss_itm"] = itm_loss(model, image, images, input_ids[texts], attention_mask[texts], matches)
    if "loss_itg" in losses:
        out["loss_itg"] = itg_loss(model, image, image_rows[matched], input_ids[matched], attention_mask[matched])
    return out
