"""`qf caption`, through the library and the command line."""

import json

import pytest
import torch
from conftest import TINY
from qf import cli
from qf.pipeline.config import ComputeOptions
from qf.pipeline.errors import QfError
from qf.retrieval.config import CaptionOptions, EvalOptions
from qf.retrieval.generation import caption
from qf.retrieval.text_scores import evaluate_texts
from qf.trainer.config import GenerateOptions, Stage1Config

ON = ComputeOptions(device="cpu", precision="float32")
SHORT = GenerateOptions(beams=2, max_length=6)


def captions(workspace, images, **options):
    return list(caption(workspace, images, CaptionOptions(**options), SHORT, None, ON))


def test_a_run_of_stage_2_starts_from_the_latest_of_stage_1_and_leaves_search_to_it(workspace):
    assert workspace.latest_run(2).name == "stage2"
    assert workspace.latest_run().name == "stage1"
    settings = json.loads((workspace.run("stage2") / "config.json").read_text())
    assert settings["train"]["init"].endswith("stage1")


@pytest.mark.parametrize("stage", [1, 2])
def test_files_and_keys_of_the_same_picture_have_the_same_caption(workspace, pictures, stage):
    files = [str(pictures.parent / name) for name in ("red-bar-1.png", "blue-pole-1.png")]
    by_file = captions(workspace, files, stage=stage)
    by_key = captions(workspace, ["red-bar-1.png", "blue-pole-1.png"], stage=stage)
    assert [one.image for one in by_file] == files
    assert [one.caption for one in by_file] == [one.caption for one in by_key]


def test_a_folder_is_captioned_and_unreadable_pictures_are_left_out(workspace, pictures, tmp_path, caplog):
    (tmp_path / "a.png").write_bytes((pictures.parent / "red-bar-0.png").read_bytes())
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert [one.image for one in captions(workspace, [str(tmp_path)])] == [str(tmp_path / "a.png")]
    assert "b.png is left out" in caplog.text


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_interrupted_file_goes_on_where_it_stopped(workspace, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("qf.retrieval.generation.GROUP", 5)
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"
    captions(workspace, [], features=True, out=whole)
    begun = caption(workspace, [], CaptionOptions(features=True, out=out), SHORT, None, ON)
    first = [next(begun) for _ in range(7)]
    begun.close()
    assert not out.exists()
    again = captions(workspace, [], features=True, out=out)
    assert again[:7] == first
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("images", "message"),
    [(["nowhere.png"], "no such picture"), (["EMPTY"], "holds no pictures")],
    ids=["missing", "empty"],
)
def test_what_cannot_be_captioned_is_one_line(workspace, tmp_path, images, message):
    images = [str(tmp_path) if image == "EMPTY" else image for image in images]
    with pytest.raises(QfError, match=message):
        captions(workspace, images)


def test_a_run_without_generation_writes_no_captions(workspace, features, tmp_path):
    from qf.trainer.stage1.stage import train

    run = workspace.runs / "contrast"
    train(features, run, Stage1Config(**TINY | {"losses": "itc", "epochs": 1}), torch.device("cpu"))
    with pytest.raises(QfError, match="never trained"):
        list(caption(workspace, ["red-bar-0.png"], CaptionOptions(), SHORT, "contrast", ON))


def test_the_command_prints_a_line_a_picture(workspace, monkeypatch, capsys):
    arguments = [
        "qf",
        "caption",
        "red-bar-1.png",
        "-w",
        str(workspace.folder),
        "--device",
        "cpu",
        "--beams",
        "1",
        "--json",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert set(json.loads(capsys.readouterr().out)) == {"image", "caption"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--stage", "2"], "needs a language model"),
        (["train", "--stage", "2", "--llm", "builtin", "--losses", "itc"], "--losses is an option of stage 1"),
        (["train", "--llm", "builtin"], "--llm is an option of stage 2"),
        (["caption"], "give pictures"),
        (["caption", "a.png", "--temperature", "1", "--beams", "3"], "give one of them"),
        (["caption", "a.png", "--out", "a.png"], ".csv or .jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together_are_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["qf", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_captions_are_scored_beside_those_of_other_pictures(workspace):
    result = evaluate_texts(workspace, EvalOptions(task="caption", split="val"), None, ON)
    assert set(result.rows) == {"run", "run, shuffled images"}
    assert set(result.rows["run"]) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    assert result.images == result.texts == 12
    assert "captions of" in str(result)


def test_a_split_without_questions_is_one_line(workspace):
    with pytest.raises(QfError, match="no images with questions"):
        evaluate_texts(workspace, EvalOptions(task="vqa"), None, ON)


def test_weights_of_stage_2_are_refused_where_a_whole_q_former_is_needed(workspace, tmp_path):
    from qf.pipeline.errors import ArtifactError
    from qf.retrieval.encode.qformer import Run
    from qf.retrieval.info import info
    from qf.retrieval.verify import verify
    from qf.trainer.weights.export import export

    folder = workspace.run("stage2")
    with pytest.raises(ArtifactError, match="of stage 2"):
        export(folder, tmp_path / "out", "lavis")
    with pytest.raises(QfError, match="search needs one of stage 1"):
        Run(folder, torch.device("cpu"), "float32")
    assert verify(folder).problems == []
    assert workspace.latest_run(2) == folder
    assert "stage 2" in str(info(folder))
