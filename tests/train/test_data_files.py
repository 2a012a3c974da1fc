from __future__ import annotations

import os
import pickle
import struct
import sys
from itertools import chain
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from introkernels.train.data import DataError, load_dataset, split


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings: the form of CIFAR's batches."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def write_batch(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    # The name by which numpy 1 knew the module.
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))


def write_cifar10(folder, each=4):
    """Images and labels of the training part, then of the test part, as numpy knows them."""
    names = [b"airplane", b"automobile", *(b"class %d" % c for c in range(2, 10))]
    write_batch(folder / "batches.meta", {b"label_names": names, b"num_vis": 3072})
    parts = []
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        images = drawn(each, 3, 32, 32, seed=seed)
        labels = [(seed + 3 * i) % 10 for i in range(each)]
        content = {b"data": images.reshape(each, 3072), b"labels": labels, b"batch_label": b"any"}
        write_batch(folder / name, content)
        parts.append((images, labels))
    return parts


def write_cifar100(folder):
    """200 training and 100 test images; class c has superclass 3c mod 20."""
    fine = [b"fine %d" % c for c in range(100)]
    coarse = [b"coarse %d" % c for c in range(20)]
    write_batch(folder / "meta", {b"fine_label_names": fine, b"coarse_label_names": coarse})
    for name, count in (("train", 200), ("test", 100)):
        labels = [c % 100 for c in range(count)]
        content = {
            b"data": drawn(count, 3072),
            b"fine_labels": labels,
            b"coarse_labels": [3 * c % 20 for c in labels],
        }
        write_batch(folder / name, content)


def write_tiny_imagenet(folder):
    """Three classes of two images each and four validation images; the first is grey."""
    words = {"n02": "goldfish, Carassius auratus", "n01": "tench", "n03": "bullfrog, frog"}
    folder.mkdir(parents=True)
    (folder / "wnids.txt").write_text("".join(f"{synset}\n" for synset in words))
    lines = [f"{synset}\t{text}\n" for synset, text in words.items()]
    (folder / "words.txt").write_text("n99\tentity\n" + "".join(lines))
    for c, synset in enumerate(["n01", "n02", "n03"]):
        images = folder / "train" / synset / "images"
        images.mkdir(parents=True)
        (folder / "train" / synset / f"{synset}_boxes.txt").write_text("")
        for i in range(2):
            one_colour((64, 64), 80 * c + 10 * i).save(images / f"{synset}_{i}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    chosen = ["n03", "n01", "n02", "n01"]
    for i in range(4):
        picture = one_colour((64, 64), 20 * i)
        picture.convert("L" if i == 0 else "RGB").save(folder / "val" / "images" / f"val_{i}.JPEG")
    lines = [f"val_{i}.JPEG\t{synset}\t0\t0\t62\t62\n" for i, synset in enumerate(chosen)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "test" / "images").mkdir(parents=True)


def one_colour(size, level):
    return Image.new("RGB", size, (level, level, level))


def write_folder(folder, classes, size=(6, 5), each=2):
    """Images of one grey each: level 100 times the class plus the image's number."""
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            one_colour(size, 100 * c + i).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The package, which may write its locks to a folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield pytest.importorskip("datasets")


def write_parquet(datasets, path, columns, names):
    """A file as the Hugging Face Hub keeps it; `names`: the classes of label columns."""
    features = {
        name: datasets.ClassLabel(names=names[name]) if name in names else datasets.Image()
        for name in columns
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.disable_progress_bars()
    table.to_parquet(str(path))


@pytest.mark.parametrize("place", ["", "cifar10"])
def test_cifar10_in_its_original_batches(tmp_path, place):
    parts = write_cifar10(tmp_path / place / "cifar-10-batches-py")
    dataset = load_dataset("cifar10", tmp_path)
    assert dataset.input_shape == (3, 32, 32)
    assert dataset.data.stored.dtype == torch.uint8
    images = np.concatenate([images for images, _ in parts])
    np.testing.assert_array_equal(dataset.data.stored, images[:20])
    np.testing.assert_array_equal(dataset.official_test.stored, images[20:])
    assert dataset.data.labels.tolist() == [*chain(*(labels for _, labels in parts[:5]))]
    assert dataset.official_test.labels.tolist() == parts[5][1]
    assert dataset.data.labels.dtype == torch.int64
    assert dataset.class_names[:2] == ("airplane", "automobile")
    assert len(dataset.class_names) == 10
    assert dataset.superclasses is None
    assert not dataset.synthetic
    assert "24 real photographs" in dataset.description


@pytest.mark.parametrize("place", ["", "cifar100"])
def test_cifar100_in_its_original_batches(tmp_path, place):
    write_cifar100(tmp_path / place / "cifar-100-python")
    dataset = load_dataset("cifar100", tmp_path)
    assert (len(dataset.data), len(dataset.official_test)) == (200, 100)
    assert dataset.data.labels.tolist() == [*range(100), *range(100)]
    assert dataset.class_names == tuple(f"fine {c}" for c in range(100))
    assert dataset.superclasses == tuple(3 * c % 20 for c in range(100))
    parts = split(
        dataset,
        train_size=None,
        validation_size=100,
        test_size=None,
        split_seed=0,
        subset_seed=0,
    )
    inputs = parts.train.images
    torch.testing.assert_close(inputs.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        inputs.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_missing_batch_is_named(tmp_path, name):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        load_dataset("cifar10", tmp_path)


class Harmful:
    def __reduce__(self):
        return os.putenv, ("INTROKERNELS_HARMED", "1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Harmful()), "asks for posix.putenv|asks for os.putenv|asks for nt.putenv"),
        (b"nonsense", "can't be read"),
        (pickle.dumps({b"data": 1})[:-4], "can't be read"),
        (pickle.dumps([1]), "holds a list, expected a dictionary"),
        (pickle.dumps({b"data": drawn(2, 3072)}), "doesn't hold batches as expected"),
        (pickle.dumps({b"data": drawn(2, 5), b"labels": [0]}), "doesn't hold batches as expected"),
        (pickle.dumps({b"data": drawn(2, 3072), b"labels": [0]}), "got 17 for 18 images"),
    ],
)
def test_a_batch_can_hold_nothing_but_arrays_and_plain_values(tmp_path, content, message):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_a_snapshot(tmp_path, datasets, name):
    classes, superclass = {"cifar10": (10, None), "cifar100": (100, 7)}[name]
    label = "label" if superclass is None else "fine_label"
    names = {label: [f"class {c}" for c in range(classes)]}
    pictures = {"train": drawn(classes, 32, 32, 3), "test": drawn(classes, 32, 32, 3, seed=1)}
    for part, arrays in pictures.items():
        order = list(range(classes)) if part == "train" else list(range(classes))[::-1]
        columns = {"img": [Image.fromarray(array) for array in arrays], label: order}
        if superclass is not None:
            names["coarse_label"] = [f"superclass {c}" for c in range(20)]
            columns["coarse_label"] = [c * superclass % 20 for c in order]
        path = tmp_path / name / name / f"{part}-00000-of-00001.parquet"
        write_parquet(datasets, path, columns, names)
    dataset = load_dataset(name, tmp_path)
    np.testing.assert_array_equal(dataset.data.stored, pictures["train"].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(
        dataset.official_test.stored, pictures["test"].transpose(0, 3, 1, 2)
    )
    assert dataset.data.labels.tolist() == list(range(classes))
    assert dataset.official_test.labels.tolist() == list(range(classes))[::-1]
    assert dataset.class_names == tuple(names[label])
    expected = None if superclass is None else tuple(c * 7 % 20 for c in range(100))
    assert dataset.superclasses == expected


@pytest.mark.parametrize("place", ["", "tiny_imagenet"])
def test_tiny_imagenet_in_its_original_folders(tmp_path, place):
    write_tiny_imagenet(tmp_path / place / "tiny-imagenet-200")
    dataset = load_dataset("tiny_imagenet", tmp_path)
    assert dataset.class_names == ("tench", "goldfish", "bullfrog")
    assert dataset.input_shape == (3, 64, 64)
    assert dataset.data.stored.dtype == torch.uint8
    assert dataset.data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.official_test.labels.tolist() == [2, 0, 1, 0]
    # JPEG keeps one colour to a level or so.
    levels = dataset.data.stored.float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(levels, torch.tensor([0.0, 10, 80, 90, 160, 170]), atol=1.5, rtol=0)
    levels = dataset.official_test.stored.float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(levels, torch.tensor([0.0, 20, 40, 60]), atol=1.5, rtol=0)


@pytest.mark.parametrize(
    "missing", ["wnids.txt", "words.txt", "val/val_annotations.txt", "val/images/val_2.JPEG"]
)
def test_a_missing_file_of_tiny_imagenet_is_named(tmp_path, missing):
    folder = tmp_path / "tiny-imagenet-200"
    write_tiny_imagenet(folder)
    (folder / missing).unlink()
    with pytest.raises(DataError, match=f"{missing.rpartition('/')[2]}"):
        load_dataset("tiny_imagenet", tmp_path)


def test_tiny_imagenet_in_a_snapshot(tmp_path, datasets):
    for part, levels in (("train", [0, 100, 200]), ("valid", [50, 150])):
        columns = {
            "image": [one_colour((64, 64), level) for level in levels],
            "label": [level // 100 for level in levels],
        }
        path = tmp_path / "tiny_imagenet" / "data" / f"{part}-00000-of-00001.parquet"
        write_parquet(datasets, path, columns, {"label": ["n01", "n02", "n03"]})
    dataset = load_dataset("tiny_imagenet", tmp_path)
    assert dataset.data.stored[:, 0, 0, 0].tolist() == [0, 100, 200]
    assert dataset.official_test.stored[:, 0, 0, 0].tolist() == [50, 150]
    assert dataset.official_test.labels.tolist() == [0, 1]
    assert dataset.class_names == ("n01", "n02", "n03")


def test_a_folder_of_images(tmp_path, datasets):
    write_folder(tmp_path, ["dog", "cat"])
    dataset = load_dataset("image_folder", tmp_path)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.input_shape == (3, 5, 6)
    found = sorted(
        zip(dataset.data.labels.tolist(), dataset.data.stored[:, 1, 2, 3].tolist(), strict=True)
    )
    assert found == [(0, 100), (0, 101), (1, 0), (1, 1)]
    assert dataset.official_test is None


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_of_images_in_two_parts(tmp_path, datasets, held_out):
    write_folder(tmp_path / "train", ["cat", "dog"], each=3)
    write_folder(tmp_path / held_out, ["cat", "dog"], each=1)
    dataset = load_dataset("image_folder", tmp_path)
    assert sorted(dataset.data.stored[:, 0, 0, 0].tolist()) == [0, 1, 2, 100, 101, 102]
    assert sorted(dataset.official_test.stored[:, 0, 0, 0].tolist()) == [0, 100]
    assert sorted(dataset.official_test.labels.tolist()) == [0, 1]


def test_of_three_parts_only_the_test_images_are_official(tmp_path, datasets):
    for part, each in (("train", 3), ("val", 2), ("test", 1)):
        write_folder(tmp_path / part, ["cat", "dog"], each=each)
    dataset = load_dataset("image_folder", tmp_path)
    assert (len(dataset.data), len(dataset.official_test)) == (10, 2)


def test_images_of_different_sizes_are_brought_to_64_pixels(tmp_path, datasets):
    write_folder(tmp_path, ["cat", "dog"], size=(20, 10))
    # Red, green and red again from left to right: the square in the middle is green.
    wide = Image.new("RGB", (300, 100), (255, 0, 0))
    wide.paste((0, 255, 0), (100, 0, 200, 100))
    wide.save(tmp_path / "dog" / "wide.png")
    dataset = load_dataset("image_folder", tmp_path)
    assert dataset.input_shape == (3, 64, 64)
    greens = dataset.data.stored[dataset.data.stored[:, 1, 32, 32] == 255]
    assert len(greens) == 1
    middle = greens[0, :, 2:-2, 2:-2].flatten(1).float().mean(dim=1)
    torch.testing.assert_close(middle, torch.tensor([0.0, 255, 0]), atol=1, rtol=0)


@pytest.mark.parametrize("size", [7, 32])
def test_the_size_can_be_chosen(tmp_path, datasets, size):
    write_folder(tmp_path, ["cat", "dog"])
    dataset = load_dataset("image_folder", tmp_path, image_size=size)
    assert dataset.input_shape == (3, size, size)
    assert sorted(dataset.data.stored[:, 0, 0, 0].tolist()) == [0, 1, 100, 101]


def test_grey_and_transparent_images_become_rgb(tmp_path, datasets):
    write_folder(tmp_path, ["cat", "dog"], each=1)
    Image.new("L", (6, 5), 33).save(tmp_path / "cat" / "grey.png")
    Image.new("RGBA", (6, 5), (44, 44, 44, 0)).save(tmp_path / "dog" / "clear.png")
    dataset = load_dataset("image_folder", tmp_path)
    assert sorted(dataset.data.stored[:, 2, 1, 1].tolist()) == [0, 33, 44, 100]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10", ["cifar-10-batches-py", "data_batch_1", "batches.meta", "uoft-cs/cifar10"]),
        ("cifar100", ["cifar-100-python", "train, test, meta", "uoft-cs/cifar100"]),
        ("tiny_imagenet", ["tiny-imagenet-200", "wnids.txt", "val/val_annotations.txt"]),
        ("image_folder", ["is not a folder", "CLASS/NAME.png"]),
    ],
)
def test_what_is_missing_is_told_with_the_layout_expected(tmp_path, name, expected):
    with pytest.raises(DataError) as caught:
        load_dataset(name, tmp_path / "nowhere")
    for text in (name, str(tmp_path / "nowhere"), *expected):
        assert text in str(caught.value)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


def garble(path):
    content = bytearray(path.read_bytes())
    content[60:120] = bytes(60)
    path.write_bytes(content)


DAMAGES = [cut_short, garble, lambda path: path.write_bytes(b"")]


def assert_named(error, *names):
    """One line that names the picture, says what to do and nothing else."""
    message = str(error.value)
    assert all(name in message for name in names)
    assert message.endswith("; delete or replace it")
    assert "\n" not in message
    assert "expected image files" not in message


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_picture_is_named(damage, tmp_path, datasets):
    write_folder(tmp_path, ["cat", "dog"])
    path = tmp_path / "dog" / "noise.png"
    Image.effect_noise((40, 40), 50).save(path)
    damage(path)
    with pytest.raises(DataError) as error:
        load_dataset("image_folder", tmp_path)
    assert_named(error, str(path), "can't be read")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_picture_of_tiny_imagenet_is_named(damage, tmp_path):
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    path = tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_2.JPEG"
    damage(path)
    with pytest.raises(DataError) as error:
        load_dataset("tiny_imagenet", tmp_path)
    assert_named(error, str(path), "can't be read")


def test_a_damaged_picture_in_a_parquet_file_is_named(tmp_path, datasets):
    path = tmp_path / "noise.png"
    Image.effect_noise((40, 40), 50).save(path)
    cut_short(path)
    columns = {
        "image": [one_colour((40, 40), 1), {"path": "noise.png", "bytes": path.read_bytes()}],
        "label": [0, 1],
    }
    snapshot = tmp_path / "snapshot"
    write_parquet(datasets, snapshot / "train.parquet", columns, {"label": ["cat", "dog"]})
    with pytest.raises(DataError) as error:
        load_dataset("image_folder", snapshot)
    assert_named(error, "noise.png, image 2 of the part train", "can't be read")


@pytest.mark.parametrize("limit", [2000, 7000])
def test_a_decompression_bomb_is_named_and_not_read(limit, tmp_path, datasets, monkeypatch):
    """Pillow raises for twice as many pixels as it allows, and warns of fewer than that."""
    write_folder(tmp_path, ["cat", "dog"])
    one_colour((100, 100), 1).save(tmp_path / "cat" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError) as error:
        load_dataset("image_folder", tmp_path)
    assert_named(error, "cat/bomb.png", "decompression bomb")


def test_folders_without_classes_or_images_say_so(tmp_path, datasets):
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "one", ["cat"])
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "dog").mkdir()
    one_colour((3, 3), 1).save(tmp_path / "broken" / "cat" / "0.png")
    (tmp_path / "broken" / "dog" / "0.png").write_bytes(b"nonsense")
    for name, message in (
        ("empty", "can't read it"),
        ("one", "at least two classes"),
        ("broken", "can't be read"),
    ):
        with pytest.raises(DataError, match=message):
            load_dataset("image_folder", tmp_path / name)


def test_without_datasets_the_message_says_what_to_install(tmp_path, monkeypatch):
    write_folder(tmp_path, ["cat", "dog"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_dataset("image_folder", tmp_path)
