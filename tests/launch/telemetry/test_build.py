from __future__ import annotations

import socket
import urllib.request

import pytest

from dataloading.build.builder import ResumedBuild
from dataloading.shards.format import RefusedVideo
from launch.supervision.deepspeed_launcher import free_port
from launch.telemetry.build import serve_build_metrics
from mcl_dist.errors import UserError
from mcl_dist.storage.retry import RetryPolicy


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_build_serves_its_metrics_while_it_runs() -> None:
    retry, port = RetryPolicy(), free_port()
    retry.failures["stall"] += 2
    with serve_build_metrics(port, 9, retry) as metrics:
        metrics(ResumedBuild(None, 1, 3, 1))
        metrics(RefusedVideo("a.mp4", "too short: 3 frames"))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    for line in (
        "mcl_build_videos_planned 9.0",
        "mcl_build_videos_kept 4.0",
        'mcl_build_refused_total{reason="too short"} 1.0',
        'mcl_build_retries_total{reason="stall"} 2.0',
        "mcl_build_complete 0.0",
    ):
        assert line in lines


def test_a_taken_port_is_reported_with_the_option_that_sets_it() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"127.0.0.1:{port}: .*set --metrics-port"),
            serve_build_metrics(port, 1, RetryPolicy()),
        ):
            pass
