"""A gallery of 100,000 images, searched and scored; python -m benchmarks.galleries --queries 100000 asks as many."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import resource

import numpy as np
from torch.utils.benchmark import timer

from benchmarks.measure import Times, interleaved, page, table
from danet_core.nearest import build, nearest
from danet_core.protocols import evaluate_regdb
from danet_core.similarity import unit

GALLERY, QUERIES, FEATURES, IMAGES_EACH = 100_000, 256, 2048, 10
ROUNDS, COUNT = 3, 50


def crowd(images: int, features: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (images, features) around a centre for each identity, and the identities, which share centres."""
    ids = max(1, images // IMAGES_EACH)
    rng = np.random.default_rng(seed)
    pids = rng.permutation(np.arange(images) % ids)
    feat = rng.standard_normal((images, features), dtype=np.float32)
    feat *= 3
    centres = np.random.default_rng(0).standard_normal((ids, features), dtype=np.float32)
    for start in range(0, images, 4096):  # not a third copy of the features
        feat[start : start + 4096] += centres[pids[start : start + 4096]]
    return feat, pids


def peak() -> str:
    """The largest memory this process has had, interpreter, libraries and features included."""
    step = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is in bytes there and in KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * step / 1e9:.2f} GB"


def section(tiny: bool, queries: int = QUERIES) -> str:
    images, features, rounds = (300, 8, 1) if tiny else (GALLERY, FEATURES, ROUNDS)
    (gallery, pids), (query, q_pids) = crowd(images, features, 1), crowd(images, features, 2)
    query, q_pids = query[:queries], q_pids[:queries]  # a part in use, and all of them in memory
    scores = {"scores": lambda: evaluate_regdb(query, q_pids, gallery, pids)}
    many = queries > QUERIES
    times = interleaved(scores, 1 if many else rounds, warm=many)["scores"]
    rows: list[tuple[object, ...]] = [
        (f"all scores of {len(query):,} queries", times, Times(times.seconds / len(query)), peak())
    ]
    if not many:
        one = interleaved({"search": lambda: nearest(query[0], gallery, COUNT)}, rounds)["search"]
        rows.append(("exact search of one query, as `search` does it", one, one, peak()))
        rows += faiss_rows(query, gallery, rounds)
    return page(
        "## Large galleries",
        f"""{images:,} gallery images, random features of {features:,} float32 numbers around {images // IMAGES_EACH:,}
        centres, on one thread: {images * features * 4 / 1e9:.2f} GB a side. Peak: the largest memory of the process so
        far, interpreter, libraries and features included. Scores
        include the second or two of scaling the gallery; faiss answers all queries in one call.""",
        table(("work", "time", "a query", "peak"), rows),
    )


def faiss_rows(query: np.ndarray, gallery: np.ndarray, rounds: int) -> list[tuple[object, ...]]:
    """The exact index of faiss, or what to install."""
    work = f"faiss's exact index: the nearest {COUNT} of {len(query):,} queries"
    if importlib.util.find_spec("faiss") is None:
        return [(f"{work} (make extras)", "not run", "not run", "not run")]
    started = timer()
    index = build(unit(gallery), "faiss", COUNT)
    built = Times(np.array([timer() - started]))
    asked = unit(query)
    found = interleaved({"faiss": lambda: index.search(asked, COUNT)}, rounds)["faiss"]
    return [
        ("building faiss's exact index", built, "none", peak()),
        (work, found, Times(found.seconds / len(query)), peak()),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="sizes at which the figures mean nothing, for the tests")
    parser.add_argument("--queries", type=int, default=QUERIES, help=f"of {GALLERY:,}, which take some eight minutes")
    options = parser.parse_args()
    print(section(options.tiny, options.queries))
