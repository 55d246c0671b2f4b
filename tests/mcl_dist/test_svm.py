from __future__ import annotations

import numpy as np
import pytest
import torch

from mcl_dist.encoder import Encoder, EncoderConfig, normalise
from mcl_dist.errors import UserError
from mcl_dist.evaluation.features import Features, extract_features, recalibrate
from mcl_dist.evaluation.svm import accuracy, svm_accuracy


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(width=4, blocks=(1, 1)))


def _clips(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 4, 16, 16, 3), generator=generator, dtype=torch.uint8)


def _clusters(num_classes: int, seed: int) -> Features:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), 10)
    centres = 5 * np.eye(num_classes, 8)
    return Features((centres[labels] + rng.normal(size=(len(labels), 8))).astype(np.float32), labels)


def test_features_of_a_video_are_the_mean_over_its_clips(encoder: Encoder) -> None:
    clips = _clips(3, 5)
    features = extract_features(encoder, [(clips[:2], torch.tensor([4, 5])), (clips[2:], torch.tensor([6]))])
    with torch.no_grad():
        expected = torch.stack([encoder(normalise(video)).pooled.mean(0) for video in clips])
    assert np.allclose(features.vectors, expected.numpy(), atol=1e-5)
    assert features.labels.tolist() == [4, 5, 6]


def test_extraction_changes_nothing_of_the_encoder(encoder: Encoder) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    extract_features(encoder.train(), [(_clips(2, 2), torch.zeros(2))])
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_recalibration_averages_statistics_over_batches_and_leaves_parameters(encoder: Encoder) -> None:
    batches = [_clips(6, seed=seed) for seed in range(3)]
    parameters = [parameter.clone() for parameter in encoder.parameters()]
    recalibrate(encoder, batches)
    stems = [encoder.conv1(normalise(batch)) for batch in batches]
    means = torch.stack([stem.mean(dim=(0, 2, 3, 4)) for stem in stems])
    assert torch.allclose(encoder.bn1.running_mean, means.mean(0), atol=1e-5)
    assert all(map(torch.equal, encoder.parameters(), parameters))
    assert encoder.bn1.momentum == 0.1
    assert not encoder.training


def test_separable_classes_are_told_apart() -> None:
    result = svm_accuracy(_clusters(6, seed=0), _clusters(6, seed=1))
    assert (result.top1, result.top5, result.videos) == (1.0, 1.0, 60)


def test_two_classes_are_enough() -> None:
    assert svm_accuracy(_clusters(2, seed=0), _clusters(2, seed=1)).top1 == 1.0


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="fewer than two classes"):
        svm_accuracy(_clusters(1, seed=0), _clusters(1, seed=1))


def test_an_empty_test_set_is_refused() -> None:
    with pytest.raises(UserError, match="no video"):
        svm_accuracy(_clusters(2, seed=0), Features(np.empty((0, 8), np.float32), np.empty(0, np.int64)))


def test_top5_counts_a_class_among_the_first_five_choices() -> None:
    scores = np.array([[7.0, 6, 5, 4, 3, 2, 1]] * 7)
    found = accuracy(scores, np.arange(7), np.arange(7))
    assert (found.top1, found.top5) == (1 / 7, 5 / 7)


def test_a_class_that_training_never_showed_counts_as_missed() -> None:
    found = accuracy(np.array([[1.0, 0.0]] * 2), np.array([0, 9]), np.array([0, 1]))
    assert (found.top1, found.top5) == (0.5, 0.5)
