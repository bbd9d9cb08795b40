"""The command line: a command takes its options from dataclasses, makes one library call and emits its result.

The only file that knows terminals. Heavy imports stay inside the command that needs them."""

from .pipeline.interrupts import EXIT_CODE, INTERRUPTED, interrupt, leave, take_signals

take_signals(leave)  # while the imports below go on, which take a moment

import atexit
import contextlib
import functools
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from .pipeline.artifacts import has_manifest
from .pipeline.commands import with_options
from .pipeline.config import (
    WORKSPACE,
    ComputeOptions,
    DeviceOptions,
    EncoderOptions,
    ExtractOptions,
    OutputOptions,
    ReadOptions,
    WorkspaceOptions,
)
from .pipeline.errors import QfError
from .pipeline.failures import explanation, lost_peer
from .pipeline.formatting import encodable, plain, plain_lines
from .pipeline.workspace import Workspace
from .retrieval.config import (
    CaptionOptions,
    DemoOptions,
    EvalOptions,
    ExplainOptions,
    IndexOptions,
    RunOptions,
    SearchOptions,
    ServeOptions,
)
from .trainer.config import ExportOptions, GenerateOptions, Stage1Config, Stage2Config, TrainOptions, of_stage
from .trainer.distributed.place import LAUNCHER, LOST
from .trainer.runs.display import Display, typed

if TYPE_CHECKING:
    from .pipeline.results import Result
    from .trainer.decoding import OnText

app = typer.Typer(
    name="qf",
    help="Train a Q-Former on cached CLIP features, and search pictures with it.\n\n"
    'The journey: qf extract photos.csv, qf train, qf search "a dog on a beach". Try it offline first: qf demo.',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def command(body: Callable[..., None]) -> Callable[..., None]:
    """Register a command under the name of its function, with the options of the dataclasses among its parameters."""

    @functools.wraps(body)
    def called(**given: Any) -> None:
        try:
            body(**given)
        except BrokenPipeError:  # typer would make it exit code 1
            stop_printing()

    app.command(body.__name__.rstrip("_"))(with_options(called))
    return body


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

Sources = Annotated[
    list[str],
    typer.Argument(
        help="CSV, TSV, JSON lines, Parquet, COCO or Karpathy JSON, Flickr8k tokens, WebDataset tars, a folder of these or of "
        "images; several files of one kind, or a pattern such as 'data/{00000..00031}.tar'."
    ),
]
Query = Annotated[list[str] | None, typer.Argument(help="What to look for, in words.")]
Picture = Annotated[str, typer.Argument(help="A picture: a file, or a key of the features.")]
Caption = Annotated[list[str], typer.Argument(help="What the picture may show, in words.")]
Pictures = Annotated[
    list[str] | None, typer.Argument(help="Pictures: files, folders of them, or keys of the features.")
]
Question = Annotated[list[str], typer.Argument(help="What to ask about the picture.")]
Discussed = Annotated[list[str], typer.Argument(help="What to talk about: pictures, or keys of the features.")]
Artifact = Annotated[
    Path | None,
    typer.Argument(help="A features folder, a run, an index, or a workspace; all of --workspace unless given."),
]
RunArgument = Annotated[str, typer.Argument(help="A run: its folder, or its name in the workspace.")]
Out = Annotated[
    Path,
    typer.Argument(help="Where to: a folder; for lavis a .safetensors file, or a folder to put model.safetensors in."),
]


def words(arguments: list[str]) -> str:
    """A text from the command line, quoted or not."""
    return encodable(" ".join(arguments))


def lines() -> Iterator[str]:
    """The lines of the input, asked for on a terminal."""
    asking = sys.stdin.isatty() and sys.stdout.isatty()
    if asking:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lets `input` edit a line
    while True:
        try:
            line = input("> " if asking else "")
        except EOFError:
            return
        if line.strip():
            yield encodable(line.strip())


@command
def demo(options: DemoOptions, on: ComputeOptions, output: OutputOptions) -> None:
    """Take the whole journey on the built-in sample, offline: extract, train, index, evaluate, search; with --full also describe."""
    from .retrieval.demo import demo
    from .retrieval.journey import Watch

    folder = options.workspace or Path(os.environ.get("QF_WORKSPACE") or WORKSPACE) / "demo"
    with Display(output.quiet) as display:
        result = demo(folder, options, on, Watch(display.say, display.extracting, display.training))
    emit(result, output)


@command
def extract(
    source: Sources,
    encoder: EncoderOptions,
    read: ReadOptions,
    options: ExtractOptions,
    at: WorkspaceOptions,
    on: ComputeOptions,
    output: OutputOptions,
) -> None:
    """Cache a frozen encoder's features of a caption dataset. The same command again resumes what is unfinished."""
    from .pipeline.extract.extract import extract_source

    folder = Workspace(at.workspace).features
    with Display(output.quiet) as display:
        result = extract_source(source, folder, encoder, read, options, on, display.say, display.extracting)
    emit(result, output)


@command
def train(
    options: TrainOptions,
    first: Stage1Config,
    second: Stage2Config,
    at: WorkspaceOptions,
    on: DeviceOptions,
    output: OutputOptions,
) -> None:
    """Train a Q-Former on the cached features, then index them. The same command again resumes an interrupted run."""
    config = of_stage(options.stage, first, second)
    from .trainer.distributed.launch import launch
    from .trainer.distributed.place import place

    here = place()
    if options.nproc > 1 and here.count == 1:
        raise typer.Exit(launch(sys.argv[1:], options.nproc))
    here.end_with_launcher()
    from .retrieval.journey import train_run

    with Display(output.quiet or here.rank > 0) as display:
        show = (display.say, display.training, display.extracting)
        result = train_run(Workspace(at.workspace), options, config, on, *show)
    here.end()
    emit(result, output)


@command
def index(
    options: IndexOptions, run: RunOptions, at: WorkspaceOptions, on: ComputeOptions, output: OutputOptions
) -> None:
    """Build the FAISS index: the features under a run and under the encoder itself, or under the encoder alone without a run."""
    options.check()
    from .retrieval.journey import index_run

    with Display(output.quiet) as display:
        result = index_run(Workspace(at.workspace), run.run, on, display.say, options)
    emit(result, output)


@command
def search(
    options: SearchOptions, at: WorkspaceOptions, on: ComputeOptions, output: OutputOptions, query: Query = None
) -> None:
    """Find pictures for texts and pictures, or captions for a picture."""
    text = words(query) if query else None
    options.check(text)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would wait longer than one text takes
    from .retrieval.searcher import open_searcher

    hits = open_searcher(Workspace(at.workspace), on).search(text, options)
    for hit in hits:
        emit(hit, output, indent=None)
    if options.sheet is not None:
        from .retrieval.sheet import contact_sheet

        contact_sheet([(options.title(text), hits)], options.sheet)
        if not output.json:
            print(plain(f"contact sheet: {options.sheet}"))


@command
def serve(options: ServeOptions, at: WorkspaceOptions, on: ComputeOptions, output: OutputOptions) -> None:
    """Search in a browser, or over HTTP; needs the extra serve."""
    options.check()
    try:
        from .retrieval.serve.server import open_server
    except ModuleNotFoundError as error:
        raise QfError(f"{error.name} is not installed; pip install 'qf[serve]'") from error
    serving = open_server(Workspace(at.workspace), options, on)
    emit(serving, output)
    sys.stdout.flush()
    serving.run()


@command
def explain(
    image: Picture,
    caption: Caption,
    options: ExplainOptions,
    run: RunOptions,
    at: WorkspaceOptions,
    on: ComputeOptions,
    output: OutputOptions,
) -> None:
    """Draw which patches the queries attend to, which query answers a text, and what speaks for a match."""
    options.check()
    from .retrieval.journey import explain_picture

    with Display(output.quiet) as display:
        text = words(caption)
        result = explain_picture(Workspace(at.workspace), image, text, options, run.run, on, display.say)
    emit(result, output)


@command
def eval_(
    options: EvalOptions, run: RunOptions, at: WorkspaceOptions, on: ComputeOptions, output: OutputOptions
) -> None:
    """Measure a run on a split: retrieval by the encoder, ITC, their mix and ITM; or captions; or answers (--task)."""
    options.check()
    from .retrieval.journey import evaluate_task

    with Display(output.quiet) as display:
        result = evaluate_task(Workspace(at.workspace), options, run.run, on, display.say, display.extracting)
    emit(result, output)


@command
def caption(
    options: CaptionOptions,
    generate: GenerateOptions,
    run: RunOptions,
    at: WorkspaceOptions,
    on: ComputeOptions,
    output: OutputOptions,
    images: Pictures = None,
) -> None:
    """Write captions for pictures, by a run of stage 2 or by the generation head of stage 1."""
    options.check(bool(images))
    generate.check()
    from .retrieval.generation import caption

    with Display(output.quiet) as display:
        chosen = (images or [], options, generate, run.run, on, display.extracting)
        for made in caption(Workspace(at.workspace), *chosen):
            emit(made, output, indent=None)


@command
def answer(
    image: Picture,
    question: Question,
    generate: GenerateOptions,
    run: RunOptions,
    at: WorkspaceOptions,
    on: ComputeOptions,
    output: OutputOptions,
) -> None:
    """Answer a question about a picture, by a run of stage 2 that was trained with --task vqa."""
    generate.check()
    from .retrieval.dialog import answer

    chosen = (Workspace(at.workspace), image, words(question), generate, run.run, on)
    emit_growing(lambda on_text: answer(*chosen, on_text), output)


@command
def chat(
    images: Discussed,
    generate: GenerateOptions,
    run: RunOptions,
    at: WorkspaceOptions,
    on: ComputeOptions,
    output: OutputOptions,
) -> None:
    """Talk about pictures with a run of stage 2. Each line of the input is a question; Ctrl-D ends the dialog."""
    generate.check()
    from .retrieval.dialog import open_chat

    talk = open_chat(Workspace(at.workspace), images, generate, run.run, on)
    for question in lines():
        emit_growing(functools.partial(talk.ask, question), output)


@command
def info(at: WorkspaceOptions, output: OutputOptions, path: Artifact = None) -> None:
    """Show what a features folder, run or index is, and how it was made."""
    from .retrieval.info import info

    folders = Workspace(path or at.workspace).artifacts()
    emit_each({folder: info(folder) for folder in folders}, output)


@command
def verify(at: WorkspaceOptions, output: OutputOptions, path: Artifact = None) -> None:
    """Check the checksums and counts of artifacts; exit code 1 when anything is off."""
    from .retrieval.verify import refuse_problems, verify

    checked = {}
    with Display(output.quiet) as display:
        for folder in Workspace(path or at.workspace).artifacts():
            display.say(f"verifying {folder}")
            checked[folder] = verify(folder)
    emit_each(checked, output)
    refuse_problems(list(checked.values()))


@command
def export(run: RunArgument, out: Out, options: ExportOptions, at: WorkspaceOptions, output: OutputOptions) -> None:
    """Write a run's weights in the layout of Hugging Face or LAVIS; --init and QFormer.from_pretrained read them back."""
    from .retrieval.journey import export_run

    folder = Path(run) if has_manifest(Path(run)) else Workspace(at.workspace).runs / run
    with Display(output.quiet) as display:
        display.say(f"exporting {folder}")
        result = export_run(folder, out, options)
    emit(result, output)


# ---- output ----------------------------------------------------------------------------------------------------------


def emit(result: "Result", output: OutputOptions, indent: int | None = 2) -> None:
    """Print a result on stdout: as JSON, or as text for people."""
    print(json.dumps(result.to_json(), indent=indent) if output.json else plain_lines(str(result)))


def emit_growing(make: "Callable[[OnText | None], Result]", output: OutputOptions) -> None:
    """Emit the result of `make`, whose text a terminal shows while it grows."""
    if output.json or not sys.stdout.isatty():
        emit(make(None), output, indent=None)
    else:
        typed(make)


def emit_each(results: "Mapping[Path, Result]", output: OutputOptions) -> None:
    """Print the results of several artifacts; as JSON one object, keyed by path where there are several."""
    if output.json and len(results) > 1:
        print(json.dumps({str(path): result.to_json() for path, result in results.items()}, indent=2))
        return
    for result in results.values():
        emit(result, output)


# ---- the way out -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Failures that qf understands: one line on stderr, exit code 1, or 2 for wrong usage; 130 when interrupted."""
    try:
        yield
    except TyperException as error:
        command_path = getattr(getattr(error, "ctx", None), "command_path", "qf")
        if error.message:  # the help that `qf` alone prints has none
            print(plain(f"qf: error: {error.format_message()} (see `{command_path} --help`)"), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        stop_printing()
    except Exception as error:
        line = str(error) if isinstance(error, QfError) else explanation(error)
        if debug or line is None:
            raise
        if lost_peer(error) and os.environ.get(LAUNCHER):  # the launcher tells which process failed, and why
            raise SystemExit(LOST) from None
        print(f"qf: error: {plain(line)}", file=sys.stderr)
        raise SystemExit(1) from None


def stop_printing() -> NoReturn:
    """End quietly because nobody reads the output any more, as in `qf search … | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more
    raise SystemExit(141) from None


class StderrHandler(logging.Handler):
    """Prints the library's warnings on stderr, wherever it leads now: a live display redirects it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"qf: {record.levelname.lower()}: {plain(record.getMessage())}", file=sys.stderr)


def main() -> None:
    """Entry point of the `qf` command."""
    take_signals(leave)  # until something catches an interrupt
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "OMP_WAIT_POLICY" not in os.environ:  # PyTorch's threads wait for each other; where others want the cores too,
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # spinning for long took ten times as long
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or PyTorch says what it thinks of parameters without use
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that the terminal's encoding lacks
    logging.getLogger("qf").handlers = [StderrHandler()]
    arguments, debug = sys.argv[1:], "--debug" in sys.argv  # anywhere, and no option of a command
    try:
        take_signals(interrupt)
        with one_line_errors(debug):
            code = app([one for one in arguments if one != "--debug"], prog_name="qf", standalone_mode=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = EXIT_CODE
    finally:
        atexit.register(take_signals, leave)  # while Python ends, nothing catches an exception
    if code == EXIT_CODE and LAUNCHER not in os.environ:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(INTERRUPTED, file=sys.stderr)
    sys.exit(code)


take_signals(interrupt)
if __name__ == "__main__":
    main()
