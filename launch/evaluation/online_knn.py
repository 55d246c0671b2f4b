"""kNN accuracy on held-out videos, asked for now and then while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from dataloading.loader.probe_clips import ClipGeometry, ProbeClips
from dataloading.reading.shard_set import ShardSet
from launch.evaluation.frozen_protocols import check_split, num_threads
from launch.evaluation.results_log import ON_THE_WAY, add
from launch.run.config import PretrainConfig
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import UserError
from mcl_dist.evaluation.features import Features, check_finite, extract_features, gather_features, share_of
from mcl_dist.evaluation.knn import knn_answers, neighbours_to_show
from mcl_dist.evaluation.metrics import measures
from mcl_dist.events import Evaluating, Event, Notice
from mcl_dist.model.encoder import Encoder

TELL_SECONDS = 20.0  # between signs of life of a rank that makes features


class OnlineKnn:
    """Scores encoders on the same clips of the same videos, over all ranks; nothing of a run depends on it.

    Args:
        config: of the run.
        ranks: who share the work.
        listen: hears how far this rank is, and why there may be no scores.
        stop: a rank that is asked to stop leaves off.

    Raises:
        UserError: a set cannot be read, has no labels, or other classes than the other.
        ConfigError: a set does not store the frames that the stride asks for.
    """

    def __init__(
        self,
        config: PretrainConfig,
        group: ProcessGroup,
        listen: Callable[[Event], None],
        stop: StopRequest | None = None,
    ) -> None:
        self._config, self._group, self._listen = config.evaluate, group, listen
        self._stop = stop or StopRequest()
        urls = self._urls = (config.evaluate.train or str(config.data.train), str(config.evaluate.test))
        self._folder = Path(config.run.dir)
        with ExitStack() as opened:
            self._sets = [opened.enter_context(closing(ShardSet(url, config.data.cache, config.data))) for url in urls]
            train, test = self._sets
            check_split(urls[0], train, urls[1], test, told=group.is_first)
            self._decoder_device = config.data.decoder_device(group.device)
            geometry = ClipGeometry(config.data.frames, config.data.stride, config.data.crop)
            self._clips = [self._own_clips(shard_set, geometry) for shard_set in self._sets]
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Let go of the sets."""
        self._opened.close()

    def __call__(self, encoder: Encoder, step: int) -> dict[str, float] | None:
        """Accuracies after `step` steps, on the first rank; all ranks must ask together.

        None on the others, and everywhere where a rank cannot read its videos, which training does not need, or was
        asked to stop: that is told, and the run goes on.
        """
        own, trouble = [], ""
        try:
            own = [self._features(encoder, clips, step) for clips in self._clips]
        except UserError as error:
            trouble = str(error)
        if trouble := self._group.first_word(trouble):
            self._listen(Notice(f"step {step}: not evaluated: {trouble}"))
            return None
        train, test = (
            gather_features(features, self._num_videos(shard_set), self._group)
            for features, shard_set in zip(own, self._sets, strict=True)
        )
        return self._scores(train, test, step) if self._group.is_first else None

    def _scores(self, train: Features, test: Features, step: int) -> dict[str, float]:
        """Of the features of both sets; with some neighbours to look at they are kept for the run's report."""
        found = measures(knn_answers(train, test, len(self._sets[0].manifest.classes), self._config))
        splits = [{"train": self._urls[0], "test": self._urls[1], **found}]
        neighbours = [[each._asdict() for each in neighbours_to_show(train, test)]]
        line = {"protocol": ON_THE_WAY, "step": step, **found, "splits": splits, "neighbours": neighbours}
        try:
            add(self._folder, line)
        except UserError as error:
            self._listen(Notice(f"step {step}: its evaluation is not kept for the report: {error}"))
        return found

    def _features(self, encoder: Encoder, clips: ProbeClips, step: int) -> Features:
        """Of this rank's share."""
        own = extract_features(encoder, self._told(clips, step))
        check_finite(own, clips.name_of)
        return own

    def _told(self, clips: ProbeClips, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._listen(Evaluating(step, 0, len(clips)))
        told = time.monotonic()
        for done, batch in enumerate(clips):
            if time.monotonic() - told >= TELL_SECONDS:
                told = time.monotonic()
                self._listen(Evaluating(step, done, len(clips)))
            if self._stop.is_asked:
                raise UserError(f"asked to stop ({self._stop.reason})")
            yield batch.clips, batch.labels

    def _own_clips(self, shard_set: ShardSet, geometry: ClipGeometry) -> ProbeClips:
        return ProbeClips(
            shard_set,
            geometry,
            device=self._group.device,
            decoder_device=self._decoder_device,
            num_clips=self._config.clips,
            positions=share_of(self._num_videos(shard_set), self._group),
            batch_videos=1,
            threads=num_threads(),
        )

    def _num_videos(self, shard_set: ShardSet) -> int:
        return min(len(shard_set), self._config.videos or len(shard_set))
