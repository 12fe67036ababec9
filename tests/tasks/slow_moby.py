"""MoBY as somebody else may write it: momentum networks that are not called so (test_moby.py)."""

from torch import nn

from swin_moe.models.contrastive import ContrastiveModel
from swin_moe.models.network import Network
from swin_moe.tasks.base import build_encoder
from swin_moe.tasks.moby import MoBY


class SlowModel(ContrastiveModel):
    """A ContrastiveModel whose momentum networks are slow.encoder and slow.projector."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.slow = nn.ModuleDict({"encoder": self._modules.pop("momentum_encoder")})
        self.slow["projector"] = self._modules.pop("momentum_projector")

    def __getattr__(self, name):
        if name in ("momentum_encoder", "momentum_projector"):
            return self.slow[name.removeprefix("momentum_")]
        return super().__getattr__(name)

    def momentum_pairs(self) -> dict[str, str]:
        """See Network."""
        return {f"slow.{name}": name for name, _ in self.slow.named_parameters()}


class SlowMoBY(MoBY):
    """Trains a SlowModel."""

    def build_network(self) -> Network:
        """See Task."""
        task = self.config.task.moby
        sizes = {"queue": task.queue, "hidden_dim": task.hidden_dim, "num_features": task.num_features}
        return SlowModel(build_encoder(self.config), temperature=task.temperature, **sizes)
