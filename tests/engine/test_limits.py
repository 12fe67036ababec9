"""What engines of other libraries refuse, in which words, and before anything starts."""

import pytest

from swin_moe.config.io import load_config
from swin_moe.engine.limits import check_engine


def config(*options: str):
    return load_config("digits_swin_moe", ["model.moe.num_experts=4", *options])


@pytest.mark.parametrize(("options", "world", "sentence"), [
    (["engine.name=deepspeed"], 2, "engine.name=deepspeed does not run parallel.zero=0: .*allowed: 1, 2, 3"),
    (["engine.name=deepspeed", "parallel.zero=1", "engine.precision=fp64"], 2, "engine.precision=fp64: .*float32"),
    (["engine.name=deepspeed", "parallel.zero=3", "parallel.expert=3"], 3, "num_experts=4 is not a multiple of "
     "parallel.expert=3"),
    (["engine.name=deepspeed", "parallel.zero=2", "parallel.expert=1", "parallel.expert_shard=5"], 5,
     "channels in stage . are not a multiple of parallel.expert_shard=5"),
    (["engine.name=deepspeed", "parallel.zero=2", "engine.offload=parameters"], 2, "parallel.zero=3, got .*zero=2"),
    (["parallel.zero=3", "engine.offload=parameters"], 2, "engine.offload=parameters needs engine.name=deepspeed"),
    (["engine.name=fairscale"], 2, "parallel.zero=0: only OSS .*allowed: 1, 2"),
    (["engine.name=fairscale", "parallel.zero=3"], 2, "parallel.zero=3: .*its FSDP .*use engine.name=torch"),
    (["engine.name=fairscale", "parallel.zero=1", "engine.offload=optimizer"], 2, "engine.offload=optimizer: "
     "its OffloadModel"),
])  # fmt: skip
def test_refused_with_key_value_and_what_is_allowed(options, world, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_engine(config(*options), world)


@pytest.mark.parametrize("options", [
    ["engine.name=deepspeed", "parallel.zero=3", "engine.offload=parameters"],
    ["engine.name=deepspeed", "parallel.zero=1", "engine.precision=fp16", "parallel.expert_shard=2"],
    ["engine.name=fairscale", "parallel.zero=2", "engine.precision=fp64", "model.moe.num_experts=3"],
    ["engine.name=torch", "parallel.zero=3", "engine.precision=fp64"],
])  # fmt: skip
def test_what_is_right_may_start(options):
    check_engine(config(*options), 2)
