"""Attention by torch's fused kernels: none of them holds T x T scores or a mask."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manifold_hc.models import AttentionConfig, LatentAttention
from manifold_hc.models.attention import _attend_within
from manifold_hc.models.documents import group_documents

CONFIG = AttentionConfig(heads=2, head_size=8, rotary_size=4, latent_size=8)
T = 256


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def documents_of(lengths):
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)


LENGTHS = {"one": None, "many": (100, 1, 1, 27, 64, 62, 1), "long": (255, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_fused_kernel_is_taken_and_nothing_is_t_by_t(lengths, dtype):
    attention = LatentAttention(16, CONFIG, norm_eps=1e-20).to(dtype)
    documents = None if lengths is None else group_documents(documents_of(lengths))
    u = torch.randn(1, T, 16, dtype=dtype, requires_grad=True)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), LargestTensor() as seen:
        attention(u, documents).sum().backward()
    assert T * 24 <= seen.elements < T * T


@pytest.mark.parametrize(
    "rows",
    [
        [[0] * 9, [5] * 9],
        [[1] * 9, [1] * 9],
        [[3, 3, 3, 4, 4, 4, 4, 7, 7], [1, 1, 1, 1, 1, 1, 2, 2, 2]],
        [[0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 7, 6, 6, 6, 5, 5, 5]],
        [[0, 1, 0, 1, 1, 0, 2, 0, 2], [0, 0, 0, 0, 0, 0, 0, 0, 1]],
    ],
    ids=["whole rows", "rows of one number", "runs", "single tokens", "mingled"],
)
def test_attention_within_documents_is_that_under_their_mask(rows):
    documents = torch.tensor(rows)
    groups = group_documents(documents)
    mask = (documents.unsqueeze(-1) == documents.unsqueeze(-2)).tril().unsqueeze(1)
    given = [torch.randn(2, 3, 9, size, dtype=torch.float64) for size in (6, 6, 4)]
    given = [each.requires_grad_() for each in given]
    weights = torch.randn(2, 3, 9, 4, dtype=torch.float64)

    wanted = scaled_dot_product_attention(*given, attn_mask=mask)
    found = _attend_within(groups, *given)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found, given, weights),
        torch.autograd.grad(wanted, given, weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)])
def test_a_batch_without_tokens(shape):
    attention = LatentAttention(16, CONFIG, norm_eps=1e-20)
    u = torch.randn(*shape, 16, requires_grad=True)
    for documents in (None, group_documents(torch.zeros(shape, dtype=torch.int64))):
        out = attention(u, documents)
        assert out.shape == u.shape
        out.sum().backward()


def test_groups_hold_every_token_once_and_pad_no_document_to_twice_its_length():
    lengths = [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 94]
    documents = group_documents(documents_of(lengths))
    groups, slots = documents.groups, documents.slots
    flat = torch.cat([group.flatten() for group in groups])
    assert torch.equal(flat[slots], torch.arange(T))
    assert len(groups) <= 9
    assert len(flat) < 2 * T
    for group in groups:
        shortest = min(len(row.unique()) for row in group)
        assert group.shape[1] < 2 * shortest
