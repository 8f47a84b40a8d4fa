"""The attention report: what it measures, what it writes, and its page."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.analysis import report as page
from guided_diffusion.analysis.ranking import Changes, doubts, ranking, recommendation, recommended_sigma
from guided_diffusion.analysis.scrubber import quantised, scrubber
from guided_diffusion.analysis.study import AttentionStudy, step_at
from guided_diffusion.analysis.watch import Watch
from guided_diffusion.diffusion.noise import SampleNoise
from guided_diffusion.guidance.masks import attention_mask
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.networks.attention import attention_blocks, record_attention
from guided_diffusion.runs.prepare import IMAGE_GROUPS, Configs, image_run
from guided_diffusion.settings.options import parse_args
from latents import DATA, diffusers
from running import LIMIT_S, SCRIPTS, refused, run

MODELS = SCRIPTS.parent / "configs" / "models"
KNOWN = {"data_dir": MODELS / "emoji32_train.npz", "object_masks": MODELS / "emoji32_masks.npz"}
FEW = {"config": SCRIPTS.parent / "configs" / "emoji.yaml", "num_samples": 3, "batch_size": 2, "timestep_respacing": 4}


def noise(rows, *shape, seed=0):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of a small report of the embedded model."""
    folder = tmp_path_factory.mktemp("report")
    run("attention_report", **FEW, **KNOWN, known_images=5, shown_steps=2, noise_levels="0.3,0.6", out_dir=folder)
    return folder


def embedded():
    argv = [text for key, value in FEW.items() for text in (f"--{key}", str(value))]
    return image_run(Configs.of(parse_args("", IMAGE_GROUPS, argv)), torch.device("cpu")).pipeline


def looks_of(sampler, **settings):
    """All looks of a run, and its last state."""
    blocks, seen = attention_blocks(sampler.network), []
    default = {"thresholds": [1.0], "blur_sigmas": [1.5], "steps": frozenset(range(4))}
    watching = Watch(blocks=blocks, seen=seen.append, **default | settings)
    for state, _ in replace(sampler, guidances=(*sampler.guidances, watching)).trajectory(range(2)):
        pass
    return seen, state.x


def test_study_is_what_a_loop_over_images_finds(small):
    network, diffusion = small
    blocks = attention_blocks(network)
    levels = noise(5, 3, 16, 16).mul(60).add(128).clamp(0, 255)
    objects = noise(5, 1, 16, 16, seed=1) > 0
    denoiser = diffusion.denoiser(network, True)
    study = AttentionStudy(denoiser, diffusion.process, blocks, [2, 6], [1.0, 1.3], seed=7)
    for rows in (range(3), range(3, 5)):
        study.add(rows, levels[rows], objects[rows], {})
    found = study.results()
    assert found["images"] == 5
    name, block = next(iter(blocks.items()))
    values = {2: [], 6: []}
    for step, own in values.items():
        for i in range(5):
            x_t = diffusion.q_sample(
                levels[i : i + 1] / 127.5 - 1, torch.tensor([step]), SampleNoise(7, [i], (3, 16, 16)).x_T()
            )
            with record_attention(block) as scores:
                denoiser(x_t, torch.tensor([step]), {})
            mask = attention_mask(scores[block], (16, 16), 1.3)
            own.append(float((mask & objects[i]).sum() / (mask | objects[i]).sum()))
    for place, own in enumerate(values.values()):
        number = found["blocks"][name]["by_step"][place]["1.3"]["iou"]
        assert number["value"] == pytest.approx(np.mean(own), abs=2e-6)
        assert number["error"] == pytest.approx(np.std(own, ddof=1) / 5**0.5, abs=2e-6)
    both = np.mean(list(values.values()), axis=0)
    number = found["blocks"][name]["over_steps"]["1.3"]["iou"]
    assert number["value"] == pytest.approx(both.mean(), abs=2e-6)
    assert number["error"] == pytest.approx(both.std(ddof=1) / 5**0.5, abs=2e-6)
    assert {tuple(size["map"]) for size in found["sizes"]} == {(8, 8), (16, 16)}
    assert sorted(block for size in found["sizes"] for block in size["blocks"]) == sorted(blocks)


def test_study_keeps_no_images(small):
    """What it holds after many batches is what it held after one."""
    network, diffusion = small
    study = AttentionStudy(diffusion.denoiser(network, True), diffusion.process, attention_blocks(network), [3], [1.0])

    def held():
        groups = (study.by_step, study.by_block, study.by_size, study.by_size_and_step, study.whole)
        return [np.size(part) for sums in groups for mean in sums.values() for part in vars(mean).values()]

    sizes = []
    for first in (0, 4, 8):
        study.add(range(first, first + 4), noise(4, 3, 16, 16, seed=first).add(128), None, {})
        sizes.append(held())
    assert sizes[0] == sizes[1] == sizes[2]
    assert "iou" not in study.by_step


def test_watching_does_not_change_a_guided_run():
    sampler = embedded()
    for state, _ in sampler.trajectory(range(2)):
        pass
    seen, x = looks_of(sampler)
    torch.testing.assert_close(x, state.x, atol=1e-5, rtol=0)
    assert [look.step for look in seen] == [3, 2, 1, 0]


def test_watching_shows_what_guidance_does():
    """At the first step, where nothing has been guided yet, Δ is that of self-attention guidance at the block."""
    sampler = embedded()
    [look], _ = looks_of(sampler, thresholds=[1.1, 1.3], blur_sigmas=[2.0, torch.inf], steps=frozenset([3]))
    for name in ("middle_block.1", "output_blocks.2.1"):
        block = attention_blocks(sampler.network)[name]
        sag = SelfAttentionGuidance(scale=1.0, block=block, threshold=1.1, blur_sigma=2.0)
        for _, guided in replace(sampler, guidances=(sag,)).trajectory(range(2)):
            step = guided.last_step
            break
        own = look.blocks[name]
        assert torch.equal(own.score, step.recorded[sag][block])
        assert torch.equal(own.masks[1.1], sag.mask(step))
        delta = sag.difference(step)
        torch.testing.assert_close(own.delta, delta)
        wanted = delta.flatten(1).norm(dim=1) / step.base.eps.flatten(1).norm(dim=1)
        torch.testing.assert_close(own.change[2.0], wanted)
        assert (own.change[torch.inf] > 0).all()


def test_bytes_hold_every_mask():
    score = torch.cat([noise(64, 50).exp().flatten(), torch.arange(0, 300) / 100, torch.arange(0, 300) / 100 + 2e-6])
    score = score.reshape(1, 1, -1)
    held = quantised(score)
    for n in range(255):
        mask = attention_mask(score, score.shape[1:], n / 100)[0].numpy()
        assert np.array_equal(held > n, mask), n


def test_changes_average_over_steps_then_samples():
    sampler = embedded()
    seen, _ = looks_of(sampler, blur_sigmas=[1.5, 3.0], steps=frozenset([3, 0]))
    changes = Changes(list(seen[0].blocks), [1.5, 3.0])
    changes.add(seen)
    of_samples = torch.stack([look.blocks["middle_block.1"].change[3.0] for look in seen]).mean(dim=0)
    number = changes.results()["middle_block.1"]["3"]
    assert number["n"] == 2
    assert number["value"] == pytest.approx(of_samples.mean().item(), abs=1e-6)
    assert number["error"] == pytest.approx(of_samples.std().item() / 2**0.5, abs=1e-6)


def test_ranking_and_recommendation():
    def block(iou_gain, excess):
        return {"map": [8, 8], "over_steps": {"1": {"iou_gain": {"value": iou_gain}, "excess": {"value": excess}}}}

    study = {"thresholds": ["1"], "blocks": {"a": block(0.1, 0.3), "b": block(0.3, 0.2), "c": block(None, 0.1)}}
    sizes = {"a": 0.5, "b": 0.4, "c": 0.6}
    change = {
        name: {
            "2": {"value": value},
            "1": {"value": 0.6 * value},
            "0.5": {"value": 0.4 * value},
            "inf": {"value": value},
        }
        for name, value in sizes.items()
    }
    rows = ranking(study, change)
    assert [row["block"] for row in rows] == ["a", "b", "c"]
    assert rows[0]["ranks"] == {"iou_gain": 2, "excess": 1, "change": 2}
    assert rows[0]["mean_rank"] == pytest.approx(5 / 3, abs=1e-3)
    assert recommendation(rows, change) == {"sag_block": "a", "blur_sigma": "1"}
    assert doubts(rows, 16, 16) == []
    assert doubts(rows, 371, 2) == ["2 samples are too few to tell blocks apart (wanted 16 or more)"]
    tied = [row | {"mean_rank": 1.5} for row in rows[:2]] + rows[2:]
    assert doubts(tied, 15, 16) == [
        "15 images are too few to tell blocks apart (wanted 16 or more)", "a, b share the first place"
    ]  # fmt: skip
    assert recommended_sigma({"1": {"value": 0.1}, "inf": {"value": 1.0}}) == "1"
    assert recommended_sigma({"inf": {"value": 1.0}}) == "inf"


def test_report_leaves_what_it_says(report):
    assert {path.name for path in report.iterdir()} == {
        "report.html", "report.md", "attention.json", "strips", "animations",
    }  # fmt: skip
    results = json.loads((report / "attention.json").read_text())
    assert results["study"]["images"] == 5
    assert results["study"]["steps"] == [1, 2]
    assert results["change"]["samples"] == 3
    assert results["change"]["steps"] == [0, 3]
    assert len(results["ranking"]) == len(results["study"]["blocks"]) == 7
    assert list(results["change"]["blocks"]["middle_block.1"]) == ["1.5", "0.375", "0.75", "3", "inf"]
    text = (report / "report.md").read_text()
    row = results["ranking"][0]
    assert "No recommendation: 5 images are too few" in text
    assert f"which is no evidence: --sag_block {row['block']} --blur_sigma" in text
    size = results["study"]["sizes"][0]
    gain = size["over_steps"]["1"]["iou_gain"]
    assert f"{gain['value']:.3f} ± {gain['error']:.3f} | 0.16 → 0.23" in text
    assert "no evidence" in text
    for number in range(3):
        picture = np.asarray(Image.open(report / "strips" / f"{number:06d}.png"))
        assert picture.std() > 10
        with Image.open(report / "animations" / f"{number:06d}.webp") as film:
            assert film.n_frames == 2


def test_what_the_page_reads_cannot_end_its_script(report):
    results = json.loads((report / "attention.json").read_text()) | {"title": "<i>"}
    text = page.html(results, {"blocks": "</script><b>"})
    assert text.count("</script>") == 2
    assert "<b>" not in text
    assert "<i>" not in text
    data = text.split('<script type="application/json">')[1].split("</script>")[0]
    assert json.loads(data) == {"blocks": "</script><b>"}


def test_curves_leave_out_what_is_not_known():
    pytest.importorskip("matplotlib")
    curve = {"value": [0.5, None], "error": [None, None]}
    size = {"map": [8, 8], "whole": {"value": [1.0, 2.0]}, "over_steps": {"1": {"curve": curve}}}
    figure = page.curves({"sizes": [size], "thresholds": ["1"], "cycles_per_pixel": [0.1, 0.2]})
    line, _, [bars] = figure.axes[0].containers[0].lines
    np.testing.assert_array_equal(line.get_ydata(), [1.5, np.nan])
    assert not any(len(segment) for segment in bars.get_segments())


PROBE = """<script>
  const root = document.querySelector(".scrubber"), found = [];
  const wait = async turn => { while (root.dataset.drawn !== String(turn)) await new Promise(r => setTimeout(r, 10)); };
  const set = (name, value) => {
    const control = root.querySelector(`[name=${name}]`);
    control.value = value; control.dispatchEvent(new Event("input"));
  };
  (async () => {
    let turn = 1;
    await wait(turn);
    const opened = root.querySelector("[name=at]").value;
    for (const [sample, block, step, psi] of CASES) {
      set("sample", sample); set("block", block); set("step", step); set("psi", psi);
      await wait(turn += 4);
      const pixels = name => {
        const shown = root.querySelector(`canvas[data-of=${name}]`), copy = document.createElement("canvas");
        [copy.width, copy.height] = [shown.width, shown.height];
        const context = copy.getContext("2d", {willReadFrequently: true});
        context.drawImage(shown, 0, 0);
        return [...context.getImageData(0, 0, copy.width, copy.height).data];
      };
      const mask = pixels("mask").filter((_, i) => i % 4 === 0).map(value => value / 255);
      found.push({mask, x0: pixels("x0"), degraded: pixels("degraded"), said: root.querySelector("[name=said]").value,
        psi: root.querySelector("[name=threshold]").value});
    }
    const broken = [...document.images].filter(image => !image.naturalWidth).length;
    document.title = JSON.stringify({found, opened, broken});
  })();
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_page_makes_the_masks_of_the_program(report, tmp_path):
    """Chromium: controls work, masks and shares are those of `attention_mask`, and the console stays empty."""
    cases = [
        (sample, block, step, psi) for sample in (0, 2) for block in (0, 3) for step in (0, 1) for psi in (100, 130, 73)
    ]
    html = (report / "report.html").read_text().replace('"step": 0', '"step": 1')  # of steps 3 and 0 it opens at 0
    (tmp_path / "probe.html").write_text(html.replace("</body>", PROBE.replace("CASES", json.dumps(cases)) + "</body>"))
    process = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom",
         "--virtual-time-budget=20000", f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path}/probe.html"],
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert "CONSOLE" not in process.stderr
    title = json.loads(process.stdout.split("<title>")[1].split("</title>")[0])
    assert title["broken"] == 0
    assert title["opened"] == "t = 0 of 4"
    sampler = embedded()
    blocks, seen = attention_blocks(sampler.network), []
    watching = Watch(blocks=blocks, steps=frozenset([0, 3]), thresholds=[1.0], blur_sigmas=[1.5], seen=seen.append)
    for indices in (range(2), range(2, 3)):
        for _ in replace(sampler, guidances=(*sampler.guidances, watching)).trajectory(indices):
            pass
    for (sample, block, step, psi), found in zip(cases, title["found"], strict=True):
        look = seen[step + 2 * (sample // 2)]
        score = list(look.blocks.values())[block].score[sample % 2][None]
        wanted = attention_mask(score, score.shape[1:], psi / 100)
        assert found["mask"] == wanted.flatten().float().tolist()
        assert found["psi"] == f"{psi / 100:.2f}"
        [share] = re.findall(r"share covered ([\d.]+) %", found["said"])  # of a half, one rounds up and one to even
        assert abs(float(share) - 100 * float(wanted.float().mean())) <= 0.05 + 1e-9
        # The degraded picture differs from x̂_0 inside the mask only.
        x0, degraded = (np.array(found[name]).reshape(32, 32, 4) for name in ("x0", "degraded"))
        inside = attention_mask(score, (32, 32), psi / 100)[0, 0].numpy()
        assert np.array_equal(x0[~inside], degraded[~inside])
        assert not np.array_equal(x0[inside], degraded[inside])


def test_page_opens_in_the_middle_of_the_run():
    def opened(steps, of):
        return scrubber([], {"block": (8, 8)}, steps, of, 1.0, 1.5, "block")["step"]

    assert opened([49, 33, 16, 0], 50) == 1
    assert opened([249, 208, 166, 124, 83, 42, 0], 250) == 3
    assert opened([3], 4) == 0


def test_page_stands_alone(report):
    text = (report / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"']https?:", text)
    assert text.count('class="scrubber"') == 1


def test_blocks_gif_and_samples_as_known_images(tmp_path, capsys):
    run(
        "attention_report", **FEW, blocks="middle_block.1,output_blocks.3.1", shown_steps=1, animation="gif",
        noise_levels="0.5", thresholds="1.2", blur_sigmas="2", out_dir=tmp_path,
    )  # fmt: skip
    results = json.loads((tmp_path / "attention.json").read_text())
    assert list(results["study"]["blocks"]) == ["middle_block.1", "output_blocks.3.1"]
    assert results["study"]["images"] == 3
    assert not results["objects"]
    assert "iou" not in results["study"]["blocks"]["middle_block.1"]["over_steps"]["1.2"]
    assert (tmp_path / "animations" / "000002.gif").exists()
    assert "samples of the run itself" in capsys.readouterr().out


def test_refusals(capsys, tmp_path):
    FEW_AND = FEW | {"out_dir": tmp_path / "out"}
    assert "no attention block 'nowhere'; there are: input_blocks.3.1" in refused(
        capsys, "attention_report", **FEW_AND, blocks="nowhere"
    )
    assert "object_masks: the masks of which images" in refused(
        capsys, "attention_report", **FEW_AND, object_masks=KNOWN["object_masks"]
    )
    assert "noise_levels: wanted numbers from 0 to 1" in refused(
        capsys, "attention_report", **FEW_AND, noise_levels="0.5,2"
    )
    assert "thresholds: wanted float, got 'x'" in refused(capsys, "attention_report", **FEW_AND, thresholds="x")
    assert "data_dir: no such file or folder" in refused(
        capsys, "attention_report", **FEW_AND, data_dir=tmp_path / "none"
    )
    assert "blur_sigma: wanted 0 or more" in refused(capsys, "attention_report", **FEW_AND, blur_sigmas="-1")
    assert not (tmp_path / "out").exists()


def test_step_at():
    assert [step_at(part, 50) for part in (0, 0.1, 0.5, 1)] == [0, 5, 25, 49]


@pytest.mark.parametrize("scheduler", ["", "euler"])
def test_stable_diffusion(tmp_path, scheduler):
    diffusers()
    rng = np.random.RandomState(0)
    np.savez(tmp_path / "images.npz", rng.randint(0, 256, (2, 160, 160, 3)).astype(np.uint8))
    np.savez(tmp_path / "masks.npz", 255 * (rng.rand(2, 160, 160) > 0.5).astype(np.uint8))
    run(
        "attention_report", model=DATA / "model", prompt="a", num_images=2, steps=3, shown_steps=2, batch_size=2,
        scheduler=scheduler, data_dir=tmp_path / "images.npz", object_masks=tmp_path / "masks.npz",
        noise_levels="0.2,0.9", blur_sigmas="1", out_dir=tmp_path / "out",
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "attention.json").read_text())
    study = results["study"]
    assert study["images"] == 2
    assert "mid_block.attentions.0.transformer_blocks.0.attn1" in study["blocks"]
    for row in results["ranking"]:
        for measure in ("iou_gain", "excess", "change"):
            assert np.isfinite(row["measures"][measure]["value"])
    with Image.open(tmp_path / "out" / "animations" / "000001.webp") as film:
        assert film.n_frames == 2
