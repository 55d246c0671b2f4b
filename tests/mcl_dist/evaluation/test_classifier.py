from __future__ import annotations

import math

import pytest
import torch

from mcl_dist.evaluation.classifier import Classifier, ClassifierLoss, LinearLayer, draw_kept
from mcl_dist.model.encoder import Encoder, EncoderConfig


def test_dropout_leaves_out_its_share_and_keeps_the_mean() -> None:
    kept = draw_kept(64, 512, 0.9, seed=3, step=5)
    assert kept.unique().tolist() == pytest.approx([0.0, 10.0])
    assert float((kept > 0).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_dropout_is_a_function_of_seed_and_step() -> None:
    first = draw_kept(4, 8, 0.5, seed=3, step=5)
    assert torch.equal(first, draw_kept(4, 8, 0.5, seed=3, step=5))
    assert not torch.equal(first, draw_kept(4, 8, 0.5, seed=3, step=6))
    assert not torch.equal(first, draw_kept(4, 8, 0.5, seed=4, step=5))


def test_the_loss_reports_itself_and_the_share_that_is_told_right() -> None:
    layer = LinearLayer(2, 2)
    loss = ClassifierLoss(layer)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.eye(2))
        value = loss(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    assert float(loss.report["loss"]) == float(value)
    assert float(value) == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2)
    assert float(loss.report["accuracy"]) == 0.5


def test_a_classifier_scores_what_is_kept_of_the_pooled_features() -> None:
    torch.manual_seed(0)
    classifier = Classifier(Encoder(EncoderConfig(width=4, blocks=(1,))), 3).eval()
    clips = torch.rand(2, 3, 4, 16, 16)
    kept = draw_kept(2, classifier.encoder.feature_dim, 0.5, seed=0, step=0)
    expected = classifier.linear(classifier.encoder(clips).pooled * kept)
    assert torch.allclose(classifier(clips, kept), expected)
    assert not torch.allclose(classifier(clips), expected)
