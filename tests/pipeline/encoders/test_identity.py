import pytest
from qf.pipeline.encoders.identity import SAME_FEATURES, SAME_INPUT, check_unchanged, check_weights, first_difference
from qf.pipeline.errors import EncoderError

IDENTITY = {
    "id": "me", "sha256": "a" * 64, "layer": -2, "precision": "float32", "tokens": 50, "width": 768, "joint": 512,
    "preprocessing": {"height": 224},
}  # fmt: skip


def test_precision_and_place_do_not_make_another_encoder():
    moved = IDENTITY | {"id": "elsewhere", "precision": "bfloat16", "joint": None}
    assert first_difference(IDENTITY, moved, SAME_FEATURES) is None
    check_unchanged(IDENTITY, moved, SAME_FEATURES)


@pytest.mark.parametrize("name", SAME_FEATURES)
def test_any_other_field_is_a_difference(name):
    assert first_difference(IDENTITY, IDENTITY | {name: "other"}, SAME_FEATURES) == name


@pytest.mark.parametrize(("name", "words"), [("sha256", "weights have"), ("preprocessing", "preprocessing has")])
def test_a_changed_encoder_is_refused_with_the_cure(name, words):
    with pytest.raises(
        EncoderError, match=f"encoder me is no longer .*: its {words} changed; restore it, or extract again"
    ):
        check_unchanged(IDENTITY, IDENTITY | {name: "other"}, SAME_INPUT)


def test_changed_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(EncoderError, match="its weights have changed"):
        check_weights(IDENTITY, tmp_path)
