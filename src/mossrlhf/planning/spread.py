"""What becomes of the bytes of a run where several processes share it."""

from dataclasses import replace

from torch import nn

from mossrlhf.models import SharedRewardModel
from mossrlhf.planning.ledger import nbytes, tensors_of
from mossrlhf.planning.parts import Parts
from mossrlhf.planning.report import RoleMemory

SHARDINGS = (None, "fsdp", "zero3", "zero2")
"""How processes can share a model."""

ZERO_BUCKET = 4 * 500_000_000
"""Bytes of gradients that DeepSpeed reduces at a time, unless its configuration says otherwise."""


class Spread:
    """How models, gradients and optimizer states lie on several devices.

    Args:
        parts: the models, whole.
        processes: how many there are.
        sharding: one of `SHARDINGS`.
        frozen: "whole", "sharded" or "offloaded": the models that are not trained. Those on the
            policy's base are where it is.
        bf16: whether gathered weights are in bfloat16.

    Source: the defaults of DDP, ``fully_shard`` and DeepSpeed, computed; not measured.
    """

    def __init__(
        self, parts: Parts, processes: int, sharding: str | None, frozen: str, bf16: bool
    ) -> None:
        self.parts = parts
        self.processes = processes
        self.sharding = sharding if processes > 1 else None
        self.frozen = "whole" if frozen == "sharded" and not self.sharding else frozen
        self.bf16 = bf16

    @property
    def words(self) -> str:
        """The way in a word."""
        return self.sharding or "DDP"

    @property
    def _cuts_weights(self) -> bool:
        return self.sharding in ("fsdp", "zero3")

    def share(self, name: str, role: RoleMemory) -> RoleMemory:
        """Return what one device holds of a role.

        Args:
            name: of the role.
            role: whole.
        """
        if name in ("reference", "reward"):
            own = self._frozen(name)
            size = sum(nbytes(tensors_of(model).values()) for model in own)
            rest = role.weights - size  # adapters on the policy's base
            if self.frozen == "offloaded" and size:
                note = "on the CPU until asked"
                return replace(role, weights=rest, note=note)
            if self.frozen == "sharded":
                return replace(role, weights=self._part(rest) + sum(map(self._shard, own)))
            return role
        if self.sharding is None:
            return role
        weights = self._part(role.weights) if self._cuts_weights else role.weights
        optimizer = self._part(role.optimizer)
        if self.sharding != "fsdp":  # DeepSpeed's own float32 copy of what it moves
            optimizer += self._part(role.gradients)
        gradients = self._part(role.gradients)
        return replace(role, weights=weights, gradients=gradients, optimizer=optimizer)

    def lent(self, name: str) -> int:
        """Return what is on a device beside `share` while frozen models are asked.

        Args:
            name: "reference", of which layers are gathered as for the policy, or "reward", lent
                whole where it is sharded.
        """
        own = self._frozen(name)
        if self.frozen == "offloaded":
            return sum(nbytes(tensors_of(model).values()) for model in own)
        if self.frozen == "whole" or name == "reference":
            return 0
        if any(isinstance(model, SharedRewardModel) for model, _ in self.parts.rewards):
            own = [*own, self.parts.policy]  # whose base they are on
        return sum(self._gathered_whole(model) for model in own)

    def _frozen(self, name: str) -> list[nn.Module]:
        if name == "reference":
            return [] if self.parts.reference is None else [self.parts.reference]
        models = [model for model, _ in self.parts.rewards]
        return [model for model in models if not isinstance(model, SharedRewardModel)]

    def _shard(self, model: nn.Module) -> int:
        outside, layers = _outside_and_layers(model)
        if self.sharding == "fsdp":  # block by block, the rest is whole
            return outside + self._part(sum(layers))
        return self._part(outside + sum(layers))

    def _gathered_whole(self, model: nn.Module) -> int:
        outside, layers = _outside_and_layers(model)
        trained = model is self.parts.policy
        return sum(layers) + (outside if trained or self.sharding == "zero3" else 0)

    def gradients(self, size: int) -> int:
        """Return what stays on a device of gradients.

        Args:
            size: bytes of all.
        """
        return size if self.sharding is None else self._part(size)

    @property
    def gathered(self) -> int:
        """Bytes of the weights that are whole for a moment: what is in no layer, and two layers."""
        if not self._cuts_weights:
            return 0
        whole, layer = self._sizes()
        size = whole + 2 * layer
        return size // 2 if self.bf16 else size

    def extra(self, gradients: int) -> int:
        """Return what an update takes more than on one device that holds as much.

        Args:
            gradients: bytes of all.
        """
        if self.processes == 1:
            return 0
        if self.sharding is None:
            return gradients  # DDP's buckets are as large as what they average
        if self.sharding == "zero2":
            return min(gradients, ZERO_BUCKET)
        return self.gathered + min(gradients, self._sizes()[1])

    def _part(self, size: int) -> int:
        return -(-size // self.processes)

    def _sizes(self) -> tuple[int, int]:
        """Bytes of the policy's tensors outside of its layers, and of its largest layer."""
        outside, layers = _outside_and_layers(self.parts.policy)
        return outside, max(layers, default=0)


def _outside_and_layers(model: nn.Module) -> tuple[int, list[int]]:
    whole = nbytes(tensors_of(model).values())
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not stacks:
        return whole, []
    layers = [nbytes(tensors_of(layer).values()) for layer in max(stacks, key=len)]
    return whole - sum(layers), layers
