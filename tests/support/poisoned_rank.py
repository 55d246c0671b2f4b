"""One rank of `mcl pretrain`, in whose batches a pixel is no number while the file is there that `POISON` names.

It says of every batch what the loader did, since who watches it is in a hurry (`tests/monitoring/real_prometheus.py`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dataloading.loader import loader
from launch import pretrain
from launch.pretraining import compose as assembly
from mcl_dist.batch import QUERY, TubeletBatch
from mcl_dist.training.pretrain_step import PretrainTrainer


class Poisoned(PretrainTrainer):
    """Trains as ever, on what it is given."""

    def take(self, step: int, batch: TubeletBatch, *more: Any, **named: Any) -> Any:
        views = batch.views.float()  # always, as those that ranks exchange have one type
        if not self.group.is_first and Path(os.environ["POISON"]).exists():
            views[0, QUERY, 1, 2, 3, 0] = torch.nan
        return super().take(step, replace(batch, views=views), *more, **named)


if __name__ == "__main__":
    loader.REPORT_SECONDS = 0.2
    assembly.PretrainTrainer = Poisoned  # type: ignore[misc]
    pretrain.main()
