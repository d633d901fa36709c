"""Files as `torch.save` writes them, made without torch: a zip archive, and a pickle written opcode by opcode."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"f4": "FloatStorage", "f2": "HalfStorage", "f8": "DoubleStorage", "i8": "LongStorage"}


class Named:
    """A global by its name, called with arguments if there are any."""

    def __init__(self, module: str, name: str, *args: Any, call: bool = True):
        self.module, self.name, self.args, self.call = module, name, args, call


class Writer:
    """Pickles dictionaries, lists, tuples, numbers, texts, arrays (as tensors) and `Named`s, by protocol 2."""

    def __init__(self) -> None:
        self.storages: list[np.ndarray] = []

    def dumps(self, value: Any) -> bytes:
        return pickle.PROTO + b"\x02" + self.one(value) + pickle.STOP

    def one(self, value: Any) -> bytes:
        if isinstance(value, Named):
            name = pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
            return name + self.one(value.args) + pickle.REDUCE if value.call else name
        if isinstance(value, np.ndarray):
            return self.tensor(value)
        if isinstance(value, Mapping):
            items = b"".join(self.one(key) + self.one(item) for key, item in value.items())
            return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
        if isinstance(value, list):
            return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(self.one, value)) + pickle.APPENDS
        if isinstance(value, tuple):
            return pickle.MARK + b"".join(map(self.one, value)) + pickle.TUPLE
        return pickle.dumps(value, 2)[2:-1]  # without the protocol and the end

    def tensor(self, array: np.ndarray) -> bytes:
        self.storages.append(array)
        kind = Named("torch", KINDS[array.dtype.str[1:]], call=False)
        reference = ("storage", kind, str(len(self.storages) - 1), "cpu", array.size)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        arguments = pickle.MARK + self.one(reference) + pickle.BINPERSID
        arguments += b"".join(map(self.one, (0, array.shape, strides, False, Named("collections", "OrderedDict"))))
        name = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n"
        return name + arguments + pickle.TUPLE + pickle.REDUCE


def write_pt(path: Path, value: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write what `Writer` can pickle."""
    writer = Writer()
    data = writer.dumps(value)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for number, storage in enumerate(writer.storages):
            archive.writestr(f"archive/data/{number}", storage.tobytes("A"))
        archive.writestr("archive/version", "3\n")
    return path


def checkpoint(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """All that the original's files hold around their weights."""
    moments = {"step": np.zeros(1, np.float32), "exp_avg": np.ones(3, np.float32)}
    return {
        "epoch": 31,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
        "scheduler_state_dict": {"factor": 0.5, "best": float("inf"), "mode": "min"},
        "loss_y_train": [0.5, 0.25],
        "loss_y_val": [],
        "teacher_model_args": Named("_types", "TeacherModel", "ViT-B/32"),
    }
