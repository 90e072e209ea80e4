"""Distillation: how far a student's next-token distribution is from the float model's, and its gradient.

With p = softmax(H h) of the teacher and q = softmax(H' h') of the student at one position, h and h' their hidden states
after the last norm, H and H' their heads:

    loss = mean over positions of Σ p (log p − log q)          (Hinton et al. 2015, arXiv:1503.02531, at temperature 1)
    ∂loss/∂h' = H'ᵀ (q − p) / positions

Where logits have a soft cap, z = cap · tanh(H h / cap), q − p is multiplied by its slope 1 − (z / cap)².

The teacher runs once: its hidden states are kept, (n, length, hidden), and its logits are made again from them. Logits
are vocabulary-wide, so positions are worked on CHUNK at a time, and the gradient by h' is taken in the forward pass:
no more than a chunk's logits are ever held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput.decoder import soft_capped

CHUNK = 256  # positions


class _Divergence(torch.autograd.Function):
    """Sum over positions of the divergence, and by the way its gradient."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor, softcap: float
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student)
        for start in range(0, len(student), CHUNK):
            part = slice(start, start + CHUNK)
            wanted = F.linear(teacher[part].to(teacher_head.dtype), teacher_head).float()
            logits = soft_capped(F.linear(student[part].to(head.dtype), head).float(), softcap)
            log_p, log_q = soft_capped(wanted, softcap).log_softmax(-1), logits.log_softmax(-1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            error = log_q.exp_().sub_(p)
            if softcap:
                error *= 1 - (logits / softcap).square()
            gradient[part] = error.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None


def divergence(student: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor, softcap: float = 0.0) -> Tensor:
    """Summed over positions, in nats: hidden states (n, hidden) after the last norm, heads (vocab, hidden).

    Heads are frozen. Logits are computed in the heads' dtype, softmax in float32.
    """
    found: Tensor = _Divergence.apply(student, teacher, head, teacher_head, softcap)  # type: ignore[no-untyped-call]
    return found
