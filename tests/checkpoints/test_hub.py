"""Hub ids: fetched only when meant, every refusal of the hub explained in one line."""

import sys

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from paligemma_jax.checkpoints import hub
from paligemma_jax.errors import CheckpointError


@pytest.fixture
def answer(monkeypatch):
    """answer(value) makes the hub return a path or raise an error; the calls are recorded in the list it returns."""

    def install(value):
        calls = []

        def download(hub_id, revision, allow_patterns):
            calls.append((hub_id, revision, tuple(allow_patterns)))
            if isinstance(value, BaseException):
                raise value
            return value

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return calls

    return install


def refused(name):
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hub_error(name):
    """An error of the hub without the HTTP response that its constructor wants."""
    kind = getattr(errors, name)
    return kind.__new__(kind, "first line\nsecond line")


def test_existing_paths_are_taken_as_they_are(tmp_path, answer, monkeypatch):
    calls = answer("elsewhere")
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "model.npz").touch()
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve("model.npz").resolve() == tmp_path / "model.npz"
    assert hub.resolve("org/name").is_dir()
    assert calls == []


def test_hub_id_is_fetched_without_what_is_not_needed(tmp_path, answer):
    calls = answer(str(tmp_path))
    assert hub.resolve("google/paligemma-3b-pt-224") == tmp_path
    patterns = ("*.safetensors", "*.json", "tokenizer.model", "vae-oid.npz")
    assert calls == [("google/paligemma-3b-pt-224", None, patterns)]


@pytest.mark.parametrize("revision", ["bfloat16", "refs/pr/3", "a1b2c3d4", "v1.0"])
def test_a_revision_follows_an_at_sign(tmp_path, answer, revision):
    calls = answer(str(tmp_path))
    assert hub.resolve(f"google/paligemma-3b-pt-224@{revision}") == tmp_path
    assert [call[:2] for call in calls] == [("google/paligemma-3b-pt-224", revision)]


def test_a_revision_that_is_not_there_is_named(answer):
    answer(hub_error("RevisionNotFoundError"))
    assert "org/name has no revision float8: leave @float8 out" in refused("org/name@float8")


def test_a_directory_with_an_at_sign_in_its_name_wins(tmp_path, answer, monkeypatch):
    calls = answer("elsewhere")
    monkeypatch.chdir(tmp_path)
    for name in ("org/name@bfloat16", "run@3"):
        (tmp_path / name).mkdir(parents=True)
        assert hub.resolve(name).is_dir()
    assert "though org/ does" in refused("org/other@main")
    assert calls == []


@pytest.mark.parametrize(
    "name",
    [
        *(
            "/no/such",
            "./no/such",
            "../no",
            "such",
            "a/b/c",
            "no/such/",
            "org/na me",
            "org/name@",
            "a@b",
            "org@1/name",
            "",
        ),
        *("~nobodyx/m", "~$a", "~a\0"),
    ],
)
def test_other_names_never_reach_the_hub(answer, name, monkeypatch, tmp_path):
    calls = answer("elsewhere")
    monkeypatch.chdir(tmp_path)
    if name:
        assert "does not exist" in refused(name)
    assert calls == []


def test_a_mistyped_path_in_an_existing_folder_never_reaches_the_hub(answer, monkeypatch, tmp_path):
    calls = answer("elsewhere")
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "output/mine does not exist, though output/ does" in refused("output/mine")
    assert calls == []


@pytest.mark.parametrize(
    ("error", "remedy"),
    (
        ("GatedRepoError", "https://huggingface.co/org/name, then run `hf auth login`"),
        ("RepositoryNotFoundError", "neither a path here nor a repository"),
        ("LocalEntryNotFoundError", "HF_HUB_OFFLINE"),
        ("HfHubHTTPError", "could not be fetched"),
    ),
)
def test_refusals_are_explained(answer, error, remedy):
    answer(hub_error(error))
    message = refused("org/name")
    assert remedy in message
    assert "org/name" in message


def test_missing_package_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused("org/name")


def test_offline_without_a_cache_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "cannot be reached" in refused("org/name")
