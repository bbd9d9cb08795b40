"""The training panel on a terminal, and the figures of a log line as text."""

from qf.trainer.runs.panel import Pace, TrainingPanel, clock, losses_of, recalls_of
from rich.console import Console

STEP = {
    "step": 50, "epoch": 1.5, "loss": 3.5, "loss_itc": 1.25, "loss_itm": None, "lr": 5e-4, "grad_norm": 1.5,
    "pairs_per_second": 1200.0, "seconds": 65.0,
}  # fmt: skip
VALIDATION = {"step": 50, "split": "val", "text_to_image_R@1": 12.5, "image_to_text_R@1": 4.0}


def drawn(panel):
    console = Console(width=90)
    with console.capture() as captured:
        console.print(panel)
    return captured.get()


def test_the_panel_shows_progress_and_the_last_and_the_best_validation():
    panel = TrainingPanel(200)
    panel.add(STEP)
    panel.add(VALIDATION | {"best": True})
    panel.add(VALIDATION | {"step": 60, "text_to_image_R@1": 11.0, "best": False})
    text = drawn(panel)
    for part in (
        "50 of 200, epoch 1.50",
        "1:05 so far, about 3:1",
        "1,200 pairs/s",
        "3.500    itc 1.250",
        "gradient norm 1.5",
    ):
        assert part in text
    last, best = (line for line in text.splitlines() if line.startswith(("│ last", "│ best")))
    assert ("60" in last, "11.0" in last) == (True, True)
    assert ("50" in best, "12.5" in best) == (True, True)


def test_a_finished_panel_shows_no_time_left():
    panel = TrainingPanel(200)
    panel.add(STEP)
    panel.over = True
    assert "left" not in drawn(panel)


def test_losses_and_recalls_are_named_in_short():
    assert losses_of(STEP) == "itc 1.250"
    assert recalls_of(VALIDATION) == "12.5 text to image, 4.0 image to text"


def test_a_pace_needs_two_different_reports():
    pace = Pace()
    pace.reports.append((10.0, 5))
    assert pace.left(20) is None
    pace.reports.append((12.0, 10))
    assert pace.left(20) == 4.0


def test_a_clock_shows_hours_only_where_there_are_some():
    assert [clock(seconds) for seconds in (5.9, 65, 3723)] == ["0:05", "1:05", "1:02:03"]
