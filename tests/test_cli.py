"""The commands as a user meets them: what they print, where, and how they fail."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from qf import cli
from qf.pipeline.errors import QfError
from qf.trainer.runs.panel import Pace

from conftest import draw, make_pictures  # isort: skip


@pytest.fixture
def qf(monkeypatch, capsys, tmp_path):
    """Run the command line in-process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QF_WORKSPACE", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qf", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def fails(result, *words):
    """One line on stderr that starts with `qf: error:` and says these words; exit code 1; nothing on stdout."""
    code, out, err = result
    lines = err.strip().splitlines()
    assert code == 1
    assert out == ""
    assert lines[-1].startswith("qf: error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in lines[-1], lines[-1]


def test_help_names_every_command(qf):
    code, out, _ = qf("--help")
    assert code == 0
    for command in ("demo", "extract", "train", "index", "search", "eval", "info"):
        assert command in out
        assert qf(command, "--help")[0] == 0
    assert qf("--version")[1].startswith("qf 0.")


def test_wrong_usage_is_2(qf):
    assert qf("extract")[0] == 2
    assert qf("search")[0] == 2
    assert qf("search", "a dog", "--image", "x.jpg")[0] == 2
    assert qf("train", "--nonsense")[0] == 2
    assert qf("train", "--lr", -1)[0] == 2

    def refusal(*arguments):
        """The text inside the box."""
        code, _, err = qf(*arguments)
        assert code == 2
        return " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())

    assert "trains nothing" in refusal("train", "--epochs", 0)
    assert "ends in .png" in refusal("search", "a dog", "--sheet", "hits.jpg")
    assert "ends in .png" in refusal("explain", "a.jpg", "a dog", "--out", "a.jpg")
    assert "--image FILE" in refusal("search", "a dog", "--find", "text")
    assert "does not go with --image" in refusal("search", "--image", "x.jpg", "--rerank", 8)
    for name in ("", ".", "..", "a/b", "../features"):
        fails(qf("train", "--name", name), "is not the name of a run")


def test_failures_are_one_helpful_line(qf, tmp_path, clip_folder, onnx_folder):
    fails(qf("extract", "nothing.csv"), "nothing.csv does not exist")
    (tmp_path / "photos.csv").write_text("image,width\na.jpg,3\n")
    fails(qf("extract", "photos.csv"), "no caption column", "--caption-column")
    (tmp_path / "empty").mkdir()
    fails(qf("extract", "empty"), "holds no pictures and no captions", "metadata.csv")
    fails(qf("train"), "does not exist or is empty", "qf extract SOURCE")
    fails(qf("search", "a dog"), "qf extract SOURCE")
    fails(qf("eval"), "qf extract SOURCE")
    fails(qf("index"), "qf extract SOURCE")
    fails(qf("info"), "begin with `qf extract SOURCE`")
    fails(qf("info", "photos.csv"), "not a folder; give the folder")
    source = make_pictures(tmp_path / "pictures")
    fails(qf("extract", source, "--encoder", "no/such/model"), "no such folder")
    fails(qf("extract", source, "--encoder", clip_folder, "--device", "cuda:7"), "CUDA devices")
    assert qf("extract", source, "--encoder", clip_folder, "-q")[0] == 0
    fails(qf("extract", source, "--encoder", onnx_folder), "made otherwise", "--overwrite")
    fails(qf("eval", "--split", "test"), "no images with captions in the split test", "--split")
    fails(qf("train", "--losses", "itc,nothing"), "--losses")
    fails(qf("eval", "--fit-mix"), "there is none yet", "qf train")
    fails(qf("explain", "photos.csv", "a dog"), "no finished run", "qf train")


def test_results_go_to_stdout_and_progress_to_stderr(qf, tmp_path, clip_folder):
    source = make_pictures(tmp_path / "pictures")
    code, out, err = qf("extract", source, "--encoder", clip_folder, "--json")
    summary = json.loads(out)
    assert code == 0
    fields = "records captions rejected shards bytes seconds images_per_second encoder_images_per_second features"
    assert set(fields.split()) <= set(summary)
    assert (summary["records"], summary["captions"]) == (24, 48)
    assert "image column 'image'" in err
    assert qf("extract", source, "--encoder", clip_folder, "-q")[2] == ""


def test_questions_are_joined_counted_and_checked(qf, tmp_path, clip_folder):
    source = make_pictures(tmp_path / "pictures")
    base = ("extract", source, "--encoder", clip_folder, "--questions", "q.csv", "--questions", "r.jsonl")
    (tmp_path / "q.csv").write_text("image,question,answer\nred-bar-0,Which colour?,red\nnowhere,Why?,so\n")
    fails(qf(*base), "r.jsonl does not exist")
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"image": "red-bar-1.png", "conversations": ["What?", "A bar."]}) + "\n"
    )
    code, out, err = qf(*base)
    assert code == 0
    assert "48 captions, 1 question, 1 conversation, 0 rejected" in out
    assert "; 1 question about images that it does not have left out" in err
    assert "48 captions, 1 question, 1 conversation" in qf("info")[1]
    assert "sound" in qf("verify")[1]
    assert json.loads(qf(*base, "--json")[1])["questions"] == 1
    (tmp_path / "q.csv").write_text("image,question,answer\nnowhere,Why?,so\n")
    fails(qf(*base[:-2], "-w", "other"), "none of 1 questions is about an image of", "nowhere")


def test_pictures_are_indexed_and_searched_without_training(qf, tmp_path, clip_folder):
    qf("extract", make_pictures(tmp_path / "pictures"), "--encoder", clip_folder)
    code, out, err = qf("index", "--json")
    assert code == 0
    assert (json.loads(out)["images"], json.loads(out)["vectors"], json.loads(out)["texts"]) == (24, 24, 48)
    assert "indexing the encoder's own embeddings (no run yet)" in err
    code, out, err = qf("search", "a red bar", "-k", "3")
    assert (code, len(out.splitlines()), err) == (0, 3, "")
    assert "the encoder's (1 vector an image)" in qf("info", "qf-out/index")[1]
    assert "sound" in qf("verify", "qf-out/index")[1]


def test_training_fits_a_mix_that_search_uses(qf, pictures, clip_folder, tmp_path):
    qf("extract", pictures, "--encoder", clip_folder)
    err = qf("train", "--epochs", 1, "--batch-size", 4, "--num-query-tokens", 2, "--no-index")[2]
    assert "fitting the mix on 12 validation images" in err
    assert "mix: text to image " in err
    qf("index")
    assert qf("search", "a red bar")[2] == ""
    path = tmp_path / "qf-out" / "runs" / "stage1" / "mix.json"
    fitted = path.read_bytes()
    path.unlink()
    assert "searching by the encoder alone" in qf("search", "a red bar")[2]
    assert "mix" not in json.loads(qf("eval", "--json")[1])
    assert "mix" in json.loads(qf("eval", "--json", "--fit-mix")[1])
    assert path.read_bytes() == fitted
    qf("train", "--epochs", 2, "--batch-size", 4, "--num-query-tokens", 2, "--overwrite")
    assert path.read_bytes() != fitted


def test_search_before_training_says_so(qf, tmp_path, clip_folder):
    qf("extract", make_pictures(tmp_path / "pictures"), "--encoder", clip_folder)
    code, out, err = qf("search", "a red bar", "--json", "-k", "3")
    hits = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert "no trained model yet" in err
    assert "no trained model yet" in qf("search", "a red bar", "-q")[2]  # which is no progress


@pytest.fixture
def workspace(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "work")


def test_the_workspace_is_where_the_environment_says(qf, trained, monkeypatch):
    monkeypatch.setenv("QF_WORKSPACE", str(trained))
    for command in ("info", "verify"):
        code, out, _ = qf(command, "--json")
        assert code == 0
        assert list(json.loads(out)) == [str(trained / part) for part in ("features", "runs/stage1", "index")]
    assert qf("verify", "-w", "elsewhere")[0] == 1


def test_a_trained_workspace(qf, workspace):
    code, out, _ = qf("search", "a red bar", "-w", workspace, "--rerank", 5, "--json", "-k", "2")
    assert code == 0
    assert set(json.loads(out.splitlines()[0])) == {"rank", "key", "score", "image", "captions", "itc", "itm"}
    code, out, _ = qf("search", "a red bar", "-w", workspace, "--sheet", "hits.png")
    assert code == 0
    assert "contact sheet: hits.png" in out
    code, out, _ = qf("explain", "red-bar-0.png", "a red bar", "-w", workspace, "--json", "--run", "stage1")
    explained = json.loads(out)
    assert code == 0
    assert {"itc", "itm", "itm_probability", "query", "queries", "grid", "run", "out"} < set(explained)
    assert (workspace / "explain.png").is_file()
    draw("red", "bar").save("photo.png")
    assert "drawing   why.png" in qf("explain", "photo.png", "a red bar", "-w", workspace, "--out", "why.png")[1]
    fails(qf("explain", "nothing", "a red bar", "-w", workspace), "neither a file nor a key")
    code, out, _ = qf("eval", "--split", "val", "-w", workspace, "--rerank", 4, "--json")
    result = json.loads(out)
    assert (result["split"], result["images"], result["texts"]) == ("val", 12, 24)
    for scorer in ("clip", "itc", "itc+itm@4", "mix", "mix+itm@4"):
        assert list(result[scorer]) == [
            f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)
        ]
    drawings = ("--plot", "plot.png", "--failures", "failures.png")
    out = qf("eval", "--split", "val", "-w", workspace, "--rerank", 4, "--rerank", 2, *drawings)[1]
    assert out.index("ITC+ITM@2") < out.index("ITC+ITM@4")
    assert Path("plot.png").is_file()
    assert Path("failures.png").is_file()
    assert qf("eval", "-w", workspace, "--plot", "plot.jpg")[0] == 2
    code, out, _ = qf("index", "-w", workspace, "--json")
    assert {"images", "vectors", "texts", "type", "bytes", "seconds", "index"} <= set(json.loads(out))
    code, out, _ = qf("info", workspace)
    assert "features" in out
    assert "queries" in out
    assert json.loads(qf("info", workspace / "index", "--json")[1])["kind"] == "index"
    (workspace / "index" / "manifest.json").unlink()
    fails(qf("search", "a red bar", "-w", workspace), "build it with `qf index`")


def test_a_run_is_exported(qf, workspace, tmp_path):
    code, out, _ = qf("export", "stage1", "out", "--to", "huggingface", "-w", workspace)
    assert (code, out.split(";")[0]) == (0, "export    out: Q-Former in the layout of huggingface")
    assert (tmp_path / "out" / "config.json").is_file()
    fails(qf("export", "stage1", "out", "--to", "lavis", "-w", workspace), "is there already", "--overwrite")
    fails(qf("export", "other", "new", "--to", "lavis", "-w", workspace), "qf train")
    code, out, _ = qf("export", workspace / "runs" / "stage1", "q.safetensors", "--to", "lavis", "--json")
    assert {"export", "layout", "vision", "files", "bytes"} <= set(json.loads(out))
    untrained = ("train", "--name", "same", "--init", "q.safetensors", "--epochs", 0, "--no-index", "-w", workspace)
    assert "no steps, the weights as they came" in qf(*untrained)[1]
    assert "0 steps" in qf("info", workspace / "runs" / "same")[1]


def test_debug_shows_the_traceback_wherever_it_stands(qf):
    for arguments in (("--debug", "info", "nowhere"), ("info", "nowhere", "--debug")):
        with pytest.raises(QfError):
            qf(*arguments)


def test_a_run_is_named_and_told_apart(qf, workspace):
    """--init takes a name of the workspace; the latest run is told by what it says itself, whatever copying did to times."""
    first = workspace / "runs" / "stage1"
    code, _, err = qf("train", "--name", "more", "--init", "stage1", "--epochs", 0, "--no-index", "-w", workspace)
    assert code == 0, err
    assert json.loads((workspace / "runs" / "more" / "config.json").read_text())["train"]["init"] == str(first)
    os.utime(first / "manifest.json")
    assert (
        "evaluating " + str(workspace / "runs" / "more") in qf("eval", "-w", workspace)[2]
    )  # of val: there is no test
    _, _, err = qf("train", "--name", "more", "--init", "stage1", "--epochs", 0, "--no-index", "-w", workspace)
    assert "is finished: nothing to train" in err
    (workspace / "runs" / "more" / "manifest.json").write_text("{")
    assert "evaluating " + str(first) in qf("eval", "-w", workspace)[2]  # the damaged one is passed over
    (workspace / "runs" / "more" / "manifest.json").unlink()
    assert "more: unfinished" in qf("info", workspace)[2]
    fails(qf("info", workspace / "runs" / "more"), "is unfinished; run the command that began it again")


def test_a_too_long_query_is_truncated_with_a_warning(qf, workspace):
    assert (
        "qf: warning: the text has 101 tokens and is truncated: the model reads the first 32"
        in qf("search", "red " * 99, "-w", workspace)[2]
    )
    assert "warning" not in qf("search", "a red bar", "-w", workspace)[2]


def test_training_says_what_it_is_about_to_do(qf, pictures, clip_folder, tmp_path):
    qf("extract", pictures, "--encoder", clip_folder, "-w", "work")
    err = qf("train", "-w", "work", "--epochs", 1, "--batch-size", 4, "--num-query-tokens", 2, "--no-index")[2]
    assert "training on 12 images, 4 a step: 3 steps; so few steps teach it little" in err


def test_a_workspace_finds_its_encoder_from_anywhere(qf, pictures, clip_folder, tmp_path, monkeypatch):
    """And evaluates its runs when the encoder is gone, which only the zero-shot row needs."""
    shutil.copytree(clip_folder, tmp_path / "encoder")
    qf("extract", pictures, "--encoder", "encoder", "-w", "work")
    options = ("--epochs", 1, "--batch-size", 4, "--num-query-tokens", 2, "--no-index")
    assert qf("train", "-w", "work", *options)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate = ("eval", "-w", tmp_path / "work", "--split", "val", "--json")
    whole = json.loads(qf(*evaluate)[1])
    assert {"clip", "itc", "itc+itm@16"} <= set(whole)
    (tmp_path / "encoder").rename(tmp_path / "gone")
    code, out, err = qf(*evaluate)
    assert code == 0
    assert "without the encoder's own scores: encoder " in err
    bare = json.loads(out)
    assert {**whole, **{name: bare[name] for name in ("images", "texts", "itc", "itc+itm@16")}} == whole
    assert "clip" not in bare
    shutil.rmtree(tmp_path / "work" / "runs")
    fails(qf(*evaluate), "no such folder")


STEP = {
    "step": 1000, "epoch": 3.25, "loss": 12.345, "loss_itc": 4.5, "loss_itm": 0.645, "loss_itg": 7.2, "lr": 4.123e-4,
    "grad_norm": 1.2345, "pairs_per_second": 12345.6, "seconds": 4000.0, "new": "field",
}  # fmt: skip
CHECK = {"step": 1000, "split": "val", "text_to_image_R@1": 41.25, "image_to_text_R@1": 100.0, "best": True}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_training_is_shown_live_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with cli.Display(False) as display:
        display.say("training")
        for line in (
            STEP,
            CHECK,
            STEP | {"step": 1500},
            CHECK | {"step": 1500, "text_to_image_R@1": 7.5, "best": False},
        ):
            display.training(line, 2000)
            display.live.refresh()
        display.say("indexing")
    screen = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", sys.stderr.getvalue())
    panel = screen[screen.rindex("╭") : screen.rindex("╯") + 1].replace("\r", "").splitlines()
    assert {len(line) for line in panel} == {80}
    for words in (
        "1,500 of 2,000, epoch 3.25",
        "1:06:40 so far",
        "12,346 pairs/s",
        "12.345    itc 4.500  itm 0.645  itg 7.200",
        "0.00041, gradient norm 1.23",
    ):
        assert any(words in line for line in panel), words
    assert not any(" left" in line for line in panel)  # it stopped early
    assert "1:06:40 so far, about 1:06:" in screen
    rows = [line.strip("│ ").split() for line in panel]
    assert ["last", "1,500", "7.5", "100.0"] in rows
    assert ["best", "1,000", "41.2", "100.0"] in rows
    assert screen.rstrip().endswith("indexing")  # below what is now settled


def test_training_is_told_in_plain_lines_elsewhere(capsys):
    with cli.Display(False) as display:
        display.training(STEP, 2000)
        display.training(CHECK, 2000)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "train 1,000/2,000  itc 4.500  itm 0.645  itg 7.200  12346 pairs/s"
    assert second == "step 1,000: validation R@1 41.2 text to image, 100.0 image to text (the best so far)"
    with cli.Display(True) as display:
        display.training(STEP, 2000)
        display.training(CHECK, 2000)
    assert capsys.readouterr().err == ""


def test_the_time_left_follows_the_pace(monkeypatch):
    now = iter([0.0, 10.0, 30.0])
    pace = Pace()
    for done in (0, 10, 20):
        pace.reports.append((next(now), done))
    assert pace.left(100) == pytest.approx(80 * 30 / 20)


def test_a_run_that_stops_early_says_so(qf, workspace, bert_folder):
    options = ("--init", bert_folder, "--lr", 0, "--dropout", 0, "--contrast-first", 0, "--batch-size", 4, "--no-index")
    train = ("train", "-w", workspace, "--name", "short", *options, "--patience", 1, "--epochs", 9, "--tensorboard")
    summary = json.loads(qf(*train, "--json")[1])
    assert summary["steps"] < summary["planned_steps"]
    assert list((workspace / "runs" / "short" / "tensorboard").iterdir())
    told = f"{summary['steps']} steps of {summary['planned_steps']} (validation R@1 got no better, --patience 1)"
    assert told in qf(*train[:-1])[1]  # neither TensorBoard nor the display is part of what the run is
    assert f"stopped   of {summary['planned_steps']} steps planned" in qf("info", workspace / "runs" / "short")[1]


def test_an_interrupt_is_130(trained):
    """Ctrl-C during work: no traceback, and the way on is named."""
    code = "import os, signal, sys; import qf.pipeline.features.reader as f; from qf import cli\n"
    code += "class Slow(f.Features):\n    def __init__(self, folder): os.kill(os.getpid(), signal.SIGINT)\n"
    code += f"f.Features = Slow; sys.argv = ['qf', 'train', '-w', {str(trained)!r}]; cli.main()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 130
    assert "Traceback" not in out.stderr
    assert "run the same command to go on" in out.stderr


def test_the_time_left_starts_again_with_other_work(monkeypatch, capsys):
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr("time.monotonic", lambda: next(now) / 2)
    with cli.Display(False) as display:
        for step in (10, 20, 1, 2):
            display.training({"step": step, "pairs_per_second": 1.0}, 20)
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("train 2/20")
    assert "left" in last
    assert "-" not in last
