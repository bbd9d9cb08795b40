"""What a step trains is a function of its number."""

from dataclasses import replace

import pytest
from qf.pipeline.errors import TrainingError
from qf.trainer.config import Stage1Config
from qf.trainer.stage1.plan import StepPlan, chosen_losses, hardness, lessons, losses_at, plan, teaching


def test_negatives_become_harder_with_the_step():
    config = Stage1Config(easy_negatives=0.5, contrast_first=0)
    assert [hardness(step, 100, config) for step in (0, 25, 50, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert hardness(0, 100, Stage1Config(easy_negatives=0, contrast_first=0)) == 1.0
    late = Stage1Config(easy_negatives=0.5, contrast_first=0.6)
    assert [hardness(step, 100, late) for step in (0, 60, 70, 80, 99)] == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_itc_can_train_alone_at_first():
    config = Stage1Config(contrast_first=0.6)
    assert losses_at(59, 100, config) == ["loss_itc"]
    assert losses_at(60, 100, config) == ["loss_itc", "loss_itm", "loss_itg"]
    assert losses_at(0, 100, replace(config, losses="itm,itg")) == ["loss_itm", "loss_itg"]


def test_accumulated_batches_share_the_plan_of_their_step():
    config = Stage1Config(contrast_first=0.5, easy_negatives=1.0, accumulate=3, teach="none")
    first, last = plan(6, 4, config), plan(8, 4, config)  # both of step 2, with which the other losses join
    assert (first.losses, first.hardness) == (last.losses, last.hardness)
    assert first == StepPlan(6, ["loss_itc", "loss_itm", "loss_itg"], 0.0)
    assert plan(5, 4, config).losses == ["loss_itc"]


def test_an_unknown_loss_is_refused():
    assert chosen_losses(Stage1Config(losses="itg, itc")) == ["loss_itc", "loss_itg"]
    with pytest.raises(TrainingError, match="--losses itc,foo: use some of itc,itm,itg"):
        chosen_losses(Stage1Config(losses="itc,foo"))


def test_the_teacher_is_let_go_step_by_step():
    config = Stage1Config(teach_until=0.5, teach_weight=4.0, soft_targets=0.5)
    assert [teaching(step, 100, lessons(config)) for step in (0, 25, 50, 99)] == [1.0, 0.5, 0.0, 0.0]
    assert (plan(25, 100, config).teach, plan(25, 100, config).soft_targets) == (2.0, 0.25)


def test_the_encoder_teaches_to_the_end_and_a_sentence_encoder_by_soft_targets_alone():
    encoder, sentences = Stage1Config(teach="encoder"), Stage1Config(teach="some/model")
    assert [(plan(n, 100, encoder).teach, plan(n, 100, encoder).soft_targets) for n in (0, 99)] == [(10.0, 0.5)] * 2
    assert [(plan(n, 100, sentences).teach, plan(n, 100, sentences).soft_targets) for n in (0, 50)] == [
        (0.0, 0.5),
        (0.0, 0.25),
    ]
    assert (plan(0, 100, Stage1Config(teach="none")).teach, plan(0, 100, Stage1Config(teach="none")).soft_targets) == (
        0.0,
        0.0,
    )
