"""LoRAEmbedding: y = W[i] + scaling·Aᵀ[i]·Bᵀ; looking a row of A up is the product with a one-hot vector."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn
from torch.nn.functional import embedding

from loratools.errors import UnsupportedError
from loratools.layers.base import LoRALayer, Options, Settings, add_up, check_plain


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """In the place of an `nn.Embedding`: lora_A (rank, num_embeddings), lora_B (embedding_dim, rank).

    As in loralib and peft A starts at zero, B is normal, and dropout has no input to act on. Raises UnsupportedError with
    `max_norm`, which rewrites the weight while it is read.

    >>> import torch
    >>> LoRAEmbedding(nn.Embedding(10, 4), rank=2, alpha=2)(torch.tensor([1, 2])).shape
    torch.Size([2, 4])
    """

    def __init__(self, base: nn.Module, **settings: Unpack[Options]) -> None:
        check_plain(base, (nn.Embedding,))
        assert isinstance(base, nn.Embedding)
        if base.max_norm is not None:
            raise UnsupportedError("an embedding with max_norm rewrites its weight in forward", found=base.max_norm)
        nn.Embedding.__init__(self, base.num_embeddings, base.embedding_dim, base.padding_idx, device="meta")
        self.scale_grad_by_freq = base.scale_grad_by_freq
        made = Settings(**settings)
        self.adapt(base, base.weight, made, (made.rank, self.num_embeddings), (self.embedding_dim, made.rank))

    def reset_factors(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    @property
    def kind(self) -> str:
        return "embedding"

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.T, self.lora_B.T

    def forward(self, indices: Tensor) -> Tensor:
        base = nn.Embedding.forward(self, indices)
        return base if self.merged else self.add_change(base, indices)

    def add_change(self, base: Tensor, indices: Tensor) -> Tensor:
        """base + scaling·B(A[indices]); the padding row of the factors gets no gradient, as the weight's does not."""
        hidden = embedding(indices, self.lora_A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return add_up(base, hidden, self.lora_B, self.scaling)
