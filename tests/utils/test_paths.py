import pytest

from coss_hf.utils.paths import same_place


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("user/name", "user/name", True),
        ("user/name", "user/other", False),
        (None, None, True),
        (None, "folder", False),
        ("folder", "./folder/", True),
        ("folder", "link", True),
        ("folder", "~/folder", True),
        ("folder", "else", False),
        ("nowhere", "./nowhere", False),
    ],
)
def test_names_and_paths(tmp_path, monkeypatch, one, other, same):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "link").symlink_to("folder")
    assert same_place(one, other) == same_place(other, one) == same
