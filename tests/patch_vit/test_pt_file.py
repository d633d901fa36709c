import collections
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from paligemma_jax.errors import CheckpointError
from paligemma_jax.patch_vit.pt_file import EnumMember, PtFile
from tests.patch_vit.pt_writer import Named, Writer, checkpoint, write_pt

STATE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float16)}


def write_pickle(path, data: bytes, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        for number, storage in enumerate(storages):
            archive.writestr(f"x/data/{number}", storage)
    return path


def test_tensors_and_plain_values_are_read(tmp_path):
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    file = PtFile(write_pt(tmp_path / "x.pt", checkpoint(STATE | {"t": transposed})))
    assert file.content["epoch"] == 31 and file.content["scheduler_state_dict"]["best"] == float("inf")
    assert file.content["teacher_model_args"] == EnumMember("ViT-B/32")
    for name, array in (STATE | {"t": transposed}).items():
        found = file.read(file.content["model_state_dict"][name])
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_an_enum_by_its_name_is_read(tmp_path):
    kind = Named("_types", "Teacher", call=False)
    file = PtFile(write_pt(tmp_path / "x.pt", {"t": Named("builtins", "getattr", kind, "VIT_B_32")}))
    assert file.content["t"] == EnumMember("VIT_B_32")


class Runs:
    """Whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_not_run(tmp_path, protocol):
    path = write_pickle(tmp_path / "x.pt", pickle.dumps({"epoch": 1, "x": Runs(tmp_path / "made")}, protocol))
    with pytest.raises(CheckpointError, match=r"its pickle asks for (posix|nt)\.mkdir") as error:
        PtFile(path)
    assert not (tmp_path / "made").exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "named",
    [
        Named("builtins", "eval", "1"),
        Named("builtins", "getattr", Named("collections", "OrderedDict", call=False), "__subclasses__"),
        Named("builtins", "getattr", Named("_types", "Teacher", "x"), "value"),
        Named("os", "system", "true"),
        Named("torch", "load", "x"),
        Named("torch.storage", "_load_from_bytes", b"x"),
        Named("_types", "Teacher.__init__", "x"),
        Named("paligemma_jax.patch_vit.pt_file", "PtFile", "x"),
        Named("collections", "defaultdict"),
        Named("numpy.core.multiarray", "scalar"),
    ],
    ids=lambda named: f"{named.module}.{named.name}",
)
def test_other_names_are_refused(tmp_path, named):
    with pytest.raises(CheckpointError, match=r"asks for|is truncated or damaged"):
        PtFile(write_pt(tmp_path / "x.pt", {"x": named}))


def test_one_enum_is_stubbed_and_no_second_class(tmp_path):
    with pytest.raises(CheckpointError, match=r"asks for _types\.Other"):
        PtFile(write_pt(tmp_path / "x.pt", [Named("_types", "Teacher", 1), Named("_types", "Other", 1)]))


def test_every_truncation_is_refused(tmp_path):
    whole = write_pt(tmp_path / "x.pt", checkpoint(STATE)).read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"truncated or damaged|no file of torch.save"):
            PtFile(tmp_path / "cut.pt")


def test_damage_is_refused_and_nothing_else_is_raised(tmp_path):
    whole, rng = write_pt(tmp_path / "x.pt", checkpoint(STATE)).read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        (tmp_path / "x.pt").write_bytes(data)
        try:
            file = PtFile(tmp_path / "x.pt")
            content = file.content.get("model_state_dict", {}) if isinstance(file.content, dict) else {}
            [file.read(tensor) for tensor in content.values()]
        except CheckpointError as error:
            refused += "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 4), (3, 1)),
        (0, (10**6, 10**6), (0, 0)),
        (0, (-1,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (1, 1)),
        (0, (True,), (1,)),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, offset, shape, strides):
    writer = Writer()
    kind = Named("torch", "FloatStorage", call=False)
    reference = writer.one(("storage", kind, "0", "cpu", 6)) + pickle.BINPERSID
    arguments = pickle.MARK + reference + b"".join(map(writer.one, (offset, shape, strides))) + pickle.TUPLE
    data = b"\x80\x02" + pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE + b"."
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        PtFile(write_pickle(tmp_path / "x.pt", data, [bytes(24)]))


def test_other_files_are_refused_by_their_kind(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    with pytest.raises(CheckpointError, match=r"format of torch before 1\.6"):
        PtFile(path)
    path.write_bytes(b"version https://git-lfs")
    with pytest.raises(CheckpointError, match=r"no file of torch\.save"):
        PtFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "x")
    with pytest.raises(CheckpointError, match=r"holds no data\.pkl"):
        PtFile(path)
    with pytest.raises(CheckpointError, match="is compressed"):
        PtFile(write_pt(path, {"x": STATE["a"]}, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="cannot be read"):
        PtFile(tmp_path)


_NAMES = ("torch\nBFloat16Storage", "_types\nTeacher", "torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict")
_STATES = ({"itemsize": 1, "__init__": 5}, (3, "<", None, None, None, -1, -1, 0), (None, {"meaning": 5}))


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("state", _STATES)
def test_a_pickle_changes_nothing_that_it_did_not_make(tmp_path, name, state):
    """The opcode BUILD gives a state to what lies on the stack."""
    before = (ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16).itemsize, EnumMember("x"), dir(collections.OrderedDict))
    data = pickle.PROTO + b"\x02" + pickle.GLOBAL + name.encode() + b"\n"
    data += Writer().one(state) + pickle.BUILD + pickle.STOP
    path = tmp_path / "built.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    with pytest.raises(CheckpointError, match="damaged"):
        PtFile(path)
    assert before == (
        *(ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16).itemsize),
        *(EnumMember("x"), dir(collections.OrderedDict)),
    )


def test_a_tensor_cannot_be_moved_out_of_its_storage(tmp_path):
    writer = Writer()
    state = writer.one({"offset": 1 << 40})
    data = pickle.PROTO + b"\x02" + writer.one(np.zeros(4, np.float32)) + state + pickle.BUILD + pickle.STOP
    path = tmp_path / "moved.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(CheckpointError, match="damaged"):
        PtFile(path)
