from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mcl_dist.errors import UserError
from mcl_dist.evaluation.feature_cache import FeatureCache, FeaturesConfig, module_digest
from mcl_dist.evaluation.features import Features, check_finite, extract_features, recalibrate
from mcl_dist.model.encoder import Encoder, EncoderConfig, normalise


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(width=4, blocks=(1, 1)))


def _clips(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 4, 16, 16, 3), generator=generator, dtype=torch.uint8)


def test_the_feature_of_a_video_is_the_mean_over_its_clips(encoder: Encoder) -> None:
    clips = _clips(3, 5)
    features = extract_features(encoder, [(clips[:2], torch.tensor([4, 5])), (clips[2:], torch.tensor([6]))])
    with torch.no_grad():
        expected = torch.stack([encoder(normalise(video)).pooled.mean(0) for video in clips])
    assert np.allclose(features.vectors, expected.numpy(), atol=1e-5)
    assert features.labels.tolist() == [4, 5, 6]


def test_a_feature_does_not_depend_on_other_videos_of_the_batch(encoder: Encoder) -> None:
    clips, labels = _clips(5, 20), torch.arange(5)
    together = extract_features(encoder, [(clips, labels)])
    alone = extract_features(encoder, [(clips[3:4], labels[3:4])])
    assert np.array_equal(together.vectors[3:4], alone.vectors)


def test_non_finite_features_are_rejected_with_the_name_of_the_video() -> None:
    features = Features(np.array([[1, 2], [np.nan, 0], [0, np.inf]], np.float32), np.zeros(3, np.int64))
    check_finite(Features(features.vectors[:1], features.labels[:1]), str)
    with pytest.raises(UserError, match=r"video 1: .* not finite, like those of 1 more of 3 videos"):
        check_finite(features, "video {}".format)


def test_extraction_does_not_change_the_encoder(encoder: Encoder) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    extract_features(encoder.train(), [(_clips(2, 2), torch.zeros(2))])
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_recalibration_averages_statistics_over_batches_and_keeps_parameters(encoder: Encoder) -> None:
    batches = [_clips(6, seed=seed) for seed in range(3)]
    parameters = [parameter.clone() for parameter in encoder.parameters()]
    recalibrate(encoder, batches)
    stems = [encoder.conv1(normalise(batch)) for batch in batches]
    means = torch.stack([stem.mean(dim=(0, 2, 3, 4)) for stem in stems])
    assert torch.allclose(encoder.bn1.running_mean, means.mean(0), atol=1e-5)
    assert all(map(torch.equal, encoder.parameters(), parameters))
    assert encoder.bn1.momentum == 0.1
    assert not encoder.training


def test_the_digest_of_an_encoder_depends_on_its_statistics(encoder: Encoder) -> None:
    before = module_digest(encoder)
    assert module_digest(encoder) == before
    encoder.bn1.running_mean += 1
    assert module_digest(encoder) != before


@pytest.fixture
def features() -> Features:
    return Features(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), np.arange(3))


def test_cached_features_are_found_by_encoder_videos_and_clips(tmp_path: Path, features: Features) -> None:
    cache = FeatureCache(FeaturesConfig(folder=str(tmp_path)))
    cache.write({"encoder": "a", "clips": 20}, features)
    cached, line = cache.read({"clips": 20, "encoder": "a"})
    assert cached is not None
    assert all(map(np.array_equal, cached, features))
    assert str(tmp_path) in line
    assert cache.read({"encoder": "a", "clips": 10}) == (None, "")


def test_corrupt_cache_files_are_reported_and_ignored(tmp_path: Path, features: Features) -> None:
    cache = FeatureCache(FeaturesConfig(folder=str(tmp_path)))
    cache.write({}, features)
    (file,) = tmp_path.iterdir()
    for damaged in (file.read_bytes()[:-1] + b"x", b"none"):
        file.write_bytes(damaged)
        cached, line = cache.read({})
        assert cached is None
        assert "corrupt" in line


def test_an_unwritable_cache_folder_is_not_an_error(tmp_path: Path, features: Features) -> None:
    (tmp_path / "file").touch()
    assert "not cached" in FeatureCache(FeaturesConfig(folder=str(tmp_path / "file" / "below"))).write({}, features)


def test_a_disabled_cache_writes_nothing(tmp_path: Path, features: Features) -> None:
    cache = FeatureCache(FeaturesConfig(keep=False, folder=str(tmp_path)))
    assert cache.write({}, features) == ""
    assert cache.read({}) == (None, "")
    assert not any(tmp_path.iterdir())
