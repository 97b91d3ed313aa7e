"""The parts of `python -m bench.gpu`: each measures its tasks one after the other and keeps each
one's result when it ends."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.failures import DeviceLost
from bench.gpu.part_result import Entry, PartResult

TEST_FILES = ("fused_kl/test_triton.py", "fused_kl/test_gpu.py")  # before the others
REPORT_LENGTH = 3000  # characters of a failed test's report that are kept
FEW, MANY = (32, 640), (16_384,)  # tokens: grounding answers, and answers with thinking


@dataclass(frozen=True, kw_only=True)
class Part:
    """A unit that is measured in a process of its own.

    Attributes:
        about: one line for `--list`.
        run: measures into a result; its other argument says whether to shrink.
        usual_s: seconds that it is expected to take on an H100, by which a lease is divided.
    """

    about: str
    run: Callable[[PartResult, bool], None]
    usual_s: float = 60


def gpu_tests(result: PartResult, smoke: bool) -> None:
    """The tests that are marked `gpu`, a file at a time: a test that breaks the device takes no
    other file with it."""
    folder = ROOT / "tests"
    marked = sorted(p for p in folder.rglob("test_*.py") if "mark.gpu" in p.read_text())
    first = [folder / name for name in TEST_FILES if folder / name in marked]
    files = [*first, *(path for path in marked if path not in first)]
    for path in [folder / "fused_kl/test_gpu.py"] if smoke else files:
        name = f"gpu_tests[{path.relative_to(folder)}]"
        if result.earlier(name).get("seconds") is not None:
            print(f"{name}: run before", flush=True)
            continue
        result.save(name, run_tests(path, lambda entry, name=name: result.save(name, entry)))


def run_tests(path: Path, save: Callable[[Entry], None]) -> Entry:
    """Counts of a file's outcomes, the failed tests and the ends of their reports; `save` is given
    what is known every second. `seconds` is None until the file is done."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder, "outcomes")
        outcomes.touch()
        command = [sys.executable, "-m", "pytest", "-m", "gpu", str(path), "-p", "no:cacheprovider"]
        command += ["-p", "bench.gpu.pytest_outcomes", f"--outcomes={outcomes}"]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            while process.poll() is None:
                time.sleep(1)
                save(counted(outcomes))
        finally:
            process.kill()
        entry = counted(outcomes)
        if process.returncode not in (0, 1, 5):  # 5: no test is marked for this machine
            running = entry["last_started"]
            entry["failed"].append(f"pytest ended with {process.returncode} in {running or path}")
    return entry | {"seconds": time.perf_counter() - begun}


def counted(outcomes: Path) -> Entry:
    """What the lines of `bench.gpu.pytest_outcomes` add up to."""
    lines = [json.loads(line) for line in outcomes.read_text().splitlines() if line.endswith("}")]
    started = [line["test"] for line in lines if line["outcome"] == "started"]
    failed = {line["test"]: line["text"] for line in lines if line["outcome"] == "failed"}
    return {
        "passed": sum(line["outcome"] == "passed" for line in lines),
        "skipped": sum(line["outcome"] == "skipped" for line in lines),
        "failed": list(failed),
        "reports": [f"{name}\n{text[-REPORT_LENGTH:]}" for name, text in failed.items()],
        "last_started": started[-1] if started else None,
        "seconds": None,
    }


def kernel_part(pair: str, counts: Sequence[int]) -> Callable[[PartResult, bool], None]:
    """All kernels at the shapes of a pair of models, as bench/bench_kernels.py has them."""

    def run(result: PartResult, smoke: bool) -> None:
        import torch

        from bench.kernels import measure as kernels
        from bench.kernels.problems import Shape

        shapes = kernels.shapes_of(pair, counts)
        rounds = kernels.ROUNDS
        if smoke:
            shapes, rounds = [Shape("8 tokens", 8, 4099, 32, 48)], 3
            if not kernels.GPU:  # compiling would take minutes, and all else seconds
                torch.compiler.set_stance("force_eager")
        for shape in shapes:
            for task in kernels.TASKS:
                name = f"bench_kernels.py::test_{task.name}[{shape.name}]"

                def measured(task: Any = task, shape: Shape = shape, name: str = name) -> Entry:
                    torch.compiler.reset()
                    found, skipped = task.find(kernels.DEVICE)
                    failures = result.broken(name)
                    try:
                        memory = kernels.peaks(task, found, shape, failures)
                        rows = kernels.measure(task, found, shape, memory, failures, rounds)
                    except DeviceLost as lost:
                        result.note_broken(name, lost)
                        raise
                    return kernels.shown(task, shape, rows, skipped)

                result.measure(name, measured)

    return run


def tune_part(result: PartResult, smoke: bool) -> None:
    """Sizes of the kernels' pieces; when all are found they go into the library's table."""
    import torch

    from bench.kernels import tune
    from bench.kernels.problems import Shape

    scale = tune.Scale()
    if smoke:
        scale = tune.Scale(
            blocks=((2048, 8), (4096, 8)),
            programs=(8, 2),
            fast_bytes=(80_000, 40_000),
            lowmem_bytes=(80_000, 40_000),
            rows=(2, 3),
            few_rows=(1,),
            columns=5000,
            shape=Shape("8 tokens", 8, 4099, 32, 48),
            rounds=3,
        )
    earlier = result.earlier("tune")
    sizes, _ = tune.tune(scale, earlier, lambda entry: result.save("tune", entry))
    if not smoke:
        tune.write_table({torch.cuda.get_device_name(): sizes}, tune.TABLE)


def precision_part(result: PartResult, smoke: bool) -> None:
    """Gradient errors, as bench/bench_kernels.py has them."""
    import torch

    from bench.kernels import precision

    shape = precision.Shape("smoke", 16, 2003, 32, 64) if smoke else precision.SHAPE
    for dtype in (torch.float32,) if smoke else precision.DTYPES:
        name = f"bench_kernels.py::test_precision[{dtype}]"
        result.measure(name, lambda dtype=dtype: precision.measure(dtype, shape))


def step_part(method: str) -> Callable[[PartResult, bool], None]:
    """Steps of Qwen3-VL-2B from 8B with random weights."""

    def run(result: PartResult, smoke: bool) -> None:
        from bench.steps import full_size, published_sizes

        name = f"step_{method}"
        with tempfile.TemporaryDirectory() as folder:
            if smoke:
                student, teacher = full_size.tiny_models(Path(folder))
                small: dict[str, Any] = dict(pairs=8, rows=1, columns=2, prompts=2, length=4)
                scale = full_size.Scale(
                    student=student, teacher=teacher, rollouts=2, steps=2, short=1, **small
                )
            else:
                folders = published_sizes.write(Path(folder))
                scale = full_size.Scale(
                    student=folders["Qwen/Qwen3-VL-2B-Instruct"],
                    teacher=folders["Qwen/Qwen3-VL-8B-Instruct"],
                )
            full_size.measure(method, scale, result, name)

    return run


def _kernels(name: str, pair: str, about: str) -> dict[str, Part]:
    """Two parts of a pair of models: few tokens, and many, of which not every peer has memory."""
    return {
        f"kernels_{name}": Part(
            about=f"kernels at 32 and 640 tokens, {about}",
            run=kernel_part(pair, FEW),
            usual_s=90,
        ),
        f"kernels_{name}_long": Part(
            about=f"kernels at 16,384 tokens, {about}",
            run=kernel_part(pair, MANY),
            usual_s=150,
        ),
    }


PARTS = {  # in the order of what they are worth
    "tests": Part(about="the tests marked gpu", run=gpu_tests, usual_s=120),
    "step_opd": Part(
        about="OPD steps of Qwen3-VL-2B from 8B, random weights, 8,192 video tokens",
        run=step_part("opd"),
        usual_s=150,
    ),
    **_kernels("2b", "Qwen3-VL 2B from 8B", "Qwen3-VL 2B from 8B"),
    "tune": Part(
        about="sizes of the kernels' pieces, into kernels/fused_kl/tuned.py",
        run=tune_part,
        usual_s=120,
    ),
    "step_grpo": Part(
        about="GRPO steps of Qwen3-VL-2B, random weights, 8,192 video tokens",
        run=step_part("grpo"),
        usual_s=90,
    ),
    "precision": Part(about="gradient errors against fp64", run=precision_part, usual_s=40),
    **_kernels("8b", "Qwen3-VL 8B from 32B", "Qwen3-VL 8B from 32B"),
    **_kernels("3b", "Qwen2.5-VL 3B from 7B", "Qwen2.5-VL 3B from 7B"),
}
