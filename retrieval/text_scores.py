"""Captions and answers of a run on a split, scored: beside the same run with other pictures, and beside the most frequent answer."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..pipeline.config import ComputeOptions
from ..pipeline.errors import QfError
from ..pipeline.features.codecs import decode
from ..pipeline.features.reader import Features
from ..pipeline.results import OnStatus, Result, Status, no_status
from ..pipeline.schema import Question
from ..pipeline.workspace import Workspace
from ..trainer.config import GenerateOptions
from ..trainer.metrics.captions import caption_scores, java_scores
from ..trainer.metrics.vqa import accuracies
from .config import EvalOptions
from .dialog import answering
from .encode.qformer import Run, check_features
from .generation import CAPTION_LENGTH, GROUP, Speaker, decoding, open_speaker

RUN, SHUFFLED, FREQUENT = "run", "run, shuffled images", "most frequent answer"


@dataclass(frozen=True)
class TextsEvaluated(Result):
    """Scores of texts on a split: a row of metrics for each way to make them."""

    run: str
    split: str
    task: str
    images: int
    texts: int
    empty: int  # texts of the run without a word
    rows: dict[str, dict[str, float]]

    def __str__(self) -> str:
        noun = "captions" if self.task == "caption" else "answers"
        lines = [
            f"{noun} of {self.run} for {self.images:,} images of {self.split}; {self.empty:,} of {self.texts:,} are empty"
        ]
        for name, metrics in self.rows.items():
            found = "  ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
            lines.append(f"  {name:<22}{found}")
        return "\n".join(lines)


def evaluate_texts(
    workspace: Workspace,
    options: EvalOptions,
    run: str | None,
    on: ComputeOptions,
    progress: OnStatus = no_status,
    say: Callable[[str], None] = lambda text: None,
) -> TextsEvaluated:
    """BLEU, ROUGE-L and CIDEr of captions, and METEOR where Java and pycocoevalcap are; or VQAv2's accuracy of answers in percent; of
    a run on a split. `say` gets a line about what is left out.

    QfError if the split has nothing to score with, or if there is no such run."""
    features = Features(workspace.features)
    captions = options.task == "caption"
    split = options.split or ("test" if features.manifest["splits"]["test"] else "val")
    rows = features.rows(split, captioned=captions, asked=not captions)
    if not len(rows):
        what = "captions" if captions else "questions"
        raise QfError(f"{features.folder} has no images with {what} in the split {split}; choose another --split")
    speaker, opened = open_speaker(workspace, run, None if captions else 2, on)
    check_features(opened, features)
    if ("{}" in speaker.prompt) == captions:
        raise QfError(f"run {opened.folder} was not trained for --task {options.task}; choose another --run")
    other = np.roll(rows, 1)
    found: dict[str, dict[str, float]] = {}
    if captions:
        references = [features.captions[row] for row in rows.tolist()]
        texts = _texts(speaker, opened, features, rows, [[""]] * len(rows), progress, captions)
        blind = _texts(speaker, opened, features, other, [[""]] * len(rows), progress, captions)
        found = {name: caption_scores(made, references) for name, made in ((RUN, texts), (SHUFFLED, blind))}
        try:
            found[RUN] |= java_scores(texts, references)
            say("left out: SPICE, whose program downloads a model of 0.4 GB")
        except RuntimeError as error:
            say(f"left out: {error}")
    else:
        asked = [features.questions[row] for row in rows.tolist()]
        every = [question for questions in asked for question in questions]
        texts_of = [[question.question for question in questions] for questions in asked]
        texts = _texts(speaker, opened, features, rows, texts_of, progress, captions)
        blind = _texts(speaker, opened, features, other, texts_of, progress, captions)
        frequent = _frequent(features, every)
        found = {
            name: _accuracies(every, made) for name, made in ((RUN, texts), (SHUFFLED, blind), (FREQUENT, frequent))
        }
    empty = sum(not text for text in texts)
    return TextsEvaluated(str(opened.folder), split, options.task, len(rows), len(texts), empty, found)


def _texts(
    speaker: Speaker,
    run: Run,
    features: Features,
    rows: np.ndarray,
    questions: Sequence[Sequence[str]],
    progress: OnStatus,
    captions: bool,
) -> list[str]:
    """The text for each question about the image of each row; with captions each row has the question ""."""
    options = GenerateOptions()
    how = decoding(options, CAPTION_LENGTH) if captions else answering(options)
    texts: list[str] = []
    for start in range(0, len(rows), GROUP):
        some = rows[start : start + GROUP]
        embeds = decode({name: column.to(run.device) for name, column in features.read(some).items()})
        asked = [(n, question) for n, several in enumerate(questions[start : start + GROUP]) for question in several]
        texts += speaker.texts(embeds[[n for n, _ in asked]], [question for _, question in asked], how)
        progress(Status("texts", min(start + GROUP, len(rows)), len(rows), ""))
    return texts


def _accuracies(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """The accuracy of all questions, and of those of each type where the data has types."""
    types = [question.type or "other" for question in questions] if any(question.type for question in questions) else ()
    return accuracies(answers, [question.answers for question in questions], types)


def _frequent(features: Features, questions: Sequence[Question]) -> list[str]:
    """For each question the most frequent answer to training questions of its type."""
    counts: dict[Any, Counter[str]] = defaultdict(Counter)
    for row in features.rows("train", asked=True).tolist():
        for question in features.questions[row]:
            counts[question.type].update(question.answers)
    return [(counts[question.type].most_common(1) or [("", 0)])[0][0] for question in questions]
