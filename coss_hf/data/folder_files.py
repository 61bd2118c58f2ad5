"""What lies in a folder on this machine: images, metadata tables and other files."""

import os
from collections import Counter
from mimetypes import MimeTypes

from PIL import Image

from coss_hf.utils.messages import first_names

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

Image.init()
# Pillow only recognizes these: reading them takes a program that it does not bring.
UNREADABLE = ("BUFR", "GRIB", "HDF5", "MPEG")
SUFFIXES = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN and kind not in UNREADABLE}
# Formats whose first bytes are unmistakable, for files whose suffix says nothing. Camera raw files begin like TIFF.
RECOGNIZED = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "WEBP"]
KNOWN_TYPES = MimeTypes()  # of Python itself: the same on every machine


class FolderFiles:
    """All files below a folder. Links are followed, to folders as well.

    Args:
        root: the absolute path of the folder.

    Attributes:
        images: the sorted paths of files that Pillow can read, by their suffix, else by their first bytes.
        tables: the sorted paths of metadata tables.
        others: the sorted paths of all other files.
        hidden: the paths of images whose name, or folder's name, begins with a dot, or that macOS put into an archive.

    Raises:
        ValueError: a folder cannot be read, a path is not UTF-8, a link leads nowhere, or images are reached by two
            paths.
    """

    def __init__(self, root: str):
        self.root = root
        self.images: list[str] = []
        self.tables: list[str] = []
        self.others: list[str] = []
        self.hidden: list[str] = []
        self._real_folders: dict[str, str] = {}  # by path
        self._folders: dict[str, str] = {}  # by real path
        self._repeated_folders: list[tuple[str, str]] = []
        try:
            self._walk(root, os.path.realpath(root))
        except OSError as error:
            path = printable(str(error.filename))
            raise ValueError(f"--dataset {printable(root)}: {path} cannot be read ({error.strerror}).") from error
        for paths in (self.images, self.tables, self.others):
            paths.sort()
        self._check_names()
        self._check_repeated_folders()

    def relative(self, path: str) -> str:
        """The path as seen from the folder."""
        return path[len(self.root.rstrip("/")) + 1 :]

    def count(self, paths: list[str]) -> str:
        """The numbers of files by suffix, and the names of the first of them, for messages."""
        suffixes = Counter(os.path.splitext(path)[1].lower() or "without suffix" for path in paths)
        counts = ", ".join(f"{count} {printable(suffix)}" for suffix, count in suffixes.most_common(5))
        return f"{counts}: {self.names(paths)}"

    def names(self, paths: list[str]) -> str:
        """The first of several paths as seen from the folder, for messages."""
        return first_names([printable(self.relative(path)) for path in paths])

    def _walk(self, folder: str, real: str) -> None:
        self._real_folders[folder] = real
        self._folders[real] = folder
        for entry in _entries(folder):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                self._add_hidden(entry)
            elif _is_folder(entry):
                self._enter(entry, real)
            else:
                self._add_file(entry)

    def _enter(self, entry: os.DirEntry, parent: str) -> None:
        real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(parent, entry.name)
        if real not in self._folders:
            self._walk(entry.path, real)
        elif not f"{parent}/".startswith(real.rstrip("/") + "/"):  # a link to a folder that it lies in adds nothing
            self._repeated_folders.append((self._folders[real], entry.path))

    def _add_file(self, entry: os.DirEntry) -> None:
        if not _is_file(entry):
            self._add_what_is_no_file(entry)
        elif _is_image(entry):
            self.images.append(entry.path)
        elif entry.name in TABLES:
            self.tables.append(entry.path)
        else:
            self.others.append(entry.path)

    def _add_what_is_no_file(self, entry: os.DirEntry) -> None:
        """A link that leads nowhere, or a pipe, which would be waited for if it was opened."""
        suffix = os.path.splitext(entry.name)[1]
        if entry.is_symlink() and not suffix:
            raise ValueError(
                f"--dataset {printable(self.root)}: the link {printable(entry.path)} leads nowhere (to "
                f"{printable(os.readlink(entry.path))}); remove it, or make available what it leads to."
            )
        if entry.is_symlink() and suffix.lower() in SUFFIXES:
            self.images.append(entry.path)  # one that cannot be read
        else:
            self.others.append(entry.path)

    def _add_hidden(self, entry: os.DirEntry) -> None:
        if not _is_folder(entry):
            if os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                self.hidden.append(entry.path)
        elif not entry.is_symlink():
            for inner in _entries(entry.path):
                self._add_hidden(inner)

    def _check_names(self) -> None:
        paths = [*self.images, *self.tables]
        wrong = [printable(path) for path in paths if printable(path) != path]
        if wrong:
            raise ValueError(
                f"--dataset {printable(self.root)}: {len(wrong)} paths are not UTF-8: {first_names(wrong)}. Rename "
                f"them, for instance with convmv."
            )

    def _check_repeated_folders(self) -> None:
        for first, second in self._repeated_folders:
            if any(path.startswith(f"{first}/") for path in self.images):
                raise ValueError(
                    f"--dataset {self.root}: {first} and {second} are the same folder, whose images would be loaded "
                    f"twice; remove the link."
                )

    def repeated_links(self) -> list[tuple[str, str]]:
        """Pairs of images that links make the same file."""
        links = [path for path in self.images if os.path.islink(path)]
        if not links:
            return []
        first = {self._real_path(path): path for path in self.images}
        for link in links:
            del first[self._real_path(link)]
        repeated = []
        for link in links:
            other = first.setdefault(os.path.realpath(link), link)
            if other != link:
                repeated.append((other, link))
        return repeated

    def _real_path(self, path: str) -> str:
        """The path without the links among its folders."""
        folder, name = os.path.split(path)
        return os.path.join(self._real_folders[folder], name)


def printable(path: str) -> str:
    """The path, with escapes for what is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _entries(folder: str) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


# An entry asked for the target of a link to itself raises an error; without links it knows the answer.
def _is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file(entry: os.DirEntry) -> bool:
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def _is_image(entry: os.DirEntry) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in SUFFIXES:
        return True
    if KNOWN_TYPES.guess_type(f"x{suffix}")[0] or entry.name in TABLES:
        return False
    try:
        with Image.open(entry.path, formats=RECOGNIZED if suffix else [*RECOGNIZED, "TIFF"]):
            return True
    except Exception:  # Pillow's readers raise almost anything on files that are no images
        return False
