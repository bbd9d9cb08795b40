"""How much is a teacher worth? Trains variants that differ in how the teacher teaches, with equal steps, over several seeds.

    qf extract sample/captions.csv --encoder builtin
    python benchmarks/teach.py qf-out --split test --train '{"epochs": 8, "batch_size": 64, "lr": 1e-3, "losses": "itc,itm"}'

`--train` holds fields of Stage1Config for all variants, `--teacher` who teaches. A finished variant is not trained again. Prints one
JSON object: for each variant and seed R@1 both ways on the split of every scorer and of their mix, and minutes; then the means."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qf.pipeline.device import resolve_device
from qf.pipeline.features.reader import Features
from qf.retrieval.config import RERANK
from qf.retrieval.encode.available import query_encoders
from qf.retrieval.encode.qformer import Run
from qf.retrieval.evaluate import evaluate_retrieval
from qf.retrieval.mix_file import WAYS
from qf.retrieval.validation import fit_mix
from qf.trainer.config import Stage1Config
from qf.trainer.stage1.stage import train

VARIANTS: dict[str, dict[str, Any]] = {
    "BLIP-2's losses": {"teach": "none"},
    "soft targets": {"teach_weight": 0.0},
    "features drawn to the teacher's": {"soft_targets": 0.0},
    "both": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, with commas between")
    parser.add_argument("--teacher", default="encoder")
    parser.add_argument("--train", type=json.loads, default={})
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: as many as it takes by itself")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, features = resolve_device("auto"), Features(options.workspace / "features")
    results: dict[str, Any] = {}
    for seed in range(options.seeds):
        for variant in options.variants.split(","):
            fields = {"teach": options.teacher, **options.train, **VARIANTS[variant], "seed": seed}
            name = f"{variant}-{seed}".replace(" ", "-").replace("'", "")
            trained = train(features, options.workspace / "runs" / name, Stage1Config(**fields), device)
            run = Run(options.workspace / "runs" / name, device, "auto")
            encoders = query_encoders(features, run, device)
            mix = fit_mix(features, run, encoders, lambda text: None)
            rows = evaluate_retrieval(features, options.split, encoders, [RERANK], mix).rows
            found = {row: [value[f"{way}_R@1"] for way in WAYS] for row, value in rows.items()}
            results.setdefault(variant, []).append({"seed": seed, **found, "minutes": round(trained.seconds / 60, 2)})
    means = {name: mean(runs) for name, runs in results.items()}
    print(json.dumps({"split": options.split, "train": options.train, "variants": results, "means": means}, indent=2))


def mean(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each figure over the seeds."""
    names = [name for name in runs[0] if name != "seed"]
    return {name: np.round(np.mean([run[name] for run in runs], axis=0), 2).tolist() for name in names}


if __name__ == "__main__":
    main()
