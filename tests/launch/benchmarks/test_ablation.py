from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from launch.benchmarks.ablation import BASELINE, CONFIG, VARIANTS, VariantScores, table
from launch.benchmarks.ablation_page import ablation_page
from launch.cli.main import main
from launch.run.config import PretrainConfig
from mcl_dist.config import load_config


def test_variants_differ_only_in_their_use_of_motion() -> None:
    configs = {name: load_config(PretrainConfig, CONFIG, changes) for name, changes in VARIANTS.items()}

    def motion(config: PretrainConfig) -> tuple[float, bool, float]:
        return config.data.motion_probability, config.data.motion_crops, config.objective.alignment

    assert motion(configs[BASELINE]) == (0.0, False, 0.0)
    assert motion(configs["sampling"]) == (0.7, True, 0.0)
    assert motion(configs["alignment"]) == (0.0, False, 1.0)
    assert motion(configs["full"]) == (0.7, True, 1.0)
    assert {config.objective.intra for config in configs.values()} == {1.0}


def test_gains_are_over_the_baseline_of_the_same_seed() -> None:
    scores = [
        VariantScores(BASELINE, 0, svm=0.10, knn=0.10),
        VariantScores(BASELINE, 1, svm=0.20, knn=0.10),
        VariantScores("full", 0, svm=0.30, knn=0.10),
        VariantScores("full", 1, svm=0.50, knn=0.05),
    ]
    lines = [" ".join(line.split()) for line in table(scores).splitlines()]
    assert "full 40.0 (30.0, 50.0) +25.0 (+20.0 to +30.0)" in lines
    assert "full 7.5 (10.0, 5.0) -2.5 (-5.0 to +0.0)" in lines
    assert f"{BASELINE} 15.0 (10.0, 20.0)" in lines


def test_the_page_shows_the_mean_curve_of_each_variants_seeds(tmp_path: Path) -> None:
    runs = {}
    for variant, losses in {BASELINE: [5.0, 4.0], "full": [3.0, 1.0]}.items():
        runs[variant] = [tmp_path / f"{variant}-{seed}" for seed in range(2)]
        for folder, loss in zip(runs[variant], losses, strict=True):
            folder.mkdir()
            lines = [{"step": step, "epoch": 0, "loss_inter": loss + 100 / step} for step in range(1, 101)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = ablation_page("alike", runs, "svm <1>")
    (inter,) = (part for part in html.split("<h3>") if part.startswith("Inter loss"))
    rows = re.findall(r"</i>(\w+)</td><td>([\d.]+)</td><td>([\d.]+)</td>", inter)
    # The last two steps and the first two, 99 and 100, 1 and 2.
    assert rows == [(BASELINE, "5.51", "79.5"), ("full", "3.01", "77.0")]
    assert "<pre>svm &lt;1&gt;</pre>" in html
    assert "kNN of held-out videos" not in html, "runs without online evaluations have no such chart"


@pytest.mark.slow
def test_an_ablation_trains_probes_and_reuses_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--train-per-class", "2", "--test-per-class", "1", "--seeds", "1", "--variants", "full"]
    command = ["bench", "method", "--scene", "alike", "--dir", str(tmp_path), *sizes, "--json", "train.steps=2"]
    assert main(command) == 0
    (outcome,) = json.loads(capsys.readouterr().out)
    assert outcome == json.loads((tmp_path / "results.json").read_text())[0]
    assert 0 <= outcome["svm"] <= 1
    assert (tmp_path / "runs" / "full-0" / "metrics.jsonl").read_text().count("\n") == 2
    assert 'data-name="full"' in (tmp_path / "results.html").read_text()

    shutil.rmtree(tmp_path / "runs")
    assert main(command) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == [outcome], "a finished run is not repeated"
    assert output.err.startswith(f"full, seed 0: reused from {tmp_path / 'full-0.json'}\n")
    assert not (tmp_path / "runs").exists()


def test_an_unknown_variant_is_rejected_with_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "method", "--dir", str(tmp_path), "--variants", "contrastive,motion"])
    assert "'motion' is none of untrained, contrastive" in capsys.readouterr().err
