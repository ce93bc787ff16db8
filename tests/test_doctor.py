"""`llava-fast doctor`: what it reports, and that it finds what is broken."""

import json
from importlib import metadata
from pathlib import Path

import pytest

import llava_fast
from llava_fast import backend, cli, doctor


def run(*arguments: object) -> int:
    """Run the command line here and return its exit status."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code or 0


def test_doctor_finds_nothing_wrong_here(capsys: pytest.CaptureFixture[str]):
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["packages"]["torch"]["version"] == metadata.version("torch")
    assert report["packages"]["peft"]["extra"] == "train"
    assert report["devices"][0]["device"] == "cpu"
    operations = report["backend"]["operations"]
    assert {"attention", "rms_norm", "projector", "patch_embed", "rotary"} <= operations.keys()
    assert all(entry["backend"] and entry["reason"] for entry in operations.values())
    assert report["backend"]["requested"] == "auto"
    assert report["backend"]["available"]["reference"] == "available"


def test_doctor_speaks_to_people(capsys: pytest.CaptureFixture[str]):
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert f"llava-fast {llava_fast.__version__}" in out
    assert "attention" in out
    assert out.rstrip().endswith("all is well")


def test_doctor_finds_a_request_that_cannot_be_met(capsys: pytest.CaptureFixture[str]):
    backend.register("untold", "reference", len)
    try:
        with backend.use_backend("cuda"):
            assert run("doctor") == 1
    finally:
        del backend._registry["untold"]
    assert "- backend 'cuda' was asked for, but operation 'untold' has only: reference" in capsys.readouterr().out


def test_doctor_finds_a_wrong_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAVA_FAST_BACKEND", "gpu")
    monkeypatch.setattr(backend, "_request", {None: "gpu"})
    assert run("doctor", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["backend"]["requested"] == "gpu"
    assert report["problems"] == ["LLAVA_FAST_BACKEND is 'gpu'; it must be one of auto, reference, triton, cuda"]


def test_doctor_finds_old_and_missing_packages(monkeypatch: pytest.MonkeyPatch):
    versions = {"transformers": "4.57.0", "safetensors": None, "peft": None}
    real = metadata.version

    def version(name: str) -> str:
        if versions.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    report = doctor.diagnose()
    assert report["problems"] == [
        "transformers 4.57.0 is installed, but llava-fast needs >=5.20",
        "safetensors is not installed, but llava-fast needs it (>=0.8)",
    ]
    assert report["packages"]["peft"]["version"] is None  # of an extra: nothing is wrong


def test_doctor_finds_an_extension_that_finds_no_device(monkeypatch: pytest.MonkeyPatch):
    status = {"built": True, "loaded": True, "architectures": [80], "devices": 0, "reason": "CUDA error 803"}
    monkeypatch.setattr(backend, "extension_status", lambda: status)
    report = doctor.diagnose()
    assert report["problems"] == ["CUDA error 803"]
    doctor.show(report)


def test_doctor_finds_a_broken_extension(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "_extension", None)
    monkeypatch.setattr(backend, "_extension_built", True)
    monkeypatch.setattr(backend, "_extension_error", "the CUDA extension does not load: wrong ELF class")
    assert doctor.diagnose()["problems"] == ["the CUDA extension does not load: wrong ELF class"]


def test_doctor_finds_a_directory_it_cannot_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (problem,) = doctor.diagnose()["problems"]
    assert problem == f"the triton directory {tmp_path / 'file' / 'cache'} cannot be written to"
