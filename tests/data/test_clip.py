"""The CLIP in data/clip, through transformers' own loading code, on freshly rendered scenes."""

import json
from pathlib import Path

import pytest
import qf.data
import torch
from qf.data.scene_model import COLOURS, RADII, SHAPES
from qf.data.scenes import captions, make_scene, render
from qf.data.train_clip import evaluate, patch_facts, recalls, train_tokenizer
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

FOLDER = Path(qf.data.__file__).parent / "clip"


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    return CLIPModel.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_the_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "results.json"} <= set(
        sizes
    )
    assert sum(sizes.values()) <= 12e6
    assert not [name for name in sizes if name.endswith((".bin", ".pt", ".pkl"))]


def test_zero_shot_retrieval_is_far_above_chance(model: CLIPModel) -> None:
    """On 100 test scenes that are not the sample's, chance is 1 %."""
    scenes = [make_scene(77, "test", index) for index in range(100)]
    tokenizer, processor = AutoTokenizer.from_pretrained(FOLDER), AutoImageProcessor.from_pretrained(FOLDER)
    measured = evaluate(model, tokenizer, processor, scenes)
    assert measured["text_to_image_R@1"] > 50
    assert measured["image_to_text_R@10"] > 90


def test_a_picture_prefers_its_own_captions(model: CLIPModel) -> None:
    """CLIPModel.forward, without any code of ours."""
    tokenizer, processor = AutoTokenizer.from_pretrained(FOLDER), AutoImageProcessor.from_pretrained(FOLDER)
    scene, other = make_scene(0, "test", 0), make_scene(0, "test", 1)
    inputs = {
        **processor([render(scene), render(other)], return_tensors="pt"),
        **tokenizer([captions(scene)[0], captions(other)[0]], padding=True, return_tensors="pt"),
    }
    with torch.inference_mode():
        logits = model(**inputs).logits_per_image
    assert logits.argmax(1).tolist() == [0, 1]


def test_padding_does_not_change_the_features_of_a_text(model: CLIPModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "A small red star on the beach."
    alone = tokenizer(text, return_tensors="pt")
    padded = tokenizer(
        [text, "three large blue fish, a white ring and a tiny green heart at night"], padding=True, return_tensors="pt"
    )
    assert alone["input_ids"][0, -1] == model.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert alone["input_ids"][0, 0] == model.config.text_config.bos_token_id
    with torch.inference_mode():
        first, second = (model.get_text_features(**batch).pooler_output[0] for batch in (alone, padded))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_the_tokenizer_knows_every_byte_and_its_limit(model: CLIPModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer("Ünïcode, emoji 🦊 & numbers 1234?!")["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1  # no unknown token, which would read as an end
    assert tokenizer.model_max_length == model.config.text_config.max_position_embeddings
    assert len(tokenizer("red star " * 100, truncation=True)["input_ids"]) == tokenizer.model_max_length
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("ünïcode")


def test_the_results_were_measured_on_the_sample() -> None:
    results = json.loads((FOLDER / "results.json").read_text())
    assert (results["images"], results["split"]) == (500, "test")
    assert results["text_to_image_R@1"] > 50 * results["chance_text_to_image_R@1"]
    steps = [json.loads(line) for line in (FOLDER / "train_log.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert losses[-1] < losses[0]


def test_recalls_equal_a_naive_count() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(12, 4), torch.randn(36, 4)
    owner = torch.arange(12).repeat_interleave(3)
    measured = recalls(images, texts, owner)
    for k in (1, 5, 10):
        found = sum(owner[m].item() in (images @ texts[m]).argsort(descending=True)[:k].tolist() for m in range(36))
        assert measured[f"text_to_image_R@{k}"] == pytest.approx(100 * found / 36)
        found = sum(n in owner[(texts @ images[n]).argsort(descending=True)[:k]].tolist() for n in range(12))
        assert measured[f"image_to_text_R@{k}"] == pytest.approx(100 * found / 12)


def test_patch_facts_name_what_is_there() -> None:
    """A patch that two things share goes to the later one; a thing that stands alone is always named."""
    for index in range(50):
        scene = make_scene(0, "train", index)
        facts = {tuple(fact) for fact in patch_facts(scene).tolist()} - {(0, 0, 0)}
        present = {
            (SHAPES.index(thing.shape) + 1, COLOURS.index(thing.colour) + 1, list(RADII).index(thing.size) + 1)
            for thing in scene.things
        }
        assert facts <= present
        assert facts == present or len(present) > 1


def test_a_trained_tokenizer_gives_each_word_one_token() -> None:
    texts = [text for index in range(200) for text in captions(make_scene(0, "train", index))]
    tokenizer = train_tokenizer(texts)
    assert len(tokenizer("a small red star on the beach")["input_ids"]) == 7 + 2
