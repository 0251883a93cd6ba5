"""The sensitivity study from made-up records: differences, adjusted p values, verdicts, files."""

import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from records import of, study, write_records
from scipy import stats

from danet_study import sensitivity
from danet_study.config import SensitivityRow
from danet_study.sensitivity import same_weights

ROWS = {
    "margin": SensitivityRow(
        label="rho 1.4", group="Margin", against="b_cc", extends=["b_cc"], losses={"L_cc": {"margin": 1.4}}
    ),
    "before_bn": SensitivityRow(
        label="before BN", group="Test", against="b_cc", extends=["b_cc"], model={"test_feature": "before_bn"}
    ),
    "euclidean": SensitivityRow(
        label="Euclidean", group="Test", against="before_bn", extends=["before_bn"], evaluation={"metric": "euclidean"}
    ),
    "pooling": SensitivityRow(
        label="maximum", group="Network", against="baseline", extends=["baseline"], model={"pooling": "max"}
    ),
}
SCORES = {
    "baseline": (0.10, 0.10, 0.10),
    "b_cc": (0.20, 0.22, 0.24),
    "margin": (0.11, 0.12, 0.13),
    "before_bn": (0.21, 0.23, 0.25),
    "euclidean": (0.21, 0.23, 0.25),
}


def plan(seeds=(0, 1, 2)):
    found = study(rows=ROWS)
    rows = found.sensitivity.model_copy(update={"rows": ROWS, "run": [*SCORES, "pooling"], "seeds": list(seeds)})
    return found.model_copy(update={"sensitivity": rows})


def loaded(folder, seeds=(0, 1, 2), **overrides):
    """All rows with the scores above; `pooling` was not run."""
    found = plan(seeds)
    runs = [found.run("synth_sysu-1", name, seed) for name in SCORES for seed in seeds]
    write_records(folder, [of(c, cmc1=SCORES[c.variant][c.seed], **overrides.get(c.variant, {})) for c in runs])
    return found, sensitivity.load_sensitivity(found, folder)


def table(folder, seeds=(0, 1, 2)):
    return sensitivity.sensitivity_table(*loaded(folder, seeds)).query("metric == 'Rank-1'").set_index("row")


def test_difference_is_tested_with_the_variance_pooled_over_all_trainings(tmp_path):
    row = table(tmp_path).loc["margin"]
    # sums of squares in points: 0, 8, 2 over 2 degrees of freedom each; before_bn and euclidean score b_cc's weights
    error = math.sqrt(10 / 6 * 2 / 3)
    assert (row["difference"], row["n"], row["test"]) == (pytest.approx(-10), 3, "pooled")
    assert row["p"] == pytest.approx(2 * stats.t.sf(10 / error, 6))
    assert row["df"] == 6 and row["high"] == pytest.approx(-10 + stats.t.ppf(0.975, 6) * error)
    assert row["verdict"] == "lowers"


def test_rows_that_score_the_same_weights_are_paired_by_seed(tmp_path):
    rows = table(tmp_path)
    assert rows["test"].to_dict() == {
        "margin": "pooled",
        "before_bn": "paired",
        "euclidean": "paired",
        "pooling": "pooled",
    }
    assert rows.loc["before_bn", ["difference", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    assert rows.loc["before_bn", "verdict"] == "raises"
    assert (rows.loc["euclidean", "p"], rows.loc["euclidean", "verdict"]) == (1, "inconclusive")


def test_pairs_are_those_of_the_seeds_that_both_have(tmp_path):
    found, _ = loaded(tmp_path)
    (tmp_path / "records/synth_sysu-1-before_bn-1.json").unlink()
    results = sensitivity.load_sensitivity(found, tmp_path)
    rows = sensitivity.sensitivity_table(found, results).query("metric == 'Rank-1'").set_index("row")
    assert rows.loc["before_bn", ["test", "difference", "n", "df"]].tolist() == ["paired", pytest.approx(1), 2, 1]
    assert rows.loc["margin", "df"] == 6


def test_same_weights_ignores_the_test_only():
    runs = {name: plan().run("synth_sysu-1", name, 0) for name in (*SCORES, *ROWS)}
    assert same_weights(runs["b_cc"], runs["before_bn"]) and same_weights(runs["before_bn"], runs["euclidean"])
    assert not same_weights(runs["b_cc"], runs["margin"]) and not same_weights(runs["baseline"], runs["pooling"])


def test_row_without_record_is_named_and_not_counted(tmp_path):
    rows = table(tmp_path)
    assert rows.loc["pooling", "verdict"] == "not run" and rows.loc["pooling", ["mean", "difference", "p"]].isna().all()
    tested = rows[rows["p"].notna()]
    assert len(tested) == 3
    assert tested["bh"].tolist() == pytest.approx(stats.false_discovery_control(tested["p"]).tolist())
    found = loaded(tmp_path)
    assert "not run" in sensitivity.markdown(*found) and "15 of 18" in sensitivity.markdown(*found)


@pytest.mark.parametrize("key", ["config", "data"])
def test_records_of_other_parameters_or_data_count_as_not_run(tmp_path, key):
    found, _ = loaded(tmp_path)
    path = tmp_path / "records/synth_sysu-1-margin-2.json"
    record = json.loads(path.read_text())
    if key == "config":
        record["config"]["recipe"]["lr"] *= 2
    else:
        record["provenance"]["data_sha256"] = "e1" * 32
    path.write_text(json.dumps(record))
    results = sensitivity.load_sensitivity(found, tmp_path)
    assert results.seeds("margin") == [0, 1] and "14 of 18" in sensitivity.markdown(found, results)


def test_one_seed_is_not_tested(tmp_path):
    rows = table(tmp_path, seeds=(0,))
    assert rows.loc["margin", "difference"] == pytest.approx(-9)
    assert rows.loc[["margin", "before_bn"], "verdict"].tolist() == ["not tested (n = 1)"] * 2
    assert rows[["p", "holm", "bh", "low"]].isna().all().all()


def test_verdict_needs_holms_p(tmp_path):
    found, results = loaded(tmp_path)
    for record in results.records.values():
        if record["variant"] == "margin":  # 3.4 points below b_cc: p 0.03, times 2 or 3 rows above 0.05
            record["settings"]["all_single"]["mean"]["cmc1"] = SCORES["b_cc"][record["seed"]] - 0.034
        if record["variant"] == "before_bn":
            record["settings"]["all_single"]["mean"]["cmc1"] = SCORES["b_cc"][record["seed"]]
    row = sensitivity.sensitivity_table(found, results).set_index(["metric", "row"]).loc[("Rank-1", "margin")]
    assert row["p"] < 0.05 < row["holm"] and row["verdict"] == "inconclusive"


def test_notes_on_the_test_are_those_of_the_reference_rows(tmp_path):
    settings = of(plan().run("synth_sysu-1", "euclidean", 0))["settings"]
    marked = {name: {**one, "metric": "euclidean"} for name, one in settings.items()}
    text = sensitivity.markdown(*loaded(tmp_path, euclidean={"settings": marked}))
    assert "Synthetic" in text and "euclidean" not in text


def test_files_are_written_and_the_same_again(tmp_path):
    found, _ = loaded(tmp_path)
    paths = sensitivity.write_sensitivity(found, tmp_path)
    assert [path.name for path in paths] == ["table.csv", "table.md", "forest.png"]
    first = [path.read_bytes() for path in paths]
    assert sensitivity.write_sensitivity(found, tmp_path) == paths
    assert [path.read_bytes() for path in paths] == first
    assert len(pd.read_csv(io.BytesIO(first[0]))) == 2 * len(ROWS)


def test_forest_has_a_mark_per_tested_row_filled_where_decided(tmp_path):
    figure = sensitivity.forest(*loaded(tmp_path))
    marks = figure.axes[0].collections[1]
    assert marks.get_offsets().tolist() == pytest.approx(np.array([[-10, 1], [1, 3], [0, 4]]))  # below a group's title
    assert [face.all() for face in marks.get_facecolors()] == [False, False, True]  # white: euclidean
    assert "Synthetic" in figure.get_suptitle()
    assert [text.get_text().strip() for text in figure.axes[0].texts] == ["not run"]


def test_nothing_run_still_gives_a_table_and_a_figure(tmp_path):
    assert len(sensitivity.write_sensitivity(study(), tmp_path)) == 3
    assert "not run" in (tmp_path / "sensitivity/table.md").read_text()
