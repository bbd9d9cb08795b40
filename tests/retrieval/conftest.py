"""A workspace that speaks."""

import shutil

import pytest
from conftest import TINY
from qf.pipeline.config import DeviceOptions
from qf.pipeline.workspace import Workspace
from qf.retrieval.journey import train_run
from qf.trainer.config import Stage2Config, TrainOptions


@pytest.fixture(scope="module")
def workspace(trained, tmp_path_factory):
    """A copy of the trained workspace with a run of stage 2, which the builtin language model speaks for."""
    place = Workspace(tmp_path_factory.mktemp("speaking") / "work")
    shutil.copytree(trained, place.folder)
    fields = {name: value for name, value in TINY.items() if name in Stage2Config.__dataclass_fields__}
    config = Stage2Config(
        **fields | {"llm": "builtin", "epochs": 2, "num_query_tokens": None, "llm_precision": "float32"}
    )
    train_run(place, TrainOptions(stage=2), config, DeviceOptions(device="cpu"), print, lambda line, total: None)
    return place
