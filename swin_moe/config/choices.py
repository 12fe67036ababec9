"""What a routing choice (model.moe.choice) means to a config, a summary or a count of work: plain arithmetic, no torch.

One row of CHOICES each, with the place of the class that routes, which is imported where a layer is built.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from swin_moe.registry import lookup


class TokenFacts:
    """Tokens choose experts: top-k by score."""

    routed_by = "swin_moe.moe.choices.token:TokenChoice"
    # (other option, its values that go with this choice, why).
    excludes: tuple[tuple[str, tuple, str], ...] = (("slots", (1,), "slots belong to model.moe.choice=soft"),)
    has_groups = True  # tokens compete within routing groups
    within_rank = ""  # why a routing group has to be on one rank; "" = it may span ranks
    compiles_whole = True  # whether a layer on one process is one graph in training: no shape depends on the data
    refuses: Mapping[str, str] = {}  # what cannot serve this choice -> why

    def requirements(self, moe: Any) -> Iterator[tuple[bool, str, object, str]]:
        """Yields (whether it holds, option, its value, what is allowed) of a MoEConfig."""
        yield from ()

    def logits(self, moe: Any) -> int:
        """Returns the outputs of a layer's router."""
        return moe.num_experts

    def has_balance_bias(self, moe: Any) -> bool:
        """Returns whether the router holds a bias per expert that balances the load."""
        return moe.scores == "sigmoid"

    def rows(self, moe: Any, tokens: int) -> int:
        """Returns the rows that the tokens of an image send to experts, if none is dropped."""
        return tokens * moe.top_k

    def passes(self, moe: Any, capacity_factor: float, *, tokens: int, hidden: float) -> float:
        """Returns what choosing and the experts cost, in passes of an image's tokens through one expert.

        hidden: Hidden channels of an expert.
        """
        return capacity_factor * moe.top_k

    def active_experts(self, moe: Any) -> int:
        """Returns the experts that an image's token uses, as the papers count them."""
        return moe.top_k

    def describe(self, moe: Any, scope: str) -> str:
        """Returns how tokens and experts come together. scope: What a routing group is."""
        factor = f"capacity factor {moe.capacity_factor} within {scope}"
        return f"top-{moe.top_k} by {moe.scores}, {factor}; evaluation {moe.eval_factor}"


class ExpertFacts(TokenFacts):
    """Experts choose tokens (arXiv:2202.09368)."""

    routed_by = "swin_moe.moe.choices.expert:ExpertChoice"
    excludes = (
        ("balance_loss", ("none",), "every expert takes as many tokens as the others"),
        ("normalize_gate", (False,), "a token may have any number of experts"),
        ("group_limit", (0,), "it limits the experts that a token chooses"),
        ("bias_rate", (0.0,), "loads are even by construction"),
        ("slots", (1,), "slots belong to model.moe.choice=soft"),
    )
    within_rank = "an expert compares the scores of all tokens of its group"
    compiles_whole = False
    refuses: Mapping[str, str] = {
        "engine.cuda_graphs=true": "the host asks how many experts the most wanted token got",
    }

    def requirements(self, moe: Any) -> Iterator[tuple[bool, str, object, str]]:
        """Yields that capacities are given."""
        needs = "with model.moe.choice=expert (an expert that chooses has no need to go by)"
        yield moe.capacity_factor > 0, "capacity_factor", moe.capacity_factor, f"> 0 {needs}"
        allowed = f">= 0 {needs}; 0 = model.moe.capacity_factor"
        yield moe.eval_factor >= 0, "eval_capacity_factor", moe.eval_capacity_factor, allowed

    def has_balance_bias(self, moe: Any) -> bool:
        """Returns False: there is nothing to balance."""
        return False

    def passes(self, moe: Any, capacity_factor: float, *, tokens: int, hidden: float) -> float:
        """Returns what the experts cost: they are always full."""
        return moe.capacity_factor * moe.top_k

    def describe(self, moe: Any, scope: str) -> str:
        """Returns how experts choose, in training and in evaluation."""
        factor = moe.eval_factor or moe.capacity_factor
        return (
            f"every expert chooses its tokens, capacity factor {moe.capacity_factor} x {moe.top_k} within {scope}; "
            f"evaluation {factor} x {moe.top_k} within an image"
        )


class SoftFacts(TokenFacts):
    """Experts take slots, means of all tokens of an image (arXiv:2308.00951)."""

    routed_by = "swin_moe.moe.choices.soft:SoftChoice"
    excludes = (
        ("balance_loss", ("none",), "every expert gets its slots filled"),
        ("scores", ("softmax",), "its weights are means"),
        ("normalize_gate", (False,), "its weights sum to 1 already"),
        ("group_limit", (0,), "a token uses all experts"),
        ("bias_rate", (0.0,), "nothing is chosen"),
        ("top_k", (1,), "nothing is chosen; model.moe.slots sets the cost"),
    )
    has_groups = False
    compiles_whole = False
    refuses: Mapping[str, str] = {
        "inspect-routing": "every expert gets a mean of all patches, so none is an expert's own",
    }

    def logits(self, moe: Any) -> int:
        """Returns the slots of an image."""
        return moe.num_experts * moe.slots

    def has_balance_bias(self, moe: Any) -> bool:
        """Returns False: nothing is chosen."""
        return False

    def rows(self, moe: Any, tokens: int) -> int:
        """Returns the slots of an image."""
        return moe.num_experts * moe.slots

    def passes(self, moe: Any, capacity_factor: float, *, tokens: int, hidden: float) -> float:
        """Returns the slots' share of the tokens, and the mixing: 2 * tokens * slots * channels."""
        slots = moe.num_experts * moe.slots
        return slots / tokens + slots / hidden

    def active_experts(self, moe: Any) -> int:
        """Returns all: a token is a part of every slot."""
        return moe.num_experts

    def describe(self, moe: Any, scope: str) -> str:
        """Returns how many slots there are."""
        return f"soft: {moe.slots} slots an expert and image"


CHOICES: Mapping[str, TokenFacts] = {"token": TokenFacts(), "expert": ExpertFacts(), "soft": SoftFacts()}


def facts_of(moe: Any) -> TokenFacts:
    """Returns the row of a MoEConfig's choice; of one that lives elsewhere (package.module:Name) its class's `facts`.

    Raises:
        ValueError: There is no such choice.
    """
    return CHOICES[moe.choice] if moe.choice in CHOICES else lookup({}, moe.choice, key="model.moe.choice").facts


def refuse_choice(moe: Any, what: str) -> None:
    """Raises ValueError, naming the option, where the choice says that `what` cannot serve it."""
    why = facts_of(moe).refuses.get(what)
    if why is not None:
        raise ValueError(f"model.moe.choice={moe.choice} is not for {what}: {why}")
