"""The second part of the demo: a frozen language model captions the sample's pictures and answers questions about them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..pipeline.artifacts import CONFIG
from ..pipeline.config import ComputeOptions
from ..pipeline.device import resolve_device
from ..pipeline.features.codecs import decode
from ..pipeline.features.reader import Features
from ..pipeline.results import Result
from ..pipeline.workspace import Workspace
from ..trainer.config import GenerateOptions, Stage2Config
from ..trainer.metrics.vqa import vqa_accuracy
from ..trainer.runs.folder import Trained, read_settings
from ..trainer.stage1.pace import Pace
from ..trainer.stage2.stage import train
from .config import DEMO_MINUTES, EvalOptions
from .dialog import answering
from .generation import CAPTION_LENGTH, decoding, open_speaker
from .index.store import open_index
from .journey import Watch
from .sheet import Told, text_sheet
from .text_scores import TextsEvaluated, evaluate_texts

RUNS = {"caption": "captions", "vqa": "answers"}
TRAINING = Stage2Config(llm="builtin", epochs=4.0, batch_size=64, lr=1e-3, matched_captions=2, checkpoint_every=100)
LEAST_EPOCHS = 0.3  # trained even where the minutes do not suffice for them
SPARE = 0.06  # share of the minutes that is not planned
# what these cost for an image, in units of its part in a step of stage 1 with all losses
TRAINED, VALIDATED, EVALUATED = {"caption": 0.41, "vqa": 0.32}, 0.8, {"caption": 1.3, "vqa": 2.0}
SHOWN, ASKED = 12, 2  # pictures of the sheet, and questions about each


@dataclass(frozen=True)
class Spoken(Result):
    """The two runs with their scores, and the sheet of captions and answers."""

    captions: Trained
    answers: Trained
    caption_scores: TextsEvaluated
    answer_scores: TextsEvaluated
    sheet: str
    cut: str | None  # what was left out to end in time

    def to_json(self) -> dict[str, Any]:
        """An object with the JSON of each part."""
        parts = ("captions", "answers", "caption_scores", "answer_scores")
        return {**{name: getattr(self, name).to_json() for name in parts}, "sheet": self.sheet, "cut": self.cut}

    def __str__(self) -> str:
        parts = [self.captions, self.caption_scores, self.answers, self.answer_scores]
        cut = [f"cut       {self.cut}"] if self.cut else []
        return "\n".join(map(str, [*parts, *cut, f"texts     see {self.sheet}"]))


def speak(
    workspace: Workspace, run: str, seed: int, on: ComputeOptions, watch: Watch, pace: Callable[[], Pace]
) -> Spoken:
    """Train the builtin language model's eyes from the run of stage 1 for captions, and from there for answers; score both.

    The trainings are sized so that all ends within DEMO_MINUTES, by the `pace` of stage 1; one that was begun keeps its epochs."""
    features, device = Features(workspace.features), resolve_device(on.device)
    images: dict[str, int] = features.manifest["splits"]
    seconds = (1 - SPARE) * 60 * DEMO_MINUTES / len(RUNS)
    trained, scores, cuts = {}, {}, []
    for task, name in RUNS.items():
        folder = workspace.run(name)
        if (folder / CONFIG).is_file():
            epochs = float(read_settings(folder)["train"]["epochs"])
        else:
            epochs = epochs_within(seconds, pace().full / min(TRAINING.batch_size, images["train"]), images, task)
        if epochs < TRAINING.epochs:
            cuts.append(f"{name} for {epochs:g} epochs instead of {TRAINING.epochs:g}")
        watch.say(f"training the builtin language model's eyes for {name}")
        init = str(workspace.run(run).resolve())
        run = name  # answers learn faster from the eyes that captions made
        config = replace(TRAINING, task=task, epochs=epochs, init=init, seed=seed, precision=on.precision)
        trained[task] = train(features, folder, config, device, report=watch.training)
        watch.say(f"evaluating {name}")
        scores[task] = evaluate_texts(workspace, EvalOptions(task=task, split="test"), name, on, watch.extracting)
    sheet = workspace.folder / "demo-texts.png"
    text_sheet(_told(workspace, features, on), sheet)
    cut = f"{' and '.join(cuts)}, to end within {DEMO_MINUTES} minutes more" if cuts else None
    return Spoken(trained["caption"], trained["vqa"], scores["caption"], scores["vqa"], str(sheet), cut)


def epochs_within(seconds: float, image: float, images: dict[str, int], task: str) -> float:
    """The epochs, in tenths, that leave time for the evaluation: LEAST_EPOCHS at least, those of TRAINING at most.

    `image` is the seconds of an image in a step of stage 1, `images` has the number of images of each split. A validation follows
    each epoch."""
    left = seconds - image * EVALUATED[task] * images["test"]
    epoch = image * (TRAINED[task] * images["train"] + VALIDATED * images["val"])
    return min(TRAINING.epochs, max(LEAST_EPOCHS, math.floor(10 * left / epoch) / 10))


def _told(workspace: Workspace, features: Features, on: ComputeOptions) -> list[Told]:
    """The first test pictures with their captions, and answers to some of their questions."""
    rows = features.rows("test")[:SHOWN]
    embeds = decode({name: column.to(resolve_device(on.device)) for name, column in features.read(rows).items()})
    captioner, _ = open_speaker(workspace, RUNS["caption"], 2, on)
    answerer, _ = open_speaker(workspace, RUNS["vqa"], 2, on)
    options = GenerateOptions()
    captions = captioner.texts(embeds, [""] * len(rows), decoding(options, CAPTION_LENGTH))
    asked = [
        (n, questions[(n + k) % len(questions)])  # other types for each picture
        for n, questions in enumerate(features.questions[row] for row in rows.tolist())
        for k in range(min(ASKED, len(questions)))
    ]
    questions_of = [question.question for _, question in asked]
    answers = answerer.texts(embeds[[n for n, _ in asked]], questions_of, answering(options))
    thumbnails = [row["thumbnail"] for row in open_index(workspace.index).rows_of(rows)]
    told = [Told(jpeg, caption, []) for jpeg, caption in zip(thumbnails, captions, strict=True)]
    for (n, question), answer in zip(asked, answers, strict=True):
        told[n].answers.append((question.question, answer, vqa_accuracy(answer, question.answers) > 0))
    return told
