"""The evaluator as its users run it."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluations
from evaluating import EVALUATOR, evaluate, refused, result
from evaluations import features as features_module
from evaluations.emoji import emoji_features
from evaluations.evaluator import write_json
from evaluations.features import extract
from evaluations.moments import Moments, frechet_distance
from evaluations.ranks import BadInputError, Ranks
from evaluations.ranks import run as run_ranks
from evaluations.sources import open_source
from running import ended, mpiexec
from sample_files import pictures, shard


@pytest.fixture
def emoji(tmp_path):
    """Two npz of 32×32 noise of two kinds."""
    np.savez(tmp_path / "ref.npz", pictures(330, 32))
    np.savez(tmp_path / "samples.npz", pictures(150, 32, seed=1) // 2)
    return str(tmp_path / "ref.npz"), str(tmp_path / "samples.npz")


def test_emoji_features(tmp_path, emoji, capsys):
    found = result(tmp_path, *emoji, "--features", "emoji", "--extended")
    assert set(found["metrics"]) == {
        "frechet_distance", "precision", "recall", "kid", "mind", "density", "coverage", "copies"
    }  # fmt: skip
    assert found["n"] == 150
    assert found["features"] == "emoji"
    assert not found["comparable"]["answer"]
    assert found["metrics"]["frechet_distance"]["error"] > 0
    table = capsys.readouterr().out
    assert "Fréchet distance" in table
    assert "FID" not in table
    assert f"{found['metrics']['frechet_distance']['value']:.4f}" in table
    parts = found["parts"]["frechet_distance"]
    total = parts["means"] + sum(parts["traces"]) - 2 * parts["cross_trace"]
    assert found["metrics"]["frechet_distance"]["value"] == pytest.approx(total)


def run_folder(folder, images, **identity):
    """The folder of a run, whose manifest says so much of it."""
    shard(folder / "shards", 0, images)
    said = {"identity": {"seed": 0, "image_size": 32, "labels": "none"} | identity, "samples": len(images)}
    (folder / "manifest.json").write_text(json.dumps(said))
    return folder


def test_against_other_samples(tmp_path, emoji, capsys):
    """The difference is that of two evaluations; its error is that of pairs, far below that of independent ones."""
    images = pictures(150, 32, seed=1)
    one = run_folder(tmp_path / "one", images)
    other = run_folder(tmp_path / "other", np.clip(images.astype(int) + 2, 0, 255).astype(np.uint8), sag_scale=1.0)
    found = result(tmp_path, emoji[0], one, "--against", other, "--features", "emoji", "--extended")
    assert "minus " in capsys.readouterr().out
    alone = result(tmp_path, emoji[0], other, "--features", "emoji", "--extended")["metrics"]
    assert found["difference"]["against"] == str(other)
    assert set(found["difference"]["metrics"]) == set(found["metrics"])
    for name, difference in found["difference"]["metrics"].items():
        assert difference["value"] == pytest.approx(found["metrics"][name]["value"] - alone[name]["value"], abs=1e-12)
    distance = found["difference"]["metrics"]["frechet_distance"]
    independent = np.hypot(found["metrics"]["frechet_distance"]["error"], alone["frechet_distance"]["error"])
    assert 0 < distance["error"] < independent
    same = result(tmp_path, emoji[0], one, "--against", one, "--features", "emoji")["difference"]["metrics"]
    assert all(difference == {"value": 0, "error": 0} for difference in same.values())


def test_samples_that_are_not_paired_are_refused(tmp_path, emoji, capsys):
    images = pictures(40, 32, seed=1)
    one = run_folder(tmp_path / "one", images)
    np.savez(tmp_path / "foreign.npz", images)
    for reason, other in {
        "seed is 0 in": run_folder(tmp_path / "seed", images, seed=1),
        "labels is 'none' in": run_folder(tmp_path / "labels", images, labels="random"),
        "holds 40 images": run_folder(tmp_path / "fewer", images[:30]),
        "no manifest.json": tmp_path / "foreign.npz",
    }.items():
        assert reason in refused(capsys, emoji[0], one, "--against", other, "--features", "emoji")
    paired = ("--paired", "--features", "emoji")
    foreign = result(tmp_path, emoji[0], one, "--against", tmp_path / "foreign.npz", *paired)
    assert foreign["difference"]["metrics"]["frechet_distance"] == {"value": 0, "error": 0}
    refused(capsys, emoji[0], one, "--against", tmp_path / "fewer", *paired)


def test_from_python(tmp_path, emoji):
    """`evaluations.evaluate` gives what the evaluator writes."""
    written = result(tmp_path, *emoji, "--features", "emoji")
    assert evaluations.evaluate(*map(Path, emoji), features="emoji") == written
    with pytest.raises(BadInputError, match="no such file"):
        evaluations.evaluate(emoji[0], "nowhere.npz", features="emoji")


def test_identical_sets(tmp_path, emoji):
    found = result(tmp_path, emoji[0], emoji[0], "--features", "emoji")["metrics"]
    scale = 1e-9 * 100
    assert abs(found["frechet_distance"]["value"]) <= scale
    assert found["precision"]["value"] == found["recall"]["value"] == 1


def test_shards_and_ranks_change_nothing(tmp_path, emoji):
    """The same images as one npz, as uneven shards, and over 2 ranks."""
    images = pictures(150, 32, seed=1) // 2
    for first, stop in ((0, 40), (40, 41), (41, 150)):
        shard(tmp_path / "run" / "shards", first, images[first:stop])
    one = result(tmp_path, *emoji, "--features", "emoji")
    other = result(tmp_path, emoji[0], tmp_path / "run", "--features", "emoji")
    assert other["metrics"] == one["metrics"]
    process = mpiexec(2, [EVALUATOR, *emoji, "--features", "emoji", "--json", str(tmp_path / "mpi.json"),
                          "--cache", str(tmp_path / "other_cache")])  # fmt: skip
    out, error = ended(process)
    assert process.returncode == 0, error
    assert out.count("Fréchet distance") == 1
    mpi = json.loads((tmp_path / "mpi.json").read_text())
    for name, measured in one["metrics"].items():
        assert mpi["metrics"][name]["value"] == pytest.approx(measured["value"], rel=1e-6), name


def test_bad_input_on_several_ranks(tmp_path, emoji):
    process = mpiexec(2, [EVALUATOR, emoji[0], str(tmp_path / "none.npz"), "--features", "emoji"])
    _, error = ended(process)
    assert process.returncode == 2
    assert error.count("error: ") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_features_over_ranks(tmp_path, monkeypatch, ranks):
    """Each rank computes its blocks; together they are the whole set, also where a rank has none."""
    monkeypatch.setattr(features_module, "BLOCK", 16)
    np.savez(tmp_path / "a.npz", pictures(70, 32))
    images, network_, cache = open_source(str(tmp_path / "a.npz")).images, emoji_features(), tmp_path / "c"

    class Rank(Ranks):
        def __init__(self, rank):
            self.rank, self.size = rank, ranks

        def gather(self, item):
            gathered.append(item)
            return [item]

    parts = []
    for rank in range(ranks):
        gathered = []
        # A rank alone does not know the others' blocks: only what it gathers is looked at.
        with pytest.raises(KeyError) if ranks > 1 else pytest.MonkeyPatch.context():
            extract(images, network_, cache, Rank(rank), 8, "test")
        parts.append(gathered[-1])
    digests = {number: digest for part in parts for number, digest in part.items()}
    assert sorted(digests) == list(range(5))
    assert sum(map(len, parts)) == 5
    whole = extract(images, network_, tmp_path / "other", Ranks(), 8, "test")
    values = np.concatenate([np.load(next(cache.rglob(f"{digests[number]}.npy"))) for number in range(5)])
    # The same images in the same batches.
    assert np.array_equal(values, whole.rows["pool"][:].numpy())


def test_other_batches_change_the_distance_by_rounding_only(tmp_path, emoji):
    images, network_ = open_source(emoji[1]).images, emoji_features()
    reference = Moments.of(
        extract(open_source(emoji[0]).images, network_, tmp_path, Ranks(), 50, "").rows["pool"][:].numpy()
    )
    values = []
    for batch in (1, 64):
        pool = extract(images, network_, tmp_path / str(batch), Ranks(), batch, "").rows["pool"]
        values.append(frechet_distance(Moments.of(pool[:].numpy()).gaussian(), reference.gaussian()).value)
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_a_stopped_evaluation_goes_on(tmp_path, emoji, monkeypatch):
    """Blocks that are on disk are not computed again; a broken file of the cache is."""
    monkeypatch.setattr(features_module, "BLOCK", 32)
    images, network_ = open_source(emoji[1]).images, emoji_features()
    seen = []

    class Stopping(torch.nn.Module):
        def forward(self, x):
            seen.append(len(x))
            if sum(seen) > 100:
                raise KeyboardInterrupt
            return module(x)

    module = network_.module
    object.__setattr__(network_, "module", Stopping())
    with pytest.raises(KeyboardInterrupt):
        extract(images, network_, tmp_path / "c", Ranks(), 32, "")
    kept = sorted((tmp_path / "c").rglob("*.npy"))
    assert len(kept) == 3
    kept[0].write_bytes(kept[0].read_bytes()[:500])
    seen.clear()
    monkeypatch.setattr(Stopping, "forward", lambda self, x: (seen.append(len(x)), module(x))[1])
    found = extract(images, network_, tmp_path / "c", Ranks(), 32, "")
    assert sum(seen[1:]) == 150 - 64  # the first call asks for the columns
    object.__setattr__(network_, "module", module)
    fresh = extract(images, network_, tmp_path / "d", Ranks(), 32, "")
    assert torch.equal(found.rows["pool"][:], fresh.rows["pool"][:])
    assert torch.equal(found.rows["pool"][10:100], fresh.rows["pool"][:][10:100])


def test_inception_from_a_file(tmp_path, weights_file, capsys):
    """All of upstream's metrics, against statistics with images; and statistics alone."""
    rng = np.random.default_rng(0)
    names = {"mu": 2048, "mu_s": 2023}
    statistics = {name: rng.random(size) for name, size in names.items()}
    statistics |= {name.replace("mu", "sigma"): np.eye(size) for name, size in names.items()}
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=pictures(6, 20), **statistics)
    np.savez(tmp_path / "alone.npz", **statistics)
    np.savez(tmp_path / "samples.npz", pictures(8, 20, seed=1), np.arange(8) // 4)
    arguments = (tmp_path / "samples.npz", "--inception", weights_file)
    found = result(tmp_path, tmp_path / "VIRTUAL.npz", *arguments, "--pr_dtype", "fp16")
    assert list(found["metrics"]) == ["fid", "sfid", "inception_score", "precision", "recall"]
    assert all(np.isfinite(measured["value"]) for measured in found["metrics"].values())
    assert "not those of the well-known file" in " ".join(found["comparable"]["because"])
    error = capsys.readouterr().err
    assert "sorted by class" in error
    assert "no multiple of 5000" in error
    assert "fewer than" in error
    alone = result(tmp_path, tmp_path / "alone.npz", *arguments)
    assert alone["metrics"]["fid"]["value"] == pytest.approx(found["metrics"]["fid"]["value"], rel=1e-6)
    assert "no images" in alone["missing"]["precision"]
    assert "holds statistics, but no images" in refused(
        capsys, tmp_path / "alone.npz", *arguments, "--metrics", "fid,precision"
    )
    # Two statistics need no network at all.
    found = result(tmp_path, tmp_path / "alone.npz", tmp_path / "VIRTUAL.npz", "--metrics", "fid,sfid")
    assert abs(found["metrics"]["fid"]["value"]) < 1e-9


def test_refusals(tmp_path, emoji, capsys):
    np.savez(tmp_path / "small.npz", mu=np.zeros(6), sigma=np.eye(6))
    np.savez(tmp_path / "one.npz", pictures(1, 32))
    np.savez(tmp_path / "three.npz", pictures(3, 32))
    np.savez(tmp_path / "big.npz", pictures(5, 64))
    assert "mu: wanted 2048 dimensions, got 6" in refused(capsys, tmp_path / "small.npz", emoji[1])
    assert "mu: wanted 320 dimensions, got 6" in refused(
        capsys, tmp_path / "small.npz", emoji[1], "--features", "emoji"
    )
    assert "wanted 2 images or more, got 1" in refused(capsys, emoji[0], tmp_path / "one.npz", "--features", "emoji")
    assert "it needs 4 images or more on both sides, got 3" in refused(
        capsys, emoji[0], tmp_path / "three.npz", "--features", "emoji", "--metrics", "precision"
    )
    assert "wanted some of frechet_distance" in refused(capsys, *emoji, "--features", "emoji", "--metrics", "fid")
    assert "wanted images of 3×32×32, got 3×64×64" in refused(
        capsys, emoji[0], tmp_path / "big.npz", "--features", "emoji"
    )
    assert "give --weights" in refused(capsys, *emoji, "--features", "dinov2")
    assert "given by --inception" in refused(capsys, *emoji, "--weights", "x")
    assert "none.pth: no such file" in refused(capsys, *emoji, "--inception", tmp_path / "none.pth")
    assert "emoji_other: no such file" in refused(
        capsys, *emoji, "--features", "emoji", "--weights", tmp_path / "emoji_other"
    )
    found = result(tmp_path, emoji[0], tmp_path / "three.npz", "--features", "emoji")
    assert "needs 4 images" in found["missing"]["recall"]
    assert found["metrics"]["frechet_distance"]["error"] > 0


def test_an_output_without_the_characters_is_no_error(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    run_ranks(lambda _: print("Fréchet distance"))
    sys.stdout.flush()
    assert written.getvalue() == b"Fr\\xe9chet distance\n"


def test_few_images_are_warned_of(tmp_path, emoji, capsys):
    biased = "warning: samples: 2 images are fewer than the 320 dimensions of frechet_distance: it is biased\n"
    few = "warning: samples: 99 images are few (below 100): no metric of them says much\n"
    for count, metric, said in ((2, "frechet_distance", biased), (99, "kid", few), (330, "frechet_distance", "")):
        np.savez(tmp_path / "few.npz", pictures(count, 32))
        result(tmp_path, emoji[0], tmp_path / "few.npz", "--features", "emoji", "--metrics", metric)
        errors = capsys.readouterr().err
        assert said in errors
        assert errors.count("warning: ") == bool(said)


def test_json_of_numbers_that_are_not_finite_is_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": [float("inf"), -float("inf"), (float("nan"), 1.5)]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": ["inf", "-inf", [None, 1.5]]}


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_in_the_cache_is_found(tmp_path, monkeypatch, emoji, seed):
    monkeypatch.setattr(features_module, "BLOCK", 64)
    images, network_ = open_source(emoji[1]).images.first(64), emoji_features()
    whole = extract(images, network_, tmp_path / "c", Ranks(), 64, "").rows["pool"][:]
    [file] = (tmp_path / "c").rglob("*.npy")
    data = bytearray(file.read_bytes())
    chance = np.random.default_rng(seed)
    data[chance.integers(len(data))] ^= 1 << chance.integers(8)
    file.write_bytes(data)
    assert torch.equal(extract(images, network_, tmp_path / "c", Ranks(), 64, "").rows["pool"][:], whole)


def test_a_full_disk_under_the_cache_is_one_sentence(tmp_path, capsys, emoji, full_disk):
    full_disk(4096)
    said = refused(capsys, *emoji, "--features", "emoji", "--cache", tmp_path / "c")
    assert ".npy: cannot be written (File too large)" in said
    assert not [path for path in (tmp_path / "c").rglob("*") if path.is_file()]


@pytest.mark.parametrize("place", ["", "ref.npz/r.json", "no" * 200], ids=["folder", "below a file", "too long"])
def test_an_impossible_place_of_the_result_is_told_before_the_work(tmp_path, capsys, emoji, place):
    said = refused(capsys, *emoji, "--features", "emoji", "--json", tmp_path / place)
    assert said.startswith(f"error: --json {tmp_path / place}: cannot be written (")
    assert not (tmp_path / "cache").exists()


def test_the_result_is_shown_where_it_cannot_be_written(tmp_path, capsys, emoji, full_disk):
    evaluate(*emoji, "--features", "emoji")
    full_disk(100)
    with pytest.raises(SystemExit) as stop:
        evaluate(*emoji, "--features", "emoji", "--json", tmp_path / "r.json")
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert "Fréchet distance" in out
    assert error.splitlines()[-1] == f"error: --json {tmp_path / 'r.json'}: cannot be written (File too large)"
    assert not list(tmp_path.glob("*json*"))
    assert not list(tmp_path.glob(".*"))
