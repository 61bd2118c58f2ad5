from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from coss_hf.data.loading import load_images
from coss_hf.utils.hub_lookup import similar_names


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Caches of the test's own."""
    monkeypatch.setattr("coss_hf.utils.hub_lookup.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def answer(error):
    """What `HfApi.dataset_info` does when the Hub answers with an error."""

    def dataset_info(self, name, **_):
        raise error("no", response=SimpleNamespace(headers={}, request=None, status_code=404))

    return dataset_info


def test_unknown_path_suggests_similar_paths(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "zebras").mkdir()
    with pytest.raises(ValueError, match="no such file or folder") as caught:
        load_images(str(tmp_path / "cifra10"))
    assert f"Did you mean {tmp_path / 'cifar10'}?" in str(caught.value)


def test_unknown_name_without_network_suggests_cached_datasets_at_once(tmp_path, cache):
    (tmp_path / "hub" / "datasets--uoft-cs--cifar10").mkdir(parents=True)
    (cache / "frgfm___imagenette").mkdir(parents=True)
    for wanted, full in (("cifar-10", "uoft-cs/cifar10"), ("someone/imagenete", "frgfm/imagenette")):
        with pytest.raises(ValueError, match="the Hub cannot be asked") as caught:
            load_images(wanted)
        assert str(caught.value).startswith(f"dataset {wanted}: ") and f"Did you mean {full}?" in str(caught.value)


def test_unknown_name_on_the_hub_suggests_what_its_search_finds(monkeypatch):
    found = [SimpleNamespace(id="uoft-cs/cifar10"), SimpleNamespace(id="someone/unrelated")]
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", answer(RepositoryNotFoundError))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_datasets", lambda self, search, limit: found)
    with pytest.raises(ValueError, match="nor a dataset on the Hub .* Did you mean uoft-cs/cifar10?"):
        load_images("cifar10")


def test_similar_names_compare_last_parts():
    names = ["/long/common/path/cifar10", "/long/common/path/zebra", "org/cifar100"]
    assert similar_names("/long/common/path/cifra10", names) == ["/long/common/path/cifar10", "org/cifar100"]


@pytest.mark.parametrize(
    "error, message",
    [
        (RevisionNotFoundError, "^revision v9: unknown to the Hub for dataset a/b"),
        (GatedRepoError, "^dataset a/b is gated: ask for access"),
    ],
)
def test_gated_dataset_and_unknown_revision(monkeypatch, error, message):
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", answer(error))
    with pytest.raises(ValueError, match=message):
        load_images("a/b", revision="v9")


def test_a_cached_dataset_is_loaded_when_the_hub_is_out_of_reach(tmp_path, monkeypatch, caplog):
    (tmp_path / "hub" / "datasets--a--b").mkdir(parents=True)

    def load_dataset(path, **_):
        raise ValueError(f"asked for {path}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="asked for a/b"):
        load_images("a/b")
    assert "out of reach: loading a/b from the cache" in caplog.text
