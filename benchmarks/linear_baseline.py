"""How well does a linear model retrieve? Ridge regression maps mean token features to TF-IDF/LSA of captions, ranked by cosine.

    python benchmarks/linear_baseline.py qf-out/features --split val

Prints one JSON object: R@K both ways on the split, in percent. It needs scikit-learn, which qf does not install."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from qf.pipeline.features.codecs import decode
from qf.pipeline.features.reader import Features
from qf.trainer.metrics.retrieval import retrieval
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler, normalize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--components", type=int, default=500, help="dimensions of the text space")
    parser.add_argument("--alpha", type=float, default=3000.0, help="strength of the ridge")
    arguments = parser.parse_args()
    started = time.perf_counter()
    features = Features(arguments.features)

    def pooled(rows: np.ndarray) -> np.ndarray:
        return np.stack([decode(features.read(rows[i : i + 1]))[0].mean(0).numpy() for i in range(len(rows))])

    def captions(rows: np.ndarray) -> tuple[list[str], np.ndarray]:
        texts = [caption for row in rows for caption in features.captions[row]]
        return texts, np.array([n for n, row in enumerate(rows) for _ in features.captions[row]])

    train, test = features.rows("train"), features.rows(arguments.split)
    texts, owner = captions(train)
    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2)
    lsa = TruncatedSVD(arguments.components, random_state=0)
    space = normalize(lsa.fit_transform(tfidf.fit_transform(texts)))
    target = normalize(np.stack([space[owner == n].mean(0) for n in range(len(train))]))
    scaler = StandardScaler().fit(pooled(train))
    ridge = Ridge(alpha=arguments.alpha).fit(scaler.transform(pooled(train)), target)
    images = normalize(ridge.predict(scaler.transform(pooled(test))))
    asked, image_rows = captions(test)
    scores = torch.from_numpy(images @ normalize(lsa.transform(tfidf.transform(asked))).T)
    result = {"split": arguments.split, "images": len(test), "texts": len(asked), "alpha": arguments.alpha}
    result |= {"components": arguments.components, "ridge": retrieval(scores, torch.from_numpy(image_rows))}
    print(json.dumps(result | {"seconds": round(time.perf_counter() - started, 1)}, indent=2))


if __name__ == "__main__":
    main()
