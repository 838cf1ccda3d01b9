"""What the runners write, against files; regenerate with OLMAX_UPDATE_GOLDEN=1."""

import os
import pathlib
import shutil
import subprocess

import pytest

from olmax.errors import UserError
from olmax.launching import queued_resources, slurm, xpk
from olmax.launching.job import Job, parse_environment
from olmax.planning.topology import Topology

GOLDEN = pathlib.Path(__file__).parent / "golden"
COMMAND = (
    *("python", "-m", "experiments.olmo2", "pretrain", "--preset", "olmo2-7b"),
    *("--pretrain.checkpoint.directory", "{checkpoints}"),
)
V5P = Topology.parse("v5p:8x8x8")


def job(**kwargs):
    settings = dict(
        name="olmo2-7b",
        command=COMMAND,
        environment={"WANDB_PROJECT": "olmo 2"},
        bucket="gs://my-bucket",
        max_restarts=10,
    )
    return Job(**(settings | kwargs))


def cloud(**kwargs):
    return dict(project="my-project", zone="us-east5-a", spot=False) | kwargs


CASES = {
    "xpk": lambda: xpk.render(job(), V5P, cluster="pods", image=None, **cloud()),
    "xpk_image_two_slices": lambda: xpk.render(
        job(environment={}),
        Topology.parse("v6e:16x16", slices=2),
        cluster="pods",
        image="us-docker.pkg.dev/my-project/olmax/olmax:1",
        **cloud(spot=True),
    ),
    "queued_resources": lambda: queued_resources.render(
        job(), V5P, service_account=None, network=None, **cloud()
    ),
    "queued_resources_spot_two_slices": lambda: queued_resources.render(
        job(),
        Topology.parse("v5e:16x16", slices=2),
        service_account="trainer@my-project.iam.gserviceaccount.com",
        network="pods",
        **cloud(spot=True),
    ),
    "slurm": lambda: slurm.render(
        job(), 4, partition="gpu", account="research", time_limit="24:00:00", gpus_per_host=8
    ),
}


def text_of(rendered) -> str:
    parts = [f"==> {name}\n{text}" for name, text in rendered.files.items()]
    parts += [f"==> {step.what}\n{step.text}\n" for step in rendered.steps]
    parts += [f"==> later: {step.what}\n{step.text}\n" for step in rendered.afterwards]
    return "\n".join(parts)


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    text, path = text_of(CASES[case]()), GOLDEN / f"{case}.txt"
    if os.environ.get("OLMAX_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("case", CASES)
def test_scripts_and_commands_are_valid_shell(case, tmp_path):
    rendered = CASES[case]()
    scripts = [text for name, text in rendered.files.items() if not name.endswith(".env")]
    scripts += [step.text for step in (*rendered.steps, *rendered.afterwards)]
    for script in scripts:
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr


def test_the_shell_text_of_a_step_has_the_same_words():
    (step,) = CASES["xpk"]().steps
    printed = subprocess.run(
        ["bash", "-c", step.text.replace("xpk ", "printf '%s\\0' xpk ", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert tuple(printed.stdout.split("\0")[:-1]) == step.argv


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(name="Olmo_2"), "lower-case"),
        (dict(command=()), "no command"),
        (dict(bucket="my-bucket"), "gs://NAME"),
        (dict(bucket=None), "--bucket"),
        (dict(max_restarts=-1), "0 or more"),
        (dict(environment={"A B": "c"}), "not a variable name"),
    ],
)
def test_bad_jobs(kwargs, message):
    with pytest.raises(UserError, match=message):
        job(**kwargs)


def test_bad_settings_of_runners():
    with pytest.raises(UserError, match="--cluster"):
        xpk.render(job(), V5P, cluster=None, image=None, **cloud())
    with pytest.raises(UserError, match="--project and --zone"):
        queued_resources.render(job(), V5P, service_account=None, network=None, **cloud(zone=None))
    plain = job(bucket=None, command=("python", "train.py"))
    with pytest.raises(UserError, match="--bucket"):
        queued_resources.render(plain, V5P, service_account=None, network=None, **cloud())
    with pytest.raises(UserError, match="at least 1"):
        slurm.render(job(), 0, partition=None, account=None, time_limit=None, gpus_per_host=0)
    with pytest.raises(UserError, match="NAME=value"):
        parse_environment(("A",))
