from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from dataloading.loader.dali_decoder import StillDecoder
from mcl_dist.errors import UserError

CPU = torch.device("cpu")


def image(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    """A smooth image, uint8 (height, width, 3)."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(pixels: np.ndarray) -> np.ndarray:
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return data.ravel()


def decode_all(still: np.ndarray, *, grey: bool = False) -> np.ndarray:
    if grey:
        return cv2.imdecode(still, cv2.IMREAD_GRAYSCALE)[..., None]
    return cv2.cvtColor(cv2.imdecode(still, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def decoder(size: tuple[int, int] = (40, 48), **options: object) -> StillDecoder:
    return StillDecoder(**{"size": size, "grey": False, "device": CPU, "threads": 1, **options})  # type: ignore[arg-type]


def test_windows_are_decoded_and_resized_bilinearly() -> None:
    stills = [jpeg(image(0)), jpeg(image(1, 60, 200))]
    windows = np.array([[3, 5, 80, 100], [0, 100, 60, 100]])

    decoded = decoder()(stills, windows)

    assert decoded.shape == (2, 40, 48, 3)
    for still, (top, left, height, width), found in zip(stills, windows, decoded, strict=True):
        part = decode_all(still)[top : top + height, left : left + width]
        expected = cv2.resize(part, (48, 40), interpolation=cv2.INTER_LINEAR)
        assert np.abs(found.numpy().astype(int) - expected).max() <= 2


def test_a_window_of_the_output_size_keeps_its_pixels() -> None:
    still = jpeg(image(2))

    decoded = decoder()([still], np.array([[7, 9, 40, 48]]))

    assert np.array_equal(decoded[0].numpy(), decode_all(still)[7:47, 9:57])


def test_grey_stills_have_one_channel() -> None:
    still = jpeg(image(3)[..., 0])

    decoded = decoder(grey=True)([still], np.array([[0, 0, 40, 48]]))

    assert np.array_equal(decoded[0].numpy(), decode_all(still, grey=True)[:40, :48])


def test_a_fractional_window_shifts_the_sampling() -> None:
    slope = np.broadcast_to(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (96, 128, 3))
    still = jpeg(np.ascontiguousarray(slope[..., 0]))

    whole, half = decoder(size=(10, 20), grey=True)([still] * 2, np.array([[0, 10, 10, 20], [0, 10.5, 10, 20]]))

    assert (half.int() - whole.int()).float().mean() == pytest.approx(1.0, abs=0.3)


def test_a_rounding_error_does_not_extend_a_window_over_the_edge() -> None:
    still = jpeg(image(4, 30, 40))
    top = 30 * 97 / 340

    decoded = decoder()([still], np.array([[top, 0.0, 30 - top + 1e-12, 40 + 1e-12]]))

    assert decoded.shape == (1, 40, 48, 3)


def test_a_call_takes_any_number_of_stills() -> None:
    stills = [jpeg(image(seed)) for seed in range(7)]
    windows = np.tile([[0, 0, 96, 128]], (7, 1))
    few = decoder(max_batch=3)

    together = decoder()(stills, windows)

    assert torch.equal(few(stills, windows), together)
    assert torch.equal(few(stills[:2], windows[:2]), together[:2])
    assert torch.equal(few(stills[4:5], windows[4:5]), together[4:5])


def test_threads_do_not_change_the_bytes() -> None:
    stills = [jpeg(image(seed)) for seed in range(12)]
    windows = np.tile([[1, 2, 90, 111]], (12, 1))

    assert torch.equal(decoder(threads=1)(stills, windows), decoder(threads=3)(stills, windows))


def test_windows_of_one_still_equal_windows_of_separate_stills() -> None:
    stills, still_index, windows = shared_stills()

    shared = decoder(max_batch=4)(stills, windows, still_index)

    assert torch.equal(shared, decoder()([stills[still] for still in still_index], windows))


@pytest.mark.parametrize("grey", [False, True])
def test_dali_and_opencv_resize_to_the_same_pixels(grey: bool) -> None:
    stills, still_index, windows = shared_stills(grey=grey)

    cut = decoder(grey=grey)(stills, windows, still_index)
    by_dali = decoder(grey=grey, dali_resizes=True, max_batch=4)(stills, windows, still_index)

    assert (cut.int() - by_dali.int()).abs().max() <= 1


def shared_stills(*, grey: bool = False) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Six stills, the still of each of 20 windows, and the windows, which are fractional if grey."""
    rng = np.random.default_rng(0)
    stills = [jpeg(image(seed)[..., 0] if grey else image(seed)) for seed in range(6)]
    still_index = rng.permutation(np.concatenate([np.arange(6), rng.integers(0, 6, 14)]))
    windows = rng.integers([0, 0, 30, 30], [30, 30, 60, 90], size=(20, 4)).astype(float)
    return stills, still_index, windows + rng.random(windows.shape) if grey else windows


def test_a_decoder_works_after_an_error() -> None:
    one = decoder()
    still = jpeg(image(5))
    with pytest.raises(UserError):
        one([still, np.zeros(50, dtype=np.uint8)], np.tile([0, 0, 5, 5], (2, 1)))

    assert torch.equal(one([still], np.array([[0, 0, 5, 5]])), decoder()([still], np.array([[0, 0, 5, 5]])))


def test_the_error_for_an_undecodable_still_has_one_line() -> None:
    with pytest.raises(UserError, match=r"^DALI cannot decode a still \([^\n]+\)$"):
        decoder()([np.zeros(50, dtype=np.uint8)], np.array([[0, 0, 5, 5]]))


@pytest.mark.gpu
def test_a_gpu_decodes_to_nearly_the_same_pixels() -> None:
    stills = [jpeg(image(seed)) for seed in range(5)]
    windows = np.tile([[1, 2, 90, 111]], (5, 1))

    decoded = decoder(device=torch.device("cuda"))(stills, windows)

    assert decoded.is_cuda
    assert (decoded.cpu().int() - decoder()(stills, windows).int()).abs().float().mean() < 2
