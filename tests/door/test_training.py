"""Training by guided-diffusion's names: the numbers of guided-diffusion, on one rank and on two."""

import pickle
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

import training_client
from golden import DATA, fill, normal
from guided_diffusion import fp16_util, image_datasets, logger, train_util
from guided_diffusion.resample import LossAwareSampler, LossSecondMomentResampler, ScheduleSampler
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.training import resume
from running import ended, mpiexec

EXACT = {"t", "labels", "images", "drawn"}


@pytest.fixture(autouse=True)
def _no_logger(monkeypatch):
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    monkeypatch.setattr(logger.Logger, "DEFAULT", None)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger.Logger, "CURRENT", None)
        folder = tmp_path_factory.mktemp("client")
        return training_client.cases(folder), folder


def golden():
    with np.load(DATA / "door" / "train.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def assert_equal(name, found, wanted):
    assert found.shape == wanted.shape
    if name in EXACT:
        assert (found == wanted).all()
    elif name == "parameters":
        np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=1e-6)
        np.testing.assert_allclose(found[:, 1], wanted[:, 1], atol=1e-3)
    else:
        np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("path", golden())
def test_numbers_are_those_of_guided_diffusion(ours, path):
    case, name = path.split("/")
    assert_equal(name, ours[0][case][name], golden()[path])


def test_files_have_guided_diffusions_names(ours):
    names = {path.name for path in (ours[1] / "train").iterdir()}
    kinds = ("model", "ema_0.5_", "ema_0.9_", "opt")
    assert names == {f"{kind}{step}.pt" for kind in kinds for step in ("000000", "000002")} | {"progress.json"}
    assert (ours[1] / "resumed" / "ema_0.9_000004.pt").is_file()


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """What two ranks find on the same batches and on batches of their own: {case: (rank 0's numbers, rank 1's)}."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(DATA.parent)!r})
        import numpy as np, torch
        import torch.distributed as dist
        import training_client
        from guided_diffusion import dist_util
        torch.set_num_threads(1)
        dist_util.setup_dist()
        rank = dist.get_rank()
        for case, first in {{"same": 0, "own": 10 * rank}}.items():
            found = training_client.train(f"{folder}/{{case}}{{rank}}", 3, training_client.batches(first))
            np.savez(f"{folder}/{{case}}{{rank}}.npz", **found)
    """)
    )
    process = mpiexec(2, [script])
    _, errors = ended(process)
    assert process.returncode == 0, errors
    files = {case: [folder / f"{case}{rank}.npz" for rank in (0, 1)] for case in ("same", "own")}
    return {case: tuple(dict(np.load(path)) for path in paths) for case, paths in files.items()}


def test_two_ranks_with_the_same_batches_train_as_one(of_two_ranks):
    found, other = of_two_ranks["same"]
    assert (found["parameters"] == other["parameters"]).all()
    assert (found["t"] == golden()["train/t"]).all()
    assert_equal("parameters", found["parameters"], golden()["train/parameters"])
    log = golden()["train/log"]
    log[:, 1] *= 2  # samples
    assert_equal("log", found["log"], log)


def test_two_ranks_take_the_mean_of_their_gradients(of_two_ranks):
    found, other = of_two_ranks["own"]
    assert (found["parameters"] == other["parameters"]).all()
    assert (abs(found["parameters"] - golden()["train/parameters"])[:, 1] > 0.01).all()
    assert abs(found["log"][0, 2] - other["log"][0, 2]) > 0.01


def loop_of(folder, cls=train_util.TrainLoop, **settings):
    """The numbers of a training by a subclass."""
    return training_client.train(folder, 2, loop_class=cls, **settings)


def test_every_method_of_the_loop_can_be_overridden(tmp_path):
    called = []

    def noted(name):
        def method(self, *arguments):
            called.append(name)
            return getattr(train_util.TrainLoop, name)(self, *arguments)

        return method

    names = [
        "run_step",
        "forward_backward",
        "_update_ema",
        "_anneal_lr",
        "log_step",
        "save",
        "_load_and_sync_parameters",
    ]
    loop_of(tmp_path, type("Mine", (train_util.TrainLoop,), {name: noted(name) for name in names}))
    assert set(called) == set(names)
    called.clear()
    resumed = ["_load_optimizer_state", "_load_ema_parameters"]
    mine = type("Mine", (train_util.TrainLoop,), {name: noted(name) for name in resumed})
    training_client.train(tmp_path / "on", 3, loop_class=mine, resume_checkpoint=str(tmp_path / "model000002.pt"))
    assert called == [*resumed, resumed[1]]


def test_functions_of_the_module_can_be_patched(tmp_path, monkeypatch):
    loop_of(tmp_path)
    monkeypatch.setattr(train_util, "find_resume_checkpoint", lambda: str(tmp_path / "model000002.pt"))
    monkeypatch.setattr(train_util, "get_blob_logdir", lambda: str(tmp_path / "elsewhere"))
    found = training_client.train(tmp_path / "on", 4)
    assert found["log"][:, 0].tolist() == [2, 3]
    assert {path.name for path in (tmp_path / "elsewhere").glob("model*")} == {"model000002.pt", "model000004.pt"}


def test_a_test_run_ends_at_its_second_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    assert len(training_client.train(tmp_path, 0, save_interval=1)["log"]) == 2


def test_a_gradient_that_is_not_finite_stops_training_in_float32(tmp_path):
    data = iter([(torch.full((4, 3, 16, 16), torch.nan), {})])
    with pytest.raises(FloatingPointError, match="norm is nan; no parameter was updated"):
        training_client.train(tmp_path, 1, data)
    assert not list(tmp_path.glob("*.pt"))


def test_half_precision_trains_and_goes_on(tmp_path):
    found = loop_of(tmp_path, use_fp16=True)
    assert found["log"].shape == (2, 7)
    wanted = golden()["train/log"]
    np.testing.assert_allclose(found["log"][0, 2:5], wanted[0, 2:5], rtol=0.05)
    network, _ = create_model_and_diffusion(**training_client.FLAGS)
    network.load_state_dict(torch.load(tmp_path / "model000002.pt"))
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    again = training_client.train(tmp_path / "on", 3, use_fp16=True, resume_checkpoint=str(tmp_path / "model000002.pt"))
    assert again["log"][:, 0].tolist() == [2]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("a/model500000.pt", 500000),
        ("gs://b/model/model000012.pt", 12),
        ("ema_0.9999_000012.pt", 0),
        ("model.pt", 0),
        ("models/000012.pt", 0),
        ("", 0),
    ],
)
def test_the_step_of_a_file_is_in_its_name(name, step):
    assert train_util.parse_resume_step_from_filename(name) == step


def test_an_average_is_found_beside_its_model(tmp_path, monkeypatch):
    (tmp_path / "ema_0.9_000012.pt").touch()
    assert train_util.find_ema_checkpoint(str(tmp_path / "model000012.pt"), 12, 0.9) == str(
        tmp_path / "ema_0.9_000012.pt"
    )
    assert train_util.find_ema_checkpoint(str(tmp_path / "model000012.pt"), 12, 0.99) is None
    assert train_util.find_ema_checkpoint("", 12, 0.9) is None
    monkeypatch.chdir(tmp_path)
    assert train_util.find_ema_checkpoint("model000012.pt", 12, 0.9) == "ema_0.9_000012.pt"


def test_an_average_is_looked_for_in_a_bucket_and_not_on_a_web_server(monkeypatch):
    there = {"gs://bucket/run/ema_0.9_000012.pt"}
    monkeypatch.setattr(resume.bf, "exists", lambda path: path in there)
    assert [train_util.find_ema_checkpoint("gs://bucket/run/model000012.pt", 12, rate) for rate in (0.9, 0.99)] == [
        *there,
        None,
    ]
    monkeypatch.setattr(resume.bf, "exists", lambda path: pytest.fail(path))
    assert train_util.find_ema_checkpoint("https://a.b/run/model000012.pt", 12, 0.9) is None


def test_losses_are_logged_by_quarter_of_the_timesteps(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=[])
    diffusion = type("Fake", (), {"num_timesteps": 8})
    train_util.log_loss_dict(diffusion, torch.tensor([0, 1, 7]), {"loss": torch.tensor([1.0, 2.0, 6.0])})
    assert logger.dumpkvs() == {"loss": 3, "loss_q0": 1.5, "loss_q3": 6}


def test_weights_of_a_clients_sampler_act():
    class Last(ScheduleSampler):
        def weights(self):
            return np.array([0.0, 0.0, 2.0])

    t, weights = Last().sample(5, "cpu")
    assert t.dtype == torch.int64
    assert t.tolist() == [2] * 5
    torch.testing.assert_close(weights, torch.full((5,), 1 / 3))


def test_every_rank_learns_from_the_losses_of_all(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os
        import torch
        import torch.distributed as dist
        from guided_diffusion import dist_util
        from guided_diffusion.resample import LossAwareSampler
        class Told(LossAwareSampler):
            def weights(self): ...
            def update_with_all_losses(self, ts, losses):
                os.write(1, f"{ts} {losses}\\n".encode())
        dist_util.setup_dist()
        rank = dist.get_rank()
        Told().update_with_local_losses(torch.arange(rank + 1) + 5 * rank, torch.full((rank + 1,), rank + 0.5))
        dist.barrier()
    """)
    )
    process = mpiexec(2, [script])
    said, errors = ended(process)
    assert process.returncode == 0, errors
    assert said.splitlines() == ["[0, 5, 6] [0.5, 1.5, 1.5]"] * 2


def test_one_rank_learns_from_its_losses():
    sampler = LossSecondMomentResampler(type("Fake", (), {"num_timesteps": 2}), history_per_term=1, uniform_prob=0)
    assert isinstance(sampler, LossAwareSampler)
    assert not sampler._warmed_up()
    sampler.update_with_local_losses(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    assert sampler._warmed_up()
    assert sampler.weights().tolist() == [0.25, 0.75]


def test_ranks_share_the_pictures(tmp_path, monkeypatch):
    folder = training_client.pictures(tmp_path)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(image_datasets.dist_util, "place", lambda rank=rank: (rank, 2))
        data = image_datasets.load_data(
            data_dir=folder, batch_size=4, image_size=8, deterministic=True, random_flip=False
        )
        found.append(next(data)[0])
    monkeypatch.undo()
    data = image_datasets.load_data(data_dir=folder, batch_size=8, image_size=8, deterministic=True, random_flip=False)
    whole, condition = next(data)
    assert condition == {}
    assert torch.equal(whole[0::2], found[0])
    assert torch.equal(whole[1::2], found[1])


def test_fewer_pictures_than_a_batch_are_refused_and_not_waited_for(tmp_path):
    folder = training_client.pictures(tmp_path)
    with pytest.raises(ValueError, match="8 images for rank 0 of 1 are fewer than a batch of 9"):
        image_datasets.load_data(data_dir=folder, batch_size=9, image_size=8)


def test_a_patched_crop_acts(tmp_path, monkeypatch):
    folder = training_client.pictures(tmp_path)
    monkeypatch.setattr(image_datasets, "center_crop_arr", lambda image, size: np.full((size, size, 3), 255, np.uint8))
    dataset = image_datasets.ImageDataset(4, image_datasets._list_image_files_recursively(folder), classes=[3] * 8)
    pixels, condition = pickle.loads(pickle.dumps(dataset))[0]
    assert pixels.shape == (3, 4, 4)
    assert (pixels == 1).all()
    assert condition == {"y": 3}


def test_a_link_that_leads_back_is_not_followed(tmp_path):
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "inner" / "0.png")
    (tmp_path / "inner" / "back").symlink_to(tmp_path, target_is_directory=True)
    found = image_datasets._list_image_files_recursively(str(tmp_path))
    assert found == [str(tmp_path / "inner" / "0.png")]


def test_pictures_behind_a_link_are_found(tmp_path):
    (tmp_path / "there").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "there" / "a_1.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "there", target_is_directory=True)
    wanted = [str(tmp_path / "data" / "link" / "a_1.png")]
    assert image_datasets._list_image_files_recursively(str(tmp_path / "data")) == wanted


def test_master_parameters_hold_vectors_and_matrices():
    network = fill(training_client.Two())
    [vectors, _], [matrices, shape] = groups = fp16_util.get_param_groups_and_shapes(network.named_parameters())
    assert [name for name, _ in vectors] == ["conv.bias", "linear.bias"]
    assert [name for name, _ in matrices] == ["conv.weight", "linear.weight"]
    assert shape == (1, -1)
    masters = fp16_util.make_master_params(groups)
    assert [tuple(master.shape) for master in masters] == [(5,), (1, 112)]
    assert all(master.requires_grad for master in masters)
    with torch.no_grad():
        for master in masters:
            master.mul_(2)
    fp16_util.master_params_to_model_params(groups, masters)
    for name, values in fill(training_client.Two()).state_dict().items():
        assert torch.equal(network.state_dict()[name], 2 * values)


def test_gradients_are_copied_and_forgotten():
    network = fill(training_client.Two()).requires_grad_(True)
    groups = fp16_util.get_param_groups_and_shapes(network.named_parameters())
    masters = fp16_util.make_master_params(groups)
    network.linear(normal(0, 2, 4)).sum().backward()
    fp16_util.model_grads_to_master_grads(groups, masters)
    assert torch.equal(masters[0].grad, torch.tensor([0.0] * 4 + [2.0]))
    assert not masters[1].grad[0, :108].any()
    torch.testing.assert_close(masters[1].grad[0, 108:], normal(0, 2, 4).sum(dim=0))
    fp16_util.zero_master_grads(masters)
    assert [master.grad for master in masters] == [None, None]
    fp16_util.zero_grad(network.parameters())
    assert network.conv.weight.grad is None
    assert not network.linear.weight.grad.any()


def test_only_convolutions_change_their_precision():
    network = fill(training_client.Two())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.apply(fp16_util.convert_module_to_f16)
    assert network.conv.weight.dtype == network.conv.bias.dtype == torch.float16
    assert network.linear.weight.dtype == torch.float32
    network.apply(fp16_util.convert_module_to_f32)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-3, rtol=1e-3)
