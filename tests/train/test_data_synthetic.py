from __future__ import annotations

import pytest
import torch

from introkernels.train.data import DATASETS, load_dataset


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("synthetic")


def test_it_says_that_it_is_synthetic(dataset):
    assert dataset.synthetic
    assert "synthetic" in dataset.description
    assert not load_dataset("digits").synthetic


def test_shapes_and_equal_class_shares(dataset):
    assert dataset.input_shape == (3, 16, 16)
    assert dataset.data.images.dtype == torch.float32
    assert dataset.data.labels.bincount().tolist() == [200] * 20
    assert len(set(dataset.class_names)) == 20
    assert [dataset.superclasses.count(s) for s in range(5)] == [4] * 5


def test_the_same_images_whatever_the_global_generator(dataset, tmp_path):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again = DATASETS["synthetic"](tmp_path)
    assert torch.equal(again.data.images, dataset.data.images)
    assert torch.equal(again.data.labels, dataset.data.labels)
    assert torch.equal(torch.get_rng_state(), state)


def test_classes_of_one_superclass_are_more_alike_than_others(dataset):
    data, classes = dataset.data, range(len(dataset.class_names))
    means = torch.stack([data.images[data.labels == c].mean(dim=0) for c in classes]).flatten(1)
    cosines = torch.nn.functional.cosine_similarity(means[:, None], means[None], dim=2)
    superclasses = torch.tensor(dataset.superclasses)
    same = superclasses[:, None] == superclasses
    other_class = ~torch.eye(20, dtype=torch.bool)
    assert cosines[same & other_class].min() > cosines[~same].max() + 0.1


def test_signal_and_noise_are_as_strong_as_documented():
    # Noise has variance 2.5², amplitudes have mean square 1 + 1/12, prototypes 1 + 0.6².
    images = load_dataset("synthetic").data.images.double()
    expected = 2.5**2 + (1 + 1 / 12) * (1 + 0.6**2)
    assert images.square().mean().item() == pytest.approx(expected, rel=0.01)
    assert images.mean().item() == pytest.approx(0, abs=0.01)
