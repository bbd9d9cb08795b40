"""The three lines of the README in an empty folder, as processes of their own, with the builtin encoder."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from conftest import make_pictures  # isort: skip

README = Path(__file__).resolve().parent.parent / "README.md"


def qf(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "QF_WORKSPACE"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qf.cli", *map(str, arguments)]
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_extract_train_search(tmp_path):
    make_pictures(tmp_path)
    qf(tmp_path, "extract", "photos.csv", "--encoder", "builtin")
    summary = json.loads(qf(tmp_path, "train", "--json", "--epochs", 3, "--batch-size", 6))
    assert {"steps", "epochs", "pairs_per_second", "seconds", "loss", "best", "run"} <= set(summary)
    found = sorted(str(p.relative_to(tmp_path / "qf-out")) for p in (tmp_path / "qf-out").rglob("*") if p.is_file())
    for name in (
        "features/manifest.json",
        "features/rejects.jsonl",
        "features/shard-00000.arrow",
        "index/images.faiss",
    ):
        assert name in found
    run = "config.json loss.png manifest.json metrics.jsonl model.safetensors tokenizer.json"
    assert {f"runs/stage1/{name}" for name in run.split()} <= set(found)
    assert {"index/manifest.json", "index/rows.bin", "index/texts.faiss"} <= set(found)
    lines = qf(tmp_path, "search", "a red bar").splitlines()
    assert len(lines) == 10
    assert ".png" in lines[0]


def test_demo_takes_the_whole_journey(tmp_path):
    """A short one: the figures are the demo's own affair, that every part is there is ours."""
    summary = json.loads(qf(tmp_path, "demo", "--json", "--epochs", 0.1, "--scenes", 120))
    assert list(summary) == ["extract", "train", "index", "eval", "search", "sheet", "cut"]
    assert summary["cut"] is None
    assert summary["extract"]["rejected"] == 0
    assert summary["eval"]["split"] == "test"
    assert {"clip", "itc", "itc+itm@16"} <= set(summary["eval"])
    assert summary["eval"]["clip"]["text_to_image_R@1"] > 50  # of 15 scenes
    assert len({search["query"] for search in summary["search"]}) == 6
    for search in summary["search"]:
        assert search["fitting"] == sum(hit["fits"] for hit in search["hits"]) <= search["possible"] <= 6
        assert search["possible"] > 0
    with Image.open(tmp_path / summary["sheet"]) as sheet:
        assert sheet.height > 1000


def test_searching_with_blip2s_weights_takes_no_training(tmp_path, blip2_folder):
    """The line of the README as it stands, with a small random model under that id in the local cache of Hugging Face."""
    line = re.search(r"^qf extract .* && qf train .* --epochs 0 && .*$", README.read_text(), re.M)[0]
    cached = tmp_path / "hub" / "models--Salesforce--blip2-itm-vit-g"
    shutil.copytree(blip2_folder, cached / "snapshots" / "0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    make_pictures(tmp_path)
    command = re.sub(r"\bqf (extract|train|search)", rf"{sys.executable} -m qf.cli \1", line)
    environment = {k: v for k, v in os.environ.items() if k != "QF_WORKSPACE"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    _, run, _, *hits = out.stdout.splitlines()
    assert run.split("  (")[0] == "run       qf-out/runs/stage1: no steps, the weights as they came"
    assert len(hits) == 10
    assert all("itm" in hit for hit in hits)
    assert "Salesforce/blip2-itm-vit-g has no language head, temperature: these start afresh" in out.stderr
