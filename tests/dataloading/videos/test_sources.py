from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pytest

from dataloading.build.builder import build_shards
from dataloading.build.config import BuildConfig
from dataloading.build.local_executor import LocalExecutor
from dataloading.build.verify import verify_shards
from dataloading.build.video_processor import VideoProcessor, ensure_local
from dataloading.shards.format import RefusedVideo, Sample
from dataloading.synthetic.videos import write_video
from dataloading.videos.sources import Source, SourceFolder, find_videos
from dataloading.videos.video_lists import ListSpec
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.storage.folder import Folder

CONFIG = BuildConfig(flow="dis", short_side=0, window=4)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def list_videos(root: Path, spec: ListSpec) -> tuple[tuple[str, ...], list[tuple[str, int, str]]]:
    """Class names, and path, label and kind of refusal of every video."""
    sources = find_videos(str(root), spec)
    return sources.classes, [(video.path, video.label, video.refusal.partition(":")[0]) for video in sources.videos]


def write(folder: Path, name: str, text: str) -> ListSpec:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return ListSpec(str(folder / name))


def test_a_folder_of_class_folders_is_listed_in_order_and_other_files_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.MP4", "b/1.avi", "a/notes.txt", "c/3.webm", "b/.hidden.mp4", ".git/x.mp4", "top.mp4")
    (tmp_path / "d").mkdir()
    sources = SourceFolder.scan(str(tmp_path))
    assert sources.classes == ("a", "b", "c", "d")
    assert [(video.path, video.label) for video in sources.videos] == [("b/1.avi", 1), ("b/2.MP4", 1), ("c/3.webm", 2)]
    assert sources.num_ignored == 2


def test_class_folders_may_be_links_and_circular_links_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "1.mp4")
    (tmp_path / "source" / "b").mkdir(parents=True)
    (tmp_path / "source" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "b" / "round").symlink_to(tmp_path / "source")
    assert [video.path for video in SourceFolder.scan(str(tmp_path / "source")).videos] == ["a/1.mp4"]


KINETICS = """\
label,youtube_id,time_start,time_end,split
riding a bike,-3B32lodo2M,59,69,train
"petting animal, not cat",aaaaaaaaaaa,5,15,train
riding a bike,bbbbbbbbbbb,0,10,validate
zumba,ccccccccccc,0,10,train
zumba,ddddddddddd,7,17,test
"""
KINETICS_CLASSES = ("petting animal, not cat", "riding a bike", "zumba")


def test_kinetics_clips_are_found_in_the_source_or_in_label_folders_under_either_name(tmp_path: Path) -> None:
    source = touch(tmp_path / "source", "riding_a_bike/-3B32lodo2M_000059_000069.mp4", "ccccccccccc.mkv")
    touch(source, "petting animal, not cat/aaaaaaaaaaa_000005_000015.webm")
    spec = write(tmp_path / "lists", "k400.csv", KINETICS)
    assert list_videos(source, ListSpec(spec.url, split="train")) == (
        KINETICS_CLASSES,
        [
            ("riding_a_bike/-3B32lodo2M_000059_000069.mp4", 1, ""),
            ("petting animal, not cat/aaaaaaaaaaa_000005_000015.webm", 0, ""),
            ("ccccccccccc.mkv", 2, ""),
        ],
    )


def test_a_split_of_kinetics_keeps_the_labels_of_the_whole_list_and_names_missing_videos(tmp_path: Path) -> None:
    spec = write(tmp_path / "lists", "k400.csv", KINETICS)
    assert list_videos(touch(tmp_path / "source", "x.mp4"), ListSpec(spec.url, split="validate")) == (
        KINETICS_CLASSES,
        [("bbbbbbbbbbb_000000_000010", 1, "missing")],
    )


def test_two_clips_of_one_whole_video_are_not_stored_twice(tmp_path: Path) -> None:
    text = "label,youtube_id,time_start,time_end,split\na,x,0,10,train\na,x,20,30,train\n"
    videos = list_videos(touch(tmp_path / "source", "x.mp4"), write(tmp_path / "lists", "k.csv", text))[1]
    assert videos == [("x.mp4", 0, ""), ("x.mp4", 0, "listed twice")]


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    lists = tmp_path / "lists"
    write(lists, "classInd.txt", "1 ApplyEyeMakeup\r\n2 Archery\r\n")
    write(lists, "trainlist01.txt", "Archery/v_Archery_g08_c01.avi 2\r\nApplyEyeMakeup/v_A_g08_c02.avi 1\r\n")
    write(lists, "testlist01.txt", "Archery/v_Archery_g01_c01.avi\n")
    return lists


def test_ucf101_labels_come_from_its_class_list_in_both_splits(tmp_path: Path, ucf101: Path) -> None:
    source = touch(tmp_path / "source", "Archery/v_Archery_g08_c01.avi", "v_Archery_g01_c01.mp4")
    classes = ("ApplyEyeMakeup", "Archery")
    train = [("Archery/v_Archery_g08_c01.avi", 1, ""), ("ApplyEyeMakeup/v_A_g08_c02.avi", 0, "missing")]
    assert list_videos(source, ListSpec(str(ucf101 / "trainlist01.txt"))) == (classes, train)
    assert list_videos(source, ListSpec(str(ucf101), split="train", fold=1)) == (classes, train)
    assert list_videos(source, ListSpec(str(ucf101 / "testlist01.txt"))) == (
        classes,
        [("v_Archery_g01_c01.mp4", 1, "")],
    )


@pytest.fixture
def hmdb51(tmp_path: Path) -> Path:
    lists = tmp_path / "lists"
    write(lists, "wave_test_split1.txt", "#1_How To_wave_0.avi 1 \n[x]&_wave_1.avi 2 \nunused_wave.avi 0 \n")
    write(lists, "brush_hair_test_split1.txt", "b_0.avi 2 \nb_1.avi 1 \n")
    write(lists, "brush_hair_test_split2.txt", "b_0.avi 1 \nb_1.avi 2 \n")
    return lists


def test_hmdb51_reads_all_split_files_of_a_fold(tmp_path: Path, hmdb51: Path) -> None:
    source = touch(tmp_path / "source", "wave/#1_How To_wave_0.avi", "wave/[x]&_wave_1.avi", "b_1.avi")
    classes = ("brush_hair", "wave")
    train = [("b_1.avi", 0, ""), ("wave/#1_How To_wave_0.avi", 1, "")]
    test = [("brush_hair/b_0.avi", 0, "missing"), ("wave/[x]&_wave_1.avi", 1, "")]
    assert list_videos(source, ListSpec(str(hmdb51), split="train")) == (classes, train)
    assert list_videos(source, ListSpec(str(hmdb51), split="test")) == (classes, test)


def test_the_classes_of_a_plain_list_are_its_labels_or_folders(tmp_path: Path) -> None:
    names = ["x/-dash ä 'q' \".mp4", "two.avi", "x/three.mkv", "four.mp4"]
    text = f"{names[0]}\ntwo.avi riding a bike\nx/three.mkv,zumba\n\nfour.mp4\n"
    classes, videos = list_videos(touch(tmp_path / "source", *names), write(tmp_path / "lists", "all.txt", text))
    assert classes == ("riding a bike", "unlabelled", "x", "zumba")
    assert videos == [(names[0], 2, ""), (names[1], 0, ""), (names[2], 3, ""), (names[3], 1, "")]


def test_numeric_labels_are_used_as_they_are(tmp_path: Path) -> None:
    source = touch(tmp_path / "source", "a.mp4", "b.mp4")
    classes, videos = list_videos(source, write(tmp_path / "lists", "all.txt", "a.mp4 10\nb.mp4 2\n"))
    assert (len(classes), [label for _, label, _ in videos]) == (11, [10, 2])


def test_a_file_of_class_names_defines_the_labels(tmp_path: Path) -> None:
    spec = write(tmp_path / "lists", "test.txt", "a.mp4 run\n")
    names = write(tmp_path / "lists", "classes.txt", "walk\nrun\n")
    source = touch(tmp_path / "source", "a.mp4")
    assert list_videos(source, ListSpec(spec.url, classes=names.url)) == (("walk", "run"), [("a.mp4", 1, "")])


@pytest.mark.parametrize("path", ["../out.mp4", "a/../../out.mp4", "{root}/out.mp4"])
def test_a_path_that_leaves_the_source_is_refused(tmp_path: Path, path: str) -> None:
    touch(tmp_path, "out.mp4")
    source = touch(tmp_path / "source", "in.mp4")
    spec = write(tmp_path / "lists", "all.txt", f"{path.format(root=tmp_path)} x\na/../in.mp4 x\n")
    assert [kind for _, _, kind in list_videos(source, spec)[1]] == ["outside", ""]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("k.csv", "label,youtube_id,time_start,time_end,split\na,x,0,10\n", r"k\.csv, line 2: 4 columns, the header"),
        ("k.csv", "label,youtube_id,time_start,time_end,split\na,x,0,ten,train\n", r"line 2: time_end is 'ten'"),
        ("k.csv", 'label,youtube_id,time_start,time_end,split\n"a,x,0,10,train\n', r"line 2: unexpected end of data"),
        (
            "k.csv",
            "label,youtube_id,time_start,time_end,split\na,,0,10,train\n",
            r"line 2: the youtube_id or the label",
        ),
        ("k.csv", "youtube_id,split\nx,train\n", r"line 1: the header has no column time_start"),
        ("trainlist01.txt", "Archery/a.avi 1\n", r"trainlist01\.txt, line 1: 'Archery/a\.avi 1', must be CLASS/VIDEO"),
        ("trainlist01.txt", "a.avi\n", r"line 1: 'a\.avi', must be CLASS/VIDEO"),
        ("wave_test_split1.txt", "a.avi 3\n", r"wave_test_split1\.txt, line 1: 'a\.avi 3', must be a file's name and"),
        ("all.txt", "a.mp4\nnotes.doc x\n", r"all\.txt, line 2: 'notes\.doc x', must be a video's path"),
        ("all.txt", "", r"all\.txt: lists no video"),
    ],
)
def test_the_error_about_a_malformed_line_names_file_and_line(
    tmp_path: Path, ucf101: Path, name: str, text: str, message: str
) -> None:
    spec = write(ucf101, name, text)
    split = "train" if name.startswith("wave") else ""
    with pytest.raises(UserError, match=message):
        find_videos(str(touch(tmp_path / "source", "x.mp4")), ListSpec(spec.url, split=split))


def test_a_class_that_is_not_in_the_file_of_class_names_is_refused(tmp_path: Path) -> None:
    spec = write(tmp_path / "lists", "all.txt", "a.mp4 swim\n")
    names = write(tmp_path / "lists", "classes.txt", "walk\nrun\n")
    with pytest.raises(UserError, match=r"all\.txt, line 1: class 'swim' is none of the 2 classes"):
        find_videos(str(touch(tmp_path / "source", "a.mp4")), ListSpec(spec.url, classes=names.url))


def test_a_split_that_the_list_does_not_have_is_a_usage_error(tmp_path: Path, hmdb51: Path) -> None:
    touch(tmp_path / "source", "a.mp4")
    plain = write(tmp_path / "more", "all.txt", "a.mp4 x\n")
    folder = str(hmdb51)
    for spec in (ListSpec(folder), ListSpec(folder, split="validate"), ListSpec(plain.url, split="test")):
        with pytest.raises(ConfigError, match=r"^--split: found"):
            find_videos(str(tmp_path / "source"), spec)


@pytest.mark.parametrize(
    ("name", "line", "good"),
    [
        (
            "k.csv",
            "label,youtube_id,time_start,time_end,split\n{class},{video},0,10,train\n",
            "wave/{}_000000_000010.mp4",
        ),
        ("trainlist01.txt", "Archery/{video}.avi 2\n", "Archery/{}.avi"),
        ("wave_test_split1.txt", "{video}.avi 1\n", "wave/{}.avi"),
        ("all.txt", "{video}.avi wave\n", "{}.avi"),
    ],
)
def test_good_videos_of_every_kind_of_list_are_stored_and_missing_and_broken_ones_refused(
    tmp_path: Path, ucf101: Path, name: str, line: str, good: str
) -> None:
    header, _, row = line.rpartition("\n")[0].rpartition("\n")
    rows = [row.replace("{class}", "wave").replace("{video}", video) for video in ("good", "broken", "gone")]
    spec = write(ucf101, name, "\n".join([*filter(None, [header]), *rows]))
    source = touch(tmp_path / "source", good.format("broken"))
    write_video(source / good.format("good"), np.zeros((6, 48, 64), dtype=np.uint8))
    split = "train" if name.startswith("wave") else ""
    sources = find_videos(str(source), ListSpec(spec.url, split=split))
    manifest = build_shards(sources, Folder(str(tmp_path / "set")), CONFIG, LocalExecutor(1), lambda _: None)
    kinds = sorted(video.reason.partition(":")[0] for video in manifest.refused)
    assert (manifest.num_videos, kinds) == (1, ["missing", "unreadable"])


@pytest.fixture
def remote(tmp_path: Path) -> str:
    """A remote store with a good video and a broken one."""
    write_video(tmp_path / "good.mp4", np.random.default_rng(0).integers(0, 256, (6, 48, 64), dtype=np.uint8))
    url = f"memory://{uuid4().hex}"
    store = fsspec.filesystem("memory")
    store.pipe_file(f"{url}/a/good ä.mp4", (tmp_path / "good.mp4").read_bytes())
    store.pipe_file(f"{url}/b/broken.mp4", b"no video")
    return url


def test_remote_videos_make_the_same_set_as_local_ones(tmp_path: Path, remote: str) -> None:
    touch(tmp_path / "source", "b/broken.mp4", "a/good ä.mp4")
    (tmp_path / "source/b/broken.mp4").write_bytes(b"no video")
    (tmp_path / "source/a/good ä.mp4").write_bytes((tmp_path / "good.mp4").read_bytes())
    for name, root in (("local", str(tmp_path / "source")), ("remote", remote)):
        build_shards(find_videos(root), Folder(str(tmp_path / name)), CONFIG, LocalExecutor(1), lambda _: None)
    local_set, remote_set = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.name != "build.json"}
        for name in ("local", "remote")
    )
    assert local_set == remote_set
    assert verify_shards(Folder(str(tmp_path / "remote"))).problems == ()


def test_the_local_copy_of_a_remote_video_is_removed_after_an_interruption(remote: str, tmp_path: Path) -> None:
    copies = []

    def interrupted() -> None:
        with ensure_local(remote, "a/good ä.mp4") as copy:
            copies.append(copy)
            assert copy.read_bytes() == (tmp_path / "good.mp4").read_bytes()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not copies[0].parent.exists()


def test_a_video_removed_after_the_listing_is_refused_as_missing(tmp_path: Path, remote: str) -> None:
    for root in (remote, str(tmp_path)):
        result = VideoProcessor(root, ("a",), CONFIG)(Source("a/gone.mp4", 0))
        assert isinstance(result, RefusedVideo)
        assert result.reason.startswith("missing: it was listed but is gone")


def test_a_failing_store_is_an_error_and_not_a_refusal(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_args: object, **_more: object) -> None:
        raise OSError("503 Slow Down")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.get_file", unavailable)
    with pytest.raises(UserError, match=r"a/good ä\.mp4: 503 Slow Down"):
        VideoProcessor(remote, ("a",), CONFIG)(Source("a/good ä.mp4", 0))


def test_names_with_spaces_quotes_dashes_and_unicode_are_stored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("-rf.mp4", "a b 'c' \"d\".mp4", "ü★.mp4", "x::y#z?.mp4", "a%20[b]*.mp4", "a..b...mp4"):
        path = touch(tmp_path / "source", f"-class/{name}") / "-class" / name
        write_video(path, rng.integers(0, 256, (5, 48, 64), dtype=np.uint8))
    sources = find_videos(str(tmp_path / "source"))
    processor = VideoProcessor(sources.root, sources.classes, CONFIG)
    assert all(isinstance(processor(source), Sample) for source in sources.videos)
    assert len(sources.videos) == 6
