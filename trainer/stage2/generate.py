"""Texts for pictures: a trained soft prompt before a frozen language model.

Letters as in language_model.py; W and T are the width and the tokens of the frozen encoder."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...pipeline.artifacts import read_manifest
from ...pipeline.errors import ArtifactError
from ..decoding import Decoding, OnText, generate_texts
from ..manifest import RUN, TOKENIZER
from ..tokens import Tokens
from .batches import instructions_of
from .language_model import LanguageModel, load_language_model
from .model import VisualPrompt, open_soft_prompt
from .prompts import asked, dialog
from .step import soft_prompts

GROUP = 64  # texts generated at once


class Generator:
    """A model of stage 2 with its language model and its prompt."""

    def __init__(
        self,
        model: VisualPrompt,
        language_model: LanguageModel,
        prompt: str,
        tokens: Tokens | None,
        max_text_length: int,
        dtype: torch.dtype,
    ) -> None:
        """`tokens` is the Q-Former's tokenizer where it reads questions; `dtype` its precision."""
        self.model, self.language_model, self.prompt, self.tokens = model, language_model, prompt, tokens
        self.max_text_length, self.dtype = max_text_length, dtype

    @torch.inference_mode()
    def soft_prompts(self, image_embeds: Tensor, questions: Sequence[str]) -> Tensor:
        """The soft prompts (N, Q, H) of N pictures (N, T, W), each with its question."""
        self.model.eval()
        device = image_embeds.device
        read = instructions_of(self.tokens, questions, self.max_text_length, device)
        rows = torch.arange(len(image_embeds), device=device)
        return soft_prompts(self.model, image_embeds, rows, read, self.dtype)

    def texts(
        self, image_embeds: Tensor, questions: Sequence[str], how: Decoding, on_text: OnText | None = None
    ) -> list[str]:
        """The text for each of N pictures (N, T, W) and its question, which is "" where the prompt takes none."""
        return self.continued(
            self.soft_prompts(image_embeds, questions),
            [asked(self.prompt, question) for question in questions],
            how,
            on_text,
        )

    @torch.inference_mode()
    def continued(
        self, prefix: Tensor, prompts: Sequence[str], how: Decoding, on_text: OnText | None = None
    ) -> list[str]:
        """The text after each of N soft prompts (N, Q, H) and prompts. Prompts of equal length are generated together, so that
        no padding changes a text. TrainingError if a prompt does not fit into the language model's window."""
        model = self.language_model
        ids = [model.prompt_ids(prompt) for prompt in prompts]
        by_length: dict[int, list[int]] = defaultdict(list)
        for n, prompt in enumerate(ids):
            model.check_window(prefix.shape[1], prompt, how.max_length)
            by_length[len(prompt)].append(n)
        texts = [""] * len(prompts)
        for group in by_length.values():
            for start in range(0, len(group), GROUP):
                some = group[start : start + GROUP]
                decoder = model.decoder(prefix[some], [ids[n] for n in some])
                made = generate_texts(decoder, model.ends, how, model.text_of, on_text)
                for n, text in zip(some, made, strict=True):
                    texts[n] = text
        return texts

    def reply(
        self, image_embeds: Tensor, turns: Sequence[str], how: Decoding, on_text: OnText | None = None
    ) -> tuple[str, int]:
        """The answer to the last of `turns`, which are questions and answers in turn, about n pictures (n, T, W) together; and how
        many turns were left out for it.

        The soft prompts of all pictures stand before the dialog and stay. The oldest turns are left out where the language model's
        window ends. TrainingError if the last question by itself does not fit."""
        prefix = self.soft_prompts(image_embeds, [turns[-1]] * len(image_embeds)).flatten(0, 1)[None]
        for first in range(0, len(turns), 2):
            prompt = dialog(self.prompt, turns[first:])
            if self.language_model.fits(prefix.shape[1], self.language_model.prompt_ids(prompt), how.max_length):
                break
        return self.continued(prefix, [prompt], how, on_text)[0], first


def open_generator(folder: Path, device: torch.device, dtype: torch.dtype, prompt: str | None = None) -> Generator:
    """The generator of a finished run of stage 2, with another prompt than the run's if one is given.

    ArtifactError if the run or its weights are damaged, or if the language model is no longer the one that it was trained with;
    TrainingError if that cannot be loaded."""
    manifest = read_manifest(folder, RUN)
    known = manifest["language_model"]
    language_model = load_language_model(known["id"], known["precision"], device)
    found = language_model.identity
    if found["sha256"] != known["sha256"]:
        raise ArtifactError(
            f"run {folder} was trained with the language model {known['id']} (weights {known['sha256'][:12]}); the one found there "
            f"now has weights {found['sha256'][:12]}: restore it, or train again"
        )
    model = open_soft_prompt(folder, manifest)
    tokens = Tokens.load(folder / TOKENIZER) if model.reads_text else None
    limit = manifest["train"]["max_text_length"]
    prompt = manifest["prompt"] if prompt is None else prompt
    return Generator(model.to(device), language_model, prompt, tokens, limit, dtype)
