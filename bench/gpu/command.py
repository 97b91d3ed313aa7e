"""Everything that needs a GPU, in parts:
python -m bench.gpu [PART ...]

    --list             what there is, in the order of what it is worth
    --lease MINUTES    the parts in that order, within so many minutes; a further call goes on with
                       what is missing
    --smoke            the same parts, shrunken, on whatever machine this is; keeps nothing
    --wheels FOLDER    first install the wheels of a folder into a temporary place, without network

Each part leaves bench/results/gpu_PART.json with GPU, versions, commit and date, written after each
of its tasks, and marked partial until it is done; with $OUT set it is there too, beside tuned.py.
Needs torch, triton, transformers, pytest and what opd imports; peers that are not there
are named in the results. Where these sources are no git checkout, BENCH_COMMIT says what they are.
"""

import argparse
import atexit
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from bench import ROOT
from bench.failures import DeviceLost
from bench.gpu.part_result import PartResult, conditions, export, out_folder, state
from bench.gpu.parts import PARTS, Part
from bench.record import RESULTS, Refused, commit

LIMIT_S = 480  # of a part, without a lease
MARGIN_S = 15  # of a lease, left for copying what was measured
GRACE_S = 5  # for a part that is told to end
RESTART = 75  # exit code of a part whose device broke, and that can go on without who broke it
FEWEST_S = 1 / 3  # of a part's usual seconds, in which it is still begun
NEEDED = ("triton", "transformers", "pytest", "omegaconf")
PEERS = ("liger_kernel", "trl")


def result_path(name: str) -> Path:
    """The file of a part."""
    return RESULTS / f"gpu_{name}.json"


def run_part(name: str, smoke: bool) -> int:
    """Run one part in this process and keep its result; the exit code."""
    if not smoke and not commit():
        fail("these sources are no git checkout: set BENCH_COMMIT to the commit that they are")
    path = None if smoke else result_path(name)
    result = PartResult(path, f"python -m bench.gpu {name}")
    begun = time.perf_counter()
    try:
        PARTS[name].run(result, smoke)
    except DeviceLost as lost:
        print(f"{name}: the device was lost: {lost}", file=sys.stderr)
        return RESTART
    result.finish()
    seconds = time.perf_counter() - begun
    print(f"{name}: {seconds:.0f} s, {path or 'a smoke run, nothing is kept'}")
    failed = [test for entry in result.benchmarks.values() for test in entry.get("failed", ())]
    for test in failed:
        print(f"failed: {test}")
    for task, reason in result.errors.items():
        print(f"not measured: {task}: {reason}")
    return 1 if failed or result.errors else 0


def run_process(name: str, smoke: bool, limit_s: float) -> str:
    """Run a part in a process of its own, so that none holds another's memory, for so long at most;
    what became of it. A part whose device broke is begun again while there is time: each time it
    leaves out one more that broke it."""
    command = [sys.executable, "-m", "bench.gpu", name, *["--smoke"] * smoke]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    end = time.monotonic() + limit_s
    begun = time.monotonic()
    while True:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"stopped after {limit_s:.0f} s"
        finally:
            end_group(process)
        # Without a file nothing says who broke the device, and the next process would do the same.
        if code != RESTART or smoke:
            break
        print(f"== {name}, again", flush=True)
    seconds = time.monotonic() - begun
    return f"done in {seconds:.0f} s" if code == 0 else f"exit code {code} after {seconds:.0f} s"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part and all processes that it started; none may hold the device's memory."""
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def allotted(parts: dict[str, Part], remaining_s: float) -> dict[str, float]:
    """Seconds for each part that can be run in what is left of a lease, in the order given: those
    whose usual times fit one after the other, all stretched alike to fill it. The first of them may
    be begun in a third of its usual time, because what it measures until then is kept."""
    chosen: dict[str, float] = {}
    for name, part in parts.items():
        least_s = part.usual_s if chosen else FEWEST_S * part.usual_s
        if sum(chosen.values()) + least_s <= remaining_s:
            chosen[name] = part.usual_s
    return {name: s * remaining_s / sum(chosen.values()) for name, s in chosen.items()}


def run_all(names: Sequence[str], smoke: bool, lease: tuple[float, float] | None) -> int:
    """Parts one after the other; one that fails or takes too long does not stop the others. Within
    a lease, which begins at a time and lasts for so many minutes, complete parts are left out and
    all must end in time."""
    now = {} if smoke or not lease else conditions()
    outcomes: dict[str, str] = {}
    waiting = dict.fromkeys(names)
    for name in names if now else ():
        if state(result_path(name), now) == "complete":
            outcomes[name] = "complete before"
            del waiting[name]
    code = 0
    while waiting:
        limits = {next(iter(waiting)): float(LIMIT_S)}
        if lease:
            left_s = lease[0] + 60 * lease[1] - MARGIN_S - time.monotonic()
            limits = allotted({name: PARTS[name] for name in waiting}, left_s)
            for name in () if limits else waiting:
                usual_s = PARTS[name].usual_s
                outcomes[name] = f"skipped: {max(0, left_s):.0f} s left, takes about {usual_s:.0f}"
            if not limits:
                break
        name, limit_s = next(iter(limits.items()))
        print(f"== {name}: {limit_s:.0f} s at most", flush=True)
        outcomes[name] = run_process(name, smoke, limit_s)
        code = code or int(not outcomes[name].startswith("done"))
        if now and state(result_path(name), now) == "partial":
            outcomes[name] += "; partial: a further call goes on with it"
        del waiting[name]
    if now:
        export(RESULTS)
    print("\n== what became of each part")
    for name in names:
        print(f"{name:16} {outcomes[name]}")
    return code


def install(folder: Path) -> None:
    """Install the wheels of a folder, and nothing else, for this process and those it starts."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        fail(f"{folder}: no wheels (*.whl) there")
    site = tempfile.mkdtemp(prefix="bench-wheels-")
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-compile", "--disable-pip-version-check", "--target", site]
    done = subprocess.run([*command, *map(str, wheels)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        fail(f"{folder}: its wheels cannot be installed: {reason}")
    sys.path.append(site)
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], site])


def check_packages() -> None:
    """End with one line where a package is missing that the parts need; name missing peers."""
    wheels = next((path.parent for path in ROOT.glob(".whl/*.whl")), None)
    hint = f"; --wheels {wheels.relative_to(ROOT)} installs what is there" if wheels else ""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        fail(f"not installed: {', '.join(missing)}{hint}")
    if missing := [name for name in PEERS if find_spec(name) is None]:
        print(f"peers that are not installed: {', '.join(missing)}{hint}", flush=True)


def fail(message: str) -> NoReturn:
    """End with one line."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """One that ends with one line."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def minutes(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: not a positive number of minutes")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; a mistake in it ends with one line."""
    parser = Parser(
        prog="bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--list", action="store_true", help="what there is")
    parser.add_argument("--lease", type=minutes, metavar="MINUTES", help="stop in time")
    parser.add_argument("--smoke", action="store_true", help="shrunken, on any machine")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install these first")
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in PARTS:
            nearest = get_close_matches(name, PARTS, n=1, cutoff=0)[0]
            fail(f"{name}: no such part; the nearest is {nearest} (python -m bench.gpu --list)")
    return options


def main(arguments: list[str] | None = None) -> None:
    begun = time.monotonic()
    options = parse(arguments)
    if options.list:
        print("\n".join(f"{name:16} {part.about}" for name, part in PARTS.items()))
        return
    try:
        out_folder()
    except Refused as error:
        fail(str(error))
    if options.wheels:
        install(options.wheels)
    check_packages()
    import torch

    if not options.smoke and not torch.cuda.is_available():
        fail("no CUDA device; --smoke runs the parts shrunken, and keeps nothing")
    if not options.smoke and not commit():
        fail("these sources are no git checkout: set BENCH_COMMIT to the commit that they are")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: by the parts
    names = options.parts or list(PARTS)
    # A process that is told to end ends its part, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if len(names) == 1 and not options.lease:
        raise SystemExit(run_part(names[0], options.smoke))
    lease = (begun, options.lease) if options.lease else None
    raise SystemExit(run_all(names, options.smoke, lease))
