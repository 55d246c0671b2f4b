"""Progress of a shard set build on standard error."""

from dataloading.build.builder import ResumedBuild
from dataloading.build.video_processor import VideoResult
from dataloading.shards.format import RefusedVideo
from launch.terminal.progress import ProgressLine
from launch.terminal.units import format_duration


class BuildProgress:
    """A build listener that logs each refused video and shows counts, rates and the time left of `total` videos."""

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self.num_built = 0  # stored or refused by this run
        self._num_kept = self._num_refused = self._num_bytes = 0
        self._line = ProgressLine()
        self.log = self._line.log
        self.close = self._line.close

    def __call__(self, result: VideoResult | ResumedBuild) -> None:
        """Handle the result of the next video, or the event of a resumed build."""
        if isinstance(result, ResumedBuild):
            self._resume(result)
            return
        self.num_built += 1
        if isinstance(result, RefusedVideo):
            self._num_refused += 1
            self.log(f"{result.source}: refused, {result.reason}")
        else:
            self._num_bytes += result.num_bytes
        self._line.update(self._status(max(self._line.seconds, 1e-9)))

    def _resume(self, resumed: ResumedBuild) -> None:
        if resumed.previous_holder:
            self.log(f"took over the lease of an earlier build ({resumed.previous_holder}), which has ended")
        if resumed.num_shards:
            self.log(
                f"resuming after {resumed.num_shards} finished shards with {resumed.num_videos} videos, "
                f"{resumed.num_refused} refused"
            )
        self._num_kept = resumed.num_videos + resumed.num_refused
        self._num_refused += resumed.num_refused

    def _status(self, seconds: float) -> str:
        done, speed = self._num_kept + self.num_built, self.num_built / seconds
        left = format_duration(round((self.total - done) / speed))
        return (
            f"{done} of {self.total} videos, {self._num_refused} refused, {speed:.2f} videos/s, "
            f"{self._num_bytes / seconds / 1e6:.1f} MB/s, about {left} left"
        )
