r"""Defines the losses of a training step, summed over the tokens that count.

    cross entropy    - log p(x_t | x_<t)
    divergence       KL(teacher || student) = sum_v p(v) (log p(v) - log q(v)),   temperature 1, the full vocabulary

Shapes: b sequences of T tokens, V vocabulary.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

# The label of a token whose prediction does not count.
IGNORED = -100

# Maps the student's logits (b, T, V), the teacher's (None without a teacher) and the labels (b, T) to the summed loss.
Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def cross_entropy(student_bTV: Tensor, teacher_bTV: Tensor | None, labels_bT: Tensor) -> Tensor:
    """Return the negative log-likelihood of the labels, in nats, summed over the tokens that count.

    Args:
        student_bTV: The student's logits; those at position t predict the label at t + 1.
        teacher_bTV: Not used.
        labels_bT: The token ids; `IGNORED` where a token does not count.
    """
    logits, labels = student_bTV[:, :-1].flatten(0, 1), labels_bT[:, 1:].flatten()
    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def divergence(student_bTV: Tensor, teacher_bTV: Tensor | None, labels_bT: Tensor) -> Tensor:
    """Return KL(teacher || student), in nats, summed over the tokens that count (Hinton et al. 2015).

    Args:
        student_bTV: The student's logits; those at position t predict the label at t + 1.
        teacher_bTV: The teacher's logits.
        labels_bT: The token ids; `IGNORED` where a token does not count.
    """
    assert teacher_bTV is not None, "distillation has a teacher"
    counted = labels_bT[:, 1:] != IGNORED
    student, teacher = student_bTV[:, :-1][counted], teacher_bTV[:, :-1][counted]
    log_student, log_teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
