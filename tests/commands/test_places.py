"""Files and folders that are not what a flag takes them for: the flag, the path and the reason are said."""

import numpy as np
import pytest
from PIL import Image

from running import SCRIPTS, refused
from small import CONFIGS, SMALL

EMOJI = {"config": "emoji", "timestep_respacing": 2, "num_samples": 1, "batch_size": 1}
MEASURED = EMOJI | {"data_dir": "pictures"}
TRAINED = {key: value for key, value in SMALL.items() if key != "timestep_respacing"}
TRAINED |= {"lr_anneal_steps": 1, "data_dir": "pictures"}


@pytest.fixture
def places(tmp_path):
    """A file where a folder should be, a folder where an npz should be, and a folder with one picture."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "pictures" / "fruit_a.png")
    return tmp_path


@pytest.mark.parametrize(
    ("script", "arguments", "flags", "wrong", "said"),
    [
        ("image_sample", [], EMOJI, {"out_dir": "file"}, "out_dir: {}: File exists"),
        ("image_sample", [], EMOJI, {"out_dir": "file/below"}, "out_dir: {}: Not a directory"),
        ("image_sample", [], EMOJI, {"sag_mask": "folder.npz"}, "sag_mask: {}: cannot be read (Is a directory)"),
        ("image_sample", [], EMOJI, {"init_image": "folder.npz"}, "init_image: {}: cannot be read (Is a directory)"),
        ("image_sample", [], EMOJI, {"init_image": "file/x.npz"}, "init_image: {}: cannot be read (Not a directory)"),
        ("attention_report", [], EMOJI, {"out_dir": "file/below"}, "out_dir: {}: Not a directory"),
        ("image_nll", [], MEASURED, {"out_dir": "file"}, "out_dir: {}: File exists"),
        ("image_train", [], TRAINED, {"out_dir": "file/below"}, "out_dir: {}: Not a directory"),
        ("reproduce", ["demo"], {}, {"out_dir": "file/below"}, "out_dir: {}: Not a directory"),
    ],
)  # fmt: skip
def test_the_flag_of_a_wrong_place_is_named(places, capsys, script, arguments, flags, wrong, said):
    [(flag, name)] = wrong.items()
    flags = {key: places / value if key == "data_dir" else value for key, value in flags.items()}
    assert refused(capsys, script, *arguments, **flags | {flag: places / name}) == (
        f"error: {said.format(places / name)}\n"
    )


def test_an_evaluation_is_refused_where_its_file_cannot_be_written(places, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS.parent))
    from evaluations.evaluator import main

    with np.load(CONFIGS / "models" / "emoji32_train.npz") as file:
        np.savez(places / "few.npz", arr_0=file["arr_0"][:8])
    few = str(places / "few.npz")
    argv = ["evaluator.py", few, few, "--features", "emoji", "--cache", str(places / "cache")]
    monkeypatch.setattr("sys.argv", [*argv, "--json", str(places / "file" / "x.json")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.splitlines()[-1] == f"error: --json {places / 'file' / 'x.json'}: cannot be written (File exists)"
