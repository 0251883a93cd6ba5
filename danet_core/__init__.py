"""DANet: dual-level alignment for visible-infrared person re-identification, reproduced.

The modules, in the order in which data flow through them:
    what a run is      config (params.yaml), parameters (its rows), strict (how it is read), files, repro, precision,
                       durations
    data               images, store, sampler, augment
    the method         backbone, model, losses (slow: the same as loops), parallel, train, record, runs
    scores of a run    metrics, similarity, rerank, protocols, distances, probe, ranking, extremes, evaluate
    the study          scores, tables, statistics, report (Tables 1 to 3), findings, page (the report), readings
    to look at         style, plots, crops, sheets, diagrams, exploration, explore, nearest, search

Axis names used in shapes and comments everywhere:
    B  images in a batch            P  identities in a batch       K  images per identity and modality
    D  feature dimension            C  training identities         N  images in a store
    Q  query images                 G  gallery images              T  trials
    H, W  image height and width
Modalities are integers: VISIBLE 0, INFRARED 1. Scores are fractions; only printed tables show percent.
"""

VISIBLE, INFRARED = 0, 1
MODALITIES = ("visible", "infrared")  # a modality's name by its number
