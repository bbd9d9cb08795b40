"""Who can embed queries for some features: the encoder itself, a run, or both."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...pipeline.errors import EncoderError, QfError
from .joint_space import JointSpace
from .qformer import Run, check_features
from .query_encoder import QueryEncoder

if TYPE_CHECKING:
    import torch

    from ...pipeline.features.reader import Features


def query_encoders(
    features: "Features", run: Run | None, device: "torch.device", say: Callable[[str], None] = lambda text: None
) -> list[QueryEncoder]:
    """The features' own encoder where it has a text model, then the run.

    If the encoder's text model is not available any more, `say` gets a line, as long as there is a run. EncoderError if it is
    not available and there is no run; ArtifactError if the run was trained on other features; QfError if nothing is left."""
    from ...pipeline.encoders.text import has_text_model

    found: list[QueryEncoder] = []
    try:
        if has_text_model(features.encoder):
            joint_space = JointSpace(features.encoder, device)
            _ = joint_space.text_model  # loaded here, where a missing encoder can be passed over
            found.append(joint_space)
    except EncoderError as error:
        if run is None:
            raise
        say(f"without the encoder's own scores: {error}")
    if run is not None:
        check_features(run, features)
        found.append(run)
    if not found:
        raise QfError(
            f"encoder {features.encoder['id']} has no text model and there is no run yet; train one first: qf train"
        )
    return found
