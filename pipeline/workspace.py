"""Where features, runs and the index lie in a workspace, what is there, and which run was last. Standard library and msgspec only."""

import logging
from dataclasses import dataclass
from pathlib import Path

from .artifacts import has_manifest, is_own, read_manifest
from .errors import ArtifactError, QfError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workspace:
    """A folder that holds everything qf writes: features/, runs/NAME/, index/."""

    folder: Path

    @property
    def features(self) -> Path:
        return self.folder / "features"

    @property
    def index(self) -> Path:
        return self.folder / "index"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def run(self, name: str | None = None) -> Path:
        """The folder of the run of that name, or of the one of stage 1 that finished last. QfError if there is none."""
        if name is not None:
            if not name or name.startswith(".") or Path(name).name != name:
                raise QfError(f"{name!r} is not the name of a run: give the name of a folder in {self.runs}")
            return self.runs / name
        latest = self.latest_run()
        if latest is None:
            raise QfError(f"{self.folder} has no finished run; train one with `qf train`")
        return latest

    def weights(self, name: str | None) -> str | None:
        """The folder of the run of that name, if there is one; otherwise the name as it is."""
        is_run = name is not None and Path(name).name == name and (self.runs / name / "config.json").is_file()
        return str((self.runs / str(name)).resolve()) if is_run else name

    def latest_run(self, stage: int = 1) -> Path | None:
        """The run of that stage that finished last, or None. Damaged runs are skipped with a warning."""
        finished = {}
        for run in filter(has_manifest, self._run_folders()):
            try:
                manifest = read_manifest(run)
                if manifest.get("stage", 1) == stage:
                    finished[run] = str(manifest.get("finished", ""))
            except ArtifactError as error:
                log.warning("%s", error)
        return max(finished, key=lambda run: finished[run], default=None)

    def _run_folders(self) -> list[Path]:
        """The folders of runs, without hidden ones, in which replacements are built."""
        return sorted(path for path in self.runs.glob("*") if not path.name.startswith("."))

    def artifacts(self) -> list[Path]:
        """The finished artifacts of the workspace, or the workspace's own folder if that is an artifact itself.

        Unfinished ones are logged as warnings. QfError if nothing is finished."""
        if has_manifest(self.folder) or self.folder.is_file():
            return [self.folder]
        every = [self.features, *self._run_folders(), self.index]
        finished = [part for part in every if has_manifest(part)]
        unfinished = [part for part in (self.folder, *every) if _unfinished(part)]
        if not finished and unfinished:
            raise QfError(f"{unfinished[0]} is unfinished; run the command that began it again, and it goes on")
        if not finished:
            raise QfError(f"{self.folder} holds no features, run or index; begin with `qf extract SOURCE` or `qf demo`")
        for part in unfinished:
            log.warning("%s: unfinished; the command that began it goes on", part)
        return finished


def _unfinished(folder: Path) -> bool:
    """Whether qf began an artifact there: it holds a plan or a configuration that qf sealed, and no manifest."""
    return not has_manifest(folder) and is_own(folder)
