"""`qf verify`: sound artifacts pass, and every change in one is found."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from qf.cli import app, one_line_errors
from qf.pipeline.artifacts import described
from qf.retrieval.verify import verify
from typer.testing import CliRunner

from conftest import reseal  # isort: skip


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def parts(workspace):
    return [workspace / "features", workspace / "runs" / "stage1", workspace / "index"]


def test_artifacts_that_qf_wrote_are_sound(trained):
    for part in parts(trained):
        found = verify(part)
        assert found.problems == []
        assert found.files >= 3
    out = CliRunner().invoke(app, ["verify", str(trained), "--json"])
    assert [result["kind"] for result in json.loads(out.stdout).values()] == ["features", "run", "index"]
    assert out.exit_code == 0


@pytest.mark.parametrize("harm", ["missing", "shorter", "changed"])
def test_harm_to_any_file_of_any_artifact_is_found(copy, harm):
    for part in parts(copy):
        manifest = json.loads((part / "manifest.json").read_text())
        for file in [*manifest.get("shards", []), *manifest["files"]]:
            path = part / file["file"]
            whole = path.read_bytes()
            if not whole and harm != "missing":
                continue
            if harm == "missing":
                path.unlink()
            elif harm == "shorter":
                path.write_bytes(whole[:-1])
            else:
                path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
            (problem,) = verify(part).problems
            assert path.name in problem
            path.write_bytes(whole)
        assert verify(part).problems == []


def test_counts_that_differ_from_the_manifest_are_found(copy):
    features = copy / "features"
    reject = json.dumps({"key": "two\u2028lines", "image": "", "reason": ""}, ensure_ascii=False)
    (features / "rejects.jsonl").write_text(reject + "\n")
    assert "rejects.jsonl has 50 bytes, not 0" in verify(features).problems[0]
    reseal(features / "manifest.json", files=[described(features / "rejects.jsonl")])
    assert verify(features).problems == ["rejected: the manifest says 0, there are 1"]
    (features / "rejects.jsonl").write_text("")
    reseal(features / "manifest.json", files=[described(features / "rejects.jsonl")], captions=7, rejected=1)
    assert verify(features).problems == [
        "captions: the manifest says 7, there are 48",
        "rejected: the manifest says 1, there are 0",
    ]


def test_records_are_counted_shard_by_shard(copy):
    features = copy / "features"
    manifest = json.loads((features / "manifest.json").read_text())
    first, second = manifest["shards"][:2]
    first["records"], second["records"] = first["records"] - 1, second["records"] + 1
    reseal(features / "manifest.json", shards=manifest["shards"])
    (problem,) = verify(features).problems
    assert f"{first['file']} is not as the manifest says: records was {first['records']}" in problem


def test_tokens_that_are_not_finite_are_found(copy):
    """The shard has the right checksum and a wrong content."""
    features = copy / "features"
    manifest = json.loads((features / "manifest.json").read_text())
    path = features / manifest["shards"][0]["file"]
    data = bytearray(path.read_bytes())
    table = pa.ipc.open_file(pa.BufferReader(bytes(data))).read_all()
    first = table.column("tokens").chunk(0).to_numpy_ndarray()[0].tobytes()
    data[data.index(first) : data.index(first) + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    manifest["shards"][0] |= described(path)
    reseal(features / "manifest.json", shards=manifest["shards"])
    (problem,) = verify(features).problems
    assert problem == f"the features of {table.column('key')[0].as_py()!r} are not all finite"


def test_the_command_fails_in_one_line(copy, capfd):
    (copy / "index" / "rows.bin").unlink()
    with pytest.raises(SystemExit) as end, one_line_errors(False):
        app(["verify", str(copy), "-q"], standalone_mode=False)
    assert end.value.code == 1
    err = capfd.readouterr().err
    assert err.startswith("qf: error: ")
    assert "rows.bin is missing (problems in all: 1); rebuild it with `qf index`" in err


def test_a_damaged_mix_is_found_with_its_cure(copy):
    path = copy / "runs" / "stage1" / "mix.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    found = verify(path.parent)
    assert "mix.json is damaged or was edited" in found.problems[0]
    assert found.cure == "`qf eval --fit-mix` refits it"
