"""Graphs of inference with a recorder in place of the device: what is replayed, on which memory, and what never is."""

import pytest
import torch
from torch import nn

from swin_moe import evaluate_features
from swin_moe.config.io import load_config
from swin_moe.engine.graphs import MOST_GRAPHS, GraphedForward, Recording, check_graphs, with_graphs
from swin_moe.engine.precision import DTYPES, autocast
from swin_moe.models import build_model
from swin_moe.models.optimized import OptimizedSwin
from swin_moe.ops.packed_layers import refusal
from swin_moe.parallel.groups import single_process_groups
from swin_moe.run.session import Session, build_local_model
from swin_moe.tasks.base import build_task
from swin_moe.weights.load import backbone_of
from tests.tasks import cases

DENSE, MOE = "digits_dense", "digits_swin_moe"


class Recorder:
    """Records as a device does: a replay runs the call on the same buffers and writes into the same results."""

    def __init__(self):
        self.recorded = self.replayed = 0
        self.caches_casts: list[bool] = []

    def __call__(self, call):
        self.recorded += 1
        self.caches_casts.append(torch.is_autocast_cache_enabled())
        output = call()
        outputs = output if isinstance(output, tuple) else (output,)
        for tensor in outputs:
            tensor.fill_(float("nan"))  # nothing has run yet when a device has recorded

        def replay():
            self.replayed += 1
            again = call()
            for old, new in zip(outputs, again if isinstance(again, tuple) else (again,)):
                old.copy_(new)

        return Recording(replay, output)


class Counting(nn.Module):
    """A small network that counts its forwards."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


@pytest.fixture
def graphed():
    torch.manual_seed(0)
    return GraphedForward(Counting().eval(), Recorder())


def batch(rows, seed=0):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


def test_results_are_those_of_each_batch_and_stay(graphed):
    batches = [batch(4, seed) for seed in range(5)]
    with torch.no_grad():
        found = [graphed(x) for x in batches]
        expected = [graphed.model.layer(x) for x in batches]
    assert all(map(torch.equal, found, expected))
    assert (graphed.record.recorded, graphed.record.replayed) == (1, 4)


def test_a_batch_is_left_as_it_was(graphed):
    first, second = batch(4, 1), batch(4, 2)
    kept = first.clone(), second.clone()
    with torch.no_grad():
        for x in (first, first, second):
            graphed(x)
    assert torch.equal(first, kept[0]) and torch.equal(second, kept[1])


def test_the_remainder_batch_runs_as_always(graphed):
    with torch.no_grad():
        for x in (batch(4), batch(4), batch(4), batch(1)):
            assert torch.equal(graphed(x), graphed.model.layer(x))
    assert (graphed.record.recorded, graphed.record.replayed) == (1, 2)


def test_no_more_shapes_than_the_limit(graphed):
    with torch.no_grad():
        for rows in range(1, MOST_GRAPHS + 3):
            for seed in range(3):
                x = batch(rows, seed)
                assert torch.equal(graphed(x), graphed.model.layer(x))
    assert graphed.record.recorded == MOST_GRAPHS


@pytest.mark.parametrize("why", ["gradients", "training"])
def test_never_where_gradients_or_draws_may_be_wanted(graphed, why):
    if why == "training":
        graphed.train()
    with torch.set_grad_enabled(why == "gradients"):
        for seed in range(3):
            assert graphed(batch(4, seed)).requires_grad == (why == "gradients")
    assert graphed.record.recorded == 0


def test_weights_changed_in_place_are_seen_and_replaced_ones_recorded_anew(graphed):
    x, layer = batch(4), graphed.model.layer
    with torch.no_grad():
        graphed(x), graphed(x)
        layer.weight.mul_(2)
        assert torch.equal(graphed(x), layer(x)) and graphed.record.recorded == 1
        kept = layer.weight
        layer.weight = nn.Parameter(kept * 3)
        assert torch.equal(graphed(x), layer(x)) and graphed.record.recorded == 2


def test_inference_and_autocast_are_circumstances_of_their_own(graphed):
    x = batch(4)
    for _ in range(2):
        with torch.no_grad():
            graphed(x)
        with torch.inference_mode():
            graphed(x)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert graphed(x).dtype == torch.bfloat16
    assert graphed.record.recorded == 3


def test_autocast_keeps_no_weight_that_a_recording_reads(graphed):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        graphed(batch(4)), graphed(batch(4))
        assert torch.is_autocast_cache_enabled()
    assert graphed.record.caches_casts == [False]


def test_a_call_that_cannot_be_recorded_is_one_sentence():
    def waits(call):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graphed = GraphedForward(Counting().eval(), waits)
    sentence = r"engine.cuda_graphs=true: .* shape \(4, 3\) .*\(operation not permitted when stream is capturing\); use"
    with torch.no_grad():
        graphed(batch(4))
        with pytest.raises(ValueError, match=sentence):
            graphed(batch(4))
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("name", [DENSE, MOE])
def test_networks_give_the_same_bits(name):
    model = build_model(load_config(name).model)
    model.init_weights(3)
    graphed = GraphedForward(model.eval(), Recorder())
    size = load_config(name).model.img_size
    with torch.inference_mode():
        for seed in range(3):
            x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
            found, expected = graphed(x), model(x)
            pairs = zip(found, expected) if isinstance(expected, tuple) else [(found, expected)]
            assert all(torch.equal(*pair) for pair in pairs)
    assert graphed.record.replayed == 2


def test_features_are_measured_from_recordings(tmp_path, monkeypatch):
    recorder, found = Recorder(), []
    for graphs in (False, True):
        options = [f"engine.cuda_graphs={str(graphs).lower()}", f"run.output={tmp_path}", "data.eval_batch=40"]
        config = load_config("digits_simmim", [*cases.TINY, *options])
        session = Session(config, single_process_groups(), torch.device("cpu"))
        wrapped = (lambda model, _: GraphedForward(model, recorder)) if graphs else with_graphs
        monkeypatch.setattr(evaluate_features, "with_graphs", wrapped)
        network = build_local_model(session, build_task(config))
        network.init_weights(1)
        asked = evaluate_features.parse_options(["--k", "3", "--draws", "2", "--l2", "1"])[1]
        found.append(evaluate_features.measure(session, backbone_of(network.eval()), asked))
    assert found[0] == found[1] and len(found[0]) == 3
    assert recorder.replayed >= recorder.recorded > 0


def test_only_where_asked_for():
    model = Counting()
    assert with_graphs(model, load_config(DENSE)) is model
    assert isinstance(with_graphs(model, load_config(DENSE, ["engine.cuda_graphs=true"])), GraphedForward)


REFUSED = [
    (DENSE, [], "cpu", 1, "needs a CUDA device, this run computes on cpu"),
    (MOE, ["engine.precision=bf16"], "cuda", 2, "runs on one rank, got 2"),
    (MOE, [], "cuda", 1, "engine.precision=bf16 and channels in multiples of 8, got engine.precision=fp32"),
    (MOE, ["engine.precision=bf16", "model.embed_dim=36", "model.num_heads=[2,4]"], "cuda", 1, "model.embed_dim=36"),
    (MOE, ["model.moe.backend=padded", "model.moe.eval_capacity_factor=0"], "cuda", 1, "capacity_factor > 0, got 0"),
    (MOE, ["model.moe.backend=tutel", "engine.precision=bf16"], "cuda", 1, "model.moe.backend=tutel; use native or"),
]


@pytest.mark.parametrize(("name", "options", "device", "world", "sentence"), REFUSED)
def test_refused_in_one_sentence(name, options, device, world, sentence):
    with pytest.raises(ValueError, match="^engine.cuda_graphs=true .*" + sentence):
        check_graphs(load_config(name, ["engine.cuda_graphs=true", *options]), device, world)
    check_graphs(load_config(name, options), device, world)


def test_features_of_any_task_may_be_recorded():
    config = load_config("digits_simmim", ["engine.cuda_graphs=true"])
    check_graphs(config, "cuda", 1, features=True)
    with pytest.raises(ValueError, match="^engine.cuda_graphs=true is for task.name=classify, got simmim"):
        check_graphs(config, "cuda", 1)
    with pytest.raises(ValueError, match="^engine.cuda_graphs=true needs a CUDA device"):
        check_graphs(config, "cpu", 1, features=True)


@pytest.mark.parametrize(
    ("name", "options", "world"),
    [
        (DENSE, ["engine.precision=fp32"], 4),
        (MOE, ["engine.precision=bf16"], 1),
        (MOE, ["model.moe.backend=padded", "model.moe.eval_capacity_factor=1.25"], 1),
    ],
)
def test_what_has_no_shape_from_the_data_may_start(name, options, world):
    check_graphs(load_config(name, ["engine.cuda_graphs=true", *options]), "cuda", world)


def test_experts_that_choose_ask_for_their_rows():
    chosen = ["engine.cuda_graphs=true", "model.moe.choice=expert", "model.moe.balance_loss=none"]
    with pytest.raises(ValueError, match="^model.moe.choice=expert is not for engine.cuda_graphs=true: the host asks"):
        check_graphs(load_config(MOE, chosen), "cuda", 1)


@pytest.mark.skipif(bool(refusal()), reason="no packed layers here")
@pytest.mark.parametrize(
    ("form", "precision"), [("true", "fp32"), ("true", "bf16"), ("int8", "fp32"), ("int8", "bf16")]
)
def test_the_inference_form_runs_where_it_is_asked_for(form, precision):
    config = load_config(MOE, [f"engine.optimize={form}", f"engine.precision={precision}"])
    model = build_model(config.model)
    model.init_weights(3)
    check_graphs(config, "cpu", 1)
    optimized = with_graphs(model.eval(), config)
    assert isinstance(optimized, OptimizedSwin) and optimized.dtype == DTYPES[precision]
    assert optimized.int8 == (form == "int8")
    x = torch.randn(3, 3, *config.model.img_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), autocast(precision, x.device):
        got, expected = optimized(x), model(x)[0].float()
    assert got.dtype == torch.float32  # also under autocast
    assert float((got - expected).norm() / expected.norm()) < (1e-5 if (form, precision) == ("true", "fp32") else 5e-2)


def test_where_there_is_no_inference_form_a_sentence_says_so():
    def refused(name: str, sentence: str, device: str = "cpu", **options: bool) -> None:
        with pytest.raises(ValueError, match=f"^engine.optimize=true {sentence}.*; use engine.optimize=false$"):
            check_graphs(load_config(name, ["engine.optimize=true"]), device, 1, **options)

    refused(DENSE, "is for the CPU, this run computes on cuda", device="cuda")
    refused("digits_simmim", "is for whole classifiers, not for task.name=simmim")
    refused(DENSE, "is for whole classifiers, not for evaluate-features", features=True)
    for form in ("true", "int8"):
        with pytest.raises(ValueError, match=f"^engine.optimize={form}: optimize: it takes a Swin.*Counting; use"):
            with_graphs(Counting(), load_config(DENSE, [f"engine.optimize={form}"]))
    with pytest.raises(
        ValueError, match="^engine.optimize=int8 needs engine.precision=fp32 or bf16 or fp16 for what is "
    ):
        check_graphs(load_config(DENSE, ["engine.optimize=int8", "engine.precision=fp64"]), "cpu", 1)
    with pytest.raises(ValueError, match="^engine.optimize=int8 is for the CPU, this run computes on cuda"):
        check_graphs(load_config(DENSE, ["engine.optimize=int8"]), "cuda", 1)
    with pytest.raises(ValueError, match="engine.optimize must be true or false or int8, got 'int4'$"):
        load_config(DENSE, ["engine.optimize=int4"])
