import os
import subprocess
import sys

import pytest
from qf.pipeline.artifacts import (
    check_files,
    described,
    difference,
    is_sealed,
    read_manifest,
    read_sealed,
    remember,
    remembered_sha256,
    write_manifest,
    write_sealed,
)
from qf.pipeline.errors import ArtifactError
from qf.pipeline.features.manifest import FEATURES
from qf.pipeline.files import atomic_file, locked, sha256_file, write_json
from qf.trainer.manifest import RUN

from conftest import ENCODER, features_manifest, reseal  # isort: skip


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    with pytest.raises(OSError, match="full"), atomic_file(path) as file:  # noqa: PT012
        file.write(b"sec")
        raise OSError("full")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.bin"]
    for place in (tmp_path / "nowhere", path):
        with pytest.raises(OSError, match=r"b\.png'$") as caught, atomic_file(place / "b.png"):
            pass
        assert caught.value.filename == str(place / "b.png")


def test_manifests_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(ArtifactError, match=r"does not exist or is empty.*qf extract SOURCE"):
        read_manifest(tmp_path / "features", FEATURES)
    (tmp_path / "shard").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="unfinished"):
        read_manifest(tmp_path, FEATURES)
    entry = {"file": "shard-00000.arrow", "records": 1, "bytes": 2, "sha256": "0" * 64}
    content = features_manifest({}, [entry])
    write_manifest(tmp_path, FEATURES, content)
    assert read_manifest(tmp_path, FEATURES) == {"kind": "features", "version": 2, **content}
    with pytest.raises(ArtifactError, match="holds features, not run; make that with `qf train`"):
        read_manifest(tmp_path, RUN)


IMPOSSIBLE = [
    {"records": -1}, {"records": "1"}, {"records": 1.5}, {"records": None}, {"codec": "float7"}, {"views": 10**9},
    {"source": {"path": "", "kind": "", "records": 0, "sha256": "\ud800"}},
    {"encoder": 3}, {"encoder": ENCODER | {"tokens": 0}}, {"encoder": ENCODER | {"layer": "x"}}, {"splits": {"train": 1}},
    {"shards": [{"file": "../a", "records": 1, "bytes": 1, "sha256": "0" * 64}]}, {"shards": {}}, {"version": 99},
    {"shards": [{"file": "shard-00000.arrow", "records": 1, "bytes": 1, "sha256": "none"}]}, {"files": [{"file": "a"}]},
]  # fmt: skip


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=str)
def test_a_manifest_with_impossible_values_is_refused_even_with_the_right_checksum(tmp_path, change):
    write_manifest(tmp_path, FEATURES, features_manifest({}, []))
    reseal(tmp_path / "manifest.json", **change)
    with pytest.raises(ArtifactError, match=r"make it again with `qf extract SOURCE` and --overwrite"):
        read_manifest(tmp_path, FEATURES)


def test_every_change_of_one_byte_in_sealed_json_is_found(tmp_path):
    path = tmp_path / "plan.json"
    write_sealed(path, {"é": [1, 2.5, None], "name": "\udcff", "checks": {}})
    assert read_sealed(path, dict, "") == {"é": [1, 2.5, None], "name": "\udcff", "checks": {}}
    whole = path.read_bytes()
    for at in range(len(whole)):
        for changed in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[:at] + whole[at + 1 :]):
            path.write_bytes(changed)
            with pytest.raises(
                ArtifactError, match="is damaged or was edited: it is not what its checksum says; again"
            ):
                read_sealed(path, dict, "again")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"checksum": 1}', "\ud800"], ids=range(7))
def test_other_files_are_no_sealed_json(tmp_path, text):
    (tmp_path / "a").write_text(text, errors="surrogatepass")
    assert not is_sealed(tmp_path / "a")


def test_checksums_are_computed_once_and_again_after_a_change(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"sound")
    entry = described(path)
    assert check_files(tmp_path, [entry], "again") == {"a"}
    remember(tmp_path, [entry])
    assert check_files(tmp_path, [entry], "again") == set()
    path.write_bytes(b"wrong")
    with pytest.raises(ArtifactError, match=r"a has changed: its SHA-256 is not the manifest's; again"):
        check_files(tmp_path, [entry], "again")
    path.write_bytes(b"sound")
    (tmp_path / ".checked.json").write_text("damaged")
    assert check_files(tmp_path, [entry], "again") == {"a"}


def test_the_checksum_of_a_file_elsewhere_is_remembered_until_it_changes(tmp_path, monkeypatch):
    folder, file = tmp_path / "index", tmp_path / "weights"
    folder.mkdir()
    file.write_bytes(b"first")
    wanted, computed = sha256_file(file), []

    def counted(path):
        computed.append(path)
        return sha256_file(path)

    monkeypatch.setattr("qf.pipeline.artifacts.sha256_file", counted)
    assert [remembered_sha256(folder, file) for _ in range(3)] == [wanted] * 3
    assert len(computed) == 1
    file.write_bytes(b"other")
    assert remembered_sha256(folder, file) == sha256_file(file) != wanted
    assert len(computed) == 2
    strange = tmp_path / "\udce9"  # bytes that are not UTF-8
    strange.write_bytes(b"first")
    assert remembered_sha256(folder, strange) == wanted
    assert remembered_sha256(folder, file) == sha256_file(file)
    assert len(computed) == 3


def test_the_first_difference_is_named():
    old = {"encoder": {"layer": -2, "sha256": "a"}, "codec": "float16"}
    assert difference(old, old) is None
    assert difference(old, old | {"encoder": {"layer": -1, "sha256": "a"}}) == "encoder.layer was -2 and is now -1"
    assert difference(old, old | {"more": 1}) == "more was None and is now 1"


def test_a_link_in_the_place_of_a_lock_or_of_a_temporary_file_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / ".work.lock").symlink_to(target)
    with pytest.raises(ArtifactError, match=r"\.work\.lock is a link.*delete it"), locked(tmp_path / "work"):
        pass
    (tmp_path / "a.bin.tmp").symlink_to(target)
    with atomic_file(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert target.read_text() == "kept"


def test_two_writers_of_one_file_share_no_temporary_file(tmp_path):
    path = tmp_path / "a"
    with atomic_file(path) as one:
        one.write(b"one, the longer")
        with atomic_file(path) as other:
            other.write(b"other")
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one, the longer"


def test_files_that_were_never_finished_are_swept_by_the_next_writer(tmp_path):
    folder = tmp_path / "work"
    (folder / "checkpoints").mkdir(parents=True)
    left, other = folder / "checkpoints" / ".best.safetensors.0123abcd.tmp", folder / ".mine.tmp"
    for path in (left, other):
        path.touch()
    with locked(folder):
        assert not left.exists()
    assert other.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]


def test_a_folder_has_one_writer_even_after_one_died(tmp_path):
    with locked(tmp_path), pytest.raises(ArtifactError, match="another qf is writing"), locked(tmp_path):
        pass
    code = (
        "import os; from pathlib import Path; from qf.pipeline.files import locked; "
        f"lock = locked(Path({str(tmp_path)!r})); lock.__enter__(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with locked(tmp_path):
        pass


def test_checksums(tmp_path):
    write_json(tmp_path / "a", {"é": [1]})
    assert sha256_file(tmp_path / "a") == __import__("hashlib").sha256((tmp_path / "a").read_bytes()).hexdigest()
