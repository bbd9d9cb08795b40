"""Training of stage 2 on features of the pictures, with small random language models."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import COLOURS, SHAPES, run_extract
from language_models import OPT, T5, random_blip2_with, write_tokenizer
from qf.pipeline.errors import ArtifactError, TrainingError
from qf.pipeline.features.codecs import decode
from qf.trainer.config import Stage2Config
from qf.trainer.decoding import Decoding
from qf.trainer.metrics.captions import caption_scores
from qf.trainer.stage2.generate import open_generator
from qf.trainer.stage2.language_model import load_language_model
from qf.trainer.stage2.stage import KnownQueries, make_model, train

CPU = torch.device("cpu")


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", "the", "is", "What", "colour?", *COLOURS, *SHAPES]
WORDS += ["Question:", "Answer:", "Short", "answer:"]


def llm_folder(folder, settings, steps=0):
    """A small language model of these words. After some `steps` it says again what the four embeddings before the prompt say."""
    model = random_blip2_with(settings | {"vocab_size": len(WORDS)}).language_model
    model.save_pretrained(folder)
    write_tokenizer(folder, bool(model.config.is_encoder_decoder), WORDS)
    if steps:
        language_model = load_language_model(str(folder), "float32", CPU)
        learnt = language_model.model.requires_grad_(True)
        optimizer = torch.optim.Adam(learnt.parameters(), lr=5e-3)
        question = "Question: What colour? " + ("Short answer:" if language_model.encoder_decoder else "Answer:")
        captions = [text for c in COLOURS for s in SHAPES for text in (f"a {c} {s}", f"the {s} is {c}")]
        texts = [("a photo of", caption) for caption in captions] + [(question, c) for c in COLOURS] * 3
        ids = [language_model.example_ids(*text, 8) for text in texts]
        batch = language_model.batch(ids, 1)
        told = torch.tensor([(target[:-1] * 4)[:4] for _, target in ids])
        for _ in range(steps):
            language_model.losses(language_model.embeddings(told), batch).sum().div(len(ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
        learnt.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return llm_folder(tmp_path_factory.mktemp("opt"), OPT, steps=200)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return llm_folder(tmp_path_factory.mktemp("t5"), T5, steps=200)


@pytest.fixture(scope="module")
def asked(pictures, clip_folder, tmp_path_factory):
    """Features of the pictures with a question each, in place of their captions."""
    folder = tmp_path_factory.mktemp("asked")
    rows = ["image,question,answer,split"]
    for colour in COLOURS:
        for shape in SHAPES:
            rows += [
                f"{pictures.parent}/{colour}-{shape}-{n}.png,What colour?,{colour},{s}"
                for n, s in enumerate(("train", "val"))
            ]
    (folder / "questions.csv").write_text("\n".join(rows) + "\n")
    return run_extract(folder / "questions.csv", clip_folder, folder / "features")


def config(llm, trained, **fields) -> Stage2Config:
    return Stage2Config(
        llm=str(llm), llm_precision="float32", precision="float32", init=str(trained / "runs" / "stage1"), batch_size=6, lr=3e-3,
        **{"epochs": 30, "log_every": 10, "validate_every": 30, "checkpoint_every": 10, "warmup_steps": 3, "dropout": 0.0} | fields,
    )  # fmt: skip


def test_captions_are_learnt_by_looking_at_the_picture(features, trained, opt, tmp_path):
    lines = []
    result = train(
        features, tmp_path / "run", config(opt, trained, epochs=60), CPU, report=lambda line, total: lines.append(line)
    )
    checks = [line for line in lines if "split" in line]
    assert checks[-1]["loss_shuffled"] > checks[-1]["loss_val"] + 0.1
    assert result.best["CIDEr"] > 1
    assert str(result).endswith("s)")
    assert "CIDEr" in str(result)
    generator = open_generator(tmp_path / "run", CPU, torch.float32)
    rows = features.rows("val")
    texts = generator.texts(decode(features.read(rows)), [""] * len(rows), Decoding())
    scores = caption_scores(texts, [features.captions[row] for row in rows])
    assert scores["CIDEr"] == pytest.approx(result.best["CIDEr"], abs=1e-3)


def test_questions_are_learnt_by_an_encoder_decoder(asked, trained, t5, tmp_path):
    result = train(asked, tmp_path / "run", config(t5, trained, task="vqa", epochs=80), CPU)
    assert result.best["accuracy"] > 60


def test_the_q_former_reads_the_question_with_instruct(asked, trained, opt, tmp_path):
    train(asked, tmp_path / "run", config(opt, trained, task="vqa", instruct=True, epochs=2), CPU)
    generator = open_generator(tmp_path / "run", CPU, torch.float32)
    embeds = torch.randn(1, asked.encoder["tokens"], asked.encoder["width"])
    one, other = (generator.soft_prompts(embeds, [question]) for question in ("a red", "the square"))
    assert not torch.equal(one, other)


def test_prefix_language_modelling_runs_with_an_encoder_decoder(features, trained, t5, tmp_path):
    assert train(features, tmp_path / "run", config(t5, trained, prefix_lm=True, epochs=2), CPU).steps == 4


def test_the_projection_alone_is_trained_on_queries_that_are_computed_once(features, trained, opt, tmp_path):
    settings = config(opt, trained, parts="projection", epochs=4)
    torch.manual_seed(0)
    before, _ = make_model(features, settings, 16, 1.0)
    train(features, tmp_path / "run", settings, CPU)
    after = open_generator(tmp_path / "run", CPU, torch.float32).model
    assert all(torch.equal(v, after.qformer.state_dict()[k]) for k, v in before.qformer.state_dict().items())
    assert not torch.equal(before.language_projection.weight, after.language_projection.weight)
    rows = features.rows("train")
    known = KnownQueries(before, features, rows, CPU)
    with torch.no_grad():
        torch.testing.assert_close(known.output, before.eval().queries(decode(features.read(rows))))


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(features, trained, opt, tmp_path):
    settings = config(opt, trained, epochs=40, token_dropout=0.2)
    code = (
        "import sys, torch; from pathlib import Path; from qf.pipeline.features.reader import Features\n"
        "from qf.trainer.config import Stage2Config; from qf.trainer.stage2.stage import train\n"
        f"torch.set_num_threads(1); train(Features(Path(sys.argv[1])), Path(sys.argv[2]), {settings!r}, torch.device('cpu'))"
    )
    command = [sys.executable, "-c", code, str(features.folder)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("step-*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists()
    subprocess.run([*command, str(killed)], check=True, capture_output=True)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_another_language_model_in_its_place_is_refused(features, trained, tmp_path):
    folder = llm_folder(tmp_path / "llm", OPT)
    train(features, tmp_path / "run", config(folder, trained, epochs=1), CPU)
    llm_folder(folder, OPT | {"num_hidden_layers": 1})
    with pytest.raises(ArtifactError, match="was trained with the language model"):
        open_generator(tmp_path / "run", CPU, torch.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llm": "no/such"}, "no such language model"),
        ({"task": "vqa"}, "no training images with questions"),
        ({"prefix_lm": True}, "encoder-decoder models"),
        ({"prompt": "a " * 90}, "too long"),
        ({"instruct": True}, "captions have none"),
        ({"llm_precision": "int8"}, "bitsandbytes"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_cannot_be_trained_is_one_line(features, trained, opt, tmp_path, fields, message):
    with pytest.raises(TrainingError, match=message) as error:
        train(features, tmp_path / "run", replace(config(opt, trained), **fields), CPU)
    assert "\n" not in str(error.value)
