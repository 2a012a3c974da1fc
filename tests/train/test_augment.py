from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from introkernels.train.data.augment import AUGMENTATIONS

RANDOM = [name for name in AUGMENTATIONS if name != "none"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count, channels, height, width, dtype=torch.float32):
    """The same image `count` times; no two of its numbers are equal and none is 0."""
    size = channels * height * width
    image = torch.randperm(size, generator=generator(1)).to(dtype).reshape(channels, height, width)
    return (image + 1).repeat(count, 1, 1, 1)


def moved(image, down, right):
    """An image moved by whole pixels, zeros moving in; plain loops."""
    channels, height, width = image.shape
    result = np.zeros_like(image)
    for c, y, x in itertools.product(range(channels), range(height), range(width)):
        if 0 <= y - down < height and 0 <= x - right < width:
            result[c, y, x] = image[c, y - down, x - right]
    return result


def possible(image, reach, *, mirrored):
    """What each (down, right, flipped) makes of an image, by its bytes."""
    outcomes = {}
    for down, right in itertools.product(range(-reach, reach + 1), repeat=2):
        result = moved(image, down, right)
        outcomes[result.tobytes()] = (down, right, False)
        if mirrored:
            outcomes[result[:, :, ::-1].tobytes()] = (down, right, True)
    return outcomes


@pytest.mark.parametrize(
    ("name", "reach", "mirrored", "count"), [("shift", 1, False, 900), ("crop_flip", 4, True, 8100)]
)
def test_every_possible_move_is_equally_likely_and_nothing_else_comes_out(
    name, reach, mirrored, count
):
    images = batch(count, 2, 9, 10)
    outcomes = possible(images[0].numpy(), reach, mirrored=mirrored)
    kinds = (2 * reach + 1) ** 2 * (2 if mirrored else 1)
    assert len(outcomes) == kinds
    results = AUGMENTATIONS[name](images, generator()).contiguous().numpy()
    found = dict.fromkeys(outcomes.values(), 0)
    for result in results:
        found[outcomes[result.tobytes()]] += 1
    assert chisquare(list(found.values())).pvalue > 1e-3


def test_the_hole_is_a_square_around_any_pixel_cut_off_at_the_edges():
    height, width, side = 8, 10, 4
    # A hole can't be told from zeros that moved in, so only images that did not move are looked
    # at; the same random numbers without a hole tell which these are.
    images = batch(6000, 1, height, width)
    without = AUGMENTATIONS["crop_flip"](images, generator())
    results = AUGMENTATIONS["crop_flip_cutout"](images, generator())
    changed = results != without
    assert (results[changed] == 0).all()
    unmoved = (without != 0).all(dim=(1, 2, 3))
    assert unmoved.sum() > 30

    centres = {}
    for y, x in itertools.product(range(height), range(width)):
        hole = np.zeros((1, height, width), dtype=bool)
        top, left = max(y - side // 2, 0), max(x - side // 2, 0)
        hole[0, top : y - side // 2 + side, left : x - side // 2 + side] = True
        centres[hole.tobytes()] = (y, x)
    assert len(centres) == height * width
    found = {centres[hole.numpy().tobytes()] for hole in changed[unmoved]}
    assert len(found) > 20


def test_centres_of_holes_are_uniform():
    images = torch.ones(10000, 1, 24, 24)
    results = AUGMENTATIONS["crop_flip_cutout"](images, generator())
    # Twelve pixels wide, a hole covers pixel 8 if its centre is one of 3 to 14: 12 of 24. No shift
    # by 4 pixels brings zeros as far as there.
    assert (results[:, 0, 8, 8] == 0).float().mean().item() == pytest.approx(1 / 4, abs=0.015)
    # Only centres 3 to 14 of 24, and both 8 and 15 are covered for centres 10 to 14.
    both = (results[:, 0, 8, 8] == 0) & (results[:, 0, 15, 8] == 0)
    assert both.float().mean().item() == pytest.approx(5 / 24 / 2, abs=0.012)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_dtype_and_the_given_images_stay(name, dtype):
    images = batch(5, 3, 9, 12, dtype)
    before = images.clone()
    result = AUGMENTATIONS[name](images, generator())
    assert (result.shape, result.dtype, result.device) == (images.shape, dtype, images.device)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_generator_decides_and_the_default_one_is_torchs(name):
    images = batch(64, 1, 8, 8)
    augment = AUGMENTATIONS[name]
    first = augment(images, generator(3))
    assert torch.equal(first, augment(images, generator(3)))
    torch.manual_seed(3)
    assert torch.equal(first, augment(images, None))
    if name in RANDOM:
        assert not torch.equal(first, augment(images, generator(4)))
    state = torch.get_rng_state()
    augment(images, generator(3))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", RANDOM)
def test_all_channels_of_an_image_change_alike(name):
    images = batch(50, 1, 10, 10).expand(-1, 3, -1, -1)
    result = AUGMENTATIONS[name](images, generator())
    assert torch.equal(result[:, 0], result[:, 1])
    assert torch.equal(result[:, 0], result[:, 2])
