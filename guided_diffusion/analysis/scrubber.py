"""A part of a page to look through steps, blocks and ψ of samples; masks are made in the page, from the scores."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..guidance.masks import ROUNDING
from ..storage import pictures
from .watch import Look, heat_map, magnitude, shown_as

QUANTA = 100
"""ψ is chosen in steps of 1/QUANTA, from 0 to LARGEST / QUANTA."""

LARGEST = 254

HOW = (
    "The page holds each score A as one byte, the number of ψ among 0, 0.01, …, 2.54 that it exceeds. For these ψ the "
    "masks made here are therefore exactly those of the program; only how far a score lies above 2.54 is lost. |Δ| and "
    "the change ‖Δ‖/‖ε‖ are for the ψ and σ that are named below, at every place of the ψ slider."
)

STYLE = """
.scrubber label { display: inline-flex; gap: .5rem; align-items: center; margin-right: 1.5rem; }
.scrubber figure { margin: .5rem 0; }
.scrubber canvas, .scrubber img { width: 11rem; height: 11rem; image-rendering: pixelated; display: block; }
"""

CONTROLS = """
<p><label>sample <select name="sample"></select></label><label>block <select name="block"></select></label>
<label>step <input name="step" type="range" min="0" value="0"><output name="at"></output></label>
<label>ψ <input name="psi" type="range" min="0"><output name="threshold"></output></label></p>
<div class="row">
<figure><canvas data-of="x0"></canvas><figcaption>x̂_0</figcaption></figure>
<figure><canvas data-of="score"></canvas><figcaption>score A (brightest: 2.5)</figcaption></figure>
<figure><canvas data-of="mask"></canvas><figcaption>mask A &gt; ψ</figcaption></figure>
<figure><canvas data-of="degraded"></canvas><figcaption>x̂_0, blurred in the mask</figcaption></figure>
<figure><img data-of="delta" alt="difference"><figcaption>|Δ| = |ε − ε̂|</figcaption></figure>
</div><p><output name="said"></output></p>
"""

SCRIPT = """
for (const root of document.querySelectorAll(".scrubber")) {
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const control = name => root.querySelector(`[name=${name}]`);
  const canvas = (name, width, height) => {
    const found = root.querySelector(`canvas[data-of=${name}]`);
    found.width = width; found.height = height;
    return found.getContext("2d");
  };
  const options = (name, texts) => control(name).append(...texts.map((text, i) => new Option(text, i)));
  options("sample", data.samples.map(sample => sample.index));
  options("block", data.blocks.map(block => `${block.name} (${block.map.join("×")})`));
  control("block").value = data.block;
  control("step").max = data.steps.length - 1;
  control("psi").max = data.largest;
  control("psi").value = data.psi;
  const loaded = {};
  const picture = source => loaded[source] ??= new Promise(done => {
    const image = new Image(); image.onload = () => done(image); image.src = source;
  });
  let newest = 0;
  const draw = async () => {
    const turn = ++newest, psi = Number(control("psi").value), place = Number(control("block").value);
    const step = data.steps[control("step").value], [rows, columns] = data.blocks[place].map;
    const look = data.samples[control("sample").value].looks[control("step").value], block = look.blocks[place];
    const score = Uint8Array.from(atob(block.score), letter => letter.charCodeAt(0));
    const images = await Promise.all([picture(look.x0), picture(look.blurred)]);
    if (turn !== newest) return;
    const [x0, blurred] = images, [width, height] = [x0.naturalWidth, x0.naturalHeight];
    const paint = (name, colour) => {
      const context = canvas(name, columns, rows), pixels = context.createImageData(columns, rows);
      score.forEach((value, i) => pixels.data.set([...colour(value), 255], 4 * i));
      context.putImageData(pixels, 0, 0);
    };
    paint("score", value => data.palette[value]);
    paint("mask", value => value > psi ? [255, 255, 255] : [0, 0, 0]);
    canvas("x0", width, height).drawImage(x0, 0, 0);
    const degraded = canvas("degraded", width, height), across = width / columns, down = height / rows;
    degraded.drawImage(x0, 0, 0);
    score.forEach((value, i) => {
      if (value <= psi) return;
      const cell = [(i % columns) * across, Math.floor(i / columns) * down, across, down];
      degraded.drawImage(blurred, ...cell, ...cell);
    });
    root.querySelector("img[data-of=delta]").src = block.delta;
    const share = score.filter(value => value > psi).length / score.length;
    control("at").value = `t = ${step} of ${data.of}`;
    control("threshold").value = (psi / data.quanta).toFixed(2);
    control("said").value = `share covered ${(100 * share).toFixed(1)} %, change ‖Δ‖/‖ε‖ ` +
      `${(100 * block.change).toFixed(2)} % (ψ = ${data.psi / data.quanta}, σ = ${data.sigma})`;
    root.dataset.drawn = turn;
  };
  for (const name of ["sample", "block", "step", "psi"]) control(name).addEventListener("input", draw);
  draw();
}
"""


def quantised(score: Tensor) -> NDArray[np.uint8]:
    """How many of the ψ = 0, 1/QUANTA, …, LARGEST/QUANTA each score exceeds, by the rule of `attention_mask`: uint8.

    A > n/QUANTA exactly where this is more than n.
    """
    edges = (torch.arange(LARGEST + 1, dtype=torch.float64) / QUANTA + ROUNDING).float()
    return torch.bucketize(score.float().cpu(), edges).numpy().astype(np.uint8)


def sample_looks(looks: Sequence[Look], rows: Sequence[int], sigma: float) -> list[dict[str, Any]]:
    """What `scrubber` shows of rows of a batch: their looks at all steps, the first step first."""
    samples = []
    for row in rows:
        seen = []
        for look in looks:
            size = look.x0.shape[2:]
            deltas = {name: magnitude(block.delta[row : row + 1]) for name, block in look.blocks.items()}
            largest = max(float(delta.max()) for delta in deltas.values()) or 1.0
            blocks = [
                {
                    "score": base64.b64encode(quantised(block.score[row]).tobytes()).decode(),
                    "delta": _url(heat_map(deltas[name] / largest, size)[0]),
                    "change": round(float(block.change[sigma][row]), 6),
                }
                for name, block in look.blocks.items()
            ]
            x0, blurred = (_url(shown_as(images[row : row + 1])[0]) for images in (look.x0, look.blurred))
            seen.append({"x0": x0, "blurred": blurred, "blocks": blocks})
        samples.append({"index": looks[0].indices[row], "looks": seen})
    return samples


def scrubber(
    samples: Sequence[Mapping[str, Any]],
    blocks: Mapping[str, tuple[int, int]],
    steps: Sequence[int],
    of: int,
    threshold: float,
    sigma: float,
    first: str,
) -> str:
    """The part of the page. blocks: names and sizes of maps; threshold, sigma: what |Δ| is for; first: shown block."""
    data = {
        "samples": samples,
        "blocks": [{"name": name, "map": grid} for name, grid in blocks.items()],
        "block": list(blocks).index(first),
        "steps": steps,
        "of": of,
        "psi": round(threshold * QUANTA),
        "sigma": f"{sigma:g}",
        "quanta": QUANTA,
        "largest": LARGEST,
        "palette": pictures.heat(np.linspace(0, 1, 256)).tolist(),
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return (
        f'<style>{STYLE}</style><div class="scrubber"><script type="application/json">{text}</script>{CONTROLS}</div>'
        f"<script>{SCRIPT}</script>"
    )


def _url(picture: NDArray[np.uint8]) -> str:
    """[H, W, 3] as a data URL: PNG, or WebP where that would be large."""
    kind, how = ("png", {}) if max(picture.shape) <= 64 else ("webp", {"quality": 85})
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format=kind, **how)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
