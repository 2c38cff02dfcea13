"""Written folders load in the versions of transformers that docs/guides/export.md
claims. Slow: pip makes an environment for each, a gigabyte and minutes."""

import pytest

from tests.programs import loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("written")
    loading.write(place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("version", loading.VERSIONS)
def test_folders_load_and_compute_the_same(version, folder, tmp_path_factory):
    print(loading.check(version, folder, tmp_path_factory.mktemp(version)))


def test_what_is_written_loads_here(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "FAMILIES", ("llama, tied", "bert, classes"))
    loading.write(tmp_path)
    assert len(list(tmp_path.iterdir())) == 7
    loading.read(tmp_path)
