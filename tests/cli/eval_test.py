"""`olmax eval`."""

import json

from olmax.cli import main as cli
from olmax.cli.eval import Eval


def question(doc_id, gold):
    return [
        {
            "request_type": "loglikelihood",
            "request": {"context": f"the cat {doc_id}", "continuation": text},
            "doc_id": doc_id,
            "idx": idx,
            "label": gold,
        }
        for idx, text in enumerate([" sat", " mat", " the mat"])
    ]


def test_results_and_table(model_directory, tmp_path, capsys):
    folder = tmp_path / "requests" / "cats" / "val_rc"
    folder.mkdir(parents=True)
    rows = [row for doc_id in range(4) for row in question(doc_id, doc_id % 3)]
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "results.json"
    verb = Eval(str(model_directory), (str(tmp_path / "requests"),), str(output), limit=3)
    assert cli.run(verb) == 0
    found = json.loads(output.read_text())
    task = found["tasks"]["cats_val_rc"]
    assert task["primary_metric"] == "acc_per_char" and task["questions"] == 3
    assert set(task["metrics"]["acc_raw"]) == {"value", "stderr", "n"}
    assert task["metrics"]["chance"]["value"] == 1 / 3
    assert found["environment"]["versions"]["jax"]
    assert "cats_val_rc" in capsys.readouterr().out


def test_requests_that_are_not_there(model_directory, tmp_path, capsys):
    output = tmp_path / "results.json"
    assert cli.run(Eval(str(model_directory), (str(tmp_path / "none"),), str(output))) == 2
    assert "no request file there" in capsys.readouterr().err
    assert not output.exists()
