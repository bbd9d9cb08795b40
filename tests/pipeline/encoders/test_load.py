"""Token features against transformers' own hidden states, through the code path of any Hugging Face model."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose
from qf.pipeline.artifacts import difference
from qf.pipeline.encoders.load import load_encoder
from qf.pipeline.encoders.text import TextModel, has_text_model
from qf.pipeline.errors import EncoderError
from qf.pipeline.files import sha256_file

from conftest import draw  # isort: skip

CPU = torch.device("cpu")
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 14,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LANGUAGE = {
    "model_type": "opt", "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 32, "num_attention_heads": 2,
    "word_embed_proj_dim": 32, "max_position_embeddings": 16,
}  # fmt: skip
SQUARE = {"do_center_crop": False, "size": {"height": 32, "width": 32}, "image_processor_type": "SiglipImageProcessor"}


def build(name):
    """A random model of transformers, every parameter drawn, so that no bias or class token is zero."""
    torch.manual_seed(0)
    qformer = {
        "vocab_size": 20,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    if name.startswith("Blip2") and name != "Blip2VisionModel":
        config = transformers.Blip2Config(
            vision_config=VISION,
            qformer_config=qformer,
            text_config=LANGUAGE,
            num_query_tokens=4,
            image_text_hidden_size=16,
        )
    elif name == "Blip2VisionModel":
        config = transformers.Blip2VisionConfig(**VISION)
    elif name in ("CLIPModel", "MetaClip2Model"):
        config = getattr(transformers, name.replace("Model", "Config"))(
            text_config=TEXT | {"projection_dim": 24}, vision_config=VISION | {"projection_dim": 24}, projection_dim=24
        )
    elif name == "SiglipModel":
        config = transformers.SiglipConfig(text_config=TEXT | {"projection_size": 32}, vision_config=VISION)
    elif name.startswith(("CLIPVision", "MetaClip2Vision", "SiglipVision")):
        config = getattr(transformers, name.split("Model")[0] + "Config")(**VISION)
    else:
        registers = {"num_register_tokens": 2} if name != "Dinov2Model" else {}
        config = getattr(transformers, name.replace("Model", "Config"))(**VISION | registers)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, clip_folder):
    """Folder of each model, saved when first asked for, with a processor's and a tokenizer's files."""
    made = {}

    def folder(name, **saving):
        key = (name, *saving.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(made[key], **saving)
            (made[key] / "preprocessor_config.json").write_text(json.dumps(SQUARE))
            for file in clip_folder.glob("*token*.json"):
                shutil.copy(file, made[key])
        return made[key]

    return folder


def normalised(pixels):
    return (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
# the class, its default layer, tokens, width of the joint space
MODELS = {
    "CLIPModel": (-2, 17, 24),
    "CLIPVisionModel": (-2, 17, None),
    "CLIPVisionModelWithProjection": (-2, 17, 512),
    "MetaClip2Model": (-2, 17, 24),
    "MetaClip2VisionModel": (-2, 17, None),
    "SiglipModel": (-2, 16, 32),
    "SiglipVisionModel": (-2, 16, 32),
    "Dinov2Model": (-2, 17, None),
    "Dinov2WithRegistersModel": (-2, 19, None),
    "DINOv3ViTModel": (-2, 19, None),
    "Blip2Model": (-1, 17, None),
    "Blip2ForConditionalGeneration": (-1, 17, None),
    "Blip2ForImageTextRetrieval": (-1, 17, None),
    "Blip2VisionModel": (-1, 17, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_models_own_hidden_states(folders, name):
    folder, (default, count, joint) = folders(name), MODELS[name]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    vision = model if name.endswith(("VisionModel", "WithProjection")) or "DIN" in name.upper() else model.vision_model
    values = normalised(PIXELS)
    with torch.no_grad():
        out = vision(pixel_values=values, output_hidden_states=True)
    for layer in (None, -4, 1, -1):
        encoder = load_encoder(str(folder), CPU, torch.float32, layer)
        tokens, pooled = encoder.encode(PIXELS)
        chosen = default if layer is None else layer
        assert_allclose(tokens, out.hidden_states[chosen].numpy(), atol=1e-5)
        identity = encoder.identity
        assert [identity[k] for k in ("layer", "tokens", "width", "joint")] == [chosen, count, 32, joint]
        assert identity["precision"] == "float32"
        assert (pooled is None) == (joint is None)
        if joint:
            with torch.no_grad():
                if name.endswith("WithProjection"):
                    embeds = out.image_embeds
                elif name == "SiglipVisionModel":
                    embeds = out.pooler_output
                else:
                    embeds = model.get_image_features(values).pooler_output
            assert_allclose(pooled, torch.nn.functional.normalize(embeds, dim=-1).numpy(), atol=1e-5)
    if "clip" not in name.lower():  # its last_hidden_state comes before the norm; the others' after it
        norm = next(getattr(vision, n) for n in ("post_layernorm", "layernorm", "norm") if hasattr(vision, n))
        with torch.no_grad():
            assert_allclose(norm(tokens).numpy(), out.last_hidden_state.numpy(), atol=1e-5)


def test_layers_that_nothing_needs_are_not_computed(folders):
    assert len(load_encoder(str(folders("Dinov2Model")), CPU, torch.float32).model.encoder.layer) == 2
    assert len(load_encoder(str(folders("SiglipModel")), CPU, torch.float32).model.encoder.layers) == 3


@pytest.mark.parametrize("name", ["CLIPModel", "Blip2ForImageTextRetrieval"])
def test_sharded_weights(folders, name):
    whole, parts = folders(name), folders(name, max_shard_size="40KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    a, b = (load_encoder(str(folder), CPU, torch.float32) for folder in (whole, parts))
    assert_allclose(a.encode(PIXELS)[0], b.encode(PIXELS)[0])
    assert a.identity["sha256"] != b.identity["sha256"]


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "Dinov2Model", "DINOv3ViTModel", "Blip2VisionModel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_close_and_named(folders, name, dtype):
    exact, rough = (load_encoder(str(folders(name)), CPU, kind) for kind in (torch.float32, dtype))
    for a, b in zip(exact.encode(PIXELS), rough.encode(PIXELS), strict=True):
        if a is not None:
            assert b.dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.999
    assert difference(exact.identity, rough.identity) == f"precision was 'float32' and is now '{str(dtype)[6:]}'"


def test_the_processor_may_lie_in_processor_config(folders, tmp_path):
    folder = shutil.copytree(folders("SiglipModel"), tmp_path / "nested")
    nested = SQUARE | {"image_mean": [0.1, 0.2, 0.3]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested, "processor_class": "Any"}))
    assert load_encoder(str(folder), CPU, torch.float32).preprocessing.mean == (0.1, 0.2, 0.3)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Any"}))
    assert load_encoder(str(folder), CPU, torch.float32).preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("layer", "chosen"), [(None, -2), (-1, -1), (1, 1)])
def test_clip_tokens_and_pooled(clip_folder, layer, chosen):
    from transformers import AutoImageProcessor, CLIPModel

    encoder = load_encoder(str(clip_folder), CPU, torch.float32, layer)
    pictures = [draw("red", "bar"), draw("blue", "pole", (90, 130))]
    tokens, pooled = encoder.encode(np.stack([encoder.preprocessing(picture) for picture in pictures]))
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), AutoImageProcessor.from_pretrained(clip_folder)
    inputs = processor(pictures, return_tensors="pt")
    with torch.no_grad():
        hidden = model.vision_model(**inputs, output_hidden_states=True).hidden_states
        embeds = model.get_image_features(**inputs)
    embeds = getattr(embeds, "pooler_output", embeds)
    assert_allclose(tokens, hidden[chosen].numpy(), atol=1e-5)
    assert_allclose(pooled, torch.nn.functional.normalize(embeds, dim=-1).numpy(), atol=1e-5)
    identity = encoder.identity
    assert (identity["tokens"], identity["width"], identity["joint"], identity["layer"]) == (17, 32, 24, chosen)
    assert identity["sha256"] == sha256_file(clip_folder / "model.safetensors")


@pytest.mark.parametrize("name", ["CLIPModel", "MetaClip2Model", "SiglipModel"])
def test_the_text_model_gives_the_models_own_text_embeddings(folders, name):
    folder = folders(name)
    texts = ["a red bar", "the blue square is a pole", "a " * 40]
    got = TextModel(load_encoder(str(folder), CPU, torch.float32).identity, CPU).encode(texts, batch_size=2)
    siglip = name == "SiglipModel"  # learnt on padded texts, the padding unmasked
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length" if siglip else True, truncation=True, max_length=16, return_tensors="pt"
    )
    model = getattr(transformers, name).from_pretrained(folder).eval()
    with torch.no_grad():
        out = model.get_text_features(inputs["input_ids"], None if siglip else inputs["attention_mask"]).pooler_output
    assert_allclose(got, torch.nn.functional.normalize(out, dim=-1).numpy(), atol=1e-5)


def test_a_vision_model_alone_has_no_text_model(folders, onnx_folder):
    for folder in (folders("CLIPVisionModelWithProjection"), folders("Dinov2Model"), onnx_folder):
        identity = load_encoder(str(folder), CPU, torch.float32).identity
        assert not has_text_model(identity)
        with pytest.raises(EncoderError, match="has no text model; train a model first: qf train"):
            TextModel(identity, CPU)
    assert has_text_model(load_encoder(str(folders("SiglipModel")), CPU, torch.float32).identity)


def test_a_tokenizer_that_cannot_be_loaded_is_named(folders, tmp_path):
    folder = shutil.copytree(folders("SiglipModel"), tmp_path / "mute")
    for file in folder.glob("*token*.json"):
        file.unlink()
    with pytest.raises(EncoderError, match="the tokenizer of encoder .* cannot be loaded: .*sentencepiece") as caught:
        TextModel(load_encoder(str(folder), CPU, torch.float32).identity, CPU)
    assert "\n" not in str(caught.value)


def test_onnx_tokens(onnx_folder):
    encoder = load_encoder(str(onnx_folder), CPU, torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    tokens, pooled = encoder.encode(pixels)
    values = (pixels / 255 - 0.5) / 0.5
    naive = values.reshape(2, 3, 4, 8, 4, 8).mean((3, 5)).reshape(2, 3, 16).transpose(0, 2, 1)
    assert_allclose(tokens, naive, atol=1e-5)
    assert pooled is None
    assert (encoder.identity["tokens"], encoder.identity["width"], encoder.identity["joint"]) == (16, 3, None)
    with pytest.raises(EncoderError, match="last layer only"):
        load_encoder(str(onnx_folder), CPU, torch.float32, -2)
    with pytest.raises(EncoderError, match="text model"):
        TextModel(encoder.identity, CPU)


def test_what_is_no_encoder_says_so(clip_folder, tmp_path):
    with pytest.raises(EncoderError, match="no such folder"):
        load_encoder(str(tmp_path / "nothing"), CPU, torch.float32)
    with pytest.raises(EncoderError, match=r"is no encoder: config\.json cannot be read"):
        load_encoder(str(tmp_path), CPU, torch.float32)
    with pytest.raises(EncoderError, match="cannot be fetched from Hugging Face.*--encoder builtin"):
        load_encoder("nobody/nothing", CPU, torch.float32)
    with pytest.raises(EncoderError, match="--layer 9: .* has 3 layers; use -4 to 3"):
        load_encoder(str(clip_folder), CPU, torch.float32, 9)


TALL = {**SQUARE, "size": {"height": 64, "width": 32}}
WIDE = {"model_type": "clip", "vision_config": {**VISION, "hidden_size": 64}}
SHARDS = '{"weight_map": {"a": "model.safetensors", "b": "model-00002-of-2.safetensors"}}'
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 300\n"
BROKEN = {  # files of a CLIP folder replaced (None: taken away), and what the error says
    "another kind": ({"config.json": '{"model_type": "gpt2"}'}, "of type 'gpt2'; qf takes ONNX exports and .* clip, .*dinov3_vit"),
    "text only": ({"config.json": '{"model_type": "clip_text_model"}'}, "of type 'clip_text_model'; qf takes"),
    "naflex": ({"config.json": '{"model_type": "siglip2"}'}, "NaFlex .* fixed resolution"),
    "no json": ({"config.json": "{"}, r"config\.json cannot be read"),
    "no object": ({"config.json": "[]"}, r"config\.json is not a JSON object"),
    "no text": ({"config.json": b"\xff\xfe\x00"}, r"config\.json cannot be read"),
    "no processor": ({"preprocessor_config.json": None}, r"preprocessor_config\.json cannot be read"),
    "processor broken": ({"preprocessor_config.json": "[1"}, r"preprocessor_config\.json cannot be read"),
    "another size": ({"preprocessor_config.json": json.dumps(TALL)}, "does not take the 64x32 pixels"),
    "no weights": ({"model.safetensors": None}, r"holds no model\.safetensors .*; copy it from the model's page"),
    "pickled weights": ({"model.safetensors": None, "pytorch_model.bin": "x"}, r"qf reads no pickle such as pytorch_model\.bin"),
    "a shard less": ({"model.safetensors.index.json": SHARDS}, r"has no model-00002-of-2\.safetensors, which model\.safetensors\.index"),
    "pointer as weights": ({"model.safetensors": POINTER}, r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
    "pointer as tokenizer": ({"tokenizer.json": POINTER}, r"tokenizer\.json is a Git LFS pointer.*git lfs pull"),
    "strange processor": ({"preprocessor_config.json": '{"image_processor_type": 5}'}, "5 is not an image processor"),
    "strange kind": ({"config.json": '{"model_type": []}'}, "qf takes ONNX exports and"),
    "deep": ({"config.json": "[" * 100_000}, r"config\.json cannot be read"),
    "strange sizes": ({"config.json": '{"model_type": "clip", "vision_config": 3}'}, "cannot be loaded: its config.json does not"),
    "weights broken": ({"model.safetensors": b"no weights"}, "cannot be loaded"),
    "weights of another": ({"config.json": json.dumps({"model_type": "dinov2", **VISION})}, "lacks .* weights of Dinov2Model, such as"),
    "weights of another size": ({"config.json": json.dumps(WIDE)}, r"weights are not of the sizes in config\.json, such as vis"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_told_in_one_line(clip_folder, tmp_path, name):
    files, message = BROKEN[name]
    folder = shutil.copytree(clip_folder, tmp_path / "broken")
    for file, content in files.items():
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EncoderError, match=message) as caught:
        load_encoder(str(folder), CPU, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_broken_onnx_model_is_told(onnx_folder, tmp_path):
    folder = shutil.copytree(onnx_folder, tmp_path / "broken")
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(EncoderError, match=r"model\.onnx cannot be loaded"):
        load_encoder(str(folder), CPU, torch.float32)


def test_other_weights_under_the_same_name_are_refused(clip_folder):
    identity = load_encoder(str(clip_folder), CPU, torch.float32).identity
    with pytest.raises(EncoderError, match="no longer the one that made the features"):
        TextModel(identity | {"sha256": "0"}, CPU)


def test_external_weights_of_an_onnx_model_count(onnx_folder, tmp_path):
    """Exports may keep their weights in files beside the model, under any names: other weights are another encoder."""
    import onnx
    from onnx import TensorProto, helper

    def made(name, weight, location):
        folder = shutil.copytree(onnx_folder, tmp_path / name)
        model = onnx.load(folder / "model.onnx")
        scale = helper.make_tensor("scale", TensorProto.FLOAT, [3], np.full(3, weight, np.float32).tobytes(), raw=True)
        model.graph.node[-1].output[0] = "plain"
        model.graph.node.append(helper.make_node("Mul", ["plain", "scale"], ["last_hidden_state"]))
        model.graph.initializer.append(scale)
        one = location is not None
        onnx.save_model(
            model, folder / "model.onnx", save_as_external_data=True, all_tensors_to_one_file=one, location=location,
            size_threshold=4,
        )  # fmt: skip
        return load_encoder(str(folder), CPU, torch.float32)

    hashes = set()
    for location in ("model.onnx.data", "weights.bin", None):
        for weight in (1.0, 2.0):
            encoder = made(f"{location}-{weight}", weight, location)
            assert float(encoder.encode(np.full((1, 3, 32, 32), 255, np.uint8))[0][0, 0, 0]) == weight
            hashes.add(encoder.identity["sha256"])
    assert len(hashes) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"batch": 2},
            "does not take 1 x 3 x 32 x 32 float32 pixels, as its preprocessor_config.json and --batch-size",
        ),
        ({"kind": 10}, "does not take 1 x 3 x 32 x 32 float32 pixels"),  # float16
        ({"channels": 1}, "does not take 1 x 3 x 32 x 32 float32 pixels"),
        ({"more": True}, "does not take 1 x 3 x 32 x 32 float32 pixels"),
        ({"joint": True}, r"image_embeds has shape \(1, 3, 32, 32\), not \(batch, width\)"),
    ],
)
def test_onnx_models_that_take_something_else_are_refused(onnx_folder, tmp_path, change, message):
    import onnx
    from onnx import TensorProto, helper

    folder = shutil.copytree(onnx_folder, tmp_path / "other")
    kind = change.get("kind", TensorProto.FLOAT)
    shape = [change.get("batch", "batch"), change.get("channels", 3), 32, 32]
    inputs, outputs = [helper.make_tensor_value_info("pixel_values", kind, shape)], []
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "shape"], ["last_hidden_state"]),
        helper.make_node("Identity", ["pixel_values"], ["image_embeds"]),
    ]
    outputs.append(helper.make_tensor_value_info("last_hidden_state", kind, [shape[0], shape[1], 1024]))
    if "joint" in change:
        outputs.append(helper.make_tensor_value_info("image_embeds", kind, shape))
    if "more" in change:
        inputs.append(helper.make_tensor_value_info("mask", kind, [shape[0]]))
        outputs.append(helper.make_tensor_value_info("seen", kind, [shape[0]]))
        nodes.append(helper.make_node("Identity", ["mask"], ["seen"]))
    sizes = helper.make_tensor("shape", TensorProto.INT64, [3], [0, shape[1], 1024])
    graph = helper.make_graph(
        nodes[: None if "joint" in change or "more" in change else 1], "other", inputs, outputs, [sizes]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(EncoderError, match=message):
        load_encoder(str(folder), CPU, torch.float32)
