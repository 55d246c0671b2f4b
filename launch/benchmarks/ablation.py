"""Ablation of the method: the gain of each use of motion, on synthetic sets whose classes differ in motion alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from dataloading.build.local_executor import num_cores
from mcl_dist.errors import UserError

CONFIG = Path(__file__).with_name("ablation.yaml")  # inside the package, so that an installed wheel has it
UNTRAINED, BASELINE = "untrained", "contrastive"
_UNIFORM = ("data.motion_probability=0", "data.motion_crops=false")
_UNALIGNED = ("objective.alignment=0",)
# Overrides of each variant: all have the inter and intra losses; `full` has both of the method's uses of motion.
VARIANTS: dict[str, tuple[str, ...]] = {
    UNTRAINED: (),
    BASELINE: (*_UNIFORM, *_UNALIGNED),
    "sampling": _UNALIGNED,
    "alignment": _UNIFORM,
    "full": (),
}
PROTOCOLS = ("svm", "knn")
PER_CLASS = {"train": 50, "test": 20}
NUM_CLIPS = 9  # that probes take from a video
# Overrides of `ablation.yaml` for each scene.
SCENES: dict[str, tuple[str, ...]] = {
    # The videos are grey and of one contrast: colour augmentation would cost time and change nothing.
    "alike": ("data.augment.jitter_probability=0", "data.augment.grey_probability=0"),
    # Two stages leave a 7×7 map like the method's own; three would leave 3×3, almost all of it covered by a disc.
    "distracting": ("data.crop=56", "encoder.width=16", "encoder.blocks=[1,1]"),
}
Log = Callable[[str], None]


@dataclass(frozen=True)
class VariantScores:
    """Top-1 accuracies of one encoder, as fractions, by protocol."""

    variant: str
    seed: int
    svm: float
    knn: float


@dataclass(frozen=True)
class Study:
    """One ablation: its folder, and the runs to compare."""

    folder: Path  # for videos, shard sets, runs and results
    scene: str  # a key of `SCENES`
    seeds: int  # runs per variant
    variants: tuple[str, ...]  # keys of `VARIANTS`
    jobs: int  # runs at the same time
    device: str  # `cpu` or `cuda`, for training
    per_class: dict[str, int]  # videos per class, by split
    overrides: tuple[str, ...]  # of the configuration of all runs

    def shards(self, split: str) -> Path:
        """The shard set of `train` or `test`."""
        return self.folder / "shards" / split

    def settings(self, variant: str, seed: int) -> list[str]:
        """Overrides of `launch/benchmarks/ablation.yaml` for a variant's run."""
        return [
            f"run.dir={self.run_folder(variant, seed)}",
            f"run.seed={seed}",
            f"data.train={self.shards('train')}",
            *SCENES[self.scene],
            *self.overrides,
            *VARIANTS[variant],
        ]

    def run_folder(self, variant: str, seed: int) -> Path:
        """The run folder of a variant."""
        return self.folder / "runs" / f"{variant}-{seed}"


def measure_method(study: Study, log: Log) -> list[VariantScores]:
    """Train and probe every variant with every seed, and write `results.json`; reuses the results of earlier calls.

    Raises:
        ConfigError: an override is invalid; nothing is written.
        UserError: a command fails.
    """
    from launch.run.config import PretrainConfig, check
    from mcl_dist.config import load_config

    for variant in study.variants:
        check(load_config(PretrainConfig, CONFIG, study.settings(variant, seed=0)), num_ranks=1)
    _make_sets(study, log)
    runs = [(variant, seed) for seed in range(study.seeds) for variant in study.variants]
    with ThreadPoolExecutor(study.jobs) as pool:
        scores = list(pool.map(partial(_score, study, log), runs))
    (study.folder / "results.json").write_text(json.dumps([asdict(each) for each in scores], indent=1) + "\n")
    return scores


def table(scores: Sequence[VariantScores]) -> str:
    """Means over seeds with all seeds beside them, and gains over the baseline of the same seed."""
    lines = []
    for protocol in PROTOCOLS:
        top1 = {(each.variant, each.seed): 100 * getattr(each, protocol) for each in scores}
        lines.append(f"{protocol}, top-1 in %{'gain over ' + BASELINE + ', points':>58}")
        for variant in dict.fromkeys(each.variant for each in scores):
            seeds = [seed for name, seed in top1 if name == variant]
            values = [top1[variant, seed] for seed in seeds]
            line = f"  {variant:<14}{mean(values):6.1f}  ({', '.join(f'{value:.1f}' for value in values)})"
            gains = [top1[variant, seed] - top1[BASELINE, seed] for seed in seeds if (BASELINE, seed) in top1]
            if gains and variant != BASELINE:
                line = f"{line:<50}{mean(gains):+6.1f}  ({min(gains):+.1f} to {max(gains):+.1f})"
            lines.append(line)
    return "\n".join(lines)


def write_page(study: Study, scores: Sequence[VariantScores]) -> Path:
    """Write `results.html` with the table and the curves of all runs that still have their folder."""
    from launch.benchmarks.ablation_page import ablation_page

    runs: dict[str, list[Path]] = {}
    for each in scores:
        if (folder := study.run_folder(each.variant, each.seed)).exists():
            runs.setdefault(each.variant, []).append(folder)
    path = study.folder / "results.html"
    path.write_text(ablation_page(study.scene, runs, table(scores)))
    return path


def _make_sets(study: Study, log: Log) -> None:
    """Write videos and shard sets unless they exist."""
    from dataloading.synthetic.videos import write_synthetic

    if all((study.shards(split) / "manifest.json").exists() for split in PER_CLASS):
        return
    log("writing videos")
    videos = study.folder / "videos"
    counts = {f"{split}_per_class": study.per_class[split] for split in PER_CLASS}
    write_synthetic(videos, seed=0, scene=study.scene, processes=num_cores(), **counts)
    for split in PER_CLASS:
        log(f"building the {split} set")
        # The videos have their final size: nothing is resized.
        options = ("--flow", "dis", "--short-side", "0", "--workers", str(num_cores()))
        _run_mcl(study, f"shards-{split}", "shards", "build", str(videos / split), str(study.shards(split)), *options)


def _score(study: Study, log: Log, run: tuple[str, int]) -> VariantScores:
    variant, seed = run
    settings = study.settings(variant, seed)
    record = study.folder / f"{variant}-{seed}.json"
    if record.exists() and (stored := json.loads(record.read_text()))["settings"] == settings:
        log(f"{variant}, seed {seed}: reused from {record}")
        return VariantScores(**stored["outcome"])
    scores = VariantScores(variant, seed, **_train_and_probe(study, variant, seed, settings))
    log(f"{variant}, seed {seed}: " + ", ".join(f"{name} {getattr(scores, name):.1%}" for name in PROTOCOLS))
    partial_record = record.with_suffix(".part")  # renamed once complete, so that an existing record is valid
    partial_record.write_text(json.dumps({"settings": settings, "outcome": asdict(scores)}))
    partial_record.replace(record)
    return scores


def _train_and_probe(study: Study, variant: str, seed: int, settings: Sequence[str]) -> dict[str, float]:
    """Top-1 by protocol."""
    run_mcl = partial(_run_mcl, study, f"{variant}-{seed}")
    overrides = [f"clips.count={NUM_CLIPS}", f"features.folder={study.folder / 'features'}", "data.decode_on=cpu"]
    if variant == UNTRAINED:
        checkpoint = ["random", "--pretrain", str(CONFIG)]
        overrides += [f"pretrain.{setting}" for setting in settings]
    else:
        run_mcl("pretrain", "--config", str(CONFIG), *settings)
        checkpoint = [str(study.run_folder(variant, seed))]
    sets = ("--train", str(study.shards("train")), "--test", str(study.shards("test")))
    return {
        name: json.loads(run_mcl("evaluate", name, "--json", *sets, "--checkpoint", *checkpoint, *overrides))["top1"]
        for name in PROTOCOLS
    }


def _run_mcl(study: Study, log_name: str, *arguments: str) -> str:
    """Run `mcl` in a process; returns its standard output, and raises UserError if it fails. A file logs all output."""
    threads = str(max(1, num_cores() // study.jobs))
    # Threads that wait actively would take cores from the other jobs.
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    if study.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    path = study.folder / f"{log_name}.txt"
    command = [sys.executable, "-m", "mcl_dist", *arguments]
    with path.open("a") as log_file:
        done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=log_file)
        log_file.write(done.stdout)
    if done.returncode:
        raise UserError(f"mcl {' '.join(arguments[:2])} exited with {done.returncode}; see {path}")
    return done.stdout
