"""kNN accuracy on held-out videos during training."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from dataloading.loader.config import DataConfig
from dataloading.loader.probe_clips import ClipGeometry, ProbeClips
from dataloading.reading.shard_set import ShardSet
from launch.evaluation.inputs import num_threads, open_split
from launch.evaluation.results_log import ONLINE, append_result
from launch.run.config import EvaluateConfig
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import UserError
from mcl_dist.evaluation.features import Features, check_finite, extract_features, gather_features, rank_range
from mcl_dist.evaluation.knn import example_neighbours, knn_predictions
from mcl_dist.evaluation.metrics import measures
from mcl_dist.events import Evaluating, Event, Notice
from mcl_dist.model.encoder import Encoder

PROGRESS_SECONDS = 20.0  # between two `Evaluating` events of a rank that extracts features


class OnlineKnn:
    """Scores encoders on the same clips of the same videos, over all ranks; it does not affect the training.

    Args:
        config: names the sets and sizes the evaluation.
        data: data section of the run: its training set, clip geometry and reading.
        run_folder: its `evaluations.jsonl` gets the scores.
        group: ranks that share the work.
        listen: receives the progress of this rank, and a `Notice` if there are no scores.
        stop: a requested stop ends the evaluation.

    Raises:
        UserError: a set cannot be read or has no labels, or the sets' classes differ.
        ConfigError: a set does not store the frames that the stride needs.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        data: DataConfig,
        run_folder: Path,
        group: ProcessGroup,
        listen: Callable[[Event], None],
        stop: StopRequest | None = None,
    ) -> None:
        self._config, self._data, self._run_folder = config, data, run_folder
        self._group, self._listen, self._stop = group, listen, stop or StopRequest()
        self._urls = (config.train or str(data.train), str(config.test))
        with ExitStack() as stack:
            self._sets = stack.enter_context(open_split(*self._urls, data, group))
            self._clips = [self._rank_clips(shard_set) for shard_set in self._sets]
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close the sets."""
        self._stack.close()

    def __call__(self, encoder: Encoder, step: int) -> dict[str, float] | None:
        """Accuracies after `step` steps on the first rank, None on the others; all ranks must call it together.

        If a rank cannot read its videos or is asked to stop, all ranks return None after a `Notice`: training does not
        need the scores.
        """
        own, error = [], ""
        try:
            for clips in self._clips:
                own.append(extract_features(encoder, self._batches(clips, step)))
                check_finite(own[-1], clips.name_of)
        except UserError as failure:
            error = str(failure)
        if error := self._group.first_text(error):
            self._listen(Notice(f"step {step}: not evaluated: {error}"))
            return None
        train, test = (
            gather_features(features, self._num_videos(shard_set), self._group)
            for features, shard_set in zip(own, self._sets, strict=True)
        )
        return self._score(train, test, step) if self._group.is_first else None

    def _score(self, train: Features, test: Features, step: int) -> dict[str, float]:
        """Score the test features, and log the scores with some neighbours for the run's report."""
        scores = measures(knn_predictions(train, test, len(self._sets[0].manifest.classes), self._config))
        splits = [{"train": self._urls[0], "test": self._urls[1], **scores}]
        neighbours = [[each._asdict() for each in example_neighbours(train, test)]]
        fields = {"protocol": ONLINE, "step": step, **scores, "splits": splits, "neighbours": neighbours}
        try:
            append_result(self._run_folder, fields)
        except UserError as error:
            self._listen(Notice(f"step {step}: the run's report will lack this evaluation: {error}"))
        return scores

    def _batches(self, clips: ProbeClips, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield clips and labels, and emit the progress."""
        self._listen(Evaluating(step, 0, len(clips)))
        reported = time.monotonic()
        for done, batch in enumerate(clips):
            if time.monotonic() - reported >= PROGRESS_SECONDS:
                reported = time.monotonic()
                self._listen(Evaluating(step, done, len(clips)))
            if self._stop.is_requested:
                raise UserError(f"asked to stop ({self._stop.reason})")
            yield batch.clips, batch.labels

    def _rank_clips(self, shard_set: ShardSet) -> ProbeClips:
        return ProbeClips.for_rank(
            shard_set,
            ClipGeometry(self._data.frames, self._data.stride, self._data.crop),
            self._group,
            self._data,
            threads=num_threads(),
            num_clips=self._config.clips,
            positions=rank_range(self._num_videos(shard_set), self._group),
        )

    def _num_videos(self, shard_set: ShardSet) -> int:
        return min(len(shard_set), self._config.videos or len(shard_set))
