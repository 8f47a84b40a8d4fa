"""The logger by guided-diffusion's names: its folders, files and tables."""

import csv
import json
import sys
import types

import pytest

from guided_diffusion import logger
from running import environment

LAUNCHERS = {
    "torchrun": {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    "mpich": {"PMI_RANK": "3", "PMI_SIZE": "4"},
    "PMIx": {"PMIX_RANK": "3"},
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
}
VARIABLES = {name for variables in LAUNCHERS.values() for name in variables}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    monkeypatch.setattr(logger.Logger, "DEFAULT", None)
    monkeypatch.setattr(logger.tempfile, "tempdir", str(tmp_path))
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI", *VARIABLES):
        monkeypatch.delenv(name, raising=False)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_new_folder_where_none_is_named(tmp_path, capsys):
    logger.log("a", 1, "b")
    [folder] = tmp_path.glob("openai-*")
    assert logger.get_dir() == str(folder)
    assert capsys.readouterr().out == f"logging to {folder}\na 1 b\n"
    assert (folder / "log.txt").read_text().endswith("a 1 b\n")
    assert logger.Logger.CURRENT is logger.Logger.DEFAULT is logger.get_current()


def test_the_folder_and_the_formats_of_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "here"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json,,csv")
    logger.configure()
    logger.logkv("x", 1)
    logger.dumpkvs()
    assert names(tmp_path / "here") == {"progress.json", "progress.csv"}
    assert capsys.readouterr().out == ""
    logger.configure(dir=str(tmp_path / "there"), format_strs=["log"], log_suffix="-b")
    assert names(tmp_path / "there") == {"log-b.txt"}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_ranks_write_files_of_their_own(tmp_path, monkeypatch, capsys, launcher):
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    assert logger.get_rank_without_mpi_import() == 3
    logger.configure(dir=str(tmp_path / "log"))
    assert names(tmp_path / "log") == {"log-rank003.txt"}
    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "json")
    logger.configure(dir=str(tmp_path / "json"))
    assert names(tmp_path / "json") == {"progress-rank003.json"}
    assert capsys.readouterr().out == ""


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(ValueError, match="wanted stdout, log, json, csv, tensorboard, got 'xml'"):
        logger.configure(dir=str(tmp_path), format_strs=["xml"])


def test_what_is_below_the_level_is_not_said(tmp_path, capsys):
    logger.configure(dir=str(tmp_path), format_strs=["stdout"])
    capsys.readouterr()
    for say in (logger.debug, logger.info, logger.warn, logger.error):
        say(say.__name__)
    assert capsys.readouterr().out == "info\nwarn\nerror\n"
    logger.set_level(logger.DEBUG)
    logger.debug("more")
    logger.set_level(logger.DISABLED)
    logger.error("nothing")
    assert capsys.readouterr().out == "more\n"
    assert (logger.DEBUG, logger.INFO, logger.WARN, logger.ERROR, logger.DISABLED) == (10, 20, 30, 40, 50)


def test_tables_hold_last_values_and_means(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=[])
    for value in (1, 2, 6):
        logger.logkv("last", value)
        logger.logkv_mean("mean", value)
    logger.logkvs({"text": "t", "more": 1})
    assert logger.getkvs() == {"last": 6, "mean": 3, "text": "t", "more": 1}
    assert logger.dumpkvs() == {"last": 6, "mean": 3, "text": "t", "more": 1}
    assert logger.getkvs() == {}
    logger.logkv_mean("mean", 8)
    logger.record_tabular("old", 0)
    assert logger.dump_tabular() == {"mean": 8, "old": 0}


def test_tables_are_drawn(tmp_path, capsys):
    logger.configure(dir=str(tmp_path), format_strs=["stdout"])
    capsys.readouterr()
    logger.logkvs({"b": 0.123456, "Andromeda": "x", "n" * 40: 2})
    logger.dumpkvs()
    assert capsys.readouterr().out.splitlines() == [
        "---------------------------------------------",
        "| Andromeda                      | x        |",
        "| b                              | 0.123    |",
        f"| {'n' * 27}... | 2        |",
        "---------------------------------------------",
    ]
    logger.dumpkvs()
    assert capsys.readouterr().out == ""


def test_columns_may_come_later(tmp_path):
    (tmp_path / "progress.csv").write_text("of another run\n")
    logger.configure(dir=str(tmp_path), format_strs=["csv", "json"])
    lines = [{"b": 0.1, "a": 1}, {"b": 2, "c": "x,y"}]
    for line in lines:
        logger.logkvs(line)
        logger.dumpkvs()
    with open(tmp_path / "progress.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["a", "b", "c"], ["1", "0.1", ""], ["", "2", "x,y"]]
    assert [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()] == lines


def test_numbers_of_arrays_are_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    logger.configure(dir=str(tmp_path), format_strs=["csv", "json"])
    logger.logkv("x", torch.tensor(0.5))
    logger.dumpkvs()
    assert json.loads((tmp_path / "progress.json").read_text()) == {"x": 0.5}
    assert (tmp_path / "progress.csv").read_text() == "x\n0.5\n"


def test_tensorboard_counts_tables(tmp_path, monkeypatch):
    events = []
    writer = types.SimpleNamespace(
        add_scalar=lambda *event: events.append(event), flush=lambda: None, close=lambda: events.append("closed")
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=lambda _: writer))
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["tensorboard"]):
        for value in (1, 2):
            logger.logkv("x", value)
            logger.dumpkvs()
    assert events == [("x", 1.0, 1), ("x", 2.0, 2), "closed"]


def test_another_logger_for_a_while(tmp_path, capsys):
    logger.configure(dir=str(tmp_path / "a"), format_strs=["log"])
    with logger.scoped_configure(dir=str(tmp_path / "b"), format_strs=["log"]):
        logger.log("in b")
        assert logger.get_dir() == str(tmp_path / "b")
    logger.log("in a")
    assert "in b" not in (tmp_path / "a" / "log.txt").read_text()
    assert (tmp_path / "a" / "log.txt").read_text().endswith("in a\n")
    logger.reset()
    logger.log("by default")
    assert logger.get_dir() != str(tmp_path / "a")
    assert capsys.readouterr().out.endswith("by default\n")


class Comm:
    """One of two ranks, whose other one gives a value of weight 3."""

    def __init__(self, rank):
        self.rank = rank

    def gather(self, values):
        return [values, {"x": (10.0, 3), "name": ("b", 1)}] if self.rank == 0 else None


def test_values_are_averaged_over_ranks(tmp_path, capsys):
    logger.configure(dir=str(tmp_path), format_strs=["stdout"], comm=Comm(0))
    logger.logkv_mean("x", 2.0)
    logger.logkv("name", "a")
    assert logger.dumpkvs() == {"x": 8.0}
    assert "'a' is no number" in capsys.readouterr().out
    logger.set_comm(Comm(1))
    logger.logkv_mean("x", 2.0)
    assert logger.dumpkvs() == {}
    assert capsys.readouterr().out == ""


def test_seconds_are_added_up(tmp_path, monkeypatch):
    logger.configure(dir=str(tmp_path), format_strs=[])
    clock = iter([0, 2, 10, 13])
    monkeypatch.setattr(logger.time, "perf_counter", lambda: next(clock))

    @logger.profile("work")
    def work(x):
        return x + 1

    assert work(1) == 2
    with logger.profile_kv("work"):
        pass
    assert work.__name__ == "work"
    assert logger.dumpkvs() == {"wait_work": 5}


def test_importing_it_joins_no_job(tmp_path):
    import subprocess

    code = (
        "import sys; from guided_diffusion import logger; logger.configure(sys.argv[1]); print('mpi4py' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(PMI_RANK="1", PMI_SIZE="2"),
    )
    assert said.stdout == "False\n"
    assert names(tmp_path) == {"log-rank001.txt"}
