"""torchao's int4: the codes of the file are the weights that its kernel multiplies by."""

import pytest
import torch
import torch.nn.functional as F

from lorica.exports.torchao import GROUP, _codes, _pack


def test_the_kernel_multiplies_by_what_the_codes_stand_for() -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    torch.manual_seed(0)
    weight, x = torch.randn(64, 96, dtype=torch.bfloat16), torch.randn(5, 96, dtype=torch.bfloat16)
    scales = Int4OpaqueTensor.from_hp(weight, [1, GROUP]).scale_and_zero.contiguous()
    codes = _codes(weight, scales)
    scale, zero = scales.float().unbind(-1)
    plain = ((codes.float().reshape(64, -1, GROUP) - 8) * scale.T[..., None] + zero.T[..., None]).reshape(64, 96)
    packed = Int4OpaqueTensor(_pack(codes), scales, [1, GROUP], codes.shape)
    torch.testing.assert_close(F.linear(x, packed).float(), x.float() @ plain.T, rtol=0.02, atol=0.05)
    assert (plain - weight.float()).abs().max() <= 0.51 * scale.max() + 0.02 and codes.min() == 0 and codes.max() == 15
