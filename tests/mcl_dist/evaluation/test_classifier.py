from __future__ import annotations

import math

import pytest
import torch

from mcl_dist.evaluation.classifier import Classifier, ClassifierLoss, LinearLayer, dropout_mask
from mcl_dist.model.encoder import Encoder, EncoderConfig


def test_dropout_drops_its_share_and_preserves_the_mean() -> None:
    mask = dropout_mask(64, 512, 0.9, seed=3, step=5)
    assert mask.unique().tolist() == pytest.approx([0.0, 10.0])
    assert float((mask > 0).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_dropout_is_a_function_of_seed_and_step() -> None:
    first = dropout_mask(4, 8, 0.5, seed=3, step=5)
    assert torch.equal(first, dropout_mask(4, 8, 0.5, seed=3, step=5))
    assert not torch.equal(first, dropout_mask(4, 8, 0.5, seed=3, step=6))
    assert not torch.equal(first, dropout_mask(4, 8, 0.5, seed=4, step=5))


def test_the_loss_module_reports_loss_and_accuracy() -> None:
    layer = LinearLayer(2, 2)
    loss = ClassifierLoss(layer)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.eye(2))
        value = loss(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    assert float(loss.report["loss"]) == float(value)
    assert float(value) == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2)
    assert float(loss.report["accuracy"]) == 0.5


def test_a_classifier_applies_the_dropout_mask_to_the_pooled_features() -> None:
    torch.manual_seed(0)
    classifier = Classifier(Encoder(EncoderConfig(width=4, blocks=(1,))), 3).eval()
    clips = torch.rand(2, 3, 4, 16, 16)
    mask = dropout_mask(2, classifier.encoder.feature_dim, 0.5, seed=0, step=0)
    expected = classifier.linear(classifier.encoder(clips).pooled * mask)
    assert torch.allclose(classifier(clips, mask), expected)
    assert not torch.allclose(classifier(clips), expected)
