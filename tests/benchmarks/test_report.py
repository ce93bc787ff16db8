"""The report: from stored records to tables and plots, the same bytes each time, nothing where nothing was measured."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import names, plots, records, report
from llava_fast.ops.attention.plain import FILE

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
    plain = FILE.relative_to(ROOT)
    assert (root / plain).read_text() == (ROOT / plain).read_text(), f"{plain} is out of date: make report"
    plots = {path.name for path in (root / "docs/plots").glob("*.svg")}
    assert plots == {path.name for path in (ROOT / "docs/plots").glob("*.svg")}


def test_nothing_stored_is_one_sentence(root: Path):
    report.write(root / "no such folder", root)
    for name in ("README.md", "docs/benchmarks.md"):
        assert between(root / name).strip() == "No GPU has been measured."
    assert not list((root / "docs/plots").iterdir())


def test_tables_and_plots_of_stored_results(root: Path):
    results = root / "results"
    old = run_of("nvidia-h100", 1, {"triton": 0.5, "torch": 0.6})
    new = run_of("nvidia-h100", 2, {"torch": 0.04, "triton": 0.0125, "liger": 0.015})
    cpu = run_of("cpu", 3, {"reference": 3.0, "torch": 4.0}, op="made_today")
    for results_of_run in (new, old, cpu):
        records.save(results_of_run, results)
    (root / "docs/plots").mkdir()
    (root / "docs/plots/stale.svg").write_text("<svg/>")
    report.write(results, root)

    # The largest shape, the fastest peer, the newest run; only what was measured.
    ours = "llava-fast (Triton) 25.0 µs, 80 % of the floor, 1.2× faster than Liger"
    header, _, row, _, sentence = between(root / "README.md").strip().splitlines()
    assert header == "| operation | case | H100 |"
    assert row == f"| RMSNorm with residual, forward | 4096 tokens, width 4096; bf16 | {ours} |"
    assert sentence == "Not measured: A100, H200."
    page = between(root / "docs/benchmarks.md")
    assert "*Measured on NVIDIA Test GPU, driver 580.1, 700.0 W, SM 1 MHz, PyTorch 2.13.0" in page
    assert "2030-01-02, commit abc1234" in page
    assert "2030-01-01" not in page  # every case was measured again
    small = "832 tokens, width 4096; bf16"
    assert f"**{small}**\n" in page
    assert "| Liger | 15.0 µs | 13.5 µs – 16.5 µs | 67 | 312 | 2.00 GiB | 1.0e-03 | cuda graph |" in page
    # An operation that nothing here knows.
    assert "### Made today, forward" in page
    assert "**4096 × 4096; bf16**\n" in page
    assert "| llava-fast | 6.00 ms | 5.40 ms – 6.60 ms | 312 | 4.00 GiB |" in page
    found = sorted(path.name for path in (root / "docs/plots").iterdir())
    assert found == ["cpu-made_today-forward.svg", "nvidia-h100-rms_norm-forward.svg"]
    assert all(f"(plots/{name})" in page for name in found)
    drawn = (root / "docs/plots" / found[1]).read_text()
    for text in ("Time", "% of floor", "Peak memory", "Liger", small, "llava-fast (Triton)", "80 %"):
        assert f">{text}<" in drawn
    assert "% of floor" not in (root / "docs/plots" / found[0]).read_text()


def test_the_front_compares_a_training_step_with_transformers(root: Path):
    shapes = {"832x4096": "1x640x64x128x2x99", "4096x4096": "1x704x64x128x2x99"}
    for device, ours in (("cpu", "reference"), ("nvidia-a100", "triton")):
        run = run_of(device, 1, {"hf": 30.0, ours: 16.0}, op="train_step_full")
        for record in run["records"]:
            record["shape"] = shapes[record["shape"]]
            record["peak_mib"] /= 3 if record["provider"] == ours else 1
        records.save(run, root / "results")
    report.write(root / "results", root)
    block = between(root / "README.md")
    assert "32.0 ms against 60.0 ms, 1.33 GiB against 4.00 GiB.](docs/plots/cpu-front.svg)" in block  # the largest case
    assert "*Measured on Test CPU, 2 threads, PyTorch 2.13.0" in block and "2030-01-01" in block
    assert "(docs/plots/nvidia-a100-front.svg)" in block and "Not measured: H100, H200." in block
    drawn = (root / "docs/plots/cpu-front.svg").read_text()
    for text in ("32.0 ms", "1.9× faster", "33 % of the memory", "transformers", "llava-fast"):
        assert f">{text}<" in drawn
    assert "576 image + 128 text tokens; 2 layers" in drawn and "+ 64 text tokens" not in drawn


def test_many_sizes_along_one_dimension_are_lines_and_others_bars(tmp_path: Path):
    def drawn(*shapes: str) -> str:
        found = run_of("cpu", 1, {"reference": 1.0, "hf": 2.0})["records"][:2]
        groups = [plots.Group(f"size {i}", [{**r, "shape": shape} for r in found]) for i, shape in enumerate(shapes)]
        plots.chart(tmp_path / "chart.svg", "title", "subtitle", groups)
        return (tmp_path / "chart.svg").read_text()

    assert "2.0× faster" in drawn("1x8", "2x8", "4x8")
    assert "2.0× faster" in drawn("1x8", "2x8", "1x16", "2x16")
    many = drawn("1x8", "2x8", "4x8", "8x8")
    assert "2.0× faster" not in many and ">4   size 3<" in many


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [(1.0, 1.94, "1.9× faster"), (1.5, 1.0, "1.5× slower"), (1.0, 1.04, "as fast"), (1.04, 1.0, "as fast")],
)
def test_ratios_are_said_in_words(ours: float, theirs: float, said: str):
    assert plots.faster(ours, theirs) == said


def test_every_benchmark_has_names_that_people_know():
    for path in (ROOT / "benchmarks").glob("test_*.py"):
        for case in importlib.import_module(f"benchmarks.{path.stem}").cases(gpu=False):
            op, shape, dtype = (case.identity[name] for name in ("op", "shape", "dtype"))
            assert op in names.OPERATIONS and op in names.SHAPES
            assert names.case(op, shape, dtype).endswith(f"; {dtype}")
            assert case.providers.keys() <= names.PROVIDERS.keys()


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
    assert "200 µs" in between(root / "README.md")

    file.write_text(json.dumps({**run_of("cpu", 1, {"reference": 0.1}), "dry_run": True, "steps": []}))
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert "holds no measurements of a GPU" in capsys.readouterr().err
    assert not (root / "results/cpu").exists()


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0.0123456, "12.3 µs"), (0.9996, "1000 µs"), (1.0, "1.00 ms"), (1234.5, "1.23 s"), (0.00051, "0.510 µs")],
)
def test_durations_have_three_digits_and_no_exponent(ms: float, text: str):
    assert plots.duration(ms) == text
