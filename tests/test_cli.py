"""The command line as a user meets it: what works, and one clear line for what does not."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "network.width=8",
    "network.blocks=1",
    "network.heads=2",
    "training.steps=6",
    "training.batch_size=8",
    "training.log_every=2",
    "training.checkpoint_every=3",
    "training.evaluate_every=100",
    "likelihood.max_samples=4",
    "likelihood.solver.nodes=12",
    "sampler.steps=2",
    "tracking=none",
]
ENDLESS = [*TINY, "training.steps=100000", "training.log_every=1"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
}


def run(*arguments, cwd, env=None):
    """`python run.py ARGUMENTS` in the directory ``cwd``; with ``env``, in a new interpreter."""
    if env is None:
        return zygote().run(arguments, cwd)
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**ENVIRONMENT, **env},
    )


def at_start(folder, code):
    """The environment in which a new interpreter runs ``code`` before anything else."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def without(package, folder):
    """The environment in which ``package`` cannot be imported."""
    return at_start(folder, f"import sys; sys.modules['{package}'] = None")


class Zygote:
    """A process that has paid for the imports and forks for each run, see zygote.py."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "zygote.py"), str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def run(self, arguments, cwd, **more):
        with tempfile.TemporaryDirectory() as folder:
            streams = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
            request = {"script": str(ROOT / "run.py"), "arguments": arguments, "cwd": str(cwd)}
            request |= streams | more | {"env": ENVIRONMENT | more.get("env", {})}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            # as bytes: read as text, a carriage return would pass for the end of a line
            texts = {name: Path(path).read_bytes().decode() for name, path in streams.items()}
        return subprocess.CompletedProcess(arguments, code, **texts)


@functools.cache
def zygote():
    """One for each process that runs tests; it ends with it, when its stdin closes."""
    return Zygote()


@pytest.fixture
def start(tmp_path):
    """Starts `python run.py ARGUMENTS` in ``tmp_path``; the end of the test ends it too."""
    processes = []

    def started(*arguments):
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "run.py"), *arguments],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=ENVIRONMENT,
            )
        )
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def ended(process):
    """What a started process printed, and its exit code, once it ends."""
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_until(holds):
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def refused(result, *words):
    """One line on stderr that says ``words``, exit code 1, no traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    message = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(message) == 1, result.stderr
    for word in words:
        assert word in message[0], message[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny finished run; its directory and what it printed on both streams."""
    folder = tmp_path_factory.mktemp(
        "trained run, ünïcode"
    )  # spaces and Unicode in the path: fault 46
    result = run("mode=train", *TINY, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def the_run(folder):
    return folder / "runs" / "digits-vp-unet"


def logged_iterations(folder):
    rows = map(json.loads, (the_run(folder) / "metrics.jsonl").read_text().splitlines())
    return [row["train/iteration"] for row in rows if "train/loss" in row]


def test_train_prints_bits_per_dim_with_its_error_and_where_to_look(trained):
    folder, printed = trained
    assert "± " in printed.stdout and "bits/dim" in printed.stdout
    assert f"report: {Path('runs/digits-vp-unet/report.html')}" in printed.stdout
    for name in (
        "report.html",
        "metrics.jsonl",
        "config.yaml",
        "likelihood.json",
        "samples/grid-00000006.png",
    ):
        assert (the_run(folder) / name).is_file(), name
    (row,) = json.loads((the_run(folder) / "likelihood.json").read_text())
    assert (
        row["metric"] == "bits_per_dim" and row["standard_error"] > 0 and row["num_samples"] == 4
    )
    assert not list(folder.glob("outputs")) and not list(folder.glob("multirun"))


def test_away_from_a_terminal_there_are_no_bars_and_no_escape_codes(trained):
    _, printed = trained
    for text in (printed.stdout, printed.stderr):
        assert not [mark for mark in ("\x1b", "\r", "%|", "it/s") if mark in text], text


def test_likelihood_and_sample_use_the_newest_checkpoint_of_the_run(trained):
    folder, _ = trained
    before = (the_run(folder) / "config.yaml").read_bytes()
    scored = run(
        "mode=likelihood",
        "likelihood.max_samples=5",
        "likelihood.solver.nodes=12",
        cwd=folder,
    )
    assert scored.returncode == 0, scored.stderr
    assert "step-00000006.pt" in scored.stdout and "bits/dim" in scored.stdout
    (array,) = the_run(folder).glob("likelihood-00000006-first-5-??????.npz")
    values = np.load(array)
    assert values["bits_per_dim"].shape == (5,) and np.isfinite(values["bits_per_dim"]).all()

    drawn = run(
        "mode=sample",
        "sampler=ddim",
        "sampler.steps=3",
        "mode.num_samples=5",
        "mode.batch_size=2",
        cwd=folder,
    )
    assert drawn.returncode == 0, drawn.stderr
    (file,) = (the_run(folder) / "samples").glob("samples-00000006-ddim-4-*.npz")
    about = f"{file.stem.partition('-')[2]}.png"
    assert {path.name for path in file.parent.glob("*-ddim-*.png")} == {
        f"grid-{about}",
        f"strip-{about}",
    }
    page = (the_run(folder) / "report.html").read_text()
    assert "iteration 6: ddim, 3 steps, 4 evaluations, eta 0" in page
    samples = np.load(file)
    assert samples["samples"].shape == (5, 1, 8, 8) and samples["samples"].dtype == np.uint8
    assert int(samples["nfe"]) == 4 and len(samples["seeds"]) == 5
    assert (the_run(folder) / "config.yaml").read_bytes() == before, (
        "no other mode overwrites the training config"
    )


def test_samples_of_a_network_are_the_same_whatever_the_batch(trained):
    folder, _ = trained
    choices = ["mode=sample", "sampler=ancestral", "sampler.steps=4", "mode.num_samples=9"]
    drawn = []
    for batch_size in (7, 3):
        result = run(*choices, f"mode.batch_size={batch_size}", cwd=folder)
        assert result.returncode == 0, result.stderr
        (file,) = (the_run(folder) / "samples").glob("samples-00000006-ancestral-5-*.npz")
        drawn.append(np.load(file)["samples"])
        file.unlink()
    assert (drawn[0] == drawn[1]).all()
    assert len(np.unique(drawn[0], axis=0)) == 9, "each from noise of its own"


def test_more_steps_follow_the_same_path_and_less_heat_stays_nearer_the_middle(trained):
    folder, _ = trained
    drawn = {}
    for name, *settings in (
        ("few", "sampler.steps=20"),
        ("more", "sampler.steps=40"),
        ("other", "sampler.steps=20", "seed=1"),
        ("cool", "sampler.steps=20", "mode.temperature=0.01", "mode.precision=bfloat16"),
    ):
        shared = ["mode=sample", "sampler=dpmpp_sde", "mode.num_samples=6", "tracking=none"]
        result = run(*shared, *settings, cwd=folder)
        assert result.returncode == 0, result.stderr
        file = max((the_run(folder) / "samples").glob("*.npz"), key=lambda f: f.stat().st_mtime_ns)
        drawn[name] = np.load(file)["samples"].astype(float)
        file.unlink()

    far = np.abs(drawn["few"] - drawn["other"]).mean()
    assert np.abs(drawn["few"] - drawn["more"]).mean() < 0.4 * far
    spread = {name: values.std(axis=0).mean() for name, values in drawn.items()}
    assert spread["cool"] < 0.3 * spread["few"]


def test_a_trajectory_is_captured_on_a_gpu_alone(trained):
    folder, _ = trained
    asked = ["mode=sample", "mode.cuda_graph=true", "device=cpu"]
    refused(run(*asked, cwd=folder), "mode.cuda_graph=true needs a GPU", "device=cpu")
    refused(run(*asked, "sampler=adaptive", cwd=folder), "needs a GPU")


def test_the_network_is_rebuilt_from_the_config_stored_with_the_checkpoint(trained):
    folder, _ = trained  # trained with width 8; the default is wider
    result = run("mode=sample", "mode.num_samples=2", "sampler.steps=1", cwd=folder)
    assert result.returncode == 0, result.stderr


def test_a_checkpoint_of_another_run_is_scored_into_a_directory_that_was_not_there(
    trained, tmp_path
):
    (checkpoint,) = (the_run(trained[0]) / "checkpoints").glob("step-00000006.pt")
    arguments = [f"checkpoint='{checkpoint}'", "run.name=mine", *TINY[7:]]
    result = run("mode=likelihood", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    mine = tmp_path / "runs" / "mine"
    (row,) = json.loads((mine / "likelihood.json").read_text())
    assert row["checkpoint"] == str(checkpoint)
    (values,) = mine.glob("likelihood-00000006-of-digits-vp-unet-first-4-??????.npz")
    assert np.load(values)["bits_per_dim"].shape == (4,)
    assert "No evaluation yet" in (mine / "report.html").read_text()


def test_what_is_made_from_a_checkpoint_goes_to_its_run(trained, tmp_path):
    another = tmp_path / "elsewhere" / "another"
    shutil.copytree(the_run(trained[0]) / "checkpoints", another / "checkpoints")
    lone = shutil.copy(another / "checkpoints" / "step-00000006.pt", tmp_path / "lone.pt")
    arguments = ["mode=sample", "mode.num_samples=2", "sampler.steps=1", "seed=7", "tracking=none"]
    for checkpoint, home in (
        ("elsewhere/another/checkpoints/step-00000006.pt", another),
        (lone, tmp_path / "runs" / "lone"),
    ):
        result = run(*arguments, f"checkpoint={checkpoint}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        (file,) = (home / "samples").glob("samples-*.npz")
        assert len(np.load(file)["samples"]) == 2
    assert not the_run(tmp_path).exists()


def test_other_seeds_and_numbers_of_samples_are_kept_beside_each_other(trained, tmp_path):
    shutil.copytree(the_run(trained[0]) / "checkpoints", the_run(tmp_path) / "checkpoints")
    for number, seed in ((2, 0), (3, 0), (3, 1), (3, 1)):
        arguments = [
            "mode=sample",
            f"mode.num_samples={number}",
            "sampler.steps=1",
            f"seed={seed}",
        ]
        result = run(*arguments, "tracking=none", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert len(list((the_run(tmp_path) / "samples").glob("*.npz"))) == 3


@pytest.mark.parametrize("mode", ["likelihood", "sample"])
def test_only_training_starts_fresh(trained, mode):
    refused(run(f"mode={mode}", "run.fresh=true", cwd=trained[0]), "run.fresh=true", "mode=train")


def test_the_same_command_again_says_that_the_run_is_finished(trained):
    folder, _ = trained
    result = run("mode=train", *TINY, cwd=folder)
    assert result.returncode == 0 and "already finished" in result.stdout


def test_where_nothing_goes_on_nothing_is_said_to_go_on(trained):
    folder, _ = trained
    before = (the_run(folder) / "run.json").read_bytes()
    other = ["training.steps=4", "training.lr=1e-2", "resume.allow_change=[training.lr]"]
    result = run("mode=train", *TINY, *other, cwd=folder)
    assert result.returncode == 0, result.stderr
    (said,) = result.stdout.splitlines()
    assert said.startswith("already finished: ") and "has 6 iterations" in said
    assert (the_run(folder) / "run.json").read_bytes() == before


def test_other_choices_in_the_same_directory_are_listed_and_refused(trained):
    folder, _ = trained
    refused(
        run("mode=train", *TINY, "training.lr=0.5", cwd=folder),
        "training.lr: 0.003 -> 0.5",
        "run.fresh=true",
    )


def test_fresh_sets_each_earlier_run_aside_and_loses_none_within_a_second(trained, tmp_path):
    shutil.copytree(the_run(trained[0]), the_run(tmp_path))
    environment = at_start(tmp_path, "import time; time.strftime = lambda *_: 'this-second'")
    for steps in (1, 2):
        again = [*TINY, f"training.steps={steps}", "training.lr=0.001", "run.fresh=true"]
        result = run(*again, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
    kept = (tmp_path / "runs").glob("digits-vp-unet.before-this-second-*")
    newest = [max((folder / "checkpoints").glob("*.pt")).name for folder in kept]
    assert sorted(newest) == ["step-00000001.pt", "step-00000006.pt"]
    assert (the_run(tmp_path) / "checkpoints" / "step-00000002.pt").is_file()


def test_a_killed_run_goes_on_and_ends_with_the_same_weights_to_the_bit(tmp_path, trained):
    whole = torch.load(the_run(trained[0]) / "checkpoints" / "step-00000006.pt", weights_only=True)
    result = run("mode=train", *TINY, "training.checkpoint_every=2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for newest in (the_run(tmp_path) / "checkpoints").glob("step-00000006.pt*"):
        newest.unlink()  # as after a SIGKILL between iterations 4 and 6
    result = run("mode=train", *TINY, "training.checkpoint_every=2", cwd=tmp_path)
    assert result.returncode == 0 and "iteration 4" in result.stdout, result.stderr + result.stdout
    again = torch.load(the_run(tmp_path) / "checkpoints" / "step-00000006.pt", weights_only=True)
    for part in ("model", "ema"):
        for name, weight in whole[part].items():
            assert bool((again[part][name] == weight).all()), name
    steps = logged_iterations(tmp_path)
    assert steps == sorted(set(steps)), "no iteration twice"


def test_a_tracker_that_raises_in_every_call_changes_no_weight(tmp_path, trained):
    broken = "tracking._target_=broken_tracker.Broken"
    allowed = {"SCORE_SDE_ALLOW": "broken_tracker"}
    result = zygote().run(["mode=train", *TINY, broken], tmp_path, env=allowed)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the wire was cut") == 1 and "switched off" in result.stderr
    ours, theirs = (
        torch.load(the_run(folder) / "checkpoints" / "step-00000006.pt", weights_only=True)
        for folder in (tmp_path, trained[0])
    )
    for part in ("model", "ema"):
        for name, weight in theirs[part].items():
            assert bool((ours[part][name] == weight).all()), name


def test_sigterm_finishes_the_step_saves_and_exits_with_143(tmp_path, start):
    process = start(*ENDLESS)
    wait_until((the_run(tmp_path) / "metrics.jsonl").exists)
    process.terminate()
    result = ended(process)
    assert result.returncode == 143, result.stdout + result.stderr
    assert list((the_run(tmp_path) / "checkpoints").glob("step-*.pt"))
    assert json.loads((the_run(tmp_path) / "run.json").read_text())["state"] == "stopped"


def test_a_second_trainer_on_one_directory_is_told_who_holds_it(tmp_path):
    import fcntl

    the_run(tmp_path).mkdir(parents=True)
    with open(the_run(tmp_path) / "lock", "w") as lock:
        lock.write("PID 4711 on somewhere since 2026-01-01 00:00:00")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(run(*TINY, cwd=tmp_path), "locked by PID 4711 on somewhere", "run.name")
    assert run(*TINY, cwd=tmp_path).returncode == 0, "a lock whose owner is gone is taken over"


def test_of_two_equal_commands_at_the_same_time_one_trains_and_the_other_says_so(tmp_path, start):
    pair = [start(*ENDLESS), start(*ENDLESS)]  # neither can be done before the other comes
    wait_until(lambda: any(process.poll() is not None for process in pair))
    loser, winner = sorted(pair, key=lambda process: process.poll() is None)
    refused(ended(loser), "locked by", "run.name")
    wait_until((the_run(tmp_path) / "metrics.jsonl").exists)
    refused(run(*ENDLESS, cwd=tmp_path), f"locked by PID {winner.pid} on ", "run.name")
    winner.terminate()
    result = ended(winner)
    assert result.returncode == 143, result.stdout + result.stderr
    steps = logged_iterations(tmp_path)
    assert steps == list(range(1, len(steps) + 1)), "one trainer wrote, undisturbed"


def test_three_runs_started_in_the_same_second_get_three_directories(tmp_path, start):
    processes = [start(f"sde={sde}", *TINY, "training.steps=2") for sde in ("vp", "ve", "edm")]
    for result in map(ended, processes):
        assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "digits-edm-unet",
        "digits-ve-unet",
        "digits-vp-unet",
    ]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sde=vpp"], ["vpp", "subvp", "ve"]),
        (["experiment=digits_bset"], ["digits_bset", "digits_best"]),
        (["sde._target_=sde_lib.VPSD"], ["sde_lib has no VPSD; did you mean VPSDE?"]),
        (["mode=trian"], ["trian", "likelihood", "sample", "train"]),
        (["trian.lr=1"], ["trian.lr", "did you mean training.lr?"]),
        (["+trainng.lr=1"], ["did you mean training.lr"]),
        (["training.lr=abc"], ["lr", "'abc'", "> 0"]),
        (["training.lr=-1"], ["lr=-1", "> 0"]),
        (["training.lr=nan"], ["lr=nan", "> 0"]),
        (["training.lr=0"], ["lr=0", "> 0"]),
        (["training.steps=1.5"], ["steps", "whole number", "1.5"]),
        (["sampler=npr_ddpm"], ["variance=npr", "mode=train_variance mode.kind=npr"]),
        (["sampler=analytic_optimal"], ["variance=analytic", "mode=calibrate"]),
        (["mode=train_variance", "mode.kind=nrp"], ["one of learned, npr, sn", "'nrp'"]),
        (["sde.beta_min=30"], ["0 < beta_min < beta_max", "30"]),
        (["sde=ve", "sde.sigma_min=0"], ["sigma_min", "> 0"]),
        (["sde.t_min=2"], ["t_min < t_max", "2"]),
        (["sde.t_min=0"], ["t_min", "> 0"]),
        (["training.batch_size=0"], ["batch_size", ">= 1"]),
        (["training.batch_size=2000"], ["batch_size=2000", "1437"]),
        (["sampler.steps=0"], ["steps", ">= 1"]),
        (["likelihood.solver.nodes=0"], ["nodes", ">= 8"]),
        (["likelihood.budget=-1"], ["budget", "> 0"]),
        (["likelihood=adaptive", "likelihood.solver.rtol=0"], ["rtol", "1e-12"]),
        (["likelihood=adaptive", "likelihood.solver.atol=-1"], ["atol", "1e-12"]),
        (["sampler=adaptive", "sampler.method=rk99"], ["dopri5", "rk99"]),
        (
            ["sampler=torchsde", "sampler.method=reversible_heun"],
            ["reversible_heun", "unstable", "srk"],
        ),
        (["sampler.stesp=3"], ["did you mean sampler.steps?"]),
        (["sampler=heun", "+sampler.gamma=3"], ["gamma", "it takes steps, grid, denoise, churn"]),
        (["+lr=1"], ["+lr adds a key that nothing reads; there is training.lr"]),
        (["checkpoint=step-00000001.pt"], ["is for mode=likelihood and mode=sample"]),
        (["sampler=adaptive", "sampler.rtol=1e-10"], ["rtol", "5.96"]),
        (["sde._target_=os.system"], ["os.system", "refused"]),
        (["sde._target_=sde_lib.validation.math.exp"], ["refused"]),
        (["device=cuda:7"], ["cuda:7", "cpu"]),
        (["device=tpu"], ["tpu", "cpu"]),
        (["seed=-1"], ["seed"]),
        (["data=arrays"], ["data.path"]),
        (["data=two_moons", "network=unet"], ["network=mlp"]),
        (
            ["sampler=heun", "sampler.grid._target_=sde_lib.grids.Subsequence"],
            ["Subsequence", "DiscreteSDE"],
        ),
        (["run.root=/proc/nowhere"], ["run.root"]),
        (["data=mnist", "data.root=/nowhere"], ["train-images-idx3-ubyte", "data.root"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_1(tmp_path, arguments, words):
    refused(run("mode=train", "tracking=none", *arguments, cwd=tmp_path), *words)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.pt")), (
        "nothing was started"
    )


def test_thousand_may_be_written_1e3(tmp_path):
    result = run(
        *[a for a in TINY if "training.steps" not in a], "training.steps=0.4e1", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert (the_run(tmp_path) / "checkpoints" / "step-00000004.pt").is_file()


@pytest.mark.parametrize("mode", ["likelihood", "sample"])
def test_before_any_training_the_remedy_is_named(tmp_path, mode):
    refused(run(f"mode={mode}", cwd=tmp_path), "no checkpoint at", "mode=train", "checkpoint=PATH")


def test_a_run_directory_that_is_a_file_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "runs").mkdir()
    the_run(tmp_path).write_text("in the way")
    refused(run(*TINY, cwd=tmp_path), "run directory", "run.name=NAME")


def test_stored_config_with_a_foreign_target_is_refused_and_nothing_is_executed(trained, tmp_path):
    source = the_run(trained[0]) / "checkpoints" / "step-00000006.pt"
    state = torch.load(source, weights_only=True)
    config = json.loads(state["config"])
    config["network"] = {"_target_": "os.mkdir", "path": str(tmp_path / "marker")}
    torch.save({**state, "config": json.dumps(config)}, tmp_path / "evil.pt")
    refused(
        run("mode=sample", f"checkpoint={tmp_path / 'evil.pt'}", cwd=tmp_path),
        "network._target_=os.mkdir",
        "refused",
    )
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("ema"), "holds no weights"),
        (lambda state: state.update(config=json.dumps({"sde": {}})), "configuration lacks"),
        (lambda state: state.pop("config"), "configuration is missing"),
    ],
    ids=["no weights", "no network", "no configuration"],
)
def test_a_checkpoint_that_lacks_a_part_says_which(trained, tmp_path, change, words):
    source = the_run(trained[0]) / "checkpoints" / "step-00000006.pt"
    state = torch.load(source, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "lacking.pt")
    refused(run("mode=sample", f"checkpoint={tmp_path / 'lacking.pt'}", cwd=tmp_path), words)


def imported(result):
    """The modules that a run with PYTHONPROFILEIMPORTTIME imported."""
    timed = (line for line in result.stderr.splitlines() if "import time" in line)
    modules = {line.split("|")[-1].strip() for line in timed}
    assert "pathlib" in modules, "else nothing was recorded"
    return modules


def test_help_lists_every_choice_with_its_line_and_imports_neither_torch_nor_hydra(tmp_path):
    result = run("--help", cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0
    lines = {line.strip().lstrip("*") for line in result.stdout.splitlines()}
    for file in (ROOT / "conf").glob("*/*.yaml"):
        first = next(f for f in file.read_text().splitlines() if not f.startswith("# @package"))
        assert f"{file.stem:<20}{first[2:]}" in lines
    stars = [line for line in result.stdout.splitlines() if line.startswith(" *")]
    assert " *vp " in "\n".join(stars) and " *digits " in "\n".join(stars) and len(stars) == 12
    assert not imported(result) & {"torch", "hydra", "omegaconf", "matplotlib", "wandb"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "advice", "asked"),
    [
        ("torchdiffeq", "torchdiffeq: pip install '.[solvers]' in ", ["sampler=adaptive"]),
        ("hydra", "hydra-core: pip install '.[run]' in ", []),
        ("matplotlib", "matplotlib: pip install '.[run]' in ", []),
        ("sklearn", "scikit-learn: pip install '.[run]' in ", []),
    ],
)
def test_a_missing_package_is_named_with_its_extra_before_anything_starts(
    tmp_path, package, advice, asked
):
    tiny = [a for a in TINY if not (asked and a.startswith("sampler."))]
    refused(run(*tiny, *asked, cwd=tmp_path, env=without(package, tmp_path)), advice)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_without_torchsde_its_own_sampler_is_refused_and_the_others_work(trained, tmp_path, mode):
    shutil.copytree(the_run(trained[0]), the_run(tmp_path))
    command = [f"mode={mode}", *TINY, "training.steps=7"]  # one iteration more than there are
    environment = without("torchsde", tmp_path)
    asked = run(*command, "sampler=torchsde", cwd=tmp_path, env=environment)
    refused(asked, "torchsde: pip install '.[solvers]' in ")
    assert logged_iterations(tmp_path)[-1] == 6, "refused before the first step"
    result = run(*command, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr


def test_without_wandb_a_run_goes_on_and_says_what_would_add_it(tmp_path):
    arguments = [a for a in TINY if "tracking" not in a]
    result = run(*arguments, cwd=tmp_path, env=without("wandb", tmp_path))
    assert result.returncode == 0, result.stderr
    assert "pip install wandb" in result.stdout


def test_a_run_killed_in_its_final_evaluation_is_evaluated_by_the_same_command(trained, tmp_path):
    shutil.copytree(the_run(trained[0]), the_run(tmp_path))
    (the_run(tmp_path) / "likelihood.json").unlink()
    result = run("mode=train", *TINY, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "bits/dim" in result.stdout and (the_run(tmp_path) / "likelihood.json").is_file()
    assert "already finished" in run("mode=train", *TINY, cwd=tmp_path).stdout


def test_a_checkpoint_of_other_data_is_refused(trained, tmp_path):
    path = the_run(trained[0]) / "checkpoints" / "step-00000006.pt"
    words = ("other data", "experiment.data.digits -> experiment.data.rings")
    refused(run("mode=likelihood", "data=rings", f'checkpoint="{path}"', cwd=tmp_path), *words)


def test_a_refused_batch_size_does_not_bar_the_directory_to_the_corrected_command(tmp_path):
    refused(run(*TINY, "training.batch_size=5000", cwd=tmp_path), "batch_size=5000", "1437")
    assert run(*TINY, "training.steps=2", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "choices, words",
    [
        (["objective=explicit", "objective.max_dims=63"], ["max_dims=63", "D=64"]),
        (["speed.accumulate=9"], ["speed.accumulate=9", "the 8 samples"]),
    ],
)
def test_what_does_not_fit_the_data_or_the_batch_is_refused_before_anything_is_written(
    tmp_path, choices, words
):
    result = run(*TINY, *choices, cwd=tmp_path)
    refused(result, *words)
    assert not result.stdout and not (tmp_path / "runs").exists()


def test_any_seed_trains_samples_and_scores(tmp_path):
    result = run(*TINY, "training.steps=2", "seed=9223372036854775807", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    again = run("mode=sample", *TINY, "seed=20231125", "mode.num_samples=2", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_a_reader_that_goes_away_does_not_end_a_run(tmp_path):
    command = f"'{sys.executable}' '{ROOT / 'run.py'}' {' '.join(TINY)} | head -n 1"
    script = f"set -o pipefail; {command}"
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, timeout=300
    )
    assert result.returncode == 0, result.stderr.decode()
    assert (the_run(tmp_path) / "likelihood.json").is_file()


@pytest.mark.parametrize(
    ("flags", "answer"),
    [(["--cfg", "job"], "beta_min: 0.1"), (["-sc", "query=bash"], "sde=vp")],
    ids=["configuration", "completion"],
)
def test_looking_at_the_choices_imports_no_torch_and_makes_no_directory(tmp_path, flags, answer):
    asked = {"COMP_LINE": "run.py sde=", "COMP_POINT": "11", "PYTHONPROFILEIMPORTTIME": "1"}
    result = run(*flags, cwd=tmp_path, env=asked)
    assert result.returncode == 0 and answer in result.stdout, result.stdout + result.stderr
    assert "hydra" in (modules := imported(result))
    assert not modules & {"torch", "matplotlib", "wandb"}
    assert not list(tmp_path.iterdir())


def test_without_home_and_with_a_plain_locale_it_still_runs(tmp_path):
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "HOME"} | {
        "LC_ALL": "POSIX",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "NO_COLOR": "1",
    }
    (folder := tmp_path / "日本 ünïcode").mkdir()
    result = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *TINY, "training.steps=2", "tracking=auto"],
        cwd=folder,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr.decode(errors="replace")


def test_a_closed_stdout_does_not_end_a_run(tmp_path):
    command = f"exec '{sys.executable}' '{ROOT / 'run.py'}' {' '.join(TINY)} >&-"
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, timeout=300
    )
    assert result.returncode == 0, result.stderr.decode()
    assert (the_run(tmp_path) / "report.html").is_file()


def test_a_nan_stops_before_the_update_and_keeps_the_batch(tmp_path):
    train = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32) * 1e30
    train[0] = 3e38  # finite on disk; its square is not
    np.savez(tmp_path / "big.npz", train=train, test=train[:8])
    result = run(
        "data=arrays",
        f"data.path={tmp_path / 'big.npz'}",
        "network=mlp",
        "training=vectors",
        "likelihood=exact",
        "training.batch_size=64",
        "training.lr=1e30",
        "training.clip=1e30",
        "training.steps=50",
        "training.warmup=0",
        "tracking=none",
        cwd=tmp_path,
    )
    refused(result, "at iteration", "the weights are as before it", "failure-")
    (saved,) = (tmp_path / "runs").rglob("failure-*.pt")
    state = torch.load(saved, weights_only=True)
    assert {"batch", "iteration", "model", "loss"} <= set(state)


def test_two_dimensional_data_train_and_score_in_nats_from_the_command_line(tmp_path):
    result = run(
        "data=eight_gaussians",
        "training.steps=4",
        "training.batch_size=16",
        "network.width=16",
        "data.train_size=200",
        "data.test_size=20",
        "likelihood.solver.nodes=12",
        "sampler.steps=2",
        "tracking=none",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "nats" in result.stdout and "entropy of the source 2.8319" in result.stdout
    assert list((tmp_path / "runs/eight_gaussians-vp-mlp/figures").glob("density-*.png"))


def in_processes(count, *arguments, cwd):
    """What `run.py ARGUMENTS` printed, in ``count`` processes of torchrun, or started plainly."""
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    result = subprocess.run(
        [sys.executable, *(together if count > 1 else []), str(ROOT / "run.py"), *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_processes_give_the_numbers_of_one(trained):
    folder, _ = trained
    values = []
    for count in (1, 2):
        choices = ["mode=likelihood", "likelihood.max_samples=5"]
        printed = in_processes(count, *TINY, *choices, cwd=folder)
        assert printed.count("test set under") == 1, "one process speaks for all"
        (array,) = the_run(folder).glob("likelihood-00000006-first-5-??????.npz")
        with np.load(array) as content:
            values.append(content["bits_per_dim"])
        array.unlink()
    assert len(values[0]) == 5
    np.testing.assert_allclose(values[1], values[0], rtol=0, atol=1e-4)


def test_two_processes_draw_the_samples_of_one(trained, tmp_path):
    folder, _ = trained
    checkpoint = next(the_run(folder).glob("checkpoints/step-*.pt"))
    choices = ["mode=sample", "sampler=dpmpp_sde", "sampler.steps=3", "mode.num_samples=7"]
    drawn = []
    for count in (1, 2):
        place = [f"checkpoint='{checkpoint}'", f"run.root={tmp_path}", f"run.name=by-{count}"]
        printed = in_processes(count, *TINY, *choices, *place, cwd=folder)
        assert printed.count("7 samples by") == 1, "one process speaks for all"
        (array,) = (tmp_path / f"by-{count}" / "samples").glob("samples-*.npz")
        drawn.append(dict(np.load(array)))
    assert len(drawn[0]["samples"]) == 7
    for key in ("samples", "seeds", "nfe"):
        np.testing.assert_array_equal(drawn[1][key], drawn[0][key])


def test_a_calibration_is_asked_for_made_and_used(trained, tmp_path):
    folder, _ = trained
    (checkpoint,) = list(the_run(folder).glob("checkpoints/step-00000006.pt"))
    place = [f"checkpoint='{checkpoint}'", f"run.root={tmp_path}", "run.name=calibrated"]
    analytic = ["mode=sample", "sampler=analytic_ddpm", "sampler.steps=3", "mode.num_samples=2"]
    refused(run(*analytic, *place, cwd=folder), "analytic variance", "mode=calibrate")

    calibrate = ["mode=calibrate", "mode.num_samples=20", "mode.levels=5"]
    result = run(*calibrate, *place, cwd=folder)
    assert result.returncode == 0, result.stderr
    (kept,) = (tmp_path / "calibrated/fitted").glob("variance-*.json")
    content = json.loads(kept.read_text())
    assert len(content["clock"]) == len(content["unresolved"]) == 5
    assert list((tmp_path / "calibrated/fitted").glob("grid-*.json"))

    assert run(*analytic, *place, cwd=folder).returncode == 0
    kept.write_text(kept.read_text()[:50])  # torn: as good as none
    refused(run(*analytic, *place, cwd=folder), "mode=calibrate")


def test_samplers_are_compared_in_table_record_figure_and_page(trained, tmp_path):
    folder, _ = trained
    (checkpoint,) = the_run(folder).glob("checkpoints/step-00000006.pt")
    place = [f"checkpoint='{checkpoint}'", f"run.root={tmp_path}", "run.name=compared"]
    asked = ["mode=compare", *place, "tracking=none", "mode.num_samples=20"]
    asked += ["mode.reference_steps=10", "mode.tolerances=[1e-1]", "mode.nfe=[4,9]"]
    names = "mode.samplers=[heun,adaptive,annealed_langevin,dpmpp_sde]"
    result = run(*asked, names, cwd=folder)
    assert result.returncode == 0, result.stderr

    home = tmp_path / "compared"
    (record,) = (home / "compare").glob("compare-00000006-??????.json")
    found = json.loads(record.read_text())
    spent = [(row["sampler"], row.get("nfe")) for row in found["results"]]
    assert spent[:2] == [("heun", 3), ("heun", 9)] and spent[2][0] == "adaptive"
    assert spent[3:5] == [("annealed_langevin", None)] * 2
    assert "takes 21 evaluations at least" in result.stdout
    assert spent[5:] == [("dpmpp_sde", 4), ("dpmpp_sde", 9)]
    assert found["reference"]["samples"] == 20 and found["seed"] == 0
    assert found["complete"] and found["results"][0]["grid"] == "Karras(power=7.0)"
    assert (home / f"figures/{record.stem}.png").read_bytes().startswith(b"\x89PNG")
    page = (home / "report.html").read_text()
    assert "Quality by evaluations of the network" in page and ">annealed_langevin, failed" in page

    uncalibrated = run(*asked, "mode.samplers=[analytic_ddpm]", cwd=folder)
    refused(uncalibrated, "analytic variance", "mode=calibrate")


def test_a_variance_head_is_asked_for_trained_and_used(trained, tmp_path):
    folder, _ = trained
    (checkpoint,) = list(the_run(folder).glob("checkpoints/step-00000006.pt"))
    place = [f"checkpoint='{checkpoint}'", f"run.root={tmp_path}", "run.name=headed"]
    few = ["mode=sample", "sampler=npr_ddim", "sampler.steps=3", "mode.num_samples=2"]
    refused(run(*few, *place, cwd=folder), "npr variance", "mode=train_variance mode.kind=npr")
    sizes = [f"mode.{size}" for size in ("steps=3", "batch_size=8", "width=4", "num_test=3")]
    learn = ["mode=train_variance", *sizes, *place]
    result = run("mode=calibrate", "mode.num_samples=20", "mode.levels=5", *place, cwd=folder)
    assert result.returncode == 0, result.stderr
    result = run(*learn, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "npr less analytic" in result.stdout and "K = 100" in result.stdout
    (kept,) = (tmp_path / "headed/fitted").glob("head-npr-*.pt")
    before = kept.read_bytes()
    again = run(*learn, cwd=folder)
    assert "already there" in again.stdout and "npr less analytic" in again.stdout
    assert kept.read_bytes() == before
    result = run(*few, *place, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "4 evaluations each" in result.stdout
    samplers = ["mode.samplers=[npr_ddim,analytic_optimal]", "mode.nfe=[4]"]
    sizes = ["mode.num_samples=20", "mode.endpoints=2", "mode.reference_steps=10"]
    result = run("mode=compare", *samplers, *sizes, *place, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "npr_ddim" in result.stdout and "failed" not in result.stdout
    kept.write_text("abc")
    refused(run(*few, *place, cwd=folder), kept.name, "damaged", "mode.fresh=true")


def test_a_model_of_one_noise_level_comes_with_its_caveat_wherever_its_number_stands(tmp_path):
    """Its likelihood would be the best of all objectives', and means nothing."""
    quick = ["training.steps=3", "training.batch_size=8", "likelihood.max_samples=4"]
    quick += ["sampler.steps=2", "tracking=none", "threads=1"]
    asked = ["data=two_moons", "objective=naive_denoising", "run.name=x", *quick]
    trained = run("mode=train", *asked, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    # without objective=: what the checkpoint says counts
    scored = run("mode=likelihood", "data=two_moons", "run.name=x", *quick, cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert all("warning: trained at one noise level" in done.stdout for done in (trained, scored))
    folder = tmp_path / "runs" / "x"
    rows = json.loads((folder / "likelihood.json").read_text())
    assert len(rows) == 2 and all("mean nothing" in row["caveat"] for row in rows)
    page = (folder / "report.html").read_text()
    assert "Warning: trained at one noise level" in page and "above it" not in page


def test_the_modes_that_use_a_model_pass_over_a_damaged_checkpoint_with_a_warning(
    trained, tmp_path
):
    shutil.copytree(trained[0], tmp_path / "copy")
    newest = the_run(tmp_path / "copy") / "checkpoints" / "step-00000006.pt"
    newest.write_bytes(newest.read_bytes()[:-99])
    few = ["likelihood.max_samples=2", "likelihood.solver.nodes=8"]
    done = run("mode=likelihood", *few, cwd=tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert "step-00000006.pt" in told and "damaged" in told and "the one before it" in told
    assert "test set under" in told and "step-00000003.pt: " in told
    # one that is asked for is never replaced
    refused(run("mode=likelihood", f"checkpoint={newest}", *few, cwd=tmp_path / "copy"), "damaged")
