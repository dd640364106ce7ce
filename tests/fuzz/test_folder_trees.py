"""Random folder trees of images, as they are on disks, compared with a plain listing."""

# functions of os.path return False where those of Path raise
# ruff: noqa: PTH101, PTH102, PTH110, PTH112, PTH113, PTH114, PTH118, PTH119, PTH120, PTH208, PTH211

from __future__ import annotations

import io
import os
from collections import Counter
from contextlib import redirect_stdout
from itertools import count as numbers
from pathlib import Path

from fuzzing import ACCEPTED, fuzz
from hypothesis import strategies as st

from clouds.cli import check_data
from clouds.data.dataset_report import check_dataset
from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.datasets.scan import same_files, scan_files

FOLDERS = ("a", "b.png", "ä", ".hidden", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found")
FOLDERS += ("$Recycle.Bin", os.fsdecode(b"\xff"))
STEMS = ("1", "2", ".1", "x_", "", os.fsdecode(b"\xfe\x80"), "İ", "a b")
ENDINGS = (".png", ".PNG", ".Png", "_left.JPG", "_left.jpg", ".jpg", ".jpeg", ".txt", "")
FOREIGN = {"@eadir", "__macosx", "$recycle.bin", "lost+found", "system volume information"}
SUFFIXES = ("_Left.jpg", ".png", ".jpg")
GENERATED = (".png", ".jpg", ".jpeg", ".webp")  # endings of generated images

NUMBER = numbers()
INDEX = st.integers(0, 30)
NODES = st.tuples(
    st.sampled_from(["folder"] * 3 + ["file"] * 5 + ["link"] * 3 + ["hard link", "fifo", "closed"]),
    INDEX,  # the folder in which it is
    st.sampled_from(FOLDERS),
    st.sampled_from(STEMS),
    st.sampled_from(ENDINGS),
    st.sampled_from(["node"] * 5 + ["nowhere", "itself", "up"]),
    INDEX,  # the node to which a link leads
)


def build(top: str, nodes) -> list[str]:
    """Makes the tree; returns the folders that cannot be read, which only root can."""
    folders, paths, closed = [top], [top], []
    for kind, where, folder, stem, ending, target, number in nodes:
        parent = folders[where % len(folders)]
        name = folder if kind in ("folder", "closed") else stem + ending
        path = os.path.join(parent, name)
        if name in ("", ".", "..") or os.path.lexists(path):
            continue
        other = paths[number % len(paths)]
        if kind == "folder":
            os.mkdir(path)
            folders.append(path)
        elif kind == "closed":
            if os.geteuid() == 0:
                continue
            os.mkdir(path)
            closed.append(path)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            goal = {"node": other, "nowhere": "/nowhere/x", "itself": path, "up": ".."}[target]
            os.symlink(goal, path)
        elif kind == "hard link" and os.path.isfile(other):
            os.link(other, path)
        else:
            Path(path).write_bytes(b"" if number % 2 else b"no image")
        paths.append(path)
    for path in closed:
        os.chmod(path, 0)
    return closed


def is_foreign(name: str) -> bool:
    return name.startswith(".") or name.lower() in FOREIGN


def count(path: str) -> int:
    """Files in a folder, as `ls -R` shows them; links are files."""
    if os.path.islink(path) or not os.path.isdir(path):
        return 1
    try:
        return sum(count(os.path.join(path, name)) for name in os.listdir(path))
    except PermissionError:
        return 0


class Plain:
    """What is in the real folders that can be reached, by the name of the entry in its folder."""

    def __init__(self, top: str, suffixes) -> None:
        self.used, self.others, self.unused, self.unusable = set(), set(), set(), set()
        self.folders: dict[tuple[str, str], int] = {}
        reached, todo = set(), [os.path.realpath(top)]
        while todo:
            folder = todo.pop()
            if folder in reached:
                continue
            reached.add(folder)
            try:
                names = os.listdir(folder)
            except PermissionError:
                self.unusable.add(self.entry(folder))
                continue
            groups: dict[str, list[tuple[int, bool, str]]] = {}
            for name in names:
                path = os.path.join(folder, name)
                if os.path.isdir(path):
                    if is_foreign(name):
                        self.folders[folder, name] = count(path)
                    else:
                        todo.append(os.path.realpath(path))
                    continue
                fits = [i for i, s in enumerate(suffixes) if name.lower().endswith(s.lower())]
                if name.startswith("."):
                    self.unused.add((folder, name))
                elif fits and os.path.isfile(path):
                    suffix = suffixes[fits[0]]
                    key = name[: -len(suffix)]
                    rank = fits[0], not name.endswith(suffix), name
                    groups.setdefault(key, []).append(rank)
                elif fits or not os.path.exists(path):
                    self.unusable.add((folder, name))
                else:
                    self.unused.add((folder, name))
            for ranks in groups.values():
                self.used.add((folder, min(ranks)[2]))
                self.others |= {(folder, name) for _, _, name in ranks} - self.used

    @staticmethod
    def entry(path: str) -> tuple[str, str]:
        return os.path.realpath(os.path.dirname(path)), os.path.basename(path)


def entries(paths) -> set[tuple[str, str]]:
    """Real folder and name of each path, of which none occurs twice."""
    counts = Counter(Plain.entry(path) for path in paths)
    assert set(counts.values()) <= {1}
    return set(counts)


def compare(top: Path) -> None:
    scan, plain = scan_files(top, SUFFIXES), Plain(str(top), SUFFIXES)
    files = [file.path for file in scan.files.values()]
    assert all(os.path.isfile(file) for file in files)
    assert not [f for f in files if any(map(is_foreign, Path(f).relative_to(top).parts))]
    assert entries(files) == plain.used
    assert entries(f.path for others in scan.others.values() for f in others) == plain.others
    assert entries(scan.unused) == plain.unused
    assert entries(line.split(" (")[0] for line in scan.unusable) == plain.unusable
    found = {Plain.entry(f.path): f.num_files for f in scan.unused_folders}
    assert found == plain.folders and len(found) == len(scan.unused_folders)
    inodes = {(s.st_dev, s.st_ino) for s in map(os.stat, files)}
    lines = same_files((file.path, file.identity) for file in scan.files.values())
    assert len(lines) == len(files) - len(inodes)


@fuzz("folder trees", 2000, 100, nodes=st.lists(NODES, min_size=4, max_size=25))
def test_folder_trees(attempt, tmp_path, nodes):
    forget_listings()
    root = tmp_path / str(next(NUMBER))
    top = root / "stable_diffusion/x/images"
    top.mkdir(parents=True)
    closed = build(str(top), nodes)
    try:
        compare(top)
        dataset = get_dataset("sd_x", root)
        outcome, report = attempt(lambda: check_dataset(dataset, None, 1))
        assert outcome == ACCEPTED
        plain = Plain(str(top), GENERATED)
        assert report.num_unused == sum(map(len, (plain.unused, plain.others))) + sum(
            plain.folders.values()
        )
        assert len(report.listing.records) == len(plain.used)
        outcome, _ = attempt(dataset.records, "sd_x")
        assert (outcome == ACCEPTED) == (bool(plain.used) and not plain.unusable)
        printed = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
        with redirect_stdout(printed):
            check_data.main(["--root", str(root), "--datasets", "sd_x", "--workers", "1"])
    finally:
        for path in closed:
            os.chmod(path, 0o700)
