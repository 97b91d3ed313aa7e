"""The command that evaluates: targets of every kind, stopped and gone on, official scores."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opd.data.synthetic.splits import ensure_split
from opd.evaluate import main
from opd.files import checksum
from opd.method import answering
from tests.engine.test_zero import torchrun
from tests.helpers import run

KEYS = ["threads=1", "eval.draws=1", "eval.batch_size=4", "sample.max_completion_length=16"]


@pytest.fixture
def annotations(videos: Path, tmp_path: Path) -> Path:
    """Three queries on each of four clips, as QVHighlights has them."""
    ensure_split(videos, "eval", 4)
    (tmp_path / "clips").symlink_to(videos / "eval")
    rows = []
    for number, path in enumerate(sorted((videos / "eval").glob("*.mp4"))[:4]):
        for k in range(3):
            window = [float(k + 1), float(k + 3)]
            rows.append({"qid": 10 * number + k, "query": f"the red circle {k}", "duration": 12})
            rows[-1] |= {"vid": path.stem, "relevant_windows": [window, [8, 10]]}
    file = tmp_path / "qvhighlights.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def keys_for(annotations: Path, run_dir: Path) -> list[str]:
    root = annotations.parent / "clips"
    return [*KEYS, f"data.eval={annotations}?root={root.resolve()}", f"run_dir={run_dir}"]


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(list(arguments))
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    return lines[-1].removeprefix("error: ")


def test_a_checkpoint_on_a_data_set(annotations, tmp_path, capsys):
    folder = tmp_path / "out"
    actual = result(capsys, "embedded:student", *keys_for(annotations, folder))
    assert actual["queries"] == 12 and actual["official"]["metrics"] == "qvhighlights"
    assert 0 <= actual["official"]["map"] <= 1
    stored = json.loads((folder / "evaluation.json").read_text())
    origin = stored["of"]
    assert origin["annotations"] == {str(annotations): checksum(annotations)}
    assert origin["prompt"]["grounding"] == "{query}. When?{video}"
    assert "draws: 1" in origin["config"] and "fps: 4.0" in origin["config"]
    assert origin["video_processor"]["size"] and origin["video_processor"]["patch_size"] == 16
    assert origin["weights"] and origin["versions"]["transformers"]
    assert stored["by"]["duration"]["<30 s"]["queries"] == 12
    low, high = stored["by"]["all"]["all"]["miou"]["interval"]
    assert low <= actual["miou"] <= high
    assert (folder / "evaluation.png").stat().st_size > 1000
    assert "exists already" in refused(capsys, "embedded:student", *keys_for(annotations, folder))


def test_a_stopped_evaluation_goes_on(annotations, tmp_path, capsys, monkeypatch):
    keys = [*keys_for(annotations, tmp_path / "whole"), "data.prompt=video_first"]
    whole = result(capsys, "embedded:student", *keys)
    keys[-2] = f"run_dir={tmp_path / 'stopped'}"
    forward, calls = answering.forward, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(len(arguments[1].examples))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(answering, "forward", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["embedded:student", *keys])
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("error: SIGINT: stopped\n")
    part = tmp_path / "stopped" / "evaluation.0.part"
    assert len(part.read_text().splitlines()) == 8
    with part.open("a") as file:
        file.write('{"id": "cut')
    message = refused(capsys, "embedded:student", *keys, "resume=auto", "seed=1")
    assert message.startswith("resume=auto: ") and "generated with other settings" in message
    again = result(capsys, "embedded:student", *keys, "resume=auto")
    assert calls == [4, 4, 4, 4], "the last batch alone is answered again"

    def rows(name: str) -> list[dict[str, Any]]:
        lines = (tmp_path / name / "evaluation.jsonl").read_text().splitlines()
        return sorted(map(json.loads, lines), key=lambda row: row["id"])

    assert rows("stopped") == rows("whole")
    for key in ("miou", "sampled_miou", "official", "queries"):
        assert (
            again[key] == pytest.approx(whole[key])
            if key != "official"
            else again[key] == whole[key]
        )
    assert not part.exists()


def test_stored_answers(annotations, tmp_path, capsys):
    rows = [json.loads(line) for line in annotations.read_text().splitlines()]
    answers = tmp_path / "answers.jsonl"

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        start, end = row["relevant_windows"][0]
        return {"id": row["qid"], "answer": f"It is in {start} - {end} seconds"}

    answers.write_text("".join(json.dumps(answer(row)) + "\n" for row in rows[:-3]))
    keys = keys_for(annotations, tmp_path / "out")
    main([str(answers), *keys])
    out, err = capsys.readouterr()
    actual = json.loads(out)
    assert actual["miou"] == pytest.approx(9 / 12) and actual["parse_failures"] == 3
    assert actual["official"]["recall@0.7"] == pytest.approx(9 / 12)
    assert actual["official"]["map"] == pytest.approx(9 / 12 / 2)  # one of two windows
    assert actual["another_form"] == 9
    # Only queries with one true span are in the file for TimeLens' scorer.
    assert json.loads((tmp_path / "out" / "timelens.json").read_text()) == {}
    assert "3 queries have no answer and count as wrong; 0 answers belong to no query" in err
    # Read strictly, an answer in another form than the prompt's names nothing.
    strict = result(capsys, str(answers), *keys, "overwrite=true", "data.reading=strict")
    assert strict["miou"] == 0 and strict["parse_failures"] == 12
    strict = result(
        capsys, str(answers), *keys, "overwrite=true", "eval.metrics=grounding", "eval.recall=above"
    )
    assert strict["official"]["recall@0.7"] == pytest.approx(9 / 12)
    answers.write_text('{"id": 1}\n')
    message = refused(capsys, str(answers), *keys, "overwrite=true")
    assert message == f"{answers}:1: not a row of id and answer: 'answer'"
    answers.write_text('{"id": "other", "answer": "x"}\n')
    message = refused(capsys, str(answers), *keys, "overwrite=true")
    assert message == f"{answers}: none of its 1 ids is among data.eval's"
    answers.unlink()
    message = refused(capsys, str(answers), *keys, "overwrite=true")
    assert message == f"{answers}: no such file of answers"


def test_a_score_explained_by_conventions(annotations, tmp_path, capsys):
    """Four of twelve queries, each with the true spans (k + 1, k + 3) and (8, 10) in 12 s."""
    rows = [json.loads(line) for line in annotations.read_text().splitlines()]
    said = [
        "From 8.0 to 10.0 seconds.",  # right
        "8.4 - 10.4 s",  # tIoU 1.6 / 2.4, in whole seconds 1, unreadable strictly
        "From 8.0 to 14.0 seconds.",  # 2 / 6, within the video 2 / 4
        "From 8.0 to 9.4 seconds.",  # 0.7 as printed, and 1 / 2 in whole seconds
    ]
    lines = [json.dumps({"id": r["qid"], "answer": a}) for r, a in zip(rows, said, strict=False)]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    keys = [str(tmp_path / "answers.jsonl"), *keys_for(annotations, tmp_path / "out")]
    keys += ["data.limit_eval=4", "--explain"]
    main([*keys, "data.reading=strict"])
    header, *table = capsys.readouterr().out.splitlines()
    assert header.split() == ["mIoU", "R@0.3", "R@0.5", "R@0.7", "unread", "change"]
    scores = {line[:24].strip(): [float(cell) for cell in line[24:].split()] for line in table}
    tious = {
        "as evaluated": (1, 2 / 3, 1 / 3, 0.7),
        "data.reading=strict": (1, 0, 1 / 3, 0.7),
        "eval.recall=above": (1, 2 / 3, 1 / 3, 0.7),
        "whole seconds": (1, 1, 1 / 3, 0.5),
        "cut to the video": (1, 2 / 3, 0.5, 0.7),
    }
    assert list(scores) == list(tious)  # the setting that was given is that of the second line
    first = sum(tious["as evaluated"]) / 4
    for name, values in tious.items():
        miou = sum(values) / 4
        assert scores[name][0] == pytest.approx(miou, abs=1e-4)
        change = [] if name == "as evaluated" else [pytest.approx(miou - first, abs=1e-4)]
        assert scores[name][5:] == change
        above = name == "eval.recall=above"
        reached = [sum(v > 0.5 if above else v >= 0.5 for v in values) / 4]
        assert scores[name][2:3] == reached
        assert scores[name][4] == (name == "data.reading=strict")
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["conventions"]["cut to the video"]["miou"] == pytest.approx(2.8666667 / 4)
    message = refused(capsys, *keys, "data.fps=1")
    assert message.startswith("data.fps=1: needs a model; ") and message.endswith(
        " is a file of answers"
    )
    assert refused(capsys, "a", *keys).startswith("--explain: takes one target; usage: ")
    assert refused(capsys, *keys, "runs/mine").startswith("--explain: takes one target; usage: ")


def test_a_changed_setting_is_evaluated_again(annotations, tmp_path, capsys):
    keys = [*keys_for(annotations, tmp_path / "out"), "data.limit_eval=2", "eval.draws=0"]
    main(["embedded:student", *keys, "--explain", "data.fps=1"])
    *_, changed = capsys.readouterr().out.splitlines()
    again = result(capsys, "embedded:student", *keys, "data.fps=1", f"run_dir={tmp_path / 'fps'}")
    assert changed.split()[:2] == ["data.fps=1", f"{again['miou']:.4f}"]
    assert (tmp_path / "out" / "data.fps=1" / "evaluation.json").is_file()


def test_targets_side_by_side(annotations, tmp_path, capsys):
    main(["embedded:student", "embedded:teacher", *keys_for(annotations, tmp_path / "both")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("embedded:student")
    assert lines[2].startswith("embedded:teacher") and "of 12" in lines[2]
    for name in ("embedded_student", "embedded_teacher"):
        assert (tmp_path / "both" / name / "evaluation.json").is_file()


def test_a_run_is_not_evaluated_on_what_it_trained_on(videos, annotations, tmp_path, capsys):
    root = (annotations.parent / "clips").resolve()
    text = f"{annotations}?root={root}&part="
    small = ["steps=1", "batch_size=2", "data.limit_eval=2", "eval.draws=0", "eval.teacher=false"]
    small += [f"data.train={text}train&holdout=0.5", f"data.eval={text}held_out&holdout=0.5"]
    run(videos, tmp_path / "run", *small)
    keys = [f"run_dir={tmp_path / 'out'}", f"data.eval={annotations}?root={root}"]
    keys.append("data.limit_eval=null")
    message = refused(capsys, str(tmp_path / "run"), *keys)
    assert message.startswith("data.eval: ") and "of its videos are trained on" in message
    assert result(capsys, str(tmp_path / "run"), *keys, "data.allow_leak=true")["queries"] == 12
    keys[1] = f"data.train={annotations}.gone"
    main([str(tmp_path / "run"), *keys, "overwrite=true"])
    message = f"overlap with the training data not checked: data.train: {annotations}.gone: no such"
    assert message in capsys.readouterr().err


def test_metrics_that_the_data_cannot_have(annotations, tmp_path, capsys):
    keys = [*keys_for(annotations, tmp_path / "out"), "eval.metrics=nextgqa", "data.limit_eval=2"]
    message = refused(capsys, "embedded:student", *keys)
    assert message.startswith("eval.metrics=nextgqa: none of 2 rows has options to choose from")
    shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_ranks_share_an_evaluation(annotations, tmp_path, capsys):
    keys = [*keys_for(annotations, tmp_path / "one"), "data.prompt=video_first"]
    alone = result(capsys, "embedded:student", *keys)
    keys[-2] = f"run_dir={tmp_path / 'two'}"
    process = torchrun(2, "-m", "opd.evaluate", "embedded:student", *keys)
    assert process.returncode == 0, process.stderr[-3000:]
    both = json.loads(process.stdout)
    assert both["queries"] == 12 and both["official"] == alone["official"]
    read = [(tmp_path / name / "evaluation.jsonl").read_text() for name in ("one", "two")]
    assert read[0] == read[1]
    assert not list((tmp_path / "two").glob("*.part"))
