"""`mcl bench method`: what each part of the method adds, on synthetic sets whose classes differ in motion alone."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from dataloading.build.local_executor import num_cores
from mcl_dist.errors import ConfigError, UserError

CONFIG = Path(__file__).with_name("ablation.yaml")  # inside the package, so that an installed wheel has it
UNTRAINED, BASELINE = "untrained", "contrastive"
_UNIFORM = ("data.motion_probability=0", "data.motion_crops=false")
_UNALIGNED = ("objective.alignment=0",)
# What each changes in the configuration: inter and intra loss are in all, the method's two uses of motion in the last.
VARIANTS: dict[str, tuple[str, ...]] = {
    UNTRAINED: (),
    BASELINE: (*_UNIFORM, *_UNALIGNED),
    "sampling": _UNALIGNED,
    "alignment": _UNIFORM,
    "full": (),
}
PROTOCOLS = ("svm", "knn")
PER_CLASS = {"train": 50, "test": 20}
EXAMPLE = """example:
  mcl bench method --scene distracting --dir runs/distracting --seeds 3 --jobs 2
  mcl bench method --scene alike --dir runs/alike --variants contrastive,full train.steps=600

The folder keeps videos, shard sets, runs, results.json and results.html, a page with the runs' curves. The same command
goes on where it was stopped; other settings need another folder.
"""


@dataclass(frozen=True)
class SceneNumbers:
    """Overrides of `ablation.yaml` for one scene, and the number of clips that probes take from a video."""

    overrides: tuple[str, ...]
    clips: int


NUMBERS = {
    # Grey and of one contrast: colour operations would cost time and change nothing.
    "alike": SceneNumbers(("data.augment.jitter_probability=0", "data.augment.grey_probability=0"), clips=9),
    # Two stages leave a map of 7×7 cells, as the method's own; three leave 3×3, nearly all of which a disc covers.
    "distracting": SceneNumbers(("data.crop=56", "encoder.width=16", "encoder.blocks=[1,1]"), clips=9),
}


@dataclass(frozen=True)
class VariantScores:
    """Top-1 of one encoder, as fractions, by protocol."""

    variant: str
    seed: int
    svm: float
    knn: float


@dataclass(frozen=True)
class Study:
    """One comparison: where it lives and what it compares."""

    folder: Path
    scene: str
    seeds: int
    variants: tuple[str, ...]
    jobs: int
    device: str
    per_class: dict[str, int]
    overrides: tuple[str, ...]

    def shards(self, split: str) -> Path:
        """The shard set of `train` or `test`."""
        return self.folder / "shards" / split

    def settings(self, variant: str, seed: int) -> list[str]:
        """What this variant's run changes in `launch/benchmarks/ablation.yaml`."""
        return [
            f"run.dir={self.run_folder(variant, seed)}",
            f"run.seed={seed}",
            f"data.train={self.shards('train')}",
            *NUMBERS[self.scene].overrides,
            *self.overrides,
            *VARIANTS[variant],
        ]

    def run_folder(self, variant: str, seed: int) -> Path:
        """Where the variant trains."""
        return self.folder / "runs" / f"{variant}-{seed}"


def register(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `mcl bench method`."""
    method = actions.add_parser(
        "method",
        help="what each part of the method adds, on synthetic sets",
        description="Pre-train with and without each of the method's two uses of motion, for several seeds, and "
        "compare the encoders by linear SVM and nearest neighbours.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    method.add_argument("--scene", choices=tuple(NUMBERS), default="distracting", help="what the videos show")
    method.add_argument("--dir", type=Path, required=True, help="folder to work in")
    method.add_argument("--seeds", type=int, default=3, help="trainings of each variant (3)")
    method.add_argument("--variants", type=_variants, default=tuple(VARIANTS), help=f"of {','.join(VARIANTS)} (all)")
    method.add_argument("--jobs", type=int, default=1, help="trainings at the same time (1)")
    method.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what trains (cpu)")
    for split, count in PER_CLASS.items():
        method.add_argument(
            f"--{split}-per-class", type=int, default=count, help=f"{split} videos of a class ({count})"
        )
    method.add_argument("--json", action="store_true", help="print one JSON list on standard output")
    method.add_argument("overrides", nargs="*", metavar="key=value", help="change all runs, e.g. train.steps=600")
    method.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train and probe all variants, print the comparison; returns 0."""
    study = Study(
        folder=arguments.dir.resolve(),
        scene=arguments.scene,
        seeds=arguments.seeds,
        variants=tuple(arguments.variants),
        jobs=arguments.jobs,
        device=arguments.device,
        per_class={split: getattr(arguments, f"{split}_per_class") for split in PER_CLASS},
        overrides=tuple(arguments.overrides),
    )
    _check(study)
    _make_sets(study)
    outcomes = list(_outcomes(study, _say))
    report = [asdict(outcome) for outcome in outcomes]
    (study.folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report) if arguments.json else table(outcomes))
    _write_page(study, outcomes)
    return 0


def table(outcomes: Sequence[VariantScores]) -> str:
    """Means over seeds with all seeds beside them, and gains over the baseline of the same seed."""
    lines = []
    for protocol in PROTOCOLS:
        top1 = {(each.variant, each.seed): 100 * getattr(each, protocol) for each in outcomes}
        lines.append(f"{protocol}, top-1 in %{'gain over ' + BASELINE + ', points':>58}")
        for variant in dict.fromkeys(each.variant for each in outcomes):
            seeds = [seed for name, seed in top1 if name == variant]
            scores = [top1[variant, seed] for seed in seeds]
            line = f"  {variant:<14}{mean(scores):6.1f}  ({', '.join(f'{score:.1f}' for score in scores)})"
            gains = [top1[variant, seed] - top1[BASELINE, seed] for seed in seeds if (BASELINE, seed) in top1]
            if gains and variant != BASELINE:
                line = f"{line:<50}{mean(gains):+6.1f}  ({min(gains):+.1f} to {max(gains):+.1f})"
            lines.append(line)
    return "\n".join(lines)


def _write_page(study: Study, outcomes: Sequence[VariantScores]) -> None:
    """Of the runs that are still there; finished ones may have been removed."""
    from launch.benchmarks.ablation_page import page

    runs: dict[str, list[Path]] = {}
    for each in outcomes:
        if (folder := study.run_folder(each.variant, each.seed)).exists():
            runs.setdefault(each.variant, []).append(folder)
    path = study.folder / "results.html"
    path.write_text(page(study.scene, runs, table(outcomes)))
    _say(f"the runs' curves: {path}")


def _variants(text: str) -> tuple[str, ...]:
    """Argument type: names of variants."""
    names = tuple(text.split(","))
    for name in names:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(VARIANTS)}")
    return names


def _check(study: Study) -> None:
    """Tell a mistake in the options before anything is made."""
    from launch.run.config import PretrainConfig, check
    from mcl_dist.config import load_config

    for name, value in (("--seeds", study.seeds), ("--jobs", study.jobs), *study.per_class.items()):
        if value < 1:
            raise ConfigError(f"{name}: found {value}, must be at least 1")
    for variant in study.variants:
        check(load_config(PretrainConfig, CONFIG, study.settings(variant, seed=0)), num_ranks=1)


def _make_sets(study: Study) -> None:
    """Videos and shard sets, those that are not there yet."""
    from dataloading.synthetic.videos import write_synthetic

    if all((study.shards(split) / "manifest.json").exists() for split in PER_CLASS):
        return
    _say("writing videos")
    videos = study.folder / "videos"
    write_synthetic(
        videos,
        seed=0,
        scene=study.scene,
        train_per_class=study.per_class["train"],
        test_per_class=study.per_class["test"],
        processes=num_cores(),
    )
    for split in PER_CLASS:
        _say(f"building the {split} set")
        # The videos are as small as they should be: nothing is resized.
        options = ("--flow", "dis", "--short-side", "0", "--workers", str(num_cores()))
        _mcl(study, f"shards-{split}", "shards", "build", str(videos / split), str(study.shards(split)), *options)


def _outcomes(study: Study, say: Callable[[str], None]) -> Iterator[VariantScores]:
    """Every variant's of every seed, told as they come and yielded in order."""
    wanted = [(variant, seed) for seed in range(study.seeds) for variant in study.variants]
    with ThreadPoolExecutor(study.jobs) as pool:
        yield from pool.map(partial(_outcome, study, say), wanted)


def _outcome(study: Study, say: Callable[[str], None], wanted: tuple[str, int]) -> VariantScores:
    variant, seed = wanted
    settings = study.settings(variant, seed)
    record = study.folder / f"{variant}-{seed}.json"
    if record.exists() and (kept := json.loads(record.read_text()))["settings"] == settings:
        say(f"{variant}, seed {seed}: taken from {record}")
        return VariantScores(**kept["outcome"])
    mcl = partial(_mcl, study, f"{variant}-{seed}")
    changes = [
        f"clips.count={NUMBERS[study.scene].clips}",
        f"features.folder={study.folder / 'features'}",
        "data.decode_on=cpu",
    ]
    if variant == UNTRAINED:
        subject = ["random", "--pretrain", str(CONFIG)]
        changes += [f"pretrain.{setting}" for setting in settings]
    else:
        mcl("pretrain", "--config", str(CONFIG), *settings)
        subject = [str(study.run_folder(variant, seed))]
    sets = ("--train", str(study.shards("train")), "--test", str(study.shards("test")))
    scores = {
        protocol: json.loads(mcl("evaluate", protocol, "--json", *sets, "--checkpoint", *subject, *changes))["top1"]
        for protocol in PROTOCOLS
    }
    say(f"{variant}, seed {seed}: " + ", ".join(f"{name} {score:.1%}" for name, score in scores.items()))
    outcome = VariantScores(variant, seed, **scores)
    whole = record.with_suffix(".part")  # a record that exists is whole, however the command ended
    whole.write_text(json.dumps({"settings": settings, "outcome": asdict(outcome)}))
    whole.replace(record)
    return outcome


def _mcl(study: Study, log: str, *words: str) -> str:
    """Run another command as a user would; returns what it printed, and leaves all it said in the log.

    Raises:
        UserError: it failed.
    """
    threads = str(max(1, num_cores() // study.jobs))
    # Threads that wait by spinning would keep the cores from the other jobs.
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    if study.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    path = study.folder / f"{log}.txt"
    with path.open("a") as said:
        done = subprocess.run(
            [sys.executable, "-m", "mcl_dist", *words], env=environment, text=True, stdout=subprocess.PIPE, stderr=said
        )
        said.write(done.stdout)
    if done.returncode:
        raise UserError(f"mcl {' '.join(words[:2])} ended with {done.returncode}; {path} says why")
    return done.stdout


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
