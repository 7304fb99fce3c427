"""The losses equal transformers' own and a naive sum."""

import torch
from torch.nn import functional

from slimllm_ops.training.losses import IGNORED, cross_entropy, divergence


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 3:] = IGNORED
    labels[1, :2] = IGNORED
    return student, teacher, labels


def test_cross_entropy_is_that_of_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    student, _, labels = logits_and_labels()
    counted = (labels[:, 1:] != IGNORED).sum()
    mean = ForCausalLMLoss(student, labels, vocab_size=7)
    torch.testing.assert_close(cross_entropy(student, None, labels) / counted, mean)


def test_divergence_is_the_sum_over_tokens_that_count() -> None:
    student, teacher, labels = logits_and_labels()
    expected = torch.zeros(())
    for row in range(2):
        for position in range(4):
            if labels[row, position + 1] != IGNORED:
                p, q = teacher[row, position].softmax(-1), student[row, position].softmax(-1)
                expected += (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(divergence(student, teacher, labels), expected)
    assert divergence(teacher, teacher, labels).abs() < 1e-6


def test_the_gradient_of_a_divergence_is_the_difference_of_probabilities() -> None:
    student, teacher, labels = logits_and_labels()
    student.requires_grad_()
    divergence(student, teacher, labels).backward()
    counted = functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    expected = (student.softmax(-1) - teacher.softmax(-1)) * counted[..., None]
    torch.testing.assert_close(student.grad, expected.detach())
