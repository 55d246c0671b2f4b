"""One rank of `mcl pretrain` whose batches contain a NaN pixel while the file named by `POISON` exists.

It emits a loader report every 0.2 s, because its test waits for the metrics (`tests/support/real_prometheus.py`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dataloading.loader import loader
from launch import pretrain
from launch.pretraining import compose
from mcl_dist.batch import QUERY, TubeletBatch
from mcl_dist.training.pretrain_step import PretrainTrainer


class Poisoned(PretrainTrainer):
    """A trainer on poisoned batches."""

    def train_step(self, step: int, batch: TubeletBatch, *more: Any, **named: Any) -> Any:
        views = batch.views.float()  # on every rank and step: ranks exchange tensors of one dtype
        if not self.group.is_first and Path(os.environ["POISON"]).exists():
            views[0, QUERY, 1, 2, 3, 0] = torch.nan
        return super().train_step(step, replace(batch, views=views), *more, **named)


if __name__ == "__main__":
    loader.REPORT_SECONDS = 0.2
    compose.PretrainTrainer = Poisoned  # type: ignore[misc]
    pretrain.main()
