"""The language model in data/lm, through transformers' own loading code, on texts of scenes that it has never read."""

import json
import random
from pathlib import Path

import pytest
import qf.data
import torch
from qf.data.scenes import captions, make_scene, questions
from qf.data.train_lm import document, evaluate, parse, picture_line, train_tokenizer, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

FOLDER = Path(qf.data.__file__).parent / "lm"
ANSWER_WORDS = {"0", "1", "2", "3", "4", "5"}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def say(model, tokenizer, prompt: str) -> str:
    """The likeliest continuation, up to the end token, which must come."""
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
    assert out[-1] == tokenizer.eos_token_id
    return tokenizer.decode(out, skip_special_tokens=True)


def test_the_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) == {
        "config.json", "generation_config.json", "model.safetensors", "results.json", "tokenizer.json",
        "tokenizer_config.json", "train_log.jsonl",
    }  # fmt: skip
    assert sum(sizes.values()) <= 6e6
    assert {weights.dtype for weights in load_file(FOLDER / "model.safetensors").values()} == {torch.bfloat16}


def test_texts_survive_the_tokenizer(tokenizer) -> None:
    texts = [text for index in range(100) for text in captions(make_scene(78, "test", index))]
    texts += ["Question: How many stars are there? Answer: 3", " two  spaces\n\tÜnïcode 🦊 & 1234?!", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_tokenizer_adds_a_start_token_and_no_end_token(model, tokenizer) -> None:
    ids = tokenizer("a red star")["input_ids"]
    config = model.config
    assert ids[0] == tokenizer.bos_token_id == config.bos_token_id
    assert len(ids) == 1 + 3  # each word of the captions is one token
    assert tokenizer.eos_token_id == config.eos_token_id == model.generation_config.eos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert (len(tokenizer), tokenizer.model_max_length) == (config.vocab_size, config.max_position_embeddings)


def test_a_prompt_and_its_answer_are_tokenised_apart_as_together(tokenizer) -> None:
    scene = make_scene(78, "test", 0)
    for question, answer, *_ in questions(scene):
        prompt = f"Question: {question} Answer:"
        apart = tokenizer(prompt)["input_ids"] + tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        assert apart == tokenizer(f"{prompt} {answer}")["input_ids"]


def test_fresh_captions_and_answers_are_likely(model, tokenizer) -> None:
    """On 40 test scenes that are not the sample's; a model that guesses tokens evenly has a perplexity of 700."""
    measured = evaluate(model, tokenizer, [make_scene(78, "test", index) for index in range(40)])
    assert measured["caption_perplexity"] < 6
    assert measured["photo_perplexity"] < 5.5
    assert measured["answer_blind_perplexity"] < 6
    assert measured["answer_read_right"] > measured["answer_blind_right"] + 10


def test_the_results_agree_with_a_fresh_measurement(model, tokenizer) -> None:
    results = json.loads((FOLDER / "results.json").read_text())
    measured = evaluate(model, tokenizer, [make_scene(0, "test", index) for index in range(60)])
    for name, value in measured.items():
        assert value == pytest.approx(results[name], rel=0.1), name
    steps = [json.loads(line) for line in (FOLDER / "train_log.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert losses[-1] < losses[0] / 2


def test_a_question_is_answered_with_a_word_of_its_kind(model, tokenizer) -> None:
    assert say(model, tokenizer, "Question: How many stars are there? Answer:").strip() in ANSWER_WORDS
    assert say(model, tokenizer, "Question: Is there a red boat? Answer:").strip() in {"yes", "no"}


def test_an_answer_follows_the_captions_before_it(model, tokenizer) -> None:
    """What a visual prefix will have to say: the model uses what stands before a question."""
    for background, caption in (("night", "Two red stars at night."), ("beach", "Two red stars on the beach.")):
        said = say(model, tokenizer, f"{picture_line([caption])}Question: What is the background? Answer:")
        assert said == f" {background}"


def test_a_photo_is_described_in_one_sentence(model, tokenizer) -> None:
    said = say(model, tokenizer, "a photo of")
    assert 3 <= len(said.split()) <= 30
    assert "Question:" not in said


def test_documents_have_the_formats_of_stage_2() -> None:
    scene, rng = make_scene(0, "train", 3), random.Random(0)
    pairs = {f"Question: {question} Answer: {answer}" for question, answer, *_ in questions(scene)}
    texts = {*captions(scene), *(f"a photo of {caption}" for caption in captions(scene))}
    drawn = [document(scene, rng) for _ in range(400)]
    assert texts <= set(drawn)
    assert pairs <= set(drawn)
    for text in drawn:
        line, _, last = text.rpartition("\n")
        assert not line or line.startswith("Picture: ")
        asked = [f"Question: {pair}" for pair in last.split(" Question: ")]
        asked[0] = asked[0].removeprefix("Question: ")
        assert last in texts or (set(asked) <= pairs and len(set(asked)) == len(asked))


def test_the_same_steps_give_the_same_model(tmp_path) -> None:
    """A training of seconds, twice; it learns something."""
    for name in ("first", "second"):
        options = ["--out", str(tmp_path / name), "--steps", "30", "--scenes", "60", "--batch", "8", "--threads", "1"]
        results = write_model(parse([*options, "--test-scenes", "5"]))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert results["caption_perplexity"] < 200
    assert "--steps 30" in results["command"]
    assert json.loads((tmp_path / "first" / "results.json").read_text())["sentences"] == results["sentences"]


def test_a_trained_tokenizer_gives_each_word_one_token() -> None:
    rng = random.Random(0)
    tokenizer = train_tokenizer([document(make_scene(0, "train", index), rng) for index in range(1000)])
    assert len(tokenizer("a photo of a small red star on the beach")["input_ids"]) == 1 + 10
    assert len(tokenizer("Question: How many stars are there? Answer: 3")["input_ids"]) == 1 + 11
