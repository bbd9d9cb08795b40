"""Stage 1 learns, writes its files, resumes to the bit, and refuses what cannot work."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from qf.pipeline.errors import ArtifactError, EncoderError, TrainingError
from qf.trainer.config import Stage1Config
from qf.trainer.stage1.stage import train
from safetensors.torch import load_file

from conftest import make_pictures, reseal, run_extract  # isort: skip

CPU = torch.device("cpu")
SMALL = Stage1Config(
    epochs=12,
    batch_size=4,
    log_every=3,
    checkpoint_every=4,
    vocab_size=60,
    num_query_tokens=2,
    precision="float32",
    max_val_images=4,
)


def test_a_run_learns_and_leaves_its_files(trained):
    run = trained / "runs" / "stage1"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["best"]["text_to_image_R@1"] > 2 * 100 / 12
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    fields = "step epoch loss loss_itc loss_itm loss_itg lr grad_norm pairs_per_second wait_share seconds"
    assert set(fields.split()) <= set(steps[-1])
    assert all(0 <= step["wait_share"] <= 1 for step in steps)
    assert 0 <= manifest["wait_share"] <= 1
    assert steps[-1]["loss_itc"] < 0.8 * steps[0]["loss_itc"]
    assert steps[-1]["loss_itg"] < 0.7 * next(step["loss_itg"] for step in steps if step["loss_itg"] is not None)
    assert {"step", "split", "text_to_image_R@1", "image_to_text_R@10"} <= set(next(x for x in lines if "split" in x))
    with Image.open(run / "loss.png") as curves:
        assert curves.size[0] > 500
    assert len(list((run / "checkpoints").glob("step-*"))) == 2
    assert not list(run.rglob("*.pt")) + list(run.rglob("*.pkl"))


def test_a_finished_run_is_kept_and_other_settings_are_refused(features, tmp_path):
    config = replace(SMALL, epochs=1)
    first = train(features, tmp_path / "run", config, CPU)
    written = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    assert train(features, tmp_path / "run", config, CPU) == first
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ArtifactError, match=r"train\.lr was 0\.0005 and is now 1\.0; choose another --name"):
        train(features, tmp_path / "run", replace(config, lr=1.0), CPU)
    train(features, tmp_path / "run", replace(config, lr=1e-3), CPU, overwrite=True)


def test_a_run_is_replaced_only_by_one_that_can_start(features, tmp_path):
    config, run = replace(SMALL, epochs=1), tmp_path / "run"
    train(features, run, config, CPU)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises((ArtifactError, TrainingError, EncoderError)):
        train(features, run, replace(config, init=str(tmp_path / "typo")), CPU, overwrite=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    again = train(features, run, replace(config, init=str(run)), CPU, overwrite=True)  # starts from its own weights
    assert json.loads((run / "config.json").read_text())["train"]["init"] == str(run)
    assert again.steps == 3


def test_a_run_without_a_checkpoint_is_replaced(features, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(features, tmp_path / "run", replace(SMALL, checkpoint_every=100), CPU, report=interrupted_at(6))
    assert (tmp_path / "run" / "config.json").is_file()
    train(features, tmp_path / "run", replace(SMALL, epochs=1), CPU)
    assert [line["step"] for line in log_of(tmp_path / "run") if "loss" in line] == [3]


def test_an_incomplete_line_of_the_log_is_written_again(features, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(features, tmp_path / "run", SMALL, CPU, report=interrupted_at(9))
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-40])
    train(features, tmp_path / "run", SMALL, CPU)
    train(features, tmp_path / "calm", SMALL, CPU)
    steps, calm = ([line["step"] for line in log_of(tmp_path / name)] for name in ("run", "calm"))
    assert steps == calm


@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_epochs_count_accumulated_batches(features, tmp_path, accumulate):
    """12 images in batches of 4: three an epoch."""
    summary = train(features, tmp_path / "run", replace(SMALL, epochs=4, accumulate=accumulate), CPU)
    assert summary.steps == round(12 / accumulate)
    assert summary.epochs == pytest.approx(summary.steps * accumulate / 3, abs=1e-3)


def test_texts_longer_than_the_positions_are_refused(features, tmp_path):
    with pytest.raises(TrainingError, match="--max-text-length 1000: texts of this model have at most 512 positions"):
        train(features, tmp_path / "run", replace(SMALL, max_text_length=1000), CPU)


def test_pictures_that_share_one_caption_train(features, tmp_path, monkeypatch):
    """There are no negatives then, and matching still has pairs."""
    monkeypatch.setattr(features, "captions", [["a photo"]] * len(features.captions), raising=False)
    summary = train(features, tmp_path / "run", replace(SMALL, epochs=1, contrast_first=0), CPU)
    assert math.isfinite(summary.loss)


def test_a_killed_run_resumes_to_the_bit(features, tmp_path):
    """Killed by SIGKILL at random moments, it ends with the weights and the log of a run that was left alone."""
    train(features, tmp_path / "calm", SMALL, CPU)
    code = (
        "import sys, json, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from qf.pipeline.features.reader import Features; from qf.trainer.config import Stage1Config\n"
        "from qf.trainer.stage1.stage import train\n"
        "config = Stage1Config(**json.loads(sys.argv[1]))\n"
        "train(Features(Path(sys.argv[2])), Path(sys.argv[3]), config, torch.device('cpu'))\n"
    )
    command = [sys.executable, "-c", code, json.dumps(asdict(SMALL)), str(features.folder), str(tmp_path / "killed")]
    draw, kills = random.Random(0), 0
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while kills < 4:
        process = subprocess.Popen(command)
        before = metrics.stat().st_size if metrics.is_file() else 0
        while process.poll() is None and (not metrics.is_file() or metrics.stat().st_size in (0, before)):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    subprocess.run(command, check=True)
    assert kills
    calm, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("calm", "killed"))
    assert all(torch.equal(calm[name], killed[name]) for name in calm)

    def log(name):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [
            {k: v for k, v in line.items() if k not in ("seconds", "pairs_per_second", "wait_share")} for line in lines
        ]

    assert [line["step"] for line in log("calm")] == [line["step"] for line in log("killed")]
    assert [x for x in log("calm") if "split" in x] == [x for x in log("killed") if "split" in x]


def test_zero_epochs_need_no_training_images(clip_folder, tmp_path):
    source = make_pictures(tmp_path, copies=1)
    source.write_text(source.read_text().replace(",train", ",test"))
    features = run_extract(source, clip_folder, tmp_path / "features")
    assert not len(features.rows("train"))
    summary = train(features, tmp_path / "run", replace(SMALL, epochs=0), CPU)
    assert (summary.steps, summary.loss, summary.best) == (0, None, {})
    assert train(features, tmp_path / "run", replace(SMALL, epochs=0), CPU) == summary
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    with pytest.raises(TrainingError, match=r"too few training images \(0 train, .*--redraw-splits"):
        train(features, tmp_path / "more", SMALL, CPU)


@pytest.mark.parametrize(
    ("codec", "change"),
    [
        ("int8", {}),
        ("int4", {"token_dropout": 0.5}),
        ("float16", {"contrastive_batch": 8, "accumulate": 2, "epochs": 12}),
    ],
)
def test_every_codec_resumes_to_the_bit(pictures, clip_folder, tmp_path, codec, change):
    features = run_extract(pictures, clip_folder, tmp_path / "features", codec=codec)
    config = replace(SMALL, **{"epochs": 2, **change})
    calm = train(features, tmp_path / "calm", config, CPU)
    assert math.isfinite(calm.loss)

    def interrupt(line, total):
        if line["step"] >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(features, tmp_path / "broken", config, CPU, report=interrupt)
    assert len(list((tmp_path / "broken" / "checkpoints").glob("step-*"))) == 1
    messages = []
    train(features, tmp_path / "broken", config, CPU, cache_on_device=True, say=messages.append)  # changes no bit
    assert "into host memory" in messages[0]
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("calm", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_a_run_that_could_not_start_leaves_its_name_free(features, tmp_path):
    config = replace(SMALL, epochs=1)
    with pytest.raises(ArtifactError, match="nowhere"):
        train(features, tmp_path / "run", replace(config, init=str(tmp_path / "nowhere")), CPU)
    assert train(features, tmp_path / "run", config, CPU).steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": "itc,foo"}, "--losses itc,foo"),
        ({"preset": "huge"}, "--preset huge: use tiny, small, base"),
        ({"precision": "float16"}, "float16 cannot train"),
        ({"contrastive_batch": 6}, "--contrastive-batch 6 a multiple of --batch-size"),
        (
            {"lr": 1e6, "warmup_steps": 0},
            r"training diverged: .* is not finite at step \d+; .*a lower --lr \(now 1e\+06\)",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(features, tmp_path, change, message):
    with pytest.raises(TrainingError, match=message):
        train(features, tmp_path / "run", replace(SMALL, **change), CPU)


def test_losses_that_are_not_trained_are_null_in_the_log(features, tmp_path):
    train(features, tmp_path / "run", replace(SMALL, losses="itc", epochs=1, teach="none"), CPU)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss_itc"] == first["loss"]
    assert first["loss_itm"] is first["loss_itg"] is None


def test_the_best_weights_were_trained_with_all_losses(features, tmp_path):
    summary = train(features, tmp_path / "run", replace(SMALL, contrast_first=0.5), CPU)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    joined = [line["step"] for line in lines if line.get("loss_itm") is not None]
    assert 0 < len(joined) < len([line for line in lines if "loss_itc" in line])
    assert summary.best["step"] >= min(joined)
    assert "reranked_text_to_image_R@1" in summary.best


def log_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def interrupted_at(at):
    """A report that interrupts training, like Ctrl-C, at the validation of a step."""

    def report(line, total):
        if "split" in line and line["step"] >= at:
            raise KeyboardInterrupt

    return report


@pytest.fixture(scope="module")
def small(bert_folder):
    """A model so small that its checkpoints take no time."""
    return replace(SMALL, init=str(bert_folder), epochs=8)


@pytest.fixture(scope="module")
def still(small):
    """A model that learns nothing, so that the first validation with all losses is the best. It validates more than once an epoch."""
    frozen = {"lr": 0.0, "min_lr": 0.0, "dropout": 0.0}
    return replace(small, **frozen, contrast_first=0.5, validate_every=2, checkpoint_every=3)


def test_training_stops_when_validation_gets_no_better(features, still, tmp_path):
    summary = train(features, tmp_path / "run", replace(still, patience=2), CPU)
    checks = [line for line in log_of(tmp_path / "run") if "split" in line]
    first = next(line["step"] for line in checks if line["best"])  # before it ITC trained alone, which does not count
    assert first > 12 == summary.planned_steps // 2
    assert (summary.steps, summary.stopped) == (first + 4, "validation R@1 got no better, --patience 2")
    assert [line["step"] for line in checks if line["step"] > first] == [first + 2, first + 4]
    assert summary.best["step"] == first
    assert summary.epochs == pytest.approx(summary.steps / 3, abs=1e-3)
    assert max(line["step"] for line in log_of(tmp_path / "run") if "loss" in line) == summary.steps
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (
        manifest.items()
        >= {"steps": summary.steps, "planned_steps": summary.planned_steps, "stopped": summary.stopped}.items()
    )
    whole = train(features, tmp_path / "whole", still, CPU)
    assert (whole.steps, whole.stopped) == (24, None)


def test_the_count_of_patience_survives_an_interrupt(features, still, tmp_path):
    """Also an interrupt after the last validation."""
    config = replace(still, patience=3)
    calm = train(features, tmp_path / "calm", config, CPU)
    for at in (calm.steps - 2, calm.steps):
        with pytest.raises(KeyboardInterrupt):
            train(features, tmp_path / "broken", config, CPU, report=interrupted_at(at))
    broken = train(features, tmp_path / "broken", config, CPU)
    different = ("run", "seconds", "pairs_per_second", "wait_share")
    assert {k: v for k, v in broken.to_json().items() if k not in different} == {
        k: v for k, v in calm.to_json().items() if k not in different
    }
    checks = [[line for line in log_of(tmp_path / name) if "split" in line] for name in ("calm", "broken")]
    assert checks[0] == checks[1]


def test_patience_needs_validation_images(features, tmp_path, monkeypatch):
    rows = features.rows
    monkeypatch.setattr(features, "rows", lambda split=None, **how: rows("test" if split == "val" else split, **how))
    with pytest.raises(TrainingError, match="--patience 1: .* has no images with captions in the split val"):
        train(features, tmp_path / "run", replace(SMALL, patience=1), CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_every": 2},
        {"validate_every": 2},
        {},  # saved at the end only
    ],
)
def test_nothing_that_diverged_is_saved(features, small, tmp_path, change):
    """Also between the lines of the log: training checks before checkpoints, before the best weights, and at the end."""
    rare = {"epochs": 2, "log_every": 100, "checkpoint_every": 100, "validate_every": 100}
    config = replace(small, **(rare | {"lr": 1e30, "warmup_steps": 0, "contrast_first": 0.0} | change))
    with pytest.raises(TrainingError, match="is not finite"):
        train(features, tmp_path / "run", config, CPU)
    assert not [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("manifest.json")]


def test_a_feature_that_is_not_finite_is_noticed(features, tmp_path, monkeypatch):
    whole = features.read

    def planted(rows, *more):
        encoded = whole(rows, *more)
        encoded["tokens"][rows == features.rows("train")[5]] = float("nan")
        return encoded

    monkeypatch.setattr(features, "read", planted)
    with pytest.raises(TrainingError, match="loss_itc is not finite .* `qf verify` finds the features sound"):
        train(features, tmp_path / "run", replace(SMALL, epochs=1), CPU)


def test_tensorboard_holds_what_the_log_holds(features, small, tmp_path):
    """Each point once, although the run was interrupted and resumed without TensorBoard in between."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(small, epochs=4, validate_every=3, contrast_first=0)
    for at, tensorboard in ((6, True), (9, False)):  # both after a checkpoint, and a line after that
        with pytest.raises(KeyboardInterrupt):
            train(features, tmp_path / "run", config, CPU, report=interrupted_at(at), tensorboard=tensorboard)
    train(features, tmp_path / "run", config, CPU, tensorboard=True)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    expected: dict[str, list] = {}
    for line in log_of(tmp_path / "run"):
        for name, value in line.items():
            if name not in ("step", "split", "best"):
                expected.setdefault(f"{line.get('split', 'train')}/{name}", []).append((line["step"], value))
    assert {"train/loss_itg", "train/grad_norm", "val/text_to_image_R@1"} < set(expected)
    assert sorted(board.Tags()["scalars"]) == sorted(expected)
    for tag, points in expected.items():
        found = board.Scalars(tag)
        assert [event.step for event in found] == [step for step, _ in points]
        assert [event.value for event in found] == pytest.approx([value for _, value in points])
        assert all(a.wall_time <= b.wall_time for a, b in zip(found, found[1:], strict=False))
    train(features, tmp_path / "run", replace(config, epochs=1), CPU, overwrite=True)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_missing_tensorboard_package_is_named(features, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match=r"pip install 'qf\[tensorboard\]'"):
        train(features, tmp_path / "run", SMALL, CPU, tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_reports_its_best_validation(features, still, tmp_path):
    config = replace(still, contrast_first=0)
    with pytest.raises(KeyboardInterrupt):
        train(features, tmp_path / "run", config, CPU, report=interrupted_at(8))
    reported = []
    train(features, tmp_path / "run", config, CPU, report=lambda line, total: reported.append(line))
    assert [line["step"] for line in reported[:4]] == [2, 4, 6, 8]  # the best, and those since; 8 is validated again
    assert [line["best"] for line in reported[:3]] == [True, False, False]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_it_trains_on_every_device(features, tmp_path, device):
    summary = train(features, tmp_path / "run", replace(SMALL, epochs=2, precision="bfloat16"), torch.device(device))
    assert math.isfinite(summary.loss)
    assert Path(summary.run).is_dir()
    assert os.listdir(tmp_path / "run" / "checkpoints")


def record_precision(run, name):
    """Change the precision that an interrupted run began in, as if another machine had begun it."""
    settings = json.loads((run / "config.json").read_text())
    assert settings["precision"] != f"torch.{name}"
    reseal(run / "config.json", precision=f"torch.{name}")


def test_a_run_ends_in_the_precision_that_it_began_in(features, small, tmp_path, monkeypatch):
    """With --precision auto, which chooses bfloat16 where the run began and float32 here."""
    monkeypatch.setattr("qf.trainer.session.resolve_precision", lambda name, device: torch.float32)
    config, run = replace(small, precision="auto"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(features, run, config, CPU, report=interrupted_at(6))
    record_precision(run, "bfloat16")
    computed = []
    monkeypatch.setattr(
        "qf.trainer.stage1.step.autocast", lambda device, dtype: computed.append(dtype) or nullcontext()
    )
    resumed = train(features, run, config, CPU)
    assert set(computed) == {torch.bfloat16}
    assert json.loads((run / "config.json").read_text())["precision"] == "torch.bfloat16"
    assert train(features, run, config, CPU) == resumed  # finished, on any machine
    train(features, run, replace(config, epochs=1), CPU, overwrite=True)
    assert json.loads((run / "config.json").read_text())["precision"] == "torch.float32"  # begun here


def test_a_given_precision_other_than_the_recorded_one_is_refused(features, small, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(features, tmp_path / "run", small, CPU, report=interrupted_at(6))
    record_precision(tmp_path / "run", "bfloat16")
    with pytest.raises(ArtifactError, match=r"precision was 'torch\.bfloat16' and is now 'torch\.float32'"):
        train(features, tmp_path / "run", small, CPU)
