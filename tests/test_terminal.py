"""Commands as processes: any text, any locale, any argument, interrupts, closed pipes and full memory end in at most a line."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from qf import cli

from conftest import TINY, draw, make_pictures  # isort: skip

QF = [sys.executable, "-m", "qf.cli"]
NASTY = "a \x1b[31mred\x1b[0m \x07\x9b1mbar\u202e [/bold] [red] :dog: 犬 \r\n and more" + " and more" * 200


def qf(folder, *arguments, **environment):
    """(exit code, stdout, stderr) of a command in `folder`."""
    plain = {name: value for name, value in os.environ.items() if name != "QF_WORKSPACE"}
    command = [*QF, *(argument if isinstance(argument, bytes) else str(argument) for argument in arguments)]
    out = subprocess.run(command, cwd=folder, capture_output=True, env=plain | {"OMP_NUM_THREADS": "1"} | environment)
    return out.returncode, out.stdout, out.stderr


def obeyed(output: bytes, encoding: str = "utf-8") -> set[str]:
    """The control characters of an output, without ends of lines."""
    return {
        letter
        for letter in output.decode(encoding)
        if letter in "\u202e\x7f" or ord(letter) < 32 or 128 <= ord(letter) < 160
    } - {"\n"}


def one_line(result, *words):
    """Exit code 1, and nothing but one line of an error that says these words, below lines of progress."""
    code, out, err = result
    lines = err.decode().splitlines()
    assert (code, out) == (1, b"")
    assert lines[-1].startswith("qf: error: ")
    assert not any(line.startswith((" ", "Traceback")) for line in lines)
    for word in words:
        assert word in lines[-1]


@pytest.fixture(scope="module")
def nasty(tmp_path_factory, clip_folder):
    """A workspace whose captions and names of pictures hold all that a terminal obeys."""
    folder = tmp_path_factory.mktemp("nasty [final]")
    name = "b\x1b[32m\x07a\x9br [x].png"
    draw("red", "bar").save(folder / name)
    draw("blue", "pole").save(folder / "p.png")
    with open(folder / "photos.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), (name, NASTY), ("p.png", NASTY)])
    code, _, err = qf(folder, "extract", "photos.csv", "--encoder", clip_folder)
    assert code == 0, err
    return folder


def test_a_hit_is_a_line_without_control_characters(nasty):
    code, out, err = qf(nasty, "search", "a", "red", "bar")
    assert code == 0
    assert not obeyed(out)
    assert not obeyed(err)
    first, second = out.decode().splitlines()
    assert "bold] [red] :dog: 犬 and more" in first
    assert max(len(first), len(second)) < 500


BYTES = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python takes the C locale as it is


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C"}, BYTES, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_json_is_json_and_text_is_text_in_any_locale(nasty, locale):
    code, out, _ = qf(nasty, "search", "a red bar", "--json", **locale)
    hits = [json.loads(line) for line in out.decode().splitlines()]
    assert (code, len(hits)) == (0, 2)
    assert {"".join(hit["captions"]).strip() for hit in hits} == {NASTY.strip()}
    code, out, _ = qf(nasty, "search", "a red bar", **locale)
    assert code == 0
    assert len(out.decode("latin-1").splitlines()) == 2


@pytest.mark.parametrize("name", ["photos [final]", "[/bold] :dog: a\x1b[31mb\u202ec", b"caf\xe9"])
def test_names_are_printed_as_they_are_and_never_obeyed(tmp_path, name, clip_folder):
    make_pictures(tmp_path / (os.fsdecode(name)))
    shown = os.fsdecode(name).replace("\x1b[31m", "").replace("\u202e", "\\u202e").replace("\udce9", "\\xe9")
    folder = name if isinstance(name, bytes) else name.encode()
    code, out, err = qf(tmp_path, "extract", folder + b"/photos.csv", "--encoder", clip_folder, b"-w", folder + b"/w")
    assert code == 0, err
    assert not obeyed(out + err)
    assert f"reading {shown}/photos.csv" in err.decode()
    assert f"{shown}/w/features" in out.decode()
    one_line(qf(tmp_path, "extract", folder + b"/nothing.csv"), f"{shown}/nothing.csv does not exist")
    one_line(qf(tmp_path, "info", folder), shown)
    code, _, err = qf(tmp_path, "search", "x", "--sheet", folder + b".jpg")
    assert code == 2
    assert f"--sheet {shown}.jpg" in err.decode()
    assert qf(tmp_path, folder)[0] == 2


def test_a_live_display_prints_names_as_they_are(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with cli.Display(False) as display:
        display.say("reading [/bold] photos [final]/ :dog: \x1b[35m\u202e")
    assert "reading [/bold] photos [final]/ :dog: \\u202e" in sys.stderr.getvalue()
    assert "\x1b[35m" not in sys.stderr.getvalue()


def test_a_query_that_is_not_utf_8_is_a_query(nasty):
    code, out, err = qf(nasty, "search", b"a red \xff")
    assert code == 0, err
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_at_any_time_is_130_and_at_most_a_line(nasty, number):
    """While Python itself starts, in the midst of imports, at work, and while Python ends."""
    for tenths in (1.5, 2, 3, 5, 8, 12, 16, 20):
        command = [*QF, "search", "a red bar"]
        process = subprocess.Popen(command, cwd=nasty, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(tenths / 10)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        assert process.returncode in (0, 130)
        assert len(err.replace("qf: warning: no trained model yet", "").splitlines()) <= 2
        if process.returncode == 0:  # it had ended before
            break


def test_output_that_nobody_reads_ends_quietly(nasty):
    command = f"{sys.executable} -m qf.cli search 'a red bar' | true"
    out = subprocess.run(["bash", "-c", command + "; echo ${PIPESTATUS[0]}"], cwd=nasty, capture_output=True, text=True)
    assert out.stdout.strip() in ("0", "141")
    assert "rror" not in out.stderr
    with open("/dev/full", "w") as full:
        out = subprocess.run([*QF, "search", "a red bar"], cwd=nasty, stdout=full, stderr=subprocess.PIPE, text=True)
    assert out.returncode == 1
    assert out.stderr.splitlines()[-1].startswith("qf: error: the disk is full")


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--num-query-tokens", 10**9), ("train", "--batch-size", 10**12), ("train", "--lr", "nan"), ("train", "--epochs", "inf"),
        ("extract", "x", "--workers", 10**6), ("extract", "x", "--batch-size", 10**12), ("extract", "x", "--shard-size", 10**15),
        ("extract", "x", "--views", 10**9), ("search", "x", "-k", 10**30), ("eval", "--rerank", 10**30), ("train", "--nproc", 10**6),
    ],
)  # fmt: skip
def test_impossible_sizes_are_wrong_usage(tmp_path, arguments):
    code, out, err = qf(tmp_path, *arguments)
    assert (code, out) == (2, b"")
    (line,) = err.decode().splitlines()
    assert line.startswith("qf: error: ")
    assert str(arguments[-2]) in line


def test_too_little_memory_is_one_line(trained):
    command = f"ulimit -v 3000000; exec {sys.executable} -m qf.cli train -w {trained} --name big --preset base --num-query-tokens 1024 -q"
    out = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert out.returncode == 1
    (line,) = [line for line in out.stderr.splitlines() if not line.startswith("qf: warning")]
    assert line.startswith("qf: error: out of memory; use smaller sizes")


def test_more_epochs_for_a_finished_run_are_had_by_init(trained):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name != "vocab_size"]
    one_line(qf(trained, "train", "-w", trained, *options, "--epochs", 90), "epochs was 60", "--init stage1")
