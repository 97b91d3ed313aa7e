"""Everything that needs a GPU, in parts that each end within 8 minutes:
python -m bench.gpu [PART ...]

    --list     what there is
    --smoke    the same parts, shrunken, on whatever machine this is; keeps nothing

Each part leaves bench/results/gpu_PART.json with GPU, versions, commit and date, and can be rerun
by itself. Needs torch, triton, transformers, pytest and what opd imports; peers that are not there
are named in the results. Where these sources are no git checkout, BENCH_COMMIT says what they are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from bench.protocol import RESULTS

ROOT = Path(__file__).parents[1]
LIMIT_S = 480

Benchmarks = dict[str, dict[str, Any]]  # by name, as in the files of bench.record


@dataclass(frozen=True)
class Part:
    """What `--list` says of it, and what it does; `run` is told whether to shrink."""

    about: str
    run: Callable[[bool], Benchmarks]


def gpu_tests(smoke: bool) -> Benchmarks:
    """The tests that are marked `gpu`, wherever they are."""
    found = sorted(
        path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()
    )
    files = [path for path in found if path.name == "test_gpu.py"] if smoke else found
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        done = subprocess.run([*command, *map(str, files)], cwd=ROOT)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with exit code {done.returncode}")
        suite = ElementTree.parse(report).getroot()[0]
    bad = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    bad += [case for case in suite.iter("testcase") if case.find("error") is not None]
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    outcome = {
        "passed": total - skipped - len(bad),
        "skipped": skipped,
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
        "seconds": float(suite.attrib["time"]),
    }
    return {"gpu_tests": outcome}


def kernel_part(pair: str) -> Callable[[bool], Benchmarks]:
    """All kernels at the shapes of a pair of models, as bench/bench_kernels.py has them."""

    def run(smoke: bool) -> Benchmarks:
        import torch

        from bench import kernels
        from bench.problems import Shape

        shapes = [Shape("8 tokens", 8, 4099, 32, 48)] if smoke else kernels.shapes_of(pair)
        rounds = 3 if smoke else kernels.ROUNDS
        made = {}
        for task in kernels.TASKS:
            found, skipped = task.find(kernels.DEVICE)
            for shape in shapes:
                torch.compiler.reset()
                failures: dict[str, str] = {}
                memory = kernels.peaks(task, found, shape, failures)
                rows = kernels.measure(task, found, shape, memory, failures, rounds)
                print("\n" + kernels.told(task, shape, rows, rounds), flush=True)
                name = f"bench_kernels.py::test_{task.name}[{shape.name}]"
                made[name] = {"shape": shape.name, "providers": rows, "skipped": skipped}
        return made

    return run


def tune_part(smoke: bool) -> Benchmarks:
    """Sizes of the kernels' pieces; the winners go into the library's table."""
    import torch

    from bench import tune
    from bench.problems import Shape

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
    sizes, told = tune.tune(scale)
    if not smoke:
        tune.write_table({torch.cuda.get_device_name(): sizes}, tune.TABLE)
    return {"tune": {"sizes": sizes._asdict(), "searches": told}}


def precision_part(smoke: bool) -> Benchmarks:
    """Gradient errors, as bench/bench_precision.py has them."""
    import torch

    from bench import precision

    if smoke:
        shape = precision.Shape("smoke", 16, 2003, 32, 64)
        tables = {str(torch.float32): precision.table(precision.DEVICE, torch.float32, shape)}
    else:
        tables = precision.measure()
    return {
        f"bench_precision.py::test_precision[{dtype}]": {"dtype": dtype, "rows": rows}
        for dtype, rows in tables.items()
    }


def step_part(method: str) -> Callable[[bool], Benchmarks]:
    """Steps of Qwen3-VL-2B from 8B with random weights."""

    def run(smoke: bool) -> Benchmarks:
        from bench import full_size
        from tests import sizes

        with tempfile.TemporaryDirectory() as folder:
            if smoke:
                student, teacher = full_size.tiny_models(Path(folder))
                small: dict[str, Any] = dict(pairs=8, rows=1, columns=2, prompts=2, length=4)
                scale = full_size.Scale(
                    student=student, teacher=teacher, rollouts=2, steps=2, short=1, **small
                )
            else:
                known = sizes.write(Path(folder))
                scale = full_size.Scale(
                    student=known["Qwen/Qwen3-VL-2B-Instruct"],
                    teacher=known["Qwen/Qwen3-VL-8B-Instruct"],
                )
            return {f"step_{method}": full_size.measure(method, scale)}

    return run


PARTS = {
    "tests": Part("the tests marked gpu", gpu_tests),
    "kernels_2b": Part("kernels, Qwen3-VL 2B from 8B", kernel_part("Qwen3-VL 2B from 8B")),
    "kernels_8b": Part("kernels, Qwen3-VL 8B from 32B", kernel_part("Qwen3-VL 8B from 32B")),
    "kernels_3b": Part("kernels, Qwen2.5-VL 3B from 7B", kernel_part("Qwen2.5-VL 3B from 7B")),
    "tune": Part("sizes of the kernels' pieces, into kernels/fused_kl/tuned.py", tune_part),
    "precision": Part("gradient errors against fp64", precision_part),
    "step_opd": Part("OPD steps of Qwen3-VL-2B from 8B, random weights", step_part("opd")),
    "step_grpo": Part("GRPO steps of Qwen3-VL-2B, random weights", step_part("grpo")),
}


def run_part(name: str, smoke: bool) -> int:
    """Run one part in this process and keep its result; the exit code."""
    from bench.record import origin

    known = origin()
    if not smoke and not known["commit"]:
        fail("these sources are no git checkout: set BENCH_COMMIT to the commit that they are")
    begun = time.perf_counter()
    benchmarks = PARTS[name].run(smoke)
    seconds = time.perf_counter() - begun
    if smoke:
        print(f"{name}: {seconds:.0f} s; a smoke run, nothing is kept")
    else:
        command = f"python -m bench.gpu {name}"
        result = {**known, "command": command, "seconds": seconds, "benchmarks": benchmarks}
        path = RESULTS / f"gpu_{name}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: {seconds:.0f} s, {path}")
    failed = [told for entry in benchmarks.values() for told in entry.get("failed", ())]
    for told in failed:
        print(f"failed: {told}")
    return 1 if failed else 0


def run_each(names: list[str], smoke: bool) -> int:
    """Several parts, each in a process of its own, so that none holds another's memory; one that
    fails or takes too long does not stop the rest."""
    outcomes = {}
    for name in names:
        command = [sys.executable, "-m", "bench.gpu", name, *["--smoke"] * smoke]
        print(f"== {name}", flush=True)
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=LIMIT_S).returncode
            outcomes[name] = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            outcomes[name] = f"stopped after {LIMIT_S} s"
    for name, outcome in outcomes.items():
        print(f"{name:12} {outcome}")
    return int(any(outcome != "done" for outcome in outcomes.values()))


def fail(told: str) -> NoReturn:
    """End with one line."""
    print(f"error: {told}", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--list", action="store_true", help="what there is")
    parser.add_argument("--smoke", action="store_true", help="shrunken, on any machine")
    asked = parser.parse_args(arguments)
    if asked.list:
        print("\n".join(f"{name:12} {part.about}" for name, part in PARTS.items()))
        return
    for name in asked.parts:
        if name not in PARTS:
            nearest = get_close_matches(name, PARTS, n=1, cutoff=0)[0]
            fail(f"{name}: no such part; the nearest is {nearest} (python -m bench.gpu --list)")
    import torch

    if not asked.smoke and not torch.cuda.is_available():
        fail("no CUDA device; --smoke runs the parts shrunken, and keeps nothing")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: by the parts
    names = asked.parts or list(PARTS)
    code = run_part(names[0], asked.smoke) if len(names) == 1 else run_each(names, asked.smoke)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
