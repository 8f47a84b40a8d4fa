"""Plans: each row is the run that it says, its published numbers are the paper's, and a wrong file is refused."""

import functools
import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from evaluations.emoji import emoji_features
from guided_diffusion.diffusion.diffusion import build_diffusion
from guided_diffusion.guidance.base import evaluations
from guided_diffusion.guidance.building import guidances_of
from guided_diffusion.guidance.methods.building import Guided, WeakNetwork
from guided_diffusion.networks.building import build_classifier, build_network, build_transformer
from guided_diffusion.runs.prepare import Configs
from guided_diffusion.settings.methods import Method
from guided_diffusion.settings.options import parse_args
from guided_diffusion.settings.shipped import shipped
from guided_diffusion.tables.forecast import forecast
from guided_diffusion.tables.plans import METRICS, TABLES, read_plan

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published.json").read_text())
OURS = ("demo", "guidances", "guidances_judged", "solvers")  # of the embedded model
PLANS = {name: read_plan(name) for name in [*PUBLISHED, *OURS, "pag"]}
RUNS = [(name, row) for name, plan in PLANS.items() for row in plan.rows if not row.missing]
each_run = pytest.mark.parametrize(("plan", "row"), RUNS, ids=lambda part: getattr(part, "name", part))
ADDRESS = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"


class ParsedError(Exception):
    """Stops a script when it has its settings."""


def settings_of(row):
    """The settings that the row's script makes of the row's flags, by what they are of."""

    def parse_and_stop(description, groups):
        raise ParsedError(parse_args(description, groups, row.arguments()))

    module = importlib.import_module(f"guided_diffusion.commands.{row.script}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse_args", parse_and_stop)
        with pytest.raises(ParsedError) as stop:
            module.main()
    return Configs.of(stop.value.args[0])


@functools.cache
def network_of(config, learn_sigma, transformer):
    with torch.device("meta"):
        if transformer.network:
            return build_transformer(transformer, config, learn_sigma)
        return build_network(config, learn_sigma)


def guidances(settings):
    network = network_of(settings.network, settings.diffusion.learn_sigma, settings.transformer)
    weak = WeakNetwork(network, lambda *_: None)  # of no use where nothing is sampled
    guided = Guided(network, settings.network, settings.sampling.labels, weak)
    return guidances_of(settings.sag, settings.others, settings.methods, guided)


def classifier_scale(settings):
    by_classifier = settings.by_classifier
    return by_classifier.classifier_scale if by_classifier and by_classifier.on else 0


def what_it_is(row):
    """A row's run in the words of published.json."""
    settings = settings_of(row)
    return {
        "weights": settings.sampling.model_path.partition("#")[0].rpartition("/")[2],
        "s": settings.sag.scale,
        "psi": settings.sag.sag_threshold,
        "sigma": settings.sag.blur_sigma,
        "layer": settings.sag.block_name,
        "mask": settings.sag.sag_mask,
        "share": settings.sag.sag_mask_share,
        "sag_channels": settings.sag.sag_channels,
        "cfg": settings.others.cfg_scale,
        "cfg_channels": settings.others.cfg_channels,
        "network": settings.transformer.network,
        "latent_factor": settings.transformer.latent_factor,
        "clip_denoised": settings.sampling.clip_denoised,
        "cg": classifier_scale(settings),
        "steps": build_diffusion(settings.diffusion).num_timesteps,
        "samples": settings.sampling.num_samples,
        "reference": row.reference.rpartition("/VIRTUAL_")[2].removesuffix(".npz"),
    }


def test_there_is_a_test_for_every_plan():
    assert {path.stem for path in TABLES.glob("*.yaml")} == set(PLANS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_are_those_of_the_paper(name):
    wanted = {row: about["published"] for row, about in PUBLISHED[name]["rows"].items()}
    assert {row.name: dict(row.published) for row in PLANS[name].rows} == wanted
    assert PLANS[name].paper


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_row_is_the_run_that_it_says(name):
    for row in PLANS[name].rows:
        run = PUBLISHED[name]["rows"][row.name]["run"]
        assert bool(row.missing) == (run is None)
        if run is not None:
            wanted, got = PUBLISHED[name]["every run"] | run, what_it_is(row)
            assert {key: got[key] for key in wanted} == wanted, row.name


@each_run
def test_guidance_of_every_row(plan, row):
    """Its blocks are in the network, its scales are those of the flags; in the paper's tables it acts at every step."""
    settings = settings_of(row)
    built = guidances(settings)
    scales = [settings.sag.scale, settings.others.cfg_scale, settings.others.pag_scale, settings.others.seg_scale]
    scales += [method.scale for method in settings.methods if isinstance(method, Method)]
    assert sorted(guidance.scale for guidance in built if guidance.scale) == sorted(filter(None, scales))
    if classifier_scale(settings):
        with torch.device("meta"):
            build_classifier(settings.network.image_size, settings.classifier, settings.network.num_classes)
    if plan in PUBLISHED:
        assert settings.sag.fidelity == "corrected"
        assert plan == "table4" or not any(scales[1:])
        process = build_diffusion(settings.diffusion).process
        for guidance in built:
            assert guidance.schedule.every == 1
            assert set(guidance.schedule.factors(process)) == {1.0}


def test_rows_of_perturbed_attention_are_its_authors_settings():
    found = {}
    for row in PLANS["pag"].rows:
        settings = settings_of(row)
        process = build_diffusion(settings.diffusion).process
        steps, built = process.num_timesteps, guidances(settings)
        assert len([guidance for guidance in built if guidance.scale]) == ("pag" in row.name)
        assert evaluations(built, process) == (2 * steps if "pag" in row.name else steps)
        found[row.name] = (settings.network.class_cond, settings.sampling.sampler_name, steps, row.published.get("fid"))
    assert found == {
        "uncond_ddpm_none": (False, "ddpm", 250, 26.21),
        "uncond_ddpm_pag": (False, "ddpm", 250, 16.23),
        "cond_ddpm_none": (True, "ddpm", 250, 10.94),
        "cond_ddpm_pag": (True, "ddpm", 250, 6.32),
        "uncond_ddim_none": (False, "ddim", 25, None),
        "uncond_ddim_pag": (False, "ddim", 25, None),
        "cond_ddim_none": (True, "ddim", 25, None),
        "cond_ddim_pag": (True, "ddim", 25, None),
    }
    assert settings.others.pag_scale == 4 - 1


def test_rows_that_say_unguided_are_unguided():
    off = ("s = 0", "with classes", "no SAG")
    rows = [row for _, row in RUNS if row.label in off or row.label.startswith(("unguided", "no guidance"))]
    assert len(rows) == 45
    for row in rows:
        assert not any(guidance.scale for guidance in guidances(settings_of(row)))


@each_run
def test_what_varies_is_the_x_of_a_curve(plan, row):
    field = {"sigma": "blur_sigma", "psi": "sag_threshold"}.get(row.group, "scale")
    if row.x is not None:
        settings = settings_of(row)
        assert row.x == (settings.others.pag_scale if plan == "pag" else getattr(settings.sag, field))
    assert row.group in PLANS[plan].groups


@each_run
def test_references(plan, row):
    if plan in OURS:
        assert Path(row.reference).is_file()
    elif plan == "table7":
        assert row.reference == ""
    else:
        file = row.reference.rpartition("/")[2]
        size = settings_of(row).network.image_size
        subject = file.removeprefix("VIRTUAL_lsun_").removesuffix("256.npz")
        folder = f"imagenet/{size}" if file == f"VIRTUAL_imagenet{size}_labeled.npz" else f"lsun/{subject}"
        assert row.reference == f"{ADDRESS}/{folder}/{file}"


def test_the_best_row_of_every_ablation_is_one_run():
    rows = ["table5/self_attention", "table6/sigma_3", "table10/psi_10", "table11/out_8", "scales/scale_01"]
    named = {f"{plan}/{row.name}": row for plan, row in RUNS}
    first, *others = [vars(settings_of(named[name])) for name in rows]
    assert all(other == first for other in others)


def test_configurations_and_plans_publish_the_same():
    rows = [row for name in PUBLISHED for row in PLANS[name].rows if row.config]
    for name in {row.config[0] for row in rows}:
        in_plans = [dict(row.published) for row in rows if row.config[0] == name]
        for entry in yaml.safe_load(shipped(f"{name}.yaml").read_text())["published"]:
            assert {key: value for key, value in entry.items() if key in METRICS} in in_plans


@pytest.mark.parametrize("plan", OURS)
def test_our_plans_run_the_embedded_model(plan):
    for row in PLANS[plan].rows:
        assert Path(settings_of(row).sampling.model_path).is_file()
        assert not row.published


def test_solvers_are_compared_at_the_network_evaluations_that_their_group_names():
    for row in PLANS["solvers"].rows:
        settings = settings_of(row)
        found = evaluations(guidances(settings), build_diffusion(settings.diffusion).process)
        if row.group == "many":
            assert found == (50 if "unguided" in row.label else 100)
        elif row.group == "unguided":
            assert row.label.endswith(f", {found}")
        else:
            assert PLANS["solvers"].groups[row.group].endswith(f", {found} evaluations")


def test_guidances_are_compared_at_equal_cost():
    groups = {"main": 50, "ode": 50, "classes": 50, "transforms": 50, "24": 24, "100": 100}
    for row in (row for plan in ("guidances", "guidances_judged") for row in PLANS[plan].rows if row.group in groups):
        settings = settings_of(row)
        steps = build_diffusion(settings.diffusion).process.num_timesteps
        found = evaluations(guidances(settings), build_diffusion(settings.diffusion).process)
        if "weak_model_path" in row.all_settings:  # a pass of it has a quarter of the multiply-adds
            found += steps / 4
        if row.label.endswith(" steps"):  # unguided, and in some groups there for its steps
            assert row.label.endswith(f", {found} steps")
        else:
            assert abs(found - groups[row.group]) < 1.1


def test_guidances_stand_beside_as_many_unguided_steps():
    rows = [row for plan in OURS for row in PLANS[plan].rows if row.group.startswith("steps_")]
    assert len(rows) == 46
    for row in rows:
        steps = build_diffusion(settings_of(row).diffusion).process.num_timesteps
        assert row.group == f"steps_{steps}"


def test_a_dry_run_counts_the_passes_of_a_weak_network_by_themselves(tmp_path):
    weak = {"weak_model_path": str(shipped("models", "emoji32_weak.safetensors")), "autoguidance_scale": 1}
    row = {"name": "one", "label": "first", "set": {**weak, "sag_scale": 0, "pag_scale": 1, "num_samples": 4}}
    plan = read_plan(written(tmp_path, {"title": "A plan", "config": ["emoji"], "rows": [row]}))
    assert list(forecast(plan.rows))[-1] == "  4 samples, 100 network evaluations each, and 50 of the weak network"


GOOD = {"title": "A plan", "config": ["emoji"], "rows": [{"name": "one", "label": "first", "x": 1, "set": {"seed": 1}}]}


def written(folder, plan):
    path = folder / "plan.yaml"
    path.write_text(plan if isinstance(plan, str) else yaml.safe_dump(plan))
    return path


def with_row(**changes):
    return GOOD | {"rows": [GOOD["rows"][0] | changes]}


def test_a_row_takes_the_settings_of_its_plan_and_wins(tmp_path):
    plan = GOOD | {"set": {"seed": 5, "num_samples": 3}, "reference": "models/emoji32_train.npz"}
    [row] = read_plan(written(tmp_path, plan)).rows
    assert row.settings == {"seed": 1, "num_samples": 3}
    assert row.x == 1.0
    assert Path(row.reference).is_file()
    assert settings_of(row).sampling.seed == 1
    assert settings_of(row).sampling.num_samples == 3
    assert row.script == "image_sample"
    [row] = read_plan(written(tmp_path, with_row(config=["emoji", "emoji_classifier"]))).rows
    assert row.script == "classifier_sample"


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("rows: [", "not YAML ("),
        ("- a list", "wanted keys and values, got ['a list']"),
        ("", "wanted keys and values, got None"),
        (GOOD | {"colour": 1}, "unknown key 'colour'; wanted some of common_n, config, features,"),
        ({"rows": []}, "wanted a title, got none"),
        ({"title": "A plan"}, "wanted a rows, got none"),
        (GOOD | {"title": 5}, "title: wanted a text, got 5"),
        (GOOD | {"rows": 5}, "rows: wanted a list, got 5"),
        (GOOD | {"rows": ["one"]}, "wanted a row, got 'one'"),
        (GOOD | {"rows": [{"label": "no name"}]}, "name: wanted a text, got None"),
        (GOOD | {"rows": 2 * GOOD["rows"]}, "two rows are called 'one'"),
        (GOOD | {"set": ["seed"]}, "set: wanted flags, got ['seed']"),
        (GOOD | {"groups": "main"}, "groups: wanted titles by group, got 'main'"),
        ({key: GOOD[key] for key in ("title", "rows")}, "row one: wanted a config, or missing: why there is none"),
        (with_row(config="emoij"), f"row one: config: {shipped('emoij.yaml')}: no such configuration; did you mean em"),
        (with_row(config=5), "row one: config: wanted a list of names, got 5"),
        (with_row(config=[5]), "row one: config: wanted a list of names, got 5"),
        (with_row(scale=1), "row one: unknown key 'scale'; wanted some of "),
        (with_row(label=5), "row one: label: wanted a text, got 5"),
        (with_row(missing=None), "row one: missing: wanted a text, got None"),
        (with_row(reference=5), "row one: reference: wanted a text, got 5"),
        (with_row(set="seed"), "row one: set: wanted flags, got 'seed'"),
        (with_row(x="one"), "row one: x: wanted a number, got 'one'"),
        ({**GOOD, "features": "vgg"}, "features: wanted inception or emoji, got 'vgg'"),
        ({**GOOD, "pr_dtype": "bf16"}, "pr_dtype: wanted fp32 or fp16, got 'bf16'"),
        (with_row(published={"fdi": 1}), "row one: published: wanted some of fid, sfid, "),
        (with_row(published={"fid": "5.98"}), "row one: published: fid: wanted a number, or null for unknown, got"),
        (with_row(published={"fid": True}), "row one: published: fid: wanted a number, or null for unknown, got True"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_sentence(tmp_path, plan, said):
    path = written(tmp_path, plan)
    with pytest.raises(ValueError, match=r"\A.+\Z") as refusal:
        read_plan(path)
    assert str(refusal.value).startswith(f"{path}: {said}")


def test_a_plan_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(
        ValueError,
        match=r"table12\.yaml: no such plan; did you mean table.*; there are baselines, demo, guidances, ",
    ):
        read_plan("table12")


def test_a_folder_is_no_plan(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read_plan(tmp_path / "folder.yaml")


def test_the_committed_results_are_of_todays_plan():
    results = json.loads((TABLES / "results" / "demo.json").read_text())
    measured = [row for row in results["rows"] if row["metrics"] and row["group"] == "main"]
    assert len(measured) >= 3
    for row in measured:
        assert row["weights_sha256"] == emoji_features().weights
    assert [row["name"] for row in results["rows"]] == [row.name for row in PLANS["demo"].rows]
