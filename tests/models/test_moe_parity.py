"""The mixture of experts against the independent reference: forward and all gradients, float64.

Router scores are fp32 whatever the dtype of the model; Megatron-Core 0.16 goes back to float64 right after the sigmoid,
as the reference does, 0.19 after the normalisation.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llada_mega.models import build_model
from llada_mega.models.router import BalancedRouter
from llada_mega.parallel.megatron_compat import VERSION
from tests.models import reference
from tests.models.helpers import assert_close, bdlm_inputs, hf_gradients, hf_weights, moe_config, randomize

pytestmark = pytest.mark.latest
DOCUMENTS = [10, 6]
TOLERANCE = 1e-10 if VERSION < (0, 17) else 1e-6


@pytest.mark.parametrize("shared", [40, 0])
def test_forward_and_gradients_equal_the_reference(shared: int) -> None:
    config = moe_config()
    config.moe.shared_expert_ffn_hidden_size = shared
    model = build_model(config, dtype=torch.float64)
    randomize(model)
    weights = hf_weights(model, requires_grad=True)
    assert all(t.abs().max() > 0.1 for name, t in weights.items() if name.endswith("expert_bias"))

    ids, position, carrier, masked = bdlm_inputs(config, DOCUMENTS, 4)
    rows = masked.nonzero()[:, 0]
    labels, row_weights = ids[0, len(masked) + rows], torch.linspace(0.5, 3.0, len(rows), dtype=torch.float64)
    with torch.no_grad():
        actual_logits = model(ids, position, carrier)
    expected_logits = reference.logits(ids, position, reference.equation_3(DOCUMENTS, 4), weights, config)[0]
    assert_close(actual_logits, expected_logits, TOLERANCE, "logits")

    cross_entropy = F.cross_entropy(expected_logits[rows], labels, reduction="none")
    (cross_entropy * row_weights).sum().backward()
    out = model(ids, position, carrier, logit_rows_R=rows, labels_R=labels, weights_R=row_weights)
    out.loss_sum.backward()
    assert_close(out.cross_entropy_R, cross_entropy.detach(), TOLERANCE, "cross entropy")
    gradients = hf_gradients(model)
    for name, weight in weights.items():
        if name.endswith("expert_bias"):
            assert weight.grad is None
        elif weight.grad is None:  # an expert that no token chose
            assert gradients[name].abs().max() == 0.0, name
        else:
            assert_close(gradients[name], weight.grad, TOLERANCE, name)


def test_the_expert_bias_changes_the_choice_but_not_the_weights() -> None:
    """With all scores equal, the bias alone decides, and the weights stay equal."""
    config = moe_config()
    router = next(m for m in build_model(config).modules() if isinstance(m, BalancedRouter))
    with torch.no_grad():
        router.weight.zero_()
        router.expert_bias.zero_()
        router.expert_bias[[4, 6, 13, 15]] = 1.0
        probabilities, routing_map = router(torch.randn(5, 1, config.hidden_size))
    assert routing_map.nonzero()[:, 1].view(5, 4).tolist() == [[4, 6, 13, 15]] * 5
    torch.testing.assert_close(probabilities[routing_map], torch.full((20,), config.moe.routed_scaling_factor / 4))


def test_groups_are_ranked_by_their_two_best_experts() -> None:
    """One very good expert in a group of bad ones loses against two good ones; the router works in fp32."""
    config = moe_config()
    model = build_model(config, dtype=torch.bfloat16)
    router = next(m for m in model.modules() if isinstance(m, BalancedRouter))
    bias = torch.zeros(16)
    bias[0] = 1.5  # group 0: 1.5 + 0
    bias[[4, 5]] = 1.0  # group 1: 2.0
    bias[[8, 9, 10]] = 0.8  # group 2: 1.6 of the two best
    with torch.no_grad():
        router.weight.zero_()
        router.expert_bias.copy_(bias)
        probabilities, routing_map = router(torch.randn(1, 1, config.hidden_size, dtype=torch.bfloat16))
    assert routing_map[0].nonzero()[:, 0].tolist()[:2] == [4, 5]
    assert set(routing_map[0].nonzero()[:, 0].tolist()[2:]) <= {8, 9, 10}
    assert probabilities.dtype == torch.float32
    assert router.expert_bias.dtype == torch.float32
