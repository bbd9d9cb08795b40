"""Weights of stage 2 in and out: transformers' BLIP-2 to qf and back, the same texts on both sides."""

import json
import shutil

import pytest
import torch
from language_models import OPT, T5, random_blip2_with, save_language_model
from qf.pipeline.errors import ArtifactError
from qf.pipeline.features.codecs import decode
from qf.trainer.config import ExportOptions, Stage2Config
from qf.trainer.decoding import Decoding
from qf.trainer.stage2.export import export
from qf.trainer.stage2.generate import open_generator
from qf.trainer.stage2.stage import train
from safetensors.torch import load_file

from conftest import run_extract  # isort: skip

CPU = torch.device("cpu")
QUERIES, LENGTH = 4, 8
HOW = Decoding(max_length=LENGTH)


def untrained(features, init, llm, run):
    config = Stage2Config(epochs=0, init=str(init), llm=str(llm), llm_precision="float32", precision="float32")
    train(features, run, config, CPU)
    return run


@pytest.fixture(scope="module", params=[OPT, T5], ids=["opt", "t5"])
def made(request, pictures, tmp_path_factory):
    """A BLIP-2 of transformers as a folder, features of its vision model, and an untrained run with its weights."""
    top = tmp_path_factory.mktemp("blip2")
    model = random_blip2_with(request.param)
    model.save_pretrained(top / "blip2")
    processor = {"image_processor_type": "BlipImageProcessor", "size": {"height": 32, "width": 32}}
    (top / "blip2" / "preprocessor_config.json").write_text(json.dumps(processor))
    llm = save_language_model(model, top / "llm")
    features = run_extract(pictures, top / "blip2", top / "features", codec="float32")
    return top / "blip2", llm, features, untrained(features, top / "blip2", llm, top / "run")


def our_texts(run, features):
    embeds = decode(features.read(features.rows("train")[:4]))
    return open_generator(run, CPU, torch.float32).texts(embeds, [""] * 4, HOW)


def their_texts(folder, features, pictures):
    """Texts of the BLIP-2 in the folder, through its own processor, for the same pictures."""
    from PIL import Image
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    model, info = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(folder)
    keys = [features.keys[row] for row in features.rows("train")[:4]]
    images = [Image.open(pictures.parent / key).convert("RGB") for key in keys]
    inputs = processor(images=images, text=["a photo of"] * 4, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4 * QUERIES
    ids = model.eval().generate(**inputs, do_sample=False, max_new_tokens=LENGTH).tolist()
    given = inputs["input_ids"][0].tolist()
    ids = [row[len(given) :] if row[: len(given)] == given else row for row in ids]
    return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]


def test_hugging_face_to_qf_and_back(made, pictures, tmp_path, caplog):
    source, llm, features, run = made
    out = tmp_path / "out"
    result = export(run, out, "huggingface", with_llm=True)
    assert (result.vision, result.files) == (True, len(list(out.iterdir())))
    ours, theirs = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert {key: tuple(value.shape) for key, value in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    texts = our_texts(run, features)
    assert all(texts)
    assert their_texts(out, features, pictures) == texts
    again = untrained(features, out, llm, tmp_path / "again")
    assert our_texts(again, features) == texts
    assert not caplog.messages


def test_the_language_model_stays_out_unless_asked_for(made, tmp_path):
    _, llm, _, run = made
    result = export(run, tmp_path / "out", "huggingface")
    assert not any(key.startswith("language_model.") for key in load_file(tmp_path / "out" / "model.safetensors"))
    assert f"put {llm} in its place" in str(result)


def test_lavis_names(made, tmp_path):
    _, llm, _, run = made
    export(run, tmp_path / "blip2.safetensors", "lavis")
    state = load_file(tmp_path / "blip2.safetensors")
    projection = "t5_proj" if "t5" in json.loads((llm / "config.json").read_text())["model_type"] else "opt_proj"
    assert {f"{projection}.weight", f"{projection}.bias", "query_tokens", "ln_vision.weight"} <= state.keys()
    assert "Qformer.bert.encoder.layer.0.crossattention.self.query.weight" in state
    with pytest.raises(ArtifactError, match="leave --with-llm out"):
        export(run, tmp_path / "other.safetensors", "lavis", with_llm=True)


def test_a_run_of_stage_2_is_where_another_begins(made, tmp_path, caplog):
    _, llm, features, run = made
    again = untrained(features, run, llm, tmp_path / "again")
    assert not caplog.messages
    assert (again / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    other = save_language_model(
        random_blip2_with(OPT | {"hidden_size": 32, "word_embed_proj_dim": 32}), tmp_path / "llm"
    )
    untrained(features, run, other, tmp_path / "wider")
    assert "projects to another language model" in caplog.text


def test_a_special_word_to_spare_becomes_the_placeholder(made, tmp_path):
    _, original, features, run = made
    llm = shutil.copytree(original, tmp_path / "llm")
    run = untrained(features, run, llm, tmp_path / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llm / name).write_text((llm / name).read_text().replace("<image>", "<spare>"))
    with pytest.raises(ArtifactError, match="no word to spare"):
        export(run, tmp_path / "none", "huggingface")
    tokenizer = json.loads((llm / "tokenizer.json").read_text())
    spare = dict(tokenizer["added_tokens"][0], id=tokenizer["model"]["vocab"]["<spare>"], content="<spare>")
    tokenizer["added_tokens"].append(spare)
    (llm / "tokenizer.json").write_text(json.dumps(tokenizer))
    export(run, tmp_path / "out", "huggingface", with_llm=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"] == spare["id"]
    assert "<spare>" not in (tmp_path / "out" / "tokenizer.json").read_text()
    again = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert again["model"]["vocab"]["<image>"] == spare["id"]


def test_the_run_decides_which_layout(made, trained, tmp_path):
    from qf.retrieval.journey import export_run

    assert export_run(made[-1], tmp_path / "out", ExportOptions(to="lavis")).layout == "lavis"
    stage1 = trained / "runs" / "stage1"
    with pytest.raises(ArtifactError, match="has no language model"):
        export_run(stage1, tmp_path / "other", ExportOptions(to="huggingface", with_llm=True))
