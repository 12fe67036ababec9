"""All backends of the MoE layer give what native gives: outputs, balance losses and every gradient (backend_cases.py).

native itself is compared with the layer in one process in test_expert_parallel.py, in the same MPI starts. Tutel is the
stand-in where the real one is not importable.
"""

import pytest

from tests.equivalence.backend_cases import cases_of
from tests.parallel.exchange.tutel_stand_in import is_importable

pytestmark = pytest.mark.mpi

WORLDS = (1, 2, 4)
# Relative, by norm. Ours differ only in the order of sums within a product.
ALLOWED = {"float64": 1e-10, "float32": 2e-6}


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in WORLDS for name in cases_of(world)])
def test_equals_native(world_results, world, name):
    for rank, result in enumerate(world_results(world)):
        compared = result["backends"][name]
        assert ("padded", "float64") in compared
        for (backend, dtype), found in compared.items():
            wrong = {what: value for what, value in found["errors"].items() if not value <= ALLOWED[dtype]}
            assert not wrong, f"rank {rank}, {backend}, {dtype}: {wrong}"


def test_every_backend_was_what_it_is_called(world_results):
    for world in WORLDS:
        for result in world_results(world):
            assert result["tutel"] == is_importable()
            for name, compared in result["backends"].items():
                kinds = {backend: found["dispatcher"] for (backend, _), found in compared.items()}
                if "local" in kinds:
                    padded, local = "PaddedDispatcher", {"local": "LocalDispatcher"}
                else:
                    hops = "hierarchical" if result["spread"].get(name, {}).get("transport") == "hierarchical" else ""
                    padded, local = f"PaddedAllToAll {hops or 'linear'}", {}
                float32 = any(dtype == "float32" for _, dtype in compared)
                assert kinds == {"padded": padded, **local, **({"tutel": padded} if float32 else {})}, name
