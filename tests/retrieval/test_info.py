"""`qf info`: what an artifact is, from its manifest alone."""

import json

import pytest
from qf.pipeline.artifacts import write_sealed
from qf.pipeline.errors import ArtifactError
from qf.retrieval.info import info


def part(trained, kind):
    return trained / {"features": "features", "run": "runs/stage1", "index": "index"}[kind]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("features", ["from", "encoder", "holds", "on disk"]),
        ("run", ["model", "trained", "losses", "features", "best", "mix"]),
        ("index", ["holds", "spaces", "stored", "from"]),
    ],
)
def test_each_kind_of_artifact_is_described_line_by_line(trained, kind, names):
    first, *lines = str(info(part(trained, kind))).splitlines()
    assert first == f"{part(trained, kind)}: {kind}"
    assert [line[2:11].rstrip() for line in lines] == names


def test_the_text_has_the_figures_of_the_artifact(trained):
    assert "24 images (12 train, 12 val), 48 captions" in str(info(part(trained, "features")))
    assert "4 queries, from scratch" in str(info(part(trained, "run")))
    assert "24 images as 96 vectors, 48 texts\n" in str(info(part(trained, "index")))
    assert "the encoder's (1 vector an image) and the run's (4 vectors an image)" in str(info(part(trained, "index")))
    assert "validation R@1 both ways: clip " in str(info(part(trained, "run")))


@pytest.mark.parametrize("kind", ["features", "run", "index"])
def test_the_json_is_the_manifest_and_the_mix_of_a_run(trained, kind):
    manifest = json.loads((part(trained, kind) / "manifest.json").read_text())
    found = info(part(trained, kind)).to_json()
    mix = found.pop("mix", None)
    assert found == {name: manifest[name] for name in manifest if name != "checksum"}
    assert (mix is not None) == (kind == "run")


def test_an_unknown_kind_is_refused(tmp_path):
    write_sealed(tmp_path / "manifest.json", {"kind": "recipes", "version": 2})
    with pytest.raises(ArtifactError, match="'recipes', which this version of qf does not know"):
        info(tmp_path)


def test_a_manifest_that_lacks_a_field_of_its_kind_is_refused(tmp_path):
    write_sealed(tmp_path / "manifest.json", {"kind": "index", "version": 2, "images": 3})
    with pytest.raises(ArtifactError, match="is not what this version of qf writes: Object missing required field"):
        info(tmp_path)
