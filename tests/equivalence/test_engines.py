"""Every engine, ZeRO stage and layout trains as one rank does (table: engine_cases.py)."""

import functools

import pytest
import torch

from tests.equivalence import engine_runs
from tests.equivalence.engine_cases import BALANCED, CASES, CHECKPOINTS, STEPS, STEPS_FULL, Case, chosen, runnable
from tests.gathered import gathered
from tests.ranks import run_ranks

pytestmark = pytest.mark.mpi
WORLDS = (2, 4)
# Relative: task loss, norm and clip factor of (first step, all steps); gradients of the first step and final weights,
# as the norm of the difference over the norm; balance loss of the first step. That is the square of a coefficient of
# variation of 1e-2 here, a small difference of sums: one rank in float32 is 1.4e-6 to 7e-6 from float64.
# Adam's first steps are as long as the learning rate, whatever the gradient: where one cancels to rounding in float32,
# its weight moves either way. One element in the 1024 of a bias network makes 5e-4; gradients are held to 2e-6.
BOUNDS = {
    "fp64": {"first": 1e-10, "curve": 1e-10, "gradients": 1e-10, "weights": 1e-10, "balance": 1e-10, "dropped": 0},
    "fp32": {"first": 2e-6, "gradients": 2e-6, "weights": 1e-3, "balance": 2e-5},
}
CONTINUED = {"fp64": 1e-10, "fp32": 1e-5}  # steps after a checkpoint
HALF_FACTOR = 1.5  # bf16 and fp16: how much further from float64 than one rank in that precision


def tensors_of(results: list[dict], part: str) -> dict[str, torch.Tensor]:
    """Returns the whole tensors in float64, put together from every rank's pieces."""
    return gathered((n, shape, offset, x.double()) for r in results for n, shape, offset, x in r[part])


def distances(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Returns name -> norm of the difference over the norm."""
    assert actual.keys() == expected.keys()
    return {n: float((actual[n] - e).norm() / e.norm().clamp_min(1e-30)) for n, e in expected.items()}


def worst(found: dict[str, float]) -> tuple[float, str]:
    return max((value, name) for name, value in found.items())


def measure(case: Case, results: list[dict], oracle: list[dict]) -> dict[str, tuple[float, str]]:
    """Returns what was compared -> (largest relative difference, where)."""
    for result in results[1:]:
        assert result["rows"] == results[0]["rows"], "ranks report different numbers"
    actual, expected = (torch.tensor(r[0]["rows"], dtype=torch.float64) for r in (results, oracle))
    assert torch.equal(actual[0, [2, 5]], expected[0, [2, 5]]), "dropped tokens or skipped steps differ"
    relative = (actual - expected).abs() / expected.abs().clamp_min(1e-30)
    numbers = relative[:, [0, 3, 4]]
    return {
        "first": (float(numbers[0].max()), "loss, norm, clip factor"),
        "curve": (float(numbers.max()), "loss, norm, clip factor"),
        "balance": (float(relative[0 if case.precision == "fp32" else slice(None), 1].max()), "auxiliary loss"),
        "dropped": (float((actual[:, 2] - expected[:, 2]).abs().max()), "pairs"),
        "gradients": worst(distances(tensors_of(results, "first"), tensors_of(oracle, "first"))),
        "weights": worst(distances(tensors_of(results, "final"), tensors_of(oracle, "final"))),
    }


def check(case: Case, results: list[dict], oracles: dict[str, list[dict]]) -> None:
    oracle = oracles[case.oracle.name]
    if case.precision in BOUNDS:
        found = measure(case, results, oracle)
        wrong = {what: found[what] for what, bound in BOUNDS[case.precision].items() if found[what][0] > bound}
        print(case.name, {what: f"{value:.1e}" for what, (value, _) in found.items()})
        assert not wrong, wrong
        return
    exact = tensors_of(oracles[exact_case(case).name], "final")
    ours, alone = (
        sum(value**2 for value in distances(tensors_of(r, "final"), exact).values()) ** 0.5 for r in (results, oracle)
    )
    print(case.name, f"{ours:.2e} from float64, one rank {alone:.2e}")
    assert ours <= HALF_FACTOR * alone


def exact_case(case: Case) -> Case:
    """Returns the float64 run on one rank."""
    return Case("torch", 0, 1, num_experts=case.num_experts, uneven=case.uneven, options=case.options)


def oracles_of(cases: list[Case]) -> list[Case]:
    return list(dict.fromkeys([c.oracle for c in cases] + [exact_case(c) for c in cases if c.precision not in BOUNDS]))


@pytest.fixture(scope="module")
def full(request):
    """Returns whether everything is run."""
    return request.config.getoption("--full")


@pytest.fixture(scope="module")
def steps(full):
    """Returns how many steps every case takes."""
    return STEPS_FULL if full else STEPS


@pytest.fixture(scope="module")
def alone(full, steps, tmp_path_factory):
    """Returns what one rank gives for everything that is compared with it."""
    cases = oracles_of([case for world in WORLDS for case in chosen(world, full)])
    root = tmp_path_factory.mktemp("alone")
    return run_ranks(engine_runs.run_alone, 1, root, cases, steps, str(root), timeout=900)[0]


@pytest.fixture(scope="module")
def results_of(full, alone, steps, tmp_path_factory):
    """Returns world -> what every rank of it gave; a world is started once.

    A function and not a parametrized fixture: pytest sets those up again for every test.
    """

    @functools.cache
    def start(world: int) -> list[dict]:
        cases = chosen(world, full)
        root = tmp_path_factory.mktemp("ranks")
        sources = {precision: alone[precision]["source"] for precision in ("fp64", "fp32")}
        return run_ranks(engine_runs.run_world, world, root, cases, steps, sources, str(root), full, timeout=3000)

    return start


def parameter(case: Case):
    """Returns the case as pytest wants it."""
    missing = pytest.mark.skipif(bool(case.missing), reason=f"{case.missing} is not installed")
    return pytest.param(case, id=case.name, marks=[missing, *[pytest.mark.full] * case.full])


@pytest.mark.parametrize("case", [parameter(case) for case in sorted(dict.fromkeys(CASES), key=lambda c: c.world)])
def test_trains_as_one_rank_does(results_of, alone, case):
    ranks = [result["cases"][case.name] for result in results_of(case.world)]
    assert "error" not in ranks[0], ranks[0]["error"]
    check(case, ranks, {name: [result] for name, result in alone["cases"].items()})


def test_biases_follow_the_loads(alone):
    """What the other tests compare is not all zeros: biases are multiples of the rate, and have moved apart."""
    final = tensors_of([alone["cases"][Case("torch", 0, 1, options=BALANCED).name]], "final")
    biases = [t for n, t in final.items() if n.endswith("router.balance.bias") and not n.startswith("ema/")]
    moved = torch.stack(biases) / 0.01
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-9)
    assert any(row.unique().numel() > 1 for row in moved.round())


def assert_alike(found: dict, expected: dict, case: Case) -> None:
    """Compares next steps in the precision of the case, evaluations in the float32 of their loss."""
    for key, bound in (("rows", CONTINUED[case.precision]), ("evaluations", 1e-6)):
        ours, theirs = (torch.tensor(r[key], dtype=torch.float64) for r in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=0, msg=lambda m: f"{case.name}: {m}")


@pytest.mark.parametrize("world", WORLDS)
def test_checkpoints_have_the_same_bytes_and_continue_alike(results_of, alone, full, world):
    results = results_of(world)
    for precision in ("fp64", "fp32"):
        assert alone[precision]["continued"]["files"] == engine_runs.digests(alone[precision]["source"])
    for case in runnable(CHECKPOINTS, len(results), full):
        expected = alone[case.precision]["continued"]
        for result in results:
            found = result["continued"][case.name]
            assert found["files"] == expected["files"], case.name
            assert_alike(found, expected, case)


@pytest.mark.parametrize("world", WORLDS)
def test_one_rank_continues_what_shards_saved(results_of, alone, full, tmp_path, world):
    results = results_of(world)
    saved = results[0]["saved"]
    cases = [case for case in runnable(CHECKPOINTS, len(results), full) if case.name in saved]
    found = run_ranks(engine_runs.read_back, 1, tmp_path, cases, saved, str(tmp_path))[0]
    assert cases
    for case in cases:
        assert_alike(found[case.name], alone[case.precision]["later"], case)


def test_a_gradient_that_is_not_a_number_stops_no_rank_alone(results_of):
    results = results_of(2)
    for name, first in results[0]["poisoned"].items():
        assert first == results[1]["poisoned"][name], name
        assert first["skipped"] and first["unchanged"] and not first["then"], name
