"""Reads lists of the videos of a data set: Kinetics' CSV, UCF101's and HMDB51's split files, and plain lists."""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dataloading.videos.decoder import EXTENSIONS
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.storage.folder import Folder

KINETICS, UCF101, HMDB51, PLAIN = FORMATS = ("kinetics", "ucf101", "hmdb51", "plain")
TRAIN, TEST, VALIDATE = SPLITS = ("train", "test", "validate")
UNLABELLED = "unlabelled"
MAX_NUMBERED = 100_000  # numeric class labels stay below; a larger number is a name

# Spellings of the data sets.
KINETICS_SPLITS = {TRAIN: ("train",), TEST: ("test",), VALIDATE: ("validate", "val", "validation")}
HMDB51_SPLITS = {TRAIN: "1", TEST: "2"}
UCF101_CLASSES = "classInd.txt"
UCF101_LIST = re.compile(r"(train|test)list\d+\.txt")
HMDB51_LIST = re.compile(r"(?P<label>.+)_test_split(?P<fold>\d+)\.txt")
HMDB51_LINE = re.compile(r"(?P<path>.+?)\s+(?P<use>[012])\s*")
SUFFIX = "(?:" + "|".join(map(re.escape, sorted(EXTENSIONS))) + ")"
PLAIN_LINE = re.compile(rf"(?P<path>.+{SUFFIX})(?:[\t ,]+(?P<label>.*?))?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class ListSpec:
    """A list of videos, and the part of it to use.

    Attributes:
        url: a CSV file, a text file, or the folder of UCF101's or HMDB51's split files.
        format: one of `FORMATS`; empty: detected from the list.
        split: one of `SPLITS`; empty: all listed videos.
        fold: number of the split in a folder of split files.
        classes: URL of a file of class names, one per line in order of labels; empty: the classes of the list.
    """

    url: str
    format: str = ""
    split: str = ""
    fold: int = 1
    classes: str = ""


@dataclass(frozen=True)
class ListedVideo:
    """One line of a list: its path, the possible paths of its file (with or without a suffix), its label."""

    path: str
    candidates: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class VideoList:
    """Class names by label, and the listed videos in order."""

    classes: tuple[str, ...]
    videos: tuple[ListedVideo, ...]


class _Line(NamedTuple):
    where: str  # file and line, for error messages
    path: str
    candidates: tuple[str, ...]
    label: str


def read_list(spec: ListSpec) -> VideoList:
    """Read a list. Its classes are those of the whole list, also for one split.

    Raises:
        UserError: a file is missing, or a line does not fit the format; names the file and line.
        ConfigError: the format does not have this split, or needs one.
    """
    is_folder = Folder(spec.url).is_folder()
    folder, name = (Folder(spec.url), "") if is_folder else _folder_and_name(spec.url)
    readers: dict[str, Callable[[Folder, str, ListSpec], tuple[list[_Line], tuple[str, ...]]]] = {
        KINETICS: _read_kinetics,
        UCF101: _read_ucf101,
        HMDB51: _read_hmdb51,
        PLAIN: _read_plain,
    }
    list_format = spec.format or _detect_format(folder, name)
    if is_folder and list_format not in (UCF101, HMDB51):
        raise UserError(f"{spec.url}: a folder without UCF101's or HMDB51's split files; give a file")
    lines, classes = readers[list_format](folder, name, spec)
    if not lines:
        raise UserError(f"{spec.url}: lists no video{f' of split {spec.split}' if spec.split else ''}")
    if spec.classes:
        classes = _class_names(*_folder_and_name(spec.classes))
    return VideoList(classes, tuple(_with_labels(lines, classes)))


def _detect_format(folder: Folder, name: str) -> str:
    if not name:
        return UCF101 if folder.exists(UCF101_CLASSES) else HMDB51
    if UCF101_LIST.fullmatch(name):
        return UCF101
    if HMDB51_LIST.fullmatch(name):
        return HMDB51
    _, first = next(_lines(folder, name), ("", ""))
    return KINETICS if "youtube_id" in first.split(",") else PLAIN


def _read_kinetics(folder: Folder, name: str, spec: ListSpec) -> tuple[list[_Line], tuple[str, ...]]:
    rows = _kinetics_rows(folder, name)
    splits = KINETICS_SPLITS.get(spec.split)
    lines = [_kinetics_line(where, row) for where, row in rows if splits is None or row.get("split") in splits]
    return lines, tuple(sorted({row.get("label", UNLABELLED) for _, row in rows}))


def _kinetics_rows(folder: Folder, name: str) -> list[tuple[str, dict[str, str]]]:
    header: list[str] = []
    rows = []
    for where, line in _lines(folder, name):
        try:
            cells = next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise UserError(f"{where}: {error}; fix the line") from error
        if not header:
            header = cells
            for column in ("youtube_id", "time_start", "time_end"):
                if column not in header:
                    raise UserError(f"{where}: the header has no column {column}; give one of Kinetics' lists")
        elif len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} columns, the header has {len(header)}; fix the line")
        else:
            rows.append((where, dict(zip(header, cells, strict=True))))
    return rows


def _kinetics_line(where: str, row: dict[str, str]) -> _Line:
    """The file of a clip is `ID_000010_000020` or `ID`, the whole video, in SRC or in the folder of its label."""
    seconds = []
    for column in ("time_start", "time_end"):
        if not re.fullmatch(r"\d+(\.\d+)?", row[column]):
            raise UserError(f"{where}: {column} is {row[column]!r}, must be a number of seconds; fix the line")
        seconds.append(int(float(row[column])))
    label = row.get("label", UNLABELLED)
    if not (row["youtube_id"] and label):
        raise UserError(f"{where}: the youtube_id or the label is empty; fix the line")
    stems = (f"{row['youtube_id']}_{seconds[0]:06d}_{seconds[1]:06d}", row["youtube_id"])
    folders = dict.fromkeys((f"{label}/", f"{label.replace(' ', '_')}/", ""))
    return _Line(where, stems[0], tuple(f"{folder}{stem}" for stem in stems for folder in folders), label)


def _read_ucf101(folder: Folder, name: str, spec: ListSpec) -> tuple[list[_Line], tuple[str, ...]]:
    if not name:
        name = f"{_require_split(spec, (TRAIN, TEST))}list{spec.fold:02d}.txt"
    elif spec.split and not name.startswith(spec.split):
        raise ConfigError(f"--split: found {spec.split}, but {name} is one split of UCF101; leave the option out")
    classes = _class_names(folder, UCF101_CLASSES)
    lines = []
    for where, line in _lines(folder, name):
        path, _, number = line.strip().partition(" ")
        label, _, file = path.partition("/")
        if not file or label not in classes or number not in ("", str(classes.index(label) + 1)):
            raise UserError(f"{where}: {line!r}, must be CLASS/VIDEO.avi and its number in classInd.txt; fix the line")
        lines.append(_Line(where, path, _candidates(label, file), label))
    return lines, classes


def _read_hmdb51(folder: Folder, name: str, spec: ListSpec) -> tuple[list[_Line], tuple[str, ...]]:
    wanted = HMDB51_SPLITS[_require_split(spec, tuple(HMDB51_SPLITS))]
    found = [match for file in folder.names() if (match := HMDB51_LIST.fullmatch(file))]
    chosen = [match for match in found if (match[0] == name if name else int(match["fold"]) == spec.fold)]
    if not chosen:
        raise UserError(f"{folder.url}: no CLASS_test_split{spec.fold}.txt; give the folder of HMDB51's split files")
    lines = []
    for match in chosen:
        for where, line in _lines(folder, match[0]):
            cells = HMDB51_LINE.fullmatch(line)
            if cells is None:
                raise UserError(f"{where}: {line!r}, must be a file's name and 0, 1 or 2; fix the line")
            if cells["use"] == wanted:
                candidates = _candidates(match["label"], cells["path"])
                lines.append(_Line(where, f"{match['label']}/{cells['path']}", candidates, match["label"]))
    return lines, tuple(sorted({match["label"] for match in found}))


def _read_plain(folder: Folder, name: str, spec: ListSpec) -> tuple[list[_Line], tuple[str, ...]]:
    """Numeric labels are used as they are; the class of a video without a label is the name of its folder."""
    if spec.split:
        raise ConfigError(f"--split: found {spec.split}, but a plain list has no splits; leave the option out")
    lines = []
    for where, line in _lines(folder, name):
        cells = PLAIN_LINE.fullmatch(line)
        if cells is None:
            raise UserError(f"{where}: {line!r}, must be a video's path and an optional label; fix the line")
        parent = cells["path"].rpartition("/")[0].rpartition("/")[2]
        lines.append(_Line(where, cells["path"], (cells["path"],), cells["label"] or parent or UNLABELLED))
    labels = {line.label for line in lines}
    if labels and all(label.isdecimal() and int(label) < MAX_NUMBERED for label in labels):
        return lines, tuple(str(number) for number in range(max(map(int, labels)) + 1))
    return lines, tuple(sorted(labels))


def _with_labels(lines: Sequence[_Line], classes: Sequence[str]) -> Iterator[ListedVideo]:
    labels = {name: label for label, name in enumerate(classes)}
    for line in lines:
        if line.label not in labels:
            raise UserError(f"{line.where}: class {line.label!r} is none of the {len(classes)} classes; fix either")
        yield ListedVideo(line.path, line.candidates, labels[line.label])


def _class_names(folder: Folder, name: str) -> tuple[str, ...]:
    """Read class names, one per line, each optionally after its number, which counts from 1."""
    names: list[str] = []
    for where, line in _lines(folder, name):
        number, _, rest = line.strip().partition(" ")
        numbered = number.isdecimal() and bool(rest)
        if numbered and int(number) != len(names) + 1:
            raise UserError(f"{where}: class number {number}, expected {len(names) + 1}; fix the list of classes")
        names.append(rest if numbered else line.strip())
        if names[-1] in names[:-1]:
            raise UserError(f"{where}: class {names[-1]!r} is named twice; fix the list of classes")
    return tuple(names)


def _require_split(spec: ListSpec, splits: tuple[str, ...]) -> str:
    if spec.split not in splits:
        raise ConfigError(f"--split: found {spec.split or 'none'}, must be {' or '.join(splits)} with {spec.url}")
    return spec.split


def _candidates(label: str, file: str) -> tuple[str, ...]:
    """Possible paths: the listed file or its stem, in the folder of its class or in SRC."""
    stem = file.rpartition(".")[0] or file
    return (f"{label}/{file}", file, f"{label}/{stem}", stem)


def _lines(folder: Folder, name: str) -> Iterator[tuple[str, str]]:
    """Yield the place (file and number) and text of each line that is not empty."""
    # The disk returns file names in other encodings with the same surrogate escapes.
    text = folder.read(name).decode("utf-8-sig", "surrogateescape")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{folder.url}/{name}, line {number}", line.rstrip("\r")


def _folder_and_name(url: str) -> tuple[Folder, str]:
    parent, slash, name = url.rpartition("/")
    return Folder(parent or (slash or ".")), name
