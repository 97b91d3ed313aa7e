"""Compare runs by their scores at equal steps and at equal device time:

    python -m opd.report RUN [RUN ...]

Compared are the evaluations during each run (`eval.every`); scores between them are interpolated.
Device time is the time of training, from decode-wait to optimizer, teacher and curriculum included;
evaluations and checkpoints are left out.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from opd.config.command_line import ends_in_one_line
from opd.errors import ConfigError
from opd.record.curve import SCORES, Curve, plot, shared


def read(run: Path) -> Curve:
    """Read the curve of a finished run; ConfigError where there is none."""
    path = run / "summary.json"
    try:
        points = json.loads(path.read_text())["curve"]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; is {run} a finished run?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a summary with a curve") from error
    return Curve(points)


def table(curves: Mapping[str, Curve]) -> str:
    """One row per run and score: at the start, at the end, at the steps of the shortest run, and at
    the device time of the cheapest run."""
    steps = min(curve.along("step")[-1] for curve in curves.values())
    seconds = min(curve.along("device_s")[-1] for curve in curves.values())
    width = max(map(len, [*curves, *SCORES.values()]))
    lines = []
    for score in shared(curves.values()):
        at = f"step {steps:.0f}", f"{seconds:.0f} s"
        head = ["start", "end", *at, "device s", "of it scoring"]
        lines.append(f"{SCORES[score]:<{width}}" + "".join(f"{cell:>15}" for cell in head))
        for name, curve in curves.items():
            spent = curve.seconds()[-1]
            cells = [curve.points[0][score], curve.points[-1][score]]
            cells += [curve.at(steps, score, "step"), curve.at(seconds, score, "device_s")]
            shown = ["-" if c is None else f"{c:.3f}" for c in cells]
            shown += [f"{spent:.0f}", f"{spent - curve.seconds(scoring=False)[-1]:.0f}"]
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>15}" for cell in shown))
    return "\n".join(lines)


@ends_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    """Run the command: print the table, and plot `report.png` into the first run's folder."""
    runs = [Path(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    if not runs or runs[0].name in ("-h", "--help"):
        raise ConfigError("usage: python -m opd.report RUN [RUN ...]")
    curves = {str(run): read(run) for run in runs}
    print(table(curves))
    path = runs[0] / "report.png"
    plot({name: [curve] for name, curve in curves.items()}, path)
    print(path)


if __name__ == "__main__":
    main()
