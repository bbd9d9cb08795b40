"""The command line: one command each parses, calls the library function of that name, and prints.

The only file that knows terminals. Heavy imports stay inside the command that needs them."""

import contextlib
import errno
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .pipeline.errors import QfError
from .pipeline.formatting import by_split, counted, duration, size
from .trainer.config import PRESETS, Stage1Config
from .trainer.runs.panel import RECALLS, Pace, TrainingPanel, losses_of

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress

    from .pipeline.extract.extract import Status
    from .trainer.stage1.embedder import Embedder

app = typer.Typer(
    name="qf",
    help="Train a Q-Former on cached CLIP features, and search pictures with it.\n\n"
    'The journey: qf extract photos.csv, qf train, qf search "a dog on a beach". Try it offline first: qf demo.',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
DEFAULTS = Stage1Config()

Workspace = Annotated[
    Path, typer.Option("--workspace", "-w", envvar="QF_WORKSPACE", help="Folder for everything that qf writes.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
RunName = Annotated[str | None, typer.Option("--run", help="Name of the run; the one trained last unless given.")]
Artifact = Annotated[
    Path | None,
    typer.Argument(help="A features folder, a run, an index, or a workspace; all of --workspace unless given."),
]
HERE = Path("qf-out")


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"qf {version('qf')}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of every command; `main` takes --debug itself, wherever it stands."""


# ---- commands --------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    workspace: Annotated[
        Path | None, typer.Option("--workspace", "-w", help="Folder for all of it; demo in the usual one unless given.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the sample's training scenes.")] = 8,
    scenes: Annotated[
        int,
        typer.Option(
            min=48,
            help="Training scenes; besides them a 16th, 250 at most, to validate, and an 8th, 500 at most, to test.",
        ),
    ] = 4000,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of training.")] = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole journey on the built-in sample, offline: extract, train, index, evaluate, search."""
    from .pipeline.device import resolve_device
    from .retrieval.demo import Watch, demo

    workspace = workspace or Path(os.environ.get("QF_WORKSPACE") or HERE) / "demo"
    config = Stage1Config(epochs=epochs, seed=seed, precision=precision, batch_size=64, lr=1e-3, contrast_first=0.4)
    with Display(quiet) as display:
        watch = Watch(display.say, display.extracting, display.training)
        summary = demo(workspace, scenes, config, resolve_device(device), precision, watch)
    if as_json:
        print_json(summary)
        return
    say_extract(summary["extract"])
    say_train(summary["train"])
    say_index(summary["index"])
    say_eval(summary["eval"])
    found = sum(search["hits"][0]["key"] == search["wanted"] for search in summary["search"])
    print(f"search    {found} of {len(summary['search'])} captions found their scene first; see {summary['sheet']}")


@app.command()
def extract(
    source: Annotated[
        str,
        typer.Argument(
            help="CSV, TSV, JSON lines, Parquet, COCO or Karpathy JSON, Flickr8k tokens, WebDataset tars, "
            "a folder of these or of images; a quoted pattern such as 'data/{00000..00031}.tar'."
        ),
    ],
    encoder: Annotated[
        str,
        typer.Option(
            help="builtin, a Hugging Face id or folder (CLIP, SigLIP, DINO, BLIP-2), or a folder with model.onnx."
        ),
    ] = "openai/clip-vit-base-patch32",
    layer: Annotated[
        int | None, typer.Option(help="Layer whose output is cached; -2 unless given, the last for BLIP-2 and ONNX.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that image paths are relative to, and may not leave.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column with the image, if its name is unusual.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column with the caption or captions.")] = None,
    split_column: Annotated[str | None, typer.Option(help="Column with train, val or test.")] = None,
    key_column: Annotated[
        str | None, typer.Option(help="Column with a unique key; the image's name unless given.")
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share to validate on, drawn where the data names no split, or train alone."),
    ] = 0.05,
    test_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share to test on, drawn likewise.")] = 0.0,
    redraw_splits: Annotated[
        bool, typer.Option("--redraw-splits", help="Draw the splits by these shares, whatever the data names.")
    ] = False,
    codec: Annotated[
        str, typer.Option(help="How features are stored: float32, float16, int8 (half of float16) or int4.")
    ] = "float16",
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 64,
    shard_size: Annotated[int, typer.Option(min=1, help="Records in a shard.")] = 1024,
    workers: Annotated[int, typer.Option(min=0, help="Threads that decode; 0: one a core.")] = 0,
    views: Annotated[
        int, typer.Option(min=0, help="Augmented views of each training image: random crops, mirrored or not.")
    ] = 0,
    flip: Annotated[
        bool, typer.Option("--flip/--no-flip", help="Whether views may be mirrored; captions may tell left from right.")
    ] = True,
    shard_format: Annotated[
        str, typer.Option("--format", help="arrow, or webdataset: tars that the webdataset library reads.")
    ] = "arrow",
    max_rejects: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable records that fails the run.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the views.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be made, how large and how long; write nothing.")
    ] = False,
    workspace: Workspace = HERE,
    device: Device = "auto",
    precision: Precision = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cache a frozen encoder's features of a caption dataset. The same command again resumes what is unfinished."""
    from .pipeline.config import ReadOptions
    from .pipeline.datasets.read import read

    columns = (image_column, caption_column, split_column, key_column)
    options = ReadOptions(images, *columns, val_fraction, test_fraction, redraw_splits)
    with Display(quiet) as display:
        display.say(f"reading {source}")
        dataset = read(Path(source), options)
        display.say(f"{source}: {dataset.kind}, {dataset.found}; {len(dataset.records):,} images")
        from .pipeline.config import ExtractOptions
        from .pipeline.device import resolve_device, resolve_precision
        from .pipeline.encoders.load import load_encoder
        from .pipeline.extract.extract import estimate, extract

        on = resolve_device(device)
        frozen = load_encoder(encoder, on, resolve_precision(precision, on), layer)
        how = ExtractOptions(
            codec, shard_format, shard_size, views, flip, seed, batch_size, workers, max_rejects, overwrite
        )
        if dry_run:
            summary = estimate(dataset, frozen, how, workspace / "features")
        else:
            summary = extract(dataset, source, frozen, workspace / "features", how, display.extracting)
    if as_json:
        print_json(summary)
    elif dry_run:
        say_estimate(summary)
    else:
        say_extract(summary)


@app.command()
def train(
    stage: Annotated[
        int, typer.Option(min=1, max=1, help="1: the Q-Former alone. Stage 2, with a language model, is still to come.")
    ] = 1,
    name: Annotated[str, typer.Option(help="Name of the run.")] = "stage1",
    preset: Annotated[str, typer.Option(help=f"Size of the Q-Former: {', '.join(PRESETS)}.")] = DEFAULTS.preset,
    init: Annotated[
        str | None,
        typer.Option(
            help="Weights to start from: a run; a Hugging Face BLIP-2 or BERT, folder or id; a LAVIS BLIP-2 stage-1 .pth or "
            ".safetensors. What it lacks starts afresh, and is named."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or id with a BERT tokenizer. Unless given: that of --init; for LAVIS's .pth, which bring none, "
            "bert-base-uncased is fetched; a new vocabulary of the captions without --init."
        ),
    ] = None,
    losses: Annotated[str, typer.Option(help="The objectives to sum.")] = DEFAULTS.losses,
    epochs: Annotated[
        float, typer.Option(min=0, help="Passes over the training images; 0: keep the weights of --init as they are.")
    ] = DEFAULTS.epochs,
    batch_size: Annotated[
        int, typer.Option(min=2, help="Images through the network at once, over all processes.")
    ] = DEFAULTS.batch_size,
    contrastive_batch: Annotated[
        int,
        typer.Option(
            min=0,
            help="Images contrasted with each other, a multiple of the batch size, by gradient caching; 0: the batch size.",
        ),
    ] = DEFAULTS.contrastive_batch,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Batches (contrastive ones) whose gradients make one step.")
    ] = DEFAULTS.accumulate,
    shuffle_window: Annotated[
        int,
        typer.Option(min=1, help="Images shuffled together; fewer where so many, as cached, do not fit in memory."),
    ] = DEFAULTS.shuffle_window,
    cache_on_device: Annotated[
        bool,
        typer.Option(
            "--cache-on-device", help="Keep all features in the device's memory if they fit, else in the host's."
        ),
    ] = False,
    captions_per_image: Annotated[
        int, typer.Option(min=0, help="Captions of each image in a step; 0: all.")
    ] = DEFAULTS.captions_per_image,
    matched_captions: Annotated[
        int, typer.Option(min=0, help="Of these, how many matching and generation see; 0: all.")
    ] = DEFAULTS.matched_captions,
    contrast_first: Annotated[
        float,
        typer.Option(
            min=0, max=0.9, help="Share of training with the contrast alone, before the others join; BLIP-2: 0."
        ),
    ] = DEFAULTS.contrast_first,
    easy_negatives: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the rest in which negatives go from random to hard; BLIP-2: 0."),
    ] = DEFAULTS.easy_negatives,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = DEFAULTS.lr,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Steps of warm-up, a quarter of all at most.")
    ] = DEFAULTS.warmup_steps,
    weight_decay: Annotated[float, typer.Option(min=0, help="On matrices.")] = DEFAULTS.weight_decay,
    dropout: Annotated[float, typer.Option(min=0, max=0.9, help="In the Q-Former.")] = DEFAULTS.dropout,
    token_dropout: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of an image's tokens left out of each step.")
    ] = DEFAULTS.token_dropout,
    num_query_tokens: Annotated[int | None, typer.Option(min=1, help="Queries; the preset's unless given.")] = None,
    max_text_length: Annotated[int, typer.Option(min=3, help="Tokens of a caption.")] = DEFAULTS.max_text_length,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of metrics.jsonl.")] = DEFAULTS.log_every,
    validate_every: Annotated[
        int, typer.Option(min=0, help="Steps between validations; 0: once an epoch.")
    ] = DEFAULTS.validate_every,
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after this many validations without a better R@1; 0: never.")
    ] = DEFAULTS.patience,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints.")
    ] = DEFAULTS.checkpoint_every,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints to keep, besides the best weights.")] = DEFAULTS.keep,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")] = DEFAULTS.seed,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute layers twice, to hold less in memory.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Have torch.compile fuse dropout, sums and LayerNorms: for GPUs.")
    ] = False,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, one a GPU; or start them with torchrun.")
    ] = 1,
    index: Annotated[bool, typer.Option("--index/--no-index", help="Build the index from the trained model.")] = True,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write metrics for TensorBoard as well, into the run's folder.")
    ] = False,
    workspace: Workspace = HERE,
    device: Device = "auto",
    precision: Precision = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a Q-Former on the cached features, then index them. The same command again resumes an interrupted run."""
    if not name or name in (".", "..") or Path(name).name != name:
        raise typer.BadParameter(f"--name {name!r} is no name for a folder in {workspace / 'runs'}")
    if not epochs and init is None:
        raise typer.BadParameter("--epochs 0 keeps the weights of --init as they are: name some")
    if init is not None and Path(init).name == init and (workspace / "runs" / init / "config.json").is_file():
        init = str((workspace / "runs" / init).resolve())
    given = locals()
    config = Stage1Config(**{f.name: given[f.name] for f in fields(Stage1Config) if f.name in given})
    from .trainer.distributed.launch import launch, launched

    if nproc > 1 and not launched():
        raise typer.Exit(launch(sys.argv[1:], nproc))
    from .pipeline.device import resolve_device
    from .pipeline.features.reader import Features
    from .trainer.distributed.processes import Processes
    from .trainer.stage1.stage import train

    processes, on = Processes.join(resolve_device(device))
    features = Features(workspace / "features")
    folder = workspace / "runs" / name
    with Display(quiet or not processes.first) as display:
        summary = train(
            features,
            folder,
            config,
            on,
            overwrite,
            display.training,
            processes,
            cache_on_device=cache_on_device,
            say=display.say,
            tensorboard=tensorboard,
        )
        processes.leave()
        if not processes.first:
            return
        if index:
            from .retrieval.encode.qformer import open_run
            from .retrieval.index.build import build_index

            display.say("indexing")
            indexed = build_index(open_run(folder, on, precision), features, workspace / "index")
            summary = replace(summary, index=indexed["index"])
    if as_json:
        print_json(summary.to_json())
        return
    print(summary)
    if index:
        say_index(indexed)


@app.command()
def index(
    run: RunName = None,
    workspace: Workspace = HERE,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build the FAISS index of query embeddings from the features and a run."""
    from .pipeline.device import resolve_device
    from .pipeline.features.reader import Features
    from .retrieval.encode.qformer import open_run
    from .retrieval.index.build import build_index

    on = resolve_device(device)
    with Display(quiet) as display:
        display.say("indexing")
        features = Features(workspace / "features")
        summary = build_index(open_run(run_folder(workspace, run), on, precision), features, workspace / "index")
    print_json(summary) if as_json else say_index(summary)


@app.command()
def search(
    query: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    image: Annotated[Path | None, typer.Option(help="Look for what is like this picture.")] = None,
    find: Annotated[str, typer.Option(help="With --image: images, or text for captions.")] = "images",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many hits.")] = 10,
    rerank: Annotated[
        int, typer.Option(min=0, help="Match this many of the first hits, -k at least, with the text, and reorder.")
    ] = 0,
    sheet: Annotated[Path | None, typer.Option(help="Draw the hits as a contact sheet, FILE.png.")] = None,
    workspace: Workspace = HERE,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find pictures for a text, or pictures or captions for a picture."""
    if (query is None) == (image is None):
        raise typer.BadParameter('give either a text, as in qf search "a dog on a beach", or --image FILE')
    if find not in ("images", "text"):
        raise typer.BadParameter("--find is images or text")
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise typer.BadParameter(f"--sheet {sheet}: the sheet is a PNG; give it a name that ends in .png")
    if image is None and find == "text":
        raise typer.BadParameter("--find text finds captions for a picture: give --image FILE instead of a text")
    if image is not None and rerank:
        raise typer.BadParameter("--rerank matches pictures with a text: it does not go with --image")
    from .pipeline.artifacts import has_manifest
    from .pipeline.device import resolve_device
    from .pipeline.features.reader import Features
    from .retrieval.searcher import Searcher

    on = resolve_device(device)
    if has_manifest(workspace / "index"):
        searcher = Searcher.open(workspace / "index", on, precision)
    else:
        if (workspace / "index").is_dir() or list((workspace / "runs").glob("*/manifest.json")):
            raise QfError(f"{workspace} has a trained run but no finished index; build it with `qf index`")
        searcher = Searcher.untrained(Features(workspace / "features"), on)
        own = "no trained model yet: searching by the encoder's own embeddings (train one with `qf train`)"
        print(own, file=sys.stderr)  # no progress, hence also when quiet
    if image is not None:
        answers = searcher.captions(image, k) if find == "text" else searcher.image(image, k)
    else:
        if searcher.run is not None:
            warn_cut(query or "", searcher.run.embedder)
        answers = searcher.text(query or "", k, rerank)
    if sheet is not None:
        from .retrieval.sheet import contact_sheet

        title = query or f"{'captions for' if find == 'text' else 'like'} {image}"
        contact_sheet([(title, answers)], sheet)
    if as_json:
        for answer in answers:
            print(json.dumps(answer.line(), ensure_ascii=False))
        return
    for answer in answers:
        scores = f"{answer.score:7.3f}" + (
            f"  (itc {answer.itc:.3f}, itm {answer.itm:.3f})" if answer.itm is not None else ""
        )
        print(f"{answer.rank:3d}  {scores}  {answer.image}  {answer.captions[0] if answer.captions else ''}")
    if sheet is not None:
        print(f"contact sheet: {sheet}")


@app.command()
def explain(
    image: Annotated[str, typer.Argument(help="A picture: a file, or a key of the features.")],
    caption: Annotated[str, typer.Argument(help="What it may show, in words.")],
    out: Annotated[
        Path | None, typer.Option(help="The drawing, a PNG; explain.png in the workspace unless given.")
    ] = None,
    run: RunName = None,
    workspace: Workspace = HERE,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw which patches the queries look at, which query answers a text, and what speaks for a match."""
    from .pipeline.device import resolve_device
    from .pipeline.encoders.picture import encode_picture
    from .pipeline.features.reader import Features
    from .retrieval.encode.qformer import check_features, open_run
    from .retrieval.explain import cached_picture, explain
    from .retrieval.heatmaps import draw_explanation

    out = out or workspace / "explain.png"
    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"--out {out}: the drawing is a PNG; give it a name that ends in .png")
    on = resolve_device(device)
    opened = open_run(run_folder(workspace, run), on, precision)
    if Path(image).is_file():
        with Display(quiet) as display:
            display.say(f"encoding {image}")
            picture = encode_picture(Path(image), opened.manifest["encoder"], on)
    else:
        features = Features(workspace / "features")
        check_features(opened, features)
        picture = cached_picture(features, image)
    warn_cut(caption, opened.embedder)
    explanation = explain(opened, picture, caption)
    draw_explanation(explanation, out)
    summary = {**explanation.summary(), "run": str(opened.folder), "out": str(out)}
    print_json(summary) if as_json else say_explain(summary)


@app.command("eval")
def evaluate(
    split: Annotated[
        str | None, typer.Option(help="The split to measure on; test unless given, or val where there is no test.")
    ] = None,
    rerank: Annotated[int, typer.Option(min=0, help="Match this many candidates of each query; 0: none.")] = 16,
    run: RunName = None,
    workspace: Workspace = HERE,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Retrieval metrics on a split: the encoder's own zero-shot scores, ITC, and ITC re-ranked by ITM."""
    from .pipeline.device import resolve_device
    from .pipeline.features.reader import Features
    from .retrieval.encode.qformer import latest_run, open_run
    from .retrieval.evaluate import evaluate_retrieval

    on = resolve_device(device)
    features = Features(workspace / "features")
    split = split or ("test" if len(features.rows("test")) else "val")
    chosen = run_folder(workspace, run) if run else latest_run(workspace / "runs")
    with Display(quiet) as display:
        display.say(f"evaluating {chosen or 'the encoder alone (no run yet)'} on the {split} split")
        opened = open_run(chosen, on, precision) if chosen else None
        summary = evaluate_retrieval(features, split, opened, on, rerank, display.say)
    print_json(summary) if as_json else say_eval(summary)


@app.command()
def info(
    path: Artifact = None,
    workspace: Workspace = HERE,
    as_json: Json = False,
) -> None:
    """What a features folder, run or index is, and how it was made."""
    from .pipeline.artifacts import read_manifest

    found = {str(part): read_manifest(part) for part in artifacts_at(path or workspace)}
    if as_json:
        print_each(found)
        return
    for name, manifest in found.items():
        say_info(name, manifest)


@app.command()
def verify(
    path: Artifact = None,
    workspace: Workspace = HERE,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check the checksums and counts of artifacts; exit code 1 when anything is off."""
    from .retrieval.verify import verify

    checked = {}
    with Display(quiet) as display:
        for part in artifacts_at(path or workspace):
            display.say(f"verifying {part}")
            checked[str(part)] = verify(part)
    if as_json:
        print_each(checked)
    else:
        for result in checked.values():
            say_verify(result)
    wrong = [result for result in checked.values() if result["problems"]]
    if wrong:
        count = sum(len(result["problems"]) for result in wrong)
        raise QfError(f"{wrong[0]['problems'][0]} (problems in all: {count}); {wrong[0]['cure']}")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run: its folder, or its name in the workspace.")],
    out: Annotated[
        Path,
        typer.Argument(
            help="Where to: a folder; for lavis a .safetensors file, or a folder to put model.safetensors in."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="huggingface: a folder for Blip2ForImageTextRetrieval.from_pretrained, with the vision model where the "
            "encoder is a BLIP-2's. lavis: BLIP-2's own key names; since qf writes no pickle, load it there with "
            "model.load_state_dict(safetensors.torch.load_file(OUT), strict=False)."
        ),
    ],
    workspace: Workspace = HERE,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's weights in the layout of Hugging Face or LAVIS; --init and QFormer.from_pretrained read them back."""
    from .pipeline.artifacts import has_manifest
    from .trainer.weights.export import export

    folder = Path(run) if has_manifest(Path(run)) else workspace / "runs" / run
    with Display(quiet) as display:
        display.say(f"exporting {folder}")
        summary = export(folder, out, to, overwrite)
    print_json(summary.to_json()) if as_json else print(summary)


def artifacts_at(path: Path) -> list[Path]:
    """The artifact at `path`, or those of the workspace there."""
    from .pipeline.artifacts import has_manifest

    if has_manifest(path) or path.is_file():
        return [path]
    every = [path / "features", *sorted((path / "runs").glob("*")), path / "index"]
    parts = [part for part in every if has_manifest(part)]
    written = [part for part in (path, *every) if (part / ".lock").is_file()]  # by qf, whatever else has a config.json
    unfinished = [part for part in written if (part / "plan.json").is_file() or (part / "config.json").is_file()]
    for part in (part for part in unfinished if not has_manifest(part) and parts):
        print(f"{part}: unfinished; the command that began it goes on", file=sys.stderr)
    if not parts and unfinished:
        raise QfError(f"{unfinished[0]} is unfinished; run the command that began it again, and it goes on")
    if not parts:
        raise QfError(f"{path} holds no features, run or index; begin with `qf extract SOURCE` or `qf demo`")
    return parts


def warn_cut(text: str, embedder: "Embedder") -> None:
    """A line on stderr if the model does not read all of the text."""
    count = len(embedder.tokens.ids([text], sys.maxsize)[0])
    if count > embedder.max_text_length:
        print(
            f"qf: the model reads the first {embedder.max_text_length} tokens of the text, which has {count} "
            "(--max-text-length of its training)",
            file=sys.stderr,
        )


def run_folder(workspace: Path, name: str | None) -> Path:
    """The run of that name, or the one trained last."""
    from .retrieval.encode.qformer import latest_run

    if name is not None:
        return workspace / "runs" / name
    latest = latest_run(workspace / "runs")
    if latest is None:
        raise QfError(f"{workspace} has no finished run; train one with `qf train`")
    return latest


# ---- printing --------------------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_each(artifacts: dict[str, Any]) -> None:
    """What is told of one artifact; of several, each under its path."""
    print_json(artifacts if len(artifacts) > 1 else next(iter(artifacts.values())))


def say_estimate(s: dict[str, Any]) -> None:
    print(f"records   {s['records']:,} images ({by_split(s['splits'])}), {s['captions']:,} captions")
    short = "" if s["bytes"] <= s["free"] else ": too little"
    print(f"features  about {size(s['bytes'])} in {s['features']}, where {size(s['free'])} are free{short}")
    unread = f"; {s['sampled_rejects']} of them cannot be read" if s["sampled_rejects"] else ""
    time = f"about {duration(s['seconds'])} at {s['images_per_second']:.1f} images/s" if s["seconds"] else "unknown"
    print(f"time      {time}, by a sample of {s['sampled']}{unread}")


def say_extract(s: dict[str, Any]) -> None:
    rate = f"{s['images_per_second']:.0f} images/s" if s["encoded"] else "nothing new to encode"
    print(
        f"features  {s['records']:,} images ({by_split(s['splits'])}), {s['captions']:,} captions, {s['rejected']:,} rejected; "
        f"{size(s['bytes'])} in {counted(s['shards'], 'shard')} at {s['features']}  ({duration(s['seconds'])}, {rate})"
    )


def say_verify(s: dict[str, Any]) -> None:
    for problem in s["problems"]:
        print(f"{s['kind']:<9} {problem}")
    if not s["problems"]:
        print(f"{s['kind']:<9} {s['path']}: sound; {counted(s['files'], 'file')}, {size(s['bytes'])}")


def say_train(s: dict[str, Any]) -> None:
    best = s["best"]
    recalls = ", ".join(f"{best[name]:.1f} {label}" for name, label in RECALLS.items() if name in best)
    checked = f"; validation R@1 in % of the weights that are kept: {recalls}" if best else ""
    steps = counted(s["steps"], "step") + (f" of {s['planned_steps']:,} ({s['stopped']})" if s["stopped"] else "")
    trained = f"{steps}, loss {s['loss']:.3f}{checked}" if s["steps"] else "no steps, the weights as they came"
    print(f"run       {s['run']}: {trained}  ({duration(s['seconds'])})")


def say_index(s: dict[str, Any]) -> None:
    print(
        f"index     {s['images']:,} images as {s['vectors']:,} vectors, {s['texts']:,} texts; {size(s['bytes'])} at "
        f"{s['index']}  ({duration(s['seconds'])})"
    )


def say_explain(s: dict[str, Any]) -> None:
    print(f"run       {s['run']}")
    print(f"scores    ITC {s['itc']:.3f}, ITM {s['itm']:.3f} (probability {s['itm_probability']:.1%})")
    first, *others = s["queries"]
    answers = f"query {first['query']} answers, {first['score']:.3f}"
    behind = ", ".join(f"query {other['query']} {other['score']:.3f}" for other in others[:3])
    print(f"queries   {answers}" + (f"; behind it {behind}" if others else ""))
    print(f"drawing   {s['out']}")


def say_eval(s: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{s['split']}: {s['images']:,} images, {s['texts']:,} texts; recall in %", title_justify="left"
    )
    table.add_column("scorer")
    for way in ("text to image", "image to text"):
        for at in (1, 5, 10):
            table.add_column(f"{way}\nR@{at}" if at == 1 else f"\nR@{at}", justify="right")
    for name, row in s.items():
        if isinstance(row, dict):
            label = "encoder, zero-shot" if name == "clip" else name.upper()
            table.add_row(label, *(f"{value:.1f}" for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def say_info(name: str, manifest: dict[str, Any]) -> None:
    kind = manifest["kind"]
    print(f"{name}: {kind}")
    if kind == "features":
        encoder, source = manifest["encoder"], manifest["source"]
        print(f"  from      {source['path']} ({source['kind']}), {manifest['rejected']:,} records rejected")
        joint = f"joint space of {encoder['joint']}" if encoder["joint"] else "no joint space"
        shape = f"{encoder['tokens']} tokens x {encoder['width']}, {joint}, {encoder['precision']}"
        print(f"  encoder   {encoder['id']}, layer {encoder['layer']}, {shape}")
        views = f", {counted(manifest['views'], 'view')} of each training image" if manifest["views"] else ""
        images = f"{manifest['records']:,} images ({by_split(manifest['splits'])})"
        print(f"  holds     {images}, {manifest['captions']:,} captions{views}")
        weight = size(sum(shard["bytes"] for shard in manifest["shards"]))
        print(
            f"  on disk   {counted(len(manifest['shards']), 'shard')}, {weight}, {manifest['codec']}, {manifest['format']}"
        )
    elif kind == "run":
        model, best = manifest["model"], manifest["best"]
        print(
            f"  model     {model['num_hidden_layers']} layers x {model['hidden_size']}, {model['num_query_tokens']} queries, "
            f"from {manifest['train']['init'] or 'scratch'}"
        )
        print(
            f"  trained   {manifest['epochs']:g} epochs, {counted(manifest['steps'], 'step')}, {duration(manifest['seconds'])}"
        )
        if manifest["stopped"]:
            print(f"  stopped   of {manifest['planned_steps']:,} steps planned: {manifest['stopped']}")
        if manifest["steps"]:
            print(f"  losses    {manifest['train']['losses']}, {manifest['loss']:.3f} at the end")
        print(f"  features  {manifest['features']['path']} ({manifest['encoder']['id']})")
        if best:
            found = f"R@1 {best['text_to_image_R@1']} text to image, {best['image_to_text_R@1']} image to text"
            print(f"  best      step {best['step']:,}: {found}")
    else:
        vectors = f"{manifest['vectors']:,} vectors, {manifest['texts']:,} texts ({manifest['type']})"
        print(f"  holds     {manifest['images']:,} images as {vectors}")
        print(f"  from      {manifest['run']['path']} and {manifest['features']['path']}; {size(manifest['bytes'])}")


class Display:
    """Progress on stderr: live on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.live: Live | None = None
        self.shown: Progress | TrainingPanel | None = None  # what is live
        self.said = 0.0
        self.paces: dict[str, Pace] = {}  # by what is done

    def __enter__(self) -> "Display":
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console, Group
            from rich.live import Live

            console = Console(stderr=True)
            self.live = Live(get_renderable=lambda: self.shown or Group(), console=console, redirect_stdout=False)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self._settle()
            self.live.stop()

    def _settle(self) -> None:
        if isinstance(self.shown, TrainingPanel):
            self.shown.over = True

    def say(self, text: str) -> None:
        """Something new begins: what was live stays as it is, above."""
        if self.live is not None:
            if self.shown is not None:
                self._settle()
                settled, self.shown = self.shown, None
                self.live.refresh()  # or it would be drawn once more, below
                self.live.console.print(settled)
            self.live.console.print(text, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def _line(self, what: str, done: int, total: int, note: str) -> None:
        """A plain line, ten seconds after the last one at the earliest."""
        pace = self.paces.setdefault(what, Pace())
        pace.reports.append((time.monotonic(), done))
        if not self.quiet and (time.monotonic() - self.said > 10 or done == total):
            self.said = time.monotonic()
            left = pace.left(total)
            note += f", {duration(left)} left" if left else ""
            print(f"{what} {done:,}/{total:,}  {note}", file=sys.stderr, flush=True)

    def extracting(self, status: "Status") -> None:
        note = f"{status.images_per_second:.0f} images/s, encoder waited {status.waited:.0%}"
        if self.live is None:
            self._line("extract", status.done, status.total, note)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if not isinstance(self.shown, Progress):
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self.shown = Progress(TextColumn("{task.description}"), *columns, console=self.live.console)
            self.shown.add_task("extract", total=status.total, note="")
        self.shown.update(self.shown.task_ids[0], completed=status.done, note=note)

    def training(self, line: dict[str, Any], total: int) -> None:
        if self.live is not None:
            if not isinstance(self.shown, TrainingPanel):
                self.shown = TrainingPanel(total)
            self.shown.add(line)
        elif "split" in line:
            recalls = [f"{line[name]:.1f} {label}" for name, label in RECALLS.items() if name in line]
            best = " (the best so far)" if line["best"] else ""
            self.say(f"step {line['step']:,}: validation R@1 {', '.join(recalls)}{best}")
        else:
            self._line("train", line["step"], total, f"{losses_of(line)}  {line['pairs_per_second']:.0f} pairs/s")


# ---- the way out -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Failures that qf understands: one line on stderr, exit code 1; 130 when interrupted."""
    try:
        yield
    except QfError as error:
        if debug:
            raise
        fail(str(error))
    except OSError as error:
        if debug:
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail("the disk is full; free some space or choose another --workspace, then run the same command to go on")
        if error.errno is None or error.filename is None:
            raise
        fail(f"{error.filename}: {(error.strerror or '').lower()}; check the path and its permissions")
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which is not imported for its name
            raise
        fail("the device is out of memory; use a smaller --batch-size where there is one, or --device cpu")
    except SystemExit as error:
        if error.code == 130:  # typer turns an interrupt into this
            print("qf: interrupted; run the same command to go on", file=sys.stderr)
        raise


def fail(message: str) -> None:
    print(f"qf: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(1) from None


def main() -> None:
    """Entry point of the `qf` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "OMP_WAIT_POLICY" not in os.environ:  # PyTorch's threads wait for each other; where others want the cores too,
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # spinning for long took ten times as long
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or PyTorch says what it thinks of parameters without use
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
    debug = "--debug" in sys.argv  # anywhere, and no option of a command
    with one_line_errors(debug):
        app([argument for argument in sys.argv[1:] if argument != "--debug"])


if __name__ == "__main__":
    main()
