"""Task metrics against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.metrics import accuracy, perplexity


class Fixed(nn.Module):
    """Answers with given numbers, whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.register_buffer("answer", answer)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """The first answers, one per sample."""
        return {"logits": self.get_buffer("answer")[: input_ids.shape[0]]}


def by_hand(logits: Tensor, ids: Tensor, mask: Tensor) -> float:
    """exp of the mean of -log p(next token) over pairs of real positions, with scalar loops."""
    total, count = 0.0, 0
    for row in range(ids.shape[0]):
        for position in range(ids.shape[1] - 1):
            if bool(mask[row, position]) and bool(mask[row, position + 1]):
                exponents = [math.exp(v) for v in logits[row, position].tolist()]
                total -= math.log(exponents[int(ids[row, position + 1])] / sum(exponents))
                count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("named", [True, False])
def test_perplexity(named: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    ids = torch.randint(0, 7, (3, 5), generator=generator)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, :2] = False
    mask[2, 3:] = False
    batch = Batch(kwargs={"input_ids": ids}, mask=mask) if named else Batch(args=(ids,), mask=mask)
    assert perplexity(Fixed(logits), [batch]) == pytest.approx(by_hand(logits, ids, mask))
    whole = Batch(args=(ids,))
    assert perplexity(Fixed(logits), [whole]) == pytest.approx(by_hand(logits, ids, torch.ones_like(mask)))
    # Batches are pooled by tokens, not averaged.
    parts = [whole.narrow(0, 1)] * 2
    assert perplexity(Fixed(logits), parts) == pytest.approx(by_hand(logits[:1], ids[:1], mask[1:2]))


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary() -> None:
    assert perplexity(Fixed(torch.zeros(2, 4, 11)), [Batch(args=(torch.zeros(2, 4, dtype=torch.int64),))]) == (
        pytest.approx(11)
    )


def test_perplexity_of_nothing_is_refused() -> None:
    model = Fixed(torch.zeros(1, 3, 5))
    ids = torch.zeros(1, 3, dtype=torch.int64)
    single = torch.tensor([[False, True, False]])
    with pytest.raises(InputError, match="at least two tokens"):
        perplexity(model, [Batch(args=(ids,), mask=single)])
    with pytest.raises(NonFiniteError):
        perplexity(Fixed(torch.full((1, 3, 5), math.nan)), [Batch(args=(ids,))])


def test_accuracy_takes_the_lowest_index_on_a_tie() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 3.0], [0.0, 5.0, 5.0], [1.0, 0.0, 0.0]])
    ids = torch.zeros(4, 1, dtype=torch.int64)
    for labels, share in (([1, 0, 1, 0], 1.0), ([1, 1, 2, 0], 0.5), ([0, 1, 0, 2], 0.0)):
        batch = Batch(args=(ids,), labels=torch.tensor(labels))
        assert accuracy(Fixed(scores), [batch]) == share
    halves = [Batch(args=(ids[:1],), labels=torch.tensor([1])), Batch(args=(ids,), labels=torch.tensor([0, 1, 0, 2]))]
    assert accuracy(Fixed(scores), halves) == pytest.approx(1 / 5)


def test_accuracy_needs_labels() -> None:
    with pytest.raises(InputError, match="labels"):
        accuracy(Fixed(torch.zeros(1, 2)), [Batch(args=(torch.zeros(1, 1, dtype=torch.int64),))])


def test_perplexity_of_a_decoder_is_over_its_labels() -> None:
    class Decoder(nn.Module):
        """Logits by the token that was read last."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 7)

        def forward(self, features: Tensor, decoder_input_ids: Tensor) -> Tensor:
            return torch.as_tensor(self.table(decoder_input_ids)) + features[:, None]

    model = Decoder()
    read = torch.tensor([[0, 1, 2], [0, 3, 0]])
    written = torch.tensor([[1, 2, 6], [3, -100, -100]])
    features = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    batch = Batch(kwargs={"features": features, "decoder_input_ids": read}, labels=written)
    with torch.no_grad():
        chances = model(features, read).double().log_softmax(-1)
    nats = [-float(chances[0, i, written[0, i]]) for i in range(3)] + [-float(chances[1, 0, 3])]
    assert perplexity(model, [batch]) == pytest.approx(math.exp(sum(nats) / 4))
