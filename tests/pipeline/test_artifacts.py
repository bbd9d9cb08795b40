import json
import os
import subprocess
import sys

import pytest
from qf.pipeline.artifacts import difference, read_manifest, write_manifest
from qf.pipeline.errors import ArtifactError
from qf.pipeline.features.manifest import FEATURES
from qf.pipeline.files import atomic_file, locked, sha256_file, write_json
from qf.trainer.manifest import RUN


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
    with pytest.raises(FileNotFoundError) as caught, atomic_file(tmp_path / "nowhere" / "b.png"):
        pass
    assert caught.value.filename == str(tmp_path / "nowhere" / "b.png")


def test_manifests_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(ArtifactError, match=r"does not exist or is empty.*qf extract SOURCE"):
        read_manifest(tmp_path / "features", FEATURES)
    (tmp_path / "shard").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="unfinished"):
        read_manifest(tmp_path, FEATURES)
    content = {key: kind() for key, kind in RUN.fields.items()}
    write_manifest(tmp_path, RUN, content)
    assert read_manifest(tmp_path, RUN) == {"kind": "run", "version": 1, **content}
    with pytest.raises(ArtifactError, match="holds run, not features"):
        read_manifest(tmp_path, FEATURES)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_manifest(tmp_path)
    broken = [content | {"files": [{"file": "a"}]}, content | {"model": 3}, {**content, "sha256": None}]
    edited = [json.dumps({"kind": "run", "version": 1, **values}) for values in broken]
    for text in ('{"kind": "run", "version": 99}', '{"kind": "run", "version": 1}', "[]", *edited):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ArtifactError, match="not a manifest that this version"):
            read_manifest(tmp_path, RUN)


def test_the_first_difference_is_named():
    old = {"encoder": {"layer": -2, "sha256": "a"}, "codec": "float16"}
    assert difference(old, old) is None
    assert difference(old, old | {"encoder": {"layer": -1, "sha256": "a"}}) == "encoder.layer was -2 and is now -1"
    assert difference(old, old | {"more": 1}) == "more was None and is now 1"


def test_a_folder_has_one_writer_even_after_one_died(tmp_path):
    with locked(tmp_path), pytest.raises(ArtifactError, match="another qf is writing"), locked(tmp_path):
        pass
    code = (
        "import os; from pathlib import Path; from qf.pipeline.artifacts import locked; "
        f"locked(Path({str(tmp_path)!r})).__enter__(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with locked(tmp_path):
        pass


def test_checksums(tmp_path):
    write_json(tmp_path / "a", {"é": [1]})
    assert sha256_file(tmp_path / "a") == __import__("hashlib").sha256((tmp_path / "a").read_bytes()).hexdigest()
