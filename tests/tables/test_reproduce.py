"""Plans run row by row, and their reports."""

import base64
import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image

from evaluations import evaluate
from guided_diffusion.commands import reproduce
from guided_diffusion.guidance import base
from guided_diffusion.guidance.base import GuidedDenoiser
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance, null_class
from guided_diffusion.guidance.methods.autoguidance import Autoguidance
from guided_diffusion.guidance.perturbed_attention import PerturbedAttentionGuidance
from guided_diffusion.guidance.schedule import Schedule
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.settings.shipped import shipped
from guided_diffusion.tables import comparison, page, report, results
from guided_diffusion.tables.plans import read_plan
from guided_diffusion.tables.rows import prepare, weak_network_pass
from running import LIMIT_S, SCRIPTS, ended, mpiexec, refused, run

PUBLISHED = {"frechet_distance": 100, "recall": None}
PLAN = {
    "title": "A <test> plan",
    "paper": "nowhere, Table 0",
    "features": "emoji",
    "pr_dtype": "fp32",
    "common_n": 5,
    "groups": {"one": "Strength s", "two": "Others"},
    "config": ["emoji"],
    "set": {"timestep_respacing": "2", "num_samples": 5, "batch_size": 3},
    "reference": str(shipped("models", "emoji32_held_out.npz")),
    "rows": [
        {"name": "off", "label": "s = 0", "group": "one", "x": 0, "set": {"sag_scale": 0, "num_samples": 7}},
        {
            "name": "on",
            "label": "s = 1",
            "group": "one",
            "x": 1,
            "published": {"frechet_distance": 100, "recall": None},
        },
        {"name": "again", "label": "the same", "group": "two", "same_as": "on"},
        {"name": "by_class", "label": "CG", "group": "two", "config": ["emoji", "emoji_classifier"]},
        {"name": "broken", "label": "broken", "group": "two", "set": {"sag_block": "nowhere"}},
        {"name": "no_weights", "label": "other", "group": "two", "config": [], "missing": "there is no such network"},
    ],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a plan that was run once, and the plan's path."""
    folder = tmp_path_factory.mktemp("plan")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    run("reproduce", path, out_dir=folder / "out")
    return folder / "out", path


def rows_of(folder):
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}


def test_every_row_is_measured_or_says_why_not(ran):
    rows = rows_of(ran[0])
    assert list(rows) == [row["name"] for row in PLAN["rows"]]
    assert {name for name, row in rows.items() if row["metrics"]} == {"off", "on", "again", "by_class"}
    assert rows["off"]["n"] == 7
    assert rows["on"]["n"] == 5
    assert rows["off"]["network_evaluations_per_sample"] == 2
    assert rows["on"]["network_evaluations_per_sample"] == 4
    assert rows["by_class"]["classifier_gradients_per_sample"] == 2
    assert rows["again"]["metrics"] == rows["on"]["metrics"]
    assert rows["again"]["label"] == "the same"
    assert "no attention block 'nowhere'" in rows["broken"]["reason"]
    assert rows["no_weights"]["reason"] == "there is no such network"
    # All compare at the same number of samples.
    assert rows["off"]["common"]["frechet_distance"] != rows["off"]["metrics"]["frechet_distance"]
    assert rows["on"]["common"] == rows["on"]["metrics"]
    assert "frechet_distance" in rows["by_class"]["common"]


def test_a_row_that_shows_anothers_run_asks_for_that_run(ran, tmp_path):
    shutil.copytree(ran[0] / "on", tmp_path / "on")
    run("reproduce", ran[1], rows="again", out_dir=tmp_path)
    assert {name for name, row in rows_of(tmp_path).items() if row["metrics"]} == {"on", "again"}


def test_a_second_run_goes_on_and_keeps_what_is_there(ran, capsys, tmp_path):
    folder, path = tmp_path / "out", ran[1]
    shutil.copytree(ran[0], folder)
    before = rows_of(folder)
    run("reproduce", path, rows="off", out_dir=folder)
    assert "0 samples in" in capsys.readouterr().out
    after = rows_of(folder)
    assert after == before
    assert after["off"]["images_per_s"] > 0
    # A row that the plan asks for in another way is not taken over.
    changed = json.loads(json.dumps(PLAN))
    changed["rows"][1]["set"] = {"blur_sigma": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(changed))
    run("reproduce", folder / "tiny.yaml", rows="off", out_dir=folder)
    after = rows_of(folder)
    assert after["on"]["reason"] == "not yet"
    gone = {"against": "again", "reason": "no first row: on is not measured here"}
    assert after["by_class"] == before["by_class"] | {"difference": gone}


def test_report_shows_published_and_measured(ran):
    text = (ran[0] / "report.md").read_text()
    row = rows_of(ran[0])["on"]
    measured = row["metrics"]["frechet_distance"]
    line = next(line for line in text.splitlines() if line.startswith("| s = 1 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == [
        "100.00",
        f"{measured['value']:.2f} ± {measured['error']:.2f}",
        f"{measured['value'] - 100:+.2f}",
    ]
    assert "unknown" in cells
    assert "not run: there is no such network" in text
    assert "3 of 5 rows measured (1 more show the numbers of another)." in text
    assert "; N is 7, not 50000 (1 of 3 rows); " in text
    assert "; N is 5, not 50000 (2 of 3 rows)" in text
    assert "## Strength s" in text


def test_rows_differ_from_the_first_of_their_group_by_paired_errors(ran):
    folder, rows = ran[0], rows_of(ran[0])
    assert rows["off"]["difference"] is None
    assert rows["again"]["difference"] is None  # the first of its own group
    difference = rows["on"]["difference"]
    assert (difference["against"], difference["n"]) == ("off", 5)
    assert set(difference["metrics"]) == {"frechet_distance", "precision", "recall"}
    told = evaluate(
        PLAN["reference"], folder / "on", against=folder / "off", num_samples=5, features="emoji",
        cache=folder / "features",
    )["difference"]["metrics"]  # fmt: skip
    for name, found in difference["metrics"].items():
        assert found["value"] == pytest.approx(
            rows["on"]["common"][name]["value"] - rows["off"]["common"][name]["value"]
        )
        assert found["error"] == pytest.approx(told[name]["error"])
    found = difference["metrics"]["frechet_distance"]
    assert found["errors"] == pytest.approx(found["value"] / found["error"])

    cell = f"| {found['value']:+.2f} ± {found['error']:.2f} ({found['errors']:+.1f}) at N = 5 |"
    why = "CG: not paired: labels is 'random' in by_class, 'none' in on."
    assert rows["by_class"]["difference"] == {"against": "again", "reason": why[4:-1]}
    text, page = ((folder / f"report.{kind}").read_text() for kind in ("md", "html"))
    lines = text.splitlines()
    assert cell in next(line for line in lines if line.startswith("| s = 1 |"))
    assert "| not paired |" in next(line for line in lines if line.startswith("| CG |"))
    assert why in lines
    assert "CG: not paired: labels is" in page
    assert cell.strip("| ") in page


def test_differences_are_made_whichever_row_comes_first(ran, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(ran[0], folder)
    (folder / "results.json").unlink()
    run("reproduce", ran[1], rows="on", out_dir=folder)
    assert rows_of(folder)["on"]["difference"] == {
        "against": "off", "reason": "no first row: off is not measured here",
    }  # fmt: skip
    assert "| no first row |" in (folder / "report.md").read_text()
    run("reproduce", ran[1], rows="off", out_dir=folder)
    assert rows_of(folder)["on"]["difference"] == rows_of(ran[0])["on"]["difference"]


def test_which_rows_a_run_is_compared_in(ran):
    plan = read_plan(ran[1])

    def names(pairs):
        return [(row.name, first.name) for row, first in pairs]

    assert names(plan.compared("off")) == [("on", "off")]
    assert names(plan.compared("on")) == [
        ("on", "off"),
        ("by_class", "again"),
        ("broken", "again"),
        ("no_weights", "again"),
    ]
    # Rows whose turn comes ask for themselves.
    assert names(plan.compared("on", {"by_class", "broken", "no_weights"})) == [("on", "off")]


def test_page_stands_alone(ran):
    text = (ran[0] / "report.html").read_text()
    assert "A &lt;test&gt; plan" in text
    assert "<test>" not in text
    assert "<svg" in text or "needs matplotlib" in text
    for source in ("src=", "href="):
        for part in text.split(source)[1:]:
            assert part.startswith(('"data:image/png;base64,', '"#', "'#"))


def test_page_shows_every_measured_row_and_holds_each_picture_once(ran):
    folder = ran[0]
    text = (folder / "report.html").read_text()
    pictures = {name: ["guided", "mask", "unguided"] for name in ("on", "by_class")} | {"off": ["unguided"]}
    files = {name: sorted((folder / name / "same_noise").iterdir()) for name in pictures}
    assert {name: [path.stem for path in paths] for name, paths in files.items()} == pictures
    off, on = (np.asarray(Image.open(folder / name / "same_noise" / "unguided.png")) for name in ("off", "on"))
    assert np.array_equal(off[:, : 5 * 34], on[:, : 5 * 34])
    assert (on[:, 5 * 34 :] == 255).all()  # five samples stand in the same columns as seven
    # "again" shows what "on" does, and nothing is in the page twice.
    held = re.findall(r'<image id="picture-\d+" width="270" height="32" href="data:image/png;base64,([^"]*)"', text)
    assert len(set(held)) == len(held) == text.count("data:image/png")
    assert set(held) == {base64.b64encode(path.read_bytes()).decode() for paths in files.values() for path in paths}
    places = [text.index(part) for part in ("<b>s = 0</b>", "<b>s = 1</b>", "<table>", "<b>the same</b>")]
    assert places == sorted(places)
    difference = rows_of(folder)["on"]["difference"]["metrics"]["frechet_distance"]
    assert f"{difference['value']:+.2f} ± {difference['error']:.2f}" in text.split("<b>s = 1</b>")[1].split("</p>")[0]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_page_in_a_browser(ran, tmp_path):
    """Chromium draws tables and pictures, shows what is unguided on request, and its console stays empty."""
    text = (ran[0] / "report.html").read_text()
    probe = """<script>(async () => {
      const load = async image => {
        const copy = new Image(); copy.src = image.href.baseVal; await copy.decode(); return copy.naturalWidth;
      };
      const widths = await Promise.all([...document.querySelectorAll("image")].map(load));
      const strips = [...document.querySelectorAll(".line svg")], over = document.querySelector(".line .over");
      const before = getComputedStyle(over).opacity;
      over.closest("svg").focus();
      document.title = JSON.stringify({tables: document.querySelectorAll("tbody tr").length, widths,
        strips: new Set(strips.map(strip => strip.getBoundingClientRect().width)).size,
        shown: [before, getComputedStyle(over).opacity], wide: document.body.scrollWidth});
    })();</script>"""
    (tmp_path / "probe.html").write_text(text.replace("</body>", f"{probe}</body>"))
    process = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom",
         "--virtual-time-budget=20000", "--window-size=500,800", f"--user-data-dir={tmp_path}/profile",
         f"file://{tmp_path}/probe.html"],
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert "CONSOLE" not in process.stderr
    found = json.loads(process.stdout.split("<title>")[1].split("</title>")[0])
    assert found["shown"] == ["0", "1"]
    assert found["widths"] == [8 * 34 - 2] * 7
    assert found["strips"] == 1  # so that the same noise stands in the same column
    assert found["wide"] <= 500  # what is wider scrolls by itself
    assert found["tables"] >= 6


def test_a_pass_of_a_weak_network_is_measured(ran):
    pipeline = prepare(read_plan(ran[1]).chosen("off")[0], torch.device("cpu")).pipeline
    assert weak_network_pass(pipeline) is None
    guidance = Autoguidance(scale=1.0, weak=pipeline.denoiser)
    assert weak_network_pass(replace(pipeline, guidances=(guidance,))) == 1


def test_the_same_noises_under_the_rows_of_a_group(ran, tmp_path):
    """docs/figures.py"""
    pytest.importorskip("matplotlib")
    folder, found = ran[0], json.loads((ran[0] / "results.json").read_text())
    script = runpy.run_path(str(SCRIPTS.parent / "docs" / "figures.py"))
    script["draw_noises"](folder, found, "one", tmp_path / "noises.png")
    picture = np.asarray(Image.open(tmp_path / "noises.png"))
    samples = np.load(folder / "on" / "samples_5x32x32x3.npz")["arr_0"]
    images = comparison.side_by_side({"s = 0": folder / "off", "s = 1": folder / "on"}, 4)
    assert np.array_equal(images[4:], samples[:4])
    last = samples[3].repeat(3, axis=0).repeat(3, axis=1)
    assert np.array_equal(picture[-96 - 4 : -4, -96 - 4 : -4], last)
    with pytest.raises(SystemExit, match="not of the same noise: labels is"):
        script["draw_noises"](folder, found, "two", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_dry_run_counts_what_a_run_takes(ran, capsys):
    run("reproduce", ran[1], "--dry_run", "--timing", rows="off,on,by_class,no_weights")
    out = capsys.readouterr().out
    assert "7 samples, 2 network evaluations each" in out
    assert out.count("5 samples, 4 network evaluations each") == 2
    assert "cannot be run: there is no such network" in out
    assert "python scripts/classifier_sample.py --config emoji --config emoji_classifier" in out
    assert "hours in all with 1 rank(s)" in out


def test_a_dry_run_lists_at_once(ran, capsys, monkeypatch):
    """It prints the command of the samples asked for; networks of the paper's size get no memory and are not run."""
    monkeypatch.setattr("guided_diffusion.tables.forecast.seconds_per_step", lambda _: pytest.fail("timed"))
    monkeypatch.setattr("torch.nn.Module.to_empty", lambda *_, **__: pytest.fail("filled"))
    run("reproduce", ran[1], "--dry_run", rows="off,on", samples=64)
    out = capsys.readouterr().out
    assert out.count("--num_samples 64") == out.count("64 samples, ") == out.count("--num_samples") == 2
    assert "hours" not in out
    run("reproduce", "table1", "--dry_run", rows="uncond_s0")
    assert "50000 samples, 250 network evaluations each" in capsys.readouterr().out


def named_rows():
    """Plan and patterns of every command in the page on tables and the script's help that asks for rows."""
    texts = (SCRIPTS.parent / "docs" / "tables.md").read_text(encoding="utf-8") + (reproduce.__doc__ or "")
    return re.findall(r"reproduce\.py (\w+)[^\n]*--rows '?([^\s']+)", texts)


def test_commands_that_users_read_name_rows():
    assert len(named_rows()) >= 4
    for plan, patterns in named_rows():
        assert read_plan(plan).chosen(patterns)


def test_refusals(ran, capsys, tmp_path):
    assert "no row is called 'x*'; there are off, on" in refused(capsys, "reproduce", ran[1], rows="x*")
    assert "no such plan; there are" in refused(capsys, "reproduce", "nothing")
    (tmp_path / "bad.yaml").write_text("title: x\nrows: [{name: a, label: b, confg: emoji}]")
    assert "row a: unknown key 'confg'" in refused(capsys, "reproduce", tmp_path / "bad.yaml")
    for arguments in (["--samples", 0], ["--timing"]):
        with pytest.raises(SystemExit) as stop:
            run("reproduce", ran[1], *arguments)
        assert stop.value.code == 2


@pytest.mark.parametrize("name", ["../../esc", "/tmp/abs", "..", ".hidden", "a/b", "", "a\nb", "x" * 200])
def test_a_rows_name_is_no_path(tmp_path, capsys, name):
    plan = PLAN | {"rows": [PLAN["rows"][0] | {"name": name}]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    said = refused(capsys, "reproduce", tmp_path / "plan.yaml", out_dir=tmp_path / "out" / "here")
    assert "name: wanted letters, digits and _.+=-" in said
    assert not (tmp_path / "out").exists()


def test_a_table_that_measured_nothing_ends_so(tmp_path, capsys):
    plan = PLAN | {"rows": PLAN["rows"][-2:]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(SystemExit) as stop:
        run("reproduce", tmp_path / "plan.yaml", out_dir=tmp_path / "out")
    assert stop.value.code == "none of 2 rows was measured; why not stands in the report"
    assert "0 of 2 rows measured" in capsys.readouterr().out


def test_fetch_brings_files_to_the_cache(tmp_path, monkeypatch, capsys):
    plan = PLAN | {"reference": "https://example.org/ref.npz", "rows": PLAN["rows"][:2]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    asked = []
    monkeypatch.setattr(
        "guided_diffusion.tables.rows.local_path", lambda path: asked.append(path) or tmp_path / "there"
    )
    run("reproduce", tmp_path / "plan.yaml", "--fetch")
    assert asked == ["https://example.org/ref.npz"]
    assert "there" in capsys.readouterr().out


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("low_high", [(0, 1), (0.2, 0.7)])
def test_evaluations_are_counted_without_making_any(small_conditional, every, low_high):
    network, diffusion = small_conditional
    block = next(module for name, module in network.named_modules() if name == "middle_block.1")
    shared = {"schedule": Schedule(*low_high, every=every)}
    sag = SelfAttentionGuidance(scale=0.5, block=block, **shared)
    cfg = ClassifierFreeGuidance(scale=1.0, null=null_class(4), **shared)
    pag = PerturbedAttentionGuidance(scale=0.5, blocks=(block,), **shared)
    for guidances in ([], [sag], [cfg], [pag], [sag, cfg], [sag, pag], [cfg, pag], [sag, cfg, pag]):
        guided = GuidedDenoiser(diffusion.denoiser(network, True), diffusion.process, guidances)
        x = torch.zeros(1, 3, 16, 16)
        for t in reversed(range(diffusion.num_timesteps)):
            guided(x, torch.tensor([t]), {"y": torch.tensor([1])})
        assert base.evaluations(guidances, diffusion.process) == guided.evaluations


def some_result(row):
    found = {"value": 5.0, "error": 1.0}
    more = {"n": 5, "metrics": {"frechet_distance": found}, "network_evaluations_per_sample": 2}
    return results.unmeasured(row, "") | more


def test_two_commands_in_one_folder_keep_each_others_rows(ran, tmp_path, monkeypatch):
    """While one measures a row, another one finishes a row."""
    folder = tmp_path / "out"
    other = read_plan(ran[1]).chosen("off")[0]

    def measure(row, *_):
        results.write(folder, read_plan(ran[1]), {"off": some_result(other)}, torch.device("cpu"))
        return some_result(row)

    monkeypatch.setattr("guided_diffusion.tables.rows.measure", measure)
    run("reproduce", ran[1], rows="on", out_dir=folder)
    assert {name for name, row in rows_of(folder).items() if row["metrics"]} == {"off", "on", "again"}
    assert "2 of 5 rows measured" in (folder / "report.md").read_text()


def test_rows_that_were_not_made_alike_are_said_to_be(ran, tmp_path):
    plan = read_plan(ran[1])
    makers = {"off": {"device": "cpu", "samples": 7}, "on": {"device": "A GPU", "samples": 5}}
    done = {row.name: some_result(row) | {"made_by": [makers[row.name]]} for row in plan.rows[:2]}
    results.write(tmp_path, plan, done, torch.device("cpu"))
    assert "Not all samples were made alike" in (tmp_path / "report.md").read_text()
    assert "device cpu (7), A GPU (5)." in (tmp_path / "report.md").read_text()
    assert rows_of(ran[0])["off"]["made_by"][0]["samples"] == 7
    assert "made alike" not in (ran[0] / "report.md").read_text()


def test_results_are_written_one_after_the_other(ran, tmp_path):
    plan = read_plan(ran[1])
    done = {"off": some_result(plan.rows[0])}
    writer = Thread(target=results.write, args=(tmp_path, plan, done, torch.device("cpu")))
    with FileLock(tmp_path / ".lock"):
        writer.start()
        writer.join(timeout=0.5)
        assert writer.is_alive()
        assert not (tmp_path / "results.json").exists()
    writer.join(LIMIT_S)
    assert rows_of(tmp_path)["off"]["n"] == 5


def test_without_matplotlib_the_page_says_so(ran, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = report.html(json.loads((ran[0] / "results.json").read_text()), {})
    assert "<svg" not in text
    assert text.count("needs matplotlib") == 1  # of two groups, one has rows with an x


def test_reading_and_listing_plans_needs_no_scipy():
    code = (
        "import sys; from guided_diffusion.tables.plans import read_plan; read_plan('demo')\n"
        "assert not {'torch', 'evaluations', 'jinja2'} & set(sys.modules)\n"
        "import guided_diffusion.commands.reproduce, guided_diffusion.commands.demo\n"
        "assert not {'scipy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SCRIPTS.parent, timeout=LIMIT_S)


def test_texts_are_escaped():
    table = page.templates().get_template("parts.html.j2").module.table
    assert "<script>" not in table(["<script>"], [["<b>&"]]).replace("<tbody>", "")
    assert "&lt;b&gt;&amp;" in table(["x"], [["<b>&"]])
    text = page.as_markdown("Title", [], [page.Section("", "", ["x", "y"], [["|a|", "b"]])])
    assert text.splitlines()[-1] == r"| \|a\| | b |"
    section = page.Section("<b>", "p < 0.05", ["<i>"], [["a\nb <img src=x>"]])
    text = page.as_markdown("</h1>\n# other", ["<!-- x"], [section])
    assert text.splitlines() == [
        "# &lt;/h1> # other", "", "&lt;!-- x", "", "## &lt;b>", "", "p < 0.05", "", "| &lt;i> |", "| --- |",
        "| a b &lt;img src=x> |",
    ]  # fmt: skip


def test_a_plan_without_reference_measures_cost(tmp_path):
    rows = [{"name": "none", "label": "none", "set": {"sag_scale": 0}},
            {"name": "sag", "label": "SAG", "published": {"seconds": 186.6, "relative_time": 1.72}}]  # fmt: skip
    plan = PLAN | {"reference": "", "common_n": 0, "rows": rows}
    (tmp_path / "cost.yaml").write_text(yaml.safe_dump(plan))
    for _ in range(2):  # what was made once keeps its time
        run("reproduce", tmp_path / "cost.yaml", out_dir=tmp_path / "out")
        found = rows_of(tmp_path / "out")
        assert found["none"]["metrics"]["relative_time"]["value"] == 1
        times = [found[name]["metrics"]["seconds"]["value"] for name in ("none", "sag")]
        assert found["sag"]["metrics"]["relative_time"]["value"] == pytest.approx(times[1] / times[0])
    assert "1.72" in (tmp_path / "out" / "report.md").read_text()


def test_ranks_share_every_row(ran, tmp_path):
    """Two ranks make the rows one after the other, and the same numbers as one process."""
    script = SCRIPTS / "reproduce.py"
    process = mpiexec(2, [script, ran[1], "--rows", "off,on", "--out_dir", tmp_path / "out"])
    _, error = ended(process)
    assert process.returncode == 0, error
    one, two = rows_of(ran[0]), rows_of(tmp_path / "out")
    for name in ("off", "on"):
        for metric, measured in one[name]["metrics"].items():
            assert two[name]["metrics"][metric]["value"] == pytest.approx(measured["value"], rel=1e-6)
