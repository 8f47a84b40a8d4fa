"""Measure how exactly the parts agree with their references: the worst figure of each test that holds one.

  python docs/precision.py            # runs those tests, writes docs/precision.json; then docs/results.py
  python docs/precision.py Blur SAG   # the parts whose names begin so; the others stay as they are

A figure is the largest difference between what a test compares, in units of the reference's largest magnitude; the
tolerance is that of the comparison that it was seen in.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "precision.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import golden  # noqa: E402

UPSTREAM, AUTHORS = "guided-diffusion's numbers", "the authors' numbers"
PARTS = {
    "Networks: UNets of ADM and IDDPM, classifier, upsampler": (
        UPSTREAM,
        "networks/test_golden_networks.py::test_network_output",
    ),
    "Networks: DiT": ("DiT's numbers", "networks/test_dit.py::test_output_is_that_of_dit"),
    "Schedules": (UPSTREAM, "networks/test_golden_networks.py::test_schedule"),
    "Losses": (UPSTREAM, "networks/test_golden_networks.py::test_losses"),
    "Means and variances": (UPSTREAM, "networks/test_golden_networks.py::test_mean_and_variance"),
    "Training: losses, weights, averages": (
        UPSTREAM,
        "door/test_training.py::test_numbers_are_those_of_guided_diffusion",
    ),
    "SAG: a guided step": (AUTHORS, "guidance/test_golden_sag.py::test_step_of_the_network"),
    "SAG: a step of DDPM and DDIM, with a classifier": (
        AUTHORS,
        "guidance/test_golden_sag.py::test_step_of_the_sampler",
    ),
    "SAG: whole trajectories": (AUTHORS, "guidance/test_golden_sag.py::test_trajectory"),
    "SAG, CFG and both of DiT: every number of a step": (
        "DiT's numbers and the paper's formulas",
        "guidance/test_golden_dit.py::test_every_number_of_a_guided_step",
    ),
    "PAG": ("attention by hand", "guidance/test_replaced_attention.py::test_identity_attention_by_hand"),
    "SEG": ("attention by hand", "guidance/test_replaced_attention.py::test_blurred_queries_by_hand"),
    "Time-step guidance": (
        "the embedding by hand",
        "guidance/test_methods.py::test_the_timestep_embedding_is_disturbed_by_its_own_spread",
    ),
    "Momentum guidance": (
        "its formula",
        "guidance/test_methods.py::test_momentum_leads_away_from_the_average_of_earlier_steps",
    ),
    "Transforms: APG's momentum": (
        "its formula",
        "guidance/test_transforms.py::test_momentum_adds_earlier_differences_in_x0",
    ),
    "Attention score": (
        "the map in float64",
        "networks/test_attention.py::test_rounding_does_not_grow_with_the_parts_that_a_batch_is_cut_into",
    ),
    "Blur": ("scipy", "guidance/test_blur.py::test_agrees_with_scipy"),
    "Solvers: every state": ("diffusers", "diffusion/test_solvers.py::test_every_state_is_that_of_diffusers"),
    "Solvers: one image": ("its exact path", "diffusion/test_solvers.py::test_one_image_is_reached_on_its_exact_path"),
    "Flow: steps of Euler": ("SiT's formulas", "diffusion/test_flow.py::test_euler_is_sits"),
    "Flow: steps of Heun": ("SiT's formulas", "diffusion/test_flow.py::test_heun_is_sits"),
    "Flow: SAG and CFG": ("the paper's formulas", "diffusion/test_flow.py::test_guidance_is_the_formulas"),
    "Autoencoder: images of latents": (
        "diffusers' SAG pipeline",
        "stable_diffusion/test_stable_diffusion.py::test_golden_decode",
    ),
    "Stable Diffusion: SAG, CFG and both": (
        "diffusers' SAG pipeline",
        "stable_diffusion/test_stable_diffusion.py::test_golden",
    ),
    "Guider for diffusers": (
        "our sampler",
        "stable_diffusion/test_guider.py::test_the_guider_gives_what_the_sampler_gives",
    ),
    "Likelihood by ranks and parts": (
        "`calc_bpd_loop`",
        "runs/test_image_nll.py::test_it_is_the_bound_of_calc_bpd_loop",
    ),
    "Gradients of microbatches": (
        "those of the batch",
        "training/test_trainer.py::test_microbatches_have_the_gradient_of_the_batch",
    ),
    "Inception's features": (
        "torch-fidelity's numbers",
        "evaluations/test_inception.py::test_features_are_those_of_the_reference",
    ),
    "DINOv2's features": (
        "formulas of EDM2 and dgm-eval",
        "evaluations/test_dinov2.py::test_both_resizes_against_their_formulas",
    ),
    "Fréchet distance": ("closed form", "evaluations/test_moments.py::test_transported_covariance"),
    "Fréchet distance of few samples": (
        "scipy's matrix root",
        "evaluations/test_moments.py::test_fewer_samples_than_dimensions",
    ),
    "Precision, recall, density, coverage": ("brute force", "evaluations/test_neighbours.py::test_brute_force"),
    "Inception score": ("upstream's formula", "evaluations/test_scores.py::test_inception_score_is_upstreams"),
    "KID": ("the U-statistic", "evaluations/test_scores.py::test_kernel_distance_is_the_u_statistic"),
}
"""What is compared, with what, and by which test of tests/."""


class Recorder:
    """Listens to the comparisons of tests: torch's, numpy's, pytest's `approx`, and that of the golden cases."""

    def __init__(self) -> None:
        self.test = ""
        self.worst: dict[str, dict[str, Any]] = {}

    def hear(self, ours: Any, reference: Any, atol: float, rtol: float, of_largest: float = 0.0) -> None:
        """Allowed is atol + rtol · |reference| for each number, or a share of the largest."""
        ours, reference = (torch.as_tensor(np.asarray(x, dtype=np.float64)) for x in (ours, reference))
        if not reference.numel() or not reference.isfinite().all():
            return
        away, largest = (ours - reference).abs().max().item(), reference.abs().max().item()
        worst = away / largest if largest else away
        found = self.worst.setdefault(self.test, {"worst": -1.0, "comparisons": 0})
        found["comparisons"] += 1
        if worst > found["worst"]:
            found |= {"worst": worst, "atol": float(atol), "rtol": float(rtol), "of_largest": of_largest}

    def pytest_configure(self) -> None:
        heard, recorder = torch.testing.assert_close, self

        def assert_close(actual, expected, *, rtol=None, atol=None, **more):
            heard(actual, expected, rtol=rtol, atol=atol, **more)
            pairs = zip(actual, expected, strict=True) if isinstance(actual, list | tuple) else [(actual, expected)]
            for one, other in pairs:
                if torch.is_tensor(one) and torch.is_tensor(other):
                    allowed = 1e-5 if atol is None else atol, 1.3e-6 if rtol is None else rtol
                    recorder.hear(one.detach(), other.detach(), *allowed)

        def assert_allclose(actual, desired, rtol=1e-7, atol=0.0, heard=np.testing.assert_allclose, **more):
            heard(actual, desired, rtol=rtol, atol=atol, **more)
            recorder.hear(actual, desired, atol, rtol)

        def golden_close(ours, reference, tolerance=golden.TOLERANCE, heard=golden.assert_close):
            heard(ours, reference, tolerance)
            recorder.hear(ours.detach(), reference, 0.0, 0.0, tolerance)

        scalar = type(pytest.approx(1.0))

        def equal(approx, actual, heard=scalar.__eq__):
            same = heard(approx, actual)
            if same and isinstance(approx.expected, int | float):
                recorder.hear(actual, approx.expected, 0.0, 0.0, approx.tolerance / abs(approx.expected or 1.0))
            return same

        torch.testing.assert_close = assert_close
        np.testing.assert_allclose = assert_allclose
        golden.assert_close = golden_close
        scalar.__eq__ = equal

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test = nodeid.partition("[")[0]


def main() -> None:
    wanted = {part: about for part, about in PARTS.items() if part.startswith(tuple(sys.argv[1:] or ("",)))}
    recorder = Recorder()
    status = pytest.main(
        [*(f"{ROOT}/tests/{test}" for _, test in wanted.values()), "-p", "no:xdist"], plugins=[recorder]
    )
    if status:
        raise SystemExit(f"the tests end with {status}; {FILE.name} stays as it was")
    before = {row["part"]: row for row in json.loads(FILE.read_text())} if FILE.exists() else {}
    rows = []
    for part, (reference, test) in PARTS.items():
        if part in wanted:
            about = {"part": part, "reference": reference, "test": f"tests/{test}"}
            before[part] = about | recorder.worst[about["test"]]
        rows += [before[part]] if part in before else []
    FILE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
