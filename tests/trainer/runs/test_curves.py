from PIL import Image
from qf.trainer.runs.curves import draw_curves


def test_curves_are_drawn_from_any_lines(tmp_path):
    """From lines without a loss, without a validation, and with unknown fields."""
    step = {"step": 1, "loss": 2.0, "loss_itc": 2.0, "wait_share": 0.1, "new": "field"}
    check = {"step": 1, "split": "val", "text_to_image_R@1": 3.0, "image_to_text_R@1": 4.0}
    for lines in ([], [step], [check], [step, check | {"best": True}, check | {"best": False}]):
        with open(tmp_path / "loss.png", "wb") as file:
            draw_curves(lines, file)
        with Image.open(tmp_path / "loss.png") as curves:
            assert curves.size[0] > 500
