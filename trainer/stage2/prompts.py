"""What the language model reads around a picture: prompts of each task, dialogs, and texts to learn. Pure functions of text."""

from collections.abc import Sequence
from dataclasses import dataclass

CAPTION = "a photo of"
# of decoder-only and of encoder-decoder models (Li et al. 2023, section 4.2)
QUESTION = {False: "Question: {} Answer:", True: "Question: {} Short answer:"}
TURNS = "{} {} "  # an earlier question, in its prompt, with its answer


@dataclass(frozen=True)
class Example:
    """A text to learn: the language model reads the picture and `prompt`, and generates `target`."""

    prompt: str
    target: str
    question: str = ""  # which the Q-Former reads as well, with --instruct


def default_prompt(task: str, encoder_decoder: bool) -> str:
    """The prompt of a task. {} stands for the question; a chat asks its questions in the same way."""
    return CAPTION if task == "caption" else QUESTION[encoder_decoder]


def asked(prompt: str, question: str) -> str:
    """The prompt for a question."""
    return prompt.replace("{}", question) if "{}" in prompt else prompt


def dialog(prompt: str, turns: Sequence[str]) -> str:
    """The prompt after `turns`, which are questions and answers in turn and end with a question. ValueError if they do not."""
    if len(turns) % 2 == 0:
        raise ValueError("a dialog to go on with ends with a question")
    before = (
        TURNS.format(asked(prompt, question), answer)
        for question, answer in zip(turns[:-1:2], turns[1::2], strict=True)
    )
    return "".join(before) + asked(prompt, turns[-1])


def split_caption(prompt: str, caption: str, draw: float) -> Example:
    """A caption split before a random word, for prefix language modelling; `draw` is from 0 to 1, 1 excluded.

    The first part follows the prompt; it may be empty, so that the prompt alone is learnt as well."""
    words = caption.split()
    first = int(draw * max(1, len(words)))
    return Example(" ".join([prompt, *words[:first]]).strip(), " ".join(words[first:]))
