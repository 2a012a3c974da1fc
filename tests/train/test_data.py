from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from introkernels.train.data import (
    DATASETS,
    DataError,
    Dataset,
    LabelledImages,
    load_dataset,
    split,
)

SIZES = {"train_size": 100, "validation_size": 300, "test_size": 797}


def rows(part):
    return {tuple(image.flatten().tolist()) for image in part.images}


def numbered(count, classes, first=0, dtype=torch.float32):
    """Images of one pixel that holds their number."""
    numbers = torch.arange(first, first + count)
    return LabelledImages(numbers.to(dtype).reshape(-1, 1, 1, 1), numbers % classes)


def numbers_of(part):
    return part.stored.flatten().long().tolist()


@pytest.fixture
def official():
    """200 images of 4 classes, and 80 official test images, numbered from 1000."""
    return Dataset(numbered(200, 4), tuple("abcd"), "Numbers.", numbered(80, 4, first=1000))


def test_digits_are_whole_and_scaled():
    dataset = load_dataset("digits")
    assert dataset.data.images.shape == (1797, 1, 8, 8)
    assert dataset.input_shape == (1, 8, 8)
    assert dataset.data.images.min() == 0
    assert dataset.data.images.max() == 1
    assert dataset.class_names == tuple("0123456789")


@pytest.mark.parametrize("subset_seed", [0, 7])
def test_digits_are_divided_as_they_always_were(subset_seed):
    pixels, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(np.arange(1797), test_size=797, stratify=labels, random_state=3)
    pool, validation = train_test_split(rest, test_size=300, stratify=labels[rest], random_state=3)
    _, train = train_test_split(
        pool, test_size=100, stratify=labels[pool], random_state=subset_seed
    )
    parts = split(load_dataset("digits"), **SIZES, split_seed=3, subset_seed=subset_seed)
    for part, indices in ((parts.train, train), (parts.validation, validation), (parts.test, test)):
        np.testing.assert_array_equal(part.images.flatten(1), pixels[indices] / 16)
        np.testing.assert_array_equal(part.labels, labels[indices])
        assert part.normalisation is None


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


@pytest.mark.parametrize("train_size", [700, None])
def test_everything_left_can_be_trained_on(train_size):
    parts = split(
        load_dataset("digits"),
        train_size=train_size,
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
        ({"train_size": None, "test_size": 1600}, "= 1900, but the data set has 1797 images"),
        ({"train_size": 695}, "make the parts smaller"),
        ({"test_size": None}, "test_size: None takes the official test images, but there are none"),
        ({"label_noise": 1.0}, "label_noise: got 1.0, expected at least 0 and below 1"),
        ({"label_noise": -0.1}, "label_noise: got -0.1"),
        ({"label_noise": float("nan")}, "label_noise: got nan"),
    ],
)
def test_impossible_splits_say_why(sizes, message):
    with pytest.raises(DataError, match=message):
        split(load_dataset("digits"), **(SIZES | sizes), split_seed=0, subset_seed=0)


@pytest.mark.parametrize(("train_size", "trained"), [(60, 60), (180, 180), (None, 180)])
@pytest.mark.parametrize(("test_size", "tested"), [(24, 24), (80, 80), (None, 80)])
def test_official_test_images_are_for_testing_alone(
    official, train_size, trained, test_size, tested
):
    parts = split(
        official,
        train_size=train_size,
        validation_size=20,
        test_size=test_size,
        split_seed=0,
        subset_seed=0,
    )
    assert (len(parts.train), len(parts.test)) == (trained, tested)
    assert all(number >= 1000 for number in numbers_of(parts.test))
    others = numbers_of(parts.train) + numbers_of(parts.validation)
    assert all(number < 200 for number in others)
    assert len(set(others)) == len(others) == trained + 20
    for part in (parts.train, parts.validation, parts.test):
        assert part.labels.bincount(minlength=4).tolist() == [len(part) // 4] * 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"test_size": 81}, "test_size: got 81, but there are 80 official test images"),
        ({"test_size": 3}, "test_size: got 3, expected at least 4"),
        ({"train_size": 190}, "= 210, but the data set has 200 images"),
    ],
)
def test_impossible_splits_with_official_test_images_say_why(official, sizes, message):
    wanted = {"train_size": None, "validation_size": 20, "test_size": None} | sizes
    with pytest.raises(DataError, match=message):
        split(official, **wanted, split_seed=0, subset_seed=0)


def test_a_class_of_one_image_cannot_be_divided():
    data = numbered(50, 3)
    alone = replace(data, labels=torch.where(torch.arange(50) == 0, 2, data.labels % 2))
    with pytest.raises(DataError, match="equal class shares"):
        split(
            Dataset(alone, tuple("abc"), "Numbers."),
            train_size=10,
            validation_size=10,
            test_size=10,
            split_seed=0,
            subset_seed=0,
        )


def test_images_kept_as_bytes_are_normalised_by_the_training_pool():
    data = numbered(200, 4, dtype=torch.uint8)
    dataset = Dataset(data, tuple("abcd"), "Numbers.", numbered(80, 4, dtype=torch.uint8))
    sizes = {"validation_size": 40, "test_size": None, "split_seed": 0}
    pool = split(dataset, **sizes, train_size=None, subset_seed=0)
    parts = split(dataset, **sizes, train_size=20, subset_seed=1)
    pixels = pool.train.stored.double() / 255
    for part in (parts.train, parts.validation, parts.test):
        assert part.stored.dtype == torch.uint8
        assert part.normalisation.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
        assert part.normalisation.std.item() == pytest.approx(
            pixels.std(correction=0).item(), rel=1e-6
        )
    assert set(numbers_of(parts.train)) < set(numbers_of(pool.train))


@pytest.mark.parametrize("share", [0.0, 0.003, 0.2, 0.5, 0.999])
def test_exactly_the_share_of_training_labels_becomes_another_class(official, share):
    sizes = {"train_size": 150, "validation_size": 20, "test_size": None}
    seeds = {"split_seed": 0, "subset_seed": 3}
    clean = split(official, **sizes, **seeds)
    noisy = split(official, **sizes, **seeds, label_noise=share)
    assert (noisy.train.labels != clean.train.labels).sum() == round(share * 150)
    assert noisy.train.labels.dtype == torch.int64
    assert set(noisy.train.labels.tolist()) <= {0, 1, 2, 3}
    assert torch.equal(noisy.train.stored, clean.train.stored)
    for part in (noisy.validation, noisy.test):
        assert torch.equal(part.labels, part.stored.flatten().long() % 4)
    assert torch.equal(official.data.labels, torch.arange(200) % 4)


def test_label_noise_is_uniform_over_images_and_other_classes():
    count, classes = 20000, 5
    dataset = Dataset(numbered(count, classes), tuple("abcde"), "Numbers.", numbered(10, classes))
    train = split(
        dataset,
        train_size=None,
        validation_size=10,
        test_size=None,
        split_seed=0,
        subset_seed=0,
        label_noise=0.4,
    ).train
    true = train.stored.flatten().long() % classes
    steps = (train.labels - true) % classes
    assert chisquare(steps[steps > 0].bincount()[1:]).pvalue > 1e-3
    assert chisquare(true[steps > 0].bincount()).pvalue > 1e-3


def test_label_noise_depends_on_the_run_and_grows_with_the_share(official):
    sizes = {"train_size": None, "validation_size": 20, "test_size": None, "split_seed": 0}

    def labels(share, seed):
        return split(official, **sizes, subset_seed=seed, label_noise=share).train.labels

    clean = labels(0, 0)
    assert torch.equal(labels(0.3, 1), labels(0.3, 1))
    assert not torch.equal(labels(0.3, 1), labels(0.3, 2))
    less, more = labels(0.3, 1), labels(0.6, 1)
    replaced = less != clean
    assert torch.equal(less[replaced], more[replaced])


def test_label_noise_does_not_follow_the_order_of_training(official):
    """A run draws its first order of images from torch's generator with the same seed."""
    order = torch.randperm(180, generator=torch.Generator().manual_seed(3))
    sizes = {"train_size": None, "validation_size": 20, "test_size": None, "split_seed": 0}
    clean = split(official, **sizes, subset_seed=3).train.labels
    noisy = split(official, **sizes, subset_seed=3, label_noise=0.5).train.labels
    first_half = (clean != noisy)[order[:90]].float().mean()
    assert 0.3 < first_half < 0.7


def test_unknown_names_list_what_there_is():
    with pytest.raises(DataError, match="dataset: got 'mnist', expected one of digits, synthetic"):
        load_dataset("mnist")


@pytest.mark.parametrize("name", sorted({*DATASETS} - {"image_folder"}))
def test_only_an_image_folder_has_a_choice_of_size(name):
    with pytest.raises(DataError, match="image_size: got 32, but only image_folder"):
        load_dataset(name, image_size=32)


@pytest.mark.parametrize("size", [0, -3])
def test_sizes_below_one_are_refused(size):
    with pytest.raises(DataError, match=f"image_size: got {size}, expected at least 1"):
        load_dataset("image_folder", image_size=size)


def test_the_default_folder_is_data_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"{Path('data') / 'cifar-10-batches-py'}"):
        load_dataset("cifar10")


def test_a_data_set_is_loaded_once():
    assert load_dataset("digits") is load_dataset("digits")
