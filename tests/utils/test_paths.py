import pytest

from coss_hf.utils.paths import check_output_file, same_place


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


def test_a_file_that_cannot_be_written_is_found_at_the_start(tmp_path, monkeypatch):
    check_output_file(tmp_path / "new" / "results.json", "--output")
    monkeypatch.chdir(tmp_path)
    check_output_file("results.json", "--output")
    with pytest.raises(ValueError, match=r"^--output .* is a folder; give the name of a file"):
        check_output_file(tmp_path, "--output")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; give a file in a folder"):
        check_output_file(tmp_path / "file" / "results.json", "--output")
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(ValueError, match="cannot be written; give another folder"):
        check_output_file(tmp_path / "results.json", "--output")
