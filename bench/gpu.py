"""Everything that needs a GPU, in parts, each a selection of pytest in a process of its own:
python -m bench.gpu [PART ...]

    --list             the parts, in the order of what they are worth
    --lease MINUTES    run those that fit into so many minutes; a further call goes on with what is
                       missing
    --smoke            the same parts, shrunken, on whatever machine this is; keeps nothing
    --wheels FOLDER    first install the wheels of a folder into a temporary place, without network

A part that fails, or that is stopped because it takes three times as long as usual, does not stop
the others. When it ends, bench/results/gpu_PART.json has its outcome, its benchmarks, GPU,
versions, commit and date; with $OUT set it is there too. Needs torch, triton, transformers, pytest,
pytest-benchmark and what opd imports; peers that are not there are named in the results. Where
these sources are no git checkout, BENCH_COMMIT says what they are.
"""

import argparse
import atexit
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

from bench import ROOT
from bench.record import RESULTS, infos, origin, write

NEEDED = ("triton", "transformers", "pytest", "pytest_benchmark", "omegaconf")
PEERS = ("liger_kernel", "trl")
GRACE_S = 20  # in which a part that is stopped reports what it has
REPORT_LENGTH = 3000  # characters of a failed test's report that are kept


@dataclass(frozen=True)
class Part:
    """Arguments of pytest, and the seconds that they are expected to take on an H100."""

    about: str
    usual_s: float
    selection: str


KERNELS, STEPS = "bench/bench_kernels.py -k", "bench/bench_full_size.py -k"
PARTS = {  # in the order of what they are worth
    "tests": Part("tests marked gpu", 120, "tests/fused_kl tests/models tests/generation -m gpu"),
    "step_opd": Part("OPD steps of Qwen3-VL-2B from 8B, random weights", 150, f"{STEPS} opd"),
    "kernels_2b": Part("kernels, Qwen3-VL 2B from 8B", 240, f"{KERNELS} '2B and not 32B'"),
    "tune": Part("sizes of the kernels' pieces", 120, f"{KERNELS} test_tune"),
    "step_grpo": Part("GRPO steps of Qwen3-VL-2B, random weights", 90, f"{STEPS} grpo"),
    "precision": Part("gradient errors against fp64", 40, f"{KERNELS} test_precision"),
    "kernels_8b": Part("kernels, Qwen3-VL 8B from 32B", 240, f"{KERNELS} 32B"),
    "kernels_3b": Part("kernels, Qwen2.5-VL 3B from 7B", 240, f"{KERNELS} 3B"),
}


def conditions() -> dict[str, Any]:
    """Where results of now come from: hardware, versions, commit, date and a digest of the
    sources."""
    now = origin()
    if not now["commit"]:
        fail("these sources are no git checkout: set BENCH_COMMIT to the commit that they are")
    digest = hashlib.sha256()
    for folder in ("bench", "kernels", "opd", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return now | {"sources": digest.hexdigest()[:12]}


def kept(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The record of a part, if it is of the same hardware, versions and sources; else empty."""
    record = json.loads(path.read_text()) if path.is_file() else {}
    same = all(record.get(key) == now.get(key) for key in ("hardware", "versions", "sources"))
    return record if same else {}


def run_part(
    part: Part, limit_s: float, path: Path | None, now: dict[str, Any], earlier: dict[str, Any]
) -> dict[str, Any]:
    """The record of a part, which runs for so many seconds at most. It is unfinished where the part
    was stopped or pytest broke; the benchmarks of such an `earlier` record are not repeated, unless
    they failed. It is written to a path, and into $OUT, as soon as the part has ended, even where
    this process is told to end; without a path it is a smoke run."""
    failed = " ".join(earlier.get("failed", ()))
    benchmarks = earlier.get("benchmarks", {}).items()
    resumed = {name: info for name, info in benchmarks if name.partition("::")[2] not in failed}
    environment = os.environ | {"BENCH_SMOKE": "1" if path is None else ""}
    begun, code = time.monotonic(), None
    with tempfile.TemporaryDirectory() as folder:
        report, outcomes = Path(folder, "benchmarks.json"), Path(folder, "outcomes.xml")
        command = [sys.executable, "-m", "pytest", *shlex.split(part.selection), "-s"]
        command += ["-p", "no:cacheprovider", f"--benchmark-json={report}"]
        command += [f"--junitxml={outcomes}", *(f"--deselect=bench/{name}" for name in resumed)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            print(f"stopped after {limit_s:.0f} s", flush=True)
        finally:
            end(process)
            finished = code in (0, 1, 5)  # 5: nothing was left to measure
            record: dict[str, Any] = now | {"finished": finished} | summarised(report, outcomes)
            record["benchmarks"] = {**resumed, **record["benchmarks"]}
            counts = (f"{len(record[kind])} {kind}" for kind in ("failed", "skipped"))
            how = "finished" if finished else "stopped" if code is None else f"exit code {code}"
            how += f" after {time.monotonic() - begun:.0f} s"
            record["outcome"] = ", ".join([how, f"{record['passed']} passed", *counts])
            if path and (finished or not kept(path, now).get("finished")):
                write(path, record)
                if out := os.environ.get("OUT"):
                    write(Path(out, path.name), record)
    return record


def end(process: subprocess.Popen[bytes]) -> None:
    """Let pytest report what it has, and then end it and all that it started; none may hold the
    device's memory."""
    for _ in range(2):  # Python loses a signal that comes while it ignores exceptions
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S / 2)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summarised(report: Path, outcomes: Path) -> dict[str, Any]:
    """What pytest reported: the benchmarks that ran to their end, how many tests passed, and why
    the others failed or were skipped. A process that was killed reports nothing."""
    benchmarks = infos(json.loads(report.read_text())) if report.is_file() else {}
    failed, skipped, passed = {}, {}, 0
    for suite in ElementTree.parse(outcomes).iter("testsuite") if outcomes.is_file() else ():
        others = (suite.attrib[kind] for kind in ("failures", "errors", "skipped"))
        passed += int(suite.attrib["tests"]) - sum(map(int, others))
        for case in suite.iter("testcase"):
            name = f"{case.get('classname')}.{case.get('name')}"
            for result in case:
                if result.tag in ("failure", "error"):
                    failed[name] = (result.text or "")[-REPORT_LENGTH:]
                elif result.tag == "skipped":
                    skipped[name] = result.get("message")
    ended = {name: info for name, info in benchmarks.items() if info}
    return {"passed": passed, "failed": failed, "skipped": skipped, "benchmarks": ended}


def run_all(names: Sequence[str], end_s: float, smoke: bool, again: bool) -> int:
    """Parts one after the other, within a lease those that fit; the exit code."""
    now = {} if smoke else conditions()
    outcomes: dict[str, str] = {}
    failed = False
    for name in names:
        usual_s, left_s = PARTS[name].usual_s, end_s - time.monotonic() - GRACE_S
        path = None if smoke else RESULTS / f"gpu_{name}.json"
        earlier = kept(path, now) if path and not again else {}
        if earlier.get("finished"):
            outcomes[name] = "finished before"
        elif left_s < usual_s:
            outcomes[name] = f"skipped: {max(0, left_s):.0f} s left, takes about {usual_s:.0f}"
        else:
            print(f"== {name}", flush=True)
            about, limit_s = {"command": f"python -m bench.gpu {name}"}, min(3 * usual_s, left_s)
            record = run_part(PARTS[name], limit_s, path, now | about, earlier)
            outcomes[name] = record["outcome"]
            failed |= bool(record["failed"]) or not record["finished"]
    print("\n== what became of each part")
    for name, outcome in outcomes.items():
        print(f"{name:12} {outcome}")
    return int(failed)


def install(folder: Path) -> None:
    """Install the wheels of a folder, and nothing else, for this process and those it starts."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        fail(f"{folder}: no wheels (*.whl) there")
    site = tempfile.mkdtemp(prefix="bench-wheels-")
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-compile", "--disable-pip-version-check", "--target", site]
    pip = subprocess.run([*command, *map(str, wheels)], capture_output=True, text=True)
    if pip.returncode:
        reason = (pip.stderr.strip() or pip.stdout.strip()).splitlines()[-1]
        fail(f"{folder}: its wheels cannot be installed: {reason}")
    sys.path.append(site)
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], site])


def fail(message: str) -> NoReturn:
    """End with one line."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="bench.gpu",
        usage=argparse.SUPPRESS,  # a mistake is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--lease", type=float, metavar="MINUTES")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:12} {part.about}" for name, part in PARTS.items()))
        return
    if unknown := [name for name in options.parts if name not in PARTS]:
        fail(f"{unknown[0]}: no such part (python -m bench.gpu --list)")
    if options.lease is not None and not 0 < options.lease < float("inf"):
        fail(f"--lease {options.lease}: not a positive number of minutes")
    if options.wheels:
        install(options.wheels)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        fail(f"not installed: {', '.join(missing)}; --wheels installs a folder of wheels")
    if missing := [name for name in PEERS if find_spec(name) is None]:
        print(f"peers that are not installed: {', '.join(missing)}", flush=True)
    import torch

    if not options.smoke and not torch.cuda.is_available():
        fail("no CUDA device; --smoke runs the parts shrunken, and keeps nothing")
    try:
        Path(os.environ.get("OUT") or RESULTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"OUT={os.environ['OUT']}: no folder for results: {error.strerror}")
    # A process that is told to end ends its part, too, and a part that is told so reports.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_s = begun + 60 * options.lease if options.lease else float("inf")
    raise SystemExit(run_all(options.parts or list(PARTS), end_s, options.smoke, not options.parts))


if __name__ == "__main__":
    main()
