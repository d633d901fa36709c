"""What a user names to pictures in a fixed order, and to their bytes."""

import base64
import csv
import io
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paligemma_jax.annotate import inputs, sources
from paligemma_jax.annotate.fingerprint import of_inputs
from paligemma_jax.annotate.inputs import find, folder_of
from paligemma_jax.annotate.store import Layout, Store
from paligemma_jax.errors import ConfigError, DataError, ImageError
from tests.annotate.conftest import draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("pictures"), 12)


def content(folder: Path) -> list[bytes]:
    return [(folder / f"{i}.png").read_bytes() for i in range(12)]


def write_csv(path: Path, records: list[list[str]], **options) -> Path:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows(records)
    return path


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("pattern", ["", "*.png", "**/*.png"])
def test_folders_and_globs_are_in_natural_order(folder, pattern):
    found = find(str(folder / pattern))
    assert [Path(source.name).name for source in found] == [f"{i}.png" for i in range(12)]
    assert [source.read() for source in found] == content(folder)


def test_a_list_names_paths_from_its_folder_or_another_and_urls(folder, tmp_path):
    lines = ["1.png", "", "  0.png ", f"{folder / '2.png'}", "https://example.org/a.png", "data:image/png;base64,AAAA"]
    (folder / "list.txt").write_text("\n".join(lines))
    found = find(str(folder / "list.txt"))
    assert [source.name for source in found] == [
        *("1.png", "0.png", str(folder / "2.png"), "https://example.org/a.png", f"{folder / 'list.txt'}#6"),
    ]
    assert [source.read() for source in found[:3]] == [content(folder)[i] for i in (1, 0, 2)]
    assert found[-1].read() == b"\0\0\0"
    (tmp_path / "list.txt").write_text("3.png\r\n")
    assert find(str(tmp_path / "list.txt"), root=str(folder))[0].read() == content(folder)[3]
    (folder / "list.txt").unlink()


def test_what_is_named_twice_is_one_picture_and_told(folder):
    told = []
    (folder / "twice.txt").write_text("1.png\n0.png\n1.png\n1.png\n")
    assert [source.name for source in find(str(folder / "twice.txt"), tell=told.append)] == ["1.png", "0.png"]
    assert len(told) == 1 and "2 that are named twice" in told[0]
    (folder / "twice.txt").unlink()


@pytest.mark.parametrize(
    "name, header, column, options",
    [
        ("t.csv", ["id", "Image"], "", {}),
        ("t.csv", ["path", "what"], "what", {}),
        ("t.tsv", ["id", "file_name"], "", {"delimiter": "\t"}),
        ("t.csv", ["id", "url"], "", {"encoding": "utf-8-sig"}),
        ("t.csv", ["id", "path"], "", {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}),
    ],
)
def test_a_table_has_a_column_of_paths(folder, tmp_path, name, header, column, options):
    path = write_csv(tmp_path / name, [header, ["line\nbreak, ü", "2.png"], ["b", "1.png"]], **options)
    found = find(str(path), column, str(folder))
    assert [source.name for source in found] == ["2.png", "1.png"]
    assert [source.read() for source in found] == [content(folder)[i] for i in (2, 1)]


@pytest.mark.parametrize("name", ["bytes", "image_base64", "Image_Bytes"])
def test_a_table_may_hold_the_pictures(folder, tmp_path, name):
    pictures = content(folder)[:3]
    encoded = [base64.b64encode(data).decode() for data in pictures]
    path = write_csv(tmp_path / "t.csv", [["note", name], *([f"ü\n{i}", text] for i, text in enumerate(encoded))])
    found = find(str(path))
    assert [source.read() for source in reversed(found)] == pictures[::-1]
    assert [source.name for source in found] == [f"{path}#{i}" for i in (1, 2, 3)]


def test_cells_without_a_picture_are_rows_that_fail(tmp_path):
    path = write_csv(tmp_path / "t.csv", [["id", "bytes"], ["1", ""], ["2"], [], ["3", "no base64!"]])
    found = find(str(path))
    assert [source.name for source in found] == [f"{path}#{i}" for i in (1, 2, 3)]
    for source, why in zip(found, ("names no picture", "names no picture", "no base64"), strict=True):
        with pytest.raises(ImageError, match=f"#.*{why}"):
            source.read()


@pytest.mark.parametrize("kind", ["path", "bytes", "struct"])
def test_parquet(folder, tmp_path, kind):
    pictures = content(folder)[:5]
    values = {
        "path": [f"{i}.png" for i in range(5)],
        "bytes": pictures,
        "struct": [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(pictures)],
    }[kind]
    for i, part in enumerate((values[:3], values[3:])):
        pq.write_table(pa.table({"n": range(len(part)), "image": part}), tmp_path / f"{i}.parquet", row_group_size=2)
    found = find(str(tmp_path / "*.parquet"), root=str(folder))
    assert [source.read() for source in found] == pictures
    names = [f"{tmp_path}/0.parquet#1", f"{tmp_path}/1.parquet#2"]
    assert [found[0].name, found[4].name] == (["0.png", "4.png"] if kind == "path" else names)


def test_parquet_values_that_are_null_fail_alone(folder, tmp_path):
    images = [{"bytes": None, "path": str(folder / "0.png")}, None, {"bytes": b"x", "path": None}]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet")
    found = find(str(tmp_path / "t.parquet"))
    assert (found[0].read(), found[2].read()) == (content(folder)[0], b"x")
    with pytest.raises(ImageError, match="#2 holds nothing"):
        found[1].read()


def test_tars(folder, tmp_path):
    pictures = content(folder)
    for i in range(3):
        members = {f"d/{i}.png": pictures[i], f"d/{i}.json": b"{}", f"d/{i}.seg.png": pictures[i + 3], "._x.png": b""}
        write_tar(tmp_path / f"s-{i + 8:02d}.tar", members)
    found = find(str(tmp_path / "s-{08..10}.tar"))
    assert [source.read() for source in found] == [pictures[i] for i in (0, 3, 1, 4, 2, 5)]
    assert found[0].name == f"{tmp_path}/s-08.tar/d/0.png"
    assert found == find(str(tmp_path / "*.tar"))
    assert [source.read() for source in find(str(tmp_path / "*.tar"), "seg.png")] == pictures[3:6]
    path = tmp_path / "s-08.tar"
    path.write_bytes(path.read_bytes()[: found[0].offset + 10])
    with pytest.raises(ImageError, match=r"cut off: .*s-08\.tar has ended"):
        found[0].read()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("t.csv", "a,b\n1,2\n", "no column of a known name, only a, b: name one with image_column"),
        ("t.csv", "", "no column of a known name"),
        ("t.csv", "path\n", "holds no pictures"),
        ("t.csv", b"path\n\xff\xfe\n", "not UTF-8"),
        ("t.csv", 'path\n"a', "cannot be read|#1"),
        ("t.txt", "\n\n", "holds no pictures"),
        ("t.txt", b"\xff\n", "not UTF-8"),
        ("t.tar", "x" * 600, "cannot be read"),
        ("t.tar.gz", "", "is compressed: unpack it"),
        ("t.parquet", "x" * 100, "no Parquet file"),
        ("s-{3..1}.tar", "", "counts down"),
        ("s-{1..3}.tar", "", "is not there"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, name, text, message):
    if "{" not in name:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if message == "cannot be read|#1":
        assert len(find(str(tmp_path / name))) == 1  # an open quote ends with the file
        return
    with pytest.raises(DataError, match=message) as caught:
        find(str(tmp_path / name))
    assert "\n" not in str(caught.value) and name.split("{")[0] in str(caught.value)


@pytest.mark.parametrize("column, kind", [("n", "int64"), ("missing", "no column 'missing': it has n, text")])
def test_a_column_of_another_kind_is_told(tmp_path, column, kind):
    pq.write_table(pa.table({"n": [1], "text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=kind):
        find(str(tmp_path / "t.parquet"), column)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[annotate\]"'):
        find(str(tmp_path / "t.parquet"))


@pytest.mark.parametrize("name", ["none.png", "."])
def test_paths_that_hold_no_picture_fail_when_they_are_read(tmp_path, name):
    with pytest.raises(ImageError, match=r"does not exist|is a folder"):
        sources.File(name, str(tmp_path / name)).read()


def test_a_file_too_large_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 2**20)
    (tmp_path / "a.png").write_bytes(b"x" * (2**20 + 2))
    with pytest.raises(ImageError, match="more than 1 MiB"):
        sources.File("a.png", str(tmp_path / "a.png")).read()


def test_folder_of_names(tmp_path):
    assert folder_of("pictures") == folder_of("a/*.png") == ""
    assert folder_of("a/list.txt") == "a" and folder_of("a/list.txt", "b") == "b"
    assert inputs.COLUMNS.index("image") < inputs.COLUMNS.index("bytes")


def test_100000_pictures_are_planned_in_little_memory(tmp_path):
    """Their names are long, as those of real data."""
    names = (f"some/folder/of/a/data/set/{i // 1000:05d}/picture_{i:012d}.jpg\n" for i in range(100_000))
    (tmp_path / "list.txt").write_text("".join(names))
    tracemalloc.start()
    try:
        found = find(str(tmp_path / "list.txt"))
        print_ = {"image": of_inputs(source.name for source in found)}
        with Store(tmp_path / "out", print_, Layout(len(found), 1000, "jsonl")) as store:
            count = sum(len(group.items) for group in store.pending(16))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 100_000 and peak < 100 * 2**20
