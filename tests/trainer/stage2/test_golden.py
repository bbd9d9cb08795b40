"""Golden texts: the builtin language model after soft prompts that are drawn by NumPy. An upgrade of transformers must not change them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from qf.trainer.decoding import Decoding, generate
from qf.trainer.stage2.language_model import load_language_model

GOLDEN = json.loads((Path(__file__).resolve().parents[2] / "golden" / "generated.json").read_text())


@pytest.fixture(scope="module")
def language_model():
    return load_language_model("builtin", "float32", torch.device("cpu"))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"{golden['how']} {golden['prompt']}")
def test_texts_stay_as_they_were(language_model, golden):
    drawn = np.random.default_rng(0).standard_normal((4, 8, language_model.width)).astype(np.float32)
    prefix = torch.from_numpy(drawn) * language_model.scale
    prompts = [language_model.prompt_ids(golden["prompt"])] * len(prefix)
    found = generate(language_model.decoder(prefix, prompts), language_model.ends, Decoding(**golden["how"]))
    assert [language_model.text_of(ids) for ids in found] == golden["texts"]
