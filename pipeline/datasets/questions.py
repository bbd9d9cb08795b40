"""Questions with their answers, and conversations, in the values of a dataset: cells of a table, objects of a JSON."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..formatting import encodable
from ..schema import Conversation, Question
from .captions import MAX_CAPTION, spelled

QUESTION_NAMES = ("question", "questions", "qas")  # the latter hold objects with a question and its answers
ANSWER_NAMES = ("answers", "answer", "direct_answers", "multiple_choice_answer")
TYPE_NAMES = ("type", "answer_type", "question_type")
CONVERSATION_NAMES = ("conversations", "conversation", "messages")
ANSWER_FIELDS = ("answer", "text", "raw_answer")  # of an object that is one person's answer
PERSON, ASSISTANT = ("human", "user", "person"), ("gpt", "assistant", "model", "chatgpt", "bot")
PLACEHOLDER = "<image>"  # stands for the picture in a turn

MAX_QUESTIONS = 1000  # and conversations of one image, and answers or turns of one of them
UNANSWERED = "questions without an answer"
BROKEN = "conversations whose turns do not alternate"
TOO_LONG = "questions, answers or conversations that are too long"
TOO_MANY = f"questions or conversations beyond the first {MAX_QUESTIONS:,} of an image"


def questions_in(value: Any, answers: Any = None, type: Any = None, lists: bool = False) -> list[Question]:
    """The questions in a value: a text whose answers are beside it, several texts with as many answers, or objects that hold
    both. A question without an answer is among them. `lists`: whether texts of answers spell lists."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        found = spelled(value)
        value = value if found is None else found
    if isinstance(value, dict):
        return _in_object(value, lists)
    if isinstance(value, list | tuple) and any(isinstance(part, dict) for part in value):
        return [one for part in value if isinstance(part, dict) for one in _in_object(part, lists)]
    if isinstance(value, list | tuple):
        each = answers if isinstance(answers, list | tuple) and len(answers) == len(value) else [None] * len(value)
        each = [answers] if len(value) == 1 else each
        return [one for part, own in zip(value, each, strict=True) for one in questions_in(part, own, type, lists)]
    text = _text(value)
    return [Question(text, tuple(answers_in(answers, lists)), _text(type) or None)] if text else []


def _in_object(value: dict[Any, Any], lists: bool) -> list[Question]:
    fields = {name.lower(): found for name, found in value.items() if isinstance(name, str) and found is not None}
    question, answers, type = (
        next((fields[name] for name in names if name in fields), None)
        for names in (QUESTION_NAMES, ANSWER_NAMES, TYPE_NAMES)
    )
    return [] if isinstance(question, dict) else questions_in(question, answers, type, lists)


def answers_in(value: Any, lists: bool = False) -> list[str]:
    """The answers in a value: a text or number, a list of these, or of objects that hold one. `lists`: whether texts spell
    lists."""
    if lists and isinstance(value, str):
        found = spelled(value)
        value = value if found is None else found
    if isinstance(value, list | tuple):
        return [answer for part in value if not isinstance(part, list | tuple) for answer in answers_in(part)]
    if isinstance(value, dict):
        value = next((value[name] for name in ANSWER_FIELDS if isinstance(value.get(name), str | int | float)), None)
    return [text] if (text := _text(value)) else []


def conversations_in(value: Any) -> list[Conversation]:
    """The conversations in a value: a list of turns, or several. Turns are texts, or objects as LLaVA's JSON and chat
    templates write them. One whose turns do not alternate, beginning with the person and ending with the assistant, is empty."""
    if isinstance(value, str) and value.strip():
        value = spelled(value) or [None]
    if not isinstance(value, list | tuple) or not value:
        return []
    if all(isinstance(part, list | tuple) for part in value):
        return [_conversation(part) for part in value if part]
    return [_conversation(value)]


def _conversation(turns: Sequence[Any]) -> Conversation:
    speakers = [turn.get("from", turn.get("role")) if isinstance(turn, dict) else None for turn in turns]
    begin = 1 if str(speakers[0]).lower() == "system" else 0
    said: list[str] = []
    for turn, speaker in zip(turns[begin:], speakers[begin:], strict=True):
        text = _turn(turn)
        if not text or (
            isinstance(turn, dict) and str(speaker).lower() not in (ASSISTANT if len(said) % 2 else PERSON)
        ):
            return ()
        said.append(text)
    return () if len(said) % 2 else tuple(said)


def _turn(turn: Any) -> str:
    """The text of a turn, without the placeholder for the picture."""
    if isinstance(turn, dict):
        turn = next((turn[name] for name in ("value", "content", "text") if turn.get(name) is not None), None)
    if isinstance(turn, list | tuple):  # of parts: texts, and the picture
        turn = "\n".join(text for part in turn if isinstance(part, dict) and (text := _text(part.get("text"))))
    if not isinstance(turn, str):
        return ""
    for written in (f"{PLACEHOLDER}\n", f"\n{PLACEHOLDER}", PLACEHOLDER):
        turn = turn.replace(written, "")
    return _text(turn)


def _text(value: Any) -> str:
    """A text or a number as text, or nothing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        value = (
            int(value) if value.is_integer() else None if value != value else value
        )  # NaN is what pandas writes for none
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return encodable(str(value).strip()) if isinstance(value, str | int | float) else ""


def joined(questions: Iterable[Question]) -> list[Question]:
    """Questions of one image, in order. Equal ones that stand alone with one answer each, a row of a table a person, are one
    question with all these answers."""
    every: list[Question] = []
    single: dict[str, int] = {}  # where they are in the list
    for one in questions:
        at = single.setdefault(one.question, len(every)) if len(one.answers) == 1 else len(every)
        if at < len(every):
            every[at] = Question(one.question, every[at].answers + one.answers, every[at].type or one.type)
        else:
            every.append(one)
    return every


def usable(
    questions: Iterable[Question], conversations: Iterable[Conversation]
) -> tuple[tuple[Question, ...], tuple[Conversation, ...], tuple[str, ...]]:
    """The questions and the conversations of one image that can be used, and what is left out: a noun for each."""
    left_out: list[str] = []
    asked: list[Question] = []
    for one in questions:
        answers = tuple(answer for answer in one.answers if len(answer) <= MAX_CAPTION)[:MAX_QUESTIONS]
        if len(one.question) > MAX_CAPTION or (one.answers and not answers):
            left_out.append(TOO_LONG)
        elif not answers:
            left_out.append(UNANSWERED)
        else:
            asked.append(one if answers == one.answers else Question(one.question, answers, one.type))
    talks: list[Conversation] = []
    for turns in conversations:
        if not turns:
            left_out.append(BROKEN)
        elif len(turns) > MAX_QUESTIONS or any(len(turn) > MAX_CAPTION for turn in turns):
            left_out.append(TOO_LONG)
        else:
            talks.append(turns)
    left_out += [TOO_MANY] * (max(0, len(asked) - MAX_QUESTIONS) + max(0, len(talks) - MAX_QUESTIONS))
    return tuple(asked[:MAX_QUESTIONS]), tuple(talks[:MAX_QUESTIONS]), tuple(left_out)
