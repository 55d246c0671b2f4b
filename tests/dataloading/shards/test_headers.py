from __future__ import annotations

import io

import numpy as np
import pytest

from dataloading.shards.headers import from_npy, to_npy


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.zeros((0, 7, 7), np.uint8),
        np.array(["a", "longer"]),
        np.float32(3) * np.ones(4, np.float32),
        np.arange(6, dtype=np.uint8).reshape(3, 2).T,
    ],
)
def test_arrays_survive_the_round_trip(array: np.ndarray) -> None:
    back = from_npy(to_npy(array))
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


def test_numpy_reads_the_bytes() -> None:
    assert np.load(io.BytesIO(to_npy(np.arange(5)))).tolist() == [0, 1, 2, 3, 4]


def test_a_shape_that_the_bytes_do_not_fill_is_rejected_without_an_allocation() -> None:
    data = to_npy(np.zeros((10, 10), np.uint8))
    with pytest.raises(ValueError, match="are not an array of shape"):
        from_npy(data.replace(b"(10, 10)", b"(10, 99)"))
    huge = data.replace(b"(10, 10), }" + b" " * 20, b"(999999999, 999999999999999), }")
    with pytest.raises(ValueError, match="are not an array of shape"):
        from_npy(huge)


def test_an_array_of_objects_is_never_loaded() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no npy header of a plain array"):
        from_npy(buffer.getvalue())
