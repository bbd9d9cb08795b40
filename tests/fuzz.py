"""Broken and hostile inputs: random damage to datasets and to every file that qf writes, seeded.

    python tests/fuzz.py --count 5000

prints JSON: how many inputs ended in which exit code, and what broke. No exception but QfError may leave a command, no
command may hang, and `qf verify` must find every changed byte of a finished artifact. `test_fuzz.py` runs 200 inputs."""

import argparse
import contextlib
import csv
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from qf import cli
from qf.pipeline.artifacts import CHECKED, is_sealed, read_sealed, write_sealed
from qf.pipeline.features.manifest import TEXTS

SECONDS = 60  # that one command may take
ODD = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x", "../../etc/passwd", "a\0b", "\ud800",
    [], [[]], {}, [None], {"a": {}}, "[" * 2000, "train", "shard-00000.arrow", "0" * 64,
]  # fmt: skip
JSON_FILES = (".json", ".jsonl")


def run(*arguments: str) -> tuple[int, str]:
    """A command in this process: its exit code, and what broke; "" for an end that qf understands."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    argv, sys.argv = sys.argv, ["qf", *arguments]
    code, broke = 0, ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        code, broke = 99, "".join(traceback.format_exception(error)[-6:])
    finally:
        signal.alarm(0)
        sys.argv = argv
    err.flush()
    text = err.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
    lines = [line for line in text.splitlines() if line.startswith("qf: error: ")]
    if not broke and (code not in (0, 1) or "Traceback" in text or (code == 1 and len(lines) != 1)):
        broke = f"exit code {code}: {text[-600:]}"
    return code, broke


# ---- damage ----------------------------------------------------------------------------------------------------------


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file at random. Returns what was done: "byte" where one byte changed."""
    data = path.read_bytes()
    if path.suffix in JSON_FILES and rng.random() < 0.5 and data:
        return change_json(path, rng)
    how = rng.choice(["byte", "byte", "byte", "cut", "empty", "gone", "more", "middle", "noise"])
    at = rng.randrange(len(data)) if data else 0
    match how:
        case "byte" if data:
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        case "cut":
            path.write_bytes(data[:at])
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
        case "middle":
            path.write_bytes(data[:at] + data[at + rng.randrange(1, 100) :])
        case "noise":
            path.write_bytes(data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at + 20 :])
        case _:
            how = "more"
            path.write_bytes(data + rng.randbytes(rng.randrange(1, 600)))
    return how


def change_json(path: Path, rng: random.Random) -> str:
    """Put an impossible value into JSON; sealed JSON is sealed again."""
    sealed = path.suffix == ".json" and is_sealed(path)
    try:
        if sealed:
            value: Any = read_sealed(path, dict, "")
        elif path.suffix == ".jsonl":
            value = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            value = json.loads(path.read_bytes())
    except ValueError:
        return "nothing"
    places = list(containers(value))
    if not places:
        return "nothing"
    holder = rng.choice(places)
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    if isinstance(holder, dict) and rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(ODD)
    if sealed:
        write_sealed(path, value)
    else:
        lines = [json.dumps(part) for part in value] if path.suffix == ".jsonl" else [json.dumps(value)]
        path.write_text("\n".join(lines) + "\n")
    return "value"


def containers(value: Any) -> Any:
    """The lists and objects in a JSON value that hold something."""
    if isinstance(value, dict | list) and value:
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)


# ---- artifacts -------------------------------------------------------------------------------------------------------


def make_workspace(folder: Path, pictures: Path, encoder: str) -> None:
    """Features, a run and an index of the pictures in `folder`; unfinished ones of both kinds in `folder`/part."""
    from qf.pipeline.features.manifest import Planned

    base = ["--encoder", encoder, "--shard-size", "9", "--precision", "float32", "-q"]
    train = train_command(folder)
    for arguments in (["extract", str(pictures), *base, "-w", str(folder)], train):
        code, broke = run(*arguments)
        assert code == 0, broke
    part = folder / "part"
    shutil.copytree(folder / "features", part / "features")
    manifest = read_sealed(part / "features" / "manifest.json", dict, "")
    write_sealed(part / "features" / "plan.json", {name: manifest[name] for name in Planned.__annotations__})
    for shard in manifest["shards"][:-1]:
        write_sealed((part / "features" / shard["file"]).with_suffix(".json"), {**shard, "rejects": []})
    shutil.copytree(folder / "runs", part / "runs")
    for path in (part / "features" / "manifest.json", part / "runs" / "one" / "manifest.json"):
        path.unlink()


def train_command(workspace: Path) -> list[str]:
    return [
        "train", "--name", "one", "-w", str(workspace), "--epochs", "2", "--batch-size", "6", "--checkpoint-every", "2",
        "--num-query-tokens", "2", "--precision", "float32", "--device", "cpu", "-q",
    ]  # fmt: skip


def fuzz_artifact(base: Path, pictures: Path, encoder: str, rng: random.Random) -> tuple[int, str]:
    """Damage one file of a workspace, then use it."""
    with tempfile.TemporaryDirectory() as top:
        work = Path(shutil.copytree(base, Path(top) / "work"))
        files = sorted(path for path in work.rglob("*") if path.is_file())
        weights = [1 / sum(path.parent == other.parent for other in files) for path in files]
        path = rng.choices(files, weights)[0]
        before = path.read_bytes()
        how = damage(path, rng)
        if path.exists() and path.read_bytes() == before:
            how = "nothing"
        part = "part" in path.relative_to(work).parts
        about = f"{path.relative_to(work)} ({how})"
        derived = path.name == CHECKED or path.name.startswith(TEXTS)  # whoever needs it makes it again
        if how in ("byte", "cut", "gone", "noise") and not part and not (how == "gone" and derived):
            code, broke = run("verify", "-w", str(work), "-q")
            if not broke and code != 1 and path.name != "manifest.json" and "checkpoints" not in str(path):
                broke = "verify calls it sound"
            if how == "byte" and not broke and code != 1:
                broke = "verify calls it sound"
            if broke:
                return code, f"verify after {about}: {broke}"
        picture = str(next(pictures.parent.glob("*.png")))
        where = work / "part" if part else work
        extract = ["extract", str(pictures), "--encoder", encoder, "--shard-size", "9", "--precision", "float32", "-q"]
        commands = [
            ["info", "--json"], ["verify", "-q"], ["search", "a red square"], ["search", "a red square", "--rerank", "4"],
            ["search", "--image", picture, "--find", "text"], ["eval", "-q", "--rerank", "3"], ["index", "-q"],
            ["explain", picture, "a red square", "-q"], extract,
        ]  # fmt: skip
        for command in [train_command(where)] if part and rng.random() < 0.6 else [rng.choice(commands)]:
            arguments = command if "-w" in command else [*command, "-w", str(where)]
            code, broke = run(*arguments)
            if broke:
                return code, f"{' '.join(command[:2])} after {about}: {broke}"
        return code, ""


# ---- datasets --------------------------------------------------------------------------------------------------------


def picture(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), (number * 40) % 256, np.uint8)).save(data, "PNG")
    return data.getvalue()


def make_datasets(top: Path) -> list[tuple[Path, list[Path]]]:
    """Small datasets in the layouts people have: (SOURCE, the files that it consists of)."""
    top.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.png" for number in range(6)]
    captions = [f"a thing, number {number}" for number in range(6)]
    made: list[Path] = []

    def folder(name: str) -> Path:
        (top / name).mkdir()
        for number, image in enumerate(names):
            (top / name / image).write_bytes(picture(number))
        return top / name

    for suffix, mark in (("csv", ","), ("tsv", "\t")):
        made.append(folder(suffix) / f"table.{suffix}")
        with open(made[-1], "w", newline="") as file:
            csv.writer(file, delimiter=mark).writerows([("image", "caption"), *zip(names, captions, strict=True)])
    rows = [{"image": name, "caption": [text, text + "!"]} for name, text in zip(names, captions, strict=True)]
    made.append(folder("lines") / "table.jsonl")
    made[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.append(folder("asked") / "table.jsonl")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    answers = {"question": "How many?", "answers": [{"answer": "1"}, {"answer": "one"}], "type": "count"}
    asked = [{"image": name, **answers, "conversations": talk} for name in names]
    made[-1].write_text("".join(json.dumps(row) + "\n" for row in asked))
    made.append(folder("gqa") / "val_balanced_questions.json")
    questions = [{"imageId": name[:-4], "question": "Why?", "answer": "so", "types": {}} for name in names]
    made[-1].write_text(json.dumps(dict(enumerate(questions))))
    made.append(folder("array") / "table.json")
    made[-1].write_text(json.dumps(rows))
    made.append(folder("coco") / "captions_val2017.json")
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    notes = [{"id": number, "image_id": number, "caption": text} for number, text in enumerate(captions)]
    made[-1].write_text(json.dumps({"images": images, "annotations": notes}))
    made.append(folder("karpathy") / "dataset_flickr8k.json")
    sentences = [
        {"filename": n, "split": "train", "sentences": [{"raw": t}]} for n, t in zip(names, captions, strict=True)
    ]
    made[-1].write_text(json.dumps({"images": sentences}))
    made.append(folder("tokens") / "Flickr8k.token.txt")
    made[-1].write_text("".join(f"{name}#0\t{text}\n" for name, text in zip(names, captions, strict=True)))
    made.append(folder("sidecars"))
    for name, text in zip(names, captions, strict=True):
        (made[-1] / name).with_suffix(".txt").write_text(text)
    made.append(folder("pictures"))
    (made[-1] / "a note.txt").write_text("pictures without captions")
    made.append(folder("imagefolder"))
    (made[-1] / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f'{n},"{t}"\n' for n, t in zip(names, captions, strict=True))
    )
    (top / "tars").mkdir()
    made.append(top / "tars" / "00000.tar")
    with tarfile.open(made[-1], "w") as tar:
        for number, text in enumerate(captions):
            for suffix, data in (
                ("png", picture(number)),
                ("txt", text.encode()),
                ("json", json.dumps({"a": 1}).encode()),
            ):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    cells = [{"image": {"bytes": picture(n), "path": name}, "caption": captions[n]} for n, name in enumerate(names)]
    (top / "inside").mkdir()
    made.append(top / "inside" / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(cells), made[-1])
    (top / "saved").mkdir()
    made.append(top / "saved" / "data-00000-of-00001.arrow")
    table = pa.Table.from_pylist(cells)
    with pa.OSFile(str(made[-1]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return [(path, sorted((path if path.is_dir() else path.parent).iterdir())) for path in made]


def fuzz_dataset(
    top: Path, sources: list[tuple[Path, list[Path]]], encoder: str, rng: random.Random
) -> tuple[int, str]:
    """Damage a dataset, put odd things beside it, and extract it."""
    source, files = rng.choice(sources)
    with tempfile.TemporaryDirectory() as scratch:
        folder = files[0].parent
        copy = Path(shutil.copytree(folder, Path(scratch) / folder.name))
        main = [copy / source.name] * 3 if source.is_file() else []
        path = rng.choice([*main, *(copy / file.name for file in files)])
        how = damage(path, rng)
        beside = rng.choice(["", "", "", "fifo", "loop", "folder", "broken", "empty", "name"])
        match beside:
            case "fifo":
                os.mkfifo(copy / rng.choice(["a.png", "b.txt", "metadata.csv", "c.tar"])) if not (
                    copy / "metadata.csv"
                ).exists() else None
            case "loop":
                (copy / "loop").symlink_to(".")
            case "folder":
                (copy / rng.choice(["x.png", "x.parquet", "x.json", "x.tar"])).mkdir()
            case "broken":
                (copy / "y.png").symlink_to("nowhere")
            case "empty":
                (copy / rng.choice(["z.png", "z.csv", "z.tar", "z.parquet", "metadata.jsonl"])).touch()
            case "name":
                (copy / os.fsdecode(b"odd \xff\x1b[31m.png")).write_bytes(picture(1))
        chosen = copy / source.name if source.is_file() and rng.random() < 0.7 else copy
        options = ["--encoder", encoder, "--precision", "float32", "-q", "--max-rejects", rng.choice(["1", "0.05"])]
        options += rng.choice([[], [], ["--allow-uncaptioned"]])
        code, broke = run("extract", str(chosen), *options, "-w", str(Path(scratch) / "out"))
        return code, broke and f"extract {folder.name}, {path.name} ({how}) {beside}: {broke}"


# ---- both ------------------------------------------------------------------------------------------------------------


def fuzz(top: Path, pictures: Path, encoder: str, count: int, seed: int = 0, log: Path | None = None) -> dict[str, Any]:
    """Try `count` inputs, half of them datasets. `pictures` is a table of pictures, as `conftest.make_pictures` draws them.

    Returns the exit codes, counted, and what broke. `log` is told the input that is being tried, for one that kills Python."""
    sources = make_datasets(top / "datasets")
    make_workspace(top / "work", pictures, encoder)
    codes: Counter[str] = Counter()
    broken = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        if log:
            log.write_text(f"{number}\n")
        if number % 2:
            code, broke = fuzz_artifact(top / "work", pictures, encoder, rng)
        else:
            code, broke = fuzz_dataset(top, sources, encoder, rng)
        codes[f"{'artifact' if number % 2 else 'dataset'} {code}"] += 1
        if broke:
            broken.append(f"{number}: {broke}")
    return {"inputs": count, "codes": dict(sorted(codes.items())), "broken": broken}


def main() -> None:
    from conftest import make_pictures

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder", default="builtin")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as top:
        table = make_pictures(Path(top) / "pictures")
        log = Path(tempfile.gettempdir()) / "fuzz.log"
        print(json.dumps(fuzz(Path(top), table, arguments.encoder, arguments.count, arguments.seed, log), indent=2))


if __name__ == "__main__":
    main()
