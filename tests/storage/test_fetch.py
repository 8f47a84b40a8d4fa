"""Fetching by address, against a server on this machine that misbehaves as real ones do."""

import hashlib
import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings.shipped import read_yaml
from guided_diffusion.storage import fetch
from guided_diffusion.storage.checkpoints import load_state_dict, save_atomically
from guided_diffusion.tables.plans import WEIGHTS
from running import run
from small import SMALL

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = bytes(range(256)) * 20000


class Server(ThreadingHTTPServer):
    """Serves `data`; `breaks_at`: how many bytes of the next answer are sent; `ranges`: whether it knows Range.

    tag: its ETag. if_range: whether it knows If-Range. headers: others, instead of its own where they have the name.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.breaks_at, self.ranges, self.asked = DATA, None, True, []
        self.tag, self.if_range, self.headers = '"one"', True, {}

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        if self.path.endswith("missing.pt"):
            self.send_error(404)
            return
        changed = server.if_range and self.headers.get("If-Range", server.tag) != server.tag
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges and not changed else 0
        if start and start >= len(server.data):
            self.send_error(416)
            return
        body = server.data[start:]
        # Before a byte is sent: a client that goes away early finds the next answer whole.
        sent, server.breaks_at = body[: server.breaks_at], None
        self.send_response(206 if start else 200)
        own = {"Content-Length": len(body), "ETag": server.tag}
        if start:
            own["Content-Range"] = f"bytes {start}-{len(server.data) - 1}/{len(server.data)}"
        for name, value in (own | server.headers).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(sent)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SAG_CACHE", str(tmp_path / "cache"))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=[0.01])  # how long `shutdown` may wait
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def files(path):
    return sorted(file.name for file in path.parent.iterdir() if not file.name.endswith(".lock"))


def test_a_file_is_fetched_once(server):
    path = fetch.local_path(server.url("a/file.pt"))
    assert path.read_bytes() == DATA
    assert fetch.local_path(server.url("a/file.pt")) == path
    assert server.asked == [None]
    assert files(path) == ["file.pt", "file.pt.json"]
    record = json.loads(path.with_name("file.pt.json").read_text())
    assert record["size"] == len(DATA)
    assert record["address"] == server.url("a/file.pt")


def test_the_question_of_an_address_is_part_of_the_files_name(server):
    one = fetch.local_path(server.url("uc?id=MODEL_A"))
    server.data = DATA[::-1]
    other = fetch.local_path(server.url("uc?id=MODEL_B"))
    assert (one.read_bytes(), other.read_bytes()) == (DATA, DATA[::-1])
    assert fetch.local_path(server.url("uc?id=MODEL_A")) == one
    assert len(server.asked) == 2


def test_no_address_leads_out_of_the_cache(server, tmp_path):
    with pytest.raises(ValueError, match=r"an address with \.\. in it"):
        fetch.local_path(server.url("../../x.pt"))
    assert not server.asked
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_fetch_goes_on(server, ranges):
    server.ranges, server.breaks_at = ranges, 3_000_000
    with pytest.raises(ValueError, match="broke off at 3000000 of 5120000 bytes; the same command goes on"):
        fetch.local_path(server.url("file.pt"))
    assert fetch.local_path(server.url("file.pt")).read_bytes() == DATA
    assert server.asked == [None, "bytes=3000000-"]


def test_a_part_that_is_longer_than_the_file_is_begun_again(server):
    server.breaks_at = 3_000_000
    with pytest.raises(ValueError, match="broke off"):
        fetch.local_path(server.url("file.pt"))
    server.data = DATA[:1000]
    assert fetch.local_path(server.url("file.pt")).read_bytes() == DATA[:1000]


def test_a_changed_file_is_noticed(server):
    path = fetch.local_path(server.url("file.pt"))
    data = bytearray(DATA)
    data[77] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"SHA-256 is no longer .* the same command fetches it anew"):
        fetch.local_path(server.url("file.pt"))
    assert fetch.local_path(server.url("file.pt")).read_bytes() == DATA
    path.write_bytes(DATA[:-1])
    with pytest.raises(ValueError, match="wanted 5120000 bytes, got 5119999"):
        fetch.local_path(server.url("file.pt"))
    assert fetch.local_path(server.url("file.pt")).read_bytes() == DATA


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"size": 3}', "\x00", "[" * 9999])
def test_an_odd_record_is_refused_once(server, text):
    path = fetch.local_path(server.url("file.pt"))
    path.with_name("file.pt.json").write_text(text)
    with pytest.raises(ValueError, match=r"file\.pt: nothing is known of it any more; it was deleted, and the same"):
        fetch.local_path(server.url("file.pt"))
    assert fetch.local_path(server.url("file.pt")).read_bytes() == DATA


@pytest.mark.parametrize("if_range", [True, False])
def test_content_that_changed_between_two_parts_is_fetched_whole(server, if_range):
    server.breaks_at, server.if_range = 3_000_000, if_range
    with pytest.raises(ValueError, match="broke off"):
        fetch.local_path(server.url("file.pt"))
    server.data, server.tag = DATA[::-1], '"two"'
    assert fetch.local_path(server.url("file.pt")).read_bytes() == DATA[::-1]


def test_a_part_that_the_server_has_no_name_for_is_not_gone_on_with(server):
    server.breaks_at, server.headers = 3_000_000, {"ETag": None}
    with pytest.raises(ValueError, match="broke off"):
        fetch.local_path(server.url("file.pt"))
    server.data = DATA[::-1]
    assert fetch.local_path(server.url("file.pt")).read_bytes() == DATA[::-1]
    assert server.asked == [None, None]


@pytest.mark.parametrize("told", ["bytes 0-5119999/5120000", "bytes 3000001-5119999/5120000", "all of it", None])
def test_another_part_than_was_asked_for_is_not_joined(server, told):
    server.breaks_at, server.headers = 3_000_000, {"Content-Range": told}
    with pytest.raises(ValueError, match="broke off"):
        fetch.local_path(server.url("file.pt"))
    assert fetch.local_path(server.url("file.pt")).read_bytes() == DATA
    assert server.asked == [None, "bytes=3000000-", None]


def test_a_body_without_length_is_refused(server):
    server.breaks_at, server.headers = 3_000_000, {"Content-Length": None}
    with pytest.raises(ValueError, match="does not say how long the file is"):
        fetch.local_path(server.url("file.pt"))
    server.headers = {}
    assert fetch.local_path(server.url("file.pt")).read_bytes() == DATA


@pytest.mark.parametrize(
    ("data", "headers", "said"),
    [
        (b"\n<!DOCTYPE html><html>sign in</html>", {}, "a web page"),
        (b"sign in", {"Content-Type": "text/html; charset=utf-8"}, "a web page"),
        (b"", {}, "an empty file"),
    ],
)
def test_what_is_no_file_is_not_kept(server, data, headers, said):
    server.data, server.headers = data, headers
    with pytest.raises(ValueError, match=said):
        fetch.local_path(server.url("file.pt"))
    server.data, server.headers = DATA, {}
    path = fetch.local_path(server.url("file.pt"))
    assert path.read_bytes() == DATA
    assert files(path) == ["file.pt", "file.pt.json"]


def test_an_address_says_which_file_it_means(server):
    right = f"{server.url('file.pt')}#sha256={hashlib.sha256(DATA).hexdigest()}"
    server.data = DATA[::-1]
    with pytest.raises(ValueError, match=r"file\.pt: wanted the SHA-256 .*, got .*; nothing was kept"):
        fetch.local_path(right)
    fetch.local_path(server.url("file.pt"))
    with pytest.raises(ValueError, match=r"wanted the SHA-256 .*; it was deleted"):
        fetch.local_path(right)
    server.data = DATA
    assert fetch.local_path(right).read_bytes() == DATA
    assert fetch.local_path(right) == fetch.local_path(server.url("file.pt"))
    with pytest.raises(ValueError, match="wanted 64 digits from 0 to f, got '12'"):
        fetch.local_path(f"{server.url('file.pt')}#sha256=12")


def test_a_full_disk_is_told_and_the_fetch_goes_on(server, full_disk):
    full_disk(2_000_000)
    with pytest.raises(ValueError, match=r"cannot be kept in .*file\.pt\.part: cannot be written \(File too large\)"):
        fetch.local_path(server.url("file.pt"))
    full_disk(10_000_000)
    assert fetch.local_path(server.url("file.pt")).read_bytes() == DATA
    assert server.asked == [None, "bytes=2000000-"]


def test_what_is_not_there_is_refused(server):
    with pytest.raises(ValueError, match=r"missing.pt: cannot be fetched \(HTTPError: .*404.*fetch it by hand"):
        fetch.local_path(server.url("missing.pt"))
    with pytest.raises(ValueError, match="names no file"):
        fetch.local_path("https://127.0.0.1/")


def test_two_at_once_fetch_once(server):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch.local_path(server.url("file.pt")).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [DATA] * 4
    assert server.asked == [None]


def test_blobfile_comes_first_where_it_knows_the_service_and_https_after(server, monkeypatch):
    address = "https://openaipublic.blob.core.windows.net/diffusion/x.pt"
    assert fetch._openers(address) == [fetch._open_blob, fetch._open_http]
    assert fetch._openers("gs://bucket/x.pt") == [fetch._open_blob]
    assert fetch._openers("http://127.0.0.1/x.pt") == [fetch._open_http]

    def refused(*_):
        raise PermissionError("listing is refused")

    def by_http(_path, *part):
        return fetch_http(server.url("x.pt"), *part)

    fetch_http = fetch._open_http
    monkeypatch.setattr(fetch, "_open_blob", refused)
    monkeypatch.setattr(fetch, "_open_http", by_http)
    assert fetch.local_path(address).read_bytes() == DATA


def test_blobfile_streams_with_an_offset(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(DATA)
    tag = fetch._open_blob(str(file), 0, "").tag
    source = fetch._open_blob(str(file), 100, tag)
    with source.stream as stream:
        assert (stream.read(5), source.start, source.size) == (DATA[100:105], 100, len(DATA))
    assert fetch._open_blob(str(file), 100, "of another").start == 0


def test_a_checkpoint_loads_by_address(server, tmp_path):
    save_atomically({"weight": torch.ones(3)}, tmp_path / "w.pt")
    server.data = (tmp_path / "w.pt").read_bytes()
    assert load_state_dict(server.url("w.pt"))["weight"].tolist() == [1, 1, 1]
    server.data = b"<!DOCTYPE html><html>sign in</html>"
    with pytest.raises(ValueError, match="a web page"):
        load_state_dict(server.url("page.pt"))


def test_a_configuration_alone_is_enough(server, tmp_path):
    network, _ = create_model_and_diffusion(**SMALL)
    save_atomically(network.state_dict(), tmp_path / "w.pt")
    server.data = (tmp_path / "w.pt").read_bytes()
    lines = [f"{key}: {json.dumps(value)}" for key, value in SMALL.items()]
    (tmp_path / "one.yaml").write_text("\n".join([*lines, f"model_path: {server.url('w.pt')}", "num_samples: 1"]))
    for attempt in ("first", "second"):
        run("image_sample", config=tmp_path / "one.yaml", out_dir=tmp_path / attempt)
        assert (tmp_path / attempt / "samples_1x16x16x3.npz").exists()
    assert len(server.asked) == 1
    server.data = b"other"
    run("image_sample", config=tmp_path / "one.yaml", model_path=tmp_path / "w.pt", out_dir=tmp_path / "own")
    assert len(server.asked) == 1


def test_size_address_and_licence_are_said_before_anything_is_fetched(server, monkeypatch, capsys):
    monkeypatch.setitem(fetch.LICENCES, server.url("weights/"), "anybody's")
    server.breaks_at = 0
    with pytest.raises(ValueError, match="broke off at 0"):
        fetch.local_path(server.url("weights/file.pt"))
    said = capsys.readouterr().err
    assert f"fetching {server.url('weights/file.pt')} (5.1 MB)\n  licence: anybody's\n" in said
    path = fetch.local_path(server.url("other/file.pt"))
    assert "licence: not known here" in capsys.readouterr().err
    fetch.local_path(server.url("other/file.pt"))
    assert capsys.readouterr().err == ""
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_known_of_the_licence_of_every_published_file_is_said(path):
    settings = read_yaml(str(path))
    address = next((settings[key] for key in WEIGHTS if key in settings), "")
    if "://" in address:
        licence = "CC BY-NC 4.0" if path.stem.startswith("dit") else "MIT"
        assert licence in fetch._terms(address, 2_211_000_000)
        assert "(2.21 GB)" in fetch._terms(address, 2_211_000_000)
    else:
        assert path.stem.startswith("emoji")
