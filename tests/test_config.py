"""What a configuration may say, and the run that it describes: its directory, lock and model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from experiment.checkpoint import CheckpointError, save_checkpoint
from experiment.config import (
    check_added,
    check_choices,
    check_complete,
    check_targets,
    choices,
    differences,
    explain,
    fill_measured,
    refusal,
    walk,
)
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.run import Run

CONF = Path(__file__).resolve().parents[1] / "conf"
NESTED = {"a": 1, "b": {"c": [{"d": 2}, 3], "e": None}, "f": {}, "g": []}


def test_walk_visits_every_node_under_its_dotted_key():
    assert list(walk(NESTED)) == [
        ("a", 1),
        ("b", NESTED["b"]),
        ("b.c", [{"d": 2}, 3]),
        ("b.c.0", {"d": 2}),
        ("b.c.0.d", 2),
        ("b.c.1", 3),
        ("b.e", None),
        ("f", {}),
        ("g", []),
    ]
    assert list(walk("text")) == list(walk(None)) == []


@pytest.mark.parametrize(
    "target",
    [
        "sde_lib.VPSDE",
        "sde_lib.processes.VPSDE",
        "score_models.noise_regression",
        "score_models.networks.MLP",
        "likelihood.Exact",
        "experiment.train.train",
        "experiment.data.digits",
        "sde_lib.VPSD",  # a typo in our own room: building it says so
    ],
)
def test_targets_in_the_rooms_are_allowed(target):
    check_targets({"sde": [{"_target_": target}]}, "configuration")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "sde_library.VPSDE",  # the name of a room, and more
        "math.exp",
        "sde_lib.validation.math.exp",  # reached through a room
        "experiment.checkpoint.os.mkdir",
        "experiment.checkpoint.torch.load",
        "experiment.config.importlib.import_module",
        "sde_lib.processes.SDE.__class__",
        "sde_lib.VPSDE.__subclasses__",
        "sde_lib.validation.count.__globals__.get",
        "sde_lib.validation.count.__defaults__.__class__",  # through None, to every class there is
        "",
        ".os.system",
        7,
        None,
    ],
)
def test_targets_outside_the_rooms_are_refused_with_key_and_source(target):
    config = {"sde": {"list": [{"beta": {"_target_": target}}]}}
    with pytest.raises(RunError) as caught:
        check_targets(config, "checkpoint x.pt")
    assert str(caught.value).startswith(
        f"checkpoint x.pt: sde.list.0.beta._target_={target} names"
    )
    assert "sde_lib, score_models, likelihood, experiment; refused" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:HOME}",
        "experiment.checkpoint.${oc.env:NOT_SET,os}.mkdir",  # passes as a typo, then is none
        "${oc.create:{_target_: os.mkdir, path: x}}",  # text that becomes a node with a target
    ],
)
@pytest.mark.parametrize("key", ["_target_", "shape"])
def test_text_that_would_become_something_else_when_built_is_refused(key, value):
    with pytest.raises(RunError) as caught:
        check_targets({"network": {key: value}}, "checkpoint x.pt")
    assert f"checkpoint x.pt: network.{key}={value}" in str(caught.value)
    assert "refused" in str(caught.value)


def test_a_package_of_the_users_own_is_allowed_by_name(monkeypatch):
    config = {"sde": {"_target_": "fractions.Fraction"}}
    with pytest.raises(RunError, match="allow its package: SCORE_SDE_ALLOW=fractions python"):
        check_targets(config, "configuration")
    monkeypatch.setenv("SCORE_SDE_ALLOW", "mine, fractions ,")
    check_targets(config, "configuration")
    for outside in ("decimal.Decimal", "fractions.operator.add", "fractions.math.gcd", ""):
        with pytest.raises(RunError, match="refused"):
            check_targets({"sde": {"_target_": outside}}, "configuration")


def test_everything_that_is_missing_is_listed_in_one_message():
    with pytest.raises(RunError, match=r"missing: data.path=..., list.0=..., seed=...; give them"):
        check_complete({"data": {"path": "???", "levels": None}, "list": ["???"], "seed": "???"})
    check_complete({"a": "?", "b": None, "c": ["??"], "d": {}})


def test_measured_values_fill_what_is_null_and_nothing_else():
    config = {
        "network": {"shape": None, "width": None, "blocks": [{"shape": None}, None]},
        "parameterization": {"data_std": 0.5},
        "shape": [3],
    }
    before = json.dumps(config)
    assert fill_measured(config, shape=[1, 8, 8], data_std=0.7) == {
        "network": {"shape": [1, 8, 8], "width": None, "blocks": [{"shape": [1, 8, 8]}, None]},
        "parameterization": {"data_std": 0.5},
        "shape": [3],
    }
    assert json.dumps(config) == before, "it is a copy"


def test_differences_name_each_leaf_with_old_and_new():
    old = {"lr": 0.1, "steps": 1000, "net": {"width": [8, 16], "kind": "mlp"}, "gone": 1}
    new = {"lr": 0.2, "steps": 1e3, "net": {"width": [8, 32], "kind": "mlp"}, "come": {"a": 2}}
    assert differences(old, new) == [
        "come.a: absent -> 2",
        "gone: 1 -> absent",
        "lr: 0.1 -> 0.2",
        "net.width.1: 16 -> 32",
    ]
    assert differences(old, old) == []


def test_ignored_keys_are_whole_keys_not_beginnings():
    old = {"run": {"name": "a"}, "runtime": 1, "training": {"steps": 1, "lr": 1, "steps_more": 1}}
    new = {"run": {"name": "b"}, "runtime": 2, "training": {"steps": 2, "lr": 2, "steps_more": 2}}
    assert differences(old, new, ignore=("run", "training.steps")) == [
        "runtime: 1 -> 2",
        "training.lr: 1 -> 2",
        "training.steps_more: 1 -> 2",
    ]


def test_choices_are_the_files_of_each_group(tmp_path):
    for name in ("sde/vp.yaml", "sde/edm.yaml", "sde/notes.txt", "data/deep/x.yaml", "a.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert choices(tmp_path) == {"data": [], "sde": ["edm", "vp"]}


@pytest.mark.parametrize(
    "override",
    ["experiment=digits_bset", "sde=null", "sde=", "sde=VP", "+sde=vpp", "mode=[train,sample]"],
)
def test_a_choice_that_its_group_does_not_have_is_told_with_those_it_has(override):
    group, _, choice = override.lstrip("+").partition("=")
    with pytest.raises(RunError) as caught:
        check_choices(["training.lr=1", override], CONF)
    told = f"unknown {group}={choice}; choose one of {', '.join(choices(CONF)[group])}."
    assert str(caught.value) == told


def test_choices_that_there_are_pass():
    given = ["sde=ve", "sde='ve'", 'mode="train"', "training.lr=abc", "experiment=digits_best"]
    assert check_choices([*given, "network@_global_.network=mlp"], CONF) == choices(CONF)


def test_a_group_chosen_twice_is_told_in_one_line(known):
    with pytest.raises(Exception) as caught:  # noqa: B017
        compose("+sde=ve")
    told = explain(str(caught.value), ["+sde=ve"], known, CONF)
    assert told == "sde is chosen already; write sde=CHOICE without a + before it."


def test_a_name_that_a_room_does_not_have_is_told_with_the_one_meant():
    said = (
        "Error loading 'sde_lib.X':\nAre you sure that '{}' is importable from module 'sde_lib'?"
    )
    for name, told in (
        ("VPSD", "sde_lib has no VPSD; did you mean VPSDE?"),
        ("Zzzzzz", "sde_lib has no Zzzzzz."),
    ):
        assert str(refusal({"_target_": "x"}, RuntimeError(said.format(name)))) == told


def compose(*overrides: str) -> dict:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config", list(overrides)))


@pytest.fixture(scope="module")
def known() -> list[str]:
    """Every group and key of the configuration folder."""
    return [*choices(CONF), *(key for key, _ in walk(compose()))]


@pytest.mark.parametrize(
    "override, words",
    [
        ("sde=vpp", ["unknown sde=vpp", "subvp", "ve", "vp"]),
        ("mode=trian", ["unknown mode=trian", "likelihood", "sample", "train"]),
        ("trian.lr=1", ["unknown key 'trian.lr'", "did you mean training.lr?"]),
        ("training.stesp=1", ["unknown key 'training.stesp'", "did you mean training.steps?"]),
        ("training.zzzzzzzzzzzz=1", ["there are:", "training.batch_size, training."]),
        ("training.latex=1", ["unknown key 'training.latex'; there are: training.batch_size"]),
        ("sampler.steps.a=1", ["unknown key 'sampler.steps.a'; did you mean sampler.steps?"]),
        (
            "network.patch=2",
            ["unknown key 'network.patch'; it goes with network=dit; there are: network."],
        ),
        ("qqqq=1", ["unknown key 'qqqq'", "there are:", "sampler, sde, seed"]),
        ("training.lr", ["training.lr", "write key=value"]),
        ("mode =train", ["mode =train", "without spaces around the ="]),
    ],
)
def test_a_composition_error_is_told_in_one_line_with_the_remedy(known, override, words):
    with pytest.raises(Exception) as caught:  # noqa: B017 -- three types of the library's
        compose(override)
    told = explain(str(caught.value), [override], known, CONF)
    assert "\n" not in told and "+trian" not in told
    for word in words:
        assert word in told


def test_the_key_that_is_told_is_the_wrong_one_of_several(known):
    overrides = ["sde=ve", "training.lr=1", "training.stesp=1"]
    with pytest.raises(Exception) as caught:  # noqa: B017
        compose(*overrides)
    assert "'training.stesp'" in explain(str(caught.value), overrides, known, CONF)


def test_a_group_without_keys_does_not_list_what_is_internal(known):
    message = "Key 'zzz' is not in struct"
    assert explain(message, ["augment.zzz=1"], known, CONF) == (
        "unknown key 'augment.zzz'; with these choices augment has no keys."
    )


def test_a_key_that_other_choices_have_is_told_with_these(known):
    known = [key for key in known if not key.startswith("tracking.")]
    for message in ("Key 'dashboard' is not in struct", "Could not override 'tracking.dashboard'"):
        assert explain(message, ["tracking.dashboard=true"], known, CONF) == (
            "unknown key 'tracking.dashboard'; it goes with tracking=auto, wandb; "
            "with these choices tracking has no keys."
        )


def test_a_message_that_is_not_known_is_passed_on_in_one_line():
    assert (
        explain("something\n  else\thappened", ["a=1"], ["a"], CONF) == "something else happened"
    )


def test_a_typo_behind_a_plus_is_caught_and_a_new_key_is_not(known):
    for typo, meant in (
        ("+trainng.lr=1", "training.lr"),
        ("++trainng.lr=1", "training.lr"),
        ("+sampler.step=3", "sampler.steps"),
    ):
        with pytest.raises(RunError) as caught:
            check_added(["sde=vp", typo], known)
        assert f"did you mean {meant} (without +)?" in str(caught.value)
    check_added(["+sde.gamma=3", "++training.lr=1", "trainng.lr=1"], known)
    check_added(["+sampler.corrector.snr=0.1", "+hydra.verbose=true"], known)


def test_an_added_key_outside_every_class_is_refused(known):
    with pytest.raises(RunError, match=r"\+lr adds a key that nothing reads; .*training.lr"):
        check_added(["+lr=1"], known)
    with pytest.raises(RunError, match=r"\+wholly.new adds a key that nothing reads; there are"):
        check_added(["+wholly.new=1"], known)


def test_an_unknown_argument_is_answered_with_those_there_are():
    node = {"_target_": "sde_lib.samplers.Heun", "grid": {"_target_": "sde_lib.grids.Karras"}}
    cause = TypeError("Karras.__init__() got an unexpected keyword argument 'tau'")
    assert "sde_lib.grids.Karras: Karras.__init__() got" in str(refusal(node, cause))
    assert str(refusal(node, cause)).endswith("'tau'; it takes power.")
    function = TypeError("digits() got an unexpected keyword argument 'tau'")
    node = {"_target_": "experiment.data.digits"}
    assert str(refusal(node, function)).endswith("it takes test_size, seed, conditional.")
    other = TypeError("something else")
    assert str(refusal(node, other)) == "experiment.data.digits: something else"
    own = ValueError("as it is")
    assert refusal(node, own) is own


# the run


def config_of(root: Path, width: int = 8, **changes) -> dict:
    return {
        "network": {"_target_": "score_models.networks.MLP", "shape": None, "width": width},
        "sde": {"_target_": "sde_lib.VPSDE", "t_min": 1e-4},
        "parameterization": {"_target_": "score_models.EDM", "data_std": None},
        "data": {"_target_": "experiment.data.rings", "seed": 0},
        "training": {"steps": 10, "lr": 0.1},
        "run": {"root": str(root), "name": "a-run", "fresh": False},
        "checkpoint": None,
        "seed": 0,
        "device": "cpu",
        "threads": None,
        **changes,
    }


def instantiate(node: dict):
    return hydra.utils.instantiate(node, _convert_="all")


def run_in(root: Path, **changes) -> Run:
    return Run(config_of(root, **changes), instantiate)


def measured(run: Run) -> Run:
    values = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    return run.measured(Dataset("vectors", values, values))


def saved(run: Run, iteration: int = 7, config: dict | None = None):
    """A checkpoint of ``run``; the path, the model and its average, which differ."""
    model, average = run.build_model(), run.build_model()
    state = {"model": model.state_dict(), "ema": average.state_dict()}
    text = {"config": json.dumps(config or dict(run.config))}
    return save_checkpoint(run.checkpoints, iteration, text | state), average


def test_a_run_is_refused_before_anything_is_built(tmp_path):
    for changes, words in (
        ({"data": {"path": "???"}, "seed": "???"}, "missing: data.path=..., seed=..."),
        ({"sde": {"_target_": "os.mkdir"}}, "configuration: sde._target_=os.mkdir"),
        ({"run": {"root": "runs", "name": " "}}, "run.name must be a non-empty path; got ' '"),
        ({"run": {"root": None, "name": "x"}}, "run.root must be a non-empty path; got None"),
    ):
        with pytest.raises(RunError) as caught:
            run_in(tmp_path, **changes)
        assert words in str(caught.value)


def test_seed_and_device_are_checked_with_what_is_allowed(tmp_path):
    assert run_in(tmp_path, seed=2**63 - 1).seed == 2**63 - 1
    for seed in (-1, 1.5, "0", True, None, 2**63):
        with pytest.raises(RunError, match="seed must be a whole number >= 0.*got seed="):
            _ = run_in(tmp_path, seed=seed).seed
    assert run_in(tmp_path, device="cpu").device().type == "cpu"
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert run_in(tmp_path, device="auto").device().type == best
    for device in ("tpu", f"cuda:{torch.cuda.device_count()}", None):
        with pytest.raises(RunError, match=f"device={device} is not here; there is: cpu"):
            run_in(tmp_path, device=device).device()


def test_the_data_decide_shape_and_spread(tmp_path):
    run = measured(run_in(tmp_path))
    assert run.config["network"]["shape"] == [2]
    unit = math.sqrt(49 / 50)  # standardised by N - 1, measured over N
    assert run.config["parameterization"]["data_std"] == pytest.approx(unit, rel=1e-5)
    assert run.build_model()(torch.zeros(3, 2), torch.tensor(0.5)).shape == (3, 2)


def test_a_trained_model_is_the_average_rebuilt_from_the_stored_configuration(tmp_path):
    old = measured(run_in(tmp_path, width=16))
    saved(old, 5)
    path, average = saved(old, 20)
    run, model, found, iteration = run_in(tmp_path, width=8, seed=3).trained()
    assert (found, iteration) == (path, 20)
    assert run.config["network"] == old.config["network"] and run.seed == 3
    assert model.sde == average.sde and not model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, average.state_dict()[name]), name
    assert not any(p.requires_grad for p in model.parameters())

    elsewhere = path.rename(tmp_path / "copy.pt")
    run = run_in(tmp_path / "other", checkpoint=str(elsewhere))
    assert run.trained()[2:] == (elsewhere, 20)


def test_a_checkpoint_is_bound_to_the_data_it_was_trained_on(tmp_path):
    path, _ = saved(measured(run_in(tmp_path)), 5)
    moons = {"_target_": "experiment.data.two_moons", "seed": 0}
    with pytest.raises(CheckpointError, match="other data .*rings -> experiment.data.two_moons"):
        run_in(tmp_path, data=moons, checkpoint=str(path)).trained()
    elsewhere = {"_target_": "experiment.data.rings", "seed": 0, "root": "another/folder"}
    assert run_in(tmp_path, data=elsewhere, checkpoint=str(path)).trained()[3] == 5


def test_other_choices_than_those_it_was_trained_with_are_refused_if_asked_for(tmp_path):
    saved(measured(run_in(tmp_path, width=16)), 5)
    changed = {"_target_": "sde_lib.VPSDE", "t_min": 0}
    for overrides in (["sde.t_min=0"], ["+sde.t_min=0"], ["sde=vp"]):
        with pytest.raises(CheckpointError, match="other choices .sde.t_min: 0.0001 -> 0.; leave"):
            replace(run_in(tmp_path, sde=changed), overrides=overrides).trained()
    with pytest.raises(CheckpointError, match="network.width: 16 -> 8"):
        replace(run_in(tmp_path), overrides=["network.width=8"]).trained()
    for harmless in (["network.width=16"], ["network.shape=null"], ["sampler=heun", "seed=0"]):
        width = 16 if "width" in harmless[0] else 8
        replace(run_in(tmp_path, width=width), overrides=harmless).trained()


def test_a_stored_configuration_may_name_models_only(tmp_path):
    run, marker = measured(run_in(tmp_path)), tmp_path / "marker"
    sde = {"_target_": "experiment.report.write_report", "run_dir": str(marker)}
    saved(run, config={**run.config, "sde": sde})
    with pytest.raises(RunError, match="outside sde_lib, score_models; refused"):
        run_in(tmp_path).trained()
    assert not marker.exists()


def test_without_a_checkpoint_the_remedy_is_named(tmp_path):
    with pytest.raises(RunError, match="no checkpoint at .*mode=train.*checkpoint=PATH"):
        run_in(tmp_path).trained()
    with pytest.raises(CheckpointError, match="no such file"):
        run_in(tmp_path, checkpoint="nowhere.pt").trained()


@pytest.mark.parametrize("how", ["a target", "through a room", "interpolated", "created"])
def test_a_stored_configuration_runs_nothing_of_a_strangers(tmp_path, how):
    run, marker = measured(run_in(tmp_path)), tmp_path / "marker"
    target = {
        "a target": "os.mkdir",
        "through a room": "experiment.checkpoint.os.mkdir",
        "interpolated": "experiment.checkpoint.${oc.env:NOT_SET,os}.mkdir",
        "created": "score_models.networks.MLP",
    }[how]
    network = {"_target_": target, "path": str(marker)}
    if how == "created":
        made = "${oc.create:{_target_: os.mkdir, path: " + str(marker) + "}}"
        network = {"_target_": target, "shape": made}
    path, _ = saved(run, config={**run.config, "network": network})
    with pytest.raises(RunError, match=f"checkpoint {path}: network.*refused"):
        run_in(tmp_path).trained()
    assert not marker.exists()


def test_weights_that_do_not_fit_the_stored_configuration_are_listed(tmp_path):
    run = measured(run_in(tmp_path))
    wider = {**run.config, "network": {**run.config["network"], "width": 16}}
    saved(run, config=wider)
    with pytest.raises(CheckpointError, match=r"network.enter.weight \(8, 2\) where .* \(16, 2\)"):
        run.trained()


def test_one_trainer_owns_a_directory_and_the_second_is_told_who(tmp_path):
    run, second = run_in(tmp_path), run_in(tmp_path, seed=1)
    with run.owned():
        with pytest.raises(RunError, match=r"locked by PID \d+ on .+ since .+run.name=NAME"):
            with second.owned():
                pytest.fail("two owners")
        with replace(run, config=config_of(tmp_path / "other")).owned():
            pass  # another directory is free
    with second.owned():
        assert (run.path / "lock").read_text().count("PID") == 1


def test_a_lock_whose_owner_is_gone_is_taken_over(tmp_path):
    run = run_in(tmp_path)
    run.path.mkdir(parents=True)
    (run.path / "lock").write_text("PID 4711 on somewhere since 2026-01-01 00:00:00")
    with run.owned():
        assert "4711" not in (run.path / "lock").read_text()


def test_partial_files_go_when_the_directory_is_owned_and_not_before(tmp_path):
    run = run_in(tmp_path)
    run.checkpoints.mkdir(parents=True)
    left = run.checkpoints / "step-00000003.pt.partial"
    left.write_bytes(b"torn")
    with run.owned():
        assert not left.exists()
        left.write_bytes(b"being written")
        with pytest.raises(RunError):
            with run_in(tmp_path).owned():
                pytest.fail("two owners")
        assert left.exists(), "the one who is refused touches nothing"


def test_a_directory_that_cannot_be_used_is_refused_with_the_remedy(tmp_path):
    run = run_in(tmp_path)
    run.path.write_text("a file in the way")
    with pytest.raises(RunError, match="cannot be used .*run.root=PATH or run.name=NAME"):
        with run.owned():
            pytest.fail("no directory")


def test_an_earlier_run_is_set_aside_whole_but_not_while_it_trains(tmp_path, capsys):
    run = run_in(tmp_path)
    run.set_aside()  # nothing there: nothing to do
    assert list(tmp_path.iterdir()) == []
    path, _ = saved(measured(run))
    content = path.read_bytes()

    with run.owned():
        with pytest.raises(RunError, match="locked by PID"):
            run_in(tmp_path, seed=1).set_aside()
        assert path.read_bytes() == content
    run.set_aside()
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("a-run.before-") and str(aside) in capsys.readouterr().out
    assert (aside / "checkpoints" / path.name).read_bytes() == content


def begun(run: Run) -> None:
    """A first checkpoint: from now on there is something to lose."""
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "step-00000001.pt").touch()


def test_the_configuration_is_written_once_and_says_who_and_what(tmp_path):
    run = run_in(tmp_path, note="ünïcode", tiny=1e-5)
    run.path.mkdir()
    run_in(tmp_path, note="refused before it began").write_config()
    run.write_config()
    begun(run)
    text = (run.path / "config.yaml").read_bytes()
    assert yaml.safe_load(text) == run.config
    about = json.loads((run.path / "run.json").read_text())
    assert about["name"] == "a-run" and about["state"] == "training"
    assert about["versions"]["torch"] == str(torch.__version__)

    run_in(tmp_path, note="ünïcode", tiny=1e-5, device="auto", threads=2).write_config()
    assert (run.path / "config.yaml").read_bytes() == text, "harmless changes pass, unrecorded"
    run.set_state("finished")
    assert json.loads((run.path / "run.json").read_text()) == about | {"state": "finished"}


def test_a_directory_with_other_choices_is_refused_and_they_are_listed(tmp_path):
    run = run_in(tmp_path)
    run.path.mkdir()
    run.write_config()
    begun(run)
    other = run_in(tmp_path, width=16, seed=1, training={"steps": 99, "lr": 0.2})
    with pytest.raises(RunError) as caught:
        other.write_config()
    listed = str(caught.value).split("(")[1].split(")")[0]
    assert listed == "network.width: 8 -> 16; seed: 0 -> 1; training.lr: 0.1 -> 0.2"
    assert "run.name=NAME" in str(caught.value) and "run.fresh=true" in str(caught.value)


def test_ctrl_c_in_any_mode_leaves_with_130_and_no_traceback(tmp_path, capsys):
    def interrupted(run: Run) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        Run(config_of(tmp_path, mode={}), lambda node: interrupted).go()
    assert left.value.code == 130 and "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "objective",
    [
        {"_target_": "os.mkdir", "path": "MARKER"},
        {"_target_": "score_models.objectives.denoising.os.mkdir", "path": "MARKER"},
        {"_target_": "mine.Objective"},
        {"_target_": "score_models.DenoisingScoreMatching", "of_another_version": 1},
    ],
)
def test_a_model_is_of_use_without_what_trained_it_which_is_not_called(tmp_path, objective):
    marker = tmp_path / "marker"
    objective = {
        k: v.replace("MARKER", str(marker)) if k == "path" else v for k, v in objective.items()
    }
    run = measured(run_in(tmp_path))
    saved(run, config={**run.config, "objective": objective})
    found, *_ = run_in(tmp_path).trained()
    assert found.caveat == "" and not marker.exists()
