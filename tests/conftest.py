"""Small real things: pictures, a CLIP and a BERT that transformers saved, an ONNX encoder, features made of them."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

settings.register_profile("qf", deadline=None)  # other work on the machine is no failure
settings.load_profile("qf")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # pytest-xdist runs several

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}
SHAPES = ("square", "bar", "pole")


def draw(colour: str, shape: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """One shape on grey: easy enough to be learnt in a minute."""
    pixels = np.full((size[1], size[0], 3), 128, np.uint8)
    height, width = {"square": (24, 24), "bar": (12, 52), "pole": (40, 12)}[shape]
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    pixels[top : top + height, left : left + width] = COLOURS[colour]
    return Image.fromarray(pixels)


def make_pictures(folder: Path, copies: int = 2) -> Path:
    """A CSV of coloured shapes with two captions each; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for colour in COLOURS:
        for shape in SHAPES:
            for copy in range(copies):
                name = f"{colour}-{shape}-{copy}.png"
                draw(colour, shape, (64 + 8 * copy, 48)).save(folder / name)
                split = "val" if copy == 1 else "train"
                rows += [(name, f"a {colour} {shape}", split), (name, f"the {shape} is {colour}", split)]
    with open(folder / "photos.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "split"), *rows])
    return folder / "photos.csv"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A random CLIP of two layers, saved by transformers, with a tokenizer and a preprocessor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "the", "is", *COLOURS, *SHAPES]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }  # CLIPModel takes projection_dim from here, not from its parts
    text = {
        "vocab_size": len(words),
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = CLIPConfig(
        text_config=sizes | text, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=24
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory) -> Path:
    """A real ONNX encoder: 4 x 4 average pools of each channel as 16 tokens of width 3."""
    import onnx
    from onnx import TensorProto, helper

    folder = tmp_path_factory.mktemp("onnx")
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Reshape", ["pooled", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["last_hidden_state"], perm=[0, 2, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "pools",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", 16, 3])],
        [helper.make_tensor("shape", TensorProto.INT64, [3], [0, 3, 16])],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), folder / "model.onnx"
    )
    config = {
        "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """A random BERT of two layers with its WordPiece tokenizer, saved by transformers."""
    from qf.trainer.tokens import Tokens
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    tokens = Tokens.train([f"a {c} {s} the {s} is {c}" for c in COLOURS for s in SHAPES] * 2, 200)
    tokens.save(folder / "tokenizer.json")
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=40,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def blip2_folder(tmp_path_factory, bert_folder) -> Path:
    """A random Blip2ForImageTextRetrieval as they lie on Hugging Face: its tokenizer has an <image> that has no embedding."""
    from blip2 import random_blip2
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("blip2")
    tokenizer = Tokenizer.from_file(str(bert_folder / "tokenizer.json"))
    random_blip2("Blip2ForImageTextRetrieval", tokenizer.get_vocab_size()).save_pretrained(folder)
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    processor = {"image_processor_type": "BlipImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def blip2_features(pictures, blip2_folder, tmp_path_factory):
    """Features of the pictures through the vision model of that BLIP-2, exact."""
    return run_extract(pictures, blip2_folder, tmp_path_factory.mktemp("exact") / "features", codec="float32")


def run_extract(csv_file: Path, encoder: Path | str, folder: Path, **options):
    """Features of a dataset through the library, on the CPU in float32. `options`: those of extraction, and
    `layer`."""
    from qf.pipeline.config import ExtractOptions
    from qf.pipeline.datasets.read import read
    from qf.pipeline.encoders.load import load_encoder
    from qf.pipeline.extract.extract import extract
    from qf.pipeline.features.reader import Features

    progress = options.pop("progress", lambda status: None)
    frozen = load_encoder(str(encoder), torch.device("cpu"), torch.float32, options.pop("layer", None))
    extract(read(csv_file), str(csv_file), frozen, folder, ExtractOptions(**options), progress)
    return Features(folder)


ENCODER = {
    "id": "made up", "sha256": "0" * 64, "layer": -1, "precision": "float32", "tokens": 1, "width": 1, "joint": None,
    "preprocessing": {},
}  # fmt: skip


def features_manifest(encoder: dict, shards: list, **changes) -> dict:
    """A manifest of features with these shards, which `write_manifest` takes."""
    made = {"path": "nowhere", "kind": "csv", "records": 0, "sha256": "0" * 64}
    fields = {
        "codec": "float16", "format": "arrow", "views": 0, "augmentation": None, "source": made, "shard_size": 1,
        "records": 0, "captions": 0, "splits": {"train": 0, "val": 0, "test": 0}, "rejected": 0, "files": [],
    }  # fmt: skip
    return {"encoder": ENCODER | encoder, **fields, "shards": shards, **changes}


def reseal(path: Path, **changes) -> dict:
    """Change fields of sealed JSON and seal it again, as nobody but qf would. Returns the content."""
    from qf.pipeline.artifacts import read_sealed, write_sealed

    content = read_sealed(path, dict, "") | changes
    write_sealed(path, content)
    return content


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write files, with the folders that their names need; returns the folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def counted_parquet(patch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """Lists that grow: the Parquet files that are opened, and the row groups whose pictures are begun, cell by cell."""
    import pyarrow.parquet as pq

    opened, begun = [], []

    class Counted(pq.ParquetFile):
        def __init__(self, file, **options):
            self.texts = options.get("read_dictionary")
            opened.extend([] if self.texts else [str(file)])
            super().__init__(file, **options)

        def iter_batches(self, *args, row_groups, **options):
            begun.extend([] if self.texts else row_groups)
            return super().iter_batches(*args, row_groups=row_groups, **options)

    patch.setattr(pq, "ParquetFile", Counted)
    return opened, begun


@pytest.fixture(scope="session")
def features(pictures, clip_folder, tmp_path_factory):
    """Features of the pictures through the small CLIP, in shards of 7."""
    return run_extract(pictures, clip_folder, tmp_path_factory.mktemp("work") / "features", shard_size=7, batch_size=4)


TINY = {
    "epochs": 60, "batch_size": 12, "lr": 1e-3, "log_every": 5, "validate_every": 20, "checkpoint_every": 20,
    "vocab_size": 100, "num_query_tokens": 4, "precision": "float32", "warmup_steps": 5, "teach": "none",
}  # fmt: skip


@pytest.fixture(scope="session")
def trained(features):
    """A workspace with a run trained on the pictures, its mix and its index."""
    from qf.pipeline.features.reader import Features
    from qf.retrieval.encode.available import query_encoders
    from qf.retrieval.encode.qformer import Run
    from qf.retrieval.index.build import build_index
    from qf.retrieval.validation import fit_mix
    from qf.trainer.config import Stage1Config
    from qf.trainer.stage1.stage import train

    workspace = features.folder.parent
    cpu = torch.device("cpu")
    train(features, workspace / "runs" / "stage1", Stage1Config(**TINY), cpu)
    features, run = Features(features.folder), Run(workspace / "runs" / "stage1", cpu, "float32")
    encoders = query_encoders(features, run, cpu)
    fit_mix(features, run, encoders, print)
    build_index(encoders, run, features, workspace / "index")
    return workspace


@pytest.fixture(scope="module")
def run(trained):
    """The trained run, opened anew for each file of tests."""
    from qf.retrieval.encode.qformer import Run

    return Run(trained / "runs" / "stage1", torch.device("cpu"), "float32")
