from __future__ import annotations

import numpy as np
import pytest
import torch

from introkernels.train.data import LabelledImages, Normalisation


def bytes_of(*shape, seed=0):
    drawn = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(drawn)


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 1, 5)])
def test_normalisation_measures_each_channel_in_whatever_batches(sizes):
    images = bytes_of(7, 3, 5, 4)
    images[:, 1] //= 4
    found = Normalisation.measured(images.split(sizes))
    pixels = images.double().numpy() / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found.std, pixels.std(axis=(0, 2, 3)), rtol=1e-6)
    assert found.mean.dtype == found.std.dtype == torch.float32


def test_a_channel_that_never_varies_does_not_become_nan():
    images = bytes_of(4, 2, 3, 3)
    images[:, 0] = 51
    found = Normalisation.measured([images])
    assert found.std[0] == 1
    assert found.mean[0].item() == pytest.approx(0.2)


def test_bytes_become_normalised_floats_where_they_are_used():
    images, labels = bytes_of(6, 3, 4, 5), torch.arange(6)
    normalisation = Normalisation(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4]))
    data = LabelledImages(images, labels, normalisation)
    expected = np.stack(
        [
            (images[:, c].numpy() / 255.0 - mean) / std
            for c, (mean, std) in enumerate([(0.1, 0.2), (0.5, 0.3), (0.9, 0.4)])
        ],
        axis=1,
    )
    assert data.images.dtype == torch.float32
    np.testing.assert_allclose(data.images, expected, rtol=1e-5, atol=1e-6)
    assert data.stored.dtype == torch.uint8
    batch = data[torch.tensor([4, 1])]
    assert torch.equal(batch.images, data.images[[4, 1]])
    assert torch.equal(batch.labels, torch.tensor([4, 1]))
    assert torch.equal(data[2:4].images, data.images[2:4])
    # Normalised once: a batch of a batch is the same again.
    assert torch.equal(batch[torch.tensor([1])].images, data.images[[1]])
    np.testing.assert_allclose(
        normalisation.inverse(data.images), images.numpy() / 255.0, rtol=1e-5, atol=1e-6
    )


def test_a_part_stays_in_bytes_with_its_normalisation():
    data = LabelledImages(
        bytes_of(5, 1, 2, 2), torch.arange(5), Normalisation(torch.zeros(1), torch.ones(1))
    )
    part = data.part(slice(1, 3))
    assert part.stored.dtype == torch.uint8
    assert torch.equal(part.stored, data.stored[1:3])
    assert torch.equal(part.labels, torch.tensor([1, 2]))
    assert part.normalisation is data.normalisation


def test_bytes_without_normalisation_are_scaled_alone():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    found = LabelledImages(images, torch.arange(3)).images.flatten()
    torch.testing.assert_close(found, torch.tensor([0.0, 0.2, 1.0]))


def test_floats_are_used_as_they_are():
    images = torch.randn(3, 1, 2, 2)
    assert LabelledImages(images, torch.arange(3)).images is images


@pytest.mark.parametrize("labels", [2, 4])
def test_every_image_has_one_label(labels):
    with pytest.raises(ValueError, match=f"labels: got {labels} for 3 images"):
        LabelledImages(torch.zeros(3, 1, 2, 2), torch.arange(labels))
