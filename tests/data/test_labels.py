"""Classes are aligned by name."""

import pytest
from timm.data import ImageNetInfo

from restnet_hf.data.labels import label_names, label_order


def test_shuffled():
    assert label_order(["cat", "dog", "owl"], ["owl", "cat", "dog"]) == [1, 2, 0]
    assert label_order(["Cat ", "dog"], ["DOG", "cat"]) == [1, 0]


def test_synonyms():
    assert label_order(["tench", "goldfish"], ["goldfish, Carassius auratus", "tench, Tinca tinca"]) == [1, 0]


def test_wordnet_ids_are_read():
    info = ImageNetInfo("imagenet-1k")
    names = [info.label_name_to_description(name) for name in info.label_names()]
    assert label_order(names, info.label_names()) == list(range(1000))
    shortened = [name.split(",")[0] for name in names]  # two kinds of crane: unique only by position
    assert label_order(shortened, names) == list(range(1000))


@pytest.mark.parametrize("other", [["cat"], ["cat", "owl"], ["cat", "cat"]])
def test_other_classes(other):
    assert label_order(["cat", "dog"], other) is None


def test_numbered_classes_have_no_names():
    assert label_names({0: "LABEL_0", 1: "LABEL_1"}) is None
    assert label_names({1: "b", 0: "a"}) == ("a", "b")
