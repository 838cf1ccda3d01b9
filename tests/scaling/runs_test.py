"""Reading runs, choosing rows, and mistakes in files."""

import numpy as np
import pandas as pd
import pytest

from olmax import scaling
from olmax.errors import UserError
from olmax.scaling.runs import final_value, run_from_frame, trailing_mean, trajectory
from olmax.scaling.tasks import MMLU_WEIGHTS, TASKS, Task, find_tasks

TASK = Task("t", "T", 0.25, ("eval/downstream_bpb/t_bpb",), ("eval/downstream/t_acc",))


def frame(rows=20, **columns) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "throughput/total_tokens": np.arange(1, rows + 1) * 1e9,
            "eval/downstream_bpb/t_bpb": np.linspace(2.0, 1.0, rows),
            "eval/downstream/t_acc": np.linspace(0.25, 0.6, rows),
        }
    )
    return table.assign(**columns)


def write(path, table) -> str:
    table.to_csv(path, index=False)
    return str(path)


def test_trailing_mean_averages_what_there_is():
    np.testing.assert_allclose(
        trailing_mean(np.array([1.0, 2, 3, 4, 5, 6, 7]), 3), [1, 1.5, 2, 3, 4, 5, 6]
    )


def test_rows_are_skipped_before_smoothing_and_rounded_up():
    run = run_from_frame(frame(rows=11), name="190M-1xC")
    x, y = trajectory(run, TASK, "task_loss", "rc_accuracy", skip=0.1, window=5)
    values = run.values(TASK, "task_loss")
    assert len(x) == len(y) == 9  # ceil(1.1) rows go
    assert x[0] == values[2]  # the skipped rows are not part of the first mean
    np.testing.assert_allclose(x[-1], values[-5:].mean())
    assert final_value(run, TASK, "task_loss", 5) == values[-5:].mean()


def test_the_released_ladder_pools_1401_points(runs):
    pooled = sum(
        len(trajectory(r, TASKS["mmlu"], "task_loss", "rc_accuracy", skip=0.1, window=5)[0])
        for r in runs
    )
    assert pooled == 1401
    assert [r.parameters for r in runs[:5]] == [190_354_176] * 4 + [371_262_464]
    assert runs[0].tokens[-1] == 3_812_622_336


def test_mmlu_is_weighted_by_the_rounded_shares(runs):
    task = TASKS["mmlu"]
    columns = [f"eval/downstream/mmlu_{g}_test_rc_5shot_len_norm" for g in MMLU_WEIGHTS]
    expected = sum(
        w * runs[0].table[c].iloc[-1] for w, c in zip(MMLU_WEIGHTS.values(), columns, strict=True)
    )
    assert runs[0].values(task, "rc_accuracy")[-1] == pytest.approx(expected, rel=1e-12)


def test_tokens_come_from_steps_where_they_must(target_runs):
    assert target_runs[1].tokens[-1] == 5_000_088_518_656


def test_own_tasks_are_found_by_their_columns():
    (task,) = find_tasks(frame().columns, {"t": 0.5})
    assert (task.name, task.chance) == ("t", 0.5)
    assert task.accuracy_columns == ("eval/downstream/t_acc",)


BAD = {
    "percent": (
        {"eval/downstream/t_acc": np.linspace(25, 60, 20)},
        r"runs/60M-1xC\.csv:2: column 'eval/downstream/t_acc' = 25 is above 1.*percent",
    ),
    "nan": (
        {"eval/downstream_bpb/t_bpb": [1.0] * 6 + [np.nan] + [1.0] * 13},
        r"60M-1xC\.csv:8: column 'eval/downstream_bpb/t_bpb' = nan is empty",
    ),
    "negative loss": (
        {"eval/downstream_bpb/t_bpb": [-1.0] * 20},
        r"60M-1xC\.csv:2: .* is not positive",
    ),
    "text": (
        {"eval/downstream_bpb/t_bpb": ["1.0"] * 3 + ["oops"] + ["1.0"] * 16},
        r"60M-1xC\.csv:5: column 'eval/downstream_bpb/t_bpb' is not a number: 'oops'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_name_file_line_and_column(case, tmp_path):
    columns, message = BAD[case]
    (tmp_path / "runs").mkdir()
    path = write(tmp_path / "runs" / "60M-1xC.csv", frame(**columns))
    (run,) = scaling.read_runs([path], sizes={"60M": 60_000_000})
    with pytest.raises(UserError, match=message):
        run.values(TASK, "task_loss")
        run.values(TASK, "rc_accuracy")


def test_missing_columns_and_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        scaling.read_run(tmp_path / "none.csv")
    path = write(tmp_path / "190M-1xC.csv", frame().drop(columns="eval/downstream/t_acc"))
    with pytest.raises(UserError, match=r"190M-1xC\.csv: no column 'eval/downstream/t_acc'"):
        scaling.read_run(path).values(TASK, "rc_accuracy")
    path = write(tmp_path / "370M-1xC.csv", frame().drop(columns="throughput/total_tokens"))
    with pytest.raises(UserError, match=r"no column 'throughput/total_tokens' and no '_step'"):
        scaling.read_run(path)
    path = write(tmp_path / "60M-2xC.csv", frame())
    with pytest.raises(UserError, match=r"how many parameters has size '60M'"):
        scaling.read_run(path)
    (tmp_path / "190M-5xC.csv").write_text("")
    with pytest.raises(UserError, match="not a CSV file"):
        scaling.read_run(tmp_path / "190M-5xC.csv")


def test_rows_out_of_order_and_runs_given_twice(tmp_path):
    table = frame()
    table.loc[5, "throughput/total_tokens"] = 1e9
    path = write(tmp_path / "190M-1xC.csv", table)
    with pytest.raises(UserError, match=r"190M-1xC\.csv:7: 1000000000 tokens are not more"):
        scaling.read_run(path)
    one = write(tmp_path / "370M-1xC.csv", frame())
    two = write(tmp_path / "760M-1xC.csv", frame())
    with pytest.raises(UserError, match="same content"):
        scaling.read_runs([one, two])


def test_columns_of_constants_hold_one_number(tmp_path):
    table = frame(parameters=[5e7] * 20, flops_per_token=[4e8] * 20)
    run = scaling.read_run(write(tmp_path / "own.csv", table))
    assert (run.size, run.parameters, run.flops_per_token) == ("own", 50_000_000, 4e8)
    table.loc[3, "parameters"] = np.nan
    with pytest.raises(UserError, match=r"own\.csv:5: column 'parameters' is nan"):
        scaling.read_run(write(tmp_path / "own.csv", table))
    table.loc[3, "parameters"] = 6e7
    with pytest.raises(UserError, match=r"own\.csv:5: column 'parameters' is 60000000"):
        scaling.read_run(write(tmp_path / "own.csv", table))


def test_sizes_are_given_for_files_of_any_name(tmp_path):
    path = write(tmp_path / "mine.csv", frame())
    (run,) = scaling.read_runs([path], sizes={"mine": 60_000_000})
    assert run.parameters == 60_000_000
    names = ["190M-1xC-rerun.csv", "3B-5xC_seed2.csv", "600M-0.5xC.csv"]
    files = [
        write(tmp_path / name, frame() * (1 - 0.01 * number)) for number, name in enumerate(names)
    ]
    found = scaling.read_runs(files)
    assert [run.size for run in found] == ["190M", "3.2B", "600M"]
    assert [run.parameters for run in found] == [190_354_176, 3_169_537_280, 597_382_464]


def test_configuration_of_the_release(released):
    fitted, targets = scaling.read_config(released / "configs" / "final.json")
    assert len(fitted) == 16
    assert [t.parameters for t in targets] == [6_887_575_552, 13_202_396_160]
