"""Names of the hub: told from paths, downloaded once, and answered with a remedy."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from mmrecoder_jax.models import hub
from mmrecoder_jax.models.files import CheckpointError

NAME = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name, expected",
    [
        (NAME, True),
        ("Qwen/qwen_2.5-VL", True),
        ("runs/stage2", False),  # there is a folder `runs`
        ("other/stage2", True),
        ("Qwen", False),
        ("a/b/c", False),
        ("./Qwen", False),
        ("../Qwen", False),
        ("/a/b", False),
        ("", False),
    ],
)
def test_what_can_be_a_name(name, expected, tmp_path):
    (tmp_path / "runs").mkdir()
    assert hub.is_hub_id(name) is expected


def test_a_model_is_asked_for_once_and_a_directory_never(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        assert "*.safetensors" in allow_patterns and "*.json" in allow_patterns
        return str(tmp_path / "kept")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    name = f"asked/{tmp_path.name}"  # answers are kept for the life of the process
    assert hub.local_directory(name) == hub.local_directory(name) == str(tmp_path / "kept")
    assert asked == [name]
    (tmp_path / name).mkdir(parents=True)
    assert hub.local_directory(name) == name and asked == [name]
    assert hub.local_directory("runs") == "runs"


@pytest.mark.parametrize(
    "error",
    [
        errors.LocalEntryNotFoundError("offline"),
        OSError("Network is unreachable\nand more"),
        errors.HFValidationError("a bad name"),
    ],
)
def test_what_cannot_be_had_is_answered_with_what_to_run(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError) as caught:
        hub.local_directory(NAME)
    said = str(caught.value)
    assert "\n" not in said and str(error).splitlines()[0] in said
    assert f"`hf download {NAME} --local-dir Qwen2.5-VL-7B-Instruct`" in said
    assert "hf auth login" in said


def test_a_model_that_the_library_keeps_has_its_name_again():
    kept = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/cc5"
    assert hub.published_name(kept) == hub.published_name(f"{kept}/") == NAME
    assert hub.published_name("models/qwen") == "models/qwen"
