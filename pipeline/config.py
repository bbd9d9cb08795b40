"""The options of reading a dataset, of extraction, and of where and how to compute. Standard library only."""

from dataclasses import dataclass
from pathlib import Path

from .options import Panel, hidden, option

WHAT, SPLITS = Panel(1, "What is read"), Panel(2, "Splits")
STORAGE, SPEED = Panel(3, "What is stored"), Panel(4, "Speed and limits")
WORKSPACE = Path("qf-out")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ReadOptions:
    """The parts of reading a dataset that the data does not define. Fractions are of all records, drawn by a hash of the key."""

    images: Path | None = option(None, "Folder that image paths are relative to.", panel=WHAT)
    confine: bool = option(False, "Refuse paths and links that lead out of the dataset's folder.", panel=WHAT)
    image_column: str | None = option(None, "Column with the image, if its name is unusual.", panel=WHAT)
    caption_column: str | None = option(None, "Column with the caption or captions.", panel=WHAT)
    questions: list[Path] | None = option(
        None,
        "File of questions or conversations about the images of SOURCE, joined by name: a table, or JSON of VQAv2, OK-VQA "
        "(questions and annotations), GQA or LLaVA. May be given several times.",
        panel=WHAT,
    )
    question_column: str | None = option(
        None, "Column with the question; with --questions, in these files.", panel=WHAT
    )
    answer_column: str | None = option(None, "Column with the answer or answers.", panel=WHAT)
    type_column: str | None = option(None, "Column with the type of the question, such as count.", panel=WHAT)
    conversation_column: str | None = option(None, "Column with the conversation.", panel=WHAT)
    allow_uncaptioned: bool = option(
        False,
        "Keep images without a caption: search finds them, training passes over them.",
        flags=("--allow-uncaptioned",),
        panel=WHAT,
    )
    split_column: str | None = option(None, "Column with train, val or test.", panel=WHAT)
    key_column: str | None = option(None, "Column with a unique key; the image's name unless given.", panel=WHAT)
    no_header: bool = option(
        False,
        "The table has no line of column names; columns are named 1, 2, 3 ….",
        flags=("--no-header",),
        panel=WHAT,
    )
    val_fraction: float = option(
        0.05,
        "Share of the records for validation, where the data names no split, or train alone.",
        min=0,
        max=1,
        panel=SPLITS,
    )
    test_fraction: float = option(0.0, "Share of the records for testing, likewise.", min=0, max=1, panel=SPLITS)
    redraw_splits: bool = option(
        False, "Draw the splits by these shares, even where the data names them.", panel=SPLITS
    )
    joined: bool = hidden(False)  # whether a table is one of questions about the images of another source
    captioned: bool = hidden(False)  # whether a table without a column of captions is none
    names_stay: bool = hidden(False)  # whether image names may not leave the folder, as in a folder's own metadata


@dataclass(frozen=True)
class EncoderOptions:
    """Which frozen encoder makes the features."""

    encoder: str = option(
        "openai/clip-vit-base-patch32",
        "builtin, a Hugging Face id or folder (CLIP, SigLIP, DINO, BLIP-2), or a folder with model.onnx.",
        panel=WHAT,
    )
    layer: int | None = option(
        None,
        "Layer whose output is cached; -2 unless given, the last for BLIP-2 and ONNX.",
        min=-1000,
        max=1000,
        panel=WHAT,
    )


@dataclass(frozen=True)
class ExtractOptions:
    """How features are made and stored. Only `codec`, `views`, `flip`, `seed` and `batch_size` decide a shard's bytes."""

    codec: str = option(
        "float16", "How features are stored: float32, float16, int8 (half of float16) or int4.", panel=STORAGE
    )
    shard_format: str = option(
        "arrow",
        "arrow, or webdataset: tars that the webdataset library reads.",
        flags=("--format",),
        panel=STORAGE,
    )
    shard_size: int = option(1024, "Records in a shard.", min=1, max=2**20, panel=STORAGE)
    views: int = option(
        0, "Augmented views of each training image: random crops, mirrored or not.", min=0, max=1000, panel=STORAGE
    )
    flip: bool = option(
        True,
        "Whether views may be mirrored; captions may tell left from right.",
        flags=("--flip/--no-flip",),
        panel=STORAGE,
    )
    texts: bool = option(
        True,
        "Also cache the embeddings of the captions, by the encoder's text model if it has one; training learns from them.",
        flags=("--texts/--no-texts",),
        panel=STORAGE,
    )
    seed: int = option(0, "Seed of the views.", min=0, max=2**63 - 1, panel=STORAGE)
    batch_size: int = option(64, "Images encoded at once.", min=1, max=2**14, panel=SPEED)
    workers: int = option(0, "Threads that decode; 0: one a core.", min=0, max=1024, panel=SPEED)
    max_rejects: float = option(
        0.05, "Share of unreadable records above which the run fails.", min=0, max=1, panel=SPEED
    )
    overwrite: bool = option(False, "Replace what is there.", panel=STORAGE)
    dry_run: bool = option(
        False, "Print what would be made, how large and how long it would take; write nothing.", panel=STORAGE
    )


@dataclass(frozen=True)
class DeviceOptions:
    """Which device computes."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N.")


@dataclass(frozen=True)
class ComputeOptions(DeviceOptions):
    """Which device computes, and in which precision."""

    precision: str = option("auto", f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}.")


@dataclass(frozen=True)
class WorkspaceOptions:
    """Where everything lies that qf writes."""

    workspace: Path = option(
        WORKSPACE, "Folder for everything that qf writes.", flags=("--workspace", "-w"), envvar="QF_WORKSPACE"
    )


@dataclass(frozen=True)
class OutputOptions:
    """The form of the output."""

    json: bool = option(False, "Print results as JSON on stdout, and nothing else there.")
    quiet: bool = option(False, "Print no progress.", flags=("--quiet", "-q"))
