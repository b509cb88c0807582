"""The page of a run: true numbers, any state of the run, and nothing loaded or run."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.figures import save_grid
from experiment.page import STYLE, page
from experiment.record import Record
from experiment.report import go_on, renew_report, uncertain, write_report

FULL = {
    "metric": "bits_per_dim",
    "value": 1.8123,
    "standard_error": 0.0127,
    "num_samples": 360,
    "nfe": 85.6,
    "seconds": 1234.5,
    "iteration": 1600,
    "sde": "VPSDE(beta_min=0.1)",
    "how": "exact; uniform, 1 draw(s)",
    "note": "rtol 1e-4",
    "checkpoint": "step-00001600.pt",
}
NATS = {**FULL, "metric": "nll", "value": 2.8534, "standard_error": 0.0089, "entropy": 2.83188}
ABOUT = {
    "name": "digits-vp-unet",
    "created": "2026-02-01T10:00:00+0000",
    "command": "python run.py data=digits training.steps=1600",
    "versions": {"torch": "2.11", "numpy": "2.4"},
    "state": "finished",
}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style></pre><iframe src=http://example.com>",
    "&lt;b&gt; & <b>",
]
VOID = {"meta", "img", "br", "link", "input"}


class Seen(HTMLParser):
    """Tags with their attributes, and the text within each, in the order of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(len(self.tags) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.tags[self.open.pop()][0] == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.texts[index] += data

    def all(self, tag: str, kind: str | None = None) -> list[str]:
        """The text of each such tag, of class ``kind`` if given."""
        return [
            text
            for (name, attributes), text in zip(self.tags, self.texts, strict=True)
            if name == tag and (kind is None or attributes.get("class") == kind)
        ]

    def section(self, title: str) -> str:
        (text,) = (text for text in self.all("section") if text.startswith(title))
        return text.removeprefix(title).strip()

    def pictures(self) -> dict[str, bytes]:
        """What each embedded picture holds, by the text beside it."""
        sources = [attributes["src"] for name, attributes in self.tags if name == "img"]
        return {
            caption: base64.b64decode(source.removeprefix("data:image/png;base64,"))
            for caption, source in zip(self.all("figcaption"), sources, strict=True)
        }


def seen(run_dir: Path) -> Seen:
    return Seen(write_report(run_dir).read_text(encoding="utf-8"))


def put(run_dir: Path, about: Any = ABOUT, evaluations: Any = (), config: str = "") -> Path:  # noqa: ANN401
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps(about))
    if evaluations:
        (run_dir / "likelihood.json").write_text(json.dumps(evaluations))
    if config:
        (run_dir / "config.yaml").write_text(config, encoding="utf-8")
    return run_dir


def picture(path: Path, seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return save_grid(images, path).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything there is."""
    run_dir = put(
        tmp_path_factory.mktemp("runs") / "a run ü", ABOUT, [FULL], "sde:\n  beta_min: 0.1\n"
    )
    record = Record(run_dir)
    for iteration in (100, 200, 1600):
        record.log({"train/loss": 1 / iteration, "perf/images_per_s": 5120.4}, iteration)
        record.log({"eval/bits_per_dim": 2.0, "eval/bits_per_dim_stderr": 0.1}, iteration)
    for stem in ("samples/grid", "samples/strip", "figures/path", "figures/density"):
        picture(run_dir / f"{stem}-00001600.png")
    return run_dir


def test_the_page_loads_nothing_and_runs_nothing(whole):
    found = seen(whole)

    policies = [a["content"] for _, a in found.tags if a.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for tag, attributes in found.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
        assert not any(name.startswith("on") for name in attributes)
        for name in {"src", "srcset", "href", "data", "poster", "background"} & set(attributes):
            assert tag == "img" and name == "src"
            assert attributes["src"].startswith("data:image/png;base64,")
    assert "url(" not in STYLE and "@import" not in STYLE


def test_the_policy_stands_before_all_it_rules(whole):
    tags = [tag for tag, _ in seen(whole).tags]

    assert tags[:5] == ["html", "head", "meta", "meta", "meta"]


def test_every_section_of_a_whole_run_is_there(whole):
    found = seen(whole)

    assert found.all("h2") == [
        "Samples",
        "From noise to data",
        "Density, score and samples",
        "Likelihood",
        "Training loss",
        "All evaluations",
        "How to go on",
        "Configuration",
    ]
    assert found.all("title") == found.all("h1") == ["digits-vp-unet"]
    assert found.section("Configuration") == "sde:\n  beta_min: 0.1"
    (facts,) = found.all("p", "facts")
    assert facts == (
        "finished · iteration 1 600 · 5 120 samples/s in training · "
        "begun 2026-02-01T10:00:00+0000 · torch 2.11, numpy 2.4"
    )


def test_pictures_are_the_files_byte_for_byte(whole):
    shown = list(seen(whole).pictures().values())

    stems = ("samples/grid", "samples/strip", "figures/path", "figures/density")
    files = [whole / f"{stem}-00001600.png" for stem in stems]
    files += [whole / "figures/bits.png", whole / "figures/loss.png"]
    assert shown == [file.read_bytes() for file in files]


def test_only_pixels_of_samples_are_kept_sharp(whole):
    kinds = [a.get("class") for tag, a in seen(whole).tags if tag == "img"]

    assert kinds == ["pixels", "pixels", None, None, None, None]


def test_writing_it_again_changes_nothing_and_leaves_nothing(whole):
    first, files = write_report(whole).read_bytes(), sorted(whole.rglob("*"))

    assert write_report(whole).read_bytes() == first
    assert sorted(whole.rglob("*")) == files
    assert not list(whole.rglob("*.partial"))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_shown_as_it_is_and_adds_no_tag(tmp_path, text):
    def build(folder: str, word: str) -> Seen:
        about = {
            "name": word,
            "created": word,
            "command": f"python run.py x={shlex.quote(word)}",
            "versions": {word: word},
            "state": word,
        }
        row = FULL | {key: word for key in ("sde", "note", "num_samples", "nfe")}
        return seen(put(tmp_path / folder, about, [row], word))

    harmless, hostile = build("a", "word"), build("b", text)

    assert hostile.tags == harmless.tags
    assert hostile.all("title") == hostile.all("h1") == [text]
    for mine, theirs in zip(hostile.texts, harmless.texts, strict=True):
        assert mine.count(text) == theirs.count("word")


def test_a_hostile_directory_is_shown_as_it_is(tmp_path):
    run_dir = tmp_path / "<img src=x onerror=alert(1)>"

    found = seen(put(run_dir, {}))

    assert found.all("h1") == [run_dir.name]
    assert "img" not in [tag for tag, _ in found.tags]


def test_a_text_that_is_no_unicode_is_shown_with_a_question_mark(tmp_path):
    run_dir = tmp_path / os.fsdecode(b"run-\xff")

    assert seen(put(run_dir, {"command": "python run.py x=\ud800"})).all("h1") == ["run-?"]


@pytest.mark.parametrize(
    "value, error, shown",
    [
        (1.8123, 0.0127, "1.812 ± 0.013"),
        (1.8123, 0.127, "1.81 ± 0.13"),
        (1.8123, 1.27, "1.8 ± 1.3"),
        (18.123, 12.7, "18 ± 13"),
        (12345.6, 127.0, "12350 ± 130"),
        (2.0, 0.01, "2.000 ± 0.010"),
        (2.0, 0.0996, "2.00 ± 0.10"),
        (2.0, 0.9951, "2.0 ± 1.0"),
        (2.0, 9.96, "2 ± 10"),
        (2.83188, 0.00012, "2.83188 ± 0.00012"),
        (-0.0042, 0.011, "-0.004 ± 0.011"),
        (-0.0004, 0.011, "0.000 ± 0.011"),
        (1.8123, None, "1.812"),
        (1.8123, 0.0, "1.812"),
        (1.8123, math.nan, "1.812"),
        (1.8123, math.inf, "1.812"),
        (1.8123, -0.1, "1.812"),
        (1.8123, "0.1", "1.812"),
        (123456.7, None, "123457"),
        (9999.6, None, "10000"),
    ],
)
def test_a_result_has_the_digits_that_its_error_allows(value, error, shown):
    assert uncertain(value, error) == shown


def test_the_headline_is_the_result_with_its_error_and_its_samples(tmp_path):
    (result,) = seen(put(tmp_path, ABOUT, [FULL])).all("p", "result")

    assert result == "1.812 ± 0.013 bits/dim, test set (360 samples)"


def test_a_headline_from_the_record_does_not_claim_the_whole_test_set(tmp_path):
    Record(tmp_path).log({"eval/nll": 2.5, "eval/nll_stderr": 0.25}, 100)

    (result,) = seen(tmp_path).all("p", "result")
    assert result == "2.50 ± 0.25 nats, test set or a part of it"


def test_nats_are_compared_with_the_entropy_of_the_data(tmp_path):
    header = seen(put(tmp_path, ABOUT, [{**NATS, "num_samples": 10_000}])).all("header")[0]

    assert "2.8534 ± 0.0089 nats, test set (10 000 samples)" in header
    assert "Entropy of the data: 2.8319 nats; the model is 0.0215 ± 0.0089 above it." in header


def test_the_entropy_may_stand_in_the_file_about_the_run(tmp_path):
    row = {key: value for key, value in NATS.items() if key != "entropy"}

    with_it = seen(put(tmp_path / "a", ABOUT | {"entropy": 2.75}, [row])).all("header")[0]
    without = seen(put(tmp_path / "b", ABOUT, [row])).all("header")[0]

    assert "Entropy of the data: 2.7500 nats; the model is 0.1034 ± 0.0089 above it." in with_it
    assert "ntropy" not in without


def test_the_curve_of_nats_ends_at_the_entropy_and_that_of_bits_does_not(tmp_path, monkeypatch):
    floors = []
    monkeypatch.setattr(
        "experiment.figures.plot_bits", lambda rows, path, floor: floors.append(floor)
    )
    write_report(put(tmp_path / "a", ABOUT, [NATS]))
    write_report(put(tmp_path / "b", ABOUT, [FULL | {"entropy": 2.83188}]))

    assert floors == [2.83188, None]
    assert "ntropy" not in seen(tmp_path / "b").all("header")[0]


def test_the_headline_is_the_newest_by_iteration_and_of_equals_the_last_full_one(tmp_path):
    def headline(*rows: dict[str, Any]) -> str:
        return seen(put(tmp_path, ABOUT, list(rows))).all("p", "result")[0].split()[0]

    record = Record(tmp_path)
    record.log({"eval/bits_per_dim": 3.0}, 1600)
    older, again = FULL | {"iteration": 400, "value": 4.0}, FULL | {"value": 5.0}
    assert headline(older, FULL) == headline(FULL, older) == "1.812"
    assert headline(FULL, again) == "5.000"
    assert headline(FULL, again | {"num_samples": 2}) == "1.812", "a part does not stand for all"
    foreign = again | {"checkpoint": "/other/checkpoints/step-00001600.pt"}
    assert headline(FULL, foreign) == "1.812", "nor does another run"
    assert headline(older) == "3"
    record.log({"eval/bits_per_dim": 2.0}, 2000)
    record.log({"train/loss": 1.0}, 2400)
    assert headline(FULL) == "2"


def test_an_empty_directory_has_a_page(tmp_path):
    found = seen(tmp_path / "new")

    assert found.all("h1") == ["new"]
    assert found.all("h2") == [
        "Likelihood",
        "Training loss",
        "All evaluations",
        "How to go on",
        "Configuration",
    ]
    assert found.pictures() == {}
    assert "No evaluation yet." in found.all("header")[0]
    assert found.section("Training loss") == "No loss logged yet."


@pytest.mark.parametrize(
    "missing",
    ["metrics.jsonl", "run.json", "likelihood.json", "config.yaml", "samples", "figures"],
)
def test_what_is_missing_is_left_out_and_the_rest_is_there(whole, tmp_path, missing):
    for path in whole.rglob("*"):
        if path.is_file() and not path.relative_to(whole).is_relative_to(missing):
            target = tmp_path / path.relative_to(whole)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())

    found, complete = seen(tmp_path), seen(whole)

    gone = {"samples": ["Samples"], "figures": ["Density, score and samples"]}.get(missing, [])
    assert found.all("h2") == [title for title in complete.all("h2") if title not in gone]
    kept = {
        "metrics.jsonl": 4,
        "samples": 4,
        "figures": 4,
    }.get(missing, 6)
    assert len(found.pictures()) == kept


def test_a_half_written_record_costs_its_torn_line(tmp_path):
    record = Record(put(tmp_path))
    record.log({"train/loss": 0.5}, 100)
    with open(record.path, "ab") as file:
        file.write(b'{"train/loss": 0.4, "train/iter')

    found = seen(tmp_path)
    assert "iteration 100" in found.all("p", "facts")[0]
    assert list(found.pictures()) == ["Loss of the training batches"]


@pytest.mark.parametrize("iteration", ["null", '"late"', "[3]"])
def test_a_row_without_a_number_of_its_iteration_is_left_out(tmp_path, iteration):
    Record(tmp_path).log({"train/loss": 0.5, "eval/nll": 3.0}, 100)
    with open(tmp_path / Record.FILE, "a") as file:
        file.write(f'{{"train/loss": 0.4, "eval/nll": 2.0, "train/iteration": {iteration}}}\n')

    found = seen(tmp_path)
    assert found.all("p", "result")[0].startswith("3 nats")
    assert len(found.pictures()) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"a": 1}',
        b"[1, null, []]",
        b'[{"metric": "bits_per_dim", "iteration": 5}]',
        b'[{"metric": "bits_per_dim", "iteration": 5, "value": NaN}]',
        b'[{"metric": "bits_per_dim", "iteration": "5", "value": 1.0}]',
        b'[{"metric": "accuracy", "iteration": 5, "value": 1.0}]',
        b'[{"metric": [], "iteration": 5, "value": 1.0}]',
    ],
)
def test_evaluations_that_cannot_be_read_are_left_out(tmp_path, content):
    put(tmp_path)
    (tmp_path / "likelihood.json").write_bytes(content)

    found = seen(tmp_path)
    assert "No evaluation yet." in found.all("header")[0]
    assert found.section("All evaluations").startswith("No full evaluation yet")


def test_an_evaluation_with_only_its_result_is_shown(tmp_path):
    row = {key: FULL[key] for key in ("metric", "value", "iteration")}

    found = seen(put(tmp_path, ABOUT, [row | {"standard_error": "unknown"}]))
    assert found.all("td") == ["1600", "1.812 bits/dim", "–", "–", "–", ""]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"versions": 3, "entropy": "high"}'])
def test_a_broken_file_about_the_run_costs_its_facts(tmp_path, content):
    put(tmp_path, ABOUT, [NATS | {"entropy": None}])
    (tmp_path / "run.json").write_bytes(content)

    found = seen(tmp_path)
    assert found.all("h1") == [tmp_path.name]
    assert found.all("p", "facts") == []


def test_a_configuration_that_is_no_unicode_is_shown_as_far_as_it_goes(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"name: \xff\nseed: 0\n")

    assert seen(tmp_path).section("Configuration") == "name: \ufffd\nseed: 0"


def test_the_newest_picture_is_that_of_the_highest_iteration(tmp_path):
    nine, ten = (picture(tmp_path / f"samples/grid-{i}.png", seed=i) for i in (9, 10))
    (tmp_path / "samples/grid-best.png").write_bytes(nine)
    assert nine != ten
    os.utime(tmp_path / "samples/grid-9.png", (2e9, 2e9))

    assert seen(tmp_path).pictures() == {"Samples of the model, iteration 10": ten}


def asked_for(run_dir, name, drawn, **more):
    about = {"iteration": 10, "drawn": drawn, "sampler": "ddim", "nfe": 51, "steps": 50}
    path = run_dir / "samples" / f"samples-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(about | more))


def test_the_newest_of_mode_sample_is_shown_with_what_it_is_of(tmp_path):
    for seed, name in enumerate(("00000010-ddim-51-aaaaaa", "00000010-heun-3-bbbbbb", "00000010")):
        for stem in ("samples/grid", "samples/strip", "figures/path", "figures/density"):
            picture(tmp_path / f"{stem}-{name}.png", seed)
    one = (tmp_path / "samples/grid-00000010-ddim-51-aaaaaa.png").read_bytes()
    other = (tmp_path / "samples/grid-00000010-heun-3-bbbbbb.png").read_bytes()
    asked_for(tmp_path, "00000010-heun-3-bbbbbb", 1.0, sampler="heun", nfe=3, steps=1, eta=1.0)
    asked_for(tmp_path, "00000010-ddim-51-aaaaaa", 2.0, eta=0.0, temperature=0.9)

    how = "iteration 10: ddim, 50 steps, 51 evaluations, eta 0, temperature 0.9"
    assert list(seen(tmp_path).pictures().items()) == [
        (f"Samples of the model, {how}", one),
        (f"Samples on their way, one a row, with sigma/alpha above, {how}", one),
        (f"Points on their way; grey: data at the same noise, {how}", one),
        (f"What was learnt, {how}", one),
    ]
    asked_for(tmp_path, "00000010-heun-3-bbbbbb", 3.0, sampler="heun", nfe=3, steps=1, eta=1.0)
    how = "iteration 10: heun, 1 step, 3 evaluations"
    assert seen(tmp_path).pictures()[f"Samples of the model, {how}"] == other


def test_what_training_drew_later_than_mode_sample_is_shown_too(tmp_path):
    asked_for(tmp_path, "00000010-ddim-51-aaaaaa", 1.0, temperature=1.0, precision="bfloat16")
    mine = picture(tmp_path / "samples/grid-00000010-ddim-51-aaaaaa.png", 1)
    later = picture(tmp_path / "samples/grid-00000020.png", 2)
    picture(tmp_path / "samples/grid-00000010.png", 3)

    how = "iteration 10: ddim, 50 steps, 51 evaluations, bfloat16"
    assert seen(tmp_path).pictures() == {
        f"Samples of the model, {how}": mine,
        "Samples of the model, iteration 20": later,
    }


@pytest.mark.parametrize("content", ["[1]", "{", '{"drawn": 1}', '{"drawn": "x", "iteration": 1}'])
def test_a_broken_note_of_mode_sample_is_passed_over(tmp_path, content):
    own = picture(tmp_path / "samples/grid-00000010.png")
    picture(tmp_path / "samples/grid-00000010-ddim-51-aaaaaa.png", 1)
    (tmp_path / "samples/samples-00000010-ddim-51-aaaaaa.json").write_text(content)

    assert seen(tmp_path).pictures() == {"Samples of the model, iteration 10": own}


def compared(run_dir, name, **more):
    """A comparison of two samplers, one of which failed."""
    value = {"value": 0.1234, "low": 0.1, "high": 0.15}
    small = {"value": 2e-5, "low": -1e-5, "high": 5e-5}
    record = {
        "iteration": 10,
        "begun": 1.0,
        "floor": {"sliced_w2": value},
        "results": [
            {"sampler": "ddim eta=1", "nfe": 9, "seconds": 2.34, "sliced_w2": value}
            | {"mmd_squared": small},
            {"sampler": "<b>", "asked": "1 evaluations", "failed": "takes 3"},
        ],
    }
    (run_dir / "compare").mkdir(exist_ok=True)
    (run_dir / "compare" / f"{name}.json").write_text(json.dumps(record | more))


def test_a_comparison_is_a_figure_and_a_table_with_intervals(tmp_path):
    compared(tmp_path, "compare-10-aaaaaa", complete=True)
    shown = picture(tmp_path / "figures/compare-10-aaaaaa.png")

    found = seen(tmp_path)

    assert list(found.pictures().values()) == [shown]
    heads = ["sampler", "evaluations", "Sliced W2", "MMD squared", "seconds"]
    assert found.all("th") == heads
    assert found.all("td") == [
        *("training set", "–", "0.123 ± 0.025", "–", "–"),
        *("ddim eta=1", "9", "0.123 ± 0.025", "2.0e-05 ± 3.0e-05", "2.3"),
        "<b>, failed at 1 evaluations: takes 3",
    ]
    assert "complete" not in found.section("Samplers compared")


def test_of_several_comparisons_the_last_is_shown_and_whether_it_is_complete(tmp_path):
    compared(tmp_path, "compare-10-aaaaaa", complete=True)
    picture(tmp_path / "figures/compare-10-aaaaaa.png")
    rows = [{"sampler": "heun", "nfe": 5, "seconds": 1.0}]
    compared(tmp_path, "compare-10-bbbbbb", complete=False, begun=2.0, results=rows)

    found = seen(tmp_path)

    assert found.section("Samplers compared").startswith("Not complete")
    assert "heun" in found.all("td") and "ddim eta=1" not in found.all("td")
    assert not found.pictures(), "that of the one before would be taken for its"


@pytest.mark.parametrize("content", ["[1]", "{", '{"results": 3}', '{"results": [7, {}]}'])
def test_a_broken_comparison_leaves_the_page_whole(tmp_path, content):
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare/compare-10-aaaaaa.json").write_text(content)

    assert "Samplers compared" not in seen(tmp_path).all("h2")


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "headless", "folder", "dangling"])
def test_a_broken_picture_gives_way_to_the_one_before(tmp_path, damage):
    good = picture(tmp_path / "samples/grid-00000100.png")
    newest = tmp_path / "samples/grid-00000200.png"
    if damage == "folder":
        newest.mkdir()
    elif damage == "dangling":
        newest.symlink_to(tmp_path / "nowhere")
    else:
        contents = {"text": b"no picture", "empty": b"", "cut": good[:-20], "headless": good[1:]}
        newest.write_bytes(contents[damage])

    assert seen(tmp_path).pictures() == {"Samples of the model, iteration 100": good}


def test_without_matplotlib_the_page_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    Record(tmp_path).log({"train/loss": 0.5}, 100)

    assert "pip install matplotlib" in seen(tmp_path).section("Training loss")


def test_the_table_holds_every_evaluation_newest_first(tmp_path):
    found = seen(put(tmp_path, ABOUT, [NATS | {"iteration": 400, "note": None}, FULL]))

    how = "VPSDE(beta_min=0.1); exact; uniform, 1 draw(s)"
    assert found.all("th") == [
        "iteration",
        "result ± standard error",
        "samples",
        "evaluations",
        "seconds",
        "how",
    ]
    newest, older = found.all("td")[:6], found.all("td")[6:]
    assert newest[:5] == ["1600", "1.812 ± 0.013 bits/dim", "360", "85.6", "1234"]
    assert newest[5] == f"{how}; rtol 1e-4; step-00001600.pt"
    assert older[:2] == ["400", "2.8534 ± 0.0089 nats"]
    assert older[5] == f"{how}; step-00001600.pt"


@pytest.mark.parametrize(
    "command, base",
    [
        ("", "python run.py"),
        ("python run.py data=digits sde=ve", "python run.py data=digits sde=ve"),
        ("python run.py mode=sample seed=3 checkpoint=a.pt", "python run.py seed=3"),
        ("python run.py run.fresh=true run.name=b", "python run.py run.name=b"),
        ("python run.py ++run.fresh=true +mode.num_samples=8", "python run.py"),
        ("python run.py model.width=8 run.freshness=1", None),
        ("python checkpoint/run.py training.checkpoint_every=5", None),
        ("python run.py 'run.root=my runs' 'data.shape=[1,8,8]'", None),
        ("python run.py 'run.root=$HOME; rm -r x'", None),
        ("python run.py run.name=Jo's", "python run.py " + shlex.quote("run.name=Jo's")),
    ],
)
def test_commands_to_go_on_keep_the_choices_and_quote_what_needs_it(command, base):
    base = base or command

    assert list(go_on(command).values()) == [
        f"{base} mode=train",
        f"{base} mode=likelihood",
        f"{base} mode=sample",
        f"{base} mode=compare",
        f"{base} mode=calibrate",
        f"{base} mode=diagnose",
    ]


def test_the_commands_to_go_on_can_be_copied_from_the_page(tmp_path):
    found = seen(put(tmp_path, {"command": "python run.py 'run.name=a <b> & c'"}))

    assert found.all("code") == [
        f"python run.py 'run.name=a <b> & c' mode={mode}"
        for mode in ("train", "likelihood", "sample", "compare", "calibrate", "diagnose")
    ]


def test_a_failure_to_write_leaves_the_old_page(tmp_path, monkeypatch):
    old = write_report(put(tmp_path)).read_bytes()

    def full(path: Path, content: bytes) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["report.html", "run.json"]


def test_a_page_states_its_encoding_and_fits_a_phone():
    found = Seen(page("a & b", "<p>body</p>"))

    attributes = [a for tag, a in found.tags if tag == "meta"]
    assert attributes[0] == {"charset": "utf-8"}
    assert attributes[1]["name"] == "viewport" and "width=device-width" in attributes[1]["content"]
    assert found.all("title") == ["a & b"]
    assert re.search(r"img \{ max-width: 100%", STYLE)


def test_a_page_or_a_figure_that_cannot_be_written_costs_a_line_and_not_the_run(tmp_path):
    for iteration in (1, 2):
        Record(tmp_path).log({"train/loss": 0.5}, iteration)
    assert renew_report(tmp_path) == f"report: {tmp_path / 'report.html'}"
    shutil.rmtree(tmp_path / "figures", ignore_errors=True)
    (tmp_path / "figures").write_text("in the way")
    assert "Not drawn: " in write_report(tmp_path).read_text()
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    assert renew_report(tmp_path).startswith("warning: report.html not written (")
