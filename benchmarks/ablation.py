"""How much is each objective worth, and all captions, and augmented views? Trains variants that differ in one option.

    qf extract captions.csv --encoder mobilenetv2 -w plain
    qf extract captions.csv --encoder mobilenetv2 -w views --views 3 --codec int8
    python benchmarks/ablation.py plain views --epochs 8

Each variant is one `qf train` process; `--train` adds options to all of them. A finished variant is not trained again. Prints one
JSON object: for each variant R@K on the validation split, also re-ranked by ITM if ITM was trained, and minutes of training."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

VARIANTS = {  # name: (workspace, options)
    "ITC": ("plain", ["--losses", "itc"]),
    "ITC + ITM": ("plain", ["--losses", "itc,itm"]),
    "ITC + ITM + ITG": ("plain", []),
    "ITC, one caption": ("plain", ["--losses", "itc", "--captions-per-image", "1"]),
    "ITC, views": ("views", ["--losses", "itc"]),
}
RERANK = 16


def qf(*arguments: str) -> Any:
    """Runs a qf command and returns its JSON. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-c", "from qf.cli import main; main()", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path, help="workspace with features without augmented views")
    parser.add_argument("views", type=Path, help="workspace with features with augmented views")
    parser.add_argument("--epochs", default="8")
    parser.add_argument("--train", default="--lr 1e-3", help="further options of every qf train")
    options = parser.parse_args()
    results = {}
    for name, (place, changed) in VARIANTS.items():
        workspace = str(getattr(options, place))
        run = name.replace(" ", "").replace("+", "-").replace(",", "-").lower()
        how = ["--epochs", options.epochs, *options.train.split(), *changed, "--no-index"]
        summary = qf("train", "-w", workspace, "--name", run, *how)
        matched = "itm" in " ".join(changed) or "--losses" not in changed
        found = qf("eval", "-w", workspace, "--run", run, "--split", "val", "--rerank", str(RERANK if matched else 0))
        scores = {name: found[name] for name in ("itc", f"itc+itm@{RERANK}") if name in found}
        results[name] = {"options": " ".join(changed), **scores, "minutes": round(summary["seconds"] / 60, 1)}
    print(json.dumps({"epochs": options.epochs, "train": options.train, "variants": results}, indent=2))


if __name__ == "__main__":
    main()
