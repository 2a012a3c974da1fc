from __future__ import annotations

import pytest
import torch

from introkernels.train.data import DataError, load_dataset, split

SIZES = {"train_size": 100, "validation_size": 300, "test_size": 797}


def rows(part):
    return {tuple(image.flatten().tolist()) for image in part.images}


def test_digits_are_whole_and_scaled():
    dataset = load_dataset("digits")
    assert dataset.data.images.shape == (1797, 1, 8, 8)
    assert dataset.input_shape == (1, 8, 8)
    assert dataset.data.images.min() == 0
    assert dataset.data.images.max() == 1
    assert dataset.class_names == tuple("0123456789")


def test_parts_have_their_sizes_share_no_image_and_keep_class_shares():
    dataset = load_dataset("digits")
    parts = split(dataset, **SIZES, split_seed=0, subset_seed=5)
    assert [len(p) for p in (parts.train, parts.validation, parts.test)] == [100, 300, 797]
    shares = dataset.data.labels.bincount() / len(dataset.data)
    for part in (parts.train, parts.validation, parts.test):
        assert (part.labels.bincount(minlength=10) - shares * len(part)).abs().max() <= 1.5
    assert not rows(parts.train) & rows(parts.validation)
    assert not rows(parts.train) & rows(parts.test)
    assert not rows(parts.validation) & rows(parts.test)


def test_only_the_training_subset_depends_on_the_run():
    dataset = load_dataset("digits")
    first, second = (split(dataset, **SIZES, split_seed=0, subset_seed=s) for s in (1, 2))
    assert torch.equal(first.test.images, second.test.images)
    assert torch.equal(first.validation.images, second.validation.images)
    assert not torch.equal(first.train.images, second.train.images)
    again = split(dataset, **SIZES, split_seed=0, subset_seed=1)
    assert torch.equal(first.train.images, again.train.images)
    other = split(dataset, **SIZES, split_seed=1, subset_seed=1)
    assert not torch.equal(first.test.images, other.test.images)


def test_everything_left_can_be_trained_on():
    parts = split(
        load_dataset("digits"),
        train_size=700,
        validation_size=300,
        test_size=797,
        split_seed=0,
        subset_seed=0,
    )
    assert len(parts.train) == 700


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_size": 5}, "train_size: got 5, expected at least 10"),
        ({"train_size": 1000}, "= 2097, but the data set has 1797 images"),
        ({"train_size": 695}, "make the parts smaller"),
    ],
)
def test_impossible_splits_say_why(sizes, message):
    with pytest.raises(DataError, match=message):
        split(load_dataset("digits"), **(SIZES | sizes), split_seed=0, subset_seed=0)
