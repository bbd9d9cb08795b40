"""The plan of a step of stage 1: which losses, and how hard its negatives are. Pure functions of the number of the step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...pipeline.errors import TrainingError
from ..config import Stage1Config
from ..objectives import LOSSES


@dataclass(frozen=True)
class StepPlan:
    """The losses and the negatives that one batch is trained with. All its random numbers are a function of `number` and the run's seed."""

    number: int  # of the batch, from 0 over all epochs
    losses: Sequence[str] = LOSSES
    hardness: float = 1.0  # see `hardness`
    teach: float = 0.0  # weight of loss_teach
    soft_targets: float = 0.0  # share of the contrastive targets that the teacher gives


def chosen_losses(config: Stage1Config) -> list[str]:
    """The losses that --losses chooses, in the order of LOSSES. TrainingError if one is unknown."""
    chosen = [f"loss_{name.strip()}" for name in config.losses.split(",")]
    if not set(chosen) <= set(LOSSES):
        raise TrainingError(f"--losses {config.losses}: use some of itc,itm,itg")
    return [name for name in LOSSES if name in chosen]


def itc_only_steps(total: int, config: Stage1Config) -> int:
    """The number of first steps that train ITC alone, of `total` steps."""
    return int(config.contrast_first * total)


def losses_at(step: int, total: int, config: Stage1Config) -> list[str]:
    """The losses of a step. ITC trains alone at first, if it is chosen and `contrast_first` is above 0."""
    names = chosen_losses(config)
    return names[:1] if names[0] == "loss_itc" and step < itc_only_steps(total, config) else names


def hardness(step: int, total: int, config: Stage1Config) -> float:
    """The share of hard negatives for matching, from 0 (drawn evenly) to 1 (drawn as in BLIP-2).

    With hard negatives alone, matching on small data never learns more than the share of positives; see
    benchmarks/results.md."""
    begin = itc_only_steps(total, config)
    ramp = config.easy_negatives * (total - begin)
    return min(1.0, max(0, step - begin) / ramp) if ramp else 1.0


@dataclass(frozen=True)
class Lessons:
    """How a teacher teaches: the weight of loss_teach, the share of soft targets, and until which share of the steps."""

    weight: float
    soft_targets: float
    until: float  # it counts less and less up to there; 0: it counts alike to the end


# The encoder has seen far more pictures than a training on it will: it is never let go. A sentence encoder's map to pictures was
# fitted on the training images themselves: drawing features to it costs, its soft targets do not (benchmarks/results.md).
BY_ENCODER, BY_SENTENCES, BY_NOBODY = Lessons(10.0, 0.5, 0.0), Lessons(0.0, 0.5, 1.0), Lessons(0.0, 0.0, 0.0)


def lessons(config: Stage1Config) -> Lessons:
    """How the teacher of a run teaches. Fields of the options that are not None win."""
    if config.teach == "none":
        return BY_NOBODY
    own = BY_ENCODER if config.teach in ("auto", "encoder") else BY_SENTENCES
    given = {"weight": config.teach_weight, "soft_targets": config.soft_targets, "until": config.teach_until}
    return replace(own, **{name: value for name, value in given.items() if value is not None})


def teaching(step: int, total: int, taught: Lessons) -> float:
    """How much the teacher counts at a step, from 1 down to 0."""
    return max(0.0, 1 - step / (taught.until * total)) if taught.until else 1.0


def plan(number: int, total: int, config: Stage1Config) -> StepPlan:
    """The plan of batch `number` in a run of `total` steps."""
    step, taught = number // config.accumulate, lessons(config)
    counts = teaching(step, total, taught)
    return StepPlan(
        number,
        losses_at(step, total, config),
        hardness(step, total, config),
        taught.weight * counts,
        taught.soft_targets * counts,
    )
