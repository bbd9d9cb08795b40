"""Answers to questions about images: the accuracy of VQAv2 (Goyal et al. 2017), with its normalisation.

The rules are those of the official evaluation, its oddities included."""

import re
from collections.abc import Sequence

ANNOTATORS = 10  # answers to each question of VQAv2
ENOUGH = 3  # matching answers that make an answer right

ARTICLES = {"a", "an", "the"}
DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(DIGITS.split())}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WITH_COMMA = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOPS = 32  # at most so many are removed: the official code gives a flag where it means a limit

CONTRACTIONS = """ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've shouldn't shouldn't've should've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've 'twas wasn't we'd've weren't we've what'll what're what's what've when's where'd where's
    where've who'd who'd've who'll who's who've why'll why're why's won't wouldn't wouldn't've would've y'all y'all'd've y'all'll you'd
    you'd've you'll you're you've"""


def misspelt() -> dict[str, str]:
    """Contractions that lack one of their apostrophes -> as they are written."""
    found = {"somebody'd": "somebodyd"}  # an oddity of the official table
    for word in CONTRACTIONS.split():
        for match in re.finditer("'", word):
            found[word[: match.start()] + word[match.end() :]] = word
    return found


MISSPELT = misspelt()


def stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_answer(text: str) -> str:
    """The answer in lower case, without punctuation and articles, with digits for numbers up to ten and with apostrophes.

    A mark next to a space is removed, another becomes a space ("black/white"). All are removed from a text with a number such as
    "1,000". A full stop stays before a digit."""
    text = stripped(text)
    numeric = NUMBER_WITH_COMMA.search(text) is not None
    plain = text
    for mark in MARKS:
        removed = numeric or mark + " " in text or " " + mark in text
        plain = plain.replace(mark, "" if removed else " ")
    words = [NUMBERS.get(word, word) for word in FULL_STOP.sub("", plain, count=FULL_STOPS).lower().split()]
    return " ".join(MISSPELT.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """How many people gave the answer, 0..1: min(1, matches / 3), averaged over all ways to leave one of ten people out.

    As in the official evaluation, ten equal answers are compared as they are, case included; otherwise all are normalised.
    Fewer than ten are always normalised, and a third of the people who remain must match, at least one: an answer alone gives 1 or 0,
    one of two gives 0.5, one of three 2/3. Raises ValueError if there are no truths."""
    if not truths:
        raise ValueError("a question has no answer to compare with")
    answer, truths = stripped(answer), [stripped(truth) for truth in truths]
    if len(truths) < ANNOTATORS or len(set(truths)) > 1:
        answer, truths = normalise_answer(answer), [normalise_answer(truth) for truth in truths]
    people, matches = len(truths), truths.count(answer)
    if people == 1:
        return float(matches)
    enough = min(ENOUGH, max(1.0, ENOUGH * (people - 1) / (ANNOTATORS - 1)))
    without_one = matches * min(
        1.0, (matches - 1) / enough
    )  # summed over those who gave the answer, each left out once
    without_other = (people - matches) * min(1.0, matches / enough)
    return (without_one + without_other) / people


def accuracies(answers: Sequence[str], truths: Sequence[Sequence[str]], types: Sequence[str] = ()) -> dict[str, float]:
    """The mean accuracy in percent: `accuracy` over all questions and `accuracy_TYPE` over those of each type, if types are given.

    Raises ValueError if there are no answers, the lengths differ or a question has no truths."""
    if not answers:
        raise ValueError("no answers to score")
    if len(answers) != len(truths) or len(types) not in (0, len(answers)):
        raise ValueError(f"{len(answers)} answers, but truths of {len(truths)} questions and types of {len(types)}")
    scores = [vqa_accuracy(answer, right) for answer, right in zip(answers, truths, strict=True)]
    groups = {"accuracy": scores}
    for score, kind in zip(scores, types, strict=False):
        groups.setdefault(f"accuracy_{kind}", []).append(score)
    return {name: round(100 * sum(group) / len(group), 2) for name, group in groups.items()}
