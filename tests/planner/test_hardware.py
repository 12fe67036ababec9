"""Hardware files: the shipped ones, and what is wrong with others in one sentence."""

import pytest
import yaml

from swin_moe.config.io import find_config
from swin_moe.config.shipped.listing import shipped
from swin_moe.planner.hardware import (
    dump_hardware,
    hardware_folder,
    load_hardware,
    read_hardware,
    shipped_hardware,
    shipped_links,
)


def changed(tmp_path, **figures):
    """Returns the path of the A100's file with figures changed, None = left out."""
    tree = yaml.safe_load((hardware_folder() / "a100_80.yaml").read_text()) | figures
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    return path


@pytest.mark.parametrize("name", shipped_hardware())
def test_every_figure_of_a_shipped_machine_has_its_source(name):
    machine = load_hardware(name)
    assert machine.name == name and machine.matrix_rate("fp32") > 1e9
    for line in (hardware_folder() / f"{name}.yaml").read_text().splitlines():
        has_figure = ":" in line and line.split("#")[0].partition(":")[2].strip() not in ("", "cpu", "cuda")
        # The dtypes of one data sheet and the number of ranks speak for themselves.
        plain = (
            line.startswith(("  bf16", "  fp16", "  fp32", "  fp64", "ranks_per_node")) or "bytes_per_second" in line
        )
        assert not has_figure or plain or "#" in line, line


def test_machines_are_no_configs_of_runs():
    assert "hardware" not in shipped([])
    with pytest.raises(ValueError, match="no config file or config name 'h100'"):
        find_config("h100")


@pytest.mark.parametrize(
    "figures, sentence",
    [
        ({"memory_bytes": None}, "memory_bytes is missing"),
        ({"inside": None}, "inside is missing"),
        ({"launch_seconds": -1.0}, "launch_seconds must be a number > 0, got -1.0"),
        ({"watts": "many"}, "watts must be a number > 0, got 'many'"),
        ({"watts": float("nan")}, "watts must be a number > 0"),
        ({"flops": {"int8": 1.0}}, "flops must give FLOP/s of some of fp32"),
        ({"flops": {"bf16": 0}}, "flops.bf16 must be a number > 0, got 0"),
        ({"between": {"latency": 1e-5}}, "between must give latency and bytes_per_second"),
        ({"oversubscription": 0.5}, "oversubscription must be >= 1, got 0.5"),
        ({"nodes_per_leaf": -1}, "nodes_per_leaf must be a number >= 0, got -1"),
        ({"nics_per_node": 3}, "nics_per_node=3 must divide ranks_per_node=8"),
        ({"ranks_per_node": 2.5}, "ranks_per_node must be a whole number, got 2.5"),
        ({"matrix_share": 1.5}, "matrix_share must be in"),
        ({"memory_byte": 1.0}, "did you mean memory_bytes?"),
        ({"handling_seconds": -1e-5}, "handling_seconds must be a number >= 0, got -1e-05"),
        ({"handling_bytes_per_second": "fast"}, "handling_bytes_per_second must be a number >= 0, got 'fast'"),
        ({"replicating_seconds": -1e-5}, "replicating_seconds must be a number >= 0, got -1e-05"),
        ({"exchanging_seconds": -1e-5}, "exchanging_seconds must be a number >= 0, got -1e-05"),
        ({"recomputing_seconds": -1e-5}, "recomputing_seconds must be a number >= 0, got -1e-05"),
        ({"collectives": {"gather": {}}}, "collectives must be links of some of all_to_all"),
        ({"collectives": {"broadcast": {"latency": 1e-5}}}, "collectives.broadcast must give latency and bytes_per_s"),
        (
            {"collectives": {"broadcast": {"latency": -1e-5, "bytes_per_second": 1e9}}},
            "collectives.broadcast.latency must be a number > 0, got -1e-05",
        ),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path, figures, sentence):
    path = changed(tmp_path, **figures)
    with pytest.raises(ValueError) as error:
        load_hardware(str(path))
    assert sentence in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_machine_is_answered_with_the_near_one():
    with pytest.raises(ValueError, match="no hardware 'a100_8'; did you mean a100_80?"):
        load_hardware("a100_8")
    with pytest.raises(ValueError, match="cannot be read"):
        load_hardware("/nowhere.yaml")


def test_a_precision_without_a_figure_is_refused():
    with pytest.raises(ValueError, match="v100_32 has no figure for engine.precision=bf16; it has fp16, fp32, fp64"):
        load_hardware("v100_32").matrix_rate("bf16")


def test_a_written_machine_reads_back(tmp_path):
    machine = load_hardware("h100")
    path = tmp_path / "h100.yaml"
    dump_hardware(machine, path, "measured\non this machine")
    assert read_hardware(path) == machine and path.read_text().startswith("# measured\n# on this machine\n")


def test_every_link_has_its_sources():
    links = shipped_links()
    assert {"nvlink_4", "pcie_5", "infiniband_hdr", "infiniband_ndr", "slingshot_11", "ethernet_100"} <= set(links)
    for line in (hardware_folder() / "links.yaml").read_text().splitlines():
        assert not line.startswith("  ") or "#" in line, line


def test_a_machine_is_given_other_links_and_nodes():
    machine = load_hardware("h100,between=slingshot_11,ranks_per_node=4")
    assert machine.between == shipped_links()["slingshot_11"] and machine.ranks_per_node == 4
    assert machine.inside == load_hardware("h100").inside


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("h100,between=slingshot_1", "no link 'slingshot_1'; did you mean slingshot_11?"),
        ("h100,watts=4", "'watts=4' is not inside=LINK, between=LINK or ranks_per_node=N"),
        ("h100,ranks_per_node=0", "ranks_per_node must be a whole number > 0, got '0'"),
        ("links", "no hardware 'links'"),
    ],
)
def test_what_a_machine_cannot_be_given_is_a_sentence(text, sentence):
    with pytest.raises(ValueError) as error:
        load_hardware(text)
    assert sentence in str(error.value) and "\n" not in str(error.value)
