"""What a session makes of a config on the device it finds."""

import pytest
import torch

from swin_moe.config import Config, EngineConfig
from swin_moe.run.session import fit_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "flags, expected", [("flags: fma avx512_bf16 sse", "bf16"), ("flags: amx_bf16", "bf16"), ("flags: avx2 bf", "fp32")]
)
def test_fp16_of_a_config_becomes_what_the_cpu_does_well(tmp_path, capsys, flags, expected):
    file = tmp_path / "cpuinfo"
    file.write_text(flags)
    config = Config(engine=EngineConfig(precision="fp16"))
    found = fit_precision(config, CPU, told=True, cpuinfo=str(file))
    assert found.engine.precision == expected
    assert capsys.readouterr().err.count(f"engine.precision={expected} instead of the config's fp16") == 1
    assert fit_precision(config, CPU, told=False, cpuinfo="/nowhere").engine.precision == "fp32"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_other_precisions_and_devices_stay(precision):
    config = Config(engine=EngineConfig(precision=precision))
    assert fit_precision(config, CPU, told=True) is config
    half = Config(engine=EngineConfig(precision="fp16"))
    assert fit_precision(half, torch.device("cuda", 0), told=True) is half
