"""The network in torch, fp32: Qwen3 with tied embeddings, small enough for a CPU.

Projections that read the same input are one matrix here; ``export`` splits them into
the names of the Hugging Face format.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; ``rope_theta`` and ``eps`` as in Qwen3's config."""

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 6
    intermediate_size: int = 512
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 1024
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves layout; x: [batch, heads, length, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Norm(nn.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, s: Shape):
        super().__init__()
        self.shape = s
        q, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
        self.qkv = nn.Linear(s.hidden_size, q + 2 * kv, bias=False)
        self.out = nn.Linear(q, s.hidden_size, bias=False)
        self.gate_up = nn.Linear(s.hidden_size, 2 * s.intermediate_size, bias=False)
        self.down = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)
        self.norm1, self.norm2 = (Norm(s.hidden_size, s.rms_norm_eps) for _ in range(2))
        self.q_norm, self.k_norm = (Norm(s.head_dim, s.rms_norm_eps) for _ in range(2))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = self.shape
        batch, length, _ = x.shape
        heads, kv = s.num_attention_heads, s.num_key_value_heads
        qkv = self.qkv(self.norm1(x)).view(batch, length, heads + 2 * kv, s.head_dim).transpose(1, 2)
        q, k, v = qkv.split((heads, kv, kv), dim=1)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        group = heads // kv
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, -1))

    def feed(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """Tokens in, logits out."""

    def __init__(self, s: Shape):
        super().__init__()
        self.shape = s
        self.embed = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))
        self.norm = Norm(s.hidden_size, s.rms_norm_eps)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = 0.02 if "embed" in name else weight.shape[1] ** -0.5
                scale = 0.3 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(weight, std=std * scale)
        power = torch.arange(0, s.head_dim, 2) / s.head_dim
        angle = torch.outer(torch.arange(s.max_position_embeddings), s.rope_theta**-power)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def hidden(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """[batch, length] int64 -> [batch * length, hidden], before the last norm.

        With ``rows`` only those positions come back, and the last feed-forward runs on
        them alone: nothing reads the others.
        """
        length = tokens.shape[1]
        x, cos, sin = self.embed(tokens), self.cos[:length], self.sin[:length]
        for layer in self.layers[:-1]:
            x = layer.feed(layer.attend(x, cos, sin))
        x = self.layers[-1].attend(x, cos, sin).flatten(0, 1)
        return self.layers[-1].feed(x if rows is None else x.index_select(0, rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary]."""
        return F.linear(self.norm(hidden), self.embed.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length] -> [batch, length, vocabulary]."""
        return self.logits(self.hidden(tokens)).unflatten(0, tokens.shape)

    def loss(self, tokens: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy at ``rows`` of the flattened positions against ``targets``."""
        return F.cross_entropy(self.logits(self.hidden(tokens, rows)), targets)
