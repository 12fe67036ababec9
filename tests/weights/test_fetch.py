"""Released weights by name: the table, and fetching from a server that breaks off, changes files, or is not there."""

import http.server
import json
import threading
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import swin_moe
from swin_moe.checkpoint import CheckpointError
from swin_moe.config.io import find_config
from swin_moe.config.shipped.released import find, of_config, released
from swin_moe.weights import command
from swin_moe.weights.fetch import FOLDER, MIRROR, Progress, check, fetch, place
from swin_moe.weights.sources import open_weights

SMALL = {"img_size": 32, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "num_classes": 10}
NAME = "swin_tiny_patch4_window7_224"
CONTENT = bytes(range(256)) * 40_000  # 10 MB


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` from memory, as far as `most` bytes an answer; counts what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.most, self.ranges, self.asked = {}, None, True, []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path[1:])
        wanted, same = self.headers.get("Range"), self.headers.get("If-Range")
        self.server.asked.append((self.path[1:], wanted))
        if content is None:
            self.send_error(404)
            return
        tag = f'"{hash(content)}"'
        start = int(wanted.removeprefix("bytes=")[:-1]) if wanted and self.server.ranges and same == tag else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(content[start:][: self.server.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    made = Server()
    monkeypatch.setenv(MIRROR, made.address)
    monkeypatch.setenv(FOLDER, str(tmp_path / "weights"))
    yield made
    made.shutdown()
    made.server_close()


def test_the_table_names_files_of_configs_that_are_there():
    rows = released()
    assert len(rows) == 190 and len({row.file for row in rows.values()}) == 190
    assert Counter(row.task for row in rows.values()) == {"classify": 173, "detect": 13, "segment": 4}
    for row in rows.values():
        assert row.address.startswith("https://") and (not row.config or find_config(row.config))
    assert of_config(NAME).top1 == 81.2 and find(f"{NAME}.pth") is rows[NAME]
    assert of_config("swin_base_patch4_window7_224_22kto1k_finetune").name == "swin_base_patch4_window7_224_22kto1k"


def test_a_name_that_is_none_is_told_the_near_ones():
    with pytest.raises(ValueError, match="called 'swin_tiny_224'; did you mean swin_tiny"):
        find("swin_tiny_224")
    with pytest.raises(ValueError, match="no weights were released for the config 'digits_swin_moe'"):
        of_config("digits_swin_moe")
    with pytest.raises(ValueError, match="15 files of weights were released .* name one of them"):
        of_config("simmim_finetune__swinv2_base__img224_window14__800ep")


def test_a_file_comes_once_and_whole(server):
    server.files[f"{NAME}.pth"] = CONTENT
    shown = []
    path = fetch(find(NAME), show=lambda *how_far: shown.append(how_far))
    assert path.read_bytes() == CONTENT and path == place(find(NAME)) and shown[-1] == (len(CONTENT), len(CONTENT))
    assert fetch(find(NAME)) == path and len(server.asked) == 1
    assert len(check(find(NAME))) == 64
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(ValueError, match="has changed since it was fetched"):
        check(find(NAME))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_continued(server, ranges):
    """In pieces of 3 MB; a server that knows no ranges gives it from the beginning, and nothing is doubled."""
    server.files[f"{NAME}.pth"], server.ranges, server.most = CONTENT, ranges, 3_000_000
    if ranges:
        assert fetch(find(NAME)).read_bytes() == CONTENT
        assert [start for _, start in server.asked] == [None, *(f"bytes={n}000000-" for n in (3, 6, 9))]
    else:
        with pytest.raises(ValueError, match="3000000 of 10240000 bytes"):
            fetch(find(NAME))
        server.most = None
        assert fetch(find(NAME)).read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_anew(server):
    server.files[f"{NAME}.pth"], server.most = CONTENT, 0
    part = place(find(NAME)).with_name(f"{NAME}.pth.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"old" * 1000)
    part.with_name(f"{NAME}.pth.tag").write_text('"of another file"')
    server.most = None
    assert fetch(find(NAME)).read_bytes() == CONTENT


def test_a_part_that_is_the_whole_is_taken(server):
    server.files[f"{NAME}.pth"] = CONTENT
    part = place(find(NAME)).with_name(f"{NAME}.pth.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT)  # killed before it got its name
    part.with_name(f"{NAME}.pth.tag").write_text(f'"{hash(CONTENT)}"')
    assert fetch(find(NAME)).read_bytes() == CONTENT


def test_many_at_once_fetch_it_once(server):
    server.files[f"{NAME}.pth"] = CONTENT
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: fetch(find(NAME)), range(8)))
    assert len(set(paths)) == 1 and len(server.asked) == 1


@pytest.mark.parametrize("mirror, reason", [("", "404 Not Found"), ("http://127.0.0.1:9", "Connection refused")])
def test_what_cannot_be_fetched_says_where_to_put_it(server, monkeypatch, capsys, mirror, reason):
    if mirror:
        monkeypatch.setenv(MIRROR, mirror)
    assert command.main(["fetch", NAME]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and reason in error and f"put it at {place(find(NAME))}, or" in error


def test_what_only_a_browser_gets_says_so(monkeypatch, tmp_path):
    row = find("simmim_pretrain__swin_base__img192_window6__100ep")
    with pytest.raises(ValueError, match="gives it to browsers only.*put it at .*100ep.pth"):
        fetch(row, tmp_path, mirror="")
    (tmp_path / row.file).write_bytes(b"x")
    assert fetch(row, tmp_path, mirror="") == tmp_path / row.file and check(row, tmp_path)


def test_a_file_a_rank_is_named_as_other_commands_take_it(server, tmp_path):
    name = "swin_moe_small_patch4_window12_192_8expert_32gpu_22k"
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for rank in range(3):
            archive.writestr(f"{name}/{name}.pth.rank{rank}", b"x")
        archive.writestr("../outside.pth", b"x")
    server.files[f"{name}.zip"] = (tmp_path / "x.zip").read_bytes()
    path = fetch(find(name))
    assert path.name == f"{name}.pth" and path.with_name(f"{name}.pth.rank2").is_file()
    assert not (place(find(name)).parent.parent / "outside.pth").exists()


def official(tmp_path):
    """Returns (a small network, its official file as bytes)."""
    model = swin_moe.create_model("swin", seed=3, **SMALL)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    return model, (tmp_path / "x.pth").read_bytes()


@pytest.mark.parametrize("pretrained", [True, NAME])
def test_a_network_with_its_released_weights_in_one_call(server, tmp_path, pretrained):
    model, server.files[f"{NAME}.pth"] = official(tmp_path)
    made = swin_moe.create_model(NAME, pretrained=pretrained, **SMALL)
    for name, value in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name
    few = swin_moe.create_model(NAME, pretrained=pretrained, **SMALL | {"num_classes": 3})  # its head is new
    assert torch.equal(few.layers[0].blocks[0].attn.qkv.weight, model.layers[0].blocks[0].attn.qkv.weight)


def test_released_weights_on_this_disk_are_taken_by_name_elsewhere(server, tmp_path):
    with pytest.raises(CheckpointError, match=f"checkpoint.init={NAME}: .* not on this disk: swin-moe weights fetch"):
        open_weights(NAME, key="checkpoint.init")
    _, server.files[f"{NAME}.pth"] = official(tmp_path)
    fetch(find(NAME))
    assert open_weights(NAME, key="checkpoint.init").path == place(find(NAME))


def test_the_command(server, capsys):
    assert command.main(["list", "swin_mlp", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("swin_mlp_tiny_c") == 3 and " 79.4   94.6  imagenet1k\n" in shown
    assert command.main(["path", NAME]) == 2 and f"weights fetch {NAME}" in capsys.readouterr().err
    server.files[f"{NAME}.pth"] = CONTENT
    assert command.main(["fetch", NAME]) == 0
    assert "sha256 " in (said := capsys.readouterr()).out and "10 of 10 MB" in said.err
    assert command.main(["path", NAME]) == 0 and capsys.readouterr().out.strip() == str(place(find(NAME)))
    assert command.main(["list", NAME, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["here"] is True
    assert command.main(["list", "--task", "segment"]) == 0
    shown = capsys.readouterr().out
    assert (
        shown.count("\n") == 6
        and "mIoU  mIoU (ms)  trained on" in shown
        and "48.13      49.72  imagenet1k, ade20k" in shown
    )
    assert command.main(["list", "small", "--task", "detect"]) == 0 and " 51.9       45  " in capsys.readouterr().out
    assert command.main(["list", "--task", "pose"]) == 2 and "invalid choice: 'pose'" in capsys.readouterr().err
    for words, said in ((["list", "resnet"], "no released weights"), (["fetch"], "needs the name"), (["get"], "verb")):
        assert command.main(words) == 2
        assert said in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_progress_is_a_line_every_tenth_where_nobody_watches():
    class Lines(list):
        write, flush, isatty = list.append, lambda self: None, lambda self: False

    lines = Lines()
    progress = Progress("x", lines)
    for there in range(0, 1001):
        progress(there * 1000, 1_000_000)
    assert len(lines) == 11 and lines[-1].startswith("x: 1 of 1 MB")
