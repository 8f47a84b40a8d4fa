"""Upstream's published numbers, for whoever has the published files."""

import os
from pathlib import Path

import pytest

from evaluating import result

ADDRESS = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
PUBLISHED = {
    256: ("admnet_guided_upsampled_imagenet256",
          {"inception_score": 215.8370, "fid": 3.942557, "sfid": 6.140434, "precision": 0.8265, "recall": 0.5309}),
    128: ("admnet_guided_imagenet128",
          {"inception_score": 141.4766845703125, "fid": 2.9732886821580564, "sfid": 5.094563920911128,
           "precision": 0.78138, "recall": 0.5929}),
    64: ("admnet_imagenet64", {"fid": 2.6141597041162186}),
}  # fmt: skip
WITHIN = {"inception_score": {"rel": 1e-3}, "fid": {"abs": 5e-3}, "sfid": {"abs": 5e-3},
          "precision": {"abs": 5e-4}, "recall": {"abs": 5e-4}}  # fmt: skip


@pytest.mark.parametrize("side", PUBLISHED)
def test_upstreams_golden_runs(tmp_path, side):
    name, metrics = PUBLISHED[side]
    folder = Path(os.environ.get("SAG_GOLDEN", "."))
    reference, samples = folder / f"VIRTUAL_imagenet{side}_labeled.npz", folder / f"{name}.npz"
    if "SAG_GOLDEN" not in os.environ or not (reference.is_file() and samples.is_file()):
        pytest.skip(f"needs SAG_GOLDEN, a folder with {reference.name} and {samples.name} of {ADDRESS}/{side}/, and "
                    "Inception's weights in SAG_GOLDEN_INCEPTION (else they are fetched)")  # fmt: skip
    weights = os.environ.get("SAG_GOLDEN_INCEPTION")
    flags = ("--inception", weights) if weights else ()
    found = result(tmp_path, reference, samples, *flags, "--pr_dtype", "fp16", "--metrics", ",".join(metrics))
    for metric, value in metrics.items():
        assert found["metrics"][metric]["value"] == pytest.approx(value, **WITHIN[metric]), metric
