"""`olmax ladder` from the outside."""

import json

import pytest
import tyro

from olmax import scaling
from olmax.cli.ladder import Fit, Ladder, Predict, Report, parse_number, parse_target
from olmax.errors import UserError

FITTED = [f"{size}-{k}xC.csv" for size in ("190M", "370M", "760M", "1B") for k in (1, 2, 5, 10)]


@pytest.fixture(scope="module")
def files(data_dir):
    folder = data_dir / "ladder" / "raw" / "ladder-runs"
    if not folder.is_dir():
        pytest.skip(f"no released ladder runs at {folder}")
    return [str(folder / name) for name in FITTED]


def test_numbers_and_targets():
    assert parse_number("7B", "") == 7e9
    assert parse_number("3.9T", "") == 3.9e12
    assert parse_number("6887575552", "") == 6887575552
    target = parse_target("big=7e9,4T,5e10")
    assert (target.name, target.parameters, target.tokens) == ("big", 7e9, 4e12)
    assert target.flops_per_token == 5e10
    for text in ("7B", "7B,x", "0,4T", "-1,4T", "7..2B,4T"):
        with pytest.raises(UserError, match="--target"):
            parse_target(text)


def test_fit_predict_report(tmp_path, files, capsys):
    fit = str(tmp_path / "ladder.json")
    target = "7B=6887575552,3945065873408"
    Fit(tuple(files), tasks=("piqa_val",), target=(target,), resamples=20, output=fit).run()
    assert "81.22" in capsys.readouterr().out
    Predict(fit, (target,), json=True).run()
    content = json.loads(capsys.readouterr().out)["7B"]
    row = content["predictions"]["piqa_val"]
    assert row["accuracy"] == pytest.approx(0.8122, abs=1e-4)
    assert row["low"] < row["accuracy"] < row["high"]
    assert content["warnings"] == []
    page = tmp_path / "ladder.html"
    Report(fit, tuple(files), target=(target,), output=str(page)).run()
    text = page.read_text()
    assert "Step 1: size and length to loss" in text and "data:image/svg+xml" in text
    with pytest.raises(UserError, match="is not among the runs"):
        Report(fit, (files[0].replace("1xC", "0.5xC"),), output=str(page)).run()


def test_a_ladder_without_three_sizes_warns(tmp_path, files, capsys):
    two = tuple(f for f in files if "190M" in f or "370M" in f)
    out = str(tmp_path / "two.json")
    Fit(two, tasks=("mmlu",), target=("7B,4T", "300M,5B"), resamples=0, output=out).run()
    warned = capsys.readouterr().err
    assert "2 sizes" in warned
    assert "fits within 1% of the best objective predict" in warned
    assert "inside the fitted range" in warned
    assert any("2 sizes" in w for w in scaling.load(out).fit.warnings)


def test_command_line_is_parsed():
    parsed = tyro.cli(Ladder, args=["predict", "x.json", "--target", "7B,4T"])
    assert parsed.command == Predict("x.json", ("7B,4T",))
    with pytest.raises(UserError, match="not both"):
        Fit(("a.csv",), config="c.json").run()
