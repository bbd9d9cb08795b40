"""The evaluation protocol against a plain count, pair by pair."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from qf.pipeline.encoders.text import TextModel
from qf.pipeline.errors import QfError, UsageError
from qf.pipeline.features.codecs import decode
from qf.pipeline.features.reader import Features
from qf.retrieval.config import EvalOptions
from qf.retrieval.encode.available import query_encoders
from qf.retrieval.encode.qformer import Run
from qf.retrieval.evaluate import evaluate_retrieval
from qf.retrieval.mix_file import WAYS, Mix, Scorer, Weights

CPU = torch.device("cpu")


def test_every_scorer_agrees_with_a_plain_count(trained, run):
    features = Features(trained / "features")
    result = evaluate_retrieval(features, "val", query_encoders(features, run, CPU), rerank_at=[3])
    rows = features.rows("val")
    texts = [(n, c) for n, row in enumerate(rows) for c in features.captions[row]]
    assert (result.images, result.texts) == (len(rows), len(texts))

    def r_at_1(score):
        """The share of texts whose own image scores more than every other image, in percent."""
        found = [all(score(own, t) > score(i, t) for i in range(len(rows)) if i != own) for own, t in texts]
        return round(100 * sum(found) / len(texts), 2)

    pooled, text_model = features.pooled[rows], TextModel(features.encoder, CPU)
    vectors = dict(zip({t for _, t in texts}, text_model.encode(list({t for _, t in texts})), strict=True))
    assert result.rows["clip"]["text_to_image_R@1"] == r_at_1(lambda i, t: float(pooled[i] @ vectors[t]))

    model, tokens = run.embedder.model, run.embedder.tokens
    with torch.no_grad():
        images = [model.encode_image(decode(features.read(rows[i : i + 1]))) for i in range(len(rows))]
        encoded = {t: tokens([t], 32) for _, t in texts}
        itc = {
            (i, t): float((images[i].features[0] @ model.encode_text(*encoded[t]).features[0]).max())
            for i in range(len(rows))
            for t in encoded
        }
        assert result.rows["itc"]["text_to_image_R@1"] == r_at_1(lambda i, t: itc[i, t])

        def matched(i, t):
            best = sorted(range(len(rows)), key=lambda j: -itc[j, t])[:3]
            if i not in best:
                return itc[i, t] - 1000
            return itc[i, t] + float(model.match(images[i], torch.tensor([0]), *encoded[t])[0, 1])

        assert result.rows["itc+itm@3"]["text_to_image_R@1"] == pytest.approx(r_at_1(matched), abs=4.2)


def test_a_split_without_images_is_named(trained, run):
    with pytest.raises(
        QfError, match=r"no images with captions in the split test \(images: 12 train, 12 val\); choose another --split"
    ):
        evaluate_retrieval(Features(trained / "features"), "test", [run], rerank_at=[3])


def test_the_encoders_own_row_comes_first_and_is_never_reranked(trained, run):
    features = Features(trained / "features")
    alone = evaluate_retrieval(features, "val", query_encoders(features, None, CPU), rerank_at=[3])
    parts = ["intervals", "gains", "milliseconds"]
    assert list(alone.to_json()) == ["split", "images", "texts", "clip", *parts]
    both = evaluate_retrieval(features, "val", query_encoders(features, run, CPU), rerank_at=[3])
    assert list(both.to_json()) == ["split", "images", "texts", "clip", "itc", "itc+itm@3", *parts, "rerank_seconds"]


def test_a_matching_head_that_was_never_trained_gets_no_row(trained):
    run = Run(trained / "runs" / "stage1", CPU, "float32")
    torch.nn.init.zeros_(run.embedder.model.itm_head.bias)  # as before the first step that trains the head
    features = Features(trained / "features")
    result = evaluate_retrieval(features, "val", query_encoders(features, run, CPU), rerank_at=[3])
    assert list(result.rows) == ["clip", "itc"]


def test_the_mix_has_a_row_and_one_for_each_way_to_rank(trained, run):
    features = Features(trained / "features")
    encoders = query_encoders(features, run, CPU)
    mix = Mix(Scorer(Weights(1.0, 0.0, 0.0), Weights(0.0, 1.0, 1.0)), {})
    result = evaluate_retrieval(features, "val", encoders, [3], mix)
    assert list(result.rows) == ["clip", "itc", "itc+itm@3", "mix", "mix+itm@3"]
    rows = {name: list(row.values()) for name, row in result.rows.items()}
    assert rows["mix"] == rows["clip"][:3] + rows["itc"][3:]
    assert rows["mix+itm@3"] == rows["clip"][:3] + rows["itc+itm@3"][3:]
    assert list(evaluate_retrieval(features, "val", encoders, [], mix).rows) == ["clip", "itc", "mix"]


def test_several_numbers_of_candidates_have_a_row_each(trained, run):
    features = Features(trained / "features")
    encoders = query_encoders(features, run, CPU)
    several = evaluate_retrieval(features, "val", encoders, [3, 5])
    assert list(several.rows) == ["clip", "itc", "itc+itm@3", "itc+itm@5"]
    for k in (3, 5):
        alone = evaluate_retrieval(features, "val", encoders, [k])
        assert several.rows[f"itc+itm@{k}"] == alone.rows[f"itc+itm@{k}"]
    times = several.to_json()["milliseconds"]
    for way in WAYS:
        assert 0 < times["itc"][way] < times["itc+itm@3"][way] < times["itc+itm@5"][way]


def test_each_interval_holds_its_recall_and_each_gain_is_a_difference(trained, run):
    features = Features(trained / "features")
    mix = Mix(Scorer(Weights(1.0, 0.0, 0.0), Weights(1.0, 0.0, 0.0)), {})
    result = evaluate_retrieval(features, "val", query_encoders(features, run, CPU), [3], mix)
    found = result.to_json()
    assert set(found["intervals"]) == set(found["milliseconds"]) == {*found["gains"], "clip"} == set(result.rows)
    for name, row in result.rows.items():
        for at_1 in ("text_to_image_R@1", "image_to_text_R@1"):
            low, high = found["intervals"][name][at_1]
            assert 0 <= low <= row[at_1] <= high <= 100
            if name != "clip":
                gain = found["gains"][name][at_1]
                assert gain["gain"] == pytest.approx(row[at_1] - result.rows["clip"][at_1], abs=0.011)
                assert gain["interval"][0] <= gain["gain"] <= gain["interval"][1]
    assert found["gains"]["mix"]["text_to_image_R@1"] == {"gain": 0.0, "interval": (0.0, 0.0)}
    assert evaluate_retrieval(features, "val", [run], []).to_json()["gains"] == {}


def test_the_table_has_every_scorer_in_both_directions_and_80_columns(trained, run):
    features = Features(trained / "features")
    mix = Mix(Scorer(Weights(1.0, 0.0, 0.0), Weights(0.0, 1.0, 1.0)), {})
    lines = str(evaluate_retrieval(features, "val", query_encoders(features, run, CPU), [3, 16], mix)).splitlines()
    assert lines[0].startswith("val: 12 images, 24 texts; recall in %, with 95 % intervals; ms a query")
    names = [line[:15].strip() for line in lines[4:] if line.strip()]
    scorers = ["encoder", "ITC", "ITC+ITM@3", "ITC+ITM@16", "MIX", "MIX+ITM@3", "MIX+ITM@16"]
    assert names == ["text to image", *scorers, "image to text", *scorers]
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_drawings_are_made_where_they_are_asked_for(trained, run, tmp_path):
    features = Features(trained / "features")
    files = {"plot": tmp_path / "plot.png", "failures": tmp_path / "failures.png"}
    result = evaluate_retrieval(features, "val", query_encoders(features, run, CPU), [3], **files)
    assert {name: result.to_json()[name] for name in files} == {name: str(file) for name, file in files.items()}
    assert str(result).endswith(f"plot      {files['plot']}\nfailures  {files['failures']}")
    for file in files.values():
        with Image.open(file) as image:
            assert image.width > 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plot": Path("a.jpg")}, "--plot a.jpg: the drawing is a PNG"),
        ({"failures": Path("a")}, "--failures a: the drawing is a PNG"),
        ({"failures": Path("a.png"), "task": "vqa"}, "--failures draws retrieval; it does not go with --task vqa"),
        ({"task": "talk"}, "--task talk: use retrieval, caption, vqa"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(options, message):
    with pytest.raises(UsageError, match=message):
        EvalOptions(**options).check()


def test_the_numbers_of_candidates_are_ascending_and_0_is_none():
    assert EvalOptions().rerank_at == [16]
    assert EvalOptions(rerank=[0]).rerank_at == []
    assert EvalOptions(rerank=[32, 4, 32, 0]).rerank_at == [4, 32]
