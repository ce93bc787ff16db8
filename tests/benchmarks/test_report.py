"""The report: from stored records to tables and plots, the same bytes each time, nothing where nothing was measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records, report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the repository's README.md and docs/benchmarks.md."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run_of(device: str, day: int, medians: dict[str, float], *, op: str = "rms_norm", **changes: Any) -> dict[str, Any]:
    """Results of one run: times by provider of two shapes, the second twice as slow."""
    gpu = device != "cpu"
    run = {
        "device": device,
        **dict.fromkeys(("gpu", "driver", "power_limit_w", "clocks")),
        **({"gpu": "NVIDIA Test GPU", "driver": "580.1", "power_limit_w": 700.0, "clocks": "SM 1 MHz"} if gpu else {}),
        **{"cpu": "Test CPU", "threads": 2, "torch": "2.13.0", "triton": "3.7.1", "transformers": "5.23.0"},
        **{"commit": "abc1234", "date": f"2030-01-{day:02}T00:00:00+00:00"},
    }
    found = [
        {
            **{"op": op, "shape": shape, "dtype": "bf16", "direction": "forward", "provider": provider},
            **{"ms_median": factor * ms, "ms_p20": factor * ms * 0.9, "ms_p80": factor * ms * 1.1},
            **{"peak_mib": factor * 2048.0, "floor_ms": factor * 0.01 if gpu else None, "tflops_per_s": 312.5},
            **{"pct_of_floor": 1 / ms if gpu else None, "max_rel_error": 1e-3, "timer": "cuda graph", "samples": 9},
            **changes,
        }
        for shape, factor in (("832x4096", 1), ("4096x4096", 2))
        for provider, ms in medians.items()
    ]
    return {"run": run, "records": found}


def between(file: Path) -> str:
    return file.read_text().partition(report.START)[2].partition(report.END)[0]


def test_the_committed_pages_are_what_the_stored_results_give(root: Path):
    report.write(records.RESULTS, root)
    for name in ("README.md", "docs/benchmarks.md"):
        assert (root / name).read_text() == (ROOT / name).read_text(), f"{name} is out of date: make report"
    plots = {path.name for path in (root / "docs/plots").glob("*.svg")}
    assert plots == {path.name for path in (ROOT / "docs/plots").glob("*.svg")}


@pytest.mark.slow
def test_nothing_stored_is_nothing_measured(root: Path):
    report.write(root / "no such folder", root)
    rows = between(root / "README.md").strip().splitlines()[2:]
    assert {"rms_norm", "layer_norm", "attention"} <= {row.split(" | ")[0].removeprefix("| ") for row in rows}
    assert all(row.endswith("| not measured | not measured | not measured |") for row in rows)
    assert between(root / "docs/benchmarks.md").count("Not measured.") == 3
    assert not (root / "docs/plots").exists()


def test_tables_and_plots_of_stored_results(root: Path):
    results = root / "results"
    old = run_of("nvidia-h100", 1, {"triton": 0.5, "torch": 0.6})
    new = run_of("nvidia-h100", 2, {"torch": 0.04, "triton": 0.0125, "liger": 0.015})
    cpu = run_of("cpu", 3, {"reference": 3.0, "torch": 4.0}, op="attention")
    for results_of_run in (new, old, cpu):
        records.save(results_of_run, results)
    (root / "docs/plots").mkdir()
    (root / "docs/plots/stale.svg").write_text("<svg/>")
    report.write(results, root)

    rows = [row for row in between(root / "README.md").splitlines() if "rms_norm | forward |" in row]
    ours = "triton 25 µs, 80 % of the floor, 1.20 × liger"  # the largest shape, the fastest peer, the newest run
    assert rows == [f"| rms_norm | forward | 4096×4096 | bf16 | not measured | {ours} | not measured |"]
    page = between(root / "docs/benchmarks.md")
    assert "- 2030-01-02, commit abc1234: NVIDIA Test GPU, driver 580.1, 700.0 W, SM 1 MHz; torch 2.13.0" in page
    assert "2030-01-01" not in page  # every case was measured again
    assert "| 832×4096 | bf16 | liger | 15 µs | 13.5 µs – 16.5 µs | 67 | 312 | 2050 | 1.0e-03 | cuda graph |" in page
    assert "| 4096×4096 | bf16 | reference | 6 ms | 5.4 ms – 6.6 ms |  | 312 | 4100 |" in page
    assert "rms_norm forward+backward 832x4096 bf16: not measured." in page
    plots = sorted(path.name for path in (root / "docs/plots").iterdir())
    assert plots == ["cpu-attention-forward.svg", "nvidia-h100-rms_norm-forward.svg"]
    assert all(f"(plots/{name})" in page for name in plots)
    drawn = (root / "docs/plots" / plots[1]).read_text()
    for text in ("time (ms)", "% of floor", "peak memory (MiB)", "liger", "4096×4096"):
        assert text in drawn
    assert "% of floor" not in (root / "docs/plots" / plots[0]).read_text()


def test_the_same_results_give_the_same_bytes(root: Path):
    records.save(run_of("nvidia-a100", 1, {"torch": 0.2, "cuda": 0.1}), root / "results")
    files = []
    for _ in range(2):
        report.write(root / "results", root)
        files.append({path: path.read_bytes() for path in root.rglob("*") if path.suffix in (".svg", ".md")})
    assert files[0] == files[1]
    assert len(files[0]) == 3


def test_a_page_without_markers_is_an_error_that_names_it(root: Path):
    (root / "README.md").write_text("# nothing here\n")
    with pytest.raises(ValueError, match=r"README\.md lacks the lines"):
        report.write(root / "results", root)


def test_results_of_a_gpu_are_added(root: Path, capsys: pytest.CaptureFixture[str]):
    file = root / "results.json"
    arguments = ["--add", str(file), "--results", str(root / "results"), "--root", str(root)]
    file.write_text(json.dumps({**run_of("nvidia-h200", 1, {"triton": 0.1}), "dry_run": False, "steps": []}))
    assert report.main(arguments) == 0
    stored = json.loads((root / "results/nvidia-h200/2030-01-01-abc1234.json").read_text())
    assert stored.keys() == {"run", "records"}
    assert "triton 200 µs" in between(root / "README.md")

    file.write_text(json.dumps({**run_of("cpu", 1, {"reference": 0.1}), "dry_run": True, "steps": []}))
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert "holds no measurements of a GPU" in capsys.readouterr().err
    assert not (root / "results/cpu").exists()


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0.0123456, "12.3 µs"), (0.9996, "1000 µs"), (1.0, "1 ms"), (1234.5, "1230 ms"), (0.00051, "0.51 µs")],
)
def test_durations_have_three_digits_and_no_exponent(ms: float, text: str):
    assert report.duration(ms) == text
