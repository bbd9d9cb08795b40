"""How much memory and time does an evaluation take? Ranks a made-up split in blocks, or by whole matrices of scores.

    python benchmarks/evaluation.py --images 4000
    python benchmarks/evaluation.py --images 4000 --whole
    python benchmarks/evaluation.py --images 100000 --asked 500

`--asked` ranks so many queries of each direction, among all candidates. `--whole` holds the matrix (N, M) of each scorer, as
evaluation did before it ranked in blocks. Prints one JSON object: R@1 of each scorer both ways, seconds, the bytes of the
embeddings, and by how much the peak of the process's memory grew beyond them."""

import argparse
import json
import resource
import time
from collections.abc import Callable

import torch
from qf.retrieval.certainty import certainties
from qf.retrieval.measure import Both, rows_of
from qf.retrieval.mix import mixed
from qf.retrieval.mix_file import ENCODER, IMAGE_TO_TEXT, RUN_ALONE, TEXT_TO_IMAGE, WAYS, Row, Scorer, Weights
from qf.retrieval.ranking import Embedded, rank
from qf.trainer.metrics.retrieval import retrieval
from torch.nn.functional import normalize

MIX = Scorer(Weights(0.5, 0.5, 0), Weights(0.5, 0.5, 0))
K = 16


def split(images: int, captions: int, per_image: int, width: int) -> Embedded:
    """Random images, and texts that are near to one of their own image's embeddings."""
    seen = torch.empty(images, per_image, width)
    texts = torch.empty(images * captions, width)
    for start in range(0, images, 1024):
        some = seen[start : start + 1024].normal_()
        some.copy_(normalize(some, dim=-1))
        told = some[:, :1] + torch.randn(len(some), captions, width) * 1.5 / width**0.5
        texts[start * captions : (start + len(some)) * captions] = normalize(told, dim=-1).flatten(0, 1)
    return Embedded(seen, texts)


def peak() -> int:
    """Bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--captions", type=int, default=5, help="of an image")
    parser.add_argument("--queries", type=int, default=8, help="query embeddings of an image in the run's space")
    parser.add_argument("--width", type=int, default=64, help="of an embedding")
    parser.add_argument("--asked", type=int, help="queries of each direction; all unless given")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    spaces = {"clip": 1, "itc": options.queries}
    embedded = {name: split(options.images, options.captions, count, options.width) for name, count in spaces.items()}
    scorers = {"clip": ENCODER, "itc": RUN_ALONE, "mix": MIX}
    owners = torch.arange(options.images).repeat_interleave(options.captions)

    def in_blocks() -> dict[str, Row]:
        asked = slice(options.asked)
        some = {
            TEXT_TO_IMAGE: {name: Embedded(one.images, one.texts[asked]) for name, one in embedded.items()},
            IMAGE_TO_TEXT: {name: Embedded(one.images[asked], one.texts) for name, one in embedded.items()},
        }
        ways = {way: rank(some[way], scorers, way, owners, K) for way in WAYS}
        rankings: dict[str, Both] = {name: {way: ways[way][name] for way in WAYS} for name in scorers}
        if options.asked is None:
            certainties(rankings, owners.numpy())
        return rows_of(rankings)

    def whole() -> dict[str, Row]:
        first = {name: one.scores(TEXT_TO_IMAGE).T.contiguous() for name, one in embedded.items()}  # (N, M)
        return {name: retrieval(mixed(first, scorer.text_to_image), owners) for name, scorer in scorers.items()}

    rank(
        {name: Embedded(one.images[:8], one.texts[:8]) for name, one in embedded.items()},
        scorers,
        WAYS[0],
        owners[:8],
        K,
    )
    ranked: Callable[[], dict[str, Row]] = whole if options.whole else in_blocks
    before, began = peak(), time.perf_counter()
    rows = ranked()
    seconds, after = time.perf_counter() - began, peak()
    held = sum(4 * (one.images.numel() + one.texts.numel()) for one in embedded.values())
    print(
        json.dumps(
            {
                **{
                    name: getattr(options, name)
                    for name in ("images", "captions", "queries", "width", "asked", "whole")
                },
                "R@1": {name: [row[f"{way}_R@1"] for way in WAYS] for name, row in rows.items()},
                "seconds": round(seconds, 1),
                "bytes_of_embeddings": held,
                "bytes_of_whole_matrix": 4 * options.images**2 * options.captions,
                "peak_grew_by": after - before,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
