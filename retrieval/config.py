"""The options of search, evaluation and the demo. Standard library only."""

from dataclasses import dataclass
from pathlib import Path

from ..pipeline.errors import UsageError
from ..pipeline.options import Panel, option

DEMO_EPOCHS, DEMO_MINUTES = 4.0, 5  # what the demo trains, on a machine that ends within so many minutes
QUERY, OUTPUT = Panel(1, "What is searched"), Panel(2, "What is drawn")
RERANK = 16  # candidates that are re-ranked where no other number is given
EVALUATED = ("retrieval", "caption", "vqa")
SCORERS = ("mix", "itc", "encoder")


@dataclass(frozen=True)
class RunOptions:
    """Which run answers."""

    run: str | None = option(None, "Name of the run; the one trained last unless given.")


TYPES = ("auto", "flat", "fp16", "sq8")


@dataclass(frozen=True)
class IndexOptions:
    """How the vectors of an index are stored."""

    type: str = option(
        "auto",
        "flat: exact. fp16, sq8: 2 bytes or 1 a number, without queries that never win. auto: exact up to --max-memory, else the smallest "
        "that holds --recall.",
    )
    recall: float = option(0.99, "Least recall@10 of held-out captions against the exact index.", min=0, max=1)
    max_memory: float = option(1.0, "GB that exact vectors may take with --type auto.", min=0, max=1e6)

    def check(self) -> None:
        """UsageError if the type is unknown."""
        if self.type not in TYPES:
            raise UsageError(f"--type {self.type}: use {', '.join(TYPES)}")


@dataclass(frozen=True)
class SearchOptions:
    """The query, unless it is a text, and the number of hits."""

    image: Path | None = option(None, "Search with this picture instead of a text.", panel=QUERY)
    plus: list[str] | None = option(
        None, "Add this to the query: a text, or a picture by its file or key. May be given several times.", panel=QUERY
    )
    minus: list[str] | None = option(
        None, "Take this away from the query: a text, or a picture. May be given several times.", panel=QUERY
    )
    find: str = option("images", "With --image: images, or text for captions.", panel=QUERY)
    k: int = option(10, "Number of hits.", min=1, max=2**20, flags=("--k", "-k"), panel=QUERY)
    rerank: int = option(
        0, "Re-rank this many of the first hits, at least -k, by image-text matching.", min=0, max=2**20, panel=QUERY
    )
    scorer: str = option(
        "mix",
        "mix: the encoder's own scores and the run's, by fitted weights; itc: the run alone; encoder: its scores alone.",
        panel=QUERY,
    )
    sheet: Path | None = option(None, "Draw the hits as a contact sheet, FILE.png.", panel=OUTPUT)

    def title(self, query: str | None) -> str:
        """A heading for the hits."""
        if self.image is not None:
            return f"{'captions for' if self.find == 'text' else 'like'} {self.image}"
        signed = [*(f"+ {value}" for value in self.plus or ()), *(f"- {value}" for value in self.minus or ())]
        return " ".join([query or "", *signed]).strip().removeprefix("+ ")

    def check(self, query: str | None) -> None:
        """UsageError unless the options and the text `query` make one question."""
        if self.image is not None and (self.plus or self.minus):
            raise UsageError("--image searches with this picture alone; use --plus FILE to combine it")
        if (query is None and not self.plus and not self.minus) == (self.image is None):
            raise UsageError('give either a text, as in qf search "a dog on a beach", or --image FILE')
        if self.find not in ("images", "text"):
            raise UsageError("--find is images or text")
        if self.scorer not in SCORERS:
            raise UsageError(f"--scorer is one of {', '.join(SCORERS)}")
        if self.sheet is not None and self.sheet.suffix.lower() != ".png":
            raise UsageError(f"--sheet {self.sheet}: the sheet is a PNG; give it a name that ends in .png")
        if self.image is None and self.find == "text":
            raise UsageError("--find text finds captions for a picture: give --image FILE instead of a text")
        if self.image is not None and self.rerank:
            raise UsageError("--rerank matches pictures with a text: it does not go with --image")
        if (self.plus or self.minus) and self.rerank:
            raise UsageError("--rerank matches pictures with one text: it does not go with --plus and --minus")
        if self.scorer == "encoder" and self.rerank:
            raise UsageError("--rerank matches by a run: it goes with --scorer mix or itc")


@dataclass(frozen=True)
class EvalOptions:
    """The measurement."""

    split: str | None = option(None, "The split to measure on; test unless given, or val where there is no test.")
    rerank: list[int] | None = option(
        None,
        f"Re-rank this many candidates of each query by image-text matching; 0: none; {RERANK} unless given. May be given several "
        "times.",
        min=0,
        max=2**20,
    )
    fit_mix: bool = option(
        False, "First fit the run's mix anew on validation images, and store it.", flags=("--fit-mix",)
    )
    task: str = option("retrieval", "retrieval: R@K. caption: CIDEr and the like. vqa: accuracy of answers.")
    plot: Path | None = option(None, "Draw R@1 against the time of a query, FILE.png.")
    failures: Path | None = option(
        None, "Draw texts whose picture is not ranked first, with what is ranked before it, FILE.png."
    )

    @property
    def rerank_at(self) -> list[int]:
        """The numbers of candidates to re-rank, ascending; none are re-ranked if it is empty."""
        return sorted({k for k in ([RERANK] if self.rerank is None else self.rerank) if k})

    def check(self) -> None:
        """UsageError if the task is unknown, or if a drawing is no PNG or not of this task."""
        if self.task not in EVALUATED:
            raise UsageError(f"--task {self.task}: use {', '.join(EVALUATED)}")
        for name, file in (("--plot", self.plot), ("--failures", self.failures)):
            if file is not None and self.task != "retrieval":
                raise UsageError(f"{name} draws retrieval; it does not go with --task {self.task}")
            if file is not None and file.suffix.lower() != ".png":
                raise UsageError(f"{name} {file}: the drawing is a PNG; give it a name that ends in .png")


@dataclass(frozen=True)
class ExplainOptions:
    """Where the drawing goes."""

    out: Path | None = option(None, "The drawing, a PNG; explain.png in the workspace unless given.")

    def check(self) -> None:
        """UsageError if the drawing is to be no PNG."""
        if self.out is not None and self.out.suffix.lower() != ".png":
            raise UsageError(f"--out {self.out}: the drawing is a PNG; give it a name that ends in .png")


@dataclass(frozen=True)
class DemoOptions:
    """How large the demo is, and where it goes."""

    workspace: Path | None = option(
        None, "Folder for all of it; demo in the usual workspace unless given.", flags=("--workspace", "-w")
    )
    epochs: float | None = option(
        None,
        f"Passes over the sample's training scenes; unless given {DEMO_EPOCHS:g}, or as many fewer as let this machine end within "
        f"{DEMO_MINUTES} minutes by a short measurement.",
        min=0,
        max=1e6,
    )
    scenes: int = option(
        8000,
        "Training scenes; a 16th more, 250 at most, for validation, and an 8th more, 500 at most, for testing.",
        min=48,
        max=2**20,
    )
    seed: int = option(0, "Seed of training.", min=0, max=2**63 - 1)
    full: bool = option(
        False,
        f"Then let a small language model caption the pictures and answer questions, in {DEMO_MINUTES} minutes more.",
        flags=("--full",),
    )


@dataclass(frozen=True)
class CaptionOptions:
    """Which pictures are captioned, by what, and where the captions go."""

    features: bool = option(False, "Caption all images of the workspace's features.", flags=("--features",))
    split: str | None = option(None, "With --features: the images of this split alone.")
    out: Path | None = option(
        None,
        "Write the captions to this .csv or .jsonl as well; the same command again goes on with a file that was begun.",
    )
    stage: int | None = option(
        None,
        "2: the latest run with a language model; 1: the Q-Former's own generation head. 2 if there is one.",
        min=1,
        max=2,
    )

    def check(self, images: bool) -> None:
        """UsageError if it is not clear which pictures are meant."""
        if images == self.features:
            raise UsageError("give pictures, folders or keys, or else --features for all images of the features")
        if self.split and not self.features:
            raise UsageError("--split chooses among the images of --features; add it")
        if self.out is not None and self.out.suffix.lower() not in (".csv", ".jsonl"):
            raise UsageError(f"--out {self.out}: give it a name that ends in .csv or .jsonl")


@dataclass(frozen=True)
class ServeOptions:
    """Where the server is reached, and what it bears."""

    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0 for other machines to reach it.")
    port: int = option(8000, "Port to listen at; 0 for a free one.", min=0, max=65535)
    token: str | None = option(
        None, "Ask for this token: ?token=… once in a browser, or a bearer header.", envvar="QF_TOKEN"
    )
    max_upload: float = option(16.0, "Largest uploaded picture, in MB.", min=0.01, max=256)
    max_megapixels: float = option(40.0, "Most pixels of a picture that is decoded, in millions.", min=0.01, max=178)
    queue: int = option(256, "Searches that wait at most; further ones are answered 503.", min=1, max=10_000)

    def check(self) -> None:
        """UsageError if the token is empty."""
        if self.token is not None and not self.token.strip():
            raise UsageError("--token is empty; give a long one that cannot be guessed")
