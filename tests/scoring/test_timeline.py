from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from opd.scoring.evaluation import EvaluationRow
from opd.scoring.timeline import timeline


def rows(number: int = 12) -> list[EvaluationRow]:
    """Row i has a tIoU of i / 10 up to the tenth; the last row has no readable answer."""
    answered = [
        EvaluationRow(
            id=f"q{i:02}",
            predicted=(0, i),
            windows=((0, i),),
            truth=((0, 10),),
            query=f"query {i}",
        )
        for i in range(1, number)
    ]
    lost = EvaluationRow(id="none", truth=((3, 4), (8, 9)), query="lost")
    return [*answered, lost]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments, **options):
        figures.append(self)
        return save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def titles(figure: Figure) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


def bars(figure: Figure, place: int) -> list[tuple[float, float, bool]]:
    """Start, end, and whether it is of the upper row, of every bar of an axis."""
    boxes = [
        path.get_extents() for drawn in figure.axes[place].collections for path in drawn.get_paths()
    ]
    return [(box.x0, box.x1, box.y0 >= 1) for box in boxes]


def test_the_worst_and_the_best_in_order(tmp_path: Path, drawn: list[Figure]) -> None:
    path = timeline(rows(), tmp_path / "t.png", worst=2, best=3)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert titles(drawn[0]) == [
        "tIoU 0.00  none  lost",
        "tIoU 0.10  q01  query 1",
        "tIoU 0.90  q09  query 9",
        "tIoU 0.91  q11  query 11",
        "tIoU 1.00  q10  query 10",
    ]
    assert bars(drawn[0], 0) == [(3, 4, True), (8, 9, True)]
    assert drawn[0].axes[0].get_yticklabels()[0].get_text() == "no answer"
    assert bars(drawn[0], 2) == [(0, 10, True), (0, 9, False)]
    assert drawn[0].axes[3].get_xlim() == (0, 11)  # no duration: until the last span


def test_none_twice_and_all_where_there_are_few(tmp_path: Path, drawn: list[Figure]) -> None:
    few = rows(4)
    for worst, best, number in ((8, 8, 4), (3, 3, 4), (4, 0, 4), (0, 2, 2), (2, 0, 2), (2, 2, 4)):
        timeline(few, tmp_path / "t.png", worst=worst, best=best)
        assert len(set(titles(drawn[-1]))) == len(drawn[-1].axes) == number


def test_windows_duration_and_odd_text(tmp_path: Path, drawn: list[Figure]) -> None:
    row = replace(
        rows()[4],
        windows=((0, 5), (20, 30)),
        duration_s=60,
        query="pays $5 \\frac{\n and $6_ for " + "x" * 200,
    )
    unrelated = EvaluationRow(id="u", right=True)
    timeline([row, unrelated], tmp_path / "t.png")
    assert bars(drawn[0], 0) == [(0, 10, True), (0, 5, False), (20, 30, False)]
    assert drawn[0].axes[0].get_xlim() == (0, 60)
    (title,) = titles(drawn[0])
    assert title.startswith("tIoU 0.50  q05  pays $5 \\frac{ and $6_ for x")
    assert title.endswith("x...") and len(title) < 150


def test_the_file_is_the_same_for_the_same_rows(tmp_path: Path) -> None:
    several = [*rows(4), replace(rows()[1], id="alike")]
    one = timeline(several, tmp_path / "1.png").read_bytes()
    assert timeline(several[::-1], tmp_path / "2.png").read_bytes() == one


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row has a true span to draw"):
        timeline([EvaluationRow(id="u")], tmp_path / "t.png")
    for worst, best in ((0, 0), (-1, 3)):
        with pytest.raises(ValueError, match=f"cannot draw {worst} worst and {best} best"):
            timeline(rows(), tmp_path / "t.png", worst=worst, best=best)
