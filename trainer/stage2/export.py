"""Weights of stage 2 out: a folder for transformers' Blip2ForConditionalGeneration, or one file under LAVIS's names."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...pipeline.artifacts import CONFIG, read_manifest
from ...pipeline.errors import ArtifactError
from ...pipeline.files import locked, write_json
from ..manifest import RUN
from ..weights.export import Exported, check_place, lavis_file, save_tensors, vision_part
from ..weights.names import HUGGINGFACE_NAMES, LAVIS_NAMES, PROJECTION, QFORMER_SIZES
from .language_model import LanguageModel, load_language_model
from .model import VisualPrompt, open_soft_prompt

IMAGE = "<image>"  # transformers replaces this word's embeddings by the soft prompt
PARTIAL = ".partial"  # in the folder, until all files are there
LAVIS_PROJECTION = {False: "opt_proj.", True: "t5_proj."}  # of decoder-only and of encoder-decoder models


@dataclass(frozen=True)
class Exported2(Exported):
    """The files of an export of stage 2."""

    language_model: str  # its id
    with_language_model: bool

    def __str__(self) -> str:
        parts = "Q-Former, projection"
        parts += ", vision model" if self.vision else ""
        parts += ", language model" if self.with_language_model else ""
        line = self.line(parts)
        if self.layout == "huggingface" and not self.with_language_model:
            line += (
                f"\n          without the language model: transformers starts one at random; put {self.language_model} in its place "
                "(model.language_model = …), or export again with --with-llm"
            )
        return line


def export(run: Path, out: Path, layout: str, with_llm: bool = False, overwrite: bool = False) -> Exported2:
    """Write the Q-Former's query side and the projection of a run of stage 2 to `out`; as `weights.export.export`.

    `with_llm` adds the language model to the layout `huggingface`. ArtifactError also if the Q-Former reads questions, which neither
    layout holds, or if the language model's vocabulary has no room for a placeholder; TrainingError if it cannot be loaded."""
    check_place(out, layout, overwrite)
    manifest = read_manifest(run, RUN)
    model = open_soft_prompt(run, manifest)
    if model.reads_text:
        raise ArtifactError(
            f"{run} was trained with --instruct: its Q-Former reads questions, which BLIP-2's layouts do not hold"
        )
    if with_llm and layout == "lavis":
        raise ArtifactError("LAVIS keeps the language model in a folder of its own; leave --with-llm out")
    known = manifest["language_model"]
    language_model = load_language_model(known["id"], known["precision"], torch.device("cpu"))
    if layout == "lavis":
        file = lavis_file(out)
        projection = LAVIS_PROJECTION[language_model.encoder_decoder]
        renamed = {
            projection + key.removeprefix(PROJECTION) if key.startswith(PROJECTION) else LAVIS_NAMES.theirs(key): value
            for key, value in _ours(model).items()
        }
        with locked(file):
            save_tensors(file, renamed, {"model": asdict(model.config)})
        files, vision = [file], False
    else:
        with locked(out / "model.safetensors"):
            files, vision = _to_huggingface(out, model, language_model, manifest, with_llm)
    size = sum(file.stat().st_size for file in files)
    return Exported2(str(out), layout, vision, len(files), size, known["id"], with_llm)


def _ours(model: VisualPrompt) -> dict[str, Tensor]:
    """The weights, those of the Q-Former under its own names."""
    return {key.removeprefix("qformer."): value for key, value in model.state_dict().items()}


def _to_huggingface(
    out: Path, model: VisualPrompt, language_model: LanguageModel, manifest: Any, with_llm: bool
) -> tuple[list[Path], bool]:
    """Write the folder. Returns its files, config.json last, and whether the vision model is among the weights."""
    from huggingface_hub import save_torch_state_dict
    from transformers import Blip2Config

    config = model.config
    vision, vision_tensors, processor = vision_part(manifest["encoder"], config)
    image = _placeholder(language_model)
    text = language_model.model.config.to_dict() | {"eos_token_id": sorted(language_model.ends), "dtype": "float32"}
    text.pop("quantization_config", None)
    settings = Blip2Config(
        vision_config=vision,
        qformer_config={size: getattr(config, size) for size in QFORMER_SIZES} | {"use_qformer_text_input": False},
        text_config=text,
        num_query_tokens=config.num_query_tokens,
        image_token_index=language_model.tokenizer.convert_tokens_to_ids(image),
        architectures=["Blip2ForConditionalGeneration"],
        dtype="float32",
    )
    tensors = vision_tensors | {HUGGINGFACE_NAMES.theirs(key): value for key, value in _ours(model).items()}
    if with_llm:
        own = language_model.model
        tied = own.state_dict().keys() - {name for name, _ in (*own.named_parameters(), *own.named_buffers())}
        tensors |= {f"language_model.{key}": value for key, value in own.state_dict().items() if key not in tied}
    place = out / PARTIAL
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    save_torch_state_dict(tensors, place, metadata={"format": "pt"})
    _save_tokenizer(language_model.tokenizer, place, image)
    write_json(
        place / "processor_config.json",
        {"processor_class": "Blip2Processor", "num_query_tokens": config.num_query_tokens},
    )
    if processor is not None:
        write_json(place / "preprocessor_config.json", processor)
    write_json(place / CONFIG, json.loads(settings.to_json_string(use_diff=False)))
    for old in out.glob("*.*"):  # of an earlier export
        if old.is_file():
            old.unlink()
    files = sorted(place.iterdir(), key=lambda file: file.name == CONFIG)
    moved = [file.replace(out / file.name) for file in files]
    place.rmdir()
    return moved, bool(vision_tensors)


def _placeholder(language_model: LanguageModel) -> str:
    """The word of the tokenizer that becomes IMAGE: IMAGE itself, which is added if the embeddings have a row for it, or else the last
    special word that neither begins, ends nor pads a text. ArtifactError if there is none."""
    tokenizer = language_model.tokenizer
    if IMAGE in tokenizer.get_vocab() or len(tokenizer) < len(language_model.embeddings.weight):
        tokenizer.add_tokens([IMAGE], special_tokens=True)
        return IMAGE
    used = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id, *language_model.ends}
    free = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special and i not in used}
    if not free:
        raise ArtifactError(
            f"{language_model.identity['id']} has no word to spare that could hold a picture's place in transformers; use --to lavis"
        )
    return free[max(free)]


def _save_tokenizer(tokenizer: Any, place: Path, image: str) -> None:
    """Save a tokenizer whose word `image` is called IMAGE."""
    tokenizer.save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (place / name).read_text(encoding="utf-8")
        (place / name).write_text(text.replace(json.dumps(image), json.dumps(IMAGE)), encoding="utf-8")
