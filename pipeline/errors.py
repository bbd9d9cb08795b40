"""The errors that qf understands. The command line prints each as one line, `qf: error: …`, and exits with 1.

QfError                 anything below; the message says what to do next
├── DatasetError        a caption dataset that cannot be read as asked
├── EncoderError        a frozen encoder or language resource that cannot be loaded
├── ArtifactError       features, a run or an index: missing, unfinished, damaged, or made from something else
├── TrainingError       training cannot start or go on
└── UsageError          options that do not go together; the command line exits with 2
"""


class QfError(Exception):
    """Base of all errors that carry a message for the user."""


class DatasetError(QfError):
    """A caption dataset cannot be read as asked."""


class EncoderError(QfError):
    """A frozen encoder, its preprocessing or its tokenizer cannot be loaded."""


class ArtifactError(QfError):
    """A features folder, run or index is missing, unfinished, damaged, or made from something else."""


class TrainingError(QfError):
    """Training cannot start or go on."""


class UsageError(QfError):
    """Options or arguments that do not go together."""


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
