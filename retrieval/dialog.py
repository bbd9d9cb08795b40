"""Answers about pictures by a run of stage 2: to a question, or to each question of a dialog."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pipeline.config import ComputeOptions
from ..pipeline.errors import QfError
from ..pipeline.results import Result
from ..pipeline.workspace import Workspace
from ..trainer.config import GenerateOptions
from ..trainer.decoding import Decoding, OnText
from ..trainer.stage2.generate import Generator
from .config import CaptionOptions
from .encode.qformer import Run
from .generation import decoding, named_pictures, open_pictures, open_speaker

log = logging.getLogger(__name__)
ANSWER_LENGTH, CHAT_LENGTH = 10, 200  # most tokens


@dataclass(frozen=True)
class Answer(Result):
    """A question about one or several pictures, and the answer."""

    images: list[str]
    question: str
    answer: str

    def __str__(self) -> str:
        return self.answer


def answer(
    workspace: Workspace,
    image: str,
    question: str,
    options: GenerateOptions,
    run: str | None,
    on: ComputeOptions,
    on_text: OnText | None = None,
) -> Answer:
    """The answer of a run of stage 2 to a question about a picture: a file, or a key of the features. `on_text` gets the answer while
    it grows, unless beams search for it.

    QfError if the run answers no questions."""
    generator, opened = open_answerer(workspace, options, run, on)
    ((_, embeds),) = list(open_pictures([image], workspace, opened))
    return Answer([image], question, generator.texts(embeds, [question], answering(options), on_text)[0])


def answering(options: GenerateOptions) -> Decoding:
    """How to generate the answer to a question, unless the options say otherwise, with BLIP-2's length penalty."""
    return decoding(options, ANSWER_LENGTH, length_penalty=-1.0)


class Chat:
    """A dialog about pictures, which stay before it. Its oldest turns are forgotten where the language model's window ends."""

    def __init__(self, generator: Generator, images: list[str], image_embeds: Tensor, how: Decoding) -> None:
        """`image_embeds` are the frozen tokens (n, T, W) of the images."""
        self.generator, self.images, self.image_embeds, self.how = generator, images, image_embeds, how
        self.turns: list[str] = []  # questions and answers
        self.forgetting = False

    def ask(self, question: str, on_text: OnText | None = None) -> Answer:
        """The answer to the next question. `on_text` gets it while it grows. TrainingError if the question is too long by itself."""
        said, left_out = self.generator.reply(self.image_embeds, [*self.turns, question], self.how, on_text)
        self.turns += [question, said]
        if left_out and not self.forgetting:
            log.warning("the dialog no longer fits into the language model's window; its oldest turns are left out")
            self.forgetting = True
        return Answer(self.images, question, said)


def open_chat(
    workspace: Workspace, images: Sequence[str], options: GenerateOptions, run: str | None, on: ComputeOptions
) -> Chat:
    """A dialog about pictures, all of them together: files, folders of them, keys of the features. Without beams, unless the options
    name some, so that answers appear while they grow.

    QfError if the run answers no questions, or if none of the pictures can be read."""
    generator, opened = open_answerer(workspace, options, run, on)
    names = named_pictures(images, CaptionOptions(), workspace)
    found = {
        name: tokens
        for some, embeds in open_pictures(names, workspace, opened)
        for name, tokens in zip(some, embeds, strict=True)
    }
    if not found:
        raise QfError("none of the pictures can be read; give others")
    readable = [name for name in names if name in found]
    how = decoding(options, CHAT_LENGTH, beams=1)
    return Chat(generator, readable, torch.stack([found[name] for name in readable]), how)


def open_answerer(
    workspace: Workspace, options: GenerateOptions, run: str | None, on: ComputeOptions
) -> tuple[Generator, Run]:
    """The run of stage 2 of that name, or the latest one. QfError if it answers no questions."""
    speaker, opened = open_speaker(workspace, run, 2, on, options.prompt)
    if not isinstance(speaker, Generator) or "{}" not in speaker.prompt:
        raise QfError(
            f"run {opened.folder} writes captions and answers no questions; train one with --task vqa or --task chat, or give a "
            '--prompt with {} for the question, such as "Question: {} Answer:"'
        )
    return speaker, opened
