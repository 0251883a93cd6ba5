"""Search and evaluation with a gallery of 100,000 images; python -m benchmarks.galleries --full asks all as queries."""

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
from danet_core.rerank import unit

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


def section(tiny: bool, full: bool = False) -> str:
    images, features, rounds = (300, 8, 1) if tiny else (GALLERY, FEATURES, ROUNDS)
    gallery, pids = crowd(images, features, 1)
    asked = images if full else min(images, QUERIES)
    query, q_pids = crowd(images, features, 2)
    if not full:
        query, q_pids = query[:asked].copy(), q_pids[:asked]  # a copy, so that the rest is let go
    if full:
        started = timer()
        evaluate_regdb(query, q_pids, gallery, pids)
        times = Times(np.array([timer() - started]))
    else:
        times = interleaved({"evaluate": lambda: evaluate_regdb(query, q_pids, gallery, pids)}, rounds)["evaluate"]
    rows: list[tuple[object, ...]] = [(f"all scores of {asked:,} queries", times, Times(times.seconds / asked), peak())]
    if not full:
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
        return [(f"{work} (pip install .[faiss])", "not run", "not run", "not run")]
    started = timer()
    index = build(unit(gallery), "faiss", COUNT)
    built = Times(np.array([timer() - started]))
    asked = unit(query)
    found = interleaved({"faiss": lambda: index.search(asked, COUNT)}, rounds)["faiss"]
    return [
        ("building faiss's exact index", built, "", peak()),
        (work, found, Times(found.seconds / len(query)), peak()),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="sizes at which the figures mean nothing, for the tests")
    parser.add_argument("--full", action="store_true", help="as many queries as gallery images: a quarter of an hour")
    options = parser.parse_args()
    print(section(options.tiny, options.full))
